//! An evaluation's states: `open -> leased -> done`, back to `open` after a failure, and `failed`
//! after five or when the losses are not numbers.

use super::{InvalidTransition, words};

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
