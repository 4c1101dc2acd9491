//! A blob store by URL that errs, stalls and sends other bytes: a server of S3's protocol, which
//! volunteers send to directly.
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::Instant;

use super::stores::{
    ANSWER_MAX, Ready, comes_back, hand_in_soon, hasty, rot, slowest_answer, unaudited,
};
use super::suite::{Stage, Told};
use super::world::{Setting, World};
use crate::adapters::honest;
use crate::s3::{Mode, S3};
use crate::tiny::round_file;

async fn on_bucket(stage: &mut Stage) -> Result<(&World, S3)> {
    let bucket = S3::start_apart();
    stage.keep(bucket.clone());
    let setting = Setting {
        environment: bucket.environment(),
        ..Setting::default()
    };
    Ok((stage.set(setting).await?, bucket))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn errors(stage: &mut Stage) -> Result<Told> {
    let (world, bucket) = on_bucket(stage).await?;
    let round = world.maintainer().open_round(&unaudited(2)).await?;
    let bob = Ready::new(world, "bob", 1).await?;
    let carol = hasty(&world.volunteer("carol").await?)?;
    let lease = carol.lease().await?;
    bucket.set(Mode::Failing);
    let weights = honest(2).weights;
    let upload = carol.upload(&weights, &lease.id);
    let refused = tokio::time::timeout(ANSWER_MAX, upload).await;
    comes_back("an upload", refused.context("an upload hangs")?)?;
    // What is durable is acknowledged by the database alone; it is judged when its bytes are back.
    bob.submit(world).await?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    bucket.set(Mode::Sound);
    let recovery = hand_in_soon(world, &carol, &lease, &honest(2)).await?;
    world.publish(&round).await?;
    bob.is_accepted().await?;
    let direct = bucket.direct_puts().len();
    ensure!(direct > 0, "nothing went straight to the store");
    Ok(Told::saw(format!("refused, then both accepted; {direct} direct puts")).after(recovery))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn stalls(stage: &mut Stage) -> Result<Told> {
    let (world, bucket) = on_bucket(stage).await?;
    let round = world.maintainer().open_round(&unaudited(1)).await?;
    let bob = hasty(&world.volunteer("bob").await?)?;
    let lease = bob.lease().await?;
    bucket.set(Mode::Stalling);
    let since = Instant::now();
    let others = slowest_answer(async || Ok(world.maintainer().round(&round).await.map(drop)?));
    let (weights, id) = (honest(1).weights, lease.id.clone());
    let upload = tokio::time::timeout(3 * ANSWER_MAX, bob.upload(&weights, &id));
    let (refused, slowest) = tokio::join!(upload, others);
    let slowest = slowest?;
    let Err(error) = refused.context("an upload hangs")? else {
        anyhow::bail!("acknowledged by a store that says nothing");
    };
    ensure!(error.retry(), "the volunteer does not come back: {error}");
    let gave_up = since.elapsed().as_secs();
    bucket.set(Mode::Sound);
    let recovery = hand_in_soon(world, &bob, &lease, &honest(1)).await?;
    world.publish(&round).await?;
    Ok(Told::saw(format!(
        "given up after {gave_up} s; others waited {} ms at most",
        slowest.as_millis()
    ))
    .after(recovery))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn rots(stage: &mut Stage) -> Result<Told> {
    let (world, bucket) = on_bucket(stage).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let bob = world.volunteer("bob").await?;
    let lease = bob.lease().await?;
    let training = crate::member::training(&lease);
    let blob = training
        .base_files
        .iter()
        .find(|file| file.path == crate::tiny::WEIGHTS)
        .and_then(|file| file.blob.clone())
        .context("the base's weights")?;
    let folder = blob.digest.get(..2).context("a digest")?;
    let path = bucket.file(&format!("blobs/{folder}/{}", blob.digest));
    let sound = rot(&path)?;
    ensure!(bob.fetch(&blob).await.is_err(), "other bytes were taken");
    fs::write(&path, sound)?;
    let since = Instant::now();
    bob.fetch(&blob).await?;
    let recovery = since.elapsed();
    world.hand_in(&bob, &lease, &honest(1)).await?;
    world.publish(&round).await?;
    Ok(Told::saw("the volunteer refused them; put back, published").after(recovery))
}
