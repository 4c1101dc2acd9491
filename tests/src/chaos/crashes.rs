//! `kill -9` at any moment, and what it leaves behind.
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use cairn_coordinator::tasks::{
    advance_rounds, collect_blobs, expire_leases, fold_round, judge_submissions,
};
use cairn_proto::v1;
use cairn_proto::v1::RoundState;
use tokio::time::Instant;

use super::suite::{Stage, Told};
use super::uploads::{name_of, noise};
use super::world::{Setting, WAIT_MS, World};
use crate::adapters::honest;
use crate::tiny::{numbers, round_file};

/// How often the coordinator is killed.
const KILLS: u64 = 25;
/// Volunteers who submit meanwhile.
const VOLUNTEERS: u64 = 4;
/// Shards of the round.
const SHARDS: u32 = 12;
/// Longest time between a start and a kill.
const LIFE_MAX: Duration = Duration::from_millis(900);

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn kill_9_at_random(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let round = world.maintainer().open_round(&round_file(SHARDS)).await?;
    let seeds = AtomicU64::new(1);
    let mut people = Vec::new();
    for number in 0..VOLUNTEERS {
        people.push(world.volunteer(&format!("v{number}")).await?);
    }
    let work = async {
        let submitting = people.iter().map(async |member| {
            while let Some(lease) = member.claim_within(WAIT_MS).await? {
                let seed = seeds.fetch_add(1, Ordering::Relaxed);
                world.hand_in(member, &lease, &honest(seed)).await?;
            }
            anyhow::Ok(())
        });
        futures::future::try_join_all(submitting).await?;
        world.finish(&round).await
    };
    let killing = async {
        let mut worst = Duration::ZERO;
        // The moments are the same in every run; what they hit is not.
        for moment in numbers(usize::try_from(KILLS)?, 4) {
            tokio::time::sleep(LIFE_MAX.mul_f32(moment.abs())).await;
            worst = worst.max(world.kill_9().await?);
        }
        anyhow::Ok(worst)
    };
    let (ended, worst) = tokio::try_join!(work, killing)?;
    ensure!(ended.state() == RoundState::Published, "{}", ended.reason);
    let acks = world.acks().len();
    ensure!(acks == SHARDS as usize, "{acks} of {SHARDS} shards");
    Ok(Told::saw(format!("{KILLS} kills, {acks} acknowledgements, published")).after(worst))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn orphans(stage: &mut Stage) -> Result<Told> {
    const DAY_AND_HOUR: i64 = 25 * 3_600;
    let world = stage
        .set(Setting {
            here: true,
            ..Setting::default()
        })
        .await?;
    world.maintainer().open_round(&round_file(2)).await?;
    let (bob, carol) = (
        world.volunteer("bob").await?,
        world.volunteer("carol").await?,
    );
    let (kept, lost) = (honest(1), honest(2));
    world.hand_in(&bob, &bob.lease().await?, &kept).await?;
    // Uploaded, and the process dies before it is submitted; put, and it dies before the row.
    carol
        .upload(&lost.weights, &carol.lease().await?.id)
        .await?;
    let stray = noise(10_000);
    let path = |bytes: &[u8]| world.stored(&name_of(bytes).digest.to_string());
    std::fs::create_dir_all(path(&stray).parent().unwrap_or(world.scratch()))?;
    std::fs::write(path(&stray), &stray)?;
    let collect = async || {
        let done = collect_blobs::run(&world.app()?).await;
        done.map_err(|error| anyhow!(error.full()))
    };
    collect().await?;
    ensure!(
        path(&stray).exists() && path(&lost.weights).exists(),
        "collected too soon: a row may still have been on its way"
    );
    world.step_clock(DAY_AND_HOUR)?;
    collect().await?;
    ensure!(
        !path(&stray).exists(),
        "bytes without a row are still there"
    );
    ensure!(
        !path(&lost.weights).exists(),
        "an unnamed blob is still there"
    );
    ensure!(
        path(&kept.weights).exists(),
        "an acknowledged adapter is gone"
    );
    let head = world.maintainer().checkpoint("").await?;
    for file in &head.files {
        let digest = file.blob.as_ref().map_or("", |blob| &blob.digest);
        ensure!(world.stored(digest).exists(), "{} is gone", file.path);
    }
    Ok(Told::saw("2 collected after a day, none before"))
}

/// Runs the background tasks, all but the fold, until the round folds.
async fn until_folding(world: &World, round: &str) -> Result<()> {
    const STEPS_MAX: usize = 1_000;
    let app = world.app()?;
    for _ in 0..STEPS_MAX {
        let plain = |error: cairn_coordinator::error::Error| anyhow!(error.full());
        expire_leases::run(&app).await.map_err(plain)?;
        judge_submissions::run(&app).await.map_err(plain)?;
        advance_rounds::run(&app).await.map_err(plain)?;
        if world.round(round).await?.state() == RoundState::Folding {
            return Ok(());
        }
        world.evaluator()?.step().await?;
    }
    anyhow::bail!("it never folds: {:?}", world.round(round).await?)
}

/// A round whose one shard is handed in.
async fn one_shard(world: &World, member: &str, seed: u64) -> Result<String> {
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let member = world.volunteer(member).await?;
    let lease = member.lease().await?;
    world.hand_in(&member, &lease, &honest(seed)).await?;
    Ok(round)
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn abort_during_fold(stage: &mut Stage) -> Result<Told> {
    let world = stage
        .set(Setting {
            here: true,
            ..Setting::default()
        })
        .await?;
    let base = world.head().await?;
    // Aborted when the fold has been decided on but not begun.
    let round = one_shard(world, "bob", 1).await?;
    until_folding(world, &round).await?;
    world.maintainer().abort(&round).await?;
    world.settle().await?;
    ensure!(world.round(&round).await?.state() == RoundState::Aborted);
    ensure!(world.head().await? == base, "the head has moved");
    // Aborted in its middle: the fold goes on for ever smaller pieces of time, then the abort comes.
    let mut cuts = 0;
    for (seed, milliseconds) in (2..).zip([0_u64, 1, 3, 8]) {
        let round = one_shard(world, &format!("v{seed}"), seed).await?;
        until_folding(world, &round).await?;
        let app = world.app()?;
        let fold = fold_round::run(&app);
        let cut = tokio::time::timeout(Duration::from_millis(milliseconds), fold).await;
        cuts += usize::from(cut.is_err());
        let aborted = world.maintainer().abort(&round).await;
        world.settle().await?;
        let (state, head) = (world.round(&round).await?.state(), world.head().await?);
        match state {
            RoundState::Aborted => ensure!(head == base, "aborted, and the head has moved"),
            // It was faster; then the abort was refused.
            RoundState::Published => {
                ensure!(aborted.is_err(), "aborted and published");
                break;
            }
            other => anyhow::bail!("{other:?}"),
        }
    }
    // Killed in its middle: the next process folds again.
    let round = one_shard(world, "last", 9).await?;
    until_folding(world, &round).await?;
    let app = world.app()?;
    let _ = tokio::time::timeout(Duration::from_millis(2), fold_round::run(&app)).await;
    drop(app);
    let recovery = world.kill_9().await?;
    let since = Instant::now();
    world.publish(&round).await?;
    let recovery = recovery + since.elapsed();
    let head: v1::GetCheckpointResponse = world.maintainer().checkpoint("").await?;
    ensure!(head.checkpoint.is_some_and(|one| one.commit != base));
    Ok(Told::saw(format!(
        "{cuts} folds cut off; after the kill, folded again"
    ))
    .after(recovery))
}
