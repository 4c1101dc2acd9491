//! From records to packed batches of tokens.
//!
//! Reading order: [`encode`] (what is scored of a record), [`conversation`] (the same for chat turns),
//! [`template`] (a Hugging Face chat template, bounded), [`vocabulary`] (the tokenizer files of a model
//! folder), [`packing`] (rows and batches), [`pairs`] (the same for preferences).
//!
//! A tokenizer and its template are data from elsewhere: every file, render and record has a limit here.

pub mod conversation;
pub mod encode;
pub mod packing;
pub mod pairs;
mod python;
pub mod template;
pub mod vocabulary;

use std::io;

pub use encode::{
    EncodeReport, Encoder, encode_numbered, encode_preferences, encode_records, encode_to_learn,
};
pub use packing::{Batch, Row, batches, pack};
pub use pairs::pair_batches;
pub use template::{ChatTemplate, TemplateError};

/// One record, encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, at most the sequence length of them.
    pub tokens: Vec<u32>,
    /// `scored[t]`: token `t` counts in the loss (it is predicted from the tokens before it). As long as
    /// `tokens`; `scored[0]` is false.
    pub scored: Vec<bool>,
    /// The record was longer than the sequence length and was cut at it.
    pub cut: bool,
}

impl Example {
    /// Tokens that count in the loss.
    #[must_use]
    pub fn scored_tokens(&self) -> usize {
        self.scored.iter().skip(1).filter(|scored| **scored).count()
    }
}

/// Why a model's tokenizer cannot be used, or a data set cannot be encoded with it.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file of the model folder cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// The file's path.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// A file of the model folder is missing.
    #[error(
        "{file} is missing: the model folder needs a tokenizer.json (a fast tokenizer, as transformers saves it)"
    )]
    Missing {
        /// The file's path.
        file: String,
    },
    /// A file of the model folder is larger than any real one.
    #[error("{file} is larger than {bytes_max} bytes")]
    TooLarge {
        /// The file's path.
        file: String,
        /// The limit.
        bytes_max: u64,
    },
    /// A file of the model folder does not hold what it should.
    #[error("{file}: {reason}")]
    Malformed {
        /// The file's path.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A record cannot be encoded.
    #[error("record {number}: {fault}")]
    Record {
        /// The record's number, from 1, or its line where the caller gave lines.
        number: u64,
        /// What is wrong with it.
        fault: RecordFault,
    },
    /// The system has no thread to spare.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The tokenizer broke down on a record somewhere in a range.
    #[error("the tokenizer failed in records {first} to {last}")]
    Panicked {
        /// First record of the range.
        first: u64,
        /// Last record of the range.
        last: u64,
    },
}

/// What is wrong with one record for this model.
#[derive(Debug, thiserror::Error)]
pub enum RecordFault {
    /// A preference, where a text is learnt or scored.
    #[error("it is a preference; train on preferences with objective = \"dpo\"")]
    Preference,
    /// No preference, where two answers are compared.
    #[error(
        "it is no preference ({{\"prompt\",\"chosen\",\"rejected\"}}); objective = \"dpo\" learns from preferences only"
    )]
    NoPreference,
    /// Messages need a chat template.
    #[error("it holds messages, but the model has no chat template")]
    NoTemplate,
    /// The model's chat template cannot be used at all.
    #[error("the model's chat template cannot be used: {0}")]
    BadTemplate(String),
    /// The template refused the conversation.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// An assistant turn cannot be found in the rendered conversation.
    #[error(
        "the chat template does not render message {message} as a continuation of its generation prompt"
    )]
    TurnNotFound {
        /// Number of the message, from 1.
        message: usize,
    },
    /// More messages than one record may hold.
    #[error("it holds {messages} messages; the most is {messages_max}")]
    TooManyMessages {
        /// How many it holds.
        messages: usize,
        /// The limit.
        messages_max: usize,
    },
    /// A prompt with its completion ends in the end-of-text token.
    #[error("the model names no end-of-text token to put after a completion")]
    NoEndOfText,
    /// The tokenizer refused the text.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    /// The tokenizer knows a token that the model has no embedding for.
    #[error("token {token} lies outside the model's vocabulary of {vocabulary}")]
    OutsideVocabulary {
        /// The token.
        token: u32,
        /// The model's `vocab_size`.
        vocabulary: u64,
    },
}
