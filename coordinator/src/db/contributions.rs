//! Table `contribution_files`: the adapters of which checkpoints are made, as files.
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
