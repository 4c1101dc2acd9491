//! A coordinator to be broken: as a process of its own, or in this process on a clock that can be
//! moved; its people; and what it has acknowledged to them.
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use cairn_coordinator::app::App;
use cairn_coordinator::clock::Clock;
use cairn_coordinator::limits::Limits;
use cairn_coordinator::server::{self, DataFolder};
use cairn_coordinator::{net, tasks};
use cairn_proto::client::{Client, ClientError, Options, join};
use cairn_proto::url::{JoinUrl, Server as Endpoint, Transport};
use cairn_proto::v1;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::adapters::Adapter;
use crate::evaluator::Evaluator;
use crate::member::Member;
use crate::process::{self, Server};

/// How long a claim waits where background tasks decide in between, milliseconds.
pub const WAIT_MS: i64 = 1_000;
/// How long a stopped coordinator may take to let go of its folder and port.
const RESTART_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a round may take to end once everything has been handed in.
const ROUND_TIMEOUT: Duration = Duration::from_mins(2);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Sessions and everything else in these scenarios end long before it, milliseconds.
const TOKEN_TTL_MS: i64 = 3_600_000;

/// How a coordinator is set up.
#[derive(Debug, Clone, Default)]
pub struct Setting {
    /// Plain text instead of TLS: for clients that write their own frames.
    pub plain: bool,
    /// In this process, on a clock of our own, its background tasks run by hand.
    pub here: bool,
    /// Another database than the file in the data folder.
    pub database: Option<String>,
    /// Another place for the data folder, such as a small disk.
    pub data: Option<PathBuf>,
    /// Further variables of its process, such as a blob store's.
    pub environment: Vec<(String, String)>,
    /// No model, no sets, no evaluator: for scenarios that need none.
    pub bare: bool,
}

/// One acknowledged submission.
#[derive(Debug, Clone)]
pub struct Ack {
    /// Its id.
    pub submission: String,
    /// The round it belongs to.
    pub round: String,
    /// The receipt, where the volunteer's program is not `cairn-worker`, which keeps it itself.
    pub receipt: Option<v1::Receipt>,
    /// The adapter's bytes.
    pub bytes: Vec<u8>,
}

/// A coordinator in this process.
struct Here {
    app: App,
    serving: JoinHandle<()>,
}

enum Running {
    Process(Server),
    Here(Here),
    Down,
}

/// See the module.
pub struct World {
    folder: TempDir,
    setting: Setting,
    running: Mutex<Running>,
    /// Where it serves, before and after every restart.
    pub address: String,
    maintainer: Option<Member>,
    evaluator: Option<Evaluator>,
    acks: Mutex<Vec<Ack>>,
}

impl World {
    /// Starts one.
    ///
    /// # Errors
    /// When it does not serve, or refuses its first people.
    pub async fn start(setting: Setting) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut world = Self {
            folder,
            setting,
            running: Mutex::new(Running::Down),
            address: "127.0.0.1:0".to_owned(),
            maintainer: None,
            evaluator: None,
            acks: Mutex::default(),
        };
        world.address = if world.setting.here {
            world.open_here().await?
        } else {
            world.start_process().await?
        };
        let url = world.first_url()?;
        let maintainer = world.join(&url, "ada").await?;
        if !world.setting.bare {
            let base = world.folder.path().join("base");
            maintainer.add_tiny(&base).await?;
            world.maintainer = Some(maintainer);
            let evaluator = world.member(v1::Role::Evaluator, "eve").await?;
            world.evaluator = Some(Evaluator::new(evaluator, &base)?);
        } else {
            world.maintainer = Some(maintainer);
        }
        Ok(world)
    }

    /// Its data folder.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        let own = || self.folder.path().join("data");
        self.setting.data.clone().unwrap_or_else(own)
    }

    /// Where a blob lies in its store.
    #[must_use]
    pub fn stored(&self, digest: &str) -> PathBuf {
        let folder = digest.get(..2).unwrap_or_default();
        self.data().join("store/blobs").join(folder).join(digest)
    }

    /// A folder for whatever else a scenario keeps.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.folder.path()
    }

    /// The id of the coordinator's process, if it runs as one.
    #[must_use]
    pub fn process_id(&self) -> Option<u32> {
        match &*self.running() {
            Running::Process(server) => Some(server.id()),
            Running::Here(_) | Running::Down => None,
        }
    }

    /// The last error in the process's log.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        match &*self.running() {
            Running::Process(server) => {
                let log = server.log();
                log.lines()
                    .rfind(|line| line.contains("ERROR"))
                    .map(str::to_owned)
            }
            Running::Here(_) | Running::Down => None,
        }
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its maintainer.
    ///
    /// # Panics
    /// Never: a started world has one.
    #[must_use]
    pub fn maintainer(&self) -> &Member {
        self.maintainer.as_ref().expect("a started world has one")
    }

    /// Its evaluator.
    ///
    /// # Errors
    /// When the world was started without one.
    pub fn evaluator(&self) -> Result<&Evaluator> {
        self.evaluator.as_ref().context("a bare world has none")
    }

    /// Everything that was acknowledged.
    #[must_use]
    pub fn acks(&self) -> Vec<Ack> {
        self.acks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn options(&self) -> Vec<String> {
        let mut options = Vec::new();
        if self.is_plain() {
            options.push("--insecure".to_owned());
        }
        if let Some(url) = &self.setting.database {
            options.extend(["--database-url".to_owned(), url.clone()]);
        }
        options
    }

    /// Whether there is no model in it.
    #[must_use]
    pub const fn is_bare(&self) -> bool {
        self.setting.bare
    }

    fn is_plain(&self) -> bool {
        self.setting.plain || self.setting.here
    }
}

/// Starting, stopping, and time.
impl World {
    async fn start_process(&self) -> Result<String> {
        let options = self.options();
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        // The port and the folder's lock are free a moment after the process is gone.
        let environment = &self.setting.environment;
        let environment: Vec<(&str, &str)> = environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let server = patiently(RESTART_TIMEOUT, async || {
            tokio::task::block_in_place(|| {
                Server::start_in(&self.data(), &self.address, &options, &environment)
            })
        })
        .await?;
        let address = server.address.clone();
        *self.running() = Running::Process(server);
        Ok(address)
    }

    async fn open_here(&self) -> Result<String> {
        let clock = Clock::settable(Clock::System.now_ms());
        let listener = TcpListener::bind(&self.address).await?;
        let address = listener.local_addr()?.to_string();
        let (host, port) = address.split_once(':').context("an address")?;
        let endpoint = Endpoint {
            host: host.to_owned(),
            port: port.parse()?,
            transport: Transport::Insecure,
        };
        let app = server::open_idle(server::Options {
            data: DataFolder::lock(&self.data())?,
            database_url: self.setting.database.clone(),
            blobs: None,
            endpoint,
            clock,
            limits: Limits::default(),
        })
        .await?;
        let limits = &app.limits;
        let incoming = net::accept(
            &app,
            listener,
            None,
            limits.connections_max,
            limits.connection_idle,
        );
        let served = app.clone();
        let serving = tokio::spawn(async move {
            // Ends when the world is stopped.
            let _ = server::serve_grpc(&served, incoming).await;
        });
        *self.running() = Running::Here(Here { app, serving });
        Ok(address)
    }

    /// SIGKILL; a coordinator in this process is dropped in the middle of whatever it does.
    ///
    /// # Errors
    /// When it does not go.
    pub async fn kill(&self) -> Result<()> {
        let running = std::mem::replace(&mut *self.running(), Running::Down);
        match running {
            Running::Process(server) => server.kill_9(),
            Running::Here(here) => {
                here.app.lifecycle.soft().cancel();
                here.app.lifecycle.hard().cancel();
                here.serving.abort();
                let _ = here.serving.await;
                here.app.db.close().await;
                Ok(())
            }
            Running::Down => Ok(()),
        }
    }

    /// Starts it again where it was, always as a process.
    ///
    /// # Errors
    /// When it does not serve.
    pub async fn restart(&self) -> Result<()> {
        let down = matches!(*self.running(), Running::Down);
        if down {
            self.start_process().await?;
        }
        Ok(())
    }

    /// `kill -9`, and started again; how long it took to serve.
    ///
    /// # Errors
    /// As [`World::kill`] and [`World::restart`].
    pub async fn kill_9(&self) -> Result<Duration> {
        self.kill().await?;
        let since = Instant::now();
        self.restart().await?;
        Ok(since.elapsed())
    }

    /// The coordinator in this process.
    ///
    /// # Errors
    /// When it runs elsewhere.
    pub fn app(&self) -> Result<App> {
        match &*self.running() {
            Running::Here(here) => Ok(here.app.clone()),
            Running::Process(_) | Running::Down => bail!("the coordinator is not in this process"),
        }
    }

    /// Steps the clock of a coordinator here, forward or back.
    ///
    /// # Errors
    /// When the coordinator runs elsewhere.
    pub fn step_clock(&self, seconds: i64) -> Result<()> {
        match &self.app()?.clock {
            Clock::Settable(ms) => {
                ms.fetch_add(seconds * 1_000, Ordering::SeqCst);
                Ok(())
            }
            Clock::System => bail!("the system's clock is not ours to move"),
        }
    }

    /// Runs the background tasks of a coordinator here until they have nothing left to do.
    ///
    /// # Errors
    /// The first failure of a task.
    pub async fn settle(&self) -> Result<()> {
        tasks::settle(&self.app()?)
            .await
            .map_err(|error| anyhow!(error.full()))
    }
}

/// People.
impl World {
    /// The first maintainer's join URL, by the command line, beside the running server.
    fn first_url(&self) -> Result<JoinUrl> {
        let mut command = process::command()?;
        command.args(["token", "create", "--role", "maintainer", "--data"]);
        command.arg(self.data());
        if let Some(url) = &self.setting.database {
            command.args(["--database-url", url]);
        }
        let made = command.output()?;
        let says = String::from_utf8_lossy(&made.stderr);
        anyhow::ensure!(made.status.success(), "{says}");
        parse(String::from_utf8(made.stdout)?.trim())
    }

    /// A join URL from the maintainer.
    ///
    /// # Errors
    /// As the call.
    pub async fn url(&self, role: v1::Role, uses: u32) -> Result<JoinUrl> {
        let made = self
            .maintainer()
            .create_token(role, uses, TOKEN_TTL_MS)
            .await?;
        parse(&made)
    }

    async fn join(&self, url: &JoinUrl, name: &str) -> Result<Member> {
        let folder = tempfile::tempdir()?;
        let options = Options::default();
        let identity = join(url, name, &folder.path().join("identity.json"), &options).await?;
        Member::new(Client::new(identity, options)?)
    }

    /// A fresh member of this role.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn member(&self, role: v1::Role, name: &str) -> Result<Member> {
        self.member_at(role, name, &self.address).await
    }

    /// A fresh volunteer.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn volunteer(&self, name: &str) -> Result<Member> {
        self.member(v1::Role::Volunteer, name).await
    }

    /// A fresh member that knows the coordinator by another address, such as a proxy's.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn member_at(&self, role: v1::Role, name: &str, address: &str) -> Result<Member> {
        let mut url = self.url(role, 1).await?;
        let (host, port) = address.split_once(':').context("an address")?;
        host.clone_into(&mut url.server.host);
        url.server.port = port.parse()?;
        self.join(&url, name).await
    }

    /// Uploads and submits an adapter, and keeps the acknowledgement.
    ///
    /// # Errors
    /// As the calls.
    pub async fn hand_in(
        &self,
        member: &Member,
        lease: &v1::Lease,
        adapter: &Adapter,
    ) -> Result<v1::SubmitAdapterResponse, ClientError> {
        member.upload(&adapter.weights, &lease.id).await?;
        let request = member.submission(lease, adapter);
        self.submit(member, lease, &request, adapter).await
    }

    /// Submits what has been uploaded, and keeps the acknowledgement.
    ///
    /// # Errors
    /// As the call.
    pub async fn submit(
        &self,
        member: &Member,
        lease: &v1::Lease,
        request: &v1::SubmitAdapterRequest,
        adapter: &Adapter,
    ) -> Result<v1::SubmitAdapterResponse, ClientError> {
        let answer = member.submit(request).await?;
        self.note(Ack {
            submission: answer.submission_id.clone(),
            round: round_of(lease),
            receipt: answer.receipt.clone(),
            bytes: adapter.weights.clone(),
        });
        member.open_audit(lease, adapter, &answer).await?;
        Ok(answer)
    }

    /// Keeps an acknowledgement; one that is known already is the same one.
    pub fn note(&self, ack: Ack) {
        let mut acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
        if !acks.iter().any(|old| old.submission == ack.submission) {
            acks.push(ack);
        }
    }

    /// Lets the evaluator answer and the coordinator decide until the round has ended.
    ///
    /// # Errors
    /// When a call fails, or the round does not end.
    pub async fn finish(&self, round: &str) -> Result<v1::Round> {
        let evaluator = self.evaluator()?;
        let work = async {
            loop {
                if self.setting.here && self.app().is_ok() {
                    self.settle().await?;
                }
                if evaluator.step().await? {
                    continue;
                }
                let round = self.round(round).await?;
                if round.ended_ms != 0 {
                    return Ok(round);
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(ROUND_TIMEOUT, work)
            .await
            .context("the round does not end")?
    }

    /// The same, and the round has published.
    ///
    /// # Errors
    /// As [`World::finish`]; and when nothing was published.
    pub async fn publish(&self, round: &str) -> Result<()> {
        let ended = self.finish(round).await?;
        ensure!(
            ended.state() == v1::RoundState::Published,
            "{}",
            ended.reason
        );
        Ok(())
    }

    /// A round.
    ///
    /// # Errors
    /// As the call.
    pub async fn round(&self, id: &str) -> Result<v1::Round> {
        let view = self.maintainer().round(id).await?;
        view.round.context("a view without a round")
    }

    /// The commit of the model's head.
    ///
    /// # Errors
    /// As the call.
    pub async fn head(&self) -> Result<String> {
        let head = self.maintainer().checkpoint("").await?;
        Ok(head
            .checkpoint
            .context("an answer without a checkpoint")?
            .commit)
    }
}

/// The round of a lease on training.
#[must_use]
pub fn round_of(lease: &v1::Lease) -> String {
    match &lease.work {
        Some(v1::lease::Work::Train(work)) => work.round_id.clone(),
        _ => String::new(),
    }
}

fn parse(text: &str) -> Result<JoinUrl> {
    text.parse::<JoinUrl>().map_err(|error| anyhow!("{error}"))
}

/// Tries again and again until it works or the time is over; the last failure then.
///
/// # Errors
/// The last failure.
pub async fn patiently<T>(limit: Duration, mut work: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let since = Instant::now();
    loop {
        match work().await {
            Ok(done) => return Ok(done),
            Err(error) if since.elapsed() >= limit => return Err(error),
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}
