//! What a training minimises: the `objective` of a recipe, and the keys that belong to it.

use serde::{Deserialize, Serialize};

use crate::recipe::{Above, AtLeast, RecipeError, invalid, real, whole};
use crate::round::name;

/// The `beta` of a preference loss where none is written: that of the paper's dialogue experiments, and
/// TRL's.
pub const DPO_BETA_DEFAULT: f64 = 0.1;
/// Tokens of the teacher that a distillation looks at where `distill_top_k` is not written: they hold
/// nearly all of the probability of a trained model.
const TOP_K_DEFAULT: u32 = 32;
/// Most of them: beyond it, what is kept of the teacher grows past the logits it is cut from.
const TOP_K_MAX: u32 = 4096;

/// What a training minimises.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Objective {
    /// The negative log-likelihood of the scored tokens (supervised fine-tuning).
    #[default]
    Sft,
    /// `-log sigmoid(beta ((log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected))))` of
    /// every preference, `r` being the base without adapters (DPO, arXiv 2305.18290, equation 7).
    Dpo {
        /// How strongly the model is held to the base.
        beta: f64,
    },
    /// The divergence from a teacher.
    Distill(Distill),
}

/// Distillation from the most likely tokens of a teacher.
///
/// For a scored token with the teacher's logits `y` and the student's `z`, let `p = softmax(y / T)`,
/// `q = softmax(z / T)`, `K` the `top_k` likeliest tokens of the teacher, and `p_rest`, `q_rest` what is
/// left of either outside `K`. The loss is
///
/// `weight T^2 (sum_K p_i ln(p_i / q_i) + p_rest ln(p_rest / q_rest)) + (1 - weight) (-ln softmax(z)_target)`
///
/// averaged over the scored tokens: the forward divergence of GKD (arXiv 2306.13649) and TRL over the
/// likeliest tokens and a last bucket for all others, `T^2` and the mixture of Hinton et al.
/// (arXiv 1503.02531).
#[derive(Debug, Clone, PartialEq)]
pub struct Distill {
    /// The teacher; none where the command line names its folder.
    pub teacher: Option<Teacher>,
    /// How many of the teacher's likeliest tokens are told apart.
    pub top_k: u32,
    /// What both models' logits are divided by.
    pub temperature: f64,
    /// Part of the divergence in the loss; the rest is the loss of the tokens themselves.
    pub weight: f64,
}

/// A published checkpoint, `name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Teacher {
    /// The model's name.
    pub model: String,
    /// The revision's number, or a commit.
    pub revision: String,
}

impl std::fmt::Display for Teacher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.model, self.revision)
    }
}

impl Objective {
    /// The word in a recipe.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Dpo { .. } => "dpo",
            Self::Distill(_) => "distill",
        }
    }

    /// Whether it learns from preferences, and not from texts.
    #[must_use]
    pub const fn is_of_preferences(&self) -> bool {
        matches!(self, Self::Dpo { .. })
    }

    /// The `beta` that preferences are measured with: the objective's own, else the default.
    #[must_use]
    pub const fn dpo_beta(&self) -> f64 {
        match self {
            Self::Dpo { beta } => *beta,
            Self::Sft | Self::Distill(_) => DPO_BETA_DEFAULT,
        }
    }

    /// The teacher, where a recipe names one.
    #[must_use]
    pub const fn teacher(&self) -> Option<&Teacher> {
        match self {
            Self::Distill(distill) => distill.teacher.as_ref(),
            Self::Sft | Self::Dpo { .. } => None,
        }
    }
}

/// The keys as written. All are left out of a plain recipe, so that it reads, and is signed, as it was
/// before there were these keys.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct RawObjective {
    #[serde(skip_serializing_if = "Option::is_none")]
    objective: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dpo_beta: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    teacher: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    distill_top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    distill_temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    distill_weight: Option<f64>,
}

/// The names of the keys.
pub(crate) const OBJECTIVE_KEYS: [&str; 6] = [
    "objective",
    "dpo_beta",
    "teacher",
    "distill_top_k",
    "distill_temperature",
    "distill_weight",
];

impl TryFrom<RawObjective> for Objective {
    type Error = RecipeError;

    fn try_from(raw: RawObjective) -> Result<Self, RecipeError> {
        let word = raw.objective.as_deref().unwrap_or("sft");
        let of_dpo = [("dpo_beta", raw.dpo_beta.is_some())];
        let of_distill = [
            ("teacher", raw.teacher.is_some()),
            ("distill_top_k", raw.distill_top_k.is_some()),
            ("distill_temperature", raw.distill_temperature.is_some()),
            ("distill_weight", raw.distill_weight.is_some()),
        ];
        match word {
            "sft" => {
                refuse(&of_dpo, "dpo")?;
                refuse(&of_distill, "distill")?;
                Ok(Self::Sft)
            }
            "dpo" => {
                refuse(&of_distill, "distill")?;
                let beta = raw.dpo_beta.unwrap_or(DPO_BETA_DEFAULT);
                let beta = real("dpo_beta", beta, Above(0.0), 100.0)?;
                Ok(Self::Dpo { beta })
            }
            "distill" => {
                refuse(&of_dpo, "dpo")?;
                let top_k = raw.distill_top_k.unwrap_or(TOP_K_DEFAULT);
                let temperature = raw.distill_temperature.unwrap_or(1.0);
                let weight = raw.distill_weight.unwrap_or(1.0);
                Ok(Self::Distill(Distill {
                    teacher: raw.teacher.as_deref().map(teacher).transpose()?,
                    top_k: whole("distill_top_k", top_k, 1, TOP_K_MAX)?,
                    temperature: real("distill_temperature", temperature, AtLeast(0.1), 100.0)?,
                    weight: real("distill_weight", weight, Above(0.0), 1.0)?,
                }))
            }
            other => Err(invalid(
                "objective",
                other,
                "it is \"sft\", \"dpo\" or \"distill\"",
            )),
        }
    }
}

impl From<Objective> for RawObjective {
    fn from(objective: Objective) -> Self {
        let word = objective.as_str();
        match objective {
            Objective::Sft => Self::default(),
            Objective::Dpo { beta } => Self {
                objective: Some(word.to_owned()),
                dpo_beta: Some(beta),
                ..Self::default()
            },
            Objective::Distill(distill) => Self {
                objective: Some(word.to_owned()),
                teacher: distill.teacher.map(|teacher| teacher.to_string()),
                distill_top_k: Some(distill.top_k),
                distill_temperature: Some(distill.temperature),
                distill_weight: Some(distill.weight),
                ..Self::default()
            },
        }
    }
}

/// A key without the objective that reads it would change nothing without a word.
fn refuse(keys: &[(&'static str, bool)], objective: &str) -> Result<(), RecipeError> {
    match keys.iter().find(|(_, written)| *written) {
        Some((key, _)) => Err(RecipeError::ForeignKey {
            key,
            objective: objective.to_owned(),
        }),
        None => Ok(()),
    }
}

fn teacher(text: &str) -> Result<Teacher, RecipeError> {
    let Some((model, revision)) = text.rsplit_once('@') else {
        let reason = "write NAME@REVISION, a published checkpoint of this coordinator";
        return Err(invalid("teacher", text, reason));
    };
    Ok(Teacher {
        model: name("teacher", model.to_owned())?,
        revision: name("teacher", revision.to_owned())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    const PLAIN: &str = "rank = 8\nalpha = 16\ntarget_modules = [\"q_proj\"]\nlearning_rate = 1e-3\n\
        epochs = 1\nbatch_size = 8\nsequence_length = 256\n";

    fn read(lines: &str) -> Result<Recipe, RecipeError> {
        Recipe::parse_toml(&format!("{PLAIN}{lines}"))
    }

    #[test]
    fn a_plain_recipe_says_nothing_of_objectives() {
        let plain = read("").unwrap();
        assert_eq!(plain.objective, Objective::Sft);
        assert_eq!(read("objective = \"sft\"").unwrap(), plain);
        let json = serde_json::to_string(&plain).unwrap();
        for key in OBJECTIVE_KEYS {
            assert!(
                !plain.to_toml().contains(key) && !json.contains(key),
                "{key}"
            );
        }
    }

    #[test]
    fn the_others_are_read_with_their_keys_and_written_back() {
        let dpo = read("objective = \"dpo\"").unwrap();
        assert_eq!(dpo.objective, Objective::Dpo { beta: 0.1 });
        let stronger = read("objective = \"dpo\"\ndpo_beta = 0.5").unwrap();
        assert_eq!(stronger.objective.dpo_beta(), 0.5);
        let distill = read("objective = \"distill\"\nteacher = \"org/trail@3\"").unwrap();
        let Objective::Distill(found) = &distill.objective else {
            panic!("{distill:?}");
        };
        assert_eq!(found.teacher.as_ref().unwrap().to_string(), "org/trail@3");
        assert_eq!(
            (found.top_k, found.temperature, found.weight),
            (32, 1.0, 1.0)
        );
        let offline =
            read("objective = \"distill\"\ndistill_top_k = 4\ndistill_weight = 0.5").unwrap();
        assert!(offline.objective.teacher().is_none());
        for recipe in [dpo, stronger, distill, offline] {
            assert_eq!(Recipe::parse_toml(&recipe.to_toml()).unwrap(), recipe);
            let json = serde_json::to_string(&recipe).unwrap();
            assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe);
        }
    }

    #[test]
    fn values_out_of_bounds_and_keys_of_other_objectives_are_refused() {
        for (lines, named) in [
            ("objective = \"ppo\"", "\"sft\", \"dpo\" or \"distill\""),
            ("objective = \"dpo\"\ndpo_beta = 0", "dpo_beta"),
            ("objective = \"dpo\"\ndpo_beta = 101", "dpo_beta"),
            ("objective = \"dpo\"\ndpo_beta = nan", "dpo_beta"),
            ("dpo_beta = 0.1", "objective = \"dpo\""),
            (
                "objective = \"distill\"\ndpo_beta = 0.1",
                "objective = \"dpo\"",
            ),
            ("teacher = \"a@1\"", "objective = \"distill\""),
            (
                "objective = \"dpo\"\nteacher = \"a@1\"",
                "objective = \"distill\"",
            ),
            ("distill_top_k = 4", "objective = \"distill\""),
            ("objective = \"distill\"\nteacher = \"a\"", "NAME@REVISION"),
            ("objective = \"distill\"\nteacher = \"../a@1\"", "teacher"),
            ("objective = \"distill\"\nteacher = \"a@\"", "teacher"),
            (
                "objective = \"distill\"\ndistill_top_k = 0",
                "distill_top_k",
            ),
            (
                "objective = \"distill\"\ndistill_top_k = 5000",
                "distill_top_k",
            ),
            (
                "objective = \"distill\"\ndistill_temperature = 0",
                "distill_temperature",
            ),
            (
                "objective = \"distill\"\ndistill_weight = 0",
                "distill_weight",
            ),
            (
                "objective = \"distill\"\ndistill_weight = 1.1",
                "distill_weight",
            ),
        ] {
            let error = read(lines).unwrap_err().to_string();
            assert!(error.contains(named), "{lines}: {error}");
        }
    }
}
