//! The manifest: from which parts a published checkpoint was folded, signed.
//!
//! Two files lie beside the weights. `cairn-manifest.json` is the canonical encoding, byte for byte;
//! `cairn-manifest.sig.json` names the key and signs those bytes. The commit is the first 40 hex
//! digits of their BLAKE3. Whoever has the base, the adapters and the manifest can fold again and
//! compare bytes.
//!
//! Canonical encoding: compact JSON, object keys in byte order, no number but whole ones. Real
//! numbers are strings in shortest decimal form, because JSON readers round numbers differently and
//! a weight that is off by its last bit folds to another checkpoint.

mod manifest;
mod verify;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::json::parse_strict;

pub use manifest::{Contribution, DatasetRef, Manifest, Scores, sha256sums};
pub use verify::{FolderReport, verify_folder};

/// The canonical manifest.
pub const MANIFEST_FILE: &str = "cairn-manifest.json";
/// Its signature.
pub const SIGNATURE_FILE: &str = "cairn-manifest.sig.json";
/// Digests for `sha256sum --check`.
pub const CHECKSUMS_FILE: &str = "SHA256SUMS";
/// Longest manifest, in bytes: some hundred thousand contributions.
pub const MANIFEST_BYTES_MAX: usize = 128 * 1024 * 1024;
/// Longest signature file, in bytes.
const SIGNATURE_BYTES_MAX: usize = 4 * 1024;
/// Put before the signed bytes, so that a signature made for anything else never fits a manifest.
const CONTEXT: &[u8] = b"cairn manifest v1\0";
/// Hex digits of a commit; the length Hugging Face clients take for an immutable revision.
pub const COMMIT_LENGTH: usize = 40;

/// Why a manifest, its signature or its folder is refused.
#[derive(Debug, thiserror::Error)]
pub enum LineageError {
    /// The operating system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Longer than any manifest.
    #[error("the manifest or its signature is too long: {0} bytes")]
    TooLong(usize),
    /// Not a manifest.
    #[error("the manifest is malformed: {0}")]
    Malformed(String),
    /// A field has a value that cannot be.
    #[error("the manifest's {field} cannot be {value:?}: {reason}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Its value, cut to a readable length.
        value: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A manifest, but not in canonical encoding.
    #[error("the manifest is not in its canonical encoding")]
    NotCanonical,
    /// The signature file is malformed.
    #[error("the signature is malformed")]
    BadSignatureFile,
    /// The signature does not fit the manifest and key.
    #[error("the signature does not fit: the manifest was changed, or another key signed it")]
    WrongSignature,
    /// Signed, but not by the key that was expected.
    #[error("signed by {found}, expected {expected}")]
    WrongKey {
        /// The signer's public key, hex.
        found: String,
        /// The expected one, hex.
        expected: String,
    },
}

/// A manifest with its canonical bytes and a signature that fits them.
#[derive(Debug, Clone, PartialEq)]
pub struct SignedManifest {
    manifest: Manifest,
    bytes: Vec<u8>,
    key: VerifyingKey,
    signature: Signature,
}

/// The signature file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SignatureFile {
    algorithm: String,
    key: String,
    signature: String,
}

impl SignedManifest {
    /// Checks, encodes and signs a manifest.
    ///
    /// # Errors
    /// When the manifest breaks a rule of [`Manifest::check`].
    pub fn sign(manifest: Manifest, key: &SigningKey) -> Result<Self, LineageError> {
        let bytes = manifest.canonical_bytes()?;
        let signature = key.sign(&message(&bytes));
        Ok(Self {
            manifest,
            bytes,
            key: key.verifying_key(),
            signature,
        })
    }

    /// Reads manifest and signature and verifies that they fit. Who signed is in [`Self::key`]; that
    /// it is someone to trust is the caller's question, or [`Self::expect_key`]'s.
    ///
    /// # Errors
    /// When either is malformed, not canonical, or the signature does not fit.
    pub fn from_parts(manifest: &[u8], signature: &[u8]) -> Result<Self, LineageError> {
        if signature.len() > SIGNATURE_BYTES_MAX {
            return Err(LineageError::TooLong(signature.len()));
        }
        let file = parse_strict(signature).map_err(|_| LineageError::BadSignatureFile)?;
        let file: SignatureFile =
            serde_json::from_value(file).map_err(|_| LineageError::BadSignatureFile)?;
        if file.algorithm != "ed25519" {
            return Err(LineageError::BadSignatureFile);
        }
        let mut key = [0; 32];
        let mut signature = [0; 64];
        hex::decode_to_slice(&file.key, &mut key).map_err(|_| LineageError::BadSignatureFile)?;
        hex::decode_to_slice(&file.signature, &mut signature)
            .map_err(|_| LineageError::BadSignatureFile)?;
        let key = VerifyingKey::from_bytes(&key).map_err(|_| LineageError::BadSignatureFile)?;
        let signature = Signature::from_bytes(&signature);
        if manifest.len() > MANIFEST_BYTES_MAX {
            return Err(LineageError::TooLong(manifest.len()));
        }
        // The signature first: nothing of an unsigned manifest is looked at.
        key.verify_strict(&message(manifest), &signature)
            .map_err(|_| LineageError::WrongSignature)?;
        let parsed = Manifest::from_canonical(manifest)?;
        Ok(Self {
            manifest: parsed,
            bytes: manifest.to_vec(),
            key,
            signature,
        })
    }

    /// Refuses any signer but one.
    ///
    /// # Errors
    /// [`LineageError::WrongKey`].
    pub fn expect_key(&self, expected: &VerifyingKey) -> Result<(), LineageError> {
        if self.key == *expected {
            return Ok(());
        }
        Err(LineageError::WrongKey {
            found: self.key_hex(),
            expected: hex::encode(expected.as_bytes()),
        })
    }

    /// What was signed.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The canonical bytes: the content of [`MANIFEST_FILE`].
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The signer.
    #[must_use]
    pub fn key(&self) -> &VerifyingKey {
        &self.key
    }

    /// The signer's public key, 64 hex digits.
    #[must_use]
    pub fn key_hex(&self) -> String {
        hex::encode(self.key.as_bytes())
    }

    /// The content of [`SIGNATURE_FILE`].
    #[must_use]
    pub fn signature_json(&self) -> String {
        let file = SignatureFile {
            algorithm: "ed25519".to_owned(),
            key: self.key_hex(),
            signature: hex::encode(self.signature.to_bytes()),
        };
        let mut text = serde_json::to_string_pretty(&file).expect("three strings are JSON");
        text.push('\n');
        text
    }

    /// First 40 hex digits of the canonical bytes' BLAKE3: the checkpoint's name.
    #[must_use]
    pub fn commit(&self) -> String {
        manifest::commit_of(&self.bytes)
    }

    /// Writes manifest, signature and [`CHECKSUMS_FILE`] into the checkpoint's folder.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), LineageError> {
        let sums = sha256sums(&self.manifest.files);
        let signature = self.signature_json();
        let files: [(&str, &[u8]); 3] = [
            (CHECKSUMS_FILE, sums.as_bytes()),
            (SIGNATURE_FILE, signature.as_bytes()),
            (MANIFEST_FILE, &self.bytes),
        ];
        for (name, bytes) in files {
            let path = dir.join(name);
            fs::write(&path, bytes).map_err(|source| LineageError::Io { path, source })?;
        }
        Ok(())
    }

    /// Reads and verifies manifest and signature of a folder; its other files are
    /// [`verify_folder`]'s business.
    ///
    /// # Errors
    /// When a file is missing, or as [`Self::from_parts`].
    pub fn read(dir: &Path) -> Result<Self, LineageError> {
        let manifest = read_bounded(&dir.join(MANIFEST_FILE), MANIFEST_BYTES_MAX)?;
        let signature = read_bounded(&dir.join(SIGNATURE_FILE), SIGNATURE_BYTES_MAX)?;
        Self::from_parts(&manifest, &signature)
    }
}

fn message(bytes: &[u8]) -> Vec<u8> {
    [CONTEXT, bytes].concat()
}

fn read_bounded(path: &Path, max: usize) -> Result<Vec<u8>, LineageError> {
    let at_path = |source| LineageError::Io {
        path: path.to_owned(),
        source,
    };
    let file = fs::File::open(path).map_err(at_path)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, max as u64 + 1), &mut bytes)
        .map_err(at_path)?;
    if bytes.len() > max {
        return Err(LineageError::TooLong(bytes.len()));
    }
    Ok(bytes)
}

#[cfg(test)]
#[path = "lineage/tests.rs"]
mod tests;
