//! The demo's processes and where each keeps its things.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cairn_proto::client::{self, Client, Options};
use cairn_proto::identity::MAINTAINER_FILE;
use cairn_proto::url::JoinUrl;
use cairn_proto::v1::{CreateJoinTokenRequest, Role};
use tokio::process::Command;

use super::process::{Process, find_program};

/// How often a starting coordinator is looked at.
const POLL: Duration = Duration::from_millis(100);

/// How long the coordinator may take to start.
const START_TRIES: u32 = 300;

/// The machine of a volunteer or evaluator computes on one core, so that several of them on this
/// one do not fight over it.
const WORKER_ENVIRONMENT: (&str, &str) = ("RAYON_NUM_THREADS", "1");

/// Everything the demo has started.
pub struct Cluster {
    /// Folder of everything.
    pub dir: PathBuf,
    coordinator: PathBuf,
    worker: PathBuf,
    running: BTreeMap<String, Process>,
}

impl Cluster {
    /// Finds the programs and makes the folders; starts nothing.
    pub fn new(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir.join("logs")).context("make the log folder")?;
        Ok(Self {
            dir: dir.to_owned(),
            coordinator: find_program("cairn-coordinator")?,
            worker: find_program("cairn-worker")?,
            running: BTreeMap::new(),
        })
    }

    /// Starts the coordinator on free loopback ports and signs in as its maintainer.
    pub async fn start_coordinator(&mut self) -> Result<Client> {
        let data = self.dir.join("coordinator");
        let (grpc, http) = (free_address()?, free_address()?);
        let arguments: [&OsStr; 7] = [
            "serve".as_ref(),
            "--data".as_ref(),
            data.as_os_str(),
            "--grpc".as_ref(),
            grpc.as_ref(),
            "--http".as_ref(),
            http.as_ref(),
        ];
        let log = self.log("coordinator");
        let process = Process::start("coordinator", &self.coordinator, arguments, &[], log)?;
        self.running.insert("coordinator".to_owned(), process);
        self.await_port(&grpc).await?;
        let token = Command::new(&self.coordinator)
            .args(["token", "create", "--role", "maintainer", "--data"])
            .arg(&data)
            .stdin(Stdio::null())
            .output()
            .await
            .context("make a maintainer's token")?;
        ensure!(
            token.status.success(),
            "make a maintainer's token: {}",
            String::from_utf8_lossy(&token.stderr).trim()
        );
        let url: JoinUrl = String::from_utf8_lossy(&token.stdout)
            .trim()
            .parse()
            .context("read the join URL")?;
        let home = self.dir.join(MAINTAINER_FILE);
        let identity = client::join(&url, "maintainer", &home, &Options::default()).await?;
        Ok(Client::new(identity, Options::default())?)
    }

    async fn await_port(&mut self, address: &str) -> Result<()> {
        for _ in 0..START_TRIES {
            self.check_alive()?;
            if tokio::net::TcpStream::connect(address).await.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
        bail!("the coordinator does not listen on {address}")
    }

    /// Joins a new worker and starts it.
    pub async fn join_worker(&mut self, client: &Client, name: &str, role: Role) -> Result<()> {
        let url = join_url(client, role).await?;
        let home = self.dir.join(name);
        let joined = Command::new(&self.worker)
            .args(["join", &url, "--name", name])
            .env("CAIRN_HOME", &home)
            .stdin(Stdio::null())
            .output()
            .await
            .with_context(|| format!("join as {name}"))?;
        ensure!(
            joined.status.success(),
            "join as {name}: {}",
            String::from_utf8_lossy(&joined.stderr).trim()
        );
        self.start_worker(name)
    }

    /// Starts a worker that has joined.
    pub fn start_worker(&mut self, name: &str) -> Result<()> {
        let home = self.dir.join(name);
        let environment: [(&str, &OsStr); 2] = [
            ("CAIRN_HOME", home.as_os_str()),
            (WORKER_ENVIRONMENT.0, WORKER_ENVIRONMENT.1.as_ref()),
        ];
        let process = Process::start(name, &self.worker, ["run"], &environment, self.log(name))?;
        self.running.insert(name.to_owned(), process);
        Ok(())
    }

    /// Starts the cheat, which ends by itself once it has been judged.
    pub async fn start_cheat(&mut self, client: &Client) -> Result<Process> {
        let url = join_url(client, Role::Volunteer).await?;
        let program = std::env::current_exe().context("find this program")?;
        let dir = self.dir.join("mallory");
        let arguments: [&OsStr; 4] = [
            "demo-cheat".as_ref(),
            url.as_ref(),
            "--dir".as_ref(),
            dir.as_os_str(),
        ];
        Process::start("mallory", &program, arguments, &[], self.log("mallory"))
    }

    /// Kills a worker at once.
    pub async fn kill(&mut self, name: &str) -> Result<()> {
        match self.running.remove(name) {
            Some(mut process) => process.kill().await,
            None => bail!("{name} is not running"),
        }
    }

    /// Fails when a process that should run has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        self.running.values_mut().try_for_each(Process::check_alive)
    }

    /// Ends everything, workers first.
    pub async fn leave(&mut self) {
        let coordinator = self.running.remove("coordinator");
        let workers = std::mem::take(&mut self.running);
        for mut process in workers.into_values().chain(coordinator) {
            process.leave().await;
        }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }
}

async fn join_url(client: &Client, role: Role) -> Result<String> {
    let request = CreateJoinTokenRequest {
        role: role.into(),
        uses: 1,
        ttl_ms: 0,
    };
    let answer = client
        .call(|mut to| async move { to.enrollment.create_join_token(request).await })
        .await
        .context("make a join token")?;
    Ok(answer.join_url)
}

/// A loopback address nobody listens on now.
fn free_address() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener
        .local_addr()
        .context("find a free port")?
        .to_string())
}
