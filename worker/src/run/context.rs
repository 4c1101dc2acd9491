//! What every stage needs, and calls that outlive a coordinator's absence.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use cairn_proto::client::{Backoff, Client, ClientError};

use crate::cache::Cache;
use crate::device::DeviceName;
use crate::limits::LINES_REMEMBERED;

/// Shared by all stages.
pub struct Context {
    /// Signed on as this machine.
    pub client: Client,
    /// Downloads.
    pub cache: Cache,
    /// Folder of unfinished work.
    pub work: PathBuf,
    /// Folder of local training checkpoints.
    pub checkpoints: PathBuf,
    /// Folder of receipts.
    pub receipts: PathBuf,
    /// Folder of submissions that are not settled.
    pub submitted: PathBuf,
    /// File that says which device is worked on, or why none.
    pub device_note: PathBuf,
    /// One unit, then stop.
    pub once: bool,
    /// Stop after so long without work.
    pub exit_when_idle: Option<Duration>,
    /// Keep leases when stopping.
    pub keep_lease: bool,
    /// Seconds between local checkpoints.
    pub checkpoint_seconds: f64,
    /// The wish to stop, and whether the coordinator answers.
    pub state: State,
}

/// A [`Context`], shared.
pub type Ctx = Arc<Context>;

/// What changes while it runs.
#[derive(Default)]
pub struct State {
    /// Cancelled by the first signal: take no more work.
    pub soft: CancellationToken,
    /// Cancelled some time later: stop waiting for the coordinator.
    pub give_up: CancellationToken,
    /// The device, once there is one; nothing is claimed before.
    pub device: OnceLock<DeviceName>,
    /// Wakes the look at verdicts and audits.
    pub look: Notify,
    down: AtomicBool,
    said: Mutex<HashSet<String>>,
}

impl State {
    /// Prints a line about something that is tried again and again, unless it has been printed.
    pub fn say_once(&self, line: String) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= LINES_REMEMBERED {
            said.clear();
        }
        if !said.contains(&line) {
            eprintln!("{line}");
            said.insert(line);
        }
    }

    /// The coordinator did not answer. Said once.
    pub fn down(&self, error: &ClientError) {
        if !self.down.swap(true, Ordering::Relaxed) {
            eprintln!("{error}; work goes on, trying again meanwhile");
        }
    }

    /// The coordinator answered.
    pub fn up(&self) {
        if self.down.swap(false, Ordering::Relaxed) {
            eprintln!("the coordinator answers again");
        }
    }
}

/// How a patient call ended.
pub enum Patient<T> {
    /// With an answer.
    Answer(T),
    /// Because `stop` was cancelled first.
    Stopped,
}

impl Context {
    /// The device that is worked on.
    pub fn device(&self) -> DeviceName {
        self.state.device.get().copied().unwrap_or_default()
    }

    /// Repeats a call until it is answered, for as long as nobody stops it. What trying again
    /// cannot help is an error at once.
    pub async fn patiently<T, Fut>(
        &self,
        stop: &CancellationToken,
        call: impl Fn() -> Fut,
    ) -> Result<Patient<T>, ClientError>
    where
        Fut: Future<Output = Result<T, ClientError>>,
    {
        let mut backoff = Backoff::default();
        loop {
            let answer = tokio::select! {
                answer = call() => answer,
                () = stop.cancelled() => return Ok(Patient::Stopped),
            };
            let error = match answer {
                Ok(answer) => {
                    self.state.up();
                    return Ok(Patient::Answer(answer));
                }
                Err(error) if !error.retry() => {
                    self.state.up();
                    return Err(error);
                }
                Err(error) => error,
            };
            self.state.down(&error);
            tokio::select! {
                () = tokio::time::sleep(backoff.next_wait(error.retry_after())) => (),
                () = stop.cancelled() => return Ok(Patient::Stopped),
            }
        }
    }
}
