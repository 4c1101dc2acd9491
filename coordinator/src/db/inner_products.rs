//! Table `inner_products`: how the deltas of a round lie to each other, in product space.
//!
//! A pair is there from when the later of the two has been compared with the earlier; its own product,
//! the squared norm, from when it was measured. A pair of which one adapter could no longer be read is
//! absent.
use super::{Tx, column, parsed};
use crate::error::Error;
use crate::ids::{RoundId, SubmissionId};

/// Notes an inner product; noting a pair again, in either order, changes nothing.
///
/// # Errors
/// When the query fails.
pub async fn inner_product_insert(
    tx: &mut Tx,
    round: RoundId,
    (one, other): (SubmissionId, SubmissionId),
    value: f64,
) -> Result<(), Error> {
    let (one, other) = (one.to_string(), other.to_string());
    let (one, other) = if one >= other {
        (one, other)
    } else {
        (other, one)
    };
    sqlx::query(
        "insert into inner_products (round_id, one, other, value) values ($1, $2, $3, $4) \
         on conflict (round_id, one, other) do nothing",
    )
    .bind(round.to_string())
    .bind(one)
    .bind(other)
    .bind(value)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Every pair of a round once, `(one, other, value)`, the own products among them.
///
/// # Errors
/// When the query fails.
pub async fn inner_product_list(
    tx: &mut Tx,
    round: RoundId,
) -> Result<Vec<(SubmissionId, SubmissionId, f64)>, Error> {
    let rows = sqlx::query(
        "select one, other, value from inner_products where round_id = $1 order by one, other",
    )
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            let one = parsed(row, "inner_products", "one")?;
            let other = parsed(row, "inner_products", "other")?;
            Ok((one, other, column(row, "value")?))
        })
        .collect()
}
