//! The coordinators, and who kills them.
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use cairn_proto::url::JoinUrl;
use tokio::time::Instant;

use super::Size;
use crate::balancer::Balancer;
use crate::process::{Server, join_url};
use crate::s3::S3;

/// Where nobody listens yet.
const ANY_PORT: &str = "127.0.0.1:0";
/// How long a coordinator stays away, every so often: longer than others wait for it.
const LONG_AWAY: Duration = Duration::from_secs(15);
/// Otherwise at most so long, milliseconds.
const AWAY_MS_MAX: u64 = 2_000;
/// One in so many kills is a long one.
const LONG_EVERY: usize = 4;
/// How often the logs are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// What a coordinator says that takes a task.
const TAKES: &str = "this coordinator runs the task";

/// One coordinator's place.
struct Place {
    data: PathBuf,
    address: String,
    server: Option<Server>,
}

/// Coordinators over one database and one store.
pub struct Group {
    balancer: Balancer,
    database_url: String,
    /// Where the blobs are, as variables of the coordinators' environment.
    blobs: Vec<(String, String)>,
    bucket: Option<S3>,
    places: Mutex<Vec<Place>>,
    tally: Mutex<Tally>,
}

#[derive(Default)]
struct Tally {
    kills: usize,
    takeovers: Vec<f64>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number below `end`, of no particular kind.
fn any_below(end: u64) -> u64 {
    let (low, _) = uuid::Uuid::new_v4().as_u64_pair();
    low % end.max(1)
}

impl Group {
    /// Starts them all at once, on an empty database.
    ///
    /// # Errors
    /// When one does not serve.
    pub async fn start(size: &Size, database_url: &str, folder: &Path) -> Result<Self> {
        let bucket = size.bucket.then(S3::start_apart);
        let blobs = match &bucket {
            Some(bucket) => bucket.environment(),
            None => {
                let blobs = folder.join("blobs").display().to_string();
                vec![("CAIRN_BLOBS".to_owned(), blobs)]
            }
        };
        let group = Self {
            balancer: Balancer::start().await?,
            database_url: database_url.to_owned(),
            blobs,
            bucket,
            places: Mutex::default(),
            tally: Mutex::default(),
        };
        let mut starting = Vec::new();
        for number in 0..size.replicas {
            let data = folder.join(format!("coordinator-{number}"));
            let start = group.starter(&data, ANY_PORT);
            starting.push((data, tokio::task::spawn_blocking(start)));
        }
        for (data, server) in starting {
            let server = server.await??;
            locked(&group.places).push(Place {
                data,
                address: server.address.clone(),
                server: Some(server),
            });
        }
        let places = locked(&group.places);
        let addresses = places.iter().map(|place| place.address.clone()).collect();
        drop(places);
        group.balancer.set_backends(addresses);
        Ok(group)
    }

    fn starter(&self, data: &Path, address: &str) -> impl FnOnce() -> Result<Server> + use<> {
        let public = self.balancer.address.to_string();
        let (database, blobs) = (self.database_url.clone(), self.blobs.clone());
        let (data, address) = (data.to_owned(), address.to_owned());
        move || {
            let options = ["--database-url", &database, "--public-address", &public];
            let blobs: Vec<(&str, &str)> = blobs
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_str()))
                .collect();
            Server::start_in(&data, &address, &options, &blobs)
        }
    }

    /// Adapters that went straight to the bucket, where there is one.
    pub fn direct_puts(&self) -> Option<usize> {
        self.bucket
            .as_ref()
            .map(|bucket| bucket.direct_puts().len())
    }

    /// A join URL for the first maintainer.
    ///
    /// # Errors
    /// When the command fails.
    pub fn join_url(&self, role: &str) -> Result<JoinUrl> {
        let data = locked(&self.places).first().map(|place| place.data.clone());
        let data = data.context("there is a coordinator")?;
        join_url(&data, role, &["--database-url", &self.database_url])
    }

    /// SIGKILLs so far.
    pub fn kills(&self) -> usize {
        locked(&self.tally).kills
    }

    /// Seconds from the kill of a coordinator with tasks until another had them.
    pub fn takeovers(&self) -> Vec<f64> {
        locked(&self.tally).takeovers.clone()
    }

    /// Kills one after another, and starts each again, until aborted.
    ///
    /// # Panics
    /// When one does not start again: nothing would be killed any more.
    pub async fn kill_now_and_then(self: Arc<Self>, every: Duration) {
        let places = locked(&self.places).len() as u64;
        for number in 1.. {
            // Between half the time and one and a half.
            let wait = every.mul_f64(0.5 + any_below(1_000) as f64 / 1_000.0);
            tokio::time::sleep(wait).await;
            let victim = usize::try_from(any_below(places)).unwrap_or(0);
            let seen = self.takes_seen();
            let killed = locked(&self.places)[victim].server.take();
            if let Some(server) = killed {
                server.kill_9().expect("a process of ours can be killed");
                locked(&self.tally).kills += 1;
            }
            if number % LONG_EVERY == 0 {
                self.watch_takeover(victim, &seen).await;
            } else {
                tokio::time::sleep(Duration::from_millis(any_below(AWAY_MS_MAX))).await;
            }
            self.restart(victim).await.expect("it starts again");
        }
    }

    /// Waits as long as one stays away; notes when the first of its tasks was taken, if it had any.
    async fn watch_takeover(&self, victim: usize, seen: &BTreeSet<String>) {
        let killed = Instant::now();
        let mut taken = false;
        while killed.elapsed() < LONG_AWAY {
            tokio::time::sleep(LOOK).await;
            let new = self.takes_of(|number| number != victim);
            if !taken && new.iter().any(|line| !seen.contains(line)) {
                taken = true;
                let seconds = killed.elapsed().as_secs_f64();
                locked(&self.tally).takeovers.push(seconds);
            }
        }
    }

    fn takes_seen(&self) -> BTreeSet<String> {
        self.takes_of(|_| true)
    }

    fn takes_of(&self, wanted: impl Fn(usize) -> bool) -> BTreeSet<String> {
        let places = locked(&self.places);
        let servers = places
            .iter()
            .enumerate()
            .filter(|(number, _)| wanted(*number));
        let logs = servers.filter_map(|(_, place)| place.server.as_ref().map(Server::log));
        logs.flat_map(|log| {
            let lines = log.lines().filter(|line| line.contains(TAKES));
            lines.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect()
    }

    async fn restart(&self, number: usize) -> Result<()> {
        let start = {
            let places = locked(&self.places);
            let place = &places[number];
            if place.server.is_some() {
                return Ok(());
            }
            self.starter(&place.data, &place.address)
        };
        let server = tokio::task::spawn_blocking(start).await??;
        locked(&self.places)[number].server = Some(server);
        Ok(())
    }

    /// Starts those that are away.
    ///
    /// # Errors
    /// When one does not start.
    pub async fn restart_all(&self) -> Result<()> {
        let count = locked(&self.places).len();
        for number in 0..count {
            self.restart(number).await?;
        }
        Ok(())
    }
}
