//! Wire types to checked types and back. What passes here needs no second look.
use std::fmt;

use cairn_stack::digest::Digest;

use crate::limits::{BLOB_BYTES_MAX, FILE_PATH_BYTES_MAX};
use crate::v1;

/// A wire value that cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A required message field is absent.
    #[error("{field} is missing")]
    Missing {
        /// Name of the field.
        field: &'static str,
    },
    /// Not 64 lowercase hex digits.
    #[error("{text:?} is not a BLAKE3 digest of 64 lowercase hex digits")]
    Digest {
        /// The start of what was sent.
        text: String,
    },
    /// A length no blob may have.
    #[error("a blob of {size_bytes} bytes is above the limit of {BLOB_BYTES_MAX} bytes")]
    Size {
        /// The announced length.
        size_bytes: u64,
    },
    /// A path that could leave its folder or name a device.
    #[error("{path:?} is not a plain relative path")]
    Path {
        /// The start of what was sent.
        path: String,
    },
    /// An enum value this version does not know, or the unspecified one.
    #[error("{value} is not a known {kind}")]
    Enum {
        /// What kind of enum.
        kind: &'static str,
        /// The number sent.
        value: i32,
    },
    /// A word that names none of the values.
    #[error("{text:?} is not a {kind}")]
    Word {
        /// What was expected.
        kind: &'static str,
        /// The start of what was sent.
        text: String,
    },
}

fn start(text: &str) -> String {
    text.chars().take(80).collect()
}

/// A blob's checked name: its digest and exact length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobName {
    /// BLAKE3 of its bytes.
    pub digest: Digest,
    /// How many they are.
    pub size_bytes: u64,
}

impl fmt::Display for BlobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.digest, self.size_bytes)
    }
}

impl TryFrom<&v1::BlobRef> for BlobName {
    type Error = ConvertError;

    fn try_from(wire: &v1::BlobRef) -> Result<Self, ConvertError> {
        let digest = parse_digest(&wire.digest)?;
        if wire.size_bytes > BLOB_BYTES_MAX {
            return Err(ConvertError::Size {
                size_bytes: wire.size_bytes,
            });
        }
        Ok(Self {
            digest,
            size_bytes: wire.size_bytes,
        })
    }
}

impl From<BlobName> for v1::BlobRef {
    fn from(name: BlobName) -> Self {
        Self {
            digest: name.digest.to_string(),
            size_bytes: name.size_bytes,
        }
    }
}

/// Reads a digest of 64 lowercase hex digits.
///
/// # Errors
/// [`ConvertError::Digest`] for anything else.
pub fn parse_digest(text: &str) -> Result<Digest, ConvertError> {
    text.parse()
        .map_err(|_| ConvertError::Digest { text: start(text) })
}

/// Reads the blob name of a required field.
///
/// # Errors
/// When it is absent or malformed.
pub fn blob(field: &'static str, wire: Option<&v1::BlobRef>) -> Result<BlobName, ConvertError> {
    wire.ok_or(ConvertError::Missing { field })?.try_into()
}

/// Checks the path of a file in a folder: relative, `/` between parts, no empty, `.` or `..` part,
/// no backslash, colon, NUL or control character, no name that Windows takes for a device.
///
/// # Errors
/// [`ConvertError::Path`] for anything else.
pub fn relative_path(path: &str) -> Result<&str, ConvertError> {
    let plain = !path.is_empty()
        && path.len() <= FILE_PATH_BYTES_MAX
        && !path
            .chars()
            .any(|c| c.is_control() || matches!(c, '\\' | ':'))
        && path.split('/').all(plain_part);
    if plain {
        Ok(path)
    } else {
        Err(ConvertError::Path { path: start(path) })
    }
}

fn plain_part(part: &str) -> bool {
    if part.is_empty() || part == "." || part == ".." || part.ends_with(['.', ' ']) {
        return false;
    }
    let stem = part
        .split('.')
        .next()
        .unwrap_or_default()
        .to_ascii_uppercase();
    let numbered = |prefix: &str| {
        stem.strip_prefix(prefix)
            .is_some_and(|rest| rest.len() == 1 && rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    !matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL") && !numbered("COM") && !numbered("LPT")
}

macro_rules! words {
    ($type:ident, $kind:literal, $parse:ident, $word:ident, $from_wire:ident,
     { $($variant:ident = $text:literal),+ $(,)? }) => {
        #[doc = concat!("The word for a ", $kind, ", as used on command lines, in JSON and in the database.")]
        #[must_use]
        pub const fn $word(value: v1::$type) -> &'static str {
            match value {
                v1::$type::Unspecified => "unspecified",
                $(v1::$type::$variant => $text,)+
            }
        }

        #[doc = concat!("Reads the word for a ", $kind, ".")]
        ///
        /// # Errors
        /// [`ConvertError::Word`] when it is none.
        pub fn $parse(text: &str) -> Result<v1::$type, ConvertError> {
            match text {
                $($text => Ok(v1::$type::$variant),)+
                _ => Err(ConvertError::Word { kind: $kind, text: start(text) }),
            }
        }

        #[doc = concat!("Reads a ", $kind, " from the wire; the unspecified value is refused.")]
        ///
        /// # Errors
        /// [`ConvertError::Enum`] when it is unknown or unspecified.
        pub fn $from_wire(value: i32) -> Result<v1::$type, ConvertError> {
            match v1::$type::try_from(value) {
                Ok(v1::$type::Unspecified) | Err(_) => {
                    Err(ConvertError::Enum { kind: $kind, value })
                }
                Ok(known) => Ok(known),
            }
        }
    };
}

words!(Role, "role", parse_role, role_word, role, {
    Volunteer = "volunteer",
    Evaluator = "evaluator",
    Maintainer = "maintainer",
});

words!(DatasetSet, "set", parse_set, set_word, set, {
    Train = "train",
    Gate = "gate",
    Audit = "audit",
    Dev = "dev",
});

words!(RoundState, "round state", parse_round_state, round_state_word, round_state, {
    Draft = "draft",
    Training = "training",
    Judging = "judging",
    Folding = "folding",
    Published = "published",
    Failed = "failed",
    Aborted = "aborted",
});

words!(ShardState, "shard state", parse_shard_state, shard_state_word, shard_state, {
    Open = "open",
    Leased = "leased",
    Submitted = "submitted",
    Done = "done",
    Stopped = "stopped",
});

words!(Verdict, "verdict", parse_verdict, verdict_word, verdict, {
    Pending = "pending",
    Accepted = "accepted",
    Rejected = "rejected",
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blob_names_are_checked() {
        let good = v1::BlobRef {
            digest: Digest::of(b"x").to_string(),
            size_bytes: 1,
        };
        let name = BlobName::try_from(&good).unwrap();
        assert_eq!(v1::BlobRef::from(name), good);
        for digest in [
            "",
            "abc",
            &good.digest.to_uppercase(),
            &format!("{}0", good.digest),
        ] {
            let bad = v1::BlobRef {
                digest: digest.to_owned(),
                size_bytes: 1,
            };
            assert!(BlobName::try_from(&bad).is_err(), "{digest}");
        }
        let huge = v1::BlobRef {
            size_bytes: u64::MAX,
            ..good
        };
        assert!(matches!(
            BlobName::try_from(&huge),
            Err(ConvertError::Size { .. })
        ));
    }

    #[test]
    fn hostile_paths_are_refused() {
        for path in [
            "config.json",
            "a/b.safetensors",
            ".gitattributes",
            "COMET.txt",
            "com.txt",
        ] {
            assert!(relative_path(path).is_ok(), "{path}");
        }
        for path in [
            "",
            "/etc/passwd",
            "..",
            "a/../b",
            "a//b",
            "./a",
            "a/",
            "a\\b",
            "C:x",
            "a\0b",
            "NUL",
            "nul.txt",
            "COM1",
            "lpt9.log",
            "x.",
            "x ",
        ] {
            assert!(relative_path(path).is_err(), "{path:?}");
        }
        assert!(relative_path(&"x".repeat(300)).is_err());
    }

    #[test]
    fn words_and_numbers() {
        assert_eq!(parse_role("evaluator"), Ok(v1::Role::Evaluator));
        assert!(parse_role("root").is_err());
        assert!(role(0).is_err());
        assert!(role(99).is_err());
        assert_eq!(set_word(v1::DatasetSet::Gate), "gate");
    }
}
