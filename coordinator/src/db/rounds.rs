//! Rounds. Each move is guarded by the state it leaves: zero rows mean that somebody was faster.
use cairn_stack::recipe::RoundFile;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::blobs::{Keep, blob_keep};
use super::models::{checkpoint_get, model_hold};
use super::{Double, Hold, Tx, column, parsed, signed, unsigned};
use crate::carry::Carry;
use crate::clock::Timestamp;
use crate::domain::round::{FailReason, Phase, State};
use crate::domain::stacker::Choice;
use crate::error::Error;
use crate::ids::{Commit, RequestId, RoundId};

/// A round as stored.
#[derive(Debug, Clone)]
pub struct Round {
    /// Its id.
    pub id: RoundId,
    /// The model's name.
    pub model: String,
    /// The base's revision.
    pub base_revision: u32,
    /// The base's commit.
    pub base_commit: Commit,
    /// The training dataset's name.
    pub dataset: String,
    /// What was asked for.
    pub file: RoundFile,
    /// Where it stands.
    pub phase: Phase,
    /// Why it ended without a checkpoint; empty otherwise.
    pub reason: String,
    /// Largest adapter upload, bytes.
    pub adapter_bytes_max: u64,
    /// The factors that training starts from, when not fresh ones.
    pub carry: Option<Carry>,
    /// What it published.
    pub published: Option<(u32, Commit)>,
    /// Losses, as far as known.
    pub losses: Losses,
    /// When it was made.
    pub created: Timestamp,
    /// When training ends at the latest.
    pub deadline: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
}

/// Losses of a round, nats per token, as far as known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Losses {
    /// The base's on the gate set.
    pub gate_before: Option<f64>,
    /// The published checkpoint's on the gate set.
    pub gate_after: Option<f64>,
    /// The base's on the audit set.
    pub audit_before: Option<f64>,
    /// The published checkpoint's on the audit set.
    pub audit_after: Option<f64>,
}

/// A round to be stored, in its first state.
#[derive(Debug, Clone)]
pub struct NewRound<'a> {
    /// Its id.
    pub id: RoundId,
    /// What is asked for.
    pub file: &'a RoundFile,
    /// The base's revision.
    pub base_revision: u32,
    /// The base's commit.
    pub base_commit: Commit,
    /// Its state.
    pub phase: Phase,
    /// Largest adapter upload, bytes.
    pub adapter_bytes_max: u64,
    /// The factors that training starts from, when not fresh ones; their blob has its row.
    pub carry: Option<&'a Carry>,
    /// Now.
    pub created: Timestamp,
    /// When training ends at the latest.
    pub deadline: Timestamp,
    /// The caller's request.
    pub request: RequestId,
}

const COLUMNS: &str = "select r.id, r.model, r.base_revision, r.base_commit, r.dataset, \
    r.round_file, r.adapter_bytes_max, r.carry, r.state, r.reason, r.choice, r.published_revision, \
    r.gate_loss_before, r.gate_loss_after, r.audit_loss_before, r.audit_loss_after, r.created_ms, \
    r.deadline_ms, r.ended_ms, c.commit_id as published_commit \
    from rounds r left join checkpoints c \
    on c.model = r.model and c.revision = r.published_revision";

fn select(rest: &str) -> sqlx::AssertSqlSafe<String> {
    // Both parts are constants of this file.
    sqlx::AssertSqlSafe(format!("{COLUMNS} {rest}"))
}

/// Stores a new round.
pub async fn round_insert(tx: &mut Tx, round: &NewRound<'_>) -> Result<(), Error> {
    let carry = round.carry.map(serde_json::to_string).transpose();
    let carry = carry.map_err(|error| Error::internal("write a carry", error))?;
    sqlx::query(
        "insert into rounds (id, model, base_revision, base_commit, dataset, round_file, \
         adapter_bytes_max, state, created_ms, deadline_ms, request_id, carry) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    )
    .bind(round.id.to_string())
    .bind(&round.file.model)
    .bind(i64::from(round.base_revision))
    .bind(round.base_commit.to_string())
    .bind(&round.file.dataset)
    .bind(round.file.to_toml())
    .bind(signed(round.adapter_bytes_max))
    .bind(round.phase.state().as_str())
    .bind(round.created.0)
    .bind(round.deadline.0)
    .bind(round.request.to_string())
    .bind(carry)
    .execute(tx.conn())
    .await?;
    if let Some(carry) = round.carry {
        // A replay of the round's training starts from it.
        blob_keep(tx, carry.weights.digest, round.id, Keep::Forever).await?;
    }
    Ok(())
}

/// Finds a round.
pub async fn round_get(tx: &mut Tx, id: RoundId) -> Result<Option<Round>, Error> {
    let row = sqlx::query(select("where r.id = $1"))
        .bind(id.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(Round::try_from).transpose()
}

/// Finds a round, whose state stays as it is until this transaction ends.
pub async fn round_get_held(tx: &mut Tx, id: RoundId) -> Result<Option<Round>, Error> {
    let held = tx.hold(Hold::Unchanged, "r");
    let row = sqlx::query(select(&format!("where r.id = $1{held}")))
        .bind(id.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(Round::try_from).transpose()
}

/// The round that published a revision; nothing for the base of all.
pub async fn round_behind(tx: &mut Tx, model: &str, revision: u32) -> Result<Option<Round>, Error> {
    let checkpoint = checkpoint_get(tx, model, revision).await?;
    match checkpoint.and_then(|checkpoint| checkpoint.round) {
        Some(id) => round_get(tx, id).await,
        None => Ok(None),
    }
}

/// Finds the round that a request made.
pub async fn round_by_request(tx: &mut Tx, request: RequestId) -> Result<Option<Round>, Error> {
    let row = sqlx::query(select("where r.request_id = $1"))
        .bind(request.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(Round::try_from).transpose()
}

/// The round of a model that has not ended, if any. Holds the model's row and the round's, so that of
/// two callers one waits for the other.
pub async fn round_active(tx: &mut Tx, model: &str) -> Result<Option<RoundId>, Error> {
    model_hold(tx, model).await?;
    let held = tx.hold(Hold::Alone, "rounds");
    let sql = format!(
        "select id from rounds where model = $1 \
         and state in ('draft', 'training', 'judging', 'folding') limit 1{held}"
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(model)
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref()
        .map(|row| parsed(row, "rounds", "id"))
        .transpose()
}

/// Rounds, newest first, of one model or of all, that come after the given one.
pub async fn round_list(
    tx: &mut Tx,
    model: &str,
    after: Option<(Timestamp, RoundId)>,
    limit: u32,
) -> Result<Vec<Round>, Error> {
    let (created, id) = after.map_or((i64::MAX, String::new()), |(created, id)| {
        (created.0, id.to_string())
    });
    let rows = sqlx::query(select(
        "where ($1 = '' or r.model = $1) \
         and (r.created_ms < $2 or (r.created_ms = $2 and r.id < $3)) \
         order by r.created_ms desc, r.id desc limit $4",
    ))
    .bind(model)
    .bind(created)
    .bind(id)
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Round::try_from).collect()
}

/// Rounds in a state, oldest first.
pub async fn round_in(tx: &mut Tx, state: State, limit: u32) -> Result<Vec<Round>, Error> {
    let rows = sqlx::query(select(
        "where r.state = $1 order by r.created_ms, r.id limit $2",
    ))
    .bind(state.as_str())
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Round::try_from).collect()
}

/// Whether the round is in that state; if so it stays so until this transaction ends.
pub async fn round_hold(tx: &mut Tx, id: RoundId, state: State) -> Result<bool, Error> {
    let held = tx.hold(Hold::Unchanged, "rounds");
    let sql = format!("select id from rounds where id = $1 and state = $2{held}");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(id.to_string())
        .bind(state.as_str())
        .fetch_optional(tx.conn())
        .await?;
    Ok(row.is_some())
}

/// Moves a round from a state to a phase with its facts. False: it was no longer in that state.
pub async fn round_move(tx: &mut Tx, id: RoundId, from: State, to: &Phase) -> Result<bool, Error> {
    let (mut reason, mut choice, mut revision, mut ended) = (String::new(), None, None, None);
    match to {
        Phase::Draft | Phase::Training | Phase::Judging => {}
        Phase::Folding { choice: chosen } => choice = Some(chosen),
        Phase::Published {
            choice: chosen,
            revision: number,
            at,
        } => {
            (choice, revision, ended) = (Some(chosen), Some(i64::from(*number)), Some(at.0));
        }
        Phase::Failed { reason: word, at } => (reason, ended) = (word.to_string(), Some(at.0)),
        Phase::Aborted { reason: text, at } => (reason, ended) = (text.clone(), Some(at.0)),
    }
    let json = choice.map(serde_json::to_string).transpose();
    let json = json.map_err(|error| Error::internal("write a choice", error))?;
    let published = choice.filter(|_| revision.is_some());
    let done = sqlx::query(
        "update rounds set state = $1, reason = $2, choice = coalesce($3, choice), \
         published_revision = $4, ended_ms = $5, gate_loss_after = $6, audit_loss_after = $7 \
         where id = $8 and state = $9",
    )
    .bind(to.state().as_str())
    .bind(reason)
    .bind(json)
    .bind(revision)
    .bind(ended)
    .bind(Double(published.map(|choice| choice.gate_after)))
    .bind(Double(published.and_then(|choice| choice.audit_after)))
    .bind(id.to_string())
    .bind(from.as_str())
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Stores the base's losses.
pub async fn round_base_losses(
    tx: &mut Tx,
    id: RoundId,
    gate: f64,
    audit: Option<f64>,
) -> Result<(), Error> {
    sqlx::query("update rounds set gate_loss_before = $1, audit_loss_before = $2 where id = $3")
        .bind(gate)
        .bind(Double(audit))
        .bind(id.to_string())
        .execute(tx.conn())
        .await?;
    Ok(())
}

impl TryFrom<&AnyRow> for Round {
    type Error = Error;

    fn try_from(row: &AnyRow) -> Result<Self, Error> {
        let id: RoundId = parsed(row, "rounds", "id")?;
        let text: String = column(row, "round_file")?;
        let file = RoundFile::parse_toml(&text)
            .map_err(|_| Error::inconsistent("rounds", "round_file", id))?;
        let published_revision: Option<i64> = column(row, "published_revision")?;
        let published = match published_revision {
            None => None,
            Some(revision) => Some((
                u32::try_from(revision)
                    .map_err(|_| Error::inconsistent("rounds", "published_revision", id))?,
                parsed(row, "checkpoints", "published_commit")?,
            )),
        };
        let ended: Option<i64> = column(row, "ended_ms")?;
        let reason: String = column(row, "reason")?;
        let carry: Option<String> = column(row, "carry")?;
        let carry = carry.map(|json| serde_json::from_str(&json)).transpose();
        let revision = published.map(|(revision, _)| revision);
        Ok(Self {
            id,
            model: column(row, "model")?,
            base_revision: u32::try_from(unsigned(row, "rounds", "base_revision")?)
                .map_err(|_| Error::inconsistent("rounds", "base_revision", id))?,
            base_commit: parsed(row, "rounds", "base_commit")?,
            dataset: column(row, "dataset")?,
            file,
            phase: phase(row, id, &reason, revision, ended.map(Timestamp))?,
            reason,
            adapter_bytes_max: unsigned(row, "rounds", "adapter_bytes_max")?,
            carry: carry.map_err(|_| Error::inconsistent("rounds", "carry", id))?,
            published,
            losses: Losses {
                gate_before: column(row, "gate_loss_before")?,
                gate_after: column(row, "gate_loss_after")?,
                audit_before: column(row, "audit_loss_before")?,
                audit_after: column(row, "audit_loss_after")?,
            },
            created: Timestamp(column(row, "created_ms")?),
            deadline: Timestamp(column(row, "deadline_ms")?),
            ended: ended.map(Timestamp),
        })
    }
}

fn phase(
    row: &AnyRow,
    id: RoundId,
    reason: &str,
    revision: Option<u32>,
    ended: Option<Timestamp>,
) -> Result<Phase, Error> {
    let bad = |name: &'static str| Error::inconsistent("rounds", name, id);
    let at = || ended.ok_or_else(|| bad("ended_ms"));
    let choice = || -> Result<Choice, Error> {
        let json: Option<String> = row.try_get("choice")?;
        serde_json::from_str(&json.unwrap_or_default()).map_err(|_| bad("choice"))
    };
    Ok(match parsed::<State>(row, "rounds", "state")? {
        State::Draft => Phase::Draft,
        State::Training => Phase::Training,
        State::Judging => Phase::Judging,
        State::Folding => Phase::Folding { choice: choice()? },
        State::Published => Phase::Published {
            choice: choice()?,
            revision: revision.ok_or_else(|| bad("published_revision"))?,
            at: at()?,
        },
        State::Failed => Phase::Failed {
            reason: reason.parse::<FailReason>().map_err(|_| bad("reason"))?,
            at: at()?,
        },
        State::Aborted => Phase::Aborted {
            reason: reason.to_owned(),
            at: at()?,
        },
    })
}
