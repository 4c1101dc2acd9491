//! Signing a checkpoint's manifest and storing it: three small files beside the weights.
use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_stack::lineage::{
    CHECKSUMS_FILE, MANIFEST_FILE, Manifest, SIGNATURE_FILE, SignedManifest, sha256sums,
};
use sha2::{Digest as _, Sha256};

use crate::app::App;
use crate::db::models::{CheckpointRow, FileRow};
use crate::error::Error;
use crate::ids::Commit;

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
