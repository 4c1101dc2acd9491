//! Lines that break while an adapter is on its way.
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cairn_proto::convert::BlobName;
use cairn_proto::v1;
use cairn_stack::digest::Digest;
use tokio::time::Instant;

use super::proxy::{Proxy, Rules};
use super::suite::{Stage, Told, worker};
use super::world::{Ack, Setting, World};
use crate::adapters::honest;
use crate::process::eventually;
use crate::tiny::{self, round_file};

/// A blob that takes several chunks.
const LARGE_BYTES: u32 = 6_000_000;
/// How long after a cut a client may take to go on: its first waits are a fraction of a second.
const RESUME_MAX: Duration = Duration::from_secs(30);

/// Bytes that no compression and no hole in a file makes shorter.
#[must_use]
pub fn noise(count: u32) -> Vec<u8> {
    (0..count)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// The name of these bytes.
#[must_use]
pub fn name_of(bytes: &[u8]) -> BlobName {
    BlobName {
        digest: Digest::of(bytes),
        size_bytes: bytes.len() as u64,
    }
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn cut(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let proxy = Proxy::start(&world.address).await?;
    let role = v1::Role::Maintainer;
    let member = world.member_at(role, "far away", &proxy.address).await?;
    let bytes = noise(LARGE_BYTES);
    let name = name_of(&bytes);
    let path = world.scratch().join("large");
    std::fs::write(&path, &bytes)?;
    // Every connection is cut behind another megabyte and a half.
    proxy.set(Rules {
        cut_after_up: Some(1_500_000),
        ..Rules::default()
    });
    let (before, connections) = (proxy.bytes_up(), proxy.connections());
    let starts = Mutex::new(Vec::new());
    let note = |at: u64| starts.lock().expect("nobody panics holding it").push(at);
    let since = Instant::now();
    let patient = member.client.with_patience(RESUME_MAX);
    patient.upload(&path, name, "", &note).await?;
    let took = since.elapsed();
    let (sent, lines) = (proxy.bytes_up() - before, proxy.connections() - connections);
    ensure!(lines >= 3, "only {lines} connections were cut");
    // A chunk that was cut in its middle is sent again; more than one a connection is not.
    let most = name.size_bytes + (lines + 1) * 1_100_000;
    ensure!(
        sent <= most,
        "{sent} bytes were sent for {}",
        name.size_bytes
    );
    ensure!(
        world.maintainer().fetch(&name.into()).await? == bytes,
        "other bytes"
    );
    Ok(Told::saw(format!(
        "{lines} lines cut, {:.1} MB sent for {:.1} MB",
        sent as f64 / 1e6,
        name.size_bytes as f64 / 1e6
    ))
    .after(took))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn ack_lost(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let proxy = Proxy::start(&world.address).await?;
    let role = v1::Role::Volunteer;
    let member = world.member_at(role, "bob", &proxy.address).await?;
    let lease = member.lease().await?;
    let adapter = honest(1);
    member.upload(&adapter.weights, &lease.id).await?;
    let request = member.submission(&lease, &adapter);
    proxy.set(Rules {
        swallow_down: true,
        ..Rules::default()
    });
    let heal = async {
        // Committed, by another line's word; then the line that swallowed the answer goes.
        eventually("the submission is committed", || async {
            let view = world.maintainer().round(&round).await?;
            Ok((!view.contributions.is_empty()).then_some(()))
        })
        .await?;
        proxy.set(Rules::default());
        proxy.cut();
        anyhow::Ok(Instant::now())
    };
    let (answer, healed) = tokio::join!(world.submit(&member, &lease, &request, &adapter), heal);
    let (answer, recovery) = (answer?, healed?.elapsed());
    for _ in 0..3 {
        let again = member.submit(&request).await?;
        ensure!(
            again.submission_id == answer.submission_id,
            "another answer"
        );
        ensure!(again.receipt == answer.receipt, "another receipt");
    }
    world.publish(&round).await?;
    let standing = member.standing().await?;
    ensure!(standing.accepted == 1, "{standing:?}");
    Ok(Told::saw("sent five times, one receipt").after(recovery))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn slow_line(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let proxy = Proxy::start(&world.address).await?;
    proxy.set(Rules {
        delay: Duration::from_millis(50),
        bytes_per_second: Some(256 * 1024),
        ..Rules::default()
    });
    let since = Instant::now();
    let maintainer = v1::Role::Maintainer;
    let far = world.member_at(maintainer, "far", &proxy.address).await?;
    let bytes = noise(1_500_000);
    let name = far.upload(&bytes, "").await?;
    ensure!(far.fetch(&name.into()).await? == bytes, "other bytes");
    let bob = world
        .member_at(v1::Role::Volunteer, "bob", &proxy.address)
        .await?;
    let lease = bob.lease().await?;
    world.hand_in(&bob, &lease, &honest(1)).await?;
    world.publish(&round).await?;
    let seconds = since.elapsed().as_secs();
    Ok(Told::saw(format!(
        "1.5 MB up and down and a round in {seconds} s"
    )))
}

/// A running `cairn-worker`; killed when dropped.
pub struct Volunteer {
    home: PathBuf,
    child: Option<Child>,
}

impl Volunteer {
    /// Joins as a volunteer, at this address.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn join(world: &World, name: &str, address: &str) -> Result<Self> {
        let mut url = world.url(v1::Role::Volunteer, 1).await?;
        let (host, port) = address.split_once(':').context("an address")?;
        host.clone_into(&mut url.server.host);
        url.server.port = port.parse()?;
        let home = world.scratch().join(name);
        let text = url.secret_text();
        let joined = tokio::task::block_in_place(|| {
            command(&home)?
                .args(["join", &text, "--name", name])
                .output()
                .context("run cairn-worker")
        })?;
        let says = String::from_utf8_lossy(&joined.stderr);
        ensure!(joined.status.success(), "join: {}", says.trim());
        Ok(Self { home, child: None })
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it does not start.
    pub fn run(&mut self) -> Result<()> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.home.join("log"))?;
        let child = command(&self.home)?
            .args(["run", "--threads", "1", "--checkpoint-seconds", "1"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.child = Some(child);
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_9(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.home.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(8).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }
}

impl Drop for Volunteer {
    fn drop(&mut self) {
        let _ = self.kill_9();
    }
}

fn command(home: &Path) -> Result<Command> {
    let mut command = Command::new(worker()?);
    command.env_clear().env("CAIRN_HOME", home);
    Ok(command)
}

/// The demo's base and a few of its records: what a real worker can train.
pub const VILLAGE: &str = "village";

/// Adds it.
///
/// # Errors
/// As the calls.
pub async fn add_village(world: &World) -> Result<()> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/demo");
    let maintainer = world.maintainer();
    maintainer.add_model(VILLAGE, &demo.join("base")).await?;
    let text = std::fs::read_to_string(demo.join("train.jsonl"))?;
    let lines: String = text
        .lines()
        .take(16)
        .flat_map(|line| [line, "\n"])
        .collect();
    let train = [(lines.into_bytes(), 16)];
    maintainer
        .add_dataset("notes", v1::DatasetSet::Train, &train)
        .await?;
    Ok(())
}

/// A round over it: two steps, an adapter of `rank`.
#[must_use]
pub fn village_round(rank: u32) -> String {
    let gate = tiny::GATE;
    format!(
        "model = \"{VILLAGE}\"\ndataset = \"notes\"\nshards = 1\n\n[recipe]\nrank = {rank}\n\
         alpha = {rank}\ntarget_modules = \"all-linear\"\nlearning_rate = 1e-3\nsteps = 2\n\
         batch_size = 2\nsequence_length = 128\nseed = 7\n\n[policy]\ngate = \"{gate}\"\n\
         deadline = \"1h\"\nlease = \"10m\"\n"
    )
}

/// The one submission of a round, when it is there, with its bytes: as the volunteer's program does
/// not tell us what it was answered, this stands for its acknowledgement.
///
/// # Errors
/// As the call.
pub async fn submitted(world: &World, round: &str) -> Result<v1::Contribution> {
    eventually("the worker hands in", || async {
        let view = world.maintainer().round(round).await?;
        Ok(view.contributions.into_iter().next())
    })
    .await
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn worker_killed(stage: &mut Stage) -> Result<Told> {
    /// Behind the first whole chunk of the upload, before the second ends.
    const HOLD_AT: u64 = 1_200_000;
    let world = stage.set(Setting::default()).await?;
    add_village(world).await?;
    let proxy = Proxy::start(&world.address).await?;
    let round = world.maintainer().open_round(&village_round(48)).await?;
    let mut volunteer = Volunteer::join(world, "bob", &proxy.address).await?;
    proxy.set(Rules {
        swallow_after_up: Some(HOLD_AT),
        ..Rules::default()
    });
    volunteer.run()?;
    let uploads = world.data().join("uploads");
    let held = || {
        let files = std::fs::read_dir(&uploads).into_iter().flatten().flatten();
        files
            .filter_map(|file| Some(file.metadata().ok()?.len()))
            .max()
    };
    let half = eventually("the first chunk is held", || async {
        Ok(held().filter(|held| *held > 0))
    });
    let half = half.await.with_context(|| volunteer.log())?;
    volunteer.kill_9()?;
    proxy.set(Rules::default());
    proxy.cut();
    let before = proxy.bytes_up();
    let since = Instant::now();
    volunteer.run()?;
    let one = submitted(world, &round)
        .await
        .with_context(|| volunteer.log())?;
    let (recovery, sent) = (since.elapsed(), proxy.bytes_up() - before);
    volunteer.kill_9()?;
    let held = world.stored(&one.adapter_digest);
    let bytes = std::fs::read(&held).with_context(|| held.display().to_string())?;
    let blob: v1::BlobRef = name_of(&bytes).into();
    ensure!(
        blob.digest == one.adapter_digest,
        "other bytes in the store"
    );
    ensure!(
        blob.size_bytes > HOLD_AT,
        "an adapter of {} bytes",
        blob.size_bytes
    );
    ensure!(
        sent < blob.size_bytes,
        "{sent} bytes were sent again, although {half} of {} were held",
        blob.size_bytes
    );
    world.note(Ack {
        submission: one.id,
        round: round.clone(),
        receipt: None,
        bytes,
    });
    let view = world.maintainer().round(&round).await?;
    ensure!(view.contributions.len() == 1, "more than one submission");
    Ok(Told::saw(format!(
        "{half} of {} bytes were held, {sent} sent after the restart",
        blob.size_bytes
    ))
    .after(recovery))
}
