//! Keeps a coordinator running: whenever it dies, it is started again on the same data and address.
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cairn_tests::process::Server;
use cairn_tests::s3::S3;
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// How often its process is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// Starts in a row that may fail: by dying, or because another process has taken the port.
const STARTS_MAX: u32 = 40;

/// Where the blobs lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// A folder of the data folder.
    Folder,
    /// A bucket of an S3 server, which volunteers send to directly.
    Bucket,
}

/// A coordinator's folder and who watches over it.
pub struct Keeper {
    folder: TempDir,
    bucket: Option<S3>,
    inner: Arc<Mutex<Inner>>,
    watch: Option<JoinHandle<Result<()>>>,
}

struct Inner {
    server: Option<Server>,
    address: String,
    /// What it is told of its store.
    environment: Vec<(String, String)>,
    /// Where the process shall die, each once.
    armed: Vec<String>,
    /// Where it died.
    deaths: Vec<String>,
}

impl Keeper {
    /// Starts one that dies at each of these points, once.
    pub fn start(store: Store, points: &[String]) -> Result<Self> {
        let bucket = match store {
            Store::Folder => None,
            Store::Bucket => Some(S3::start_apart()),
        };
        let mut keeper = Self {
            folder: tempfile::tempdir()?,
            inner: Arc::new(Mutex::new(Inner {
                server: None,
                address: "127.0.0.1:0".to_owned(),
                environment: bucket.as_ref().map(S3::environment).unwrap_or_default(),
                armed: points.to_vec(),
                deaths: Vec::new(),
            })),
            bucket,
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

    /// The folder that holds the blobs, by any store.
    pub fn blobs(&self) -> PathBuf {
        match &self.bucket {
            None => self.data().join("store/blobs"),
            Some(bucket) => bucket.file("blobs"),
        }
    }

    /// What programs are told of the store.
    pub fn environment(&self) -> Vec<(String, String)> {
        lock(&self.inner).environment.clone()
    }

    /// Where it died.
    pub fn deaths(&self) -> Vec<String> {
        lock(&self.inner).deaths.clone()
    }

    /// Where it was to die and did not.
    pub fn missed(&self) -> Vec<String> {
        lock(&self.inner).armed.clone()
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
        if !server.has_ended()? {
            server.terminate()?;
            if server.ended().await?.success() {
                return Ok(());
            }
        }
        note_death(&self.inner, &self.trace_path())
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
                        lock(&inner).server = None;
                        note_death(&inner, &trace)?;
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
}

/// It died where the trace ends.
fn note_death(inner: &Mutex<Inner>, trace: &Path) -> Result<()> {
    let text = std::fs::read_to_string(trace)?;
    let last = text.lines().last().unwrap_or_default();
    let mut state = lock(inner);
    let before = state.armed.len();
    state.armed.retain(|point| point != last);
    state.deaths.push(last.to_owned());
    ensure!(
        state.armed.len() < before,
        "died at {last}, where it should not"
    );
    Ok(())
}

fn start(inner: &Mutex<Inner>, data: &Path, trace: &Path) -> Result<()> {
    let text = trace.to_str().context("a path that is no text")?;
    for _ in 0..STARTS_MAX {
        let (address, armed, store) = {
            let state = lock(inner);
            let armed = state.armed.join(",");
            (state.address.clone(), armed, state.environment.clone())
        };
        let own = [("CAIRN_FAILPOINT_TRACE", text), ("CAIRN_FAILPOINT", &armed)];
        let store = store
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let environment: Vec<(&str, &str)> = own.into_iter().chain(store).collect();
        match Server::start_in(data, &address, &[], &environment) {
            Ok(server) => {
                let mut state = lock(inner);
                state.address.clone_from(&server.address);
                state.server = Some(server);
                return Ok(());
            }
            // It died before it served, or another process has the port for a moment.
            Err(_) if note_death(inner, trace).is_ok() => {}
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
