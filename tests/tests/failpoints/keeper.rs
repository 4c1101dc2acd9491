//! Keeps a coordinator running: whenever it dies, it is started again on the same data and address.
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cairn_tests::process::Server;
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// How often its process is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// Starts that may fail in a row: another process may have taken the port for a moment.
const STARTS_MAX: u32 = 20;

/// A coordinator's folder and who watches over it.
pub struct Keeper {
    folder: TempDir,
    inner: Arc<Mutex<Inner>>,
    watch: Option<JoinHandle<Result<()>>>,
}

struct Inner {
    server: Option<Server>,
    address: String,
    /// Where the process shall die; taken when it has died.
    armed: Option<String>,
    deaths: u32,
}

impl Keeper {
    /// Starts one that dies where `failpoint` says, once.
    pub fn start(failpoint: Option<&str>) -> Result<Self> {
        let mut keeper = Self {
            folder: tempfile::tempdir()?,
            inner: Arc::new(Mutex::new(Inner {
                server: None,
                address: "127.0.0.1:0".to_owned(),
                armed: failpoint.map(str::to_owned),
                deaths: 0,
            })),
            watch: None,
        };
        keeper.resume()?;
        Ok(keeper)
    }

    /// A place for files beside the coordinator's.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// How often it died by itself.
    pub fn deaths(&self) -> u32 {
        lock(&self.inner).deaths
    }

    /// Every step that its processes passed, in order.
    pub fn trace(&self) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(self.trace_path())?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Stops it, or waits for a death that is under way.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(watch) = self.watch.take() {
            watch.abort();
            let _ = watch.await;
        }
        let server = lock(&self.inner).server.take();
        let Some(mut server) = server else {
            return Ok(());
        };
        if server.has_ended()? {
            self.note_death();
            return Ok(());
        }
        server.terminate()?;
        let status = server.ended().await?;
        if !status.success() {
            self.note_death();
        }
        Ok(())
    }

    /// Starts it again after [`Keeper::stop`].
    pub fn resume(&mut self) -> Result<()> {
        let (data, trace) = (self.data(), self.trace_path());
        start(&self.inner, &data, &trace)?;
        let inner = self.inner.clone();
        self.watch = Some(tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                let ended = match &mut lock(&inner).server {
                    Some(server) => server.has_ended()?,
                    None => return Ok(()),
                };
                if ended {
                    let (inner, data, trace) = (inner.clone(), data.clone(), trace.clone());
                    tokio::task::spawn_blocking(move || {
                        let mut state = lock(&inner);
                        (state.armed, state.server) = (None, None);
                        state.deaths += 1;
                        drop(state);
                        start(&inner, &data, &trace)
                    })
                    .await??;
                }
            }
        }));
        Ok(())
    }

    fn trace_path(&self) -> PathBuf {
        self.folder.path().join("trace")
    }

    fn note_death(&self) {
        let mut state = lock(&self.inner);
        state.armed = None;
        state.deaths += 1;
    }
}

fn start(inner: &Mutex<Inner>, data: &Path, trace: &Path) -> Result<()> {
    let trace = trace.to_str().context("a path that is no text")?;
    for _ in 0..STARTS_MAX {
        let (address, armed) = {
            let state = lock(inner);
            (state.address.clone(), state.armed.clone())
        };
        let mut environment = vec![("CAIRN_FAILPOINT_TRACE", trace)];
        if let Some(failpoint) = &armed {
            environment.push(("CAIRN_FAILPOINT", failpoint));
        }
        match Server::start_in(data, &address, &environment) {
            Ok(server) => {
                let mut state = lock(inner);
                state.address.clone_from(&server.address);
                state.server = Some(server);
                return Ok(());
            }
            // Died before it served.
            Err(_) if armed.is_some() => {
                let mut state = lock(inner);
                state.armed = None;
                state.deaths += 1;
            }
            Err(error) if address.ends_with(":0") => return Err(error),
            Err(_) => std::thread::sleep(LOOK),
        }
    }
    ensure!(false, "the coordinator does not start again");
    Ok(())
}

fn lock(inner: &Mutex<Inner>) -> std::sync::MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}
