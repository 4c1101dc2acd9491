//! A round's states: `draft -> training -> judging -> folding -> published`, or `failed` /
//! `aborted` from any state before the end.

use super::stacker::Choice;
use super::{InvalidTransition, words};
use crate::clock::Timestamp;

/// Why a round ended without a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailReason {
    /// Nobody submitted anything.
    NoSubmissions,
    /// Submissions came, none was accepted.
    NoAccepted,
    /// The best aggregate does not beat the base.
    NoImprovement,
    /// The aggregate improves the gate set, but a guard set gets worse.
    GuardFell,
    /// The base or the chosen aggregate could not be evaluated.
    EvaluationFailed,
    /// No evaluator has answered for longer than judging may wait.
    JudgingOverdue,
    /// The fold refused its input.
    FoldFailed,
    /// The model's head is no longer the round's base.
    HeadMoved,
    /// The base contains a contribution that was revoked; a checkpoint without it takes its place.
    BaseRevoked,
}

words!(FailReason {
    NoSubmissions = "NO_SUBMISSIONS",
    NoAccepted = "NO_ACCEPTED",
    NoImprovement = "NO_IMPROVEMENT",
    GuardFell = "GUARD_FELL",
    EvaluationFailed = "EVALUATION_FAILED",
    JudgingOverdue = "JUDGING_OVERDUE",
    FoldFailed = "FOLD_FAILED",
    HeadMoved = "HEAD_MOVED",
    BaseRevoked = "BASE_REVOKED",
});

/// The reason of a round that was aborted without a word.
pub const ABORTED: &str = "ABORTED";

/// The states by name only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Being made; never seen outside the transaction that makes it.
    Draft,
    /// Shards are handed out.
    Training,
    /// Training is over; the aggregate is being chosen.
    Judging,
    /// The choice is made; the checkpoint is being computed.
    Folding,
    /// The checkpoint is out.
    Published,
    /// Ended without a checkpoint.
    Failed,
    /// Stopped by a maintainer.
    Aborted,
}

words!(State {
    Draft = "draft",
    Training = "training",
    Judging = "judging",
    Folding = "folding",
    Published = "published",
    Failed = "failed",
    Aborted = "aborted",
});

impl State {
    /// Whether nothing more will happen.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Published | Self::Failed | Self::Aborted)
    }
}

/// A round's state with the facts that belong to it.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// Being made.
    Draft,
    /// Shards are handed out.
    Training,
    /// The aggregate is being chosen.
    Judging,
    /// The checkpoint of `choice` is being computed.
    Folding {
        /// What is stacked.
        choice: Choice,
    },
    /// The checkpoint is out.
    Published {
        /// What was stacked.
        choice: Choice,
        /// The new revision.
        revision: u32,
        /// When.
        at: Timestamp,
    },
    /// Ended without a checkpoint.
    Failed {
        /// Why.
        reason: FailReason,
        /// When.
        at: Timestamp,
    },
    /// Stopped by a maintainer.
    Aborted {
        /// In the maintainer's words.
        reason: String,
        /// When.
        at: Timestamp,
    },
}

impl Phase {
    /// The state's name.
    pub const fn state(&self) -> State {
        match self {
            Self::Draft => State::Draft,
            Self::Training => State::Training,
            Self::Judging => State::Judging,
            Self::Folding { .. } => State::Folding,
            Self::Published { .. } => State::Published,
            Self::Failed { .. } => State::Failed,
            Self::Aborted { .. } => State::Aborted,
        }
    }

    /// Opens training.
    ///
    /// # Errors
    /// Unless it is a draft.
    pub fn open(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::Draft => Ok(Self::Training),
            other => Err(other.refuse(State::Training)),
        }
    }

    /// Closes training.
    ///
    /// # Errors
    /// Unless it is training.
    pub fn judge(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::Training => Ok(Self::Judging),
            other => Err(other.refuse(State::Judging)),
        }
    }

    /// Takes the stacker's choice.
    ///
    /// # Errors
    /// Unless it is judging.
    pub fn choose(self, choice: Choice) -> Result<Self, InvalidTransition> {
        match self {
            Self::Judging => Ok(Self::Folding { choice }),
            other => Err(other.refuse(State::Folding)),
        }
    }

    /// What was chosen can no longer be folded: a submission in it has been revoked.
    ///
    /// # Errors
    /// Unless it is folding.
    pub fn choose_again(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::Folding { .. } => Ok(Self::Judging),
            other => Err(other.refuse(State::Judging)),
        }
    }

    /// The checkpoint is stored and the head has moved.
    ///
    /// # Errors
    /// Unless it is folding.
    pub fn publish(self, revision: u32, at: Timestamp) -> Result<Self, InvalidTransition> {
        match self {
            Self::Folding { choice } => Ok(Self::Published {
                choice,
                revision,
                at,
            }),
            other => Err(other.refuse(State::Published)),
        }
    }

    /// Ends it without a checkpoint.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn fail(self, reason: FailReason, at: Timestamp) -> Result<Self, InvalidTransition> {
        if self.state().is_final() {
            return Err(self.refuse(State::Failed));
        }
        Ok(Self::Failed { reason, at })
    }

    /// Stops it.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn abort(self, reason: &str, at: Timestamp) -> Result<Self, InvalidTransition> {
        if self.state().is_final() {
            return Err(self.refuse(State::Aborted));
        }
        let reason = if reason.is_empty() { ABORTED } else { reason };
        Ok(Self::Aborted {
            reason: reason.to_owned(),
            at,
        })
    }

    fn refuse(&self, to: State) -> InvalidTransition {
        InvalidTransition {
            what: "round",
            from: self.state().as_str(),
            to: to.as_str(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice() -> Choice {
        Choice {
            terms: Vec::new(),
            lambda: 1.0,
            tau: 1.0,
            gate_before: 2.0,
            gate_after: 1.0,
            audit_before: None,
            audit_after: None,
            gain: 1.0,
            gain_se: 0.1,
            velocity: Vec::new(),
        }
    }

    #[test]
    fn walks_the_whole_way() {
        let phase = Phase::Draft.open().unwrap().judge().unwrap();
        let phase = phase
            .choose(choice())
            .unwrap()
            .publish(4, Timestamp(9))
            .unwrap();
        assert_eq!(phase.state(), State::Published);
    }

    #[test]
    fn refuses_shortcuts_and_second_ends() {
        assert!(Phase::Draft.judge().is_err());
        assert!(Phase::Training.open().is_err());
        assert!(Phase::Training.choose(choice()).is_err());
        assert!(Phase::Judging.publish(1, Timestamp(0)).is_err());
        let failed = Phase::Judging
            .fail(FailReason::NoImprovement, Timestamp(1))
            .unwrap();
        assert!(failed.clone().abort("", Timestamp(2)).is_err());
        assert!(failed.clone().judge().is_err());
        assert!(failed.fail(FailReason::HeadMoved, Timestamp(2)).is_err());
        let aborted = Phase::Folding { choice: choice() }
            .abort("", Timestamp(1))
            .unwrap();
        assert_eq!(
            aborted,
            Phase::Aborted {
                reason: ABORTED.to_owned(),
                at: Timestamp(1)
            }
        );
        assert!(aborted.publish(1, Timestamp(2)).is_err());
    }

    #[test]
    fn words_round_trip() {
        for state in [
            "draft",
            "training",
            "judging",
            "folding",
            "published",
            "failed",
            "aborted",
        ] {
            assert_eq!(state.parse::<State>().unwrap().as_str(), state);
        }
        assert!("done".parse::<State>().is_err());
        assert_eq!("HEAD_MOVED".parse(), Ok(FailReason::HeadMoved));
    }
}
