//! The demo's child processes: each with a log file, none left behind.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::process::{Child, Command};

/// How long a child may take to leave after SIGTERM before it is killed.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Lines of a log shown when its process fails.
const LOG_TAIL_LINES: usize = 15;

/// Where to look for a sibling program when it is not beside this one.
const BIN_DIR_VARIABLE: &str = "CAIRN_BIN_DIR";

/// A running child; dropping it kills it.
pub struct Process {
    /// What it is called in messages.
    pub name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `program` with everything it prints going to `log`.
    pub fn start<S: AsRef<OsStr>>(
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = S>,
        environment: &[(&str, &OsStr)],
        log: PathBuf,
    ) -> Result<Self> {
        let file =
            std::fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let child = Command::new(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("share the log file")?)
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self {
            name: name.to_owned(),
            log,
            child,
        })
    }

    /// Kills it at once (SIGKILL): a power cut, not a good-bye.
    pub async fn kill(&mut self) -> Result<()> {
        self.child
            .kill()
            .await
            .with_context(|| format!("kill {}", self.name))
    }

    /// Waits for it to end by itself.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        self.child
            .wait()
            .await
            .with_context(|| format!("wait for {}", self.name))
    }

    /// Fails with the end of its log if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait().context("look at a child process")? {
            None => Ok(()),
            Some(status) => bail!("{} ended early ({status}); {}", self.name, self.log_tail()),
        }
    }

    /// Where its log lies, and how it ends.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut tail = VecDeque::with_capacity(LOG_TAIL_LINES);
        for line in text.lines() {
            if tail.len() == LOG_TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(line);
        }
        let tail: Vec<&str> = tail.into_iter().collect();
        format!(
            "its log {} ends with:\n{}",
            self.log.display(),
            tail.join("\n")
        )
    }

    /// Asks it to leave, and kills it if it does not.
    pub async fn leave(&mut self) {
        if let Some(id) = self.child.id() {
            // A missing `kill` program only costs politeness: the child is killed below.
            let _ = Command::new("kill")
                .arg(id.to_string())
                .stderr(Stdio::null())
                .status()
                .await;
        }
        if tokio::time::timeout(LEAVE_TIMEOUT, self.child.wait())
            .await
            .is_err()
        {
            let _ = self.child.kill().await;
        }
    }
}

/// Finds a program of ours: in `CAIRN_BIN_DIR`, beside this one, or on the path.
pub fn find_program(name: &str) -> Result<PathBuf> {
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_path_buf));
    let named = std::env::var_os(BIN_DIR_VARIABLE).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    named
        .into_iter()
        .chain(beside)
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(&file))
        .find(|candidate| candidate.is_file())
        .with_context(|| {
            format!("{name} is neither beside this program nor on the path; build it with `make build`, or set {BIN_DIR_VARIABLE}")
        })
}
