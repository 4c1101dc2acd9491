//! Tables `models`, `checkpoints` and `checkpoint_files`. Checkpoints and files never change.
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use sqlx::any::AnyRow;

use super::{Double, Hold, Tx, column, digest, parsed, signed, unsigned};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::{Commit, RequestId, RoundId, SubmissionId};

/// A named line of checkpoints.
#[derive(Debug, Clone)]
pub struct ModelRow {
    /// Its name.
    pub name: String,
    /// The newest checkpoint's revision.
    pub head_revision: u32,
    /// When it was made.
    pub created: Timestamp,
}

/// An immutable revision.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointRow {
    /// The model's name.
    pub model: String,
    /// 0 is the base.
    pub revision: u32,
    /// Start of the manifest's digest.
    pub commit: Commit,
    /// The revision it was made from; none for the base.
    pub parent: Option<Commit>,
    /// The round that published it; none for the base.
    pub round: Option<RoundId>,
    /// How many contributions are stacked in it.
    pub contributions: u32,
    /// The signed manifest's blob.
    pub manifest: Digest,
    /// Nats per scored token on the gate set of its round.
    pub gate_loss: Option<f64>,
    /// The same on the audit set.
    pub audit_loss: Option<f64>,
    /// The round's revision of which this is a fold without revoked contributions.
    pub refold_of: Option<u32>,
    /// Norm and effective rank of the stack, JSON; see [`crate::folding::Spectra`].
    pub spectrum: Option<String>,
    /// When it was made.
    pub created: Timestamp,
}

/// Which folder a file belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Folder {
    /// The Hugging Face folder.
    Checkpoint,
    /// The round's stack as one PEFT adapter.
    Stack,
    /// The same at the recipe's rank; paths begin with `stack-rRANK/`.
    Compressed,
}

impl Folder {
    /// The word in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Stack => "stack",
            Self::Compressed => "compressed",
        }
    }
}

/// A file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRow {
    /// Relative, checked.
    pub path: String,
    /// Its bytes.
    pub blob: BlobName,
    /// 64 lowercase hex digits; what Hugging Face clients check.
    pub sha256: String,
}

const MODEL_COLUMNS: &str = "name, head_revision, created_ms";
const CHECKPOINT_COLUMNS: &str = "model, revision, commit_id, parent_commit, round_id, \
     contributions, manifest, gate_loss, audit_loss, refold_of, spectrum, created_ms";

fn small(row: &AnyRow, table: &'static str, name: &'static str) -> Result<u32, Error> {
    let number = unsigned(row, table, name)?;
    u32::try_from(number).map_err(|_| Error::inconsistent(table, name, number))
}

fn model(row: &AnyRow) -> Result<ModelRow, Error> {
    Ok(ModelRow {
        name: column(row, "name")?,
        head_revision: small(row, "models", "head_revision")?,
        created: Timestamp(column(row, "created_ms")?),
    })
}

fn optional<T: std::str::FromStr>(row: &AnyRow, name: &'static str) -> Result<Option<T>, Error> {
    let text: Option<String> = column(row, name)?;
    text.map(|text| {
        text.parse()
            .map_err(|_| Error::inconsistent("checkpoints", name, &text))
    })
    .transpose()
}

fn checkpoint(row: &AnyRow) -> Result<CheckpointRow, Error> {
    let refold_of: Option<i64> = column(row, "refold_of")?;
    let refold_of = refold_of.map(u32::try_from).transpose();
    Ok(CheckpointRow {
        model: column(row, "model")?,
        revision: small(row, "checkpoints", "revision")?,
        commit: parsed(row, "checkpoints", "commit_id")?,
        parent: optional(row, "parent_commit")?,
        round: optional(row, "round_id")?,
        contributions: small(row, "checkpoints", "contributions")?,
        manifest: digest(row, "checkpoints", "manifest")?,
        gate_loss: column(row, "gate_loss")?,
        audit_loss: column(row, "audit_loss")?,
        refold_of: refold_of
            .map_err(|_| Error::inconsistent("checkpoints", "refold_of", "out of range"))?,
        spectrum: column(row, "spectrum")?,
        created: Timestamp(column(row, "created_ms")?),
    })
}

/// Adds a model whose head is revision 0, to be inserted in the same transaction. False when the
/// name or the request id exists.
///
/// # Errors
/// When the query fails.
pub async fn model_insert(
    tx: &mut Tx,
    name: &str,
    request: RequestId,
    now: Timestamp,
) -> Result<bool, Error> {
    let done = sqlx::query(
        "insert into models (name, head_revision, created_ms, request_id) \
         values ($1, 0, $2, $3) on conflict do nothing",
    )
    .bind(name)
    .bind(now.0)
    .bind(request.to_string())
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Holds a model's row, so that of two transactions that decide what becomes of it one waits for the
/// other.
///
/// # Errors
/// When the query fails.
pub async fn model_hold(tx: &mut Tx, name: &str) -> Result<(), Error> {
    let held = tx.hold(Hold::Alone, "models");
    let sql = format!("select name from models where name = $1{held}");
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(name)
        .fetch_optional(tx.conn())
        .await?;
    Ok(())
}

/// The model with this name.
///
/// # Errors
/// When the query fails.
pub async fn model_get(tx: &mut Tx, name: &str) -> Result<Option<ModelRow>, Error> {
    let sql = format!("select {MODEL_COLUMNS} from models where name = $1");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(name)
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(model).transpose()
}

/// The model that this request made.
///
/// # Errors
/// When the query fails.
pub async fn model_by_request(tx: &mut Tx, request: RequestId) -> Result<Option<ModelRow>, Error> {
    let sql = format!("select {MODEL_COLUMNS} from models where request_id = $1");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(request.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(model).transpose()
}

/// Models by name after `after`, at most `limit`.
///
/// # Errors
/// When the query fails.
pub async fn model_list(tx: &mut Tx, after: &str, limit: i64) -> Result<Vec<ModelRow>, Error> {
    let sql = format!("select {MODEL_COLUMNS} from models where name > $1 order by name limit $2");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(after)
        .bind(limit)
        .fetch_all(tx.conn())
        .await?;
    rows.iter().map(model).collect()
}

/// Moves a model's head from one revision to another, or holds it where it is; nobody else moves it
/// until the transaction ends. False when it was no longer there.
///
/// # Errors
/// When the query fails.
pub async fn model_head_move(tx: &mut Tx, name: &str, from: u32, to: u32) -> Result<bool, Error> {
    let done =
        sqlx::query("update models set head_revision = $3 where name = $1 and head_revision = $2")
            .bind(name)
            .bind(i64::from(from))
            .bind(i64::from(to))
            .execute(tx.conn())
            .await?;
    Ok(done.rows_affected() == 1)
}

/// Adds a checkpoint with the files of its folders, whose blobs are held. False when the revision
/// exists.
///
/// # Errors
/// When a query fails.
pub async fn checkpoint_insert(
    tx: &mut Tx,
    checkpoint: &CheckpointRow,
    folders: &[(Folder, &[FileRow])],
) -> Result<bool, Error> {
    let done = sqlx::query(
        "insert into checkpoints (model, revision, commit_id, parent_commit, round_id, \
         contributions, manifest, gate_loss, audit_loss, refold_of, spectrum, created_ms) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) on conflict do nothing",
    )
    .bind(checkpoint.model.as_str())
    .bind(i64::from(checkpoint.revision))
    .bind(checkpoint.commit.to_string())
    .bind(checkpoint.parent.map(|commit| commit.to_string()))
    .bind(checkpoint.round.map(|round| round.to_string()))
    .bind(i64::from(checkpoint.contributions))
    .bind(checkpoint.manifest.to_string())
    .bind(Double(checkpoint.gate_loss))
    .bind(Double(checkpoint.audit_loss))
    .bind(checkpoint.refold_of.map(i64::from))
    .bind(checkpoint.spectrum.clone())
    .bind(checkpoint.created.0)
    .execute(tx.conn())
    .await?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    for (folder, files) in folders {
        for file in *files {
            sqlx::query(
                "insert into checkpoint_files \
                 (model, revision, folder, path, digest, size_bytes, sha256) \
                 values ($1, $2, $3, $4, $5, $6, $7)",
            )
            .bind(checkpoint.model.as_str())
            .bind(i64::from(checkpoint.revision))
            .bind(folder.as_str())
            .bind(file.path.as_str())
            .bind(file.blob.digest.to_string())
            .bind(signed(file.blob.size_bytes))
            .bind(file.sha256.as_str())
            .execute(tx.conn())
            .await?;
        }
    }
    Ok(true)
}

/// One revision of a model.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_get(
    tx: &mut Tx,
    model: &str,
    revision: u32,
) -> Result<Option<CheckpointRow>, Error> {
    let sql =
        format!("select {CHECKPOINT_COLUMNS} from checkpoints where model = $1 and revision = $2");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(model)
        .bind(i64::from(revision))
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(checkpoint).transpose()
}

/// The revision that a new checkpoint of a model gets.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_next(tx: &mut Tx, model: &str) -> Result<u32, Error> {
    let row = sqlx::query(
        "select cast(coalesce(max(revision) + 1, 0) as bigint) as revision \
         from checkpoints where model = $1",
    )
    .bind(model)
    .fetch_one(tx.conn())
    .await?;
    small(&row, "checkpoints", "revision")
}

/// The newest fold of a round's revision without revoked contributions, if there is one.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_refold(
    tx: &mut Tx,
    model: &str,
    origin: u32,
) -> Result<Option<CheckpointRow>, Error> {
    let sql = format!(
        "select {CHECKPOINT_COLUMNS} from checkpoints \
         where model = $1 and refold_of = $2 order by revision desc limit 1"
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(model)
        .bind(i64::from(origin))
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(checkpoint).transpose()
}

/// Checkpoints that a contribution is part of, oldest first, at most `limit`.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_list_of(
    tx: &mut Tx,
    submission: SubmissionId,
    limit: i64,
) -> Result<Vec<CheckpointRow>, Error> {
    let sql = format!(
        "select {CHECKPOINT_COLUMNS} from checkpoints p where exists \
         (select 1 from checkpoint_contributions c where c.submission_id = $1 \
          and c.model = p.model and c.revision = p.revision) \
         order by model, revision limit $2"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(submission.to_string())
        .bind(limit)
        .fetch_all(tx.conn())
        .await?;
    rows.iter().map(checkpoint).collect()
}

/// Checkpoints of any model with contributions that nobody has noted one by one: those of older
/// programs.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_unnoted(tx: &mut Tx) -> Result<Vec<CheckpointRow>, Error> {
    let sql = format!(
        "select {CHECKPOINT_COLUMNS} from checkpoints p where contributions > 0 and not exists \
         (select 1 from checkpoint_contributions c where c.model = p.model \
          and c.revision = p.revision) order by model, revision"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .fetch_all(tx.conn())
        .await?;
    rows.iter().map(checkpoint).collect()
}

/// Checkpoints of a model whose commit begins with these hex digits, at most two.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_by_commit(
    tx: &mut Tx,
    model: &str,
    start: &str,
) -> Result<Vec<CheckpointRow>, Error> {
    let sql = format!(
        "select {CHECKPOINT_COLUMNS} from checkpoints \
         where model = $1 and substr(commit_id, 1, $2) = $3 order by revision limit 2"
    );
    // `substr` takes an `integer` on PostgreSQL; a commit has 40 digits.
    let length = i32::try_from(start.len()).unwrap_or(i32::MAX);
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(model)
        .bind(length)
        .bind(start)
        .fetch_all(tx.conn())
        .await?;
    rows.iter().map(checkpoint).collect()
}

/// Checkpoints of a model below a revision, newest first, at most `limit`.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_list(
    tx: &mut Tx,
    model: &str,
    below: i64,
    limit: i64,
) -> Result<Vec<CheckpointRow>, Error> {
    let sql = format!(
        "select {CHECKPOINT_COLUMNS} from checkpoints where model = $1 and revision < $2 \
         order by revision desc limit $3"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(model)
        .bind(below)
        .bind(limit)
        .fetch_all(tx.conn())
        .await?;
    rows.iter().map(checkpoint).collect()
}

/// The files of one folder of a checkpoint, by path.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_files(
    tx: &mut Tx,
    model: &str,
    revision: u32,
    folder: Folder,
) -> Result<Vec<FileRow>, Error> {
    let rows = sqlx::query(
        "select path, digest, size_bytes, sha256 from checkpoint_files \
         where model = $1 and revision = $2 and folder = $3 order by path",
    )
    .bind(model)
    .bind(i64::from(revision))
    .bind(folder.as_str())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            Ok(FileRow {
                path: column(row, "path")?,
                blob: BlobName {
                    digest: digest(row, "checkpoint_files", "digest")?,
                    size_bytes: unsigned(row, "checkpoint_files", "size_bytes")?,
                },
                sha256: column(row, "sha256")?,
            })
        })
        .collect()
}
