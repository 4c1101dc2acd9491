//! What a scenario is, the table of all of them, and how they are run.
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use futures::future::LocalBoxFuture;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::invariants::{self, Findings};
use super::world::{Setting, World};
use super::{bucket, crashes, leases, network, stores, trust, uploads, versions};
use crate::process::built;

/// Scenarios at a time: most of them wait for a timeout of the coordinator's.
const AT_A_TIME: usize = 4;

/// What a scenario cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The built `cairn-worker`.
    Worker,
    /// PostgreSQL's programs.
    Postgres,
    /// Mounting a small disk.
    Mount,
}

impl Need {
    /// Why it cannot be had here, if it cannot.
    #[must_use]
    pub fn missing(self) -> Option<&'static str> {
        let (there, why) = match self {
            Self::Worker => (
                built("cairn-worker", "cairn-worker").is_ok(),
                "cairn-worker is not built beside this program",
            ),
            Self::Postgres => (
                super::database::programs().is_some(),
                "PostgreSQL's server is not installed",
            ),
            Self::Mount => (
                stores::can_mount(),
                "a small disk cannot be mounted here (root only)",
            ),
        };
        (!there).then_some(why)
    }
}

/// One fault and what is expected of it.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What is done.
    pub does: &'static str,
    /// What is expected.
    pub expects: &'static str,
    /// What it cannot do without.
    pub needs: &'static [Need],
    /// Whether it needs the machine to itself.
    pub alone: bool,
    /// Whether it is among the few that run as a test: quick, and needing nothing.
    pub quick: bool,
    /// How long it may take.
    pub limit: Duration,
    /// Plays it.
    pub play: for<'a> fn(&'a mut Stage) -> LocalBoxFuture<'a, Result<Told>>,
}

/// What a scenario says of itself.
#[derive(Debug, Default)]
pub struct Told {
    /// How long after the fault was over everything worked again, where that can be told.
    pub recovery: Option<Duration>,
    /// What was seen, in a few words.
    pub saw: String,
}

impl Told {
    /// What was seen.
    #[must_use]
    pub fn saw(text: impl Into<String>) -> Self {
        Self {
            recovery: None,
            saw: text.into(),
        }
    }

    /// How long recovery took.
    #[must_use]
    pub const fn after(mut self, recovery: Duration) -> Self {
        self.recovery = Some(recovery);
        self
    }
}

/// Where a scenario plays: it has at most one world, which is looked at afterwards.
#[derive(Default)]
pub struct Stage {
    world: Option<World>,
    // Dropped after the world that stands on them.
    props: Vec<Box<dyn Send>>,
}

impl Stage {
    /// Sets a world up.
    ///
    /// # Errors
    /// As [`World::start`].
    pub async fn set(&mut self, setting: Setting) -> Result<&World> {
        let world = World::start(setting).await.context("set the scene")?;
        Ok(self.world.insert(world))
    }

    /// Keeps something that the world needs for as long as it is looked at.
    pub fn keep(&mut self, prop: impl Send + 'static) {
        self.props.push(Box::new(prop));
    }
}

/// What became of a scenario.
#[derive(Debug)]
pub enum Outcome {
    /// As expected, and every invariant holds.
    Survived(Told),
    /// Not as expected.
    Broken(String),
    /// Not played, and so not survived either.
    LeftOut(String),
}

/// A scenario's result.
pub struct Played {
    /// Which.
    pub scenario: &'static Scenario,
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
    /// What the invariants said.
    pub findings: Findings,
}

macro_rules! scenario {
    ($name:literal, $play:path, $does:literal, $expects:literal $(, $key:ident: $value:expr)* $(,)?) => {
        Scenario {
            $($key: $value,)*
            ..Scenario {
                name: $name,
                does: $does,
                expects: $expects,
                needs: &[],
                alone: false,
                quick: false,
                limit: Duration::from_mins(2),
                play: |stage| Box::pin($play(stage)),
            }
        }
    };
}

/// All of them, in the order of the scorecard.
pub static ALL: &[Scenario] = &[
    scenario!(
        "upload-cut",
        uploads::cut,
        "an upload's line is cut, again and again",
        "it goes on behind what is held; nothing is sent twice",
        quick: true,
    ),
    scenario!(
        "worker-killed-mid-upload",
        uploads::worker_killed,
        "cairn-worker is killed with its adapter half on its way",
        "started again, it goes on at a verified offset; one credit",
        needs: &[Need::Worker],
    ),
    scenario!(
        "ack-lost",
        uploads::ack_lost,
        "the answer to a submission is swallowed by the line",
        "asked again, the same answer; one submission, one credit",
        quick: true,
    ),
    scenario!(
        "slow-line",
        uploads::slow_line,
        "every piece 50 ms late, 256 KiB a second",
        "everything gets through",
    ),
    scenario!(
        "kill-9-at-random",
        crashes::kill_9_at_random,
        "the coordinator is killed again and again while four volunteers submit",
        "every acknowledged submission is there; the rounds end",
        limit: Duration::from_mins(4),
    ),
    scenario!(
        "orphan-blobs",
        crashes::orphans,
        "killed between upload and submission; a file in the store that no row names",
        "both are collected after a day, and nothing else",
        quick: true,
    ),
    scenario!(
        "abort-during-fold",
        crashes::abort_during_fold,
        "a maintainer aborts, and the coordinator is killed, while a round folds",
        "the old head is intact, or the whole new one is there",
    ),
    scenario!(
        "database-locked",
        stores::database_locked,
        "another program holds SQLite's write lock",
        "UNAVAILABLE with a time to come back, no acknowledgement; then all goes on",
    ),
    scenario!(
        "database-stopped",
        stores::database_stopped,
        "every process of PostgreSQL is stopped (SIGSTOP), then goes on",
        "UNAVAILABLE with a time to come back, no acknowledgement; then all goes on",
        needs: &[Need::Postgres],
        limit: Duration::from_mins(4),
    ),
    scenario!(
        "database-killed",
        stores::database_killed,
        "PostgreSQL is killed (SIGKILL) amid submissions, and started again",
        "UNAVAILABLE meanwhile, nothing acknowledged is lost, no restart of the coordinator",
        needs: &[Need::Postgres],
        limit: Duration::from_mins(3),
    ),
    scenario!(
        "store-errors",
        stores::store_errors,
        "the blob store's folder cannot be used",
        "no acknowledgement, an error that says to try again; then all goes on",
        quick: true,
    ),
    scenario!(
        "store-stalls",
        stores::store_stalls,
        "a blob that takes for ever to open",
        "its reader gives up in time to try again; everybody else is served",
        limit: Duration::from_mins(3),
    ),
    scenario!(
        "bit-rot",
        stores::bit_rot,
        "bytes of an acknowledged adapter and of the base change on disk",
        "noticed on reading, not the volunteer's fault; handed in again, all is well",
        quick: true,
    ),
    scenario!(
        "bucket-errors",
        bucket::errors,
        "every request to an S3 store fails",
        "no acknowledgement, an error that says to try again; then all goes on",
        limit: Duration::from_mins(4),
    ),
    scenario!(
        "bucket-stalls",
        bucket::stalls,
        "no request to an S3 store is answered",
        "an upload gives up in time to try again; everybody else is served",
        limit: Duration::from_mins(6),
    ),
    scenario!(
        "bucket-rots",
        bucket::rots,
        "an S3 store sends other bytes than were put",
        "they are not taken; with the right ones all goes on",
    ),
    scenario!(
        "disk-full",
        stores::disk_full,
        "a disk of 300 MiB fills up, to the watermark and to the last byte",
        "no leases and no uploads below the watermark, what is held stays; then all goes on",
        needs: &[Need::Mount],
    ),
    scenario!(
        "late-upload-in-grace",
        leases::late_in_grace,
        "an adapter comes after its lease has run out, and nobody else has the shard",
        "accepted",
        quick: true,
    ),
    scenario!(
        "late-upload-replaced",
        leases::late_replaced,
        "an adapter comes after its shard has gone to another",
        "credited, and not merged",
        quick: true,
    ),
    scenario!(
        "two-holders",
        leases::two_holders,
        "a partition: the old holder comes back while the new one works",
        "the first commit wins; the other changes nothing",
        quick: true,
    ),
    scenario!(
        "clock-steps",
        leases::clock_steps,
        "the coordinator's clock jumps a day ahead and a day back amid leases",
        "no shard has two valid leases, nothing is lost, the round ends",
        quick: true,
    ),
    scenario!(
        "worker-clock-a-day-off",
        leases::worker_clock,
        "volunteers' clocks a day ahead and a day behind the coordinator's",
        "they join, train, submit and are credited as ever",
        needs: &[Need::Worker],
    ),
    scenario!(
        "poison-shard",
        leases::poison_shard,
        "a shard kills every worker that takes it",
        "given up after three different workers; the round ends without it",
        quick: true,
    ),
    scenario!(
        "half-open",
        network::half_open,
        "a line goes dead without telling anybody",
        "the client notices, connects anew, and its call succeeds",
        limit: Duration::from_secs(150),
    ),
    scenario!(
        "slowloris",
        network::slowloris,
        "500 connections send a byte now and then",
        "cut after ten seconds; others are served at once all the while",
    ),
    scenario!(
        "idle-streams",
        network::idle_streams,
        "a volunteer opens 60 uploads and sends nothing",
        "another's upload gets through at once",
        limit: Duration::from_secs(150),
    ),
    scenario!(
        "rapid-reset",
        network::rapid_reset,
        "HTTP/2 streams opened and reset as fast as the line carries",
        "the connection is ended, memory is bounded, others are served",
    ),
    scenario!(
        "herd",
        network::herd,
        "10,000 signed-on sessions lose the coordinator at once and come back",
        "each has had an answer within two minutes",
        alone: true,
        limit: Duration::from_mins(8),
    ),
    scenario!(
        "stolen-token",
        trust::stolen_token,
        "a session token and a spent join token in a thief's hands",
        "no submission without the key, no second identity, over after an hour",
        quick: true,
    ),
    scenario!(
        "tls-downgrade",
        trust::tls_downgrade,
        "plain text where TLS was promised, and TLS 1.1",
        "refused by both sides; the join token stays unspent",
        quick: true,
    ),
    scenario!(
        "wrong-certificate",
        trust::wrong_certificate,
        "another coordinator answers at the known address",
        "nothing is said to it; the true one is known again when it is back",
        quick: true,
    ),
    scenario!(
        "path-tricks",
        trust::path_tricks,
        "`../`, NUL, absolute, drive and device names as names of files, models and sets",
        "refused by name; nothing appears outside",
        quick: true,
    ),
    scenario!(
        "older-client",
        versions::older_client,
        "a client of the version before: what is new is not in its messages",
        "served, or told to update in words; never an internal error",
        quick: true,
    ),
    scenario!(
        "newer-client",
        versions::newer_client,
        "a client of a later version: unknown fields, unknown methods",
        "unknown fields are passed over, unknown methods refused",
        quick: true,
    ),
];

/// Plays scenarios, several at a time, and hands each result to `tell` as it comes.
pub async fn run(chosen: &[&'static Scenario], mut tell: impl FnMut(&Played)) -> Vec<Played> {
    let (alone, together): (Vec<&'static Scenario>, Vec<_>) =
        chosen.iter().partition(|scenario| scenario.alone);
    let mut done = Vec::new();
    for (scenarios, at_a_time) in [(together, AT_A_TIME), (alone, 1)] {
        let playing = scenarios.into_iter().map(on_a_thread);
        let mut playing = futures::stream::iter(playing).buffer_unordered(at_a_time);
        while let Some(played) = playing.next().await {
            tell(&played);
            done.push(played);
        }
    }
    let place = |played: &Played| ALL.iter().position(|one| one.name == played.scenario.name);
    done.sort_by_key(place);
    done
}

/// A thread for each: they start programs and wait for them.
async fn on_a_thread(scenario: &'static Scenario) -> Played {
    let runtime = Handle::current();
    let playing = tokio::task::spawn_blocking(move || runtime.block_on(play(scenario)));
    playing.await.unwrap_or_else(|panic| Played {
        scenario,
        outcome: Outcome::Broken(panic.to_string()),
        took: Duration::ZERO,
        findings: Findings::default(),
    })
}

/// Plays one, and looks at what it left.
async fn play(scenario: &'static Scenario) -> Played {
    let since = Instant::now();
    let mut findings = Findings::default();
    let missing = scenario.needs.iter().find_map(|need| need.missing());
    let outcome = match missing {
        Some(why) => Outcome::LeftOut(why.to_owned()),
        None => {
            let mut stage = Stage::default();
            let told = tokio::time::timeout(scenario.limit, (scenario.play)(&mut stage)).await;
            let told = match told {
                Ok(told) => told,
                Err(_) => Err(anyhow::anyhow!("not over after {:?}", scenario.limit)),
            };
            let told =
                told.map_err(
                    |error| match stage.world.as_ref().and_then(World::complaint) {
                        Some(line) => error.context(format!("the coordinator says {line:?}")),
                        None => error,
                    },
                );
            // Whatever it came to: what was acknowledged must be there.
            let checked = match &stage.world {
                Some(world) => invariants::check(world).await,
                None => Ok(Findings::default()),
            };
            judge(told, checked, &mut findings)
        }
    };
    Played {
        scenario,
        outcome,
        took: since.elapsed(),
        findings,
    }
}

fn judge(told: Result<Told>, checked: Result<Findings>, findings: &mut Findings) -> Outcome {
    let mut broken = Vec::new();
    match checked {
        Ok(found) => {
            broken.extend(found.broken.iter().cloned());
            *findings = found;
        }
        Err(error) => broken.push(format!("the invariants cannot be looked at: {error:#}")),
    }
    match told {
        Ok(told) if broken.is_empty() => Outcome::Survived(told),
        Ok(_) => Outcome::Broken(broken.join("; ")),
        Err(error) => {
            broken.insert(0, format!("{error:#}"));
            Outcome::Broken(broken.join("; "))
        }
    }
}

/// The built worker's program.
///
/// # Errors
/// When it is not built.
pub fn worker() -> Result<PathBuf> {
    built("cairn-worker", "cairn-worker")
}
