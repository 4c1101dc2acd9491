//! Before anything large is downloaded or read: does it fit this machine, and how will it be done.
//!
//! [`estimate`] counts what is needed, [`plan`] compares it with the memory there is, and [`watch`] does
//! the same before every step of a training, when others may have taken some of it.
//!
//! What is changed for want of memory, in this order: blocks are computed again instead of kept, which
//! costs time and changes no bit; then a batch is passed in parts, which changes the last bits of a sum;
//! then one waits.

pub mod estimate;
pub mod watch;

use std::fmt;
use std::path::Path;

use serde_json::{Value, json};

use cairn_stack::config::{ConfigError, ModelConfig};
use cairn_stack::quantize::Quantize;
use cairn_stack::recipe::{Objective, Recipe};

use crate::device::DeviceName;
use crate::memory::{Memory, human};
use crate::model::llama::Keep;
use estimate::{Frozen, Needs, Numbers};

/// Part of the memory that blocks kept whole may fill: more than that is left to the machine's owner,
/// since computing them again costs only time.
const COMFORTABLE: f64 = 0.75;

/// Part of the memory that anything may fill: the estimate is right within a few hundredths, and the
/// system needs some.
const TIGHT: f64 = 0.93;

/// Shortest sequences that are offered instead, tokens.
const LENGTH_MIN: u32 = 128;

/// How the rows of a batch are passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passes {
    /// Most rows of one pass; a batch of more is passed in parts.
    pub rows: usize,
    /// What is kept of each block.
    pub keep: Keep,
}

impl Passes {
    /// All rows, and everything kept.
    #[must_use]
    pub const fn whole(rows: usize) -> Self {
        Self {
            rows,
            keep: Keep::Everything,
        }
    }

    /// As few rows as can be passed, and nothing kept that can be computed again.
    #[must_use]
    pub fn smallest(recipe: &Recipe) -> Self {
        Self {
            rows: rows_of(recipe).0,
            keep: Keep::Inputs,
        }
    }

    /// Every way to pass a batch of at least `least` rows, the best first: whole while that goes.
    fn of(rows: usize, least: usize) -> impl Iterator<Item = Self> {
        let parts = std::iter::successors(Some(rows.max(least)), move |rows| {
            (*rows > least).then(|| rows.div_ceil(2).max(least))
        });
        std::iter::once(Self::whole(rows)).chain(parts.map(|rows| Self {
            rows,
            keep: Keep::Inputs,
        }))
    }

    /// The first way that fits, with what it takes.
    fn first_that_fits(
        (least, rows): (usize, usize),
        memory: Memory,
        needs: impl Fn(Self) -> Needs,
    ) -> Option<(Self, Needs)> {
        let fits = |(passes, needs): &(Self, Needs)| {
            let part = match passes.keep {
                Keep::Everything => COMFORTABLE,
                Keep::Inputs => TIGHT,
            };
            needs.total() as f64 <= part * memory.reach() as f64
        };
        Self::of(rows, least)
            .map(|passes| (passes, needs(passes)))
            .find(fits)
    }
}

/// Fewest rows of a pass, and rows of a batch: both answers to a prompt are passed together.
fn rows_of(recipe: &Recipe) -> (usize, usize) {
    let of_a_unit = match recipe.objective {
        Objective::Dpo { .. } => 2,
        Objective::Sft | Objective::Distill(_) => 1,
    };
    (of_a_unit, of_a_unit * recipe.batch_size as usize)
}

/// How a training will be done.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What it takes.
    pub needs: Needs,
    /// How batches are passed.
    pub passes: Passes,
    /// Rows of a batch, as the recipe has it: two for a preference.
    pub batch_size: usize,
    /// Batches of a step, as the recipe has it.
    pub accumulation: usize,
    /// In how many bits the linear layers are kept, as the recipe has it.
    pub quantize: Quantize,
    /// What there is; `None` where the device does not say.
    pub memory: Option<Memory>,
}

/// A model and a recipe that are too much for this machine.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub struct DoesNotFit {
    /// What is needed at least, bytes.
    pub needs: u64,
    /// What there is.
    pub memory: Memory,
    /// The least change with which it would fit, and what is needed then.
    pub change: Option<(String, u64)>,
}

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (needs, free) = (human(self.needs), human(self.memory.available));
        write!(f, "needs {needs}, {free} are free {}", self.memory.limit)?;
        match &self.change {
            Some((change, needs)) => write!(f, "; with {change} {}", human(*needs)),
            None => write!(f, "; no setting would make it fit"),
        }
    }
}

/// Plans a training by config and recipe alone.
///
/// # Errors
/// [`DoesNotFit`] with the least change that would help.
pub fn plan(
    frozen: Frozen<'_>,
    recipe: &Recipe,
    memory: Option<Memory>,
) -> Result<Plan, DoesNotFit> {
    let (least, rows) = rows_of(recipe);
    let length = recipe.sequence_length as usize;
    let of = |passes: Passes| frozen.training(recipe, passes.rows, length, passes.keep);
    let found = match memory {
        None => Some((Passes::whole(rows), of(Passes::whole(rows)))),
        Some(memory) => Passes::first_that_fits((least, rows), memory, of),
    };
    match (found, memory) {
        (Some((passes, needs)), _) => Ok(Plan {
            needs,
            passes,
            batch_size: rows,
            accumulation: recipe.accumulation as usize,
            quantize: recipe.quantize,
            memory,
        }),
        (None, Some(memory)) => Err(DoesNotFit {
            needs: smallest(frozen, recipe).total(),
            memory,
            change: least_change(frozen, recipe, memory),
        }),
        (None, None) => unreachable!("without a limit everything fits"),
    }
}

/// Whether an evaluation fits with its linear layers in so many bits.
///
/// # Errors
/// [`DoesNotFit`], with the first of the other formats that would fit.
pub fn plan_evaluation(
    frozen: Frozen<'_>,
    quantize: Quantize,
    others: &[Quantize],
    memory: Option<Memory>,
) -> Result<Needs, DoesNotFit> {
    let needs = frozen.evaluating(quantize);
    let Some(memory) = memory.filter(|memory| !fits(needs, *memory)) else {
        return Ok(needs);
    };
    let with = |other: &Quantize| (*other, frozen.evaluating(*other));
    let fitting = others
        .iter()
        .map(with)
        .find(|(_, needs)| fits(*needs, memory));
    Err(DoesNotFit {
        needs: needs.total(),
        memory,
        change: fitting.map(|(other, needs)| (format!("--quantize {other}"), needs.total())),
    })
}

/// The model of a folder as far as a plan goes: its config and the size of its files; no weight is read.
///
/// # Errors
/// When the config cannot be read.
pub fn folder(dir: &Path, device: DeviceName) -> Result<(ModelConfig, Numbers), ConfigError> {
    let config = ModelConfig::load(dir)?;
    let json = std::fs::read(dir.join("config.json")).unwrap_or_default();
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = files
        .filter(|file| is_weights(&file.file_name().to_string_lossy()))
        .filter_map(|file| Some(std::fs::metadata(file.path()).ok()?.len()))
        .sum();
    let numbers = Numbers::of_files(&config, &json, bytes, device);
    Ok((config, numbers))
}

/// Whether a file of a checkpoint holds weights.
#[must_use]
pub fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn fits(needs: Needs, memory: Memory) -> bool {
    needs.total() as f64 <= TIGHT * memory.reach() as f64
}

/// See [`Passes::smallest`].
fn smallest(frozen: Frozen<'_>, recipe: &Recipe) -> Needs {
    let Passes { rows, keep } = Passes::smallest(recipe);
    frozen.training(recipe, rows, recipe.sequence_length as usize, keep)
}

/// Fewer bits, shorter sequences, or both: the first that fits.
fn least_change(frozen: Frozen<'_>, recipe: &Recipe, memory: Memory) -> Option<(String, u64)> {
    let fewer = Quantize::ALL
        .into_iter()
        .filter(|quantize| frozen.weights(*quantize) < frozen.weights(recipe.quantize));
    let fewer: Vec<Quantize> = fewer.collect();
    let lengths = |quantize: Quantize| {
        std::iter::successors(Some(recipe.sequence_length / 2), |length| Some(length / 2))
            .take_while(|length| *length >= LENGTH_MIN)
            .map(move |length| (quantize, length))
    };
    let bits = fewer
        .iter()
        .map(|quantize| (*quantize, recipe.sequence_length));
    let both = fewer.last().copied().into_iter().flat_map(lengths);
    let changes = bits.chain(lengths(recipe.quantize)).chain(both);
    changes
        .map(|(quantize, sequence_length)| Recipe {
            quantize,
            sequence_length,
            ..recipe.clone()
        })
        .map(|changed| (smallest(frozen, &changed), changed))
        .find(|(needs, _)| fits(*needs, memory))
        .map(|(needs, changed)| {
            let mut words = Vec::new();
            if changed.quantize != recipe.quantize {
                words.push(format!("quantize = \"{}\"", changed.quantize));
            }
            if changed.sequence_length != recipe.sequence_length {
                words.push(format!("sequence_length = {}", changed.sequence_length));
            }
            (words.join(" and "), needs.total())
        })
}

impl Plan {
    /// As `--json` prints it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let Needs {
            program,
            weights,
            teacher,
            adapter,
            pass,
        } = self.needs;
        json!({
            "fits": true,
            "needs_bytes": self.needs.total(),
            "program_bytes": program,
            "weights_bytes": weights,
            "teacher_bytes": teacher,
            "adapter_bytes": adapter,
            "pass_bytes": pass,
            "available_bytes": self.memory.map(|memory| memory.available),
            "batch_size": self.batch_size,
            "rows_a_pass": self.passes.rows,
            "accumulation": self.accumulation,
            "keep": self.passes.keep.word(),
            "quantize": self.quantize.word(),
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "needs {}", human(self.needs.total()))?;
        match self.memory {
            Some(memory) => write!(f, " of {} {}", human(memory.reach()), memory.limit)?,
            None => write!(f, ", and this device does not say what it has")?,
        }
        write!(
            f,
            ": weights {} (quantize = \"{}\"), ",
            human(self.needs.weights),
            self.quantize,
        )?;
        if self.needs.teacher > 0 {
            write!(f, "teacher {}, ", human(self.needs.teacher))?;
        }
        write!(
            f,
            "adapter {}, pass {}",
            human(self.needs.adapter),
            human(self.needs.pass)
        )?;
        write!(f, "; {}", self.passes.words(self.batch_size))
    }
}

impl Passes {
    /// In words, of a batch of so many rows.
    fn words(self, batch_size: usize) -> String {
        let rows = self.rows.min(batch_size);
        let keep = match self.keep {
            Keep::Everything => "blocks are kept whole",
            Keep::Inputs => "blocks are computed again on the way back",
        };
        if rows == batch_size {
            format!("{rows} rows a pass, {keep}")
        } else {
            format!("{rows} of {batch_size} rows a pass, {keep}")
        }
    }
}

impl DoesNotFit {
    /// As `--json` prints it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "fits": false,
            "needs_bytes": self.needs,
            "available_bytes": self.memory.available,
            "change": self.change.as_ref().map(|(change, _)| change),
            "change_needs_bytes": self.change.as_ref().map(|(_, needs)| needs),
        })
    }
}

#[cfg(test)]
#[path = "preflight/tests.rs"]
mod tests;
