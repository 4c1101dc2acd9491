//! What an evaluator is asked, and an evaluation's states: `open -> leased -> done`, back to `open`
//! after a failure, and `failed` after five or when the losses are not numbers.

use cairn_stack::digest::Digest;
use serde::{Deserialize, Serialize};

use super::candidate::{Candidate, CandidateKey};
use super::{InvalidTransition, words};
use crate::ids::SubmissionId;

/// What an evaluator is asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Job {
    /// The losses of a candidate.
    Score(Candidate),
    /// A guiding update of a shard: its first steps, trained by somebody trusted.
    Guide {
        /// The shard.
        shard: u32,
    },
    /// The opened segment of an audited submission, trained again.
    Replay {
        /// The submission.
        submission: SubmissionId,
    },
    /// The factors on a candidate's adapters that lower the loss of its sets most.
    Learn {
        /// Where the search starts.
        candidate: Candidate,
        /// Passes over the sets.
        steps: u32,
    },
}

/// A job's kind by name only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// See [`Job::Score`].
    Score,
    /// See [`Job::Guide`].
    Guide,
    /// See [`Job::Replay`].
    Replay,
    /// See [`Job::Learn`].
    Learn,
}

words!(Kind {
    Score = "score",
    Guide = "guide",
    Replay = "replay",
    Learn = "learn",
});

impl Job {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Score(_) => Kind::Score,
            Self::Guide { .. } => Kind::Guide,
            Self::Replay { .. } => Kind::Replay,
            Self::Learn { .. } => Kind::Learn,
        }
    }

    /// Its name within its round: asking for the same twice is asking once. A score has its
    /// candidate's own.
    pub fn key(&self) -> CandidateKey {
        let text = match self {
            Self::Score(candidate) => return candidate.key(),
            Self::Guide { shard } => format!("guide {shard}"),
            Self::Replay { submission } => format!("replay {submission}"),
            Self::Learn { candidate, steps } => format!("learn {steps} {}", candidate.key().0),
        };
        CandidateKey(Digest::of(text.as_bytes()))
    }

    /// The candidate that is scored or learnt on.
    pub const fn candidate(&self) -> Option<&Candidate> {
        match self {
            Self::Score(candidate) | Self::Learn { candidate, .. } => Some(candidate),
            Self::Guide { .. } | Self::Replay { .. } => None,
        }
    }
}

/// What came of a job that is not a score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Findings {
    /// The guiding update.
    Guide {
        /// BLAKE3 of its `adapter_model.safetensors`.
        adapter: Digest,
        /// Its length.
        size_bytes: u64,
        /// Its `adapter_config.json`.
        config: String,
    },
    /// How the segment went the second time.
    Replay {
        /// Product-space distance of the two ends as a part of what the segment moved.
        distance: f64,
        /// Whether the factors are the same bit for bit.
        identical: bool,
        /// What the evaluator ran it on.
        device: String,
        /// How long that took.
        seconds: f64,
    },
    /// The factors found.
    Learn {
        /// One an adapter, in the order of the candidate's terms.
        weights: Vec<f64>,
        /// Loss with the factors it started from.
        loss_before: f64,
        /// Loss with these.
        loss_after: f64,
    },
}

/// Failures of one evaluation before it is given up: evaluators are trusted machines, so this many
/// mean that it is the candidate.
pub const FAILURES_MAX: u64 = 5;

/// Where an evaluation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Waiting for an evaluator.
    Open,
    /// An evaluator holds the newest lease.
    Leased,
    /// The losses are stored.
    Done,
    /// It cannot be evaluated.
    Failed,
    /// Nobody needs it any more.
    Cancelled,
}

words!(State {
    Open = "open",
    Leased = "leased",
    Done = "done",
    Failed = "failed",
    Cancelled = "cancelled",
});

impl State {
    /// Hands it out.
    ///
    /// # Errors
    /// Unless it is open.
    pub fn lease(self) -> Result<Self, InvalidTransition> {
        self.go(self == Self::Open, Self::Leased)
    }

    /// The losses are stored: also after the lease ran out, if nobody else took the work.
    ///
    /// # Errors
    /// When it has ended.
    pub fn finish(self) -> Result<Self, InvalidTransition> {
        self.go(matches!(self, Self::Leased | Self::Open), Self::Done)
    }

    /// An evaluator failed on it, `failures` times by now.
    ///
    /// # Errors
    /// Unless it is leased.
    pub fn fail(self, failures: u64) -> Result<Self, InvalidTransition> {
        let to = if failures >= FAILURES_MAX {
            Self::Failed
        } else {
            Self::Open
        };
        self.go(self == Self::Leased, to)
    }

    fn go(self, allowed: bool, to: Self) -> Result<Self, InvalidTransition> {
        let refusal = InvalidTransition {
            what: "evaluation",
            from: self.as_str(),
            to: to.as_str(),
        };
        allowed.then_some(to).ok_or(refusal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::candidate::Sets;

    #[test]
    fn each_job_has_its_own_name() {
        let submission = SubmissionId::new();
        let candidate = Candidate::single(submission, Sets::GATE);
        let learn = |steps| Job::Learn {
            candidate: candidate.clone(),
            steps,
        };
        let jobs = [
            Job::Score(candidate.clone()),
            Job::Guide { shard: 1 },
            Job::Guide { shard: 2 },
            Job::Replay { submission },
            learn(1),
            learn(2),
        ];
        for (i, one) in jobs.iter().enumerate() {
            for (j, other) in jobs.iter().enumerate() {
                assert_eq!(one.key() == other.key(), i == j, "{one:?} {other:?}");
            }
        }
        assert_eq!(jobs[0].key(), candidate.key());
    }

    #[test]
    fn findings_survive_json() {
        let learn = Findings::Learn {
            weights: vec![0.1 + 0.2, -2.5],
            loss_before: 2.0,
            loss_after: 1.0,
        };
        let json = serde_json::to_string(&learn).unwrap();
        assert_eq!(serde_json::from_str::<Findings>(&json).unwrap(), learn);
    }

    #[test]
    fn transitions() {
        assert_eq!(State::Open.lease(), Ok(State::Leased));
        assert!(State::Leased.lease().is_err());
        assert_eq!(State::Leased.finish(), Ok(State::Done));
        assert_eq!(State::Leased.fail(4), Ok(State::Open));
        assert_eq!(State::Leased.fail(5), Ok(State::Failed));
        for over in [State::Done, State::Failed, State::Cancelled] {
            assert!(over.lease().is_err());
            assert!(over.finish().is_err());
            assert!(over.fail(1).is_err());
        }
    }
}
