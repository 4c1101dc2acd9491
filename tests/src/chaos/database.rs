//! A throw-away PostgreSQL to be stopped, killed and started again. It listens on a socket file only.
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

/// Where PostgreSQL's programs are: Debian keeps them off the PATH.
#[must_use]
pub fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok();
    let mut found: Vec<PathBuf> = versions
        .into_iter()
        .flatten()
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|bin| bin.join("initdb").is_file())
        .collect();
    found.sort();
    let on_path = || {
        let path = std::env::var_os("PATH")?;
        let initdb = std::env::split_paths(&path)
            .map(|folder| folder.join("initdb"))
            .find(|program| program.is_file())?;
        // A link may stand for it.
        Some(initdb.canonicalize().ok()?.parent()?.to_owned())
    };
    found.pop().or_else(on_path)
}

/// A running cluster; gone when dropped.
pub struct Postgres {
    bin: PathBuf,
    home: TempDir,
}

impl Postgres {
    /// Makes a cluster and starts it.
    ///
    /// # Errors
    /// When a program of PostgreSQL's fails.
    pub fn start() -> Result<Self> {
        let bin = programs().context("PostgreSQL's server is not installed")?;
        let home = tempfile::tempdir()?;
        if is_root() {
            // The server refuses to run as root.
            fs::set_permissions(home.path(), fs::Permissions::from_mode(0o777))?;
        }
        let postgres = Self { bin, home };
        let data = postgres.data();
        postgres.run("initdb", |command| {
            command.args([
                "--auth",
                "trust",
                "--username",
                "cairn",
                "--encoding",
                "UTF8",
            ]);
            command.args(["--no-locale", "--pgdata"]).arg(&data);
        })?;
        postgres.again()?;
        let home = postgres.home.path().to_owned();
        postgres.run("createdb", |command| {
            command.arg("--host").arg(&home);
            command.args(["--username", "cairn", "cairn"]);
        })?;
        Ok(postgres)
    }

    /// Starts a stopped or killed one on what it has.
    ///
    /// # Errors
    /// When it does not start.
    pub fn again(&self) -> Result<()> {
        let (data, home) = (self.data(), self.home.path().to_owned());
        self.run("pg_ctl", |command| {
            command.args(["--silent", "--wait", "--pgdata"]).arg(&data);
            command.arg("--log").arg(data.join("server.log"));
            let options = format!(
                "-c listen_addresses= -c unix_socket_directories={}",
                home.display()
            );
            command.args(["--options", &options, "start"]);
        })
    }

    /// The database's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!(
            "postgres:///cairn?host={}&user=cairn",
            self.home.path().display()
        )
    }

    /// Sends a signal, such as `STOP`, `CONT` or `KILL`, to every process of it at once.
    ///
    /// # Errors
    /// When none of them can be found.
    pub fn signal(&self, signal: &str) -> Result<()> {
        let pid = fs::read_to_string(self.data().join("postmaster.pid"))?;
        let first: u32 = pid.lines().next().unwrap_or_default().trim().parse()?;
        let mut all = vec![first.to_string()];
        for entry in fs::read_dir("/proc")?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.parse::<u32>().is_ok() && parent(&entry.path()) == Some(first) {
                all.push(name);
            }
        }
        let sent = Command::new("kill")
            .arg(format!("-{signal}"))
            .args(&all)
            .stderr(Stdio::null())
            .status()?;
        // One that has just ended by itself makes it fail for that one.
        ensure!(sent.success() || all.len() > 1, "kill -{signal}: {sent}");
        Ok(())
    }

    fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn run(&self, program: &str, arguments: impl FnOnce(&mut Command)) -> Result<()> {
        let program = self.bin.join(program);
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"]);
            command.arg(&program);
            command
        } else {
            Command::new(&program)
        };
        arguments(&mut command);
        // Not a pipe: the server would keep it open for ever.
        let log = self.home.path().join("programs.log");
        let file = fs::File::options().create(true).append(true).open(&log)?;
        command
            .current_dir(self.home.path())
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let status = tokio::task::block_in_place(|| command.status())?;
        let says = fs::read_to_string(&log).unwrap_or_default();
        ensure!(status.success(), "{}: {status}: {says}", program.display());
        Ok(())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = self.signal("CONT");
        let _ = self.signal("KILL");
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// The process that started the one in this folder of `/proc`.
fn parent(process: &Path) -> Option<u32> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}
