//! The same adapters under other rules: what the sabotage would have done without the checks.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cairn_stack::adapter::AdapterFile;
use cairn_stack::aggregate::{Gram, geometric_median, multi_krum};
use cairn_stack::algebra::{clip_factor, median};

use crate::study::hand::Hand;

/// A rule without a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The mean of the deltas.
    Mean,
    /// The mean of the deltas, each clipped to the median norm.
    Clip,
    /// Multi-Krum, told how many saboteurs there are.
    Krum,
    /// The geometric median.
    Median,
}

impl Rule {
    /// All.
    pub const ALL: [Self; 4] = [Self::Mean, Self::Clip, Self::Krum, Self::Median];

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Clip => "clip",
            Self::Krum => "krum",
            Self::Median => "median",
        }
    }

    /// Weight of each adapter.
    fn weights(self, gram: &Gram, saboteurs: usize) -> Vec<f64> {
        let n = gram.len();
        let even = 1.0 / n as f64;
        match self {
            Self::Mean => vec![even; n],
            Self::Clip => {
                let norms: Vec<f64> = (0..n).map(|i| gram.norm(i)).collect();
                let tau = median(&norms).unwrap_or(0.0);
                norms
                    .iter()
                    .map(|norm| even * clip_factor(*norm, tau))
                    .collect()
            }
            Self::Krum => {
                let chosen = multi_krum(gram, saboteurs);
                let each = 1.0 / chosen.len().max(1) as f64;
                (0..n)
                    .map(|i| if chosen.contains(&i) { each } else { 0.0 })
                    .collect()
            }
            Self::Median => geometric_median(gram, &vec![even; n]),
        }
    }
}

/// Audit loss under a rule; nothing when the result is no model.
///
/// # Errors
/// When the worker is gone.
pub fn audit_loss(
    hand: &mut Hand,
    rule: Rule,
    base: &Path,
    adapters: &[PathBuf],
    saboteurs: usize,
    audit: &Path,
    sequence_length: u32,
) -> Result<Option<f64>> {
    let opened: std::result::Result<Vec<AdapterFile>, _> =
        adapters.iter().map(|dir| AdapterFile::open(dir)).collect();
    let Ok(opened) = opened else {
        return Ok(None);
    };
    let files: Vec<&AdapterFile> = opened.iter().collect();
    let weights = match (rule, Gram::of(&files)) {
        (Rule::Mean, _) => vec![1.0 / files.len() as f64; files.len()],
        (rule, Ok(gram)) if gram_is_finite(&gram) => rule.weights(&gram, saboteurs),
        _ => return Ok(None),
    };
    let terms: Vec<(PathBuf, f64)> = adapters
        .iter()
        .cloned()
        .zip(weights)
        .filter(|(_, weight)| *weight != 0.0)
        .collect();
    // NaN in, an error out: the worker's word for a broken model.
    Ok(hand
        .evaluate(base, &terms, audit, sequence_length)
        .ok()
        .map(|scored| scored.loss()))
}

fn gram_is_finite(gram: &Gram) -> bool {
    (0..gram.len()).all(|i| (0..=i).all(|j| gram.get(i, j).is_finite()))
}
