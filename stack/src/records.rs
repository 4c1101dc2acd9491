//! Training and evaluation data: one record a line, in the shapes people already have.
//!
//! | kind | shape of a line | becomes |
//! |---|---|---|
//! | text | `{"text"}` | [`Record::Text`] |
//! | messages | `{"messages":[{"role","content"}]}` | [`Record::Messages`] |
//! | ShareGPT | `{"conversations":[{"from","value"}]}` | [`Record::Messages`] |
//! | Alpaca | `{"instruction","input"?,"output"}` | [`Record::Pair`]; input on a line after the instruction |
//! | question-answer | `{"question","answer"}` | [`Record::Pair`] |
//! | prompt-completion | `{"prompt","completion"}` | [`Record::Pair`] |
//! | preference | `{"prompt","chosen","rejected"}` | [`Record::Preference`]; strings, or lists of messages as TRL has them |
//! | plain | plain text, `.txt` | one [`Record::Text`] for each paragraph; blank lines divide them |
//!
//! A file may mix kinds, but not preferences with others. Other keys of a record (ids, sources) are ignored, except those that would
//! change what is learnt (`tools`, `tool_calls`, `images`), which are refused by name. Byte order
//! marks, CRLF and blank lines are fine. Records in which nothing can be learnt are errors.

mod parse;
mod preference;
mod read;

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::Serialize;

pub use preference::{Choice, Preference};
pub use read::{Records, read_records};

/// Longest line, and longest plain-text paragraph, in bytes.
pub const LINE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most messages in one record.
pub const MESSAGES_MAX: usize = 10_000;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions to the model.
    System,
    /// The person.
    User,
    /// The model; its turns are scored.
    Assistant,
    /// The answer of a tool.
    Tool,
}

impl Role {
    /// The word that chat templates know.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// One example.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum Record {
    /// Running text, scored as a whole.
    Text(#[serde(serialize_with = "text")] String),
    /// A conversation with at least one assistant turn.
    Messages(#[serde(serialize_with = "messages")] Vec<Message>),
    /// A prompt and what should follow it.
    Pair {
        /// Given.
        prompt: String,
        /// Scored.
        completion: String,
    },
    /// A prompt, an answer that is wanted and one that is not.
    Preference(Preference),
}

fn text<S: serde::Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map([("text", text)])
}

fn messages<S: serde::Serializer>(messages: &[Message], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map([("messages", messages)])
}

/// What is said in messages, a line each.
fn said(messages: &[Message]) -> String {
    let contents = messages.iter().map(|message| message.content.as_str());
    contents.collect::<Vec<_>>().join("\n")
}

impl Record {
    /// The record as one canonical JSON line, without a line end: `{"text"}`, `{"messages"}`,
    /// `{"prompt","completion"}` or `{"prompt","chosen","rejected"}`. Equal records have equal lines.
    #[must_use]
    pub fn to_json_line(&self) -> String {
        serde_json::to_string(self).expect("strings and lists of them are JSON")
    }

    /// Reads one line of any JSON kind.
    ///
    /// # Errors
    /// When it is not JSON, of no known kind, or holds nothing to learn.
    pub fn from_json_line(line: &str) -> Result<Self, RecordErrorKind> {
        parse::record(line, Format::Auto)
    }

    /// What is compared when looking for duplicates and overlap: all that is said, in order, a line
    /// each; roles and layout do not count.
    #[must_use]
    pub fn text_for_dedup(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Messages(messages) => said(messages),
            Self::Pair { prompt, completion } => format!("{prompt}\n{completion}"),
            Self::Preference(Preference::Texts(choice)) => {
                [&*choice.prompt, &choice.chosen, &choice.rejected].join("\n")
            }
            Self::Preference(Preference::Messages(choice)) => {
                let parts = [&choice.prompt, &choice.chosen, &choice.rejected];
                parts.map(|messages| said(messages)).join("\n")
            }
        }
    }

    /// Whether it is a preference, and not a text.
    #[must_use]
    pub const fn is_preference(&self) -> bool {
        matches!(self, Self::Preference(_))
    }
}

/// What the lines of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Plain text when the name ends in `.txt`, otherwise each line's kind by its keys.
    #[default]
    Auto,
    /// `{"text"}`.
    Text,
    /// `{"messages"}`.
    Messages,
    /// `{"conversations"}`.
    ShareGpt,
    /// `{"instruction","input","output"}`.
    Alpaca,
    /// `{"question","answer"}`.
    QuestionAnswer,
    /// `{"prompt","completion"}`.
    PromptCompletion,
    /// `{"prompt","chosen","rejected"}`.
    Preference,
    /// Plain text, a record for each paragraph.
    Plain,
}

impl Format {
    /// All formats, [`Format::Auto`] first.
    pub const ALL: [Self; 9] = [
        Self::Auto,
        Self::Text,
        Self::Messages,
        Self::ShareGpt,
        Self::Alpaca,
        Self::QuestionAnswer,
        Self::PromptCompletion,
        Self::Preference,
        Self::Plain,
    ];

    /// The word for `--format`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Text => "text",
            Self::Messages => "messages",
            Self::ShareGpt => "sharegpt",
            Self::Alpaca => "alpaca",
            Self::QuestionAnswer => "question-answer",
            Self::PromptCompletion => "prompt-completion",
            Self::Preference => "preference",
            Self::Plain => "plain",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that names no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown format {0:?}; the formats are auto, text, messages, sharegpt, alpaca, question-answer, prompt-completion, preference and plain"
)]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|format| format.as_str() == word);
        found.ok_or_else(|| UnknownFormat(word.chars().take(32).collect()))
    }
}

/// A line that cannot be used, where it is, and why.
#[derive(Debug, thiserror::Error)]
#[error("{name}:{line}: {kind}")]
pub struct RecordError {
    /// The file, as the caller named it.
    pub name: String,
    /// The line, from 1.
    pub line: u64,
    /// What is wrong.
    pub kind: RecordErrorKind,
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum RecordErrorKind {
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Over [`LINE_BYTES_MAX`].
    #[error("longer than {LINE_BYTES_MAX} bytes")]
    TooLong,
    /// Not UTF-8.
    #[error("not UTF-8")]
    NotUtf8,
    /// Not one JSON object, or a key twice.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// The keys fit no kind of record.
    #[error("no known kind of record; its keys are {0}")]
    UnknownKind(String),
    /// The keys fit several kinds of record.
    #[error("the keys fit both {0} and {1}; choose one with --format")]
    Ambiguous(Format, Format),
    /// A needed key is missing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A key has a value of the wrong type, or one that cannot be used.
    #[error("`{key}` {reason}")]
    Invalid {
        /// The key.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// Nothing to learn.
    #[error("empty record: {0}")]
    Empty(&'static str),
}

#[cfg(test)]
#[path = "records/tests.rs"]
mod tests;
