//! One life for the whole process: `soft` stops taking work, `hard` stops everything.
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

/// The shutdown tokens and every task that runs. Clones share both.
#[derive(Debug, Clone, Default)]
pub struct Lifecycle {
    soft: CancellationToken,
    hard: CancellationToken,
    tracker: TaskTracker,
    failed: Arc<AtomicBool>,
}

impl Lifecycle {
    /// A fresh life.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancelled when no new work is to be taken.
    #[must_use]
    pub fn soft(&self) -> &CancellationToken {
        &self.soft
    }

    /// Cancelled when everything is to stop at once.
    #[must_use]
    pub fn hard(&self) -> &CancellationToken {
        &self.hard
    }

    /// Whether no new work is taken any more.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.soft.is_cancelled()
    }

    /// Runs something that may end by itself, and waits for it when draining; `hard` drops it.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let hard = self.hard.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                () = task => {}
                () = hard.cancelled() => {}
            }
        });
    }

    /// Runs something that must not end before `soft` is cancelled. If it does, the process drains
    /// and reports failure.
    pub fn spawn_critical(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let (soft, hard, failed) = (self.soft.clone(), self.hard.clone(), self.failed.clone());
        let inner = self.tracker.spawn(task);
        self.tracker.spawn(async move {
            let abort = inner.abort_handle();
            let ended = tokio::select! {
                ended = inner => ended,
                () = hard.cancelled() => {
                    abort.abort();
                    return;
                }
            };
            if let Err(problem) = &ended {
                error!("task {name} panicked: {problem}");
            } else if !soft.is_cancelled() {
                error!("task {name} ended by itself");
            }
            if ended.is_err() || !soft.is_cancelled() {
                failed.store(true, Ordering::SeqCst);
                soft.cancel();
            }
        });
    }

    /// Waits until `soft` is cancelled, then lets tasks finish for `grace`, then stops them.
    /// Returns whether all went well.
    pub async fn run_until_drained(&self, grace: Duration) -> bool {
        self.soft.cancelled().await;
        self.tracker.close();
        info!(
            "draining: no new work, up to {} s for what runs",
            grace.as_secs()
        );
        tokio::select! {
            () = self.tracker.wait() => {}
            () = self.hard.cancelled() => warn!("stopping at once"),
            () = tokio::time::sleep(grace) => warn!("grace is over, stopping what still runs"),
        }
        self.hard.cancel();
        // Dropped tasks need a moment to unwind; blocking ones are left to the runtime's end.
        let _ = tokio::time::timeout(Duration::from_secs(5), self.tracker.wait()).await;
        !self.failed.load(Ordering::SeqCst)
    }
}

/// First SIGTERM or Ctrl-C cancels `soft`, the second one `hard`.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn watch_signals(lifecycle: &Lifecycle) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (soft, hard) = (lifecycle.soft.clone(), lifecycle.hard.clone());
    // Not tracked: it must outlive the drain to see a second signal.
    tokio::spawn(async move {
        for token in [soft, hard] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            token.cancel();
        }
    });
    Ok(())
}
