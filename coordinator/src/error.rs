//! What can go wrong in this crate: a stable reason, a sentence for outsiders, the cause for us.
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::time::Duration;

use cairn_proto::convert::ConvertError;
use cairn_proto::reason::ErrorReason;

use crate::limits;

type Source = Box<dyn StdError + Send + Sync>;

/// A failed operation.
///
/// `Display` is the sentence that outsiders may read; paths, SQL and norms stay in the source.
#[derive(Debug)]
pub struct Error {
    reason: ErrorReason,
    text: String,
    metadata: Vec<(&'static str, String)>,
    source: Option<Source>,
}

impl Error {
    /// A failure with this reason and sentence.
    pub fn new(reason: ErrorReason, text: impl Into<String>) -> Self {
        Self {
            reason,
            text: text.into(),
            metadata: Vec::new(),
            source: None,
        }
    }

    /// There is no such thing: `not_found("round", id)`.
    pub fn not_found(kind: &'static str, id: impl fmt::Display) -> Self {
        let id: String = id.to_string().chars().take(100).collect();
        Self::new(ErrorReason::NotFound, format!("there is no {kind} {id}")).with("kind", kind)
    }

    /// A malformed field of a request.
    pub fn invalid(field: &'static str, text: impl fmt::Display) -> Self {
        Self::new(ErrorReason::InvalidArgument, format!("{field}: {text}")).with("field", field)
    }

    /// The state of things does not allow it.
    pub fn conflict(reason: ErrorReason, text: impl Into<String>) -> Self {
        Self::new(reason, text)
    }

    /// The caller may not do this.
    pub fn denied(reason: ErrorReason, text: impl Into<String>) -> Self {
        Self::new(reason, text)
    }

    /// Something we need does not answer now.
    pub fn unavailable(text: impl Into<String>) -> Self {
        Self::new(ErrorReason::Unavailable, text)
    }

    /// A fault of ours. Outsiders learn only that there was one.
    pub fn internal(context: &'static str, source: impl Into<Source>) -> Self {
        Self::new(ErrorReason::Internal, ErrorReason::Internal.sentence()).with_source(Context {
            context,
            source: source.into(),
        })
    }

    /// A row that breaks an invariant of the schema.
    pub fn inconsistent(table: &'static str, column: &'static str, row: impl fmt::Display) -> Self {
        let error = Inconsistency {
            table,
            column,
            row: row.to_string(),
        };
        Self::new(ErrorReason::Internal, ErrorReason::Internal.sentence()).with_source(error)
    }

    /// No room left.
    pub fn disk_full(source: impl Into<Source>) -> Self {
        Self::new(ErrorReason::DiskFull, ErrorReason::DiskFull.sentence()).with_source(source)
    }

    /// Adds a fact that programs may read from `ErrorInfo.metadata`.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.metadata.push((key, value.to_string()));
        self
    }

    /// Adds the cause, for the log.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The stable word.
    #[must_use]
    pub const fn reason(&self) -> ErrorReason {
        self.reason
    }

    /// Facts for programs.
    #[must_use]
    pub fn metadata(&self) -> &[(&'static str, String)] {
        &self.metadata
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn retry(&self) -> bool {
        self.reason.retry()
    }

    /// How long a caller should wait before it tries again.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry().then_some(limits::RETRY_AFTER)
    }

    /// Whether it is our fault, and so to be logged as an error.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        matches!(self.reason, ErrorReason::Internal)
    }

    /// Sentence and causes on one line, for the log.
    #[must_use]
    pub fn full(&self) -> String {
        let mut text = self.text.clone();
        let mut next = self.source();
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

/// A cause and what was being done.
#[derive(Debug)]
struct Context {
    context: &'static str,
    source: Source,
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.context)
    }
}

impl StdError for Context {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.source)
    }
}

/// A stored value that should not exist.
#[derive(Debug, thiserror::Error)]
#[error("inconsistent row {row} of {table}: bad {column}")]
struct Inconsistency {
    table: &'static str,
    column: &'static str,
    row: String,
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        if is_full(&error) {
            Self::disk_full(error)
        } else {
            Self::internal("use a file", error)
        }
    }
}

/// Whether this is the system's way to say that the disk is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

impl From<ConvertError> for Error {
    fn from(error: ConvertError) -> Self {
        Self::new(ErrorReason::InvalidArgument, error.to_string())
    }
}

impl From<tokio::task::JoinError> for Error {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::internal("run a blocking task", error)
    }
}
