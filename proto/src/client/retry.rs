//! How long to wait before trying again.
use std::time::Duration;

use rand::TryRng;

/// First wait.
const WAIT_FIRST: Duration = Duration::from_millis(250);
/// Longest wait of our own choosing: a herd of workers must find a restarted coordinator within
/// two minutes, and not all at once.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Longest wait a server may ask for.
const WAIT_ASKED_MAX: Duration = Duration::from_mins(5);

/// Exponential back-off with full jitter above half.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    tries: u32,
    waited: Duration,
}

impl Backoff {
    /// The next wait; longer each time, never below what the server asked for.
    pub fn next_wait(&mut self, asked: Option<Duration>) -> Duration {
        let grown = WAIT_FIRST
            .saturating_mul(1 << self.tries.min(10))
            .min(WAIT_MAX);
        self.tries = self.tries.saturating_add(1);
        let jittered = grown.mul_f64(0.5 + 0.5 * fraction());
        let asked = asked.unwrap_or_default().min(WAIT_ASKED_MAX);
        let wait = if asked > jittered {
            asked + jittered.mul_f64(0.1)
        } else {
            jittered
        };
        self.waited += wait;
        wait
    }

    /// How long all waits so far were together.
    #[must_use]
    pub const fn waited(&self) -> Duration {
        self.waited
    }

    /// How many waits there were.
    #[must_use]
    pub const fn tries(&self) -> u32 {
        self.tries
    }

    /// Begins anew, after a success or some progress.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

/// In [0, 1); one half when the system has no random bytes.
fn fraction() -> f64 {
    let mut bytes = [0; 4];
    match rand::rngs::SysRng.try_fill_bytes(&mut bytes) {
        Ok(()) => f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0),
        Err(_) => 0.5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_are_bounded() {
        let mut backoff = Backoff::default();
        let first = backoff.next_wait(None);
        assert!(first >= WAIT_FIRST / 2 && first <= WAIT_FIRST);
        for _ in 0..100 {
            assert!(backoff.next_wait(None) <= WAIT_MAX);
        }
        let asked = Duration::from_mins(1);
        assert!(backoff.next_wait(Some(asked)) >= asked);
        assert!(backoff.next_wait(Some(Duration::from_secs(1 << 40))) <= WAIT_ASKED_MAX + WAIT_MAX);
        backoff.reset();
        assert!(backoff.next_wait(None) <= WAIT_FIRST);
    }
}
