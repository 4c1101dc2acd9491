//! Questions across tables that `fsck` asks: what the schema cannot say and still must be true.
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use cairn_stack::merkle::Hash;

use super::{Dialect, Tx, column, digest, parsed, unsigned};
use crate::error::Error;
use crate::ids::WorkerId;

/// A rule: in words what is wrong where the query finds a row, and the query for `what`.
type Rule = (&'static str, &'static str);

/// Rules on both databases. Each is one statement, and so one view of the data.
const RULES: &[Rule] = &[
    (
        "a lease is credited twice",
        "select 'lease ' || s.lease_id as what from submissions s \
         join restored_submissions r on r.lease_id = s.lease_id",
    ),
    (
        "a shard is leased twice",
        "select 'round ' || round_id || ' shard ' || cast(shard as text) as what from leases \
         where state = 'active' and kind = 'train' group by round_id, shard having count(*) > 1",
    ),
    (
        "an evaluation is leased twice",
        "select 'evaluation ' || evaluation_id as what from leases \
         where state = 'active' and kind = 'evaluate' group by evaluation_id having count(*) > 1",
    ),
    (
        "a shard is leased to nobody",
        "select 'round ' || s.round_id || ' shard ' || cast(s.position as text) as what \
         from shards s join rounds r on r.id = s.round_id \
         where r.state = 'training' and s.state = 'leased' and not exists \
         (select 1 from leases l where l.round_id = s.round_id and l.shard = s.position \
          and l.kind = 'train' and l.state = 'active')",
    ),
    (
        "a submission's lease has not ended",
        "select 'submission ' || s.id as what from submissions s \
         join leases l on l.id = s.lease_id where l.state = 'active'",
    ),
    (
        "a revocation and its submission contradict each other",
        "select 'submission ' || s.id as what from submissions s \
         left join revocations r on r.submission_id = s.id \
         where (s.revoked_ms is null) <> (r.submission_id is null)",
    ),
    (
        "a contribution has no submission",
        "select c.model || ' revision ' || cast(c.revision as text) || ': ' || c.submission_id \
         as what from checkpoint_contributions c \
         where not exists (select 1 from submissions s where s.id = c.submission_id)",
    ),
    (
        "a model's head is no checkpoint",
        "select m.name as what from models m where not exists (select 1 from checkpoints p \
         where p.model = m.name and p.revision = m.head_revision)",
    ),
    (
        "a published round has no checkpoint",
        "select 'round ' || r.id as what from rounds r where r.state = 'published' \
         and not exists (select 1 from checkpoints p \
         where p.model = r.model and p.revision = r.published_revision)",
    ),
    (
        "a checkpoint's manifest is no blob",
        "select p.model || ' revision ' || cast(p.revision as text) as what from checkpoints p \
         where not exists (select 1 from blobs b where b.digest = p.manifest)",
    ),
    (
        "an evaluation's scores are no blob",
        "select 'evaluation ' || e.id as what from evaluations e where \
         (e.gate_scores is not null and not exists \
          (select 1 from blobs b where b.digest = e.gate_scores)) or \
         (e.audit_scores is not null and not exists \
          (select 1 from blobs b where b.digest = e.audit_scores))",
    ),
    (
        "a length differs from its blob's",
        "select 'submission ' || s.id as what from submissions s \
         join blobs b on b.digest = s.adapter where b.size_bytes <> s.adapter_bytes \
         union all select f.model || ' revision ' || cast(f.revision as text) || ': ' || f.path \
         from checkpoint_files f join blobs b on b.digest = f.digest \
         where b.size_bytes <> f.size_bytes \
         union all select 'dataset ' || c.dataset || ' chunk ' || cast(c.position as text) \
         from dataset_chunks c join blobs b on b.digest = c.digest \
         where b.size_bytes <> c.size_bytes",
    ),
    (
        "a receipt is not in the log",
        // Receipts of programs without a log state no place in it.
        "select 'submission ' || s.id as what from submissions s \
         where s.receipt_statement like '%\"log_index\"%' and not exists \
         (select 1 from log_entries e where e.body = s.receipt_statement) \
         union all select 'verdict on ' || s.id from submissions s \
         where s.verdict_statement is not null and not exists \
         (select 1 from log_entries e where e.body = s.verdict_statement) \
         union all select 'restored submission ' || r.id from restored_submissions r \
         where not exists (select 1 from log_entries e where e.body = r.receipt_statement)",
    ),
];

/// What only SQLite can be asked: PostgreSQL checks its keys always and its pages by checksums.
const SQLITE_RULES: &[Rule] = &[
    (
        "the database file is damaged",
        "select integrity_check as what from pragma_integrity_check where integrity_check <> 'ok'",
    ),
    (
        "a row names a row that is not there",
        "select \"table\" || ' row ' || cast(rowid as text) || ' names no row of ' || parent \
         as what from pragma_foreign_key_check",
    ),
];

/// Contradictions listed of one rule: enough to see what happened.
const FOUND_MAX: usize = 100;

/// Every broken rule with the rows that break it.
///
/// # Errors
/// When a query fails.
pub async fn contradictions(tx: &mut Tx) -> Result<Vec<(&'static str, String)>, Error> {
    let own: &[Rule] = match tx.dialect {
        Dialect::Sqlite => SQLITE_RULES,
        Dialect::Postgres => &[],
    };
    let mut found = Vec::new();
    for (rule, sql) in own.iter().chain(RULES) {
        let rows = sqlx::query(*sql).fetch_all(tx.conn()).await?;
        for row in rows.iter().take(FOUND_MAX) {
            found.push((*rule, column(row, "what")?));
        }
    }
    Ok(found)
}

/// Blobs with a digest above `after`, by digest, at most `limit`.
///
/// # Errors
/// When the query fails.
pub async fn blob_page(tx: &mut Tx, after: &str, limit: i64) -> Result<Vec<BlobName>, Error> {
    let rows = sqlx::query(
        "select digest, size_bytes from blobs where digest > $1 order by digest limit $2",
    )
    .bind(after)
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            Ok(BlobName {
                digest: digest(row, "blobs", "digest")?,
                size_bytes: unsigned(row, "blobs", "size_bytes")?,
            })
        })
        .collect()
}

/// Who needs a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// A checkpoint, as one of its files or as its manifest.
    Checkpoint {
        /// The model.
        model: String,
        /// The revision.
        revision: u32,
        /// The file.
        path: String,
    },
    /// A chunk of a dataset.
    Dataset(String),
    /// A submission's adapter.
    Adapter {
        /// The submission.
        submission: String,
        /// Who handed it in.
        worker: WorkerId,
    },
    /// The config file of a stacked contribution.
    Contribution(String),
    /// An evaluation's scores.
    Evaluation(String),
    /// Evidence of a round: scores, guides, training states.
    Round(String),
}

/// Who needs a blob; empty for garbage that has not been collected yet.
///
/// # Errors
/// When a query fails.
pub async fn blob_needs(tx: &mut Tx, wanted: Digest) -> Result<Vec<Need>, Error> {
    let rows = sqlx::query(
        "select 'checkpoint' as kind, model as name, revision as number, path as more \
         from checkpoint_files where digest = $1 \
         union all select 'checkpoint', model, revision, 'cairn-manifest.json' \
         from checkpoints p where manifest = $1 and not exists (select 1 from checkpoint_files f \
         where f.model = p.model and f.revision = p.revision and f.digest = p.manifest) \
         union all select 'dataset', dataset, position, '' from dataset_chunks where digest = $1 \
         union all select 'adapter', id, 0, worker_id from submissions where adapter = $1 \
         union all select 'adapter', id, 0, worker_id from restored_submissions where adapter = $1 \
         union all select 'contribution', submission_id, 0, path from contribution_files \
         where digest = $1 and path <> 'adapter_model.safetensors' \
         union all select 'evaluation', id, 0, '' from evaluations \
         where gate_scores = $1 or audit_scores = $1 \
         union all select 'round', k.round_id, 0, '' from kept_blobs k \
         join rounds r on r.id = k.round_id \
         where k.digest = $1 and (k.forever = 1 or r.ended_ms is null)",
    )
    .bind(wanted.to_string())
    .fetch_all(tx.conn())
    .await?;
    let mut needs = Vec::new();
    for row in &rows {
        let kind: String = column(row, "kind")?;
        let name: String = column(row, "name")?;
        needs.push(match kind.as_str() {
            "checkpoint" => Need::Checkpoint {
                revision: u32::try_from(unsigned(row, "checkpoint_files", "number")?)
                    .map_err(|_| Error::inconsistent("checkpoint_files", "revision", &name))?,
                path: column(row, "more")?,
                model: name,
            },
            "dataset" => Need::Dataset(name),
            "adapter" => Need::Adapter {
                worker: parsed(row, "submissions", "more")?,
                submission: name,
            },
            "contribution" => Need::Contribution(name),
            "evaluation" => Need::Evaluation(name),
            _ => Need::Round(name),
        });
    }
    Ok(needs)
}

/// Every checkpoint's model and revision.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_names(tx: &mut Tx) -> Result<Vec<(String, u32)>, Error> {
    let rows = sqlx::query("select model, revision from checkpoints order by model, revision")
        .fetch_all(tx.conn())
        .await?;
    rows.iter()
        .map(|row| {
            let revision = unsigned(row, "checkpoints", "revision")?;
            let revision = u32::try_from(revision)
                .map_err(|_| Error::inconsistent("checkpoints", "revision", revision))?;
            Ok((column(row, "model")?, revision))
        })
        .collect()
}

/// Submissions noted as stacked in a checkpoint.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_stack(
    tx: &mut Tx,
    model: &str,
    revision: u32,
) -> Result<Vec<String>, Error> {
    let rows = sqlx::query(
        "select submission_id from checkpoint_contributions where model = $1 and revision = $2",
    )
    .bind(model)
    .bind(i64::from(revision))
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| column(row, "submission_id"))
        .collect()
}

/// Nodes of one level of the log from a position on, at most `limit`: position and hash.
///
/// # Errors
/// When the query fails.
pub async fn log_nodes(
    tx: &mut Tx,
    level: u32,
    first: u64,
    limit: u32,
) -> Result<Vec<(u64, Option<Hash>)>, Error> {
    let rows = sqlx::query(
        "select position, hash from log_nodes where level = $1 and position >= $2 \
         order by position limit $3",
    )
    .bind(i64::from(level))
    .bind(first.cast_signed())
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            let hash: Vec<u8> = column(row, "hash")?;
            let position = unsigned(row, "log_nodes", "position")?;
            Ok((position, hash.try_into().ok()))
        })
        .collect()
}
