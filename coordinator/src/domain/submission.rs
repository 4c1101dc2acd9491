//! A submission's states: `received -> evaluating -> accepted`, or `rejected` from either.

use cairn_proto::reason::VerdictReason;

use super::statistics::Paired;
use super::{InvalidTransition, words};
use crate::clock::Timestamp;

/// The states by name only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Acknowledged; the cheap checks are ahead.
    Received,
    /// Sound; being evaluated alone.
    Evaluating,
    /// It improves the model.
    Accepted,
    /// It does not count.
    Rejected,
}

words!(State {
    Received = "received",
    Evaluating = "evaluating",
    Accepted = "accepted",
    Rejected = "rejected",
});

/// What the gate said of an accepted submission.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Loss on the gate set.
    pub gate_loss: f64,
    /// Loss on the audit set, where there is one.
    pub audit_loss: Option<f64>,
    /// Improvement over the base on the gate set.
    pub paired: Paired,
}

/// A submission's state with the facts that belong to it.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Acknowledged. The norm is known once the structure has been found sound.
    Received {
        /// Product-space norm.
        norm: Option<f64>,
    },
    /// Being evaluated alone.
    Evaluating {
        /// Product-space norm.
        norm: f64,
    },
    /// It improves the model.
    Accepted {
        /// Product-space norm.
        norm: f64,
        /// What the gate said.
        score: Score,
        /// When.
        at: Timestamp,
    },
    /// It does not count.
    Rejected {
        /// The stable word.
        reason: VerdictReason,
        /// What the volunteer reads.
        detail: String,
        /// When.
        at: Timestamp,
    },
}

impl Progress {
    /// The state's name.
    pub const fn state(&self) -> State {
        match self {
            Self::Received { .. } => State::Received,
            Self::Evaluating { .. } => State::Evaluating,
            Self::Accepted { .. } => State::Accepted,
            Self::Rejected { .. } => State::Rejected,
        }
    }

    /// Whether there is no verdict yet.
    pub const fn is_undecided(&self) -> bool {
        matches!(self, Self::Received { .. } | Self::Evaluating { .. })
    }

    /// The structure is sound.
    ///
    /// # Errors
    /// Unless it was just received.
    pub fn measure(self, norm: f64) -> Result<Self, InvalidTransition> {
        match self {
            Self::Received { norm: None } => Ok(Self::Received { norm: Some(norm) }),
            other => Err(other.refuse(State::Received)),
        }
    }

    /// Its evaluation is opened.
    ///
    /// # Errors
    /// Unless it is received and measured.
    pub fn evaluate(self) -> Result<Self, InvalidTransition> {
        match self {
            Self::Received { norm: Some(norm) } => Ok(Self::Evaluating { norm }),
            other => Err(other.refuse(State::Evaluating)),
        }
    }

    /// The gate accepts it.
    ///
    /// # Errors
    /// Unless it is being evaluated.
    pub fn accept(self, score: Score, at: Timestamp) -> Result<Self, InvalidTransition> {
        match self {
            Self::Evaluating { norm } => Ok(Self::Accepted { norm, score, at }),
            other => Err(other.refuse(State::Accepted)),
        }
    }

    /// A check refuses it.
    ///
    /// # Errors
    /// When it has been decided already.
    pub fn reject(
        self,
        reason: VerdictReason,
        detail: String,
        at: Timestamp,
    ) -> Result<Self, InvalidTransition> {
        match self {
            Self::Received { .. } | Self::Evaluating { .. } => {
                Ok(Self::Rejected { reason, detail, at })
            }
            other => Err(other.refuse(State::Rejected)),
        }
    }

    fn refuse(&self, to: State) -> InvalidTransition {
        InvalidTransition {
            what: "submission",
            from: self.state().as_str(),
            to: to.as_str(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCORE: Score = Score {
        gate_loss: 1.0,
        audit_loss: None,
        paired: Paired {
            gain: 0.1,
            se: 0.01,
            records: 9,
        },
    };

    #[test]
    fn the_straight_way() {
        let progress = Progress::Received { norm: None }
            .measure(2.0)
            .unwrap()
            .evaluate()
            .unwrap();
        let accepted = progress.accept(SCORE, Timestamp(3)).unwrap();
        assert_eq!(accepted.state(), State::Accepted);
        let late = accepted.reject(VerdictReason::NoGain, String::new(), Timestamp(4));
        assert!(late.is_err());
    }

    #[test]
    fn no_check_is_skipped_and_no_verdict_changes() {
        assert!(Progress::Received { norm: None }.evaluate().is_err());
        assert!(
            Progress::Received { norm: Some(1.0) }
                .accept(SCORE, Timestamp(1))
                .is_err()
        );
        assert!(Progress::Received { norm: Some(1.0) }.measure(2.0).is_err());
        let rejected = Progress::Received { norm: None }
            .reject(VerdictReason::BadHeader, "x".to_owned(), Timestamp(1))
            .unwrap();
        assert!(rejected.clone().evaluate().is_err());
        assert!(rejected.clone().accept(SCORE, Timestamp(2)).is_err());
        assert!(
            rejected
                .reject(VerdictReason::NoGain, String::new(), Timestamp(2))
                .is_err()
        );
    }
}
