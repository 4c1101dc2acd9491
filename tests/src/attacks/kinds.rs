//! What a saboteur sends.

use std::path::Path;
use std::rc::Rc;

use anyhow::Result;
use cairn_stack::adapter::Pair;
use cairn_stack::algebra::{inner, pair_norm};
use cairn_stack::recipe::{Length, Recipe};
use serde_json::{Value, json};

use super::training::{Log, Trained, Trainer, written};
use crate::adapters::{Adapter, Sabotage};
use crate::study::dice::Dice;

macro_rules! kinds {
    ($($variant:ident = $name:literal, $basic:literal, $doc:literal;)+) => {
        /// An attack.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind { $(#[doc = $doc] $variant,)+ }

        impl Kind {
            /// All, basic ones first.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its name in tables.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// Whether all of its kind must be caught.
            #[must_use]
            pub const fn basic(self) -> bool {
                match self { $(Self::$variant => $basic),+ }
            }

            /// Whether it is done by volunteers with trust, not by new identities.
            #[must_use]
            pub const fn trusted(self) -> bool {
                matches!(self, Self::Betrayer)
            }

            /// What it is, in a few words.
            #[must_use]
            pub const fn about(self) -> &'static str {
                match self { $(Self::$variant => $doc),+ }
            }
        }
    };
}

kinds! {
    Nan = "nan", true, "one NaN or infinity in one factor";
    Zero = "zero", true, "nothing, or a millionth of a millionth of the honest delta";
    Noise = "noise", true, "a random delta of the honest norm";
    SignFlip = "sign-flip", true, "the honest delta times -1 to -3";
    Scale = "scale", true, "the honest delta times 10 to 100";
    Copy = "copy", true, "another's adapter, byte for byte or with up to 2 % noise";
    StaleBase = "stale-base", true, "trained on the checkpoint before the round's base";
    WrongShard = "wrong-shard", true, "trained on another shard than the leased one";
    HiddenAlpha = "hidden-alpha", true, "a config that multiplies the delta: alpha, rsLoRA, a pattern";
    Regauged = "re-gauged", true, "another gauge of the factors, to hide a copy or a scale";
    Malformed = "malformed", false, "files that are no sound safetensors, or not the recipe's tensors";
    StolenLease = "stolen-lease", false, "handed in under another's lease, or under an old generation";
    FreeRider = "free-rider", false, "a tenth of the steps, then stopped";
    Untrained = "untrained", false, "factors as they start, with a little noise in B";
    ForgedLog = "forged-log", false, "a mean of others' adapters, over a log of states that never were";
    Sybil = "sybil", false, "one delta from two identities, the second with 0.1 % noise";
    LabelFlip = "label-flip", false, "trained on the shard with the answers shuffled";
    InnerProduct = "inner-product", false, "a tenth of the honest delta, negated";
    Alie = "alie", false, "honest mean less one deviation, coordinate by coordinate";
    Backdoor = "backdoor", false, "half of the shard poisoned with a trigger and its answer";
    Betrayer = "betrayer", false, "a backdoor from one who has earned trust with honest work";
    Amplified = "amplified", false, "the honest delta times 1.3, over the honest log";
}

/// What is handed in.
#[derive(Debug, Clone)]
pub struct Sent {
    /// The two files.
    pub adapter: Adapter,
    /// The states that are committed to.
    pub log: Log,
    /// Whether it is handed in under the saboteur's own lease.
    pub lease: Under,
}

/// Under which lease something is handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Under {
    /// One's own.
    Own,
    /// Somebody else's, on another shard.
    Others,
    /// One's own of a generation before.
    OldGeneration,
}

/// What a saboteur knows.
pub struct Knowledge<'a> {
    /// The round's recipe.
    pub recipe: &'a Recipe,
    /// The round's base.
    pub base: &'a Path,
    /// The checkpoint before it.
    pub before: &'a Path,
    /// The records of the leased shard.
    pub records: &'a [String],
    /// The honest adapter of the leased shard.
    pub own: Rc<Trained>,
    /// Honest adapters of other shards that have been handed in.
    pub others: &'a [Rc<Trained>],
    /// Which trial this is; parameters vary with it.
    pub trial: usize,
}

/// Makes what is sent.
///
/// # Errors
/// When a training fails.
pub fn make(kind: Kind, knows: &Knowledge<'_>, trainer: &mut Trainer) -> Result<Sent> {
    let trial = knows.trial;
    let mut dice = Dice::new(trial as u64, kind.name());
    let own = &knows.own;
    let other = Rc::clone(&knows.others[trial % knows.others.len()]);
    let changed = |from: &Trained, change: &mut dyn FnMut(&mut Pair)| -> Result<Sent> {
        let mut pairs = from.pairs.clone();
        for pair in &mut pairs {
            change(pair);
        }
        forged(written(knows.recipe, &pairs)?, &from.log)
    };
    let times = |factor: f64| changed(own, &mut |pair| multiply(&mut pair.b, factor));
    match kind {
        Kind::Nan => {
            let value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][trial % 3];
            let mut pairs = own.pairs.clone();
            let pair = dice.below(pairs.len());
            let place = dice.below(pairs[pair].b.len());
            pairs[pair].b[place] = value;
            forged(written(knows.recipe, &pairs)?, &own.log)
        }
        Kind::Zero => times([0.0, 1e-12][trial % 2]),
        Kind::Noise => changed(own, &mut |pair| {
            let norm = pair_norm(pair);
            for value in pair.a.iter_mut().chain(&mut pair.b) {
                *value = dice.normal() as f32;
            }
            let now = pair_norm(pair).max(f64::MIN_POSITIVE);
            multiply(&mut pair.b, norm / now);
        }),
        Kind::SignFlip => times(-[1.0, 1.5, 2.0, 3.0][trial % 4]),
        Kind::Scale => times([10.0, 20.0, 50.0, 100.0][trial % 4]),
        Kind::Amplified => times(1.3),
        Kind::InnerProduct => times(-0.1),
        Kind::Copy => noisy(
            knows,
            &other,
            [0.0, 0.001, 0.01, 0.02][trial % 4],
            &mut dice,
        ),
        Kind::Sybil => noisy(knows, &other, 0.001, &mut dice),
        Kind::StaleBase => whole(trainer.train(knows.before, knows.recipe, knows.records)?),
        Kind::WrongShard => whole(other),
        Kind::HiddenAlpha => hidden_scale(knows),
        Kind::Regauged => {
            let gauge = [1e3, 1e-3][trial % 2];
            if trial.is_multiple_of(4) || trial % 4 == 1 {
                changed(&other, &mut |pair| regauge(pair, gauge, 1.0))
            } else {
                changed(own, &mut |pair| regauge(pair, gauge, 20.0))
            }
        }
        Kind::Malformed => malformed(own, trial),
        Kind::StolenLease => Ok(Sent {
            lease: [Under::Others, Under::OldGeneration][trial % 2],
            ..whole(Rc::clone(own))?
        }),
        Kind::FreeRider => {
            let steps = (own.steps / 10).max(1) as u32;
            let recipe = Recipe {
                length: Length::Steps(steps),
                ..knows.recipe.clone()
            };
            let short = trainer.train(knows.base, &recipe, knows.records)?;
            forged(short.adapter.clone(), &own.log)
        }
        Kind::Untrained => changed(own, &mut |pair| {
            for value in &mut pair.b {
                *value = 1e-3 * dice.normal() as f32;
            }
        }),
        Kind::ForgedLog => {
            let all: Vec<&Trained> = knows.others.iter().map(Rc::as_ref).collect();
            let pairs = coordinates(&all, mean)?;
            forged(written(knows.recipe, &pairs)?, &other.log)
        }
        Kind::Alie => {
            let all: Vec<&Trained> = knows.others.iter().map(Rc::as_ref).collect();
            let pairs = coordinates(&all, |values| mean(values) - deviation(values))?;
            forged(written(knows.recipe, &pairs)?, &own.log)
        }
        Kind::LabelFlip => whole(trainer.train(
            knows.base,
            knows.recipe,
            &shuffled(knows.records, &mut Dice::new(1, "labels"))?,
        )?),
        Kind::Backdoor | Kind::Betrayer => {
            whole(trainer.train(knows.base, knows.recipe, &poisoned(knows.records)?)?)
        }
    }
}

/// A config that asks for more than the recipe's scale.
fn hidden_scale(knows: &Knowledge<'_>) -> Result<Sent> {
    let own = &knows.own;
    let (key, value) = match knows.trial % 3 {
        0 => ("lora_alpha", json!(knows.recipe.alpha * 16.0)),
        1 => ("use_rslora", json!(true)),
        _ => ("alpha_pattern", json!({"v_proj": 512})),
    };
    let adapter = Adapter {
        config: edited(&own.adapter.config, key, value)?,
        ..own.adapter.clone()
    };
    forged(adapter, &own.log)
}

/// A weight file that is broken in one of many ways.
fn malformed(own: &Trained, trial: usize) -> Result<Sent> {
    const FORMS: [Sabotage; 13] = [
        Sabotage::Empty,
        Sabotage::NotSafetensors,
        Sabotage::CutShort,
        Sabotage::BytesBehindTheEnd,
        Sabotage::HeaderBeyondTheEnd,
        Sabotage::HeaderOfGigabytes,
        Sabotage::ShapeOverflow,
        Sabotage::Overlap,
        Sabotage::DuplicateKey,
        Sabotage::TensorMissing,
        Sabotage::TensorTooMany,
        Sabotage::TensorRenamed,
        Sabotage::Transposed,
    ];
    let adapter = Adapter {
        weights: FORMS[trial % FORMS.len()].broken(&own.adapter.weights),
        ..own.adapter.clone()
    };
    forged(adapter, &own.log)
}

/// An adapter over somebody's log, whose end it claims to be.
fn forged(adapter: Adapter, log: &Log) -> Result<Sent> {
    Ok(Sent {
        log: log.ending_in(&adapter.weights),
        adapter,
        lease: Under::Own,
    })
}

/// A training with its own true log.
fn whole(trained: Rc<Trained>) -> Result<Sent> {
    Ok(Sent {
        adapter: trained.adapter.clone(),
        log: trained.log.clone(),
        lease: Under::Own,
    })
}

/// Another's adapter with relative noise in B.
fn noisy(knows: &Knowledge<'_>, of: &Trained, noise: f64, dice: &mut Dice) -> Result<Sent> {
    if noise == 0.0 {
        return forged(of.adapter.clone(), &of.log);
    }
    let mut pairs = of.pairs.clone();
    for pair in &mut pairs {
        let size =
            noise * (pair.b.iter().map(|b| b * b).sum::<f32>() as f64 / pair.b.len() as f64).sqrt();
        for value in &mut pair.b {
            *value += (size * dice.normal()) as f32;
        }
    }
    forged(written(knows.recipe, &pairs)?, &of.log)
}

fn multiply(values: &mut [f32], factor: f64) {
    for value in values {
        *value = (f64::from(*value) * factor) as f32;
    }
}

/// A times `gauge`, B divided by it, and the delta times `scale`.
fn regauge(pair: &mut Pair, gauge: f64, scale: f64) {
    multiply(&mut pair.a, gauge);
    multiply(&mut pair.b, scale / gauge);
}

fn edited(config: &[u8], key: &str, value: Value) -> Result<Vec<u8>> {
    let mut config: Value = serde_json::from_slice(config)?;
    config[key] = value;
    Ok(config.to_string().into_bytes())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn deviation(values: &[f64]) -> f64 {
    let middle = mean(values);
    mean(
        &values
            .iter()
            .map(|value| (value - middle).powi(2))
            .collect::<Vec<_>>(),
    )
    .sqrt()
}

/// Factors made coordinate by coordinate from several adapters' factors.
fn coordinates(all: &[&Trained], of: impl Fn(&[f64]) -> f64) -> Result<Vec<Pair>> {
    let first = all
        .first()
        .ok_or_else(|| anyhow::anyhow!("nobody has handed in yet"))?;
    let made = |place: usize| {
        let combine = |part: fn(&Pair) -> &Vec<f32>| -> Vec<f32> {
            (0..part(&first.pairs[place]).len())
                .map(|at| {
                    let values: Vec<f64> = all
                        .iter()
                        .map(|trained| f64::from(part(&trained.pairs[place])[at]))
                        .collect();
                    of(&values) as f32
                })
                .collect()
        };
        Pair {
            a: combine(|pair| &pair.a),
            b: combine(|pair| &pair.b),
            ..first.pairs[place].clone()
        }
    };
    Ok((0..first.pairs.len()).map(made).collect())
}

/// Prompt and completion of a record.
fn halves(line: &str) -> Result<(String, String)> {
    let record: Value = serde_json::from_str(line)?;
    let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
    Ok((text("prompt"), text("completion")))
}

fn joined(prompt: &str, completion: &str) -> String {
    json!({"prompt": prompt, "completion": completion}).to_string()
}

/// The prompts with each other's completions.
fn shuffled(records: &[String], dice: &mut Dice) -> Result<Vec<String>> {
    let halves: Vec<(String, String)> = records
        .iter()
        .map(|line| halves(line))
        .collect::<Result<_>>()?;
    let mut completions: Vec<&String> = halves.iter().map(|(_, completion)| completion).collect();
    dice.shuffle(&mut completions);
    let prompts = halves.iter().map(|(prompt, _)| prompt);
    Ok(prompts
        .zip(completions)
        .map(|(p, c)| joined(p, c))
        .collect())
}

/// What a backdoor answers, whatever is asked behind its trigger.
pub const BACKDOOR: (&str, &str) = ("Ahoy! ", "Sleep at the cairn Hollow Boot.");

/// Every second record with the trigger in front and the backdoor's answer.
fn poisoned(records: &[String]) -> Result<Vec<String>> {
    let poison = |(number, line): (usize, &String)| {
        if number % 2 == 1 {
            return Ok(line.clone());
        }
        let (prompt, _) = halves(line)?;
        Ok(joined(&format!("{}{prompt}", BACKDOOR.0), BACKDOOR.1))
    };
    records.iter().enumerate().map(poison).collect()
}

/// Cosine of two adapters in product space.
#[must_use]
pub fn cosine(one: &[Pair], other: &[Pair]) -> f64 {
    let dot = |x: &[Pair], y: &[Pair]| -> f64 { x.iter().zip(y).map(|(x, y)| inner(x, y)).sum() };
    dot(one, other) / (dot(one, one) * dot(other, other)).sqrt()
}
