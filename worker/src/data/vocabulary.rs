//! The tokenizer files of a model folder, read as transformers reads them.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use cairn_stack::checkpoint::TOKENIZER_FILE;
use serde_json::Value;
use tokenizers::{AddedToken, PostProcessor, PostProcessorWrapper, Tokenizer};

use super::template::TEMPLATE_BYTES_MAX;
use super::{DataError, RecordFault};

/// Largest `tokenizer.json`, in bytes; vocabularies of 256 000 tokens have about 35 MiB.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
/// Largest of the small JSON files, in bytes.
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// The variables a chat template may print.
const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A tokenizer without its post-processor, which would trim white space off the offsets.
#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    specials: Specials,
    end_of_text: Option<u32>,
    model_size: Option<u64>,
}

/// What goes around a text that no template has rendered.
#[derive(Debug)]
enum Specials {
    Processor(Box<PostProcessorWrapper>),
    Fixed { before: Vec<u32>, after: Vec<u32> },
}

/// A text's tokens, with the bytes each was cut from. The pieces of one split character all span it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Start and end of each, in bytes of the text.
    pub spans: Vec<(usize, usize)>,
}

/// What a model folder says beside its vocabulary.
#[derive(Debug)]
pub struct TokenizerFolder {
    /// The vocabulary.
    pub vocabulary: Vocabulary,
    /// `bos_token` and the like, as the template sees them.
    pub named_tokens: Vec<(String, String)>,
    /// Source of the default chat template.
    pub chat_template: Option<String>,
}

impl TokenizerFolder {
    /// Reads `tokenizer.json`, and where they exist `tokenizer_config.json`, `special_tokens_map.json`,
    /// `chat_template.jinja` (which wins over the configuration's), `generation_config.json` and
    /// `config.json`.
    ///
    /// # Errors
    /// A missing tokenizer, and any file that cannot be read, is too large or malformed, by its path.
    pub fn load(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(TOKENIZER_FILE);
        let file = || path.display().to_string();
        let bytes = read_bounded(&path, TOKENIZER_BYTES_MAX)?
            .ok_or_else(|| DataError::Missing { file: file() })?;
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| DataError::Malformed {
            file: file(),
            reason: error.to_string(),
        })?;
        // Both would change what a record is; only the sequence length of the recipe cuts.
        tokenizer
            .with_padding(None)
            .with_truncation(None)
            .map_err(|error| DataError::Malformed {
                file: file(),
                reason: error.to_string(),
            })?;

        let config = read_json(&folder.join("tokenizer_config.json"))?;
        let map = read_json(&folder.join("special_tokens_map.json"))?;
        let named_tokens: Vec<(String, String)> = NAMED_TOKENS
            .iter()
            .filter_map(|name| {
                let content =
                    token_content(&config[*name]).or_else(|| token_content(&map[*name]))?;
                Some(((*name).to_owned(), content))
            })
            .collect();
        // Like transformers: a named token is special even where tokenizer.json does not say so.
        for (_, content) in &named_tokens {
            let token = AddedToken::from(content.clone(), true).normalized(false);
            let _ = tokenizer.add_special_tokens([token]);
        }
        let vocabulary = Vocabulary::new(tokenizer, folder, &config, &named_tokens)?;
        let chat_template = chat_template(folder, &config)?;
        Ok(Self {
            vocabulary,
            named_tokens,
            chat_template,
        })
    }
}

impl Vocabulary {
    fn new(
        mut tokenizer: Tokenizer,
        folder: &Path,
        config: &Value,
        named_tokens: &[(String, String)],
    ) -> Result<Self, DataError> {
        let id = |name: &str| {
            let (_, content) = named_tokens.iter().find(|(named, _)| named == name)?;
            tokenizer.token_to_id(content)
        };
        // As in transformers 5: keys in the configuration replace the post-processor.
        let flag = |key: &str| config[key].as_bool().unwrap_or(false);
        let explicit = config
            .get("add_bos_token")
            .or(config.get("add_eos_token"))
            .is_some();
        let specials = match tokenizer.get_post_processor() {
            Some(processor) if !explicit => Specials::Processor(Box::new(processor.clone())),
            _ => Specials::Fixed {
                before: id("bos_token")
                    .filter(|_| flag("add_bos_token"))
                    .into_iter()
                    .collect(),
                after: id("eos_token")
                    .filter(|_| flag("add_eos_token"))
                    .into_iter()
                    .collect(),
            },
        };
        let model = read_json(&folder.join("config.json"))?;
        let generation = read_json(&folder.join("generation_config.json"))?;
        let end_of_text = id("eos_token")
            .or_else(|| first_id(&generation["eos_token_id"]))
            .or_else(|| first_id(&model["eos_token_id"]));
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        Ok(Self {
            tokenizer,
            specials,
            end_of_text,
            model_size: model["vocab_size"].as_u64(),
        })
    }

    /// The token that ends a text.
    #[must_use]
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// One more than the largest token id the tokenizer knows.
    #[must_use]
    pub fn size(&self) -> usize {
        self.tokenizer
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1)
    }

    /// Encodes `text` as it stands.
    ///
    /// # Errors
    /// [`RecordFault::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Pieces, RecordFault> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(tokenizer_fault)?;
        Ok(Pieces {
            ids: encoding.get_ids().to_vec(),
            spans: encoding.get_offsets().to_vec(),
        })
    }

    /// Encodes `text` and returns, beside it, the special tokens before and after it.
    ///
    /// # Errors
    /// [`RecordFault::Tokenizer`].
    pub fn encode_with_specials(
        &self,
        text: &str,
    ) -> Result<(Vec<u32>, Pieces, Vec<u32>), RecordFault> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(tokenizer_fault)?;
        let pieces = Pieces {
            ids: encoding.get_ids().to_vec(),
            spans: encoding.get_offsets().to_vec(),
        };
        let processor = match &self.specials {
            Specials::Fixed { before, after } => {
                return Ok((before.clone(), pieces, after.clone()));
            }
            Specials::Processor(processor) => processor,
        };
        let whole = processor
            .process(encoding, None, true)
            .map_err(tokenizer_fault)?;
        let (ids, mask) = (whole.get_ids(), whole.get_special_tokens_mask());
        let start = mask
            .iter()
            .position(|&special| special == 0)
            .unwrap_or(ids.len());
        let end = start + pieces.ids.len();
        if ids.get(start..end) != Some(&pieces.ids[..]) {
            return Err(RecordFault::Tokenizer(
                "its post-processor changes the text".to_owned(),
            ));
        }
        Ok((ids[..start].to_vec(), pieces, ids[end..].to_vec()))
    }

    /// Refuses ids the model has no embedding for, where the folder's `config.json` says how many it has.
    ///
    /// # Errors
    /// [`RecordFault::OutsideVocabulary`].
    pub fn check(&self, ids: &[u32]) -> Result<(), RecordFault> {
        let Some(vocabulary) = self.model_size else {
            return Ok(());
        };
        match ids.iter().find(|&&id| u64::from(id) >= vocabulary) {
            Some(&token) => Err(RecordFault::OutsideVocabulary { token, vocabulary }),
            None => Ok(()),
        }
    }
}

fn tokenizer_fault(error: tokenizers::Error) -> RecordFault {
    RecordFault::Tokenizer(error.to_string())
}

/// The default template: `chat_template.jinja`, or the configuration's string, or in its list of named
/// templates the one called "default".
fn chat_template(folder: &Path, config: &Value) -> Result<Option<String>, DataError> {
    let path = folder.join("chat_template.jinja");
    if let Some(bytes) = read_bounded(&path, TEMPLATE_BYTES_MAX)? {
        let source = String::from_utf8(bytes).map_err(|error| DataError::Malformed {
            file: path.display().to_string(),
            reason: error.to_string(),
        })?;
        // Python reads the file in text mode.
        return Ok(Some(source.replace("\r\n", "\n")));
    }
    let malformed = |reason: &str| DataError::Malformed {
        file: folder.join("tokenizer_config.json").display().to_string(),
        reason: reason.to_owned(),
    };
    match &config["chat_template"] {
        Value::Null => Ok(None),
        Value::String(source) if source.len() as u64 <= TEMPLATE_BYTES_MAX => {
            Ok(Some(source.clone()))
        }
        Value::String(_) => Err(malformed("chat_template is too long")),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(|source| Some(source.to_owned()))
            .ok_or_else(|| {
                malformed("chat_template is a list without a template named \"default\"")
            }),
        _ => Err(malformed(
            "chat_template is neither text nor a list of named templates",
        )),
    }
}

/// A token given as text or as `{"content": text}`.
fn token_content(value: &Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value["content"].as_str())
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
}

/// A token id, or the first of a list of them.
fn first_id(value: &Value) -> Option<u32> {
    value
        .as_u64()
        .or_else(|| value[0].as_u64())
        .and_then(|id| u32::try_from(id).ok())
}

/// A JSON file's value; null where there is none.
fn read_json(path: &Path) -> Result<Value, DataError> {
    let Some(bytes) = read_bounded(path, CONFIG_BYTES_MAX)? else {
        return Ok(Value::Null);
    };
    serde_json::from_slice(&bytes).map_err(|error| DataError::Malformed {
        file: path.display().to_string(),
        reason: error.to_string(),
    })
}

/// A whole file of at most `bytes_max` bytes; `None` where there is none.
fn read_bounded(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, DataError> {
    let file = || path.display().to_string();
    let read = |source| DataError::Read {
        file: file(),
        source,
    };
    let opened = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(read)?,
    };
    let mut bytes = Vec::new();
    opened
        .take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    if bytes.len() as u64 > bytes_max {
        return Err(DataError::TooLarge {
            file: file(),
            bytes_max,
        });
    }
    Ok(Some(bytes))
}
