//! Training states that nobody trained: what a member commits to and opens when it is audited.
//!
//! The evaluator of these tests believes them, unless they say that they are made up.
use cairn_proto::convert::BlobName;
use cairn_proto::signing::state_leaf;
use cairn_proto::v1;
use cairn_stack::digest::Digest;
use cairn_stack::merkle::{Hash, inclusion_proof, leaf_hash, root};

use crate::adapters::Adapter;

/// Optimiser steps that members of these tests claim.
pub const STEPS: u32 = 3;

/// In a state's files when its training never was.
pub const MADE_UP: &[u8] = b"made up";

/// The states of one training.
#[derive(Debug, Clone)]
pub struct Training {
    states: Vec<State>,
}

#[derive(Debug, Clone)]
struct State {
    step: u32,
    factors: Vec<u8>,
    moments: Vec<u8>,
}

fn name(bytes: &[u8]) -> BlobName {
    BlobName {
        digest: Digest::of(bytes),
        size_bytes: bytes.len() as u64,
    }
}

impl State {
    fn leaf(&self) -> Hash {
        let (factors, moments) = (Digest::of(&self.factors), Digest::of(&self.moments));
        leaf_hash(&state_leaf(self.step, factors, moments))
    }
}

impl Training {
    /// Of an adapter, in so many segments.
    #[must_use]
    pub fn of(adapter: &Adapter, segments: u32) -> Self {
        Self::with_word(adapter, segments, b"trained")
    }

    /// The same, but a replay finds out.
    #[must_use]
    pub fn made_up(adapter: &Adapter, segments: u32) -> Self {
        Self::with_word(adapter, segments, MADE_UP)
    }

    fn with_word(adapter: &Adapter, segments: u32, word: &[u8]) -> Self {
        let segments = segments.max(1);
        let mut steps: Vec<u32> = (0..=segments).map(|k| k * STEPS / segments).collect();
        steps.dedup();
        let state = |step: u32| {
            let of = format!(" step {step} {}", adapter.name().digest);
            let bytes = |what: &[u8]| [what, b" ", word, of.as_bytes()].concat();
            State {
                step,
                factors: if step == STEPS {
                    adapter.weights.clone()
                } else {
                    bytes(b"factors")
                },
                moments: bytes(b"moments"),
            }
        };
        Self {
            states: steps.into_iter().map(state).collect(),
        }
    }

    /// As it is handed in.
    #[must_use]
    pub fn commitment(&self) -> v1::TrainCommitment {
        let leaves: Vec<Hash> = self.states.iter().map(State::leaf).collect();
        v1::TrainCommitment {
            root: root(&leaves).to_vec(),
            leaves: leaves.len() as u32,
            last: self.revealed(leaves.len() - 1),
        }
    }

    /// A state with its proof.
    #[must_use]
    pub fn revealed(&self, leaf: usize) -> Option<v1::RevealedState> {
        let leaves: Vec<Hash> = self.states.iter().map(State::leaf).collect();
        let state = self.states.get(leaf)?;
        Some(v1::RevealedState {
            step: state.step,
            factors: Some(name(&state.factors).into()),
            moments: Some(name(&state.moments).into()),
            proof: inclusion_proof(&leaves, leaf as u64)?
                .into_iter()
                .map(Vec::from)
                .collect(),
        })
    }

    /// What opens a segment, and the files to upload for it.
    ///
    /// # Panics
    /// When there is no such segment.
    #[must_use]
    pub fn opening(&self, submission: &str, segment: u32) -> (v1::RevealAuditRequest, Vec<&[u8]>) {
        let at = segment as usize;
        let (start, end) = (&self.states[at], &self.states[at + 1]);
        let mut files: Vec<&[u8]> = vec![&end.factors];
        if segment > 0 {
            files.extend([&start.factors[..], &start.moments]);
        }
        let request = v1::RevealAuditRequest {
            submission_id: submission.to_owned(),
            start: self.revealed(at),
            end: self.revealed(at + 1),
        };
        (request, files)
    }
}
