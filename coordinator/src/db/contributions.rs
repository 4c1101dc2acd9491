//! Tables `contribution_files` and `checkpoint_contributions`: the adapters of which checkpoints are
//! made, as files, and which are in which.
use std::fmt::Write as _;

use super::models::FileRow;
use super::{Tx, column, digest, signed, unsigned};
use crate::error::Error;
use crate::ids::SubmissionId;
use cairn_proto::convert::BlobName;

/// Notes a file of a stacked contribution; noting it again changes nothing.
///
/// # Errors
/// When the query fails.
pub async fn contribution_file_insert(
    tx: &mut Tx,
    submission: SubmissionId,
    file: &FileRow,
) -> Result<(), Error> {
    sqlx::query(
        "insert into contribution_files (submission_id, path, digest, size_bytes, sha256) \
         values ($1, $2, $3, $4, $5) on conflict do nothing",
    )
    .bind(submission.to_string())
    .bind(file.path.as_str())
    .bind(file.blob.digest.to_string())
    .bind(signed(file.blob.size_bytes))
    .bind(file.sha256.as_str())
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The files of a contribution, by path; none when it was never stacked.
///
/// # Errors
/// When the query fails.
pub async fn contribution_files(
    tx: &mut Tx,
    submission: SubmissionId,
) -> Result<Vec<FileRow>, Error> {
    let rows = sqlx::query(
        "select path, digest, size_bytes, sha256 from contribution_files \
         where submission_id = $1 order by path",
    )
    .bind(submission.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            Ok(FileRow {
                path: column(row, "path")?,
                blob: BlobName {
                    digest: digest(row, "contribution_files", "digest")?,
                    size_bytes: unsigned(row, "contribution_files", "size_bytes")?,
                },
                sha256: column(row, "sha256")?,
            })
        })
        .collect()
}

/// Rows of one statement: a parameter each, far below what either database allows.
const ROWS_AT_ONCE: usize = 200;

/// Notes of which contributions a checkpoint is made; noting it again changes nothing.
///
/// # Errors
/// When a query fails.
pub async fn checkpoint_contributions_insert(
    tx: &mut Tx,
    model: &str,
    revision: u32,
    submissions: &[SubmissionId],
) -> Result<(), Error> {
    for part in submissions.chunks(ROWS_AT_ONCE) {
        let mut sql = String::from(
            "insert into checkpoint_contributions (model, revision, submission_id) values ",
        );
        for place in 0..part.len() {
            let comma = if place == 0 { "" } else { ", " };
            let _ = write!(sql, "{comma}($1, $2, ${})", place + 3);
        }
        sql.push_str(" on conflict do nothing");
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(model)
            .bind(i64::from(revision));
        for submission in part {
            query = query.bind(submission.to_string());
        }
        query.execute(tx.conn()).await?;
    }
    Ok(())
}
