//! Ctrl-C and SIGTERM for commands that run on their own thread.

use std::io;
use std::thread;

use crate::cancel::CancelFlag;

/// What a shell reports of a program that Ctrl-C ended.
pub const EXIT_INTERRUPTED: i32 = 130;

/// Sets the flag at the first signal and ends the process at the second.
///
/// # Errors
/// When the system refuses the thread or the signal handlers.
pub fn cancel_on_signal(cancel: &CancelFlag) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut signals = {
        let _inside = runtime.enter();
        Signals::new()?
    };
    let cancel = cancel.clone();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                signals.next().await;
                cancel.cancel();
                signals.next().await;
                std::process::exit(EXIT_INTERRUPTED);
            });
        })?;
    Ok(())
}

#[cfg(unix)]
/// Ctrl-C and SIGTERM, one after another.
pub(crate) struct Signals(tokio::signal::unix::Signal, tokio::signal::unix::Signal);

#[cfg(unix)]
impl Signals {
    pub(crate) fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self(
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        ))
    }

    pub(crate) async fn next(&mut self) {
        tokio::select! { _ = self.0.recv() => (), _ = self.1.recv() => () }
    }
}

#[cfg(not(unix))]
/// Ctrl-C, one after another.
pub(crate) struct Signals;

#[cfg(not(unix))]
impl Signals {
    #[expect(
        clippy::unnecessary_wraps,
        reason = "the other systems' version can fail"
    )]
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self)
    }

    pub(crate) async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
