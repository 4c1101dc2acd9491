//! The coordinator's program as a process of its own, to be killed and started again.
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use cairn_proto::client::{Client, Options, join};
use cairn_proto::url::JoinUrl;

use crate::member::Member;

/// How long the program may take to serve.
const START_TIMEOUT: Duration = Duration::from_mins(1);
/// How long any awaited condition may take.
const WAIT_TIMEOUT: Duration = Duration::from_mins(1);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Lines of the log kept for a failing test.
const LOG_LINES_MAX: usize = 200;

/// A built program of ours, by its crate's and its own name.
///
/// # Errors
/// When it has not been built.
pub fn built(package: &str, name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    // target/PROFILE/deps/TEST, or target/PROFILE/PROGRAM
    here.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built; build it first: cargo build -p {package}"))
}

/// The built coordinator.
///
/// # Errors
/// When it has not been built.
pub fn program() -> Result<PathBuf> {
    built("cairn-coordinator", "cairn-coordinator")
}

/// The program with none of our environment but the path.
///
/// # Errors
/// When it has not been built.
pub fn command() -> Result<Command> {
    let mut command = Command::new(program()?);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default());
    Ok(command)
}

/// A running coordinator; killed when dropped.
pub struct Server {
    child: Child,
    /// Where it serves gRPC.
    pub address: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Starts it on a data folder, on `address` (port 0: any), and waits until it serves.
    ///
    /// # Errors
    /// When it ends before it serves, or takes too long.
    pub fn start(data: &Path, address: &str, options: &[&str]) -> Result<Self> {
        Self::start_in(data, address, options, &[])
    }

    /// Starts it with variables in its environment.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_in(
        data: &Path,
        address: &str,
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let mut command = command()?;
        command.envs(environment.iter().copied());
        Self::spawn(arguments(&mut command, data, address, options))
    }

    /// Starts it where no file may grow beyond `bytes`, as on a disk that is full then.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_limited(data: &Path, address: &str, bytes: u64) -> Result<Self> {
        let mut command = Command::new("sh");
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default());
        // Blocks of 512 bytes, as POSIX says. The signal is ignored, so that writing says no.
        let script = format!(
            "trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"",
            bytes / 512
        );
        command.args(["-c", &script]).arg(program()?);
        Self::spawn(arguments(&mut command, data, address, &[]))
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = child.stderr.take().context("the log is piped")?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let (tell, told) = sync_channel(1);
        let lines = log.clone();
        // Reads until the process ends: a full pipe would stop it.
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some(address) = serving(&line) {
                    let _ = tell.try_send(address);
                }
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() >= LOG_LINES_MAX {
                    lines.remove(0);
                }
                lines.push(line);
            }
        });
        let mut server = Self {
            child,
            address: String::new(),
            log,
        };
        match told.recv_timeout(START_TIMEOUT) {
            Ok(address) => server.address = address,
            Err(_) => bail!("the coordinator does not serve:\n{}", server.log()),
        }
        Ok(server)
    }

    /// Its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log(&self) -> String {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    }

    /// SIGKILL, and nothing is left.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_9(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn terminate(&self) -> Result<()> {
        let sent = Command::new("kill")
            .arg(self.child.id().to_string())
            .status()?;
        anyhow::ensure!(sent.success(), "kill says {sent}");
        Ok(())
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        let wait = async {
            loop {
                if let Some(status) = self.child.try_wait()? {
                    return Ok(status);
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(WAIT_TIMEOUT, wait)
            .await
            .context("the coordinator does not end")?
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments<'a>(
    command: &'a mut Command,
    data: &Path,
    address: &str,
    options: &[&str],
) -> &'a mut Command {
    command.args([
        "serve",
        "--http",
        "127.0.0.1:0",
        "--grpc",
        address,
        "--data",
    ]);
    command.arg(data).args(options)
}

/// The address in the line that says so.
fn serving(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("serving gRPC on ")?;
    rest.split(' ').next().map(str::to_owned)
}

/// A join URL from the command line; the server may run beside it.
///
/// # Errors
/// When the command fails.
pub fn join_url(data: &Path, role: &str, options: &[&str]) -> Result<JoinUrl> {
    let made = command()?
        .args(["token", "create", "--role", role, "--data"])
        .arg(data)
        .args(options)
        .output()?;
    anyhow::ensure!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let text = String::from_utf8(made.stdout)?;
    text.trim()
        .parse::<JoinUrl>()
        .map_err(|error| anyhow!("{error}"))
}

/// Joins with a fresh key and signs on; refused calls are repeated while the server is away.
///
/// # Errors
/// When joining is refused.
pub async fn member(data: &Path, role: &str, name: &str) -> Result<Member> {
    let folder = tempfile::tempdir()?;
    let options = Options::default();
    let url = join_url(data, role, &[])?;
    let identity = join(&url, name, &folder.path().join("identity.json"), &options).await?;
    Member::new(Client::new(identity, options)?)
}

/// Waits for a condition, looking again and again, but not for ever.
///
/// # Errors
/// When it does not come, or looking fails.
pub async fn eventually<T, F>(what: &str, mut look: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let wait = async {
        loop {
            if let Some(found) = look().await? {
                return Ok(found);
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(WAIT_TIMEOUT, wait)
        .await
        .with_context(|| format!("never: {what}"))?
}
