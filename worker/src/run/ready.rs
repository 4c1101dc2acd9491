//! Before the first claim: a device that computes what it should, or the wait for one.
//!
//! Work done on a device that computes wrong would be rejected, and look like cheating. So it is not
//! claimed: the worker pauses, says why, and tries again. Nobody is told, nothing is given back.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use cairn_proto::identity::write_private;

use crate::clock::{Stopwatch, now_ms};
use crate::device::probe::Canary;
use crate::device::{DeviceError, DeviceName, Settled};
use crate::error::WorkerError;

/// Longest note read, bytes; real ones have some hundred.
const NOTE_BYTES_MAX: u64 = 64 << 10;

/// What was found out about the device, kept in the home folder for `status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceNote {
    /// When, by this machine's clock.
    pub checked_ms: i64,
    /// The device that is worked on.
    pub device: Option<String>,
    /// How its canary did.
    pub canary: Option<Canary>,
    /// Why nothing is worked on.
    pub paused: Option<String>,
}

impl DeviceNote {
    /// The note in a file, where there is a whole one.
    #[must_use]
    pub fn read(path: &Path) -> Option<Self> {
        if fs::metadata(path).ok()?.len() > NOTE_BYTES_MAX {
            return None;
        }
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    fn write(&self, path: &Path) -> Result<(), WorkerError> {
        let json = serde_json::to_vec(self).unwrap_or_default();
        write_private(path, &json).map_err(WorkerError::home("write", path))
    }
}

impl fmt::Display for DeviceNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.device, &self.canary, &self.paused) {
            (_, _, Some(reason)) => write!(f, "paused: {reason}"),
            (Some(device), Some(canary), _) => write!(f, "{device}, {canary}"),
            (device, _, _) => f.write_str(device.as_deref().unwrap_or("not tried yet")),
        }
    }
}

/// How a device is settled on; blocks while it is tried.
pub type Settle = Arc<dyn Fn() -> Result<Settled, DeviceError> + Send + Sync>;

/// How long to wait for a device.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Between two tries.
    pub again: Duration,
    /// Try once only, and fail.
    pub once: bool,
    /// Leave after so long.
    pub leave_after: Option<Duration>,
}

/// Tries until there is a device to work on; `None` when it is time to leave.
///
/// # Errors
/// When there is none and a single try was asked for, or the note cannot be written.
pub async fn device(
    note: &Path,
    patience: Patience,
    stop: &CancellationToken,
    settle: &Settle,
) -> Result<Option<DeviceName>, WorkerError> {
    let since = Stopwatch::start();
    loop {
        let settle = settle.clone();
        let settled = tokio::task::spawn_blocking(move || settle()).await;
        let settled = settled.map_err(|error| WorkerError::Panicked(error.to_string()))?;
        let mut found = DeviceNote {
            checked_ms: now_ms(),
            device: None,
            canary: None,
            paused: None,
        };
        let error = match settled {
            Ok(Settled { name, report }) => {
                found.device = Some(name.to_string());
                found.canary = report.canary;
                found.write(note)?;
                eprintln!("device {found}");
                return Ok(Some(name));
            }
            Err(error) => error,
        };
        found.paused = Some(error.to_string());
        found.write(note)?;
        if patience.once {
            return Err(error.into());
        }
        let minutes = patience.again.as_secs() / 60;
        eprintln!("{found}\ntrying again in {minutes} minutes");
        let left = patience
            .leave_after
            .map(|limit| limit.saturating_sub(Duration::from_secs_f64(since.seconds())));
        tokio::select! {
            () = stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(left.unwrap_or(patience.again).min(patience.again)) => (),
        }
        if left.is_some_and(|left| left <= patience.again) {
            eprintln!("no device to work on for a while; leaving");
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::device::choice::fastest;
    use crate::device::probe::{Depth, here};
    use crate::model::ops::bent::{Bend, with};

    const SOON: Patience = Patience {
        again: Duration::from_millis(1),
        once: false,
        leave_after: None,
    };

    /// The CPU device, its kernels bent for the first few tries.
    fn bent_at_first(tries: u32) -> Settle {
        let done = AtomicU32::new(0);
        Arc::new(move || {
            let name = DeviceName::default();
            let bend = (done.fetch_add(1, Ordering::Relaxed) < tries).then_some(Bend::Mask);
            fastest(vec![(name, with(bend, || here(name, Depth::Small)))])
        })
    }

    #[tokio::test]
    async fn a_device_that_computes_wrong_pauses_until_it_does_not() {
        let home = tempfile::tempdir().unwrap();
        let note = home.path().join("device.json");
        let stop = CancellationToken::new();
        let once = Patience { once: true, ..SOON };
        let error = device(&note, once, &stop, &bent_at_first(1))
            .await
            .unwrap_err();
        let reason = error.to_string();
        assert!(
            reason.contains("wrong: ") && reason.contains("is allowed; "),
            "{reason}"
        );
        let paused = DeviceNote::read(&note).unwrap();
        assert_eq!(
            (paused.device.as_ref(), paused.paused.as_ref()),
            (None, Some(&reason))
        );
        assert!(
            paused
                .to_string()
                .starts_with("paused: this device computes ")
        );

        let name = device(&note, SOON, &stop, &bent_at_first(2)).await.unwrap();
        assert_eq!(name, Some(DeviceName::default()));
        let sound = DeviceNote::read(&note).unwrap();
        assert_eq!(sound.paused, None);
        assert!(sound.canary.unwrap().passed);
    }

    #[tokio::test]
    async fn a_pause_ends_with_the_wish_to_stop_and_with_patience() {
        let home = tempfile::tempdir().unwrap();
        let note = home.path().join("device.json");
        let stop = CancellationToken::new();
        let leave_after = Some(Duration::ZERO);
        let idle = Patience {
            leave_after,
            ..SOON
        };
        let never = bent_at_first(u32::MAX);
        assert_eq!(device(&note, idle, &stop, &never).await.unwrap(), None);
        stop.cancel();
        let long = Patience {
            again: Duration::from_hours(1),
            ..SOON
        };
        assert_eq!(device(&note, long, &stop, &never).await.unwrap(), None);
        fs::write(&note, "{").unwrap();
        assert_eq!(DeviceNote::read(&note), None);
    }
}
