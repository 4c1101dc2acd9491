//! What a submission's delta says beside those of its round, before anything is evaluated: its norm,
//! its shape, whose copy it is, and where it points.
//!
//! Everything is measured in product space, so no choice of factors changes it. A rule gives the
//! numbers it looked at and a [`Ruling`].

use cairn_proto::reason::VerdictReason;
use cairn_stack::algebra::{MAD_TO_SIGMA, cosine_of, mad, median};
use cairn_stack::recipe::Policy;
use cairn_stack::spectral::Spectrum;
use serde::{Deserialize, Serialize};

use super::evidence::{CopyFacts, GuideFacts, NormFacts, SpectralFacts};
use crate::ids::SubmissionId;

/// What a rule decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ruling {
    /// Nothing against it.
    Pass,
    /// Nothing can be said before more has come in.
    Wait,
    /// It does not count; the sentence is for the volunteer.
    Reject(VerdictReason, String),
}

/// How many submissions the prior spread is worth. Four values alone tell so little of their spread
/// that one in seventy honest ones would lie six "deviations" out; with the prior it is none in ten
/// thousand, and from some thirty on the cohort speaks for itself.
const PRIOR_WEIGHT: f64 = 4.0;
/// Least spread that is believed, as a part of the prior: in a cohort of near-equal values harmless
/// differences would otherwise be many deviations.
const SPREAD_SHARE_MIN: f64 = 0.4;
/// Scores beyond this say no more; a bound, so that every score is a number.
const Z_MAX: f64 = 1e6;

/// Spread of log norms of honest submissions: 25 %.
const LOG_NORM_PRIOR: f64 = 0.25;
/// Spread of the log of the effective rank: 15 %.
const LOG_RANK_PRIOR: f64 = 0.15;
/// Spread of the share of the largest singular value.
const TOP_PRIOR: f64 = 0.08;
/// Spread of the unevenness of modules, in log norms.
const SPREAD_PRIOR: f64 = 0.2;
/// Spread of the log of the largest module's part.
const LOG_PEAK_PRIOR: f64 = 0.25;

/// How many robust standard deviations `value` lies from the median of `cohort`, its own value among
/// them: `(x - median) / s` with `s^2 = (n (1.4826 MAD)^2 + 4 prior^2) / (n + 4)`, at least
/// `0.4 prior`. Nothing for an empty cohort; values that are no numbers are left out of it.
pub fn robust_z(value: f64, cohort: &[f64], prior: f64) -> Option<f64> {
    let usable: Vec<f64> = cohort.iter().copied().filter(|x| x.is_finite()).collect();
    let middle = median(&usable)?;
    let spread = MAD_TO_SIGMA * mad(&usable)?;
    let count = usable.len() as f64;
    let squared = (count * spread.powi(2) + PRIOR_WEIGHT * prior.powi(2)) / (count + PRIOR_WEIGHT);
    let z = (value - middle) / squared.sqrt().max(SPREAD_SHARE_MIN * prior);
    Some(if z.is_nan() {
        Z_MAX
    } else {
        z.clamp(-Z_MAX, Z_MAX)
    })
}

/// Judges a norm against `cohort`: the norms of all structurally sound submissions of the round that
/// have not been rejected, its own among them. On logs, because norms differ by factors: ten times
/// too large and ten times too small are equally odd. `complete` says that no more will come, so that
/// there is nothing to wait for.
pub fn judge_norm(
    norm: f64,
    cohort: &[f64],
    complete: bool,
    policy: &Policy,
) -> (NormFacts, Ruling) {
    let logs: Vec<f64> = cohort.iter().map(|norm| norm.ln()).collect();
    let z = if cohort.len() < policy.min_cohort as usize {
        0.0
    } else {
        robust_z(norm.ln(), &logs, LOG_NORM_PRIOR).unwrap_or(0.0)
    };
    let facts = NormFacts {
        norm,
        z,
        cohort: cohort.len(),
    };
    let ruling = if z.abs() > policy.norm_mad_reject {
        let size = if z > 0.0 { "larger" } else { "smaller" };
        let text = format!(
            "the adapter's change is far {size} than the others' of this round; train with exactly \
             the recipe of the work, and do not scale what comes out"
        );
        Ruling::Reject(VerdictReason::NormOutlier, text)
    } else if z.abs() > policy.norm_mad_hold && !complete {
        Ruling::Wait
    } else {
        Ruling::Pass
    };
    (facts, ruling)
}

/// What the singular values of a delta's modules say, whatever its size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Mean effective rank of the modules, each weighted by its squared norm.
    pub rank: f64,
    /// Mean part of the largest singular value in a module's squared norm, weighted alike.
    pub top: f64,
    /// Standard deviation of the modules' log norms.
    pub spread: f64,
    /// Squared norm of the largest module over the mean of all.
    pub peak: f64,
}

/// Modules of a smaller part of the largest norm count as that: a module that training left alone is
/// no infinity.
const MODULE_NORM_MIN: f64 = 1e-3;

impl Shape {
    /// From each module's singular values; nothing for a zero delta.
    pub fn of(modules: &[Spectrum]) -> Option<Self> {
        let squares: Vec<f64> = modules.iter().map(|module| module.norm.powi(2)).collect();
        let total: f64 = squares.iter().sum();
        let largest = squares.iter().copied().fold(0.0, f64::max);
        if !(total > 0.0 && total.is_finite()) {
            return None;
        }
        let weighted = |value: &dyn Fn(&Spectrum) -> f64| -> f64 {
            let parts = modules.iter().zip(&squares);
            parts
                .map(|(module, square)| square / total * value(module))
                .sum()
        };
        let top = |module: &Spectrum| match module.singular.first() {
            Some(first) if module.norm > 0.0 => (first / module.norm).powi(2),
            _ => 0.0,
        };
        let least = largest.sqrt() * MODULE_NORM_MIN;
        let logs: Vec<f64> = modules
            .iter()
            .map(|module| module.norm.max(least).ln())
            .collect();
        let count = logs.len() as f64;
        let mean = logs.iter().sum::<f64>() / count;
        let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / count;
        Some(Self {
            rank: weighted(&|module| module.effective_rank),
            top: weighted(&top),
            spread: variance.sqrt(),
            peak: largest * count / total,
        })
    }

    /// What is compared: the name, the value on a scale where honest ones differ alike, and by how
    /// much they are believed to differ.
    fn features(&self) -> [(&'static str, f64, f64); 4] {
        [
            ("rank", self.rank.ln(), LOG_RANK_PRIOR),
            ("top", self.top, TOP_PRIOR),
            ("spread", self.spread, SPREAD_PRIOR),
            ("peak", self.peak.ln(), LOG_PEAK_PRIOR),
        ]
    }
}

/// Judges a shape against the cohort's, its own among them.
pub fn judge_shape(shape: Shape, cohort: &[Shape], policy: &Policy) -> (SpectralFacts, Ruling) {
    let mut facts = SpectralFacts {
        shape,
        z: [0.0; 4],
        cohort: cohort.len(),
    };
    if cohort.len() < policy.min_cohort as usize {
        return (facts, Ruling::Pass);
    }
    let mut worst = ("", 0.0_f64);
    for (place, (name, value, prior)) in shape.features().into_iter().enumerate() {
        let others: Vec<f64> = cohort
            .iter()
            .map(|other| other.features()[place].1)
            .collect();
        let z = robust_z(value, &others, prior).unwrap_or(0.0);
        facts.z[place] = z;
        if z.abs() > worst.1.abs() {
            worst = (name, z);
        }
    }
    if worst.1.abs() <= policy.spectral_z {
        return (facts, Ruling::Pass);
    }
    let what = match worst.0 {
        "rank" | "top" => "spreads over far fewer or far more directions",
        _ => "is spread over the layers quite differently",
    };
    let text = format!(
        "the adapter's change {what} than the others' of this round; train all target modules with \
         exactly the recipe of the work"
    );
    (facts, Ruling::Reject(VerdictReason::SpectralOutlier, text))
}

/// An earlier delta that a submission is compared with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Earlier {
    /// Whose.
    pub submission: SubmissionId,
    /// Its norm.
    pub norm: f64,
    /// Inner product with the submission.
    pub inner: f64,
}

/// Judges whether a delta of this norm is one of `earlier`: those received before it in the round, on
/// other shards (two honest trainings of one shard are the same training), rejected or not, and
/// contributions of earlier rounds.
pub fn judge_copy(norm: f64, earlier: &[Earlier], policy: &Policy) -> (CopyFacts, Ruling) {
    let mut facts = CopyFacts {
        cosine: 0.0,
        of: None,
        compared: earlier.len(),
    };
    for other in earlier {
        let cosine = cosine_of(other.inner, norm, other.norm);
        if facts.of.is_none() || cosine > facts.cosine {
            (facts.cosine, facts.of) = (cosine, Some(other.submission));
        }
    }
    let ruling = if facts.of.is_some() && facts.cosine >= policy.copy_cosine {
        let text = format!(
            "the adapter's change has a cosine of {:.4} to one that was handed in before; training \
             on other records gives another change. Train on the records of your own work",
            facts.cosine
        );
        Ruling::Reject(VerdictReason::CopyOfAnother, text)
    } else {
        Ruling::Pass
    };
    (facts, ruling)
}

/// Judges the cosine of a submission to what an evaluator's first steps on the same shard gave.
pub fn judge_guide(cosine: f64, policy: &Policy) -> (GuideFacts, Ruling) {
    let facts = GuideFacts { cosine };
    let ruling = if cosine >= policy.guide_cosine {
        Ruling::Pass
    } else {
        let text = format!(
            "an evaluator's own training on your shard points elsewhere: the cosine is {cosine:.3}, \
             and {:.3} is the least; train on the records of the work, with exactly its recipe",
            policy.guide_cosine
        );
        Ruling::Reject(VerdictReason::AgainstGuide, text)
    };
    (facts, ruling)
}

/// Another shard than `own` out of `shards`, by a hash of the submission under a key that nobody
/// else has: who trained it cannot know on which foreign records it will be tested. Nothing when
/// there is no other.
pub fn foreign_shard(
    key: &[u8; 32],
    submission: SubmissionId,
    own: u32,
    shards: u32,
) -> Option<u32> {
    let others = shards.checked_sub(1).filter(|others| *others > 0)?;
    let hash = blake3::keyed_hash(key, submission.to_string().as_bytes());
    let (head, _) = hash.as_bytes().split_first_chunk::<8>()?;
    let drawn = (u64::from_le_bytes(*head) % u64::from(others)) as u32;
    Some(if drawn >= own { drawn + 1 } else { drawn })
}

#[cfg(test)]
#[path = "cohort_tests.rs"]
mod tests;
