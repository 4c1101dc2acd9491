//! Signing a checkpoint's manifest and storing it: three small files beside the weights.
use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use cairn_stack::lineage::{
    CHECKSUMS_FILE, MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, SIGNATURE_FILE, SignedManifest,
    sha256sums,
};
use sha2::{Digest as _, Sha256};
use tracing::error;

use crate::app::App;
use crate::db::contributions::checkpoint_contributions_insert;
use crate::db::models::{CheckpointRow, FileRow, checkpoint_unnoted};
use crate::error::Error;
use crate::ids::{Commit, SubmissionId};

/// A stored manifest. The caller inserts the rows of its blobs.
#[derive(Debug, Clone)]
pub struct StoredManifest {
    /// The checkpoint's commit: the start of the manifest's digest.
    pub commit: Commit,
    /// The manifest's bytes, without the signature.
    pub blob: BlobName,
    /// Manifest, signature and checksums, as files of the checkpoint's folder.
    pub files: Vec<FileRow>,
}

/// Signs a manifest with the server's key and stores its files durably.
///
/// # Errors
/// INTERNAL when the manifest breaks its own rules; DISK_FULL.
pub async fn sign_and_store(app: &App, manifest: Manifest) -> Result<StoredManifest, Error> {
    let signed = SignedManifest::sign(manifest, &app.key)
        .map_err(|error| Error::internal("sign the manifest", error))?;
    let commit = signed
        .commit()
        .parse()
        .map_err(|error| Error::internal("name the commit", error))?;
    let sums = sha256sums(&signed.manifest().files);
    let parts = [
        (MANIFEST_FILE, Bytes::copy_from_slice(signed.bytes())),
        (SIGNATURE_FILE, Bytes::from(signed.signature_json())),
        (CHECKSUMS_FILE, Bytes::from(sums)),
    ];
    let mut files = Vec::new();
    for (path, bytes) in parts {
        let sha256 = hex::encode(Sha256::digest(&bytes));
        let blob = app.blobs.put_bytes(bytes).await?;
        files.push(FileRow {
            path: path.to_owned(),
            blob,
            sha256,
        });
    }
    Ok(StoredManifest {
        commit,
        blob: files[0].blob,
        files,
    })
}

/// Reads a stored manifest.
///
/// # Errors
/// INTERNAL when it is none; UNAVAILABLE when the store does not answer.
pub async fn read_manifest(app: &App, digest: Digest) -> Result<Manifest, Error> {
    let bytes = app
        .blobs
        .get_bytes(digest, MANIFEST_BYTES_MAX as u64)
        .await?;
    serde_json::from_slice(&bytes).map_err(|error| Error::internal("read a manifest", error))
}

/// Notes of which contributions the checkpoints of older programs are made, so that they are found
/// by contribution.
///
/// # Errors
/// When the database fails. A manifest that cannot be read is logged and left out.
pub async fn note_contributions(app: &App) -> Result<(), Error> {
    let mut tx = app.db.read().await?;
    let waiting = checkpoint_unnoted(&mut tx).await?;
    drop(tx);
    for row in waiting {
        let manifest = match read_manifest(app, row.manifest).await {
            Ok(manifest) => manifest,
            Err(problem) => {
                let text = problem.full();
                error!(
                    "the manifest of {} revision {}: {text}",
                    row.model, row.revision
                );
                continue;
            }
        };
        let ids: Vec<SubmissionId> = manifest
            .contributions
            .iter()
            .filter_map(|one| one.id.parse().ok())
            .collect();
        let mut tx = app.db.begin().await?;
        checkpoint_contributions_insert(&mut tx, &row.model, row.revision, &ids).await?;
        tx.commit().await?;
    }
    Ok(())
}

/// What the log says of a published checkpoint: canonical JSON, keys in byte order.
#[must_use]
pub fn log_entry(checkpoint: &CheckpointRow) -> String {
    serde_json::json!({
        "commit": checkpoint.commit.to_string(),
        "manifest": checkpoint.manifest.to_string(),
        "model": checkpoint.model,
        "revision": checkpoint.revision,
    })
    .to_string()
}

/// Manifest and signature as one JSON object of two strings: the texts of the two files, to be
/// checked byte for byte.
#[must_use]
pub fn signed_json(manifest: &[u8], signature: &[u8]) -> Vec<u8> {
    let text = |bytes| String::from_utf8_lossy(bytes);
    serde_json::json!({ "manifest": text(manifest), "signature": text(signature) })
        .to_string()
        .into_bytes()
}
