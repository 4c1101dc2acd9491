//! Records to tokens, and which of them count in the loss.
//!
//! One rule for all kinds: the whole text of a record is encoded once, so its tokens are those any tokenizer
//! gives the same text, and a token is scored when at least one of its bytes lies in a scored part. A token
//! that joins the end of a prompt with the start of an answer is therefore scored. Reproduced elsewhere by
//! `offsets[t].end > start and offsets[t].start < end` on untrimmed offsets.

use std::path::Path;
use std::thread;

use cairn_stack::recipe::Recipe;
use cairn_stack::records::{Message, Preference, Record, Role};
use time::OffsetDateTime;
use time::macros::datetime;

use super::conversation::render_scored;
use super::template::RENDER_STACK_BYTES;
use super::vocabulary::{TokenizerFolder, Vocabulary};
use super::{ChatTemplate, DataError, Example, RecordFault};

/// What `strftime_now` answers in a chat template. It is fixed so that every machine, on every day, encodes
/// a record into the same tokens; this is the day that the templates which ask for it fall back to.
const TEMPLATE_NOW: OffsetDateTime = datetime!(2024-07-26 00:00 UTC);
/// Records encoded at once; enough to keep all threads busy.
const CHUNK_RECORDS_MAX: usize = 1024;
/// Text encoded at once, in bytes, so that long records do not pile up.
const CHUNK_BYTES_MAX: usize = 8 << 20;
/// Most threads; beyond it, reading the records is what takes the time.
const THREADS_MAX: usize = 16;

/// What a model makes of records: its vocabulary and its chat template.
#[derive(Debug)]
pub struct Encoder {
    vocabulary: Vocabulary,
    /// The reason, where the template cannot be used: it only matters to records that need it.
    template: Option<Result<ChatTemplate, String>>,
}

/// What encoding a data set came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeReport {
    /// Records read.
    pub records: u64,
    /// Records longer than the sequence length, dropped ones among them.
    pub cut: u64,
    /// Records with nothing scored, or with nothing scored left once cut. They give no example.
    pub dropped: u64,
    /// Tokens of the examples.
    pub tokens: u64,
    /// Scored tokens of the examples.
    pub scored_tokens: u64,
}

/// Encodes records, each cut at `sequence_length` tokens, in order. Records with no scored token are left
/// out; [`encode_numbered`] counts them. An error names the record by its number from 1.
///
/// # Errors
/// The first record that cannot be encoded.
pub fn encode_records(
    encoder: &Encoder,
    records: impl Iterator<Item = Record>,
    sequence_length: usize,
) -> Result<Vec<Example>, DataError> {
    encode_numbered(encoder, (1..).zip(records), sequence_length).map(|(examples, _)| examples)
}

/// Like [`encode_records`], with the number each record goes by in an error, and with a report.
/// Memory beside the examples is bounded; all threads of the machine take part.
///
/// # Errors
/// The first record that cannot be encoded.
pub fn encode_numbered(
    encoder: &Encoder,
    records: impl Iterator<Item = (u64, Record)>,
    sequence_length: usize,
) -> Result<(Vec<Example>, EncodeReport), DataError> {
    let one = |record: &Record| Ok([encoder.encode(record, sequence_length)?]);
    encode_all(records, &one)
}

/// Encodes preferences as [`encode_numbered`] does texts: two examples a record, the chosen answer and
/// then the rejected one. A preference is left out when nothing of either answer is left to score.
///
/// # Errors
/// The first record that cannot be encoded, or is no preference.
pub fn encode_preferences(
    encoder: &Encoder,
    records: impl Iterator<Item = (u64, Record)>,
    sequence_length: usize,
) -> Result<(Vec<Example>, EncodeReport), DataError> {
    encode_all(records, &|record| {
        encoder.encode_preference(record, sequence_length)
    })
}

/// Encodes records as a recipe learns from them: texts, or preferences where its objective is of such.
///
/// # Errors
/// The first record that cannot be encoded, or is of the other kind.
pub fn encode_to_learn(
    encoder: &Encoder,
    records: impl Iterator<Item = (u64, Record)>,
    recipe: &Recipe,
) -> Result<(Vec<Example>, EncodeReport), DataError> {
    let length = recipe.sequence_length as usize;
    if recipe.objective.is_of_preferences() {
        encode_preferences(encoder, records, length)
    } else {
        encode_numbered(encoder, records, length)
    }
}

fn encode_all<const EACH: usize>(
    records: impl Iterator<Item = (u64, Record)>,
    encode: &(impl Fn(&Record) -> Result<[Example; EACH], RecordFault> + Sync),
) -> Result<(Vec<Example>, EncodeReport), DataError> {
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_MAX);
    let mut records = records.fuse();
    let mut examples = Vec::new();
    let mut report = EncodeReport::default();
    loop {
        let chunk = next_chunk(&mut records);
        if chunk.is_empty() {
            return Ok((examples, report));
        }
        for record in encode_chunk(encode, &chunk, threads)? {
            report.records += 1;
            report.cut += u64::from(record.iter().any(|example| example.cut));
            if record.iter().any(|example| example.scored_tokens() == 0) {
                report.dropped += 1;
                continue;
            }
            for example in record {
                report.tokens += example.tokens.len() as u64;
                report.scored_tokens += example.scored_tokens() as u64;
                examples.push(example);
            }
        }
    }
}

impl Encoder {
    /// Reads the tokenizer and chat template of a model folder. `strftime_now` answers one fixed day.
    ///
    /// # Errors
    /// What [`TokenizerFolder::load`] refuses. A template that does not compile is reported by the first
    /// record that needs it.
    pub fn load(model_dir: &Path) -> Result<Self, DataError> {
        Self::load_at(model_dir, TEMPLATE_NOW)
    }

    /// Like [`Encoder::load`], with the time that `strftime_now` answers.
    ///
    /// # Errors
    /// As [`Encoder::load`].
    pub fn load_at(model_dir: &Path, now: OffsetDateTime) -> Result<Self, DataError> {
        let TokenizerFolder {
            vocabulary,
            named_tokens,
            chat_template,
        } = TokenizerFolder::load(model_dir)?;
        let compile = |source: String| {
            ChatTemplate::new(&source, named_tokens, now).map_err(|error| error.to_string())
        };
        Ok(Self {
            vocabulary,
            template: chat_template.map(compile),
        })
    }

    /// The tokens themselves.
    #[must_use]
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The model's chat template, where it has one.
    ///
    /// # Errors
    /// [`RecordFault::BadTemplate`] where it has one that cannot be used.
    pub fn template(&self) -> Result<Option<&ChatTemplate>, RecordFault> {
        match &self.template {
            None => Ok(None),
            Some(Ok(template)) => Ok(Some(template)),
            Some(Err(reason)) => Err(RecordFault::BadTemplate(reason.clone())),
        }
    }

    /// Encodes one record, cut at `sequence_length` tokens. Possibly nothing of it is scored.
    ///
    /// - Text: the tokenizer's own special tokens around it; every token but the first is scored.
    /// - Messages: rendered with the chat template, no further special tokens; of each assistant turn,
    ///   what [`render_scored`] finds.
    /// - A prompt with its completion: as one user and one assistant turn where the model has a chat
    ///   template. Otherwise prompt, newline, completion, the tokenizer's own special tokens around them, and
    ///   the end-of-text token unless those end in it; scored from the completion on.
    ///
    /// # Errors
    /// What makes the record unusable with this model.
    pub fn encode(&self, record: &Record, sequence_length: usize) -> Result<Example, RecordFault> {
        let encoded = match record {
            Record::Text(text) => self.encode_text(text)?,
            Record::Messages(messages) => self.encode_messages(messages, 0)?,
            Record::Pair { prompt, completion } => self.encode_answer(prompt, completion)?,
            Record::Preference(_) => return Err(RecordFault::Preference),
        };
        self.cut(encoded, sequence_length)
    }

    /// Encodes a preference: the prompt with the chosen answer, and with the rejected one, each as a
    /// prompt with its completion is; in conversations, what follows the prompt is scored.
    ///
    /// # Errors
    /// What makes the record unusable with this model; a record of another kind.
    pub fn encode_preference(
        &self,
        record: &Record,
        sequence_length: usize,
    ) -> Result<[Example; 2], RecordFault> {
        let Record::Preference(preference) = record else {
            return Err(RecordFault::NoPreference);
        };
        let (chosen, rejected) = match preference {
            Preference::Texts(choice) => (
                self.encode_answer(&choice.prompt, &choice.chosen)?,
                self.encode_answer(&choice.prompt, &choice.rejected)?,
            ),
            Preference::Messages(choice) => {
                let prompt = &choice.prompt;
                let side = |answer: &[Message]| {
                    self.encode_messages(&[prompt, answer].concat(), prompt.len())
                };
                (side(&choice.chosen)?, side(&choice.rejected)?)
            }
        };
        Ok([
            self.cut(chosen, sequence_length)?,
            self.cut(rejected, sequence_length)?,
        ])
    }

    /// Cuts what was encoded, and checks it.
    fn cut(
        &self,
        (mut tokens, mut scored): (Vec<u32>, Vec<bool>),
        sequence_length: usize,
    ) -> Result<Example, RecordFault> {
        let cut = tokens.len() > sequence_length;
        tokens.truncate(sequence_length);
        scored.truncate(sequence_length);
        if let Some(first) = scored.first_mut() {
            *first = false;
        }
        self.vocabulary.check(&tokens)?;
        tokens.shrink_to_fit();
        scored.shrink_to_fit();
        Ok(Example {
            tokens,
            scored,
            cut,
        })
    }

    /// A prompt with its answer, through the chat template where there is one.
    fn encode_answer(
        &self,
        prompt: &str,
        answer: &str,
    ) -> Result<(Vec<u32>, Vec<bool>), RecordFault> {
        if self.template()?.is_none() {
            return self.encode_pair(prompt, answer);
        }
        let message = |role, content: &str| Message {
            role,
            content: content.to_owned(),
        };
        let messages = [
            message(Role::User, prompt),
            message(Role::Assistant, answer),
        ];
        self.encode_messages(&messages, 0)
    }

    fn encode_text(&self, text: &str) -> Result<(Vec<u32>, Vec<bool>), RecordFault> {
        let (before, pieces, after) = self.vocabulary.encode_with_specials(text)?;
        let tokens = [before, pieces.ids, after].concat();
        let scored = vec![true; tokens.len()];
        Ok((tokens, scored))
    }

    /// Messages, of which the first few are given and not scored.
    fn encode_messages(
        &self,
        messages: &[Message],
        given: usize,
    ) -> Result<(Vec<u32>, Vec<bool>), RecordFault> {
        let template = self.template()?.ok_or(RecordFault::NoTemplate)?;
        let mut rendering = render_scored(template, messages)?;
        let turns_given = messages[..given].iter();
        let turns_given = turns_given.filter(|message| message.role == Role::Assistant);
        rendering.scored.drain(..turns_given.count());
        let pieces = self.vocabulary.encode(&rendering.text)?;
        let scored = pieces
            .spans
            .iter()
            .map(|&(start, end)| {
                // The scored parts are in order: the first that ends behind the token's start decides.
                let next = rendering.scored.partition_point(|part| part.end <= start);
                rendering
                    .scored
                    .get(next)
                    .is_some_and(|part| end > part.start)
            })
            .collect();
        Ok((pieces.ids, scored))
    }

    fn encode_pair(
        &self,
        prompt: &str,
        completion: &str,
    ) -> Result<(Vec<u32>, Vec<bool>), RecordFault> {
        let end_of_text = self
            .vocabulary
            .end_of_text()
            .ok_or(RecordFault::NoEndOfText)?;
        let text = format!("{prompt}\n{completion}");
        let answer = prompt.len() + 1;
        let (before, pieces, mut after) = self.vocabulary.encode_with_specials(&text)?;
        if after.last() != Some(&end_of_text) {
            after.push(end_of_text);
        }
        let mut scored = vec![false; before.len()];
        scored.extend(pieces.spans.iter().map(|&(_, end)| end > answer));
        scored.resize(scored.len() + after.len(), true);
        Ok(([before, pieces.ids, after].concat(), scored))
    }
}

fn next_chunk(records: &mut impl Iterator<Item = (u64, Record)>) -> Vec<(u64, Record)> {
    let mut chunk = Vec::new();
    let mut bytes = 0;
    while chunk.len() < CHUNK_RECORDS_MAX && bytes < CHUNK_BYTES_MAX {
        let Some((number, record)) = records.next() else {
            break;
        };
        bytes += text_bytes(&record);
        chunk.push((number, record));
    }
    chunk
}

fn text_bytes(record: &Record) -> usize {
    match record {
        Record::Text(text) => text.len(),
        Record::Messages(messages) => said(messages),
        Record::Pair { prompt, completion } => prompt.len() + completion.len(),
        Record::Preference(Preference::Texts(choice)) => {
            2 * choice.prompt.len() + choice.chosen.len() + choice.rejected.len()
        }
        Record::Preference(Preference::Messages(choice)) => {
            2 * said(&choice.prompt) + said(&choice.chosen) + said(&choice.rejected)
        }
    }
}

fn said(messages: &[Message]) -> usize {
    messages.iter().map(|message| message.content.len()).sum()
}

/// Encodes a chunk on several threads, in order; of several faults the first record's is returned.
fn encode_chunk<T: Send>(
    encode: &(impl Fn(&Record) -> Result<T, RecordFault> + Sync),
    chunk: &[(u64, Record)],
    threads: usize,
) -> Result<Vec<T>, DataError> {
    let encode = |part: &[(u64, Record)]| -> Result<Vec<T>, DataError> {
        part.iter()
            .map(|(number, record)| {
                encode(record).map_err(|fault| DataError::Record {
                    number: *number,
                    fault,
                })
            })
            .collect()
    };
    let parts: Vec<&[(u64, Record)]> = chunk.chunks(chunk.len().div_ceil(threads).max(1)).collect();
    let done: Vec<Result<Vec<T>, DataError>> = thread::scope(|scope| {
        let encode = &encode;
        let start = |part| {
            thread::Builder::new()
                .stack_size(RENDER_STACK_BYTES)
                .spawn_scoped(scope, move || encode(part))
        };
        let running: Vec<_> = parts.iter().map(|part| start(*part)).collect();
        let joined = running.into_iter().zip(&parts).map(|(thread, part)| {
            let number = |record: Option<&(u64, Record)>| record.map_or(0, |(number, _)| *number);
            let (first, last) = (number(part.first()), number(part.last()));
            let panicked = |_| Err(DataError::Panicked { first, last });
            // Where there was no room for its stack, there may be now that others have ended.
            thread
                .or_else(|_| start(*part))
                .map_err(DataError::Thread)?
                .join()
                .unwrap_or_else(panicked)
        });
        joined.collect()
    });
    let done = done.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(done.into_iter().flatten().collect())
}
