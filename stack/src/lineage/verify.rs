//! Is this folder what its manifest says?

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use ed25519_dalek::VerifyingKey;

use super::{CHECKSUMS_FILE, LineageError, MANIFEST_FILE, SIGNATURE_FILE, SignedManifest};
use crate::files::{FileEntry, list_files};

/// What verifying a folder found. The manifest's signature fits, or there would be no report.
#[derive(Debug, Clone, PartialEq)]
pub struct FolderReport {
    /// The signed manifest.
    pub signed: SignedManifest,
    /// Files that are there with the right bytes.
    pub intact: Vec<String>,
    /// Files that are there with other bytes.
    pub changed: Vec<String>,
    /// Files that are not there.
    pub missing: Vec<String>,
    /// Files the manifest does not list.
    pub unexpected: Vec<String>,
}

impl FolderReport {
    /// Every listed file is there with the right bytes. Additional files do not count: they are the
    /// owner's own, and listed in [`Self::unexpected`].
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.changed.is_empty() && self.missing.is_empty()
    }
}

/// Verifies signature and files of a checkpoint folder. `expected` is the coordinator's key where
/// the caller knows it; without it the report proves only that whoever signed, signed this.
///
/// # Errors
/// When manifest or signature are missing, malformed or do not fit, another key signed, or a file
/// cannot be read.
pub fn verify_folder(
    dir: &Path,
    expected: Option<&VerifyingKey>,
) -> Result<FolderReport, LineageError> {
    let signed = SignedManifest::read(dir)?;
    expected.map_or(Ok(()), |key| signed.expect_key(key))?;
    let mut report = FolderReport {
        intact: Vec::new(),
        changed: Vec::new(),
        missing: Vec::new(),
        unexpected: Vec::new(),
        signed,
    };
    let mut listed: BTreeSet<&str> =
        BTreeSet::from([MANIFEST_FILE, SIGNATURE_FILE, CHECKSUMS_FILE]);
    for file in &report.signed.manifest().files {
        listed.insert(&file.path);
        let place = match FileEntry::of_file(dir, &file.path) {
            Ok(found) if found == *file => &mut report.intact,
            Ok(_) => &mut report.changed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => &mut report.missing,
            Err(source) => {
                return Err(LineageError::Io {
                    path: dir.join(&file.path),
                    source,
                });
            }
        };
        place.push(file.path.clone());
    }
    let found = list_files(dir).map_err(|source| LineageError::Io {
        path: dir.to_owned(),
        source,
    })?;
    report.unexpected = found
        .into_iter()
        .filter(|path| !listed.contains(path.as_str()))
        .collect();
    Ok(report)
}
