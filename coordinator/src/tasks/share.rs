//! What coordinators over one database do for each other: signs of life, wake-ups, and the tasks, each
//! of which one of them runs at a time.
//!
//! Nothing here is needed for what is stored to be right: every write of a task is guarded by what it
//! read. It keeps three coordinators from doing everything three times.
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::{info, warn};

use crate::app::App;
use crate::db::coordinators::{Owner, coordinator_beat, coordinator_leave, task_owner, task_take};
use crate::error::Error;
use crate::limits::{COORDINATOR_ALIVE, COORDINATOR_BEAT, WAKE_INTERVAL};

/// How long a dead coordinator's row is kept, for people who look.
const REMEMBERED: Duration = Duration::from_hours(1);
/// How long to wait before listening again.
const PAUSE: Duration = Duration::from_secs(1);

/// Gives one sign of life.
///
/// # Errors
/// When the database fails.
pub async fn beat(app: &App) -> Result<(), Error> {
    let now = app.clock.now_ms();
    let (until, before) = (now.plus(COORDINATOR_ALIVE), now.minus(REMEMBERED));
    let mut tx = app.db.begin().await?;
    coordinator_beat(&mut tx, &app.id, until, before).await?;
    tx.commit().await
}

/// Gives signs of life until no new work is taken, then takes leave.
pub async fn live(app: &App) {
    let soft = app.lifecycle.soft();
    if !app.db.is_shared() {
        // Whoever has the only data folder is alone, and lets the disk sleep.
        return soft.cancelled().await;
    }
    loop {
        tokio::select! {
            () = tokio::time::sleep(COORDINATOR_BEAT) => {}
            () = soft.cancelled() => break,
        }
        if let Err(problem) = beat(app).await {
            warn!("no sign of life: {}", problem.full());
        }
    }
    if let Err(problem) = leave(app).await {
        warn!("take leave: {}", problem.full());
    }
}

async fn leave(app: &App) -> Result<(), Error> {
    let mut tx = app.db.begin().await?;
    coordinator_leave(&mut tx, &app.id).await?;
    tx.commit().await
}

/// Whether this coordinator runs a task; takes it when nobody who lives does. On SQLite it is alone.
///
/// # Errors
/// When the database fails.
pub async fn is_ours(app: &App, task: &str) -> Result<bool, Error> {
    if !app.db.is_shared() {
        return Ok(true);
    }
    let now = app.clock.now_ms();
    let mut tx = app.db.read().await?;
    let owner = task_owner(&mut tx, task, &app.id, now).await?;
    drop(tx);
    match owner {
        Owner::Own => return Ok(true),
        Owner::Another => return Ok(false),
        Owner::Nobody => {}
    }
    let mut tx = app.db.begin().await?;
    let taken = task_take(&mut tx, task, &app.id, now).await?;
    if taken {
        tx.commit().await?;
        info!("this coordinator runs the task {task} from now on");
    }
    Ok(taken)
}

/// Tells other coordinators what was committed here, many commits at once.
///
/// After the commit and not in it: PostgreSQL lets only one transaction that notifies commit at a
/// time, in the whole server. What a coordinator killed in between does not tell, the period finds.
pub async fn tell(app: &App) {
    let soft = app.lifecycle.soft();
    loop {
        tokio::select! {
            () = app.wake.told.notified() => {}
            () = soft.cancelled() => return,
        }
        if let Err(problem) = app.db.tell(&app.id).await {
            warn!("wake other coordinators: {}", problem.full());
        }
        tokio::time::sleep(WAKE_INTERVAL).await;
    }
}

/// Hears what other coordinators tell, listening anew whenever the line is lost.
pub async fn hear(app: &App) {
    let soft = app.lifecycle.soft();
    app.wake.hears.store(!app.db.is_shared(), Ordering::Relaxed);
    while !soft.is_cancelled() {
        let heard = tokio::select! {
            heard = hear_until_lost(app) => heard,
            () = soft.cancelled() => return,
        };
        match heard {
            // Nobody else can be there.
            Ok(()) => return soft.cancelled().await,
            Err(problem) => {
                app.wake.hears.store(false, Ordering::Relaxed);
                warn!("other coordinators are not heard: {}", problem.full());
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = soft.cancelled() => {}
        }
    }
}

async fn hear_until_lost(app: &App) -> Result<(), Error> {
    let Some(mut ear) = app.db.listen().await? else {
        return Ok(());
    };
    app.wake.hears.store(true, Ordering::Relaxed);
    // Whatever was told while nobody listened.
    app.wake.here();
    loop {
        if ear.next().await? != app.id {
            app.wake.here();
        }
    }
}
