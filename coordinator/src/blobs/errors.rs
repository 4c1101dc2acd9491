//! What the object store's own errors mean to this crate.
use std::error::Error as StdError;
use std::io;

use cairn_proto::reason::ErrorReason;

use crate::error::{Error, is_full};

/// A put that failed. What is not found then is the bucket.
pub(super) fn not_put(error: object_store::Error) -> Error {
    match error {
        object_store::Error::NotFound { .. } => {
            Error::unavailable("the blob store takes nothing; try again").with_source(error)
        }
        other => other.into(),
    }
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        let mut cause: Option<&(dyn StdError + 'static)> = Some(&error);
        while let Some(current) = cause {
            if current.downcast_ref::<io::Error>().is_some_and(is_full) {
                return Self::disk_full(error);
            }
            cause = current.source();
        }
        match error {
            object_store::Error::NotFound { .. } => Self::new(
                ErrorReason::BlobMissing,
                ErrorReason::BlobMissing.sentence(),
            )
            .with_source(error),
            other => {
                Self::unavailable("the blob store does not answer; try again").with_source(other)
            }
        }
    }
}
