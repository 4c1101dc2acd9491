//! Names of things, parsed once at the edge.
use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::error::Error;

/// Text that is not the name it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {kind}")]
pub struct IdError {
    /// What was expected.
    pub kind: &'static str,
    /// The start of what was found.
    pub text: String,
}

impl IdError {
    fn new(kind: &'static str, text: &str) -> Self {
        Self {
            kind,
            text: text.chars().take(80).collect(),
        }
    }
}

macro_rules! uuid_ids {
    ($($(#[$meta:meta])* $name:ident $kind:literal;)+) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A fresh random one.
            #[must_use]
            #[expect(clippy::new_without_default, reason = "each one is different")]
            pub fn new() -> Self {
                Self(Uuid::new_v4())
            }

            /// Reads a request's field.
            ///
            /// # Errors
            /// INVALID_ARGUMENT naming the field.
            pub fn from_field(field: &'static str, text: &str) -> Result<Self, Error> {
                text.parse().map_err(|error: IdError| Error::invalid(field, error.to_string()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Uuid::try_parse(text).map(Self).map_err(|_| IdError::new($kind, text))
            }
        }
    )+};
}

uuid_ids! {
    /// An enrolled identity: volunteer, evaluator or maintainer.
    WorkerId "worker id";
    /// A lease.
    LeaseId "lease id";
    /// A round.
    RoundId "round id";
    /// A submission.
    SubmissionId "submission id";
    /// An evaluation.
    EvaluationId "evaluation id";
    /// Chosen by a caller so that a repeated request returns the first result.
    RequestId "request id (a UUID)";
}

/// Counts the leases on one piece of work; a lease with a smaller one is void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

/// A checkpoint's commit: the start of its manifest's digest, 40 lowercase hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Commit([u8; 20]);

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for Commit {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let mut bytes = [0; 20];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| IdError::new("commit", text))?;
        Ok(Self(bytes))
    }
}
