//! What a manifest says, and its one encoding.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{CHECKSUMS_FILE, COMMIT_LENGTH, LineageError, MANIFEST_FILE, SIGNATURE_FILE};
use crate::digest::Digest;
use crate::files::{FILES_MAX, FileEntry, is_safe_path};
use crate::fold::TERMS_MAX;
use crate::json::{parse_strict, reason};
use crate::recipe::Recipe;

/// The version of this encoding.
const SCHEMA: u32 = 1;
/// Longest word (model, id, worker) in a manifest, in bytes.
const WORD_BYTES_MAX: usize = 256;

/// From which parts one published checkpoint was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the encoding; [`Manifest::new`] sets it.
    pub schema: u32,
    /// The model's name.
    pub model: String,
    /// Number of this revision; 0 is the base.
    pub revision: u64,
    /// Commit of the revision before; none for the base.
    pub parent: Option<String>,
    /// The round that made this revision; none for the base.
    pub round: Option<String>,
    /// Unix time of publication, in milliseconds.
    pub published_ms: u64,
    /// All files of the base checkpoint W0.
    pub base: Vec<FileEntry>,
    /// The round's training data.
    pub dataset: Option<DatasetRef>,
    /// The round's recipe. Encoded as TOML text: what `cairn-worker train` takes.
    #[serde(with = "recipe_toml")]
    pub recipe: Option<Recipe>,
    /// The stack over W0, of this and all earlier rounds, in the order of the fold.
    pub contributions: Vec<Contribution>,
    /// What the evaluation sets said.
    pub scores: Scores,
    /// All files of this checkpoint, but for manifest, signature and checksums, by path.
    pub files: Vec<FileEntry>,
}

/// A dataset, by name and content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetRef {
    /// Its name.
    pub name: String,
    /// Digest of its description, which names its chunks.
    pub digest: Digest,
}

/// One term of the stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contribution {
    /// The submission's id.
    pub id: String,
    /// The round it was made in.
    pub round: String,
    /// Who made it, as the coordinator names volunteers.
    pub worker: String,
    /// Which shard it was trained on.
    pub shard: u32,
    /// Tokens the coordinator leased for it.
    pub tokens: u64,
    /// Digest of its `adapter_model.safetensors`.
    pub adapter: Digest,
    /// Digest of its `adapter_config.json`, which holds the scale.
    pub adapter_config: Digest,
    /// The factor on `s * B * A`: line search, share and clipping all in.
    #[serde(with = "exact")]
    pub weight: f64,
}

/// Mean negative log-likelihood per scored token, in nats.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// Gate set, parent checkpoint.
    #[serde(with = "exact_option")]
    pub gate_before: Option<f64>,
    /// Gate set, this checkpoint.
    #[serde(with = "exact_option")]
    pub gate_after: Option<f64>,
    /// Audit set, parent checkpoint.
    #[serde(with = "exact_option")]
    pub audit_before: Option<f64>,
    /// Audit set, this checkpoint.
    #[serde(with = "exact_option")]
    pub audit_after: Option<f64>,
}

impl Manifest {
    /// The manifest of a base checkpoint: revision 0, no stack.
    #[must_use]
    pub fn new(model: &str, published_ms: u64, files: Vec<FileEntry>) -> Self {
        Self {
            schema: SCHEMA,
            model: model.to_owned(),
            revision: 0,
            parent: None,
            round: None,
            published_ms,
            base: files.clone(),
            dataset: None,
            recipe: None,
            contributions: Vec::new(),
            scores: Scores::default(),
            files,
        }
    }

    /// The one encoding of this manifest.
    ///
    /// # Errors
    /// When it breaks a rule of [`Self::check`].
    pub fn canonical_bytes(&self) -> Result<Vec<u8>, LineageError> {
        self.check()?;
        let value =
            serde_json::to_value(self).map_err(|error| LineageError::Malformed(reason(&error)))?;
        Ok(sorted(value).to_string().into_bytes())
    }

    /// First 40 hex digits of the canonical bytes' BLAKE3.
    ///
    /// # Errors
    /// When it breaks a rule of [`Self::check`].
    pub fn commit(&self) -> Result<String, LineageError> {
        Ok(commit_of(&self.canonical_bytes()?))
    }

    /// Reads a manifest and insists on its canonical encoding: one manifest, one commit.
    pub(super) fn from_canonical(bytes: &[u8]) -> Result<Self, LineageError> {
        let malformed = |error: serde_json::Error| LineageError::Malformed(reason(&error));
        let value = parse_strict(bytes).map_err(malformed)?;
        let manifest: Self = serde_json::from_value(value).map_err(malformed)?;
        if manifest.canonical_bytes()? != bytes {
            return Err(LineageError::NotCanonical);
        }
        Ok(manifest)
    }

    /// Checks what types cannot: words within bounds, finite numbers, file paths that stay inside
    /// their folder, sorted and unique.
    ///
    /// # Errors
    /// [`LineageError::Invalid`] with the first field that is wrong.
    pub fn check(&self) -> Result<(), LineageError> {
        if self.schema != SCHEMA {
            return Err(invalid(
                "schema",
                &self.schema.to_string(),
                "this program knows version 1",
            ));
        }
        word("model", &self.model)?;
        if let Some(parent) = &self.parent {
            let is_hex = parent
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            if parent.len() != COMMIT_LENGTH || !is_hex {
                return Err(invalid(
                    "parent",
                    parent,
                    "a commit is 40 lowercase hex digits",
                ));
            }
        }
        if self.parent.is_none() != (self.revision == 0) {
            return Err(invalid(
                "revision",
                &self.revision.to_string(),
                "the base is 0 and alone has no parent",
            ));
        }
        self.round
            .iter()
            .try_for_each(|round| word("round", round))?;
        self.dataset
            .iter()
            .try_for_each(|dataset| word("dataset", &dataset.name))?;
        if self.contributions.len() > TERMS_MAX {
            return Err(invalid(
                "contributions",
                &self.contributions.len().to_string(),
                "too many",
            ));
        }
        for contribution in &self.contributions {
            word("contribution id", &contribution.id)?;
            word("contribution round", &contribution.round)?;
            word("contribution worker", &contribution.worker)?;
            finite("contribution weight", Some(contribution.weight))?;
        }
        let Scores {
            gate_before,
            gate_after,
            audit_before,
            audit_after,
        } = self.scores;
        for score in [gate_before, gate_after, audit_before, audit_after] {
            finite("scores", score)?;
        }
        check_files("base", &self.base)?;
        check_files("files", &self.files)
    }
}

pub(super) fn commit_of(bytes: &[u8]) -> String {
    Digest::of(bytes)
        .to_string()
        .chars()
        .take(COMMIT_LENGTH)
        .collect()
}

/// The content of `SHA256SUMS`, as `sha256sum --check` reads it.
#[must_use]
pub fn sha256sums(files: &[FileEntry]) -> String {
    files.iter().fold(String::new(), |mut sums, file| {
        let _ = writeln!(sums, "{}  {}", file.sha256, file.path);
        sums
    })
}

fn check_files(field: &'static str, files: &[FileEntry]) -> Result<(), LineageError> {
    if files.len() > FILES_MAX {
        return Err(invalid(field, &files.len().to_string(), "too many files"));
    }
    let mut folded = BTreeSet::new();
    for file in files {
        if !is_safe_path(&file.path) {
            return Err(invalid(field, &file.path, "the path leaves the folder"));
        }
        if [MANIFEST_FILE, SIGNATURE_FILE, CHECKSUMS_FILE].contains(&file.path.as_str()) {
            return Err(invalid(
                field,
                &file.path,
                "a manifest does not list itself",
            ));
        }
        // Two names that differ in case are one file on some systems.
        if !folded.insert(file.path.to_lowercase()) {
            return Err(invalid(field, &file.path, "listed twice"));
        }
        if file.sha256.len() != 64
            || !file
                .sha256
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        {
            return Err(invalid(
                field,
                &file.sha256,
                "a SHA-256 is 64 lowercase hex digits",
            ));
        }
    }
    if files.is_sorted_by(|a, b| a.path < b.path) {
        return Ok(());
    }
    Err(invalid(
        field,
        "",
        "files are listed in byte order of their paths",
    ))
}

fn word(field: &'static str, text: &str) -> Result<(), LineageError> {
    if !text.is_empty() && text.len() <= WORD_BYTES_MAX && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(invalid(field, text, "it has 1 to 256 printable bytes"))
}

fn finite(field: &'static str, value: Option<f64>) -> Result<(), LineageError> {
    match value {
        Some(value) if !value.is_finite() => {
            Err(invalid(field, &value.to_string(), "it is a finite number"))
        }
        _ => Ok(()),
    }
}

fn invalid(field: &'static str, value: &str, reason: &'static str) -> LineageError {
    LineageError::Invalid {
        field,
        value: value.chars().take(64).collect(),
        reason,
    }
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map
                .into_iter()
                .map(|(key, value)| (key, sorted(value)))
                .collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect::<Map<_, _>>())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// A real number as a string that reads back to the same bits.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{value:?}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse()
            .map_err(|_| D::Error::custom(format_args!("{text:?} is not a decimal number")))
    }
}

#[expect(
    clippy::ref_option,
    reason = "serde's `with` passes the field by reference"
)]
mod exact_option {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        value: &Option<f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::exact::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<f64>, D::Error> {
        let text: Option<String> = Option::deserialize(deserializer)?;
        let parse = |text: String| {
            text.parse()
                .map_err(|_| D::Error::custom("not a decimal number"))
        };
        text.map(parse).transpose()
    }
}

#[expect(
    clippy::ref_option,
    reason = "serde's `with` passes the field by reference"
)]
mod recipe_toml {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use crate::recipe::Recipe;

    pub(super) fn serialize<S: Serializer>(
        recipe: &Option<Recipe>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        recipe.as_ref().map(Recipe::to_toml).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Recipe>, D::Error> {
        let text: Option<String> = Option::deserialize(deserializer)?;
        text.map(|text| Recipe::parse_toml(&text).map_err(D::Error::custom))
            .transpose()
    }
}
