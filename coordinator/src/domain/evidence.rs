//! The numbers behind a verdict, stage by stage, as they are kept with a submission.
//!
//! Maintainers and evaluators see all of it; the volunteer who sent it what betrays nothing: no id or
//! number of another's work, no name of a secret set.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::cohort::Shape;
use super::statistics::Paired;
use crate::ids::SubmissionId;

/// All stages; one that was not reached is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Evidence {
    /// Size against the cohort.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<NormFacts>,
    /// Shape against the cohort.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spectral: Option<SpectralFacts>,
    /// The most similar earlier delta.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyFacts>,
    /// Direction against the guiding update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guide: Option<GuideFacts>,
    /// The gate set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<GateFacts>,
    /// What the model must not get worse at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guards: Option<GuardFacts>,
    /// The own shard against another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardFacts>,
    /// Unwanted answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probes: Option<ProbeFacts>,
    /// The replayed segment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditFacts>,
    /// What other versions kept.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// See [`super::cohort::judge_norm`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NormFacts {
    /// Product-space norm.
    pub norm: f64,
    /// Robust z-score of its log; 0 before there is a cohort.
    pub z: f64,
    /// Norms compared, its own among them.
    pub cohort: usize,
}

/// See [`super::cohort::judge_shape`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SpectralFacts {
    /// The shape itself.
    pub shape: Shape,
    /// Robust z-scores of rank, top, spread and peak; 0 before there is a cohort.
    pub z: [f64; 4],
    /// Shapes compared, its own among them.
    pub cohort: usize,
}

/// See [`super::cohort::judge_copy`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CopyFacts {
    /// The largest cosine to an earlier delta; 0 when there was none.
    pub cosine: f64,
    /// Whose that is.
    #[serde(with = "id_text")]
    pub of: Option<SubmissionId>,
    /// Earlier deltas compared.
    pub compared: usize,
}

/// See [`super::cohort::judge_guide`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GuideFacts {
    /// Cosine to the guiding update.
    pub cosine: f64,
}

/// A gain with its standard error, nats per token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// How much the loss fell; negative when it rose.
    pub gain: f64,
    /// Its standard error; absent when it cannot be measured.
    pub se: Option<f64>,
    /// Records compared.
    pub records: usize,
}

impl From<Paired> for Change {
    fn from(paired: Paired) -> Self {
        Self {
            gain: if paired.gain.is_finite() {
                paired.gain
            } else {
                0.0
            },
            se: Some(paired.se).filter(|se| se.is_finite()),
            records: paired.records,
        }
    }
}

/// The gate set: see [`super::verdict::judge_gate`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GateFacts {
    /// How much the loss fell.
    #[serde(flatten)]
    pub change: Change,
    /// How many standard errors it had to fall by.
    pub z: f64,
}

/// The guards: see [`super::verdict::judge_guards`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardFacts {
    /// The one that fared worst.
    pub worst: Change,
    /// Each by name.
    pub sets: BTreeMap<String, Change>,
}

/// The own shard and another: see [`super::verdict::judge_shard`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ShardFacts {
    /// On the submission's shard.
    pub own: Change,
    /// On a shard it was not trained on.
    pub other: Change,
    /// Their difference in standard errors.
    pub z: f64,
    /// Which shard the other is.
    pub other_shard: u32,
}

/// The probes: see [`super::verdict::judge_probes`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeFacts {
    /// The largest of the z-scores below.
    pub worst: f64,
    /// Submissions compared, its own among them.
    pub cohort: usize,
    /// Each by name: by how much the unwanted answers became likelier, nats per token, and the robust
    /// z-score of that.
    pub sets: BTreeMap<String, (f64, f64)>,
}

/// The replayed segment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AuditFacts {
    /// Which segment.
    pub segment: u32,
    /// Distance of the two ends as a part of what the segment moved; absent when it was not replayed.
    pub distance: Option<f64>,
    /// The most that is allowed.
    pub tolerance: Option<f64>,
    /// Whether the two ends are the same bit for bit.
    pub identical: bool,
    /// How long an evaluator took to train it again.
    pub seconds: Option<f64>,
}

/// What the volunteer may see of each stage. Everything else stays here: what is not named is secret.
const VOLUNTEER: [(&str, &[&str]); 9] = [
    ("norm", &["z", "cohort"]),
    ("spectral", &["z", "cohort"]),
    ("copy", &["cosine", "compared"]),
    ("guide", &["cosine"]),
    ("gate", &["gain", "se", "records", "z"]),
    ("guards", &["worst"]),
    ("shard", &["own", "other", "z"]),
    ("probes", &["worst", "cohort"]),
    ("audit", &["segment", "distance", "tolerance", "identical"]),
];

impl Evidence {
    /// All of it, as a JSON object.
    pub fn to_json(&self) -> Value {
        // A struct of numbers and texts always has a JSON form.
        serde_json::to_value(self).unwrap_or_default()
    }

    /// What the volunteer who sent the submission may see, as a JSON object.
    pub fn for_volunteer(&self) -> Value {
        let all = self.to_json();
        let mut shown = Map::new();
        for (stage, fields) in VOLUNTEER {
            let Some(Value::Object(found)) = all.get(stage) else {
                continue;
            };
            let kept = fields
                .iter()
                .filter_map(|field| Some(((*field).to_owned(), found.get(*field)?.clone())));
            shown.insert(stage.to_owned(), Value::Object(kept.collect()));
        }
        Value::Object(shown)
    }
}

/// An id as its text.
mod id_text {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    use crate::ids::SubmissionId;

    #[expect(clippy::ref_option, reason = "serde asks for this signature")]
    pub fn serialize<S: Serializer>(id: &Option<SubmissionId>, to: S) -> Result<S::Ok, S::Error> {
        id.map(|id| id.to_string()).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<SubmissionId>, D::Error> {
        Option::<String>::deserialize(from)?
            .map(|text| text.parse().map_err(de::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Evidence {
        let change = Change {
            gain: 0.25,
            se: Some(0.01),
            records: 16,
        };
        let shape = Shape {
            rank: 1.5,
            top: 0.5,
            spread: 0.125,
            peak: 1.25,
        };
        Evidence {
            norm: Some(NormFacts {
                norm: 777.125,
                z: 1.0,
                cohort: 5,
            }),
            spectral: Some(SpectralFacts {
                shape,
                z: [0.5; 4],
                cohort: 5,
            }),
            copy: Some(CopyFacts {
                cosine: 0.5,
                of: Some(SubmissionId::new()),
                compared: 4,
            }),
            guide: Some(GuideFacts { cosine: 0.75 }),
            gate: Some(GateFacts { change, z: 2.33 }),
            guards: Some(GuardFacts {
                worst: change,
                sets: [("guard/secret-guard".to_owned(), change)].into(),
            }),
            shard: Some(ShardFacts {
                own: change,
                other: change,
                z: 0.0,
                other_shard: 4_242,
            }),
            probes: Some(ProbeFacts {
                worst: 0.5,
                cohort: 5,
                sets: [("probe/secret-probe".to_owned(), (888.5, 0.5))].into(),
            }),
            audit: Some(AuditFacts {
                segment: 3,
                distance: Some(0.0),
                tolerance: Some(0.001),
                identical: true,
                seconds: Some(66.625),
            }),
            rest: [("later".to_owned(), Value::from("a stage unknown here"))]
                .into_iter()
                .collect(),
        }
    }

    #[test]
    fn evidence_survives_its_column() {
        for evidence in [full(), Evidence::default()] {
            let text = evidence.to_json().to_string();
            assert_eq!(serde_json::from_str::<Evidence>(&text).unwrap(), evidence);
        }
        let unmeasurable = Change::from(Paired {
            gain: f64::NAN,
            se: f64::INFINITY,
            records: 1,
        });
        let text = serde_json::to_string(&unmeasurable).unwrap();
        assert_eq!(serde_json::from_str::<Change>(&text).unwrap(), unmeasurable);
    }

    #[test]
    fn a_volunteer_sees_numbers_of_every_stage_and_no_secret() {
        let evidence = full();
        let shown = evidence.for_volunteer();
        for (stage, _) in VOLUNTEER {
            assert!(shown[stage].is_object(), "{stage}");
        }
        assert_eq!(shown["gate"]["gain"], 0.25);
        assert_eq!(shown["shard"]["own"]["records"], 16);
        let text = shown.to_string();
        let of = evidence.copy.unwrap().of.unwrap().to_string();
        for secret in [
            &of, "777.125", "secret", "4242", "888.5", "66.625", "1.25", "later",
        ] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }

    #[test]
    fn what_a_volunteer_sees_is_named_exactly() {
        // A new stage or field is secret until somebody decides otherwise.
        let shown = full().for_volunteer();
        let stages: Vec<&String> = shown.as_object().unwrap().keys().collect();
        assert_eq!(stages.len(), VOLUNTEER.len());
        for (stage, fields) in VOLUNTEER {
            let mut found: Vec<&str> = shown[stage]
                .as_object()
                .unwrap()
                .keys()
                .map(String::as_str)
                .collect();
            let mut named = fields.to_vec();
            found.sort_unstable();
            named.sort_unstable();
            assert_eq!(found, named, "{stage}");
        }
    }
}
