//! A round as a maintainer writes it: which model, which data, the recipe and the policy.

use serde::{Deserialize, Serialize};

use crate::duration::{format_duration_ms, parse_duration_ms};
use crate::objective::Objective;
use crate::recipe::{Above, AtLeast};
use crate::recipe::{
    RawRecipe, Recipe, RecipeError, UnknownKeys, invalid, out_of_bounds, parse, real,
    refuse_unknown, required, seed, to_toml, whole,
};

/// Most shards of one round; each is a row and a lease.
pub const SHARDS_MAX: u32 = 100_000;
/// Longest name of a model or dataset, in bytes.
pub const NAME_BYTES_MAX: usize = 96;
/// Most guards, and most probes, of one round: each is scored for each submission.
pub const SETS_MAX: usize = 16;
/// Most records of a shard that its submission is tested on.
pub const SHARD_RECORDS_MAX: u32 = 1_000;
/// Most segments of a training; a worker keeps a state for each until it is judged.
pub const SEGMENTS_MAX: u32 = 100;
const SECOND_MS: u64 = 1_000;
const DAY_MS: u64 = 86_400 * SECOND_MS;

/// How accepted submissions become one update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aggregation {
    /// Clip, gate, stack, line search, fold: exact sums, no cross terms.
    #[default]
    Stack,
    /// Broadcast mean factors, fold the exact residual (FedEx-LoRA, arXiv 2410.09432).
    #[serde(rename = "fedex")]
    FedEx,
    /// The mean of those with the closest neighbours (arXiv 1703.02757).
    #[serde(rename = "multi-krum")]
    MultiKrum,
    /// The point of least summed distance (arXiv 1912.13445).
    #[serde(rename = "geometric-median")]
    GeometricMedian,
    /// Factors on the adapters, optimised on the gate set by an evaluator (LoraHub's question,
    /// arXiv 2307.13269, answered by gradients).
    Learned,
}

impl Aggregation {
    /// Every rule.
    pub const ALL: [Self; 5] = [
        Self::Stack,
        Self::FedEx,
        Self::MultiKrum,
        Self::GeometricMedian,
        Self::Learned,
    ];

    /// The word in a round file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stack => "stack",
            Self::FedEx => "fedex",
            Self::MultiKrum => "multi-krum",
            Self::GeometricMedian => "geometric-median",
            Self::Learned => "learned",
        }
    }
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
    /// Momentum of the outer Nesterov step over rounds; 0 is off.
    pub momentum: f64,
    /// Datasets (sets gate, dev or audit) that the model must not get worse at.
    pub guards: Vec<String>,
    /// Standard errors by which the loss of a guard may rise.
    pub guard_z: f64,
    /// Datasets whose completions are unwanted answers: triggers, harm.
    pub probes: Vec<String>,
    /// A submission is refused when it makes a probe likelier by more than the cohort does, in
    /// robust standard deviations.
    pub probe_z: f64,
    /// A later submission with at least this cosine to an earlier one is a copy.
    pub copy_cosine: f64,
    /// Robust z-score of a spectral statistic at which a submission is refused.
    pub spectral_z: f64,
    /// Optimiser steps of the guiding update that an evaluator trains for each shard; 0 is off.
    pub guide_steps: u32,
    /// Least cosine of a submission to its shard's guiding update.
    pub guide_cosine: f64,
    /// Records of a shard on which its submission is tested against another shard; 0 is off.
    pub shard_records: u32,
    /// Standard errors by which the gain on the own shard may fall behind that on another.
    pub shard_z: f64,
    /// Segments of a training that can be replayed; 0 is off.
    pub segments: u32,
    /// Tasks of a new identity that are always replayed.
    pub audit_first: u32,
    /// Share of the tasks of a known identity that is replayed; falls as trust grows.
    pub audit_share: f64,
    /// It never falls below this.
    pub audit_share_min: f64,
    /// Largest distance of a replayed segment, as a part of what the segment moved.
    pub replay_tolerance: f64,
    /// Most that one identity may weigh in a round, as a share.
    pub identity_share: f64,
    /// Most that all new identities together may weigh in a round where there are others.
    pub newcomer_share: f64,
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
    momentum: Option<f64>,
    guards: Option<Vec<String>>,
    guard_z: Option<f64>,
    probes: Option<Vec<String>>,
    probe_z: Option<f64>,
    copy_cosine: Option<f64>,
    spectral_z: Option<f64>,
    guide_steps: Option<u32>,
    guide_cosine: Option<f64>,
    shard_records: Option<u32>,
    shard_z: Option<f64>,
    segments: Option<u32>,
    audit_first: Option<u32>,
    audit_share: Option<f64>,
    audit_share_min: Option<f64>,
    replay_tolerance: Option<f64>,
    identity_share: Option<f64>,
    newcomer_share: Option<f64>,
    seed: Option<u64>,
    #[serde(flatten, skip_serializing)]
    unknown: UnknownKeys,
}

pub(crate) const POLICY_KEYS: [&str; 28] = [
    "gate",
    "audit",
    "aggregation",
    "deadline",
    "lease",
    "gate_z",
    "norm_mad_reject",
    "norm_mad_hold",
    "min_cohort",
    "momentum",
    "guards",
    "guard_z",
    "probes",
    "probe_z",
    "copy_cosine",
    "spectral_z",
    "guide_steps",
    "guide_cosine",
    "shard_records",
    "shard_z",
    "segments",
    "audit_first",
    "audit_share",
    "audit_share_min",
    "replay_tolerance",
    "identity_share",
    "newcomer_share",
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
            None => Aggregation::default(),
            Some(word) => Aggregation::ALL
                .into_iter()
                .find(|rule| rule.as_str() == word)
                .ok_or_else(|| {
                    let words = Aggregation::ALL.map(Aggregation::as_str).join(", ");
                    invalid("aggregation", word, &format!("it is one of {words}"))
                })?,
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
            momentum: share("momentum", raw.momentum, 0.0)?,
            guards: names("guards", raw.guards)?,
            guard_z: real("guard_z", raw.guard_z.unwrap_or(2.0), AtLeast(0.0), 100.0)?,
            probes: names("probes", raw.probes)?,
            probe_z: real("probe_z", raw.probe_z.unwrap_or(6.0), Above(0.0), 1e6)?,
            copy_cosine: share("copy_cosine", raw.copy_cosine, 0.95)?,
            spectral_z: real("spectral_z", raw.spectral_z.unwrap_or(8.0), Above(0.0), 1e6)?,
            guide_steps: whole("guide_steps", raw.guide_steps.unwrap_or(0), 0, 10_000)?,
            guide_cosine: real(
                "guide_cosine",
                raw.guide_cosine.unwrap_or(0.0),
                AtLeast(-1.0),
                1.0,
            )?,
            shard_records: whole(
                "shard_records",
                raw.shard_records.unwrap_or(16),
                0,
                SHARD_RECORDS_MAX,
            )?,
            shard_z: real("shard_z", raw.shard_z.unwrap_or(3.0), AtLeast(0.0), 100.0)?,
            segments: whole("segments", raw.segments.unwrap_or(10), 0, SEGMENTS_MAX)?,
            audit_first: whole("audit_first", raw.audit_first.unwrap_or(3), 0, 1_000)?,
            audit_share: share("audit_share", raw.audit_share, 0.2)?,
            audit_share_min: share("audit_share_min", raw.audit_share_min, 0.05)?,
            replay_tolerance: real(
                "replay_tolerance",
                raw.replay_tolerance.unwrap_or(0.05),
                AtLeast(0.0),
                1.0,
            )?,
            identity_share: share("identity_share", raw.identity_share, 0.5)?,
            newcomer_share: share("newcomer_share", raw.newcomer_share, 0.5)?,
            seed: seed(raw.seed)?,
        })
    }
}

impl From<Policy> for RawPolicy {
    fn from(policy: Policy) -> Self {
        Self {
            gate: Some(policy.gate),
            audit: policy.audit,
            aggregation: Some(policy.aggregation.as_str().to_owned()),
            deadline: Some(format_duration_ms(policy.deadline_ms)),
            lease: Some(format_duration_ms(policy.lease_ms)),
            gate_z: Some(policy.gate_z),
            norm_mad_reject: Some(policy.norm_mad_reject),
            norm_mad_hold: Some(policy.norm_mad_hold),
            min_cohort: Some(policy.min_cohort),
            momentum: Some(policy.momentum),
            guards: Some(policy.guards),
            guard_z: Some(policy.guard_z),
            probes: Some(policy.probes),
            probe_z: Some(policy.probe_z),
            copy_cosine: Some(policy.copy_cosine),
            spectral_z: Some(policy.spectral_z),
            guide_steps: Some(policy.guide_steps),
            guide_cosine: Some(policy.guide_cosine),
            shard_records: Some(policy.shard_records),
            shard_z: Some(policy.shard_z),
            segments: Some(policy.segments),
            audit_first: Some(policy.audit_first),
            audit_share: Some(policy.audit_share),
            audit_share_min: Some(policy.audit_share_min),
            replay_tolerance: Some(policy.replay_tolerance),
            identity_share: Some(policy.identity_share),
            newcomer_share: Some(policy.newcomer_share),
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
        let recipe: Recipe = required("recipe", raw.recipe)?.try_into()?;
        check_objective(&recipe.objective, policy.aggregation)?;
        Ok(Self {
            model: name("model", required("model", raw.model)?)?,
            revision: raw
                .revision
                .map(|revision| name("revision", revision))
                .transpose()?,
            dataset,
            shards: whole("shards", required("shards", raw.shards)?, 1, SHARDS_MAX)?,
            recipe,
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

/// What an objective needs of a round: its teacher, and a rule that can weigh what comes of it.
fn check_objective(objective: &Objective, aggregation: Aggregation) -> Result<(), RecipeError> {
    if matches!(objective, Objective::Distill(_)) && objective.teacher().is_none() {
        return Err(RecipeError::Missing("teacher"));
    }
    if objective.is_of_preferences() && aggregation == Aggregation::Learned {
        let reason = "weights are learnt on texts; a round of preferences takes any other rule";
        return Err(invalid("aggregation", aggregation.as_str(), reason));
    }
    Ok(())
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

/// A number from 0 to 1.
fn share(key: &'static str, value: Option<f64>, default: f64) -> Result<f64, RecipeError> {
    real(key, value.unwrap_or(default), AtLeast(0.0), 1.0)
}

/// Names of datasets, each once.
fn names(key: &'static str, list: Option<Vec<String>>) -> Result<Vec<String>, RecipeError> {
    let list = list.unwrap_or_default();
    if list.len() > SETS_MAX {
        return Err(out_of_bounds(
            key,
            list.len(),
            format!("at most {SETS_MAX} names"),
        ));
    }
    let mut seen = Vec::new();
    for text in list {
        let text = name(key, text)?;
        if seen.contains(&text) {
            return Err(invalid(key, &text, "it is named twice"));
        }
        seen.push(text);
    }
    Ok(seen)
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

#[cfg(test)]
#[path = "round_tests.rs"]
mod tests;
