//! What happens without being asked.
//!
//! A task takes no input and is idempotent: it reads what is, compares it with what should be, and
//! does at most one bounded batch. It runs when woken *and* on a period, and listens before it
//! looks, so that neither a lost wake nor a crash loses anything. Of several coordinators over one
//! database one runs a task, as long as it lives: [`share`].
pub mod advance_rounds;
pub mod collect_blobs;
pub mod expire_leases;
pub mod fold_round;
pub mod judge_submissions;
pub mod refold;
pub mod seal_verdicts;
pub mod share;

use std::future::Future;
use std::time::Duration;

use tokio::sync::Notify;
use tracing::error;

use crate::app::App;
use crate::error::Error;
use crate::lifecycle::Lifecycle;

/// How often leases and deadlines are looked at: people notice seconds.
const TICK: Duration = Duration::from_secs(1);
/// How often tasks that are woken look without being woken: for what another coordinator did.
const PERIOD: Duration = Duration::from_secs(5);
/// How often garbage is looked for: it has to be a day old anyway.
const GARBAGE_PERIOD: Duration = Duration::from_mins(10);
/// How long a task rests after a failure.
const PAUSE: Duration = Duration::from_secs(5);

/// Whether a task has done all there was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// Nothing is left for now.
    All,
    /// Its batch was full, or what it did may make more possible: look again at once.
    Part,
}

/// Starts every task. The coordinator must have given a sign of life.
pub fn start(app: &App, lifecycle: &Lifecycle) {
    let one = app.clone();
    lifecycle.spawn_critical("give signs of life", async move { share::live(&one).await });
    let one = app.clone();
    lifecycle.spawn_critical("tell others", async move { share::tell(&one).await });
    let one = app.clone();
    lifecycle.spawn_critical("hear others", async move { share::hear(&one).await });
    let one = app.clone();
    lifecycle.spawn_critical("sweep uploads", async move {
        // The folder is this coordinator's own.
        let sweep = |app| async move { collect_blobs::sweep_uploads(app).await.map(Some) };
        repeat_if(&one, "sweep uploads", None, GARBAGE_PERIOD, sweep).await;
    });
    let judge = app.clone();
    lifecycle.spawn_critical("judge submissions", async move {
        let woken = judge.clone();
        repeat(
            &judge,
            "judge submissions",
            Some(&woken.wake.judge),
            PERIOD,
            judge_submissions::run,
        )
        .await;
    });
    let advance = app.clone();
    lifecycle.spawn_critical("advance rounds", async move {
        let woken = advance.clone();
        repeat(
            &advance,
            "advance rounds",
            Some(&woken.wake.rounds),
            TICK,
            advance_rounds::run,
        )
        .await;
    });
    let fold = app.clone();
    lifecycle.spawn_critical("fold rounds", async move {
        repeat(&fold, "fold rounds", None, TICK, fold_round::run).await;
    });
    let again = app.clone();
    lifecycle.spawn_critical("fold again", async move {
        repeat(&again, "fold again", None, TICK, refold::run).await;
    });
    let seal = app.clone();
    lifecycle.spawn_critical("seal verdicts", async move {
        repeat(&seal, "seal verdicts", None, TICK, seal_verdicts::run).await;
    });
    let expire = app.clone();
    lifecycle.spawn_critical("expire leases", async move {
        repeat(&expire, "expire leases", None, TICK, expire_leases::run).await;
    });
    let collect = app.clone();
    lifecycle.spawn_critical("collect blobs", async move {
        repeat(
            &collect,
            "collect blobs",
            None,
            GARBAGE_PERIOD,
            collect_blobs::run,
        )
        .await;
    });
}

/// Runs a task until no new work is taken, while no other coordinator does.
async fn repeat<'a, F>(
    app: &'a App,
    name: &'static str,
    wake: Option<&Notify>,
    period: Duration,
    task: impl Fn(&'a App) -> F,
) where
    F: Future<Output = Result<Done, Error>>,
{
    let task = |app| {
        let run = task(app);
        async move {
            if share::is_ours(app, name).await? {
                run.await.map(Some)
            } else {
                Ok(None)
            }
        }
    };
    repeat_if(app, name, wake, period, task).await;
}

/// Runs a task until no new work is taken. It says nothing when it is not its turn.
async fn repeat_if<'a, F>(
    app: &'a App,
    name: &'static str,
    wake: Option<&Notify>,
    period: Duration,
    task: impl Fn(&'a App) -> F,
) where
    F: Future<Output = Result<Option<Done>, Error>>,
{
    let soft = app.lifecycle.soft();
    let never = Notify::new();
    while !soft.is_cancelled() {
        let woken = wake.unwrap_or(&never).notified();
        tokio::pin!(woken);
        woken.as_mut().enable();
        // A task that is cut off between two commits is taken up again at the next start.
        let result = tokio::select! {
            result = task(app) => result,
            () = soft.cancelled() => return,
        };
        let (wait, wakes) = match result {
            Ok(Some(Done::Part)) => continue,
            Ok(Some(Done::All)) => (period, true),
            // Whoever has it is woken as well.
            Ok(None) => (TICK, false),
            Err(problem) => {
                error!("{name}: {}", problem.full());
                (PAUSE, true)
            }
        };
        tokio::select! {
            () = woken, if wakes => {}
            () = tokio::time::sleep(wait) => {}
            () = soft.cancelled() => {}
        }
    }
}

/// Runs every task again and again until none has anything left to do: what the loops of [`start`]
/// come to, without waiting. For tests and tools.
///
/// # Errors
/// The first failure of a task.
pub async fn settle(app: &App) -> Result<(), Error> {
    loop {
        let done = [
            expire_leases::run(app).await?,
            judge_submissions::run(app).await?,
            advance_rounds::run(app).await?,
            fold_round::run(app).await?,
            refold::run(app).await?,
            seal_verdicts::run(app).await?,
        ];
        if done.iter().all(|done| *done == Done::All) {
            return Ok(());
        }
    }
}
