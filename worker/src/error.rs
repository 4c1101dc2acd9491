//! Why a command that talks to a coordinator ended.

use std::io;
use std::path::{Path, PathBuf};

use cairn_proto::client::ClientError;
use cairn_proto::convert::ConvertError;
use cairn_proto::identity::IdentityError;
use cairn_proto::url::UrlError;

use crate::device::DeviceError;

/// What ends `join`, `run` or `status`.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The join URL is unusable.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// The name to be shown is unusable.
    #[error("a name has 1 to 64 printable characters")]
    Name,
    /// This machine belongs to a coordinator already.
    #[error(
        "{path} holds an identity already; add --replace to give it up, or --home for a second one"
    )]
    AlreadyJoined {
        /// The identity's file.
        path: PathBuf,
    },
    /// The identity is of a role that gets no work.
    #[error(
        "this identity is a maintainer's: it gets no work; join with a volunteer's or evaluator's token"
    )]
    NoWork,
    /// The identity cannot be read or kept.
    #[error("{}", with_source(.0))]
    Identity(#[from] IdentityError),
    /// The coordinator refused or could not be reached.
    #[error("{}", with_source(.0))]
    Client(#[from] ClientError),
    /// The coordinator's answer cannot be used.
    #[error("the coordinator sent something unusable: {0}")]
    Answer(#[from] ConvertError),
    /// Another `run` uses the same home.
    #[error("another cairn-worker is running with the home {home}")]
    Busy {
        /// The home folder.
        home: PathBuf,
    },
    /// A file under the home folder cannot be used.
    #[error("cannot {action} {path}: {source}")]
    Home {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A device, thread count or signal handler is refused by the system.
    #[error("{0}")]
    Setup(String),
    /// The device cannot be used, or computes wrong.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A part of the program ended in a panic.
    #[error("a part of the program failed: {0}")]
    Panicked(String),
}

impl WorkerError {
    /// For `map_err` on file operations.
    pub(crate) fn home(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Home {
            action,
            path,
            source,
        }
    }

    /// The process's exit status.
    #[must_use]
    pub const fn exit_code(&self) -> i32 {
        1
    }

    /// Whether the same may succeed later without anybody changing anything.
    #[must_use]
    pub fn retry(&self) -> bool {
        match self {
            Self::Client(error) => error.retry(),
            Self::Url(_)
            | Self::Name
            | Self::AlreadyJoined { .. }
            | Self::NoWork
            | Self::Identity(_)
            | Self::Answer(_)
            | Self::Busy { .. }
            | Self::Home { .. }
            | Self::Setup(_)
            | Self::Device(_)
            | Self::Panicked(_) => false,
        }
    }
}

/// An error and its causes in one line.
pub(crate) fn with_source(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_line = cause.to_string();
        if !line.ends_with(&cause_line) {
            line = format!("{line}: {cause_line}");
        }
        next = cause.source();
    }
    line
}
