//! Coordinator, evaluator and members: three programs' worth of reality, on this machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use cairn_proto::client::{Client, Options, join};
use cairn_proto::url::JoinUrl;
use cairn_proto::v1;
use cairn_stack::recipe::Recipe;
use tempfile::TempDir;

use crate::member::Member;
use crate::process::{Server, member};
use crate::study::hand::cpu_seconds;

/// How many may join with one token.
const TOKEN_USES: u32 = 10_000;
/// Records in a chunk of an uploaded set.
const CHUNK_RECORDS: usize = 512;

/// A coordinator, an evaluator, and the means to join.
pub struct Hall {
    /// A maintainer.
    pub maintainer: Member,
    server: Server,
    evaluator: Child,
    url: JoinUrl,
    folder: TempDir,
    joined: usize,
    /// Chunks of training data, by digest.
    chunks: BTreeMap<String, Vec<String>>,
}

impl Hall {
    /// Starts all of it.
    ///
    /// # Errors
    /// When a program does not start.
    pub async fn start(worker: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let data = folder.path().join("coordinator");
        let server = Server::start(&data, "127.0.0.1:0", &[])?;
        let maintainer = member(&data, "maintainer", "maintainer").await?;
        let day_ms = 86_400_000;
        let token = async |role: v1::Role, uses: u32| -> Result<String> {
            Ok(maintainer.create_token(role, uses, day_ms).await?)
        };
        let home = folder.path().join("evaluator");
        let evaluator = evaluate(worker, &home, &token(v1::Role::Evaluator, 1).await?)?;
        let url = token(v1::Role::Volunteer, TOKEN_USES).await?;
        let url = url.parse().map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(Self {
            maintainer,
            server,
            evaluator,
            url,
            folder,
            joined: 0,
            chunks: BTreeMap::new(),
        })
    }

    /// A volunteer that nobody has seen before.
    ///
    /// # Errors
    /// When joining is refused.
    pub async fn volunteer(&mut self, name: &str) -> Result<Member> {
        self.joined += 1;
        let file = self
            .folder
            .path()
            .join(format!("identity-{}.json", self.joined));
        let options = Options::default();
        let identity = join(&self.url, name, &file, &options).await?;
        Member::new(Client::new(identity, options)?)
    }

    /// Uploads a set of records.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn add_set(&self, name: &str, set: v1::DatasetSet, records: &[String]) -> Result<()> {
        let chunks: Vec<(Vec<u8>, u32)> = records
            .chunks(CHUNK_RECORDS)
            .map(|lines| {
                let bytes: String = lines
                    .iter()
                    .flat_map(|line| [line.as_str(), "\n"])
                    .collect();
                (bytes.into_bytes(), lines.len() as u32)
            })
            .collect();
        Ok(self.maintainer.add_dataset(name, set, &chunks).await?)
    }

    /// The records of a leased shard.
    ///
    /// # Errors
    /// When a chunk cannot be fetched.
    pub async fn records(&mut self, member: &Member, work: &v1::TrainWork) -> Result<Vec<String>> {
        let mut records = Vec::new();
        for range in &work.records {
            let chunk = range.chunk.as_ref().and_then(|chunk| chunk.blob.as_ref());
            let chunk = chunk.context("a range without a chunk")?;
            if !self.chunks.contains_key(&chunk.digest) {
                let text = String::from_utf8(member.fetch(chunk).await?)?;
                let lines = text.lines().map(str::to_owned).collect();
                self.chunks.insert(chunk.digest.clone(), lines);
            }
            let lines = &self.chunks[&chunk.digest];
            let (first, count) = (range.first as usize, range.count as usize);
            ensure!(first + count <= lines.len(), "a range beyond its chunk");
            records.extend_from_slice(&lines[first..first + count]);
        }
        Ok(records)
    }

    /// Processor time of coordinator and evaluator so far, seconds.
    ///
    /// # Errors
    /// When a process is gone.
    pub fn cpu_seconds(&self) -> Result<f64> {
        Ok(cpu_seconds(self.server.id())? + cpu_seconds(self.evaluator.id())?)
    }

    /// What the programs said last, for errors.
    #[must_use]
    pub fn log(&self) -> String {
        let path = self.folder.path().join("evaluator.log");
        let evaluator = fs::read_to_string(path).unwrap_or_default();
        let tail: Vec<&str> = evaluator.lines().rev().take(20).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        format!(
            "coordinator:\n{}\nevaluator:\n{}",
            self.server.log(),
            tail.join("\n")
        )
    }
}

impl Drop for Hall {
    fn drop(&mut self) {
        let _ = self.evaluator.kill();
        let _ = self.evaluator.wait();
    }
}

/// Joins as an evaluator and works, on one thread.
fn evaluate(worker: &Path, home: &PathBuf, url: &str) -> Result<Child> {
    let command = || {
        let mut command = Command::new(worker);
        command.env("CAIRN_HOME", home).env("CAIRN_THREADS", "1");
        command
    };
    let joined = command()
        .args(["join", url, "--name", "evaluator"])
        .output()?;
    if !joined.status.success() {
        bail!("the evaluator: {}", String::from_utf8_lossy(&joined.stderr));
    }
    let log = fs::File::create(home.with_extension("log"))?;
    Ok(command()
        .arg("run")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?)
}

/// Between two looks at what is waited for. Looking is work for the coordinator, which counts as
/// verification, and a real volunteer looks every ten seconds.
pub const LOOK: Duration = Duration::from_millis(600);

/// Waits between two looks.
pub async fn pause() {
    tokio::time::sleep(LOOK).await;
}

/// The recipe of a lease.
///
/// # Errors
/// When it is none.
pub fn recipe(work: &v1::TrainWork) -> Result<Recipe> {
    Ok(Recipe::parse_toml(&work.recipe)?)
}
