//! What can go wrong with a call, as the caller should understand it.
use std::error::Error as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::convert::ConvertError;
use crate::identity::IdentityError;
use crate::reason::{ErrorReason, of_status};
use crate::signing::SignatureError;
use crate::url::SpkiPin;

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The coordinator answered with an error of its own.
    #[error("{message}")]
    Refused {
        /// The stable word, when it sent one we know.
        reason: Option<ErrorReason>,
        /// The gRPC code.
        code: Code,
        /// The sentence it sent.
        message: String,
        /// How long it asked us to wait.
        retry_after: Option<Duration>,
    },
    /// Nobody answered, or the connection broke.
    #[error("cannot reach the coordinator at {server}: {detail}")]
    Unreachable {
        /// `host:port`.
        server: String,
        /// What the network said.
        detail: String,
    },
    /// The server showed another key than the join URL names.
    #[error(
        "the server at {server} does not hold the key named in the join URL (expected {expected}, \
         it showed {shown}); either somebody is in between or the coordinator has a new key: ask \
         its operator for a new join URL"
    )]
    WrongKey {
        /// `host:port`.
        server: String,
        /// The pin of the join URL.
        expected: SpkiPin,
        /// The pin of the key that was shown.
        shown: SpkiPin,
    },
    /// The server does not speak TLS although the URL asks for it.
    #[error(
        "the server at {server} does not speak TLS, but the join URL asks for it; going on in \
         plain text is refused"
    )]
    NotTls {
        /// `host:port`.
        server: String,
    },
    /// Plain text to another machine, not forced.
    #[error(
        "{server} is not this machine and cairn+insecure:// sends everything in plain text; use \
         a join URL with TLS, or --force-insecure if you must"
    )]
    InsecureRemote {
        /// `host:port`.
        server: String,
    },
    /// The answer breaks the contract.
    #[error("the coordinator sent a malformed answer: {0}")]
    Malformed(String),
    /// A file of ours cannot be read or written.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of ours is not what its name says.
    #[error("{path} does not have the announced length and digest")]
    FileChanged {
        /// Which file.
        path: PathBuf,
    },
    /// The identity cannot be read or kept.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl ClientError {
    /// Whether trying again later may help without anybody changing anything.
    #[must_use]
    pub fn retry(&self) -> bool {
        match self {
            Self::Refused {
                reason: Some(reason),
                ..
            } => reason.retry(),
            Self::Refused {
                reason: None, code, ..
            } => matches!(
                code,
                Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted
            ),
            Self::Unreachable { .. } => true,
            Self::WrongKey { .. }
            | Self::NotTls { .. }
            | Self::InsecureRemote { .. }
            | Self::Malformed(_)
            | Self::File { .. }
            | Self::FileChanged { .. }
            | Self::Identity(_) => false,
        }
    }

    /// The coordinator's stable word, if it answered with one.
    #[must_use]
    pub const fn reason(&self) -> Option<ErrorReason> {
        match self {
            Self::Refused { reason, .. } => *reason,
            _ => None,
        }
    }

    /// How long the coordinator asked us to wait.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether a new session may help.
    #[must_use]
    pub(super) fn needs_login(&self) -> bool {
        match self {
            Self::Refused {
                reason: Some(reason),
                ..
            } => {
                matches!(
                    reason,
                    ErrorReason::Unauthenticated | ErrorReason::SessionExpired
                )
            }
            Self::Refused {
                reason: None, code, ..
            } => *code == Code::Unauthenticated,
            _ => false,
        }
    }

    /// Reads a status; a broken connection is told from an answer.
    pub(super) fn from_status(status: &Status, server: &str) -> Self {
        let reason = of_status(status);
        if reason.is_none() && is_transport(status) {
            return if causes(status).contains("corrupt message of type") {
                Self::NotTls {
                    server: server.to_owned(),
                }
            } else {
                Self::Unreachable {
                    server: server.to_owned(),
                    detail: causes(status),
                }
            };
        }
        Self::Refused {
            reason,
            code: status.code(),
            message: if status.message().is_empty() {
                format!("the coordinator answered {:?}", status.code())
            } else {
                status.message().to_owned()
            },
            retry_after: status
                .get_details_retry_info()
                .and_then(|info| info.retry_delay),
        }
    }
}

/// Whether the status was made on this side because the connection failed.
fn is_transport(status: &Status) -> bool {
    status.source().is_some()
        || (status.code() == Code::Unknown && status.message().contains("transport"))
        || (status.code() == Code::Cancelled && status.message().contains("Timeout expired"))
}

/// The innermost words of an error chain: the outer ones only say "transport error".
fn causes(status: &Status) -> String {
    let mut innermost = status.message().to_owned();
    let mut next = status.source();
    while let Some(error) = next {
        innermost = error.to_string();
        next = error.source();
    }
    // The TLS library's own words for it are a link to its manual.
    if innermost.contains("close_notify") {
        return "the connection was cut".to_owned();
    }
    innermost
}

impl From<ConvertError> for ClientError {
    fn from(error: ConvertError) -> Self {
        Self::Malformed(error.to_string())
    }
}

impl From<SignatureError> for ClientError {
    fn from(error: SignatureError) -> Self {
        Self::Malformed(error.to_string())
    }
}
