//! The memory there is, looked at before every step: others come and go.

use std::time::Duration;

use cairn_stack::recipe::Recipe;

use super::estimate::{Frozen, Numbers};
use super::{DoesNotFit, Passes};
use crate::cancel::CancelFlag;
use crate::data::Batch;
use crate::memory::{Memory, human};
use crate::model::LoadedModel;

/// Pause between looks while even the smallest pass does not fit.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks before it is given up: what others hold for ten minutes they keep.
const LOOKS_MAX: u32 = 600;

/// Chooses how a step's batches are passed.
pub struct Watch<'m> {
    model: &'m LoadedModel,
    recipe: &'m Recipe,
    weights: u64,
    teacher: u64,
    look: fn() -> Option<Memory>,
    said: Option<String>,
}

impl<'m> Watch<'m> {
    /// Of a training on the host's memory; on other devices nothing is seen, and nothing changed.
    #[must_use]
    pub fn new(model: &'m LoadedModel, teacher: Option<&LoadedModel>, recipe: &'m Recipe) -> Self {
        let look = if model.device_name.is_host() {
            Memory::now
        } else {
            || None
        };
        Self {
            model,
            recipe,
            weights: model.llama.bytes() as u64,
            // One that teaches itself is held once.
            teacher: teacher
                .filter(|teacher| !std::ptr::eq(*teacher, model))
                .map_or(0, |teacher| teacher.llama.bytes() as u64),
            look,
            said: None,
        }
    }

    /// How the batches of the next step are passed: whole while that goes. Waits while nothing goes, and
    /// not once it is cancelled.
    ///
    /// # Errors
    /// [`DoesNotFit`] when nothing went for ten minutes.
    pub fn before_step(
        &mut self,
        batches: &[Batch],
        cancel: &CancelFlag,
    ) -> Result<Passes, DoesNotFit> {
        let rows = batches
            .iter()
            .map(|batch| batch.rows.len())
            .max()
            .unwrap_or(1);
        let length = batches.iter().map(|batch| batch.length).max().unwrap_or(1);
        let model = self.model;
        let frozen = Frozen {
            config: &model.llama.config,
            numbers: Numbers::Floats,
            device: model.device_name,
            teacher: self.teacher,
        };
        let (weights, recipe) = (self.weights, self.recipe);
        let needs = |passes: Passes| {
            let pass = (passes.rows, length);
            frozen.training_beside(weights, recipe, pass, passes.keep)
        };
        for looks in 0.. {
            let Some(memory) = (self.look)() else {
                return Ok(Passes::whole(rows));
            };
            if let Some((passes, _)) =
                Passes::first_that_fits((super::rows_of(recipe).0, rows), memory, needs)
            {
                self.say(passes, rows, memory);
                return Ok(passes);
            }
            let least = Passes::smallest(recipe);
            if cancel.is_cancelled() {
                return Ok(least);
            }
            if looks == LOOKS_MAX {
                return Err(DoesNotFit {
                    needs: needs(least).total(),
                    memory,
                    change: None,
                });
            }
            self.say_once(format!(
                "waiting for memory: {} are free {}, a step needs {} in all",
                human(memory.available),
                memory.limit,
                human(needs(least).total())
            ));
            std::thread::sleep(LOOK_EVERY);
        }
        unreachable!("the last look returns")
    }

    /// Says when something is changed for want of memory, and when it no longer is.
    fn say(&mut self, passes: Passes, rows: usize, memory: Memory) {
        if passes == Passes::whole(rows) {
            if self.said.take().is_some() {
                eprintln!("there is memory again: {}", passes.words(rows));
            }
            return;
        }
        let words = passes.words(rows);
        if self.said.as_ref() != Some(&words) {
            let free = human(memory.available);
            eprintln!("memory is short ({free} free {}): {words}", memory.limit);
            self.said = Some(words);
        }
    }

    fn say_once(&mut self, line: String) {
        const WAITING: &str = "waiting";
        if self.said.as_deref() != Some(WAITING) {
            eprintln!("{line}");
            self.said = Some(WAITING.to_owned());
        }
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
