//! A round as a maintainer writes it: which model, which data, the recipe and the policy.

use serde::{Deserialize, Serialize};

use crate::duration::{format_duration_ms, parse_duration_ms};
use crate::recipe::{Above, AtLeast};
use crate::recipe::{
    RawRecipe, Recipe, RecipeError, UnknownKeys, out_of_bounds, parse, real, refuse_unknown,
    required, seed, to_toml, whole,
};

/// Most shards of one round; each is a row and a lease.
pub const SHARDS_MAX: u32 = 100_000;
/// Longest name of a model or dataset, in bytes.
pub const NAME_BYTES_MAX: usize = 96;
const SECOND_MS: u64 = 1_000;
const DAY_MS: u64 = 86_400 * SECOND_MS;

/// How accepted submissions become one update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aggregation {
    /// Clip, gate, stack, line search, fold: exact sums, no cross terms.
    #[default]
    Stack,
}

/// What decides over submissions and when a round ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawPolicy", into = "RawPolicy")]
pub struct Policy {
    /// The dataset that decides.
    pub gate: String,
    /// The dataset that is reported and never decides.
    pub audit: Option<String>,
    /// How accepted submissions become one update.
    pub aggregation: Aggregation,
    /// From opening to the end of training, in milliseconds.
    pub deadline_ms: u64,
    /// How long a lease lives without renewal, in milliseconds.
    pub lease_ms: u64,
    /// A candidate is accepted when the mean of its paired loss differences exceeds this many
    /// standard errors.
    pub gate_z: f64,
    /// Robust z-score of the log norm at which a submission is refused unseen.
    pub norm_mad_reject: f64,
    /// Robust z-score of the log norm at which a submission waits for the rest of its cohort.
    pub norm_mad_hold: f64,
    /// Fewer norms than this say nothing about outliers.
    pub min_cohort: u32,
    /// Decides the shard plan.
    pub seed: u64,
}

/// One round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawRoundFile", into = "RawRoundFile")]
pub struct RoundFile {
    /// The model whose checkpoint is the base.
    pub model: String,
    /// The base checkpoint; the model's head when absent.
    pub revision: Option<String>,
    /// The training data.
    pub dataset: String,
    /// How many shards it is cut into.
    pub shards: u32,
    /// How each shard is trained on.
    pub recipe: Recipe,
    /// What decides.
    pub policy: Policy,
}

impl RoundFile {
    /// Parses and checks a round file.
    ///
    /// # Errors
    /// When the text is not TOML, a key is unknown or missing, or a value is out of bounds.
    pub fn parse_toml(text: &str) -> Result<Self, RecipeError> {
        parse::<RawRoundFile>(text)?.try_into()
    }

    /// The round file that [`Self::parse_toml`] reads back to the same round.
    #[must_use]
    pub fn to_toml(&self) -> String {
        to_toml(&RawRoundFile::from(self.clone()))
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct RawPolicy {
    gate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<String>,
    aggregation: Option<String>,
    deadline: Option<String>,
    lease: Option<String>,
    gate_z: Option<f64>,
    norm_mad_reject: Option<f64>,
    norm_mad_hold: Option<f64>,
    min_cohort: Option<u32>,
    seed: Option<u64>,
    #[serde(flatten, skip_serializing)]
    unknown: UnknownKeys,
}

const POLICY_KEYS: [&str; 10] = [
    "gate",
    "audit",
    "aggregation",
    "deadline",
    "lease",
    "gate_z",
    "norm_mad_reject",
    "norm_mad_hold",
    "min_cohort",
    "seed",
];

#[derive(Debug, Clone, Serialize, Deserialize)]
struct RawRoundFile {
    model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<String>,
    dataset: Option<String>,
    shards: Option<u32>,
    recipe: Option<RawRecipe>,
    policy: Option<RawPolicy>,
    #[serde(flatten, skip_serializing)]
    unknown: UnknownKeys,
}

const ROUND_KEYS: [&str; 6] = ["model", "revision", "dataset", "shards", "recipe", "policy"];

impl TryFrom<RawPolicy> for Policy {
    type Error = RecipeError;

    fn try_from(raw: RawPolicy) -> Result<Self, RecipeError> {
        refuse_unknown(&raw.unknown, &POLICY_KEYS)?;
        let aggregation = match raw.aggregation.as_deref() {
            None | Some("stack") => Aggregation::Stack,
            Some(other) => {
                return Err(invalid(
                    "aggregation",
                    other,
                    "the one way to aggregate is \"stack\"",
                ));
            }
        };
        let norm_mad_reject = real(
            "norm_mad_reject",
            raw.norm_mad_reject.unwrap_or(6.0),
            Above(0.0),
            1e6,
        )?;
        let norm_mad_hold = real(
            "norm_mad_hold",
            raw.norm_mad_hold.unwrap_or(3.5),
            Above(0.0),
            1e6,
        )?;
        if norm_mad_hold > norm_mad_reject {
            return Err(out_of_bounds(
                "norm_mad_hold",
                norm_mad_hold,
                format!("at most norm_mad_reject, {norm_mad_reject}"),
            ));
        }
        Ok(Self {
            gate: name("gate", required("gate", raw.gate)?)?,
            audit: raw.audit.map(|audit| name("audit", audit)).transpose()?,
            aggregation,
            deadline_ms: span(
                "deadline",
                &required("deadline", raw.deadline)?,
                60 * DAY_MS,
            )?,
            lease_ms: span("lease", raw.lease.as_deref().unwrap_or("10m"), DAY_MS)?,
            gate_z: real("gate_z", raw.gate_z.unwrap_or(2.33), AtLeast(0.0), 100.0)?,
            norm_mad_reject,
            norm_mad_hold,
            min_cohort: whole("min_cohort", raw.min_cohort.unwrap_or(4), 2, SHARDS_MAX)?,
            seed: seed(raw.seed)?,
        })
    }
}

impl From<Policy> for RawPolicy {
    fn from(policy: Policy) -> Self {
        let Aggregation::Stack = policy.aggregation;
        Self {
            gate: Some(policy.gate),
            audit: policy.audit,
            aggregation: Some("stack".to_owned()),
            deadline: Some(format_duration_ms(policy.deadline_ms)),
            lease: Some(format_duration_ms(policy.lease_ms)),
            gate_z: Some(policy.gate_z),
            norm_mad_reject: Some(policy.norm_mad_reject),
            norm_mad_hold: Some(policy.norm_mad_hold),
            min_cohort: Some(policy.min_cohort),
            seed: Some(policy.seed),
            unknown: UnknownKeys::new(),
        }
    }
}

impl TryFrom<RawRoundFile> for RoundFile {
    type Error = RecipeError;

    fn try_from(raw: RawRoundFile) -> Result<Self, RecipeError> {
        refuse_unknown(&raw.unknown, &ROUND_KEYS)?;
        let dataset = name("dataset", required("dataset", raw.dataset)?)?;
        let policy: Policy = required("policy", raw.policy)?.try_into()?;
        if policy.gate == dataset || policy.audit.as_ref() == Some(&dataset) {
            return Err(invalid(
                "dataset",
                &dataset,
                "a round does not train on its gate or audit set",
            ));
        }
        if policy.audit.as_ref() == Some(&policy.gate) {
            return Err(invalid(
                "audit",
                &policy.gate,
                "it is the gate set; the audit set never decides",
            ));
        }
        Ok(Self {
            model: name("model", required("model", raw.model)?)?,
            revision: raw
                .revision
                .map(|revision| name("revision", revision))
                .transpose()?,
            dataset,
            shards: whole("shards", required("shards", raw.shards)?, 1, SHARDS_MAX)?,
            recipe: required("recipe", raw.recipe)?.try_into()?,
            policy,
        })
    }
}

impl From<RoundFile> for RawRoundFile {
    fn from(round: RoundFile) -> Self {
        Self {
            model: Some(round.model),
            revision: round.revision,
            dataset: Some(round.dataset),
            shards: Some(round.shards),
            recipe: Some(round.recipe.into()),
            policy: Some(round.policy.into()),
            unknown: UnknownKeys::new(),
        }
    }
}

/// Checks the name of a model, dataset or revision: letters, digits, `.`, `_` and `-`, with at most
/// one `/` between two parts, as on the Hugging Face Hub. No part starts with a dot or is empty, so
/// a name is also a safe relative path.
///
/// # Errors
/// [`RecipeError::Invalid`] with `key` as the name's role.
pub fn name(key: &'static str, text: String) -> Result<String, RecipeError> {
    let part_is_fine = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    if text.len() <= NAME_BYTES_MAX
        && text.split('/').count() <= 2
        && text.split('/').all(part_is_fine)
    {
        return Ok(text);
    }
    Err(invalid(
        key,
        &text,
        "a name has 1 to 96 letters, digits, '.', '_' or '-', starts with a letter, digit or '_', and may have one '/'",
    ))
}

fn span(key: &'static str, text: &str, max_ms: u64) -> Result<u64, RecipeError> {
    let ms = parse_duration_ms(text).map_err(|error| invalid(key, text, &error.to_string()))?;
    if (SECOND_MS..=max_ms).contains(&ms) {
        return Ok(ms);
    }
    Err(out_of_bounds(
        key,
        text,
        format!("from 1s to {}", format_duration_ms(max_ms)),
    ))
}

fn invalid(key: &'static str, value: &str, reason: &str) -> RecipeError {
    RecipeError::Invalid {
        key,
        value: value.chars().take(64).collect(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
#[path = "round_tests.rs"]
mod tests;
