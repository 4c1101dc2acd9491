//! A database that does not answer, and a blob store that errs, stalls, rots and fills up.
//!
//! The blob store is a folder here; [`super::bucket`] has one by URL.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use cairn_coordinator::db::Db;
use cairn_coordinator::server::database_url;
use cairn_proto::client::{Client, ClientError, Options};
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use tokio::time::Instant;

use super::database::Postgres;
use super::suite::{Stage, Told};
use super::uploads::noise;
use super::world::{Setting, WAIT_MS, World, patiently};
use crate::adapters::{Adapter, honest};
use crate::member::Member;
use crate::tiny::round_file;

/// How long after a fault everything must work again: the longest pause of a background task, and
/// what a client waits by itself.
const RECOVERY_MAX: Duration = Duration::from_mins(1);
/// How long a call may take before it says that something is wrong: the limit of a call, and a little.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(70);
/// How long a call may take where nothing is wrong, on a busy machine.
const PROMPT: Duration = Duration::from_secs(3);

/// The same member, that does not try again but waits long for an answer.
pub(super) fn hasty(member: &Member) -> Result<Member> {
    let options = Options {
        deadline: ANSWER_MAX * 2,
        patience: Duration::ZERO,
        ..Options::default()
    };
    Member::new(Client::new(member.client.identity().clone(), options)?)
}

/// A round without audits: what is handed in is handed in with one call.
pub(super) fn unaudited(shards: u32) -> String {
    round_file(shards).replace("[policy]\n", "[policy]\nsegments = 0\n")
}

/// Refused, in a way that tells a worker to come back, and when.
pub(super) fn comes_back<T>(what: &str, answer: Result<T, ClientError>) -> Result<ErrorReason> {
    let Err(error) = answer else {
        anyhow::bail!("{what}: not refused");
    };
    let reason = error.reason().with_context(|| format!("{what}: {error}"))?;
    ensure!(
        error.retry() && error.retry_after().is_some(),
        "{what}: {reason}, without a time to come back"
    );
    Ok(reason)
}

/// The same, for a reason that is known.
fn is_unavailable<T>(what: &str, answer: Result<T, ClientError>) -> Result<()> {
    let reason = comes_back(what, answer)?;
    ensure!(reason == ErrorReason::Unavailable, "{what}: {reason}");
    Ok(())
}

/// A volunteer with a lease and an adapter that is uploaded but not submitted.
pub(super) struct Ready {
    pub(super) member: Member,
    lease: v1::Lease,
    adapter: Adapter,
    request: v1::SubmitAdapterRequest,
}

impl Ready {
    pub(super) async fn new(world: &World, name: &str, seed: u64) -> Result<Self> {
        let member = hasty(&world.volunteer(name).await?)?;
        let lease = member.lease().await?;
        let adapter = honest(seed);
        member.upload(&adapter.weights, &lease.id).await?;
        let request = member.submission(&lease, &adapter);
        Ok(Self {
            member,
            lease,
            adapter,
            request,
        })
    }

    pub(super) async fn submit(
        &self,
        world: &World,
    ) -> Result<v1::SubmitAdapterResponse, ClientError> {
        world
            .submit(&self.member, &self.lease, &self.request, &self.adapter)
            .await
    }

    /// What was acknowledged before a fault was accepted after it.
    pub(super) async fn is_accepted(&self) -> Result<()> {
        let (verdict, reason) = self.member.verdict().await?;
        ensure!(
            verdict == v1::Verdict::Accepted,
            "what was acknowledged before was rejected: {reason}"
        );
        Ok(())
    }

    /// Submits as soon as it can be; how long that took.
    async fn submit_soon(&self, world: &World) -> Result<Duration> {
        let since = Instant::now();
        patiently(RECOVERY_MAX, async || Ok(self.submit(world).await?)).await?;
        Ok(since.elapsed())
    }
}

/// Hands in as soon as it can be; how long that took.
pub(super) async fn hand_in_soon(
    world: &World,
    member: &Member,
    lease: &v1::Lease,
    adapter: &Adapter,
) -> Result<Duration> {
    let since = Instant::now();
    patiently(RECOVERY_MAX, async || {
        Ok(world.hand_in(member, lease, adapter).await?)
    })
    .await?;
    Ok(since.elapsed())
}

/// Asks now and then, for as long as a fault lasts; the slowest answer, which is a prompt one.
pub(super) async fn slowest_answer(ask: impl AsyncFn() -> Result<()>) -> Result<Duration> {
    const LASTS: Duration = Duration::from_secs(20);
    let since = Instant::now();
    let mut slowest = Duration::ZERO;
    while since.elapsed() < LASTS {
        let asked = Instant::now();
        ask().await?;
        slowest = slowest.max(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    ensure!(slowest < PROMPT, "others waited for {slowest:?}");
    Ok(slowest)
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn database_locked(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let bob = Ready::new(world, "bob", 1).await?;
    let plain = |error: cairn_coordinator::error::Error| anyhow!(error.full());
    let other = Db::open(&database_url(None, &world.data()))
        .await
        .map_err(plain)?;
    let lock = other.begin().await.map_err(plain)?;
    let since = Instant::now();
    is_unavailable("a submission", bob.submit(world).await)?;
    let refused = since.elapsed();
    let since = Instant::now();
    let view = world.maintainer().round(&round).await?;
    ensure!(view.contributions.is_empty(), "it is there all the same");
    ensure!(since.elapsed() < PROMPT, "readers wait too");
    drop(lock);
    other.close().await;
    let recovery = bob.submit_soon(world).await?;
    world.publish(&round).await?;
    let seconds = refused.as_secs();
    Ok(Told::saw(format!("UNAVAILABLE after {seconds} s, reads as ever")).after(recovery))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn database_stopped(stage: &mut Stage) -> Result<Told> {
    let (world, postgres) = on_postgres(stage).await?;
    let round = world.maintainer().open_round(&round_file(2)).await?;
    let (bob, carol) = (
        Ready::new(world, "bob", 1).await?,
        Ready::new(world, "carol", 2).await?,
    );
    bob.submit(world).await?;
    postgres.signal("STOP")?;
    // One whose session has just been looked up, and one who is not known any more.
    let since = Instant::now();
    let stranger = async {
        tokio::time::sleep(Duration::from_secs(6)).await;
        bob.member.standing().await
    };
    let answers = tokio::time::timeout(ANSWER_MAX, async {
        tokio::join!(carol.submit(world), stranger)
    });
    let answers = answers.await;
    postgres.signal("CONT")?;
    let healed = Instant::now();
    let (submitted, looked_up) = answers.context("a call hangs while the database stands still")?;
    is_unavailable("a submission", submitted)?;
    is_unavailable("a call of a session to look up", looked_up)?;
    let refused = healed - since;
    let recovery = carol.submit_soon(world).await?;
    world.publish(&round).await?;
    let seconds = refused.as_secs();
    Ok(Told::saw(format!("UNAVAILABLE within {seconds} s")).after(recovery))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn database_killed(stage: &mut Stage) -> Result<Told> {
    const KILLS: u64 = 3;
    let (world, postgres) = on_postgres(stage).await?;
    let process = world.process_id();
    let round = world.maintainer().open_round(&round_file(6)).await?;
    let mut worst = Duration::ZERO;
    let mut refusals = 0;
    for kill in 0..KILLS {
        let (one, two) = (
            Ready::new(world, &format!("a{kill}"), 10 + kill).await?,
            Ready::new(world, &format!("b{kill}"), 20 + kill).await?,
        );
        // Amid a submission: it is acknowledged and there, or it is neither.
        let dying = async {
            tokio::time::sleep(Duration::from_millis(kill)).await;
            postgres.signal("KILL")
        };
        let (first, killed) = tokio::join!(one.submit(world), dying);
        killed?;
        if let Err(error) = first {
            ensure!(error.retry(), "amid the kill: {error}");
            refusals += 1;
        }
        comes_back("after the kill", two.submit(world).await)?;
        refusals += 1;
        postgres.again()?;
        for ready in [&one, &two] {
            worst = worst.max(ready.submit_soon(world).await?);
        }
    }
    ensure!(
        world.process_id() == process,
        "the coordinator was restarted"
    );
    world.publish(&round).await?;
    Ok(Told::saw(format!("{KILLS} kills, {refusals} calls refused")).after(worst))
}

async fn on_postgres(stage: &mut Stage) -> Result<(&World, std::sync::Arc<Postgres>)> {
    let postgres = std::sync::Arc::new(Postgres::start()?);
    stage.keep(std::sync::Arc::clone(&postgres));
    let setting = Setting {
        database: Some(postgres.url()),
        ..Setting::default()
    };
    Ok((stage.set(setting).await?, postgres))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn store_errors(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let round = world.maintainer().open_round(&unaudited(2)).await?;
    let (bob, carol) = (
        Ready::new(world, "bob", 1).await?,
        hasty(&world.volunteer("carol").await?)?,
    );
    let lease = carol.lease().await?;
    let (blobs, aside) = (
        world.data().join("store/blobs"),
        world.scratch().join("aside"),
    );
    // Gone, as a disk that is not mounted; then unusable, as one that is broken.
    fs::rename(&blobs, &aside)?;
    bob.submit(world).await?;
    comes_back(
        "an upload without a store",
        carol.upload(&honest(2).weights, &lease.id).await,
    )?;
    // Longer than the tasks' period: they look at the submission while its bytes are away.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let _ = fs::remove_dir_all(&blobs);
    fs::write(&blobs, "no folder")?;
    comes_back(
        "an upload to a broken store",
        carol.upload(&honest(2).weights, &lease.id).await,
    )?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    fs::remove_file(&blobs)?;
    fs::rename(&aside, &blobs)?;
    let recovery = hand_in_soon(world, &carol, &lease, &honest(2)).await?;
    world.publish(&round).await?;
    bob.is_accepted().await?;
    Ok(Told::saw("refused with a time to come back, twice; then both accepted").after(recovery))
}

/// A file that takes for ever to open: nobody writes to it. Ends when dropped.
struct Stalled(PathBuf);

impl Stalled {
    fn put(path: &Path) -> Result<Self> {
        let made = Command::new("mkfifo").arg(path).status()?;
        ensure!(made.success(), "mkfifo says {made}");
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        // Whoever waits for a writer gets one, and the end of the file.
        let _ = fs::File::options().read(true).write(true).open(&self.0);
        let _ = fs::remove_file(&self.0);
    }
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn store_stalls(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let file = world.maintainer().checkpoint("").await?.files;
    let blob = file
        .into_iter()
        .find_map(|file| file.blob)
        .context("a file")?;
    let (path, aside) = (world.stored(&blob.digest), world.scratch().join("aside"));
    fs::rename(&path, &aside)?;
    let stalled = Stalled::put(&path)?;
    let bob = hasty(&world.volunteer("bob").await?)?;
    let carol = world.volunteer("carol").await?;
    let since = Instant::now();
    let others = async {
        let slowest = slowest_answer(async || Ok(carol.standing().await.map(drop)?)).await?;
        let lease = carol.lease().await?;
        world.hand_in(&carol, &lease, &honest(1)).await?;
        Ok::<_, anyhow::Error>(slowest)
    };
    let reading = tokio::time::timeout(ANSWER_MAX, bob.fetch(&blob));
    let (read, slowest) = tokio::join!(reading, others);
    let slowest = slowest?;
    let Err(error) = read.context("its reader hangs")? else {
        anyhow::bail!("read bytes that are not there");
    };
    ensure!(error.retry(), "its reader does not come back: {error}");
    let gave_up = since.elapsed().as_secs();
    drop(stalled);
    fs::rename(&aside, &path)?;
    let since = Instant::now();
    patiently(RECOVERY_MAX, async || Ok(bob.fetch(&blob).await?)).await?;
    let recovery = since.elapsed();
    world.publish(&round).await?;
    Ok(Told::saw(format!(
        "given up after {gave_up} s; others waited {} ms at most",
        slowest.as_millis()
    ))
    .after(recovery))
}

/// Turns one bit of a file; what it was before.
pub(super) fn rot(path: &Path) -> Result<Vec<u8>> {
    let sound = fs::read(path)?;
    let mut rotten = sound.clone();
    let middle = rotten.len() / 2;
    *rotten.get_mut(middle).context("an empty file")? ^= 1;
    // In place: a file of its own, as others may be links to the same bytes.
    fs::remove_file(path)?;
    fs::write(path, rotten)?;
    Ok(sound)
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn bit_rot(stage: &mut Stage) -> Result<Told> {
    let setting = Setting {
        here: true,
        ..Setting::default()
    };
    let world = stage.set(setting).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let bob = world.volunteer("bob").await?;
    let (lease, adapter) = (bob.lease().await?, honest(1));
    world.hand_in(&bob, &lease, &adapter).await?;
    let path = world.stored(&adapter.name().digest.to_string());
    let sound = rot(&path)?;
    world.settle().await?;
    let (verdict, reason) = bob.verdict().await?;
    ensure!(
        verdict == v1::Verdict::Rejected && reason == "UNREADABLE",
        "{verdict:?} {reason}"
    );
    let view = world.maintainer().round(&round).await?;
    ensure!(
        view.shards.iter().all(|shard| shard.failures == 0),
        "it counts against the volunteer"
    );
    ensure!(bob.standing().await?.strikes == 0, "a strike");
    // The operator's copy, and somebody who trains the shard again.
    fs::write(&path, sound)?;
    let carol = world.volunteer("carol").await?;
    let lease = carol.lease().await?;
    // The base has rotten too: what arrives is looked at, and not believed.
    let training = crate::member::training(&lease);
    let blob = training
        .base_files
        .iter()
        .find(|file| file.path == crate::tiny::WEIGHTS)
        .and_then(|file| file.blob.clone())
        .context("the base's weights")?;
    let base = world.stored(&blob.digest);
    let sound = rot(&base)?;
    ensure!(carol.fetch(&blob).await.is_err(), "rotten bytes were taken");
    fs::write(&base, sound)?;
    carol.fetch(&blob).await?;
    world.hand_in(&carol, &lease, &honest(2)).await?;
    world.publish(&round).await?;
    Ok(Told::saw(
        "adapter and base: found out, put back, published",
    ))
}

/// A small disk; unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, mebibytes: u32) -> Result<Self> {
        fs::create_dir_all(at)?;
        let size = format!("size={mebibytes}m");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(at)
            .output()?;
        let says = String::from_utf8_lossy(&mounted.stderr);
        ensure!(mounted.status.success(), "mount: {}", says.trim());
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

/// Whether a small disk can be mounted here.
#[must_use]
pub fn can_mount() -> bool {
    tempfile::tempdir().is_ok_and(|folder| Disk::mount(folder.path(), 1).is_ok())
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn disk_full(stage: &mut Stage) -> Result<Told> {
    const DISK_MIB: u32 = 300;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    stage.keep(Disk::mount(&disk, DISK_MIB)?);
    stage.keep(folder);
    let setting = Setting {
        data: Some(disk.join("data")),
        ..Setting::default()
    };
    let world = stage.set(setting).await?;
    let round = world.maintainer().open_round(&unaudited(3)).await?;
    let (bob, carol) = (
        Ready::new(world, "bob", 1).await?,
        Ready::new(world, "carol", 2).await?,
    );
    let dave = hasty(&world.volunteer("dave").await?)?;
    let ada = hasty(world.maintainer())?;
    ada.round(&round).await?;
    // Below the watermark of 256 MiB: nothing new begins, what runs ends well.
    let filler = disk.join("filler");
    fs::write(&filler, vec![1; 64 << 20])?;
    let full = |what: &str, answer: Result<(), ClientError>| {
        let reason = comes_back(what, answer)?;
        ensure!(reason == ErrorReason::DiskFull, "{what}: {reason}");
        Ok(())
    };
    full("a claim", dave.claim().await.map(|_| ()))?;
    full(
        "an upload",
        ada.upload(&noise(1_000_000), "").await.map(|_| ()),
    )?;
    bob.submit(world).await?;
    // To the last byte.
    let mut more = fs::File::create(disk.join("more"))?;
    let piece = vec![2; 1 << 16];
    while std::io::Write::write_all(&mut more, &piece).is_ok() {}
    full("a submission", carol.submit(world).await.map(|_| ()))?;
    let view = world.maintainer().round(&round).await?;
    ensure!(view.contributions.len() == 1, "one of two is acknowledged");
    drop(more);
    fs::remove_file(disk.join("more"))?;
    fs::remove_file(&filler)?;
    let recovery = carol.submit_soon(world).await?;
    let lease = patiently(RECOVERY_MAX, async || {
        dave.claim_within(WAIT_MS).await?.context("no work")
    })
    .await?;
    world.hand_in(&dave, &lease, &honest(3)).await?;
    world.publish(&round).await?;
    Ok(Told::saw("DISK_FULL for claim, upload, submission; then all three").after(recovery))
}
