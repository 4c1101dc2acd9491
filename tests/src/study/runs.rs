//! Every arm on every split with every seed, several at a time.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Result, anyhow};

use super::arms::{Arm, Outcome, Run, Setup, run};
use super::hand::Hand;
use super::material::Material;
use super::shards::Split;

/// What is to be run.
pub struct Plan<'a> {
    /// Data.
    pub material: &'a Material,
    /// Settings.
    pub setup: &'a Setup,
    /// Arms; base is run always.
    pub arms: &'a [Arm],
    /// Splits.
    pub splits: &'a [Split],
    /// Seeds.
    pub seeds: RangeInclusive<u64>,
    /// The built worker.
    pub worker: &'a Path,
    /// How many at a time, each on one thread.
    pub jobs: usize,
    /// Adapters and checkpoints go here.
    pub work: &'a Path,
}

/// Which run: arms that do not deal records count as iid.
pub type Key = (Arm, Split, u64);

/// Runs all of it. What comes out does not depend on how many run at a time.
///
/// # Errors
/// The first failure; the rest is not begun.
pub fn all(plan: &Plan<'_>) -> Result<BTreeMap<Key, Outcome>> {
    let queue = Mutex::new(keys(plan));
    let total = locked(&queue).len();
    let done: Mutex<BTreeMap<Key, Outcome>> = Mutex::new(BTreeMap::new());
    let lane = || -> Result<()> {
        let mut hand = Hand::start(plan.worker)?;
        loop {
            let Some(key) = locked(&queue).pop_front() else {
                return Ok(());
            };
            let outcome = one(&mut hand, plan, key).inspect_err(|_| locked(&queue).clear())?;
            let mut done = locked(&done);
            done.insert(key, outcome);
            eprintln!("{}", progress(done.len(), total, key, &done[&key]));
        }
    };
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let lanes: Vec<_> = (0..plan.jobs.max(1)).map(|_| scope.spawn(lane)).collect();
        lanes
            .into_iter()
            .map(|lane| {
                lane.join()
                    .unwrap_or_else(|_| Err(anyhow!("a run panicked")))
            })
            .collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn one(hand: &mut Hand, plan: &Plan<'_>, (arm, split, seed): Key) -> Result<Outcome> {
    let name = format!("{}-{}-{seed}", arm.name(), split.name());
    let this = Run {
        material: plan.material,
        setup: plan.setup,
        split,
        seed,
        dir: plan.work.join(name),
    };
    run(hand, arm, &this)
}

/// The longest first, so that the lanes end together.
fn keys(plan: &Plan<'_>) -> VecDeque<Key> {
    let mut keys = Vec::new();
    for seed in plan.seeds.clone() {
        for arm in plan.arms.iter().copied().filter(|arm| *arm != Arm::Base) {
            let splits = if arm.deals() {
                plan.splits
            } else {
                &[Split::Iid][..]
            };
            keys.extend(splits.iter().map(|split| (arm, *split, seed)));
        }
    }
    keys.sort_by_key(|(arm, ..)| *arm != Arm::Stack);
    keys.push((Arm::Base, Split::Iid, *plan.seeds.start()));
    keys.into()
}

fn progress(done: usize, total: usize, (arm, split, seed): Key, outcome: &Outcome) -> String {
    let losses: Vec<String> = outcome
        .audit
        .iter()
        .map(|scores| format!("{:.4}", scores.loss().unwrap_or(f64::NAN)))
        .collect();
    let notes: Vec<String> = std::iter::once(String::new())
        .chain(outcome.notes.iter().cloned())
        .collect();
    let notes = notes.join("; ");
    format!(
        "[{done}/{total}] {} {} seed {seed}: audit loss {}; {} steps, {} tokens, {:.0} s of training, {:.0} s of judging{notes}",
        arm.name(),
        split.name(),
        losses.join(" "),
        outcome.steps,
        outcome.tokens,
        outcome.cpu_seconds,
        outcome.judge_seconds,
    )
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
