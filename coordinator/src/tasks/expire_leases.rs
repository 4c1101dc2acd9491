//! Leases that have run out are ended, and their work is put back.
use tracing::warn;

use super::Done;
use crate::app::App;
use crate::db::leases::lease_overdue;
use crate::domain::lease::State;
use crate::error::Error;
use crate::ops::release_lease::lease_end;

/// Leases ended in one transaction: it holds the write lock.
const BATCH: u32 = 100;

/// One batch.
///
/// # Errors
/// When the database fails.
pub async fn run(app: &App) -> Result<Done, Error> {
    let now = app.clock.now_ms();
    let mut tx = app.db.read().await?;
    let none = lease_overdue(&mut tx, now, 1).await?.is_empty();
    drop(tx);
    if none {
        return Ok(Done::All);
    }
    let mut tx = app.db.begin().await?;
    let overdue = lease_overdue(&mut tx, now, BATCH).await?;
    for lease in &overdue {
        lease_end(&mut tx, lease, State::Expired, "", now).await?;
    }
    tx.commit().await?;
    app.wake.all();
    for lease in &overdue {
        warn!(lease.id = %lease.id, round.id = %lease.round, "a lease ran out: {:?}", lease.work);
    }
    Ok(Done::Part)
}
