//! A shard's states: `open -> leased -> submitted -> done`, back to `open` after each failure, and
//! `stopped` when three different workers have failed on it.

use super::{InvalidTransition, words};
use crate::ids::Generation;

/// Different workers that may fail on a shard before it is stopped: one may be broken, two may be
/// unlucky, three mean that it is the shard.
pub const FAILED_WORKERS_MAX: u64 = 3;

/// Where a shard stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Waiting for a worker.
    Open,
    /// A worker holds the newest lease.
    Leased,
    /// An adapter is acknowledged and being judged.
    Submitted,
    /// Its adapter was accepted.
    Done,
    /// Given up for this round.
    Stopped,
}

words!(State {
    Open = "open",
    Leased = "leased",
    Submitted = "submitted",
    Done = "done",
    Stopped = "stopped",
});

/// A shard's state and the generation of its newest lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Where it stands.
    pub state: State,
    /// Of the newest lease; 0 before the first.
    pub generation: Generation,
}

impl Shard {
    /// Hands it out under a new generation, which voids every older lease.
    ///
    /// # Errors
    /// Unless it is open.
    pub fn lease(self) -> Result<Self, InvalidTransition> {
        match self.state {
            State::Open => Ok(Self {
                state: State::Leased,
                generation: Generation(self.generation.0 + 1),
            }),
            _ => Err(self.refuse(State::Leased)),
        }
    }

    /// Takes the adapter of the newest lease: also when that lease has run out and nobody else has
    /// got the shard since.
    ///
    /// # Errors
    /// When a newer lease exists or the shard is not waiting for an adapter.
    pub fn submit(self, generation: Generation) -> Result<Self, InvalidTransition> {
        let newest = generation == self.generation && generation > Generation(0);
        match self.state {
            State::Leased | State::Open if newest => Ok(Self {
                state: State::Submitted,
                ..self
            }),
            _ => Err(self.refuse(State::Submitted)),
        }
    }

    /// The newest lease had run out and is taken up again by its holder.
    ///
    /// # Errors
    /// When a newer lease exists or the shard is not open.
    pub fn resume(self, generation: Generation) -> Result<Self, InvalidTransition> {
        let newest = generation == self.generation && generation > Generation(0);
        match self.state {
            State::Open if newest => Ok(Self {
                state: State::Leased,
                ..self
            }),
            _ => Err(self.refuse(State::Leased)),
        }
    }

    /// Its adapter was accepted.
    ///
    /// # Errors
    /// Unless one is being judged.
    pub fn accept(self) -> Result<Self, InvalidTransition> {
        match self.state {
            State::Submitted => Ok(Self {
                state: State::Done,
                ..self
            }),
            _ => Err(self.refuse(State::Done)),
        }
    }

    /// The lease or the adapter came to nothing; `failed_workers` different ones have failed so far.
    ///
    /// # Errors
    /// Unless it is leased or being judged.
    pub fn reopen(self, failed_workers: u64) -> Result<Self, InvalidTransition> {
        let stopped = failed_workers >= FAILED_WORKERS_MAX;
        let state = if stopped { State::Stopped } else { State::Open };
        match self.state {
            State::Leased | State::Submitted => Ok(Self { state, ..self }),
            _ => Err(self.refuse(state)),
        }
    }

    /// Its accepted adapter was revoked: it is trained again.
    ///
    /// # Errors
    /// Unless it is done.
    pub fn revoke(self) -> Result<Self, InvalidTransition> {
        match self.state {
            State::Done => Ok(Self {
                state: State::Open,
                ..self
            }),
            _ => Err(self.refuse(State::Open)),
        }
    }

    fn refuse(self, to: State) -> InvalidTransition {
        InvalidTransition {
            what: "shard",
            from: self.state.as_str(),
            to: to.as_str(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Shard = Shard {
        state: State::Open,
        generation: Generation(0),
    };

    #[test]
    fn the_straight_way() {
        let shard = OPEN.lease().unwrap();
        assert_eq!(shard.generation, Generation(1));
        assert!(shard.lease().is_err());
        let shard = shard.submit(Generation(1)).unwrap();
        assert!(shard.submit(Generation(1)).is_err());
        assert_eq!(shard.accept().unwrap().state, State::Done);
    }

    #[test]
    fn an_older_lease_is_fenced() {
        let shard = OPEN.lease().unwrap().reopen(1).unwrap();
        assert_eq!(shard.resume(Generation(1)).unwrap().state, State::Leased);
        // In grace: run out, not given to another.
        assert!(shard.submit(Generation(1)).is_ok());
        let shard = shard.lease().unwrap();
        assert!(shard.submit(Generation(1)).is_err());
        assert!(shard.submit(Generation(2)).is_ok());
        assert!(shard.resume(Generation(2)).is_err());
        assert!(OPEN.submit(Generation(0)).is_err());
        assert!(OPEN.resume(Generation(0)).is_err());
    }

    #[test]
    fn three_different_workers_stop_it() {
        let shard = OPEN.lease().unwrap();
        assert_eq!(shard.reopen(2).unwrap().state, State::Open);
        let stopped = shard.reopen(3).unwrap();
        assert_eq!(stopped.state, State::Stopped);
        assert!(stopped.lease().is_err());
        assert!(stopped.submit(Generation(1)).is_err());
        assert!(stopped.accept().is_err());
        assert!(OPEN.reopen(1).is_err());
    }
}
