//! `cairn-worker run`: claims work, does it, hands it in, until told to stop.
//!
//! Three stages joined by channels of capacity one: `pick` claims and fetches, `work` trains
//! or evaluates, `submit` hands in. Only the picker is stopped; the rest drains. Beside them run
//! a renewal for each lease (`renew`) and a look at the verdicts now and then (`verdicts`), which
//! also opens training states for an audit (`audits`) and hands in again what a coordinator lost
//! (`restore`), both from what is `kept` of submissions that are not settled.
//!
//! Nothing is claimed before there is a device that computes what it should (`ready`).
//! A machine holds one lease at a time: a unit carries the permit for it from claim to hand-in.

mod audits;
mod context;
mod evaluation;
mod fetch;
mod findings;
mod fit;
mod hand_in;
mod kept;
mod learning;
mod pick;
mod ready;
mod renew;
mod restore;
mod submit;
mod training;
mod unit;
mod verdicts;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use cairn_proto::client::{Client, Options};
use cairn_proto::convert::role_word;
use cairn_proto::v1;

use crate::cache::Cache;
use crate::device::Depth;
use crate::error::WorkerError;
use crate::home::Home;
use crate::interrupt::{EXIT_INTERRUPTED, Signals};
use crate::limits::{Allowed, DRAIN};
use context::{Context, Ctx, State};
pub use ready::DeviceNote;
use ready::Settle;

/// The note about the device in the home folder.
const DEVICE_NOTE: &str = "device.json";

/// Work for the coordinator this machine has joined, until stopped
///
/// The first Ctrl-C or SIGTERM finishes work that is nearly done, or puts it down with a local
/// checkpoint and gives it back; a second one stops at once. Work that is trained but not handed
/// in yet goes in at the next start.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  cairn-worker run\n  cairn-worker run --device cuda:0\n  cairn-worker run --threads 4 --cache-gib 20\n  cairn-worker run --once"
)]
pub struct RunArgs {
    /// What this machine may do.
    #[command(flatten)]
    pub allowed: Allowed,
    /// Do one unit of work, then exit
    #[arg(long)]
    pub once: bool,
    /// Exit when there has been no work for so long
    #[arg(long, value_name = "SECONDS")]
    pub exit_when_idle: Option<u32>,
    /// When stopped, keep the lease until it runs out instead of giving it back, to go on soon
    #[arg(long)]
    pub keep_lease: bool,
    /// Seconds between local checkpoints of a training
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub checkpoint_seconds: u32,
    /// Allow cairn+insecure:// to another machine: anybody in between can read and change all of it
    #[arg(long)]
    pub force_insecure: bool,
    /// Where identity, cache and unfinished work are kept
    #[arg(long, env = "CAIRN_HOME", value_name = "DIR")]
    pub home: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// When this machine has not joined, is no longer welcome, or its home cannot be used.
pub async fn run(args: RunArgs) -> Result<(), WorkerError> {
    let home = Home::new(args.home.as_deref())?;
    let identity = home.identity()?;
    if identity.role == v1::Role::Maintainer {
        return Err(WorkerError::NoWork);
    }
    let _lock = home.lock()?;
    args.allowed.device.check()?;
    set_threads(args.allowed.threads)?;
    eprintln!(
        "{} {} at {}",
        role_word(identity.role),
        identity.display_name,
        identity.server.authority()
    );
    let options = Options {
        force_insecure: args.force_insecure,
        ..Options::default()
    };
    let cache = Cache::open(&home.folder("cache")?, args.allowed.cache_bytes_max())?;
    let context = Arc::new(Context {
        client: Client::new(identity, options)?,
        cache,
        work: home.folder("work")?,
        checkpoints: home.folder("checkpoints")?,
        receipts: home.folder("receipts")?,
        submitted: home.folder("submitted")?,
        device_note: home.path.join(DEVICE_NOTE),
        once: args.once,
        exit_when_idle: args
            .exit_when_idle
            .map(|s| Duration::from_secs(u64::from(s))),
        keep_lease: args.keep_lease,
        checkpoint_seconds: f64::from(args.checkpoint_seconds),
        state: State::default(),
    });
    let device = args.allowed.device;
    stages(context, Arc::new(move || device.settle(Depth::Whole))).await
}

async fn stages(context: Ctx, settle: Settle) -> Result<(), WorkerError> {
    let signals = Signals::new().map_err(|error| WorkerError::Setup(error.to_string()))?;
    let (to_work, work_in) = mpsc::channel(1);
    let (to_submit, submit_in) = mpsc::channel(1);
    let permits = Arc::new(Semaphore::new(1));

    let mut beside = JoinSet::new();
    beside.spawn(watch_signals(signals, context.clone()));
    beside.spawn(drain_limit(context.clone()));
    let verdicts = beside.spawn(verdicts::watch(context.clone()));

    let mut line = JoinSet::new();
    line.spawn(pick::run(context.clone(), permits, to_work, settle));
    line.spawn(work::run(context.clone(), work_in, to_submit));
    line.spawn(submit::run(context.clone(), submit_in));

    let mut result = Ok(());
    while let Some(ended) = line.join_next().await {
        let ended = ended
            .map_err(|error| WorkerError::Panicked(error.to_string()))
            .flatten();
        if ended.is_err() && result.is_ok() {
            // One stage failing ends the others as a signal would; what is done is handed in.
            context.state.soft.cancel();
            result = ended;
        }
    }
    // An audit that was asked for is answered before we leave, within the time there is for it.
    verdicts.abort();
    audits::finish(&context).await;
    beside.abort_all();
    result
}

async fn watch_signals(mut signals: Signals, context: Ctx) {
    signals.next().await;
    eprintln!("stopping: no new work is taken; once more to stop at once");
    context.state.soft.cancel();
    signals.next().await;
    eprintln!("stopped at once; unfinished work goes on at the next start if its lease holds");
    std::process::exit(EXIT_INTERRUPTED);
}

async fn drain_limit(context: Ctx) {
    context.state.soft.cancelled().await;
    tokio::time::sleep(DRAIN).await;
    context.state.give_up.cancel();
    std::future::pending::<()>().await;
}

fn set_threads(threads: Option<u16>) -> Result<(), WorkerError> {
    let Some(threads) = threads else {
        return Ok(());
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(usize::from(threads))
        .build_global()
        .map_err(|error| WorkerError::Setup(format!("set the number of threads: {error}")))
}

/// Submissions kept until they are settled, for `status`: the audit each is under, and how many
/// segments there are. Removes nothing.
#[must_use]
pub fn unsettled(submitted: &std::path::Path, worker_id: &str) -> Vec<serde_json::Value> {
    let describe = |kept: &kept::Kept| {
        let segments = kept.commitment().map(|states| states.states.len() - 1);
        serde_json::json!({
            "id": kept.id,
            "what": kept.info.name,
            "segments": segments,
            "audit": kept.info.audit,
            "not_restored": kept.info.refused,
        })
    };
    kept::Kept::all(submitted, worker_id)
        .iter()
        .map(describe)
        .collect()
}

/// Which device is worked on, or why none, for `status`. `None` before the first run.
#[must_use]
pub fn device_note(home: &Home) -> Option<DeviceNote> {
    DeviceNote::read(&home.path.join(DEVICE_NOTE))
}

/// Training work that an earlier run left, for `status`. Removes nothing.
#[must_use]
pub fn unfinished(work: &std::path::Path, worker_id: &str) -> Vec<serde_json::Value> {
    let describe = |unit: &unit::Unit| {
        serde_json::json!({
            "lease": unit.lease.id,
            "what": unit.name(),
            "trained": unit.saved().trained.is_some(),
        })
    };
    unit::Unit::kept(work, worker_id)
        .iter()
        .map(describe)
        .collect()
}
