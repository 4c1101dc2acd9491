//! Paired comparisons of stored losses, kept while their round is judged.
//!
//! Losses are named by content and never change, so neither does a comparison of two. What is kept
//! only saves reading: a coordinator that starts anew reads what it needs again.
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::app::App;
use crate::domain::stacker::Comparison;
use crate::domain::statistics::{Paired, compare};
use crate::error::Error;
use crate::ids::RoundId;
use crate::ops::submit_scores::scores_of;

/// Comparisons kept for one round; a choice among the adapters of the largest round takes fewer.
const PER_ROUND_MAX: usize = 20_000;

type OfRound = BTreeMap<Comparison, Option<Paired>>;

/// What is known, by round.
#[derive(Debug, Default)]
pub struct Comparisons(Mutex<BTreeMap<RoundId, OfRound>>);

impl Comparisons {
    /// What is known for a round.
    pub fn of(&self, round: RoundId) -> OfRound {
        self.lock().get(&round).cloned().unwrap_or_default()
    }

    /// Forgets all rounds but these.
    pub fn keep(&self, rounds: &[RoundId]) {
        self.lock().retain(|round, _| rounds.contains(round));
    }

    fn note(&self, round: RoundId, asked: Comparison, found: Option<Paired>) {
        let mut known = self.lock();
        let of_round = known.entry(round).or_default();
        if of_round.len() >= PER_ROUND_MAX {
            of_round.clear();
        }
        of_round.insert(asked, found);
    }

    /// A map cannot be left half changed, so a panic elsewhere spoils nothing.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<RoundId, OfRound>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads and compares two stored sets of losses, and keeps what it found. Nothing when they are not
/// of the same records.
///
/// # Errors
/// When the losses cannot be had or read.
pub async fn compare_stored(
    app: &App,
    round: RoundId,
    asked: Comparison,
) -> Result<Option<Paired>, Error> {
    let reference = scores_of(app, asked.0).await?;
    let candidate = scores_of(app, asked.1).await?;
    let found = compare(&reference, &candidate).ok();
    app.compared.note(round, asked, found);
    Ok(found)
}
