//! The one place that reads the time.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970.
#[expect(clippy::disallowed_methods, reason = "this is the clock module")]
pub fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A point in time to measure from.
#[expect(clippy::disallowed_methods, reason = "this is the clock module")]
pub fn start() -> Instant {
    Instant::now()
}

/// `2026-11-23 17:04 UTC`.
pub fn date(ms: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute] UTC");
    time::OffsetDateTime::from_unix_timestamp(ms.div_euclid(1000))
        .ok()
        .and_then(|date| date.format(&format).ok())
        .unwrap_or_else(|| "-".to_owned())
}
