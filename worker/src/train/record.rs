//! Keeping the states of one run, so that a crash costs none and changes none.
//!
//! An index in the folder names the states written so far. It is written after the state it names,
//! and what it names is hashed before it is gone on with, so that whatever a power cut leaves is
//! either a whole state or no state.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use cairn_proto::identity::write_private;
use cairn_stack::adapter::{AdapterWriteConfig, WEIGHTS_FILE};
use cairn_stack::config::ModelConfig;
use cairn_stack::digest::Digest;

use super::checkpoint::Numbers;
use super::states::{
    Commitment, Content, MOMENTS_FILE, State, StateError, States, boundaries, restore, state_dir,
    write_state,
};
use super::trainer::Trainer;

/// The index's name in a folder of states.
const INDEX: &str = "states.json";
/// Longest index read, bytes: a state takes some 500.
const INDEX_BYTES_MAX: u64 = 16 << 20;

/// What a folder of states says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Index {
    /// What it was made from; see [`super::checkpoint::key`].
    key: Digest,
    /// Segments asked for.
    segments: u32,
    /// The states, first to last.
    states: Vec<Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Entry {
    state: State,
    numbers: Numbers,
}

/// How a trainer was brought together with the states of its run.
pub(super) enum Rewound {
    /// They fit; nothing was done.
    Fits,
    /// It is where the last state was taken; the run had come to this then.
    ToState(Numbers),
    /// There is no state to go on from: it must begin anew.
    ToStart,
}

/// The states of a run that is under way.
pub(super) struct Recorder<'a> {
    states: States,
    model: &'a ModelConfig,
    config: AdapterWriteConfig,
    boundaries: Vec<u64>,
    index: Index,
}

impl<'a> Recorder<'a> {
    /// Takes up what the folder holds of this very run; clears what is another's or damaged.
    pub(super) fn open(
        states: States,
        model: &'a ModelConfig,
        config: AdapterWriteConfig,
        key: &Digest,
        total: u64,
    ) -> Result<Self, StateError> {
        let boundaries = boundaries(total, states.segments);
        let fresh = Index {
            key: *key,
            segments: states.segments,
            states: Vec::new(),
        };
        let mut index = match read_index(&states.dir) {
            Some(found) if (found.key, found.segments) == (fresh.key, fresh.segments) => found,
            _ => {
                clear(&states.dir).map_err(StateError::io(&states.dir))?;
                fresh
            }
        };
        let intact = |(entry, boundary): (&Entry, &u64)| {
            u64::from(entry.state.step) == *boundary && is_whole(&states.dir, &entry.state)
        };
        let whole = index.states.iter().zip(&boundaries).map(intact);
        let whole = whole.take_while(|whole| *whole).count();
        index.states.truncate(whole);
        fs::create_dir_all(&states.dir).map_err(StateError::io(&states.dir))?;
        Ok(Self {
            states,
            model,
            config,
            boundaries,
            index,
        })
    }

    /// Brings trainer and states together: goes on from the last state when there are more or fewer
    /// of them than a run that is `trainer.steps` steps far has.
    pub(super) fn rewind(&self, trainer: &mut Trainer<'_>) -> Result<Rewound, StateError> {
        let due = |step: &&u64| **step <= trainer.steps;
        let due = self.boundaries.iter().take_while(due).count();
        if due == self.index.states.len() || trainer.steps == 0 && self.index.states.is_empty() {
            return Ok(Rewound::Fits);
        }
        let Some(last) = self.index.states.last() else {
            return Ok(Rewound::ToStart);
        };
        let dir = state_dir(&self.states.dir, last.state.step);
        let (factors, moments) = (dir.join(WEIGHTS_FILE), dir.join(MOMENTS_FILE));
        let step = u64::from(last.state.step);
        restore(trainer, self.model, &factors, &moments, step)?;
        Ok(Rewound::ToState(last.numbers))
    }

    /// Keeps the trainer's state if this is a boundary that has none yet.
    pub(super) fn record(
        &mut self,
        trainer: &Trainer<'_>,
        numbers: &Numbers,
    ) -> Result<(), StateError> {
        if self.boundaries.get(self.index.states.len()) != Some(&trainer.steps) {
            return Ok(());
        }
        let step = u32::try_from(trainer.steps).unwrap_or(u32::MAX);
        let dir = state_dir(&self.states.dir, step);
        let state = write_state(&dir, trainer, self.model, &self.config)?;
        let numbers = *numbers;
        self.index.states.push(Entry { state, numbers });
        let path = self.states.dir.join(INDEX);
        let json = serde_json::to_vec(&self.index).unwrap_or_default();
        write_private(&path, &json).map_err(StateError::io(&path))
    }

    /// Over all states recorded.
    pub(super) fn commitment(&self) -> Commitment {
        Commitment::over(self.index.states.iter().map(|entry| entry.state).collect())
    }
}

/// What a folder of states of a finished training commits to; `None` when it holds none.
#[must_use]
pub fn commitment(states: &Path) -> Option<Commitment> {
    let index = read_index(states)?;
    let states: Vec<State> = index.states.iter().map(|entry| entry.state).collect();
    (!states.is_empty()).then(|| Commitment::over(states))
}

fn read_index(dir: &Path) -> Option<Index> {
    let path = dir.join(INDEX);
    if fs::metadata(&path).ok()?.len() > INDEX_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn is_whole(dir: &Path, state: &State) -> bool {
    let dir = state_dir(dir, state.step);
    let same = |name: &str, content: Content| {
        Content::of(&dir.join(name)).is_ok_and(|found| found == content)
    };
    same(WEIGHTS_FILE, state.factors) && same(MOMENTS_FILE, state.moments)
}

fn clear(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
