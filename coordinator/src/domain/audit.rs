//! Audits: a submission's training states are committed to before anybody knows which will be looked
//! at; then one segment is drawn with a secret, opened, and trained again by an evaluator.
//!
//! A training of `total` optimiser steps is cut into segments. Boundary `k` of `segments` lies after
//! step `floor(k * total / segments)`; boundaries that coincide are one. Each is a training state:
//! factors and optimiser moments. The states are the leaves of a Merkle tree; see
//! `cairn_proto::signing::state_leaf`.

use cairn_proto::reason::VerdictReason;
use cairn_proto::signing::state_leaf;
use cairn_stack::digest::Digest;
use cairn_stack::merkle::{self, Hash};
use cairn_stack::recipe::Policy;
use serde::{Deserialize, Serialize};

use super::evaluation::Findings;
use crate::clock::Timestamp;
use crate::ids::SubmissionId;

/// Separates the draw from every other use of the secret.
const DRAW_CONTEXT: &[u8] = b"cairn audit draw";

/// The device word of the CPU path on which training is the same bit for bit.
pub const PINNED_DEVICE: &str = "flex";

/// Largest distance of a replay when both sides ran on the pinned path: rounding has no part in it,
/// and what a different build of the same program may do is far below.
pub const PINNED_TOLERANCE: f64 = 1e-3;

/// A file, named before it is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// BLAKE3 of its bytes.
    pub digest: Digest,
    /// How many they are.
    pub size_bytes: u64,
}

/// What a worker commits to with its adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commitment {
    /// Root of the tree over the training states.
    pub root: Hash,
    /// How many states.
    pub leaves: u32,
    /// The state after the last step.
    pub last: State,
}

/// A training state with the proof that it was committed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The optimiser step it was taken after.
    pub step: u32,
    /// The file of the factors.
    pub factors: File,
    /// The file of the moments.
    pub moments: File,
    /// Siblings from the leaf upwards.
    pub proof: Vec<Hash>,
}

/// Room for what a file of moments has in its header beyond twice an adapter's, bytes.
const MOMENTS_HEADER_BYTES: u64 = 1024 * 1024;

/// Largest file of a training state, given the largest adapter: the moments are two of each factor.
pub const fn state_bytes_max(adapter_bytes_max: u64) -> u64 {
    adapter_bytes_max
        .saturating_mul(2)
        .saturating_add(MOMENTS_HEADER_BYTES)
}

/// What is wrong with a commitment or with what was opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadState {
    /// The number of states does not follow from the steps.
    #[error("{steps} steps in {segments} segments have {expected} training states, not {found}")]
    Leaves {
        /// Steps of the training.
        steps: u32,
        /// Segments asked for.
        segments: u32,
        /// States that makes.
        expected: u32,
        /// States committed to.
        found: u32,
    },
    /// The training is not as long as the recipe says.
    #[error("the last training state is after step {found}; the training has {expected} steps")]
    Length {
        /// Steps of the training.
        expected: u32,
        /// The last state's step.
        found: u32,
    },
    /// Not the state that was asked for.
    #[error("the training state after step {expected} is asked for, not that after step {found}")]
    Step {
        /// The boundary.
        expected: u32,
        /// What came.
        found: u32,
    },
    /// The last state is not that of the adapter.
    #[error("the factors of the last training state are not the adapter")]
    NotTheAdapter,
    /// The proof does not lead to the root.
    #[error("the training state after step {0} is not part of the commitment")]
    Proof(u32),
    /// The state at the start is missing although it is not the beginning.
    #[error("the training state at the start of the segment is missing")]
    NoStart,
    /// A file is larger than it has reason to be.
    #[error(
        "a file of {bytes} bytes is no part of a training state, which has at most {bytes_max}"
    )]
    TooLarge {
        /// As named.
        bytes: u64,
        /// Most that it may have.
        bytes_max: u64,
    },
}

/// The steps after which a training is cut, 0 and `steps` among them; each once.
pub fn boundaries(steps: u32, segments: u32) -> Vec<u32> {
    let segments = segments.max(1);
    let mut steps: Vec<u32> = (0..=u64::from(segments))
        .map(|k| (k * u64::from(steps) / u64::from(segments)) as u32)
        .collect();
    steps.dedup();
    steps
}

impl State {
    /// Checks that both files can be what they are said to be; `adapter_bytes_max`: of the round.
    ///
    /// # Errors
    /// [`BadState::TooLarge`].
    pub fn check_sizes(&self, adapter_bytes_max: u64) -> Result<(), BadState> {
        let sizes = [
            (self.factors.size_bytes, adapter_bytes_max),
            (self.moments.size_bytes, state_bytes_max(adapter_bytes_max)),
        ];
        match sizes.iter().find(|(bytes, max)| bytes > max) {
            None => Ok(()),
            Some(&(bytes, bytes_max)) => Err(BadState::TooLarge { bytes, bytes_max }),
        }
    }

    fn is_leaf(&self, index: u32, leaves: u32, root: &Hash) -> Result<(), BadState> {
        let bytes = state_leaf(self.step, self.factors.digest, self.moments.digest);
        let leaf = merkle::leaf_hash(&bytes);
        let (index, leaves) = (u64::from(index), u64::from(leaves));
        merkle::verify_inclusion(&leaf, index, leaves, &self.proof, root)
            .then_some(())
            .ok_or(BadState::Proof(self.step))
    }
}

impl Commitment {
    /// How many segments it has.
    pub const fn segments(&self) -> u32 {
        self.leaves.saturating_sub(1)
    }

    /// Checks that it is one to a training in so many segments, and that its last state is committed
    /// to. `adapter`: the file that the last state's factors must be; nothing where the round goes
    /// on from carried factors. `steps`: how many the recipe asks for, where it says.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(
        &self,
        segments: u32,
        steps: Option<u32>,
        adapter: Option<File>,
    ) -> Result<(), BadState> {
        let found = self.last.step;
        let expected = steps.unwrap_or_else(|| found.max(1));
        if found != expected {
            return Err(BadState::Length { expected, found });
        }
        let expected = boundaries(found, segments).len() as u32;
        if self.leaves != expected {
            return Err(BadState::Leaves {
                steps: found,
                segments,
                expected,
                found: self.leaves,
            });
        }
        if adapter.is_some_and(|adapter| adapter != self.last.factors) {
            return Err(BadState::NotTheAdapter);
        }
        self.last.is_leaf(self.leaves - 1, self.leaves, &self.root)
    }
}

/// Draws whether a submission is audited, and which of its segments. Nobody without the secret can
/// tell beforehand, and the submission's id is chosen by the coordinator once the adapter is stored.
pub fn draw(secret: &[u8; 32], submission: SubmissionId, share: f64, segments: u32) -> Option<u32> {
    if segments == 0 {
        return None;
    }
    let mut hasher = blake3::Hasher::new_keyed(secret);
    hasher.update(DRAW_CONTEXT);
    hasher.update(submission.to_string().as_bytes());
    let mut bytes = [0; 16];
    hasher.finalize_xof().fill(&mut bytes);
    let [chance, place] = [0, 8].map(|at| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    });
    // 53 bits: every value is an f64, and 1 is never reached.
    let chance = (chance >> 11) as f64 / (1_u64 << 53) as f64;
    let segment = (u128::from(place) * u128::from(segments)) >> 64;
    (chance < share).then_some(segment as u32)
}

/// The audit of one submission.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Audit {
    /// The segment drawn, from 0.
    pub segment: u32,
    /// The step at its start.
    pub first_step: u32,
    /// The step at its end.
    pub last_step: u32,
    /// Until when it must be opened, milliseconds since 1970.
    pub until_ms: i64,
    /// What was opened.
    pub opened: Option<Opened>,
    /// How it ended.
    pub ended: Option<Ended>,
}

/// The opened ends of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Factors and moments at the start; nothing for the beginning, which follows from the recipe.
    pub start: Option<(File, File)>,
    /// The factors at the end.
    pub end: File,
    /// When, milliseconds since 1970.
    pub at_ms: i64,
}

/// A segment trained again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Replayed {
    /// Product-space distance of the two ends as a part of what the segment moved.
    pub distance: f64,
    /// The largest that passes.
    pub tolerance: f64,
    /// Whether the factors are the same bit for bit.
    pub identical: bool,
    /// What the evaluator ran it on.
    pub device: String,
    /// How long that took, seconds.
    pub seconds: f64,
}

/// How an audit ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum Ended {
    /// It was trained again.
    Replayed(Replayed),
    /// No evaluator could train it again. A worker whose states are no states of its training is
    /// told so by the evaluator's answer, so this is not the worker's fault.
    Impossible,
}

/// Where an audit stands.
#[derive(Debug, Clone, PartialEq)]
pub enum AuditState {
    /// The submission was not drawn.
    None,
    /// The worker is still to open the segment.
    Waiting,
    /// It has not, and it is too late.
    Unanswered,
    /// An evaluator is to train it again.
    Opened,
    /// The worker did what it said.
    Passed {
        /// What the evaluator found; nothing when no evaluator could replay it.
        replayed: Option<Replayed>,
    },
    /// It did not.
    Failed {
        /// The stable word.
        reason: VerdictReason,
        /// What the volunteer reads.
        text: String,
        /// What the evaluator found, if it came to that.
        replayed: Option<Replayed>,
    },
}

impl Audit {
    /// The audit of a drawn segment of a training with these boundaries.
    pub fn new(segment: u32, boundaries: &[u32], until: Timestamp) -> Option<Self> {
        let at = segment as usize;
        Some(Self {
            segment,
            first_step: *boundaries.get(at)?,
            last_step: *boundaries.get(at + 1)?,
            until_ms: until.0,
            opened: None,
            ended: None,
        })
    }

    /// Where it stands.
    pub fn state(&self, now: Timestamp) -> AuditState {
        match (&self.ended, &self.opened) {
            (Some(Ended::Impossible), _) => AuditState::Passed { replayed: None },
            (Some(Ended::Replayed(replayed)), _) if replayed.passes() => AuditState::Passed {
                replayed: Some(replayed.clone()),
            },
            (Some(Ended::Replayed(replayed)), _) => AuditState::Failed {
                reason: VerdictReason::ReplayMismatch,
                text: format!(
                    "steps {} to {} trained again end {:.3} of the way from where you said, more than \
                     the {:.3} allowed",
                    self.first_step, self.last_step, replayed.distance, replayed.tolerance
                ),
                replayed: Some(replayed.clone()),
            },
            (None, Some(_)) => AuditState::Opened,
            (None, None) if now.0 > self.until_ms => AuditState::Unanswered,
            (None, None) => AuditState::Waiting,
        }
    }

    /// No evaluator could train it again.
    #[must_use]
    pub fn impossible(mut self) -> Self {
        self.ended.get_or_insert(Ended::Impossible);
        self
    }

    /// Whether the worker may and should still open it.
    pub fn is_waiting(&self, now: Timestamp) -> bool {
        self.state(now) == AuditState::Waiting
    }

    /// Checks opened states against the commitment's root; `leaves` as committed.
    ///
    /// # Errors
    /// What is wrong; the worker may try again until the deadline.
    pub fn check(
        &self,
        start: Option<&State>,
        end: &State,
        root: &Hash,
        leaves: u32,
    ) -> Result<(), BadState> {
        let at = |state: &State, step: u32, index: u32| {
            if state.step != step {
                return Err(BadState::Step {
                    expected: step,
                    found: state.step,
                });
            }
            state.is_leaf(index, leaves, root)
        };
        at(end, self.last_step, self.segment + 1)?;
        match start {
            Some(start) => at(start, self.first_step, self.segment),
            None if self.segment > 0 => Err(BadState::NoStart),
            None => Ok(()),
        }
    }

    /// The segment was trained again: `findings` must be those of a replay.
    #[must_use]
    pub fn replayed(mut self, findings: &Findings, worker_device: &str, policy: &Policy) -> Self {
        if let Findings::Replay {
            distance,
            identical,
            device,
            seconds,
        } = findings
            && self.ended.is_none()
        {
            let pinned = [worker_device, device]
                .iter()
                .all(|device| *device == PINNED_DEVICE);
            self.ended = Some(Ended::Replayed(Replayed {
                distance: *distance,
                tolerance: if pinned {
                    PINNED_TOLERANCE.min(policy.replay_tolerance)
                } else {
                    policy.replay_tolerance
                },
                identical: *identical,
                device: device.clone(),
                seconds: *seconds,
            }));
        }
        self
    }
}

impl Replayed {
    /// Whether the end is close enough to the claimed one.
    pub fn passes(&self) -> bool {
        self.identical || self.distance <= self.tolerance
    }
}

/// The state of a submission's audit, if it has one.
pub fn state_of(audit: Option<&Audit>, now: Timestamp) -> AuditState {
    audit.map_or(AuditState::None, |audit| audit.state(now))
}

#[cfg(test)]
#[path = "audit_tests.rs"]
mod tests;
