//! The ways of making one model of the same tokens.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cairn_coordinator::domain::statistics::Scores;
use cairn_stack::adapter::{AdapterFile, WEIGHTS_FILE};
use cairn_stack::aggregate::{mean_factors, mean_trained};
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::fold::{Term, fold};
use cairn_stack::recipe::{Aggregation, Length, Recipe};
use cairn_stack::spectral::stack_spectrum;

use super::hand::{Hand, TrainJob};
use super::material::{Material, write_lines};
use super::shards::{Split, deal, rounds, shares};
use super::stacking::{Round, decide};

/// One way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Arm {
    /// The base model, untrained.
    Base,
    /// One LoRA of a volunteer's rank, trained in one place on everything.
    Central,
    /// One LoRA of the rank that all adapters of all rounds have together.
    CentralWide,
    /// FedIT (arXiv 2305.05644): factors are averaged, and trained on in the next round.
    Fedit,
    /// FFA-LoRA (arXiv 2403.12313): as FedIT, but A stays as it started and only B is trained.
    Ffa,
    /// Cairn's default: fresh adapters each round; clip, gate, stack, line search, fold.
    Stack,
    /// FedEx-LoRA (arXiv 2410.09432): as FedIT, and what averaging factors loses is folded.
    Fedex,
}

impl Arm {
    /// All, in the order of the table.
    pub const ALL: [Self; 7] = [
        Self::Base,
        Self::Central,
        Self::CentralWide,
        Self::Fedit,
        Self::Ffa,
        Self::Stack,
        Self::Fedex,
    ];

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Central => "central",
            Self::CentralWide => "central-wide",
            Self::Fedit => "fedit",
            Self::Ffa => "ffa",
            Self::Stack => "stack",
            Self::Fedex => "fedex",
        }
    }

    /// Whether it makes a difference how the records are dealt.
    #[must_use]
    pub const fn deals(self) -> bool {
        !matches!(self, Self::Base | Self::Central | Self::CentralWide)
    }
}

/// What all arms share.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Rounds.
    pub rounds: usize,
    /// Volunteers, each with one shard a round.
    pub volunteers: usize,
    /// Records a round, over all volunteers.
    pub records: usize,
    /// Rank, targets, batch and the rest; seed, length and learning rate are set for each training.
    pub recipe: Recipe,
    /// Peak learning rate of each arm, in the order of [`Arm::ALL`].
    pub rates: [f64; 7],
    /// What is left of the peak learning rate in the last round; in between on a straight line.
    pub late: f64,
}

impl Setup {
    fn recipe(&self, arm: Arm, rank: u32, seed: u64, learning_rate: f64) -> Recipe {
        let scale = self.recipe.alpha / f64::from(self.recipe.rank);
        let rank_root = (f64::from(rank) / f64::from(self.recipe.rank)).sqrt();
        Recipe {
            rank,
            // A wide adapter keeps the size of its first steps (rsLoRA, arXiv 2312.03732).
            alpha: scale * f64::from(self.recipe.rank) * rank_root,
            learning_rate: learning_rate * self.rates[arm as usize],
            length: Length::Epochs(1),
            seed,
            ..self.recipe.clone()
        }
    }

    /// The part of the peak learning rate that a round uses.
    fn round_rate(&self, round: usize) -> f64 {
        let way = round as f64 / (self.rounds.max(2) - 1) as f64;
        1.0 + way * (self.late - 1.0)
    }
}

/// What one arm came to with one seed.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Audit scores after each round; one entry for arms without rounds.
    pub audit: Vec<Scores>,
    /// Loss on text of the base's own kind, after each round.
    pub old: Vec<f64>,
    /// Mean effective rank over modules of all that was added so far, after each round.
    pub effective_rank: Vec<f64>,
    /// Bytes up and down for one volunteer, all rounds, averaged over volunteers.
    pub bytes: f64,
    /// Processor time of training, seconds, all volunteers.
    pub cpu_seconds: f64,
    /// Processor time of the evaluations that decide, seconds.
    pub judge_seconds: f64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Optimiser steps, all volunteers.
    pub steps: u64,
    /// What each round decided, in words.
    pub notes: Vec<String>,
}

/// One arm with one seed.
pub struct Run<'a> {
    /// Data.
    pub material: &'a Material,
    /// Settings.
    pub setup: &'a Setup,
    /// How records are dealt.
    pub split: Split,
    /// Of data order and factors.
    pub seed: u64,
    /// A folder of its own.
    pub dir: PathBuf,
}

/// Runs it.
///
/// # Errors
/// When a training or an evaluation fails.
pub fn run(hand: &mut Hand, arm: Arm, run: &Run<'_>) -> Result<Outcome> {
    fs::create_dir_all(&run.dir)?;
    match arm {
        Arm::Base => run.base(hand),
        Arm::Central => run.central(hand, arm, run.setup.recipe.rank),
        Arm::CentralWide => {
            let all = run.setup.rounds * run.setup.volunteers;
            run.central(hand, arm, run.setup.recipe.rank * all as u32)
        }
        Arm::Fedit | Arm::Ffa => run.averaged(hand, arm),
        Arm::Stack | Arm::Fedex => run.stacked(hand, arm),
    }
}

/// A shard of a round.
struct Shard {
    path: PathBuf,
    bytes: u64,
}

/// One training.
struct Training<'a> {
    model: &'a Path,
    shard: &'a Shard,
    recipe: &'a Recipe,
    initial: Option<&'a Path>,
    carry: Option<&'a Path>,
    frozen_a: bool,
    out: &'a Path,
}

impl Training<'_> {
    fn run(&self, hand: &mut Hand, outcome: &mut Outcome) -> Result<()> {
        let trained = hand.train(&TrainJob {
            model: self.model,
            data: &self.shard.path,
            recipe: self.recipe,
            initial: self.initial,
            carry: self.carry,
            frozen_a: self.frozen_a,
            states: None,
            out: self.out,
        })?;
        outcome.cpu_seconds += trained.cpu_seconds;
        outcome.tokens += trained.tokens;
        outcome.steps += trained.steps;
        Ok(())
    }
}

impl Run<'_> {
    fn base(&self, hand: &mut Hand) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        self.measure(hand, &self.material.base, &[], &mut outcome)?;
        Ok(outcome)
    }

    fn central(&self, hand: &mut Hand, arm: Arm, rank: u32) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let all = self.rounds().concat();
        let shard = self.write(&self.dir.join("all.jsonl"), &all)?;
        let recipe = self.setup.recipe(arm, rank, self.seed, 1.0);
        let out = self.dir.join("adapter");
        let base = &self.material.base;
        let training = Training {
            model: base,
            shard: &shard,
            recipe: &recipe,
            initial: None,
            carry: None,
            frozen_a: false,
            out: &out,
        };
        training.run(hand, &mut outcome)?;
        outcome.bytes = (model_bytes(base)? + shard.bytes + adapter_bytes(&out)?) as f64;
        let adapter = AdapterFile::open(&out)?;
        outcome
            .effective_rank
            .push(effective_rank(&[(&adapter, 1.0)])?);
        self.measure(hand, base, &[(out, 1.0)], &mut outcome)?;
        Ok(outcome)
    }

    /// FedIT, FFA: everybody goes on from the mean of the factors. The recipe's seed is everybody's,
    /// so all begin with the same A.
    fn averaged(&self, hand: &mut Hand, arm: Arm) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let shares = self.shares();
        let base = &self.material.base;
        let mut mean: Option<PathBuf> = None;
        for (number, round) in self.rounds().iter().enumerate() {
            let dir = self.dir.join(format!("round-{number}"));
            fs::create_dir_all(&dir)?;
            let shards = self.deal(&dir, round, &shares)?;
            let total: u64 = shards.iter().map(|shard| shard.bytes).sum();
            let recipe = self.recipe(arm, number);
            let mut trained = Vec::new();
            for (volunteer, shard) in shards.iter().enumerate() {
                let out = dir.join(format!("adapter-{volunteer}"));
                let training = Training {
                    model: base,
                    shard,
                    recipe: &recipe,
                    initial: mean.as_deref(),
                    carry: None,
                    frozen_a: arm == Arm::Ffa,
                    out: &out,
                };
                training.run(hand, &mut outcome)?;
                let share = shard.bytes as f64 / total as f64;
                trained.push((AdapterFile::open(&out)?, share));
            }
            let next = dir.join("mean");
            mean_factors(&borrowed(&trained), &next, None, None)?;
            // Down: the base once, then the mean; each time the shard. Up: the adapter.
            let down = if number == 0 {
                model_bytes(base)?
            } else {
                adapter_bytes(&next)?
            };
            outcome.bytes += (down + adapter_bytes(&next)?) as f64;
            outcome.bytes += total as f64 / shards.len() as f64;
            let sum = [(&AdapterFile::open(&next)?, 1.0)];
            outcome.effective_rank.push(effective_rank(&sum)?);
            self.measure(hand, base, &[(next.clone(), 1.0)], &mut outcome)?;
            mean = Some(next);
        }
        Ok(outcome)
    }

    /// Cairn's rounds, by the rule `stack` or `fedex`. Under `fedex` training goes on from the mean
    /// factors, and what is handed in is what it changed of the round's base.
    fn stacked(&self, hand: &mut Hand, arm: Arm) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let shares = self.shares();
        let mut base = self.material.base.clone();
        let mut carry: Option<PathBuf> = None;
        let mut stack: Vec<(AdapterFile, f64)> = Vec::new();
        for (number, round) in self.rounds().iter().enumerate() {
            let dir = self.dir.join(format!("round-{number}"));
            fs::create_dir_all(&dir)?;
            let shards = self.deal(&dir, round, &shares)?;
            let recipe = self.recipe(arm, number);
            let mut adapters = Vec::new();
            for (volunteer, shard) in shards.iter().enumerate() {
                let out = dir.join(format!("adapter-{volunteer}"));
                let training = Training {
                    model: &base,
                    shard,
                    recipe: &recipe,
                    initial: None,
                    carry: carry.as_deref(),
                    frozen_a: false,
                    out: &out,
                };
                training.run(hand, &mut outcome)?;
                adapters.push(out);
            }
            let bytes: Vec<u64> = shards.iter().map(|shard| shard.bytes).collect();
            // Down: the round's base, the carried factors and the shard. Up: the adapter.
            let down = model_bytes(&base)? + carry.as_deref().map_or(Ok(0), adapter_bytes)?;
            outcome.bytes += (down + adapter_bytes(&adapters[0])?) as f64;
            outcome.bytes += bytes.iter().sum::<u64>() as f64 / shards.len() as f64;
            let decision = decide(
                hand,
                &Round {
                    rule: match arm {
                        Arm::Fedex => Aggregation::FedEx,
                        _ => Aggregation::Stack,
                    },
                    base: &base,
                    adapters: &adapters,
                    bytes: &bytes,
                    gate: &self.material.gate,
                    sequence_length: self.material.sequence_length,
                },
            )?;
            outcome.judge_seconds += decision.cpu_seconds;
            outcome.notes.push(format!(
                "{} of {} accepted, {} stacked, lambda {}, {} evaluations",
                decision.accepted,
                adapters.len(),
                decision.terms.len(),
                decision.lambda,
                decision.evaluations,
            ));
            let mut chosen = Vec::new();
            for (place, weight) in &decision.terms {
                chosen.push((AdapterFile::open(&adapters[*place])?, *weight));
            }
            if !chosen.is_empty() {
                if arm == Arm::Fedex {
                    let mean = dir.join("mean");
                    mean_trained(&borrowed(&chosen), &recipe, &mean)?;
                    carry = Some(mean);
                }
                stack.extend(chosen);
                let folded = dir.join("checkpoint");
                fold_terms(&self.material.base, &stack, &folded)?;
                base = folded;
            }
            let rank = if stack.is_empty() {
                0.0
            } else {
                effective_rank(&borrowed(&stack))?
            };
            outcome.effective_rank.push(rank);
            self.measure(hand, &base, &[], &mut outcome)?;
        }
        Ok(outcome)
    }

    fn rounds(&self) -> Vec<Vec<usize>> {
        let setup = self.setup;
        rounds(
            self.material.pool.len(),
            setup.rounds,
            setup.records,
            self.seed,
        )
    }

    fn shares(&self) -> Vec<Vec<f64>> {
        shares(
            self.split,
            self.material.topics,
            self.setup.volunteers,
            self.seed,
        )
    }

    fn recipe(&self, arm: Arm, round: usize) -> Recipe {
        // Every round its own seed, as every round of a coordinator has.
        let seed = self.seed * 1_000 + round as u64;
        let rank = self.setup.recipe.rank;
        self.setup
            .recipe(arm, rank, seed, self.setup.round_rate(round))
    }

    fn deal(&self, dir: &Path, round: &[usize], shares: &[Vec<f64>]) -> Result<Vec<Shard>> {
        let least = 2 * self.setup.recipe.batch_size as usize;
        let dealt = deal(self.material, round, shares, least);
        let write = |(number, shard): (usize, &Vec<usize>)| {
            self.write(&dir.join(format!("shard-{number}.jsonl")), shard)
        };
        dealt.iter().enumerate().map(write).collect()
    }

    fn write(&self, path: &Path, places: &[usize]) -> Result<Shard> {
        let pool = &self.material.pool;
        write_lines(path, places.iter().map(|place| pool[*place].line.as_str()))?;
        Ok(Shard {
            path: path.to_owned(),
            bytes: fs::metadata(path)?.len(),
        })
    }

    fn measure(
        &self,
        hand: &mut Hand,
        model: &Path,
        adapters: &[(PathBuf, f64)],
        outcome: &mut Outcome,
    ) -> Result<()> {
        let length = self.material.sequence_length;
        let audit = hand.evaluate(model, adapters, &self.material.audit, length)?;
        outcome.audit.push(audit.scores);
        let old = hand.evaluate(model, adapters, &self.material.old, length)?;
        outcome.old.push(old.loss());
        Ok(())
    }
}

fn borrowed(terms: &[(AdapterFile, f64)]) -> Vec<(&AdapterFile, f64)> {
    terms
        .iter()
        .map(|(adapter, weight)| (adapter, *weight))
        .collect()
}

fn fold_terms(base: &Path, terms: &[(AdapterFile, f64)], out: &Path) -> Result<()> {
    let terms: Vec<Term<'_>> = terms
        .iter()
        .map(|(adapter, weight)| Term {
            adapter,
            weight: *weight,
        })
        .collect();
    fold(&Checkpoint::open(base)?, &terms, out)?;
    Ok(())
}

/// Mean over modules of the effective rank of a weighted sum of deltas.
fn effective_rank(terms: &[(&AdapterFile, f64)]) -> Result<f64> {
    let spectra = stack_spectrum(terms)?;
    let sum: f64 = spectra.iter().map(|(_, s)| s.effective_rank).sum();
    Ok(sum / spectra.len().max(1) as f64)
}

/// Bytes of a model's weight files.
fn model_bytes(dir: &Path) -> Result<u64> {
    let model = Checkpoint::open(dir)?;
    let sizes = model
        .weight_files()
        .iter()
        .map(|(name, _)| Ok(fs::metadata(dir.join(name))?.len()));
    sizes.sum()
}

fn adapter_bytes(dir: &Path) -> Result<u64> {
    let path = dir.join(WEIGHTS_FILE);
    Ok(fs::metadata(&path)
        .with_context(|| format!("read {}", path.display()))?
        .len())
}
