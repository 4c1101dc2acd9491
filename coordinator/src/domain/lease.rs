//! A lease: the time-limited, fenced right of one worker to do one unit of work.

use super::words;
use crate::clock::Timestamp;
use crate::ids::{EvaluationId, Generation, LeaseId, RoundId, WorkerId};

/// Where a lease stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Held.
    Active,
    /// Its result was acknowledged.
    Done,
    /// Given back politely.
    Released,
    /// Given back because the work failed.
    Failed,
    /// Ran out, or the round closed over it.
    Expired,
}

words!(State {
    Active = "active",
    Done = "done",
    Released = "released",
    Failed = "failed",
    Expired = "expired",
});

/// What is leased.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// A shard, by position.
    Train(u32),
    /// An evaluation.
    Evaluate(EvaluationId),
}

/// One lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: LeaseId,
    /// The round it belongs to.
    pub round: RoundId,
    /// What it is for.
    pub work: Work,
    /// Who holds it.
    pub worker: WorkerId,
    /// Its generation on that work.
    pub generation: Generation,
    /// 32 random bytes, part of what the result signs.
    pub nonce: Vec<u8>,
    /// Where it stands.
    pub state: State,
    /// When it runs out, unless renewed.
    pub expires: Timestamp,
}

/// Why a lease does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is another worker's, which is none of the caller's business.
    #[error("there is no such lease")]
    NotYours,
    /// It is over, or the generation is not its own.
    #[error("the lease is over")]
    Lost,
}

/// What a result under this lease is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The lease is held: the result counts.
    Held,
    /// It has run out: the result counts only if nobody else has been given the work.
    Grace,
    /// A result was acknowledged before: the same result gets the same answer.
    Answered,
}

impl Lease {
    /// Where a result of `worker` under `generation` stands.
    ///
    /// # Errors
    /// When the lease is not the worker's, or was given back.
    pub fn standing(&self, worker: &WorkerId, generation: Generation) -> Result<Standing, Refusal> {
        if self.worker != *worker {
            return Err(Refusal::NotYours);
        }
        if self.generation != generation {
            return Err(Refusal::Lost);
        }
        match self.state {
            State::Active => Ok(Standing::Held),
            State::Expired => Ok(Standing::Grace),
            State::Done => Ok(Standing::Answered),
            State::Released | State::Failed => Err(Refusal::Lost),
        }
    }

    /// Whether it has run out unnoticed.
    pub fn is_overdue(&self, now: Timestamp) -> bool {
        self.state == State::Active && self.expires <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standing_follows_state_holder_and_generation() {
        let me = WorkerId::new();
        let lease = |state| Lease {
            id: LeaseId::new(),
            round: RoundId::new(),
            work: Work::Train(0),
            worker: me,
            generation: Generation(2),
            nonce: vec![0; 32],
            state,
            expires: Timestamp(10),
        };
        assert_eq!(
            lease(State::Active).standing(&me, Generation(2)),
            Ok(Standing::Held)
        );
        assert_eq!(
            lease(State::Expired).standing(&me, Generation(2)),
            Ok(Standing::Grace)
        );
        assert_eq!(
            lease(State::Done).standing(&me, Generation(2)),
            Ok(Standing::Answered)
        );
        assert_eq!(
            lease(State::Failed).standing(&me, Generation(2)),
            Err(Refusal::Lost)
        );
        assert_eq!(
            lease(State::Active).standing(&me, Generation(1)),
            Err(Refusal::Lost)
        );
        let other = WorkerId::new();
        assert_eq!(
            lease(State::Active).standing(&other, Generation(2)),
            Err(Refusal::NotYours)
        );
        assert!(lease(State::Active).is_overdue(Timestamp(10)));
        assert!(!lease(State::Active).is_overdue(Timestamp(9)));
        assert!(!lease(State::Done).is_overdue(Timestamp(99)));
    }
}
