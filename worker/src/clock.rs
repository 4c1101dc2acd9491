//! The one place that reads the machine's clock; everything else is handed times.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Measures from when it was made.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this module is the exception")]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Seconds since the start.
    #[must_use]
    pub fn seconds(self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}

/// What this machine's clock says; it may be wrong, so nothing may depend on more than order.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this module is the exception")]
pub fn system_time() -> SystemTime {
    SystemTime::now()
}

/// Milliseconds since 1970 by this machine's clock.
#[must_use]
pub fn now_ms() -> i64 {
    let since = system_time().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
