//! Submissions as they are compared with each other.
use cairn_stack::digest::Digest;
use sqlx::any::AnyRow;

use super::{Submission, evidence, select};
use crate::clock::Timestamp;
use crate::db::shards::position;
use crate::db::{Tx, column, digest, parsed};
use crate::domain::evidence::Evidence;
use crate::domain::submission::State;
use crate::error::Error;
use crate::ids::{RoundId, SubmissionId};

/// A submission as others of its round are compared with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    /// Its id.
    pub id: SubmissionId,
    /// Its shard.
    pub shard: u32,
    /// The weight file.
    pub adapter: Digest,
    /// Where it stands.
    pub state: State,
    /// Product-space norm, when measured.
    pub norm: Option<f64>,
    /// The numbers known of it.
    pub evidence: Evidence,
    /// When it was acknowledged.
    pub created: Timestamp,
}

/// A round's submissions in order of arrival, as they are compared with each other.
pub async fn submission_peers(tx: &mut Tx, round: RoundId) -> Result<Vec<Peer>, Error> {
    let rows = sqlx::query(
        "select id, shard, adapter, state, norm, evidence, created_ms from submissions \
         where round_id = $1 order by created_ms, id",
    )
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Peer::try_from).collect()
}

impl TryFrom<&AnyRow> for Peer {
    type Error = Error;

    fn try_from(row: &AnyRow) -> Result<Self, Error> {
        let id: SubmissionId = parsed(row, "submissions", "id")?;
        Ok(Self {
            id,
            shard: position(row, "submissions", "shard")?,
            adapter: digest(row, "submissions", "adapter")?,
            state: parsed(row, "submissions", "state")?,
            norm: column(row, "norm")?,
            evidence: evidence(row, id)?,
            created: Timestamp(column(row, "created_ms")?),
        })
    }
}

/// Contributions of other rounds that are part of the same model, newest first: whoever downloads a
/// checkpoint can have them, too.
pub async fn submission_stacked_before(
    tx: &mut Tx,
    round: RoundId,
    limit: u32,
) -> Result<Vec<Submission>, Error> {
    let rows = sqlx::query(select(
        "join rounds r on r.id = s.round_id \
         where s.round_id <> $1 and s.weight <> 0 and s.norm is not null \
         and r.model = (select model from rounds where id = $1) \
         order by s.created_ms desc, s.id desc limit $2",
    ))
    .bind(round.to_string())
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Submission::try_from).collect()
}

/// Whether the same weight file came in earlier under another submission: in this round on another
/// shard (training one shard twice gives one file twice), or as a contribution to the same model.
pub async fn submission_is_copy(tx: &mut Tx, submission: &Submission) -> Result<bool, Error> {
    let row = sqlx::query(
        "select 1 as found from submissions s join rounds r on r.id = s.round_id \
         where s.adapter = $2 and (s.created_ms < $3 or (s.created_ms = $3 and s.id < $4)) \
         and ((s.round_id = $1 and s.shard <> $5) or (s.round_id <> $1 and s.weight <> 0 \
         and r.model = (select model from rounds where id = $1))) limit 1",
    )
    .bind(submission.round.to_string())
    .bind(submission.adapter.to_string())
    .bind(submission.created.0)
    .bind(submission.id.to_string())
    .bind(i64::from(submission.shard))
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.is_some())
}
