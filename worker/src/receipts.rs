//! The coordinator's signed answers, kept with what became of each submission.

use std::fs;
use std::path::{Path, PathBuf};

use ed25519_dalek::VerifyingKey;
use serde::{Deserialize, Serialize};

use cairn_proto::convert::verdict_word;
use cairn_proto::identity::write_private;
use cairn_proto::signing::{ReceiptStatement, SignatureError};
use cairn_proto::v1;

use crate::error::WorkerError;
use crate::home::is_plain_id;
use crate::limits::RECEIPTS_READ_MAX;

/// Largest receipt file read, bytes: real ones stay below two thousand.
const RECEIPT_BYTES_MAX: u64 = 64 * 1024;

/// A receipt on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    /// The signed JSON, as text.
    pub statement: String,
    /// Its Ed25519 signature, hex.
    pub signature: String,
    /// What was last heard of the submission.
    pub verdict: Option<Outcome>,
    /// The receipt of the verdict, once there is one.
    #[serde(default)]
    pub sealed: Option<Signed>,
}

impl Stored {
    /// The newest receipt, as the coordinator signed it.
    #[must_use]
    pub fn newest(&self) -> v1::Receipt {
        let (statement, signature) = match &self.sealed {
            Some(sealed) => (&sealed.statement, &sealed.signature),
            None => (&self.statement, &self.signature),
        };
        v1::Receipt {
            statement: statement.clone().into_bytes(),
            signature: hex::decode(signature).unwrap_or_default(),
        }
    }
}

/// A signed statement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Signed {
    /// The signed JSON, as text.
    pub statement: String,
    /// Its Ed25519 signature, hex.
    pub signature: String,
}

/// What became of a submission.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// pending, accepted or rejected.
    pub verdict: String,
    /// The stable reason of a rejection.
    pub reason: String,
    /// The same in a sentence.
    pub detail: String,
    /// Factor in the published checkpoint; 0 while there is none.
    pub weight: f64,
}

impl Outcome {
    /// Reads it off a contribution.
    #[must_use]
    pub fn of(contribution: &v1::Contribution) -> Self {
        Self {
            verdict: verdict_word(contribution.verdict()).to_owned(),
            reason: contribution.reason.clone(),
            detail: contribution.detail.clone(),
            weight: contribution.weight,
        }
    }
}

/// Why a receipt is not kept.
#[derive(Debug, thiserror::Error)]
pub enum ReceiptError {
    /// The answer has none.
    #[error("the coordinator sent no receipt")]
    Absent,
    /// Its signature or form is wrong.
    #[error("the receipt is not the coordinator's: {0}")]
    Signature(#[from] SignatureError),
    /// It is a receipt for something else.
    #[error("the receipt is for something else: its {0} differs")]
    Other(&'static str),
    /// It cannot be written.
    #[error(transparent)]
    Home(#[from] WorkerError),
}

/// What the receipt must be for.
pub struct Expected<'a> {
    /// Our id.
    pub worker: &'a str,
    /// The submission's id, as answered.
    pub submission: &'a str,
    /// The lease.
    pub lease: &'a str,
    /// The adapter's digest and size.
    pub adapter: &'a v1::BlobRef,
}

/// Checks a receipt and keeps it.
///
/// # Errors
/// When it is absent, forged, for something else, or cannot be written.
pub fn keep(
    folder: &Path,
    receipt: Option<&v1::Receipt>,
    server_key: &VerifyingKey,
    expected: &Expected<'_>,
) -> Result<PathBuf, ReceiptError> {
    let receipt = receipt.ok_or(ReceiptError::Absent)?;
    let statement = ReceiptStatement::verify(receipt, server_key.as_bytes())?;
    let same = [
        ("submission", statement.submission == expected.submission),
        ("worker", statement.worker == expected.worker),
        ("lease", statement.lease == expected.lease),
        (
            "adapter",
            statement.adapter.to_string() == expected.adapter.digest,
        ),
        (
            "size",
            statement.adapter_bytes == expected.adapter.size_bytes,
        ),
    ];
    if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
        return Err(ReceiptError::Other(what));
    }
    let stored = Stored {
        statement: String::from_utf8_lossy(&receipt.statement).into_owned(),
        signature: hex::encode(&receipt.signature),
        verdict: None,
        sealed: None,
    };
    Ok(write(folder, expected.submission, &stored)?)
}

/// The receipt of a verdict, if `receipt` is one: the coordinator's, for the submission that
/// `stored` acknowledges.
///
/// # Errors
/// When it is forged or for something else.
pub fn sealed(
    stored: &Stored,
    receipt: &v1::Receipt,
    server_key: &VerifyingKey,
) -> Result<Option<Signed>, ReceiptError> {
    let verdict = ReceiptStatement::verify(receipt, server_key.as_bytes())?;
    if verdict.verdict == "pending" {
        return Ok(None);
    }
    let first: ReceiptStatement =
        serde_json::from_str(&stored.statement).map_err(|_| ReceiptError::Other("form"))?;
    let same = [
        ("submission", verdict.submission == first.submission),
        ("worker", verdict.worker == first.worker),
        ("adapter", verdict.adapter == first.adapter),
    ];
    if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
        return Err(ReceiptError::Other(what));
    }
    Ok(Some(Signed {
        statement: String::from_utf8_lossy(&receipt.statement).into_owned(),
        signature: hex::encode(&receipt.signature),
    }))
}

/// Writes a receipt, in one step.
///
/// # Errors
/// When the id is not plain or the file cannot be written.
pub fn write(folder: &Path, id: &str, stored: &Stored) -> Result<PathBuf, WorkerError> {
    if !is_plain_id(id) {
        let text = id.chars().take(80).collect();
        return Err(cairn_proto::convert::ConvertError::Word {
            kind: "submission id",
            text,
        }
        .into());
    }
    let path = folder.join(format!("{id}.json"));
    let json = serde_json::to_vec_pretty(stored).unwrap_or_default();
    write_private(&path, &json).map_err(WorkerError::home("write", &path))?;
    Ok(path)
}

/// Reads one receipt; `None` when there is none.
#[must_use]
pub fn read(folder: &Path, id: &str) -> Option<Stored> {
    if !is_plain_id(id) {
        return None;
    }
    let path = folder.join(format!("{id}.json"));
    if fs::metadata(&path).ok()?.len() > RECEIPT_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// How many receipts there are, and the newest of them by file time, newest first.
#[must_use]
pub fn newest(folder: &Path) -> (usize, Vec<(String, Stored)>) {
    let mut files: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|file| {
            let path = file.path();
            let id = path.file_stem()?.to_str()?.to_owned();
            (path.extension()? == "json").then_some(())?;
            Some((file.metadata().ok()?.modified().ok()?, id))
        })
        .collect();
    let count = files.len();
    files.sort_by_key(|file| std::cmp::Reverse(file.0));
    files.truncate(RECEIPTS_READ_MAX);
    let read = |(_, id): (_, String)| read(folder, &id).map(|stored| (id, stored));
    (count, files.into_iter().filter_map(read).collect())
}

/// Whether a stored receipt still carries the coordinator's signature.
#[must_use]
pub fn holds(stored: &Stored, server_key: &VerifyingKey) -> bool {
    let receipt = v1::Receipt {
        statement: stored.statement.clone().into_bytes(),
        signature: hex::decode(&stored.signature).unwrap_or_default(),
    };
    ReceiptStatement::verify(&receipt, server_key.as_bytes()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_stack::digest::Digest;
    use ed25519_dalek::SigningKey;

    #[test]
    fn receipts_are_checked_before_they_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let server = SigningKey::from_bytes(&[9; 32]);
        let adapter = v1::BlobRef {
            digest: Digest::of(b"x").to_string(),
            size_bytes: 1,
        };
        let statement = ReceiptStatement {
            submission: "s1".into(),
            lease: "l1".into(),
            worker: "w1".into(),
            round: "r1".into(),
            shard: 2,
            adapter: Digest::of(b"x"),
            adapter_bytes: 1,
            received_ms: 7,
            verdict: "pending".into(),
            reason: String::new(),
            credit_tokens: 0,
            log_index: 3,
        };
        let receipt = statement.sign(&server).unwrap();
        let expected = Expected {
            worker: "w1",
            submission: "s1",
            lease: "l1",
            adapter: &adapter,
        };
        let key = server.verifying_key();
        keep(folder.path(), Some(&receipt), &key, &expected).unwrap();
        let stored = read(folder.path(), "s1").unwrap();
        assert!(holds(&stored, &key));
        assert_eq!(newest(folder.path()).0, 1);

        let other = Expected {
            lease: "l2",
            ..expected
        };
        let result = keep(folder.path(), Some(&receipt), &key, &other);
        assert!(matches!(result, Err(ReceiptError::Other("lease"))));
        let forged = SigningKey::from_bytes(&[8; 32]).verifying_key();
        assert!(matches!(
            keep(folder.path(), Some(&receipt), &forged, &other),
            Err(ReceiptError::Signature(_))
        ));
        assert!(!holds(&stored, &forged));
        assert_eq!(sealed(&stored, &receipt, &key).unwrap(), None);
        let verdict = ReceiptStatement {
            verdict: "accepted".into(),
            ..statement.clone()
        };
        let verdict = verdict.sign(&server).unwrap();
        assert!(sealed(&stored, &verdict, &key).unwrap().is_some());
        assert!(sealed(&stored, &verdict, &forged).is_err());
        let other_shard = ReceiptStatement {
            submission: "s2".into(),
            verdict: "rejected".into(),
            ..statement.clone()
        };
        let other_shard = other_shard.sign(&server).unwrap();
        assert!(matches!(
            sealed(&stored, &other_shard, &key),
            Err(ReceiptError::Other("submission"))
        ));
        assert!(matches!(
            keep(folder.path(), None, &key, &other),
            Err(ReceiptError::Absent)
        ));
    }
}
