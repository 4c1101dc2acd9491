//! Honest trainings with their states, each done once.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result};
use cairn_proto::convert::BlobName;
use cairn_proto::signing::state_leaf;
use cairn_proto::v1;
use cairn_stack::adapter::{
    AdapterFile, AdapterWriteConfig, CONFIG_FILE, Pair, WEIGHTS_FILE, write_adapter,
};
use cairn_stack::digest::Digest;
use cairn_stack::merkle::{Hash, inclusion_proof, leaf_hash, root};
use cairn_stack::recipe::Recipe;
use serde_json::json;

use crate::adapters::Adapter;
use crate::study::hand::{Hand, TrainJob};
use crate::study::material::write_lines;

/// One training state, with its bytes.
#[derive(Debug, Clone)]
pub struct State {
    /// Optimiser steps done.
    pub step: u32,
    /// The factors' file.
    pub factors: Rc<Vec<u8>>,
    /// The moments' file.
    pub moments: Rc<Vec<u8>>,
}

/// A blob of these bytes.
#[must_use]
pub fn blob(bytes: &[u8]) -> v1::BlobRef {
    BlobName {
        digest: Digest::of(bytes),
        size_bytes: bytes.len() as u64,
    }
    .into()
}

impl State {
    fn leaf(&self) -> Hash {
        let digests = (Digest::of(&self.factors), Digest::of(&self.moments));
        leaf_hash(&state_leaf(self.step, digests.0, digests.1))
    }
}

/// The states of a training, first to last: what a volunteer commits to.
#[derive(Debug, Clone)]
pub struct Log(pub Vec<State>);

impl Log {
    /// Reads a folder that `cairn-worker` kept states in: one folder a state, named by its step.
    fn read(dir: &Path) -> Result<Self> {
        let mut steps: Vec<u32> = fs::read_dir(dir)?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        steps.sort_unstable();
        let read = |step: u32| {
            let of = |name: &str| fs::read(dir.join(step.to_string()).join(name)).map(Rc::new);
            Ok(State {
                step,
                factors: of(WEIGHTS_FILE)?,
                moments: of("moments.safetensors")?,
            })
        };
        Ok(Self(steps.into_iter().map(read).collect::<Result<_>>()?))
    }

    /// The same, claiming to end in other factors: what a forger commits to.
    #[must_use]
    pub fn ending_in(&self, weights: &[u8]) -> Self {
        let mut states = self.0.clone();
        if let Some(last) = states.last_mut() {
            last.factors = Rc::new(weights.to_vec());
        }
        Self(states)
    }

    /// State `leaf` with its proof.
    #[must_use]
    pub fn revealed(&self, leaf: usize) -> Option<v1::RevealedState> {
        let leaves: Vec<Hash> = self.0.iter().map(State::leaf).collect();
        let state = self.0.get(leaf)?;
        Some(v1::RevealedState {
            step: state.step,
            factors: Some(blob(&state.factors)),
            moments: Some(blob(&state.moments)),
            proof: inclusion_proof(&leaves, leaf as u64)?
                .into_iter()
                .map(Vec::from)
                .collect(),
        })
    }

    /// The commitment as it is handed in.
    #[must_use]
    pub fn commitment(&self) -> v1::TrainCommitment {
        let leaves: Vec<Hash> = self.0.iter().map(State::leaf).collect();
        v1::TrainCommitment {
            root: root(&leaves).to_vec(),
            leaves: self.0.len() as u32,
            last: self.revealed(self.0.len().saturating_sub(1)),
        }
    }
}

/// An adapter and how it came about.
#[derive(Debug)]
pub struct Trained {
    /// Its files.
    pub adapter: Adapter,
    /// Its factors.
    pub pairs: Vec<Pair>,
    /// Its training states.
    pub log: Log,
    /// Its folder, for scoring it directly.
    pub dir: PathBuf,
    /// Processor time of its training, seconds.
    pub cpu_seconds: f64,
    /// Steps of its training.
    pub steps: u64,
}

/// Trains, and remembers what it has trained.
pub struct Trainer {
    /// The worker that trains, and scores for the rules beside the coordinator's.
    pub hand: Hand,
    folder: PathBuf,
    known: BTreeMap<Digest, Rc<Trained>>,
    segments: u32,
    /// Processor time of all trainings, seconds.
    pub cpu_seconds: f64,
}

impl Trainer {
    /// With a folder for what it makes.
    ///
    /// # Errors
    /// When the worker does not start.
    pub fn start(worker: &Path, folder: &Path, segments: u32) -> Result<Self> {
        Ok(Self {
            hand: Hand::start(worker)?,
            folder: folder.to_owned(),
            known: BTreeMap::new(),
            segments,
            cpu_seconds: 0.0,
        })
    }

    /// How many trainings were done.
    #[must_use]
    pub fn trainings(&self) -> usize {
        self.known.len()
    }

    /// The adapter of this recipe on these records over this base.
    ///
    /// # Errors
    /// When training fails.
    pub fn train(
        &mut self,
        base: &Path,
        recipe: &Recipe,
        records: &[String],
    ) -> Result<Rc<Trained>> {
        let key = json!([base, recipe, records]).to_string();
        let key = Digest::of(key.as_bytes());
        if let Some(trained) = self.known.get(&key) {
            return Ok(Rc::clone(trained));
        }
        let dir = self.folder.join(key.to_string());
        fs::create_dir_all(&dir)?;
        let data = dir.join("shard.jsonl");
        write_lines(&data, records.iter().map(String::as_str))?;
        let (out, states) = (dir.join("adapter"), dir.join("states"));
        let done = self.hand.train(&TrainJob {
            model: base,
            data: &data,
            recipe,
            initial: None,
            carry: None,
            frozen_a: false,
            states: Some((&states, self.segments)),
            out: &out,
        })?;
        self.cpu_seconds += done.cpu_seconds;
        let trained = Rc::new(Trained {
            adapter: read(&out)?,
            pairs: pairs(&out)?,
            log: Log::read(&states).with_context(|| format!("states in {}", states.display()))?,
            dir: out,
            cpu_seconds: done.cpu_seconds,
            steps: done.steps,
        });
        self.known.insert(key, Rc::clone(&trained));
        Ok(trained)
    }
}

/// The two files of an adapter's folder.
///
/// # Errors
/// When one is missing.
pub fn read(dir: &Path) -> Result<Adapter> {
    Ok(Adapter {
        weights: fs::read(dir.join(WEIGHTS_FILE))?,
        config: fs::read(dir.join(CONFIG_FILE))?,
    })
}

/// All factors of an adapter's folder.
///
/// # Errors
/// When it is no adapter.
pub fn pairs(dir: &Path) -> Result<Vec<Pair>> {
    Ok(AdapterFile::open(dir)?.pairs()?)
}

/// Pairs as the recipe's adapter.
///
/// # Errors
/// When they cannot be written.
pub fn written(recipe: &Recipe, pairs: &[Pair]) -> Result<Adapter> {
    let folder = tempfile::tempdir()?;
    let config = AdapterWriteConfig::of_recipe(recipe, None, None);
    write_adapter(folder.path(), pairs, &config)?;
    read(folder.path())
}
