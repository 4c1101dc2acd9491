//! Leases that run out, come back, and are held by two; clocks that are wrong.

use anyhow::{Context as _, Result, ensure};
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use cairn_proto::v1::ShardState;
use tokio::time::Instant;

use super::proxy::Proxy;
use super::suite::{Stage, Told};
use super::uploads::{Volunteer, add_village, name_of, submitted, village_round};
use super::world::{Ack, Setting, World};
use crate::adapters::honest;
use crate::member::{Member, training};
use crate::tiny::round_file;

/// A lease of the tiny round, and a second.
const LEASE_SECONDS: i64 = 601;
/// A day.
const DAY_SECONDS: i64 = 24 * 3_600;

async fn here(stage: &mut Stage) -> Result<&World> {
    let setting = Setting {
        here: true,
        ..Setting::default()
    };
    stage.set(setting).await
}

fn is_lost<T>(what: &str, answer: Result<T, cairn_proto::client::ClientError>) -> Result<()> {
    match answer {
        Ok(_) => anyhow::bail!("{what}: not refused"),
        Err(error) => ensure!(
            error.reason() == Some(ErrorReason::LeaseLost),
            "{what}: {error}"
        ),
    }
    Ok(())
}

/// Lets every lease run out.
async fn run_out(world: &World) -> Result<()> {
    world.step_clock(LEASE_SECONDS)?;
    world.settle().await
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn late_in_grace(stage: &mut Stage) -> Result<Told> {
    let world = here(stage).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let bob = world.volunteer("bob").await?;
    let lease = bob.lease().await?;
    run_out(world).await?;
    let view = world.maintainer().round(&round).await?;
    ensure!(
        view.shards[0].state() == ShardState::Open,
        "{:?}",
        view.shards
    );
    world.hand_in(&bob, &lease, &honest(1)).await?;
    world.publish(&round).await?;
    let standing = bob.standing().await?;
    ensure!(
        standing.accepted == 1 && standing.credit_tokens > 0,
        "{standing:?}"
    );
    Ok(Told::saw("accepted and credited"))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn late_replaced(stage: &mut Stage) -> Result<Told> {
    let world = here(stage).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let (bob, carol) = (
        world.volunteer("bob").await?,
        world.volunteer("carol").await?,
    );
    let old = bob.lease().await?;
    run_out(world).await?;
    let new = carol.lease().await?;
    ensure!(new.generation > old.generation, "the same generation");
    let late = world.hand_in(&bob, &old, &honest(1)).await;
    let late = late.context("a late adapter of a replaced holder")?;
    world.hand_in(&carol, &new, &honest(2)).await?;
    world.publish(&round).await?;
    let (of_bob, of_carol) = (bob.standing().await?, carol.standing().await?);
    ensure!(of_bob.credit_tokens > 0, "not credited: {of_bob:?}");
    ensure!(of_carol.credit_tokens > 0, "the other is not: {of_carol:?}");
    let view = world.maintainer().round(&round).await?;
    let weight = |id: &str| {
        let one = view.contributions.iter().find(|one| one.id == id);
        one.map_or(f64::NAN, |one| one.weight)
    };
    ensure!(weight(&late.submission_id) == 0.0, "it was merged");
    Ok(Told::saw("both credited, one merged"))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn two_holders(stage: &mut Stage) -> Result<Told> {
    let world = here(stage).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let proxy = Proxy::start(&world.address).await?;
    let role = v1::Role::Volunteer;
    let bob = world.member_at(role, "bob", &proxy.address).await?;
    let carol = world.volunteer("carol").await?;
    let old = bob.lease().await?;
    let adapter = honest(1);
    bob.upload(&adapter.weights, &old.id).await?;
    // Bob's line goes; his lease runs out; Carol has the shard; his line is back.
    proxy.deaden();
    run_out(world).await?;
    let new = carol.lease().await?;
    proxy.cut();
    ensure!(
        training(&new).shard == training(&old).shard,
        "another shard"
    );
    is_lost("a renewal by the old holder", bob.renew(&old).await)?;
    // Both at once, the old one again and again.
    let (mine, yours) = (honest(2), bob.submission(&old, &adapter));
    let (first, second) = tokio::join!(
        world.hand_in(&carol, &new, &mine),
        world.submit(&bob, &old, &yours, &adapter),
    );
    let first = first?;
    drop(second);
    drop(world.submit(&bob, &old, &yours, &adapter).await);
    world.publish(&round).await?;
    let view = world.maintainer().round(&round).await?;
    let merged: Vec<&str> = view
        .contributions
        .iter()
        .filter(|one| one.weight > 0.0)
        .map(|one| one.id.as_str())
        .collect();
    ensure!(
        merged == [first.submission_id.as_str()],
        "merged {merged:?}"
    );
    Ok(Told::saw("the new holder's is merged, and nothing else"))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn clock_steps(stage: &mut Stage) -> Result<Told> {
    let world = here(stage).await?;
    let round = round_file(2).replace("deadline = \"1h\"", "deadline = \"7d\"");
    let round = world.maintainer().open_round(&round).await?;
    let mut people = Vec::new();
    for name in ["bob", "carol", "dave", "eric"] {
        people.push(world.volunteer(name).await?);
    }
    let [bob, carol, dave, eric] = &people[..] else {
        anyhow::bail!("four people");
    };
    let (of_bob, of_carol) = (bob.lease().await?, carol.lease().await?);
    // A day ahead: every lease and every session is over.
    world.step_clock(DAY_SECONDS)?;
    world.settle().await?;
    let of_dave = dave.lease().await?;
    // A day back: Dave's lease ends tomorrow, and nobody else's came back.
    world.step_clock(-DAY_SECONDS)?;
    world.settle().await?;
    let replaced = |lease: &v1::Lease| training(lease).shard == training(&of_dave).shard;
    let (gone, goes_on): (&Member, &Member) = if replaced(&of_bob) {
        (bob, carol)
    } else {
        (carol, bob)
    };
    let (old, other) = if replaced(&of_bob) {
        (&of_bob, &of_carol)
    } else {
        (&of_carol, &of_bob)
    };
    is_lost("the replaced holder", gone.renew(old).await)?;
    // The other may take its own up again, as nobody else has it.
    goes_on.renew(other).await?;
    ensure!(
        eric.claim().await?.is_none(),
        "a shard with two valid leases"
    );
    ensure!(dave.lease().await?.id == of_dave.id, "another lease");
    dave.renew(&of_dave).await?;
    // And back and forth while both are handed in.
    world.step_clock(-DAY_SECONDS)?;
    world.hand_in(dave, &of_dave, &honest(1)).await?;
    world.step_clock(2 * DAY_SECONDS)?;
    world.hand_in(goes_on, other, &honest(2)).await?;
    world.step_clock(-DAY_SECONDS)?;
    world.publish(&round).await?;
    let view = world.maintainer().round(&round).await?;
    ensure!(
        view.contributions.len() == 2,
        "{}",
        view.contributions.len()
    );
    Ok(Told::saw(
        "5 steps of a day or two; two shards, two submissions",
    ))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn worker_clock(stage: &mut Stage) -> Result<Told> {
    let world = here(stage).await?;
    add_village(world).await?;
    let since = Instant::now();
    // A real worker has the system's clock: it is the coordinator's that is off.
    for (name, step) in [("early", DAY_SECONDS), ("late", -2 * DAY_SECONDS)] {
        world.step_clock(step)?;
        let round = world.maintainer().open_round(&village_round(2)).await?;
        let mut volunteer = Volunteer::join(world, name, &world.address).await?;
        volunteer.run()?;
        let one = submitted(world, &round).await;
        let one = one.with_context(|| volunteer.log())?;
        volunteer.kill_9()?;
        let bytes = std::fs::read(world.stored(&one.adapter_digest))?;
        ensure!(
            name_of(&bytes).digest.to_string() == one.adapter_digest,
            "other bytes in the store"
        );
        // One round of a model at a time; what was acknowledged stays.
        world.maintainer().abort(&round).await?;
        world.note(Ack {
            submission: one.id,
            round,
            receipt: None,
            bytes,
        });
    }
    world.step_clock(DAY_SECONDS)?;
    let seconds = since.elapsed().as_secs();
    Ok(Told::saw(format!(
        "both trained and handed in, {seconds} s"
    )))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn poison_shard(stage: &mut Stage) -> Result<Told> {
    let world = here(stage).await?;
    let round = world.maintainer().open_round(&round_file(2)).await?;
    let bob = world.volunteer("bob").await?;
    let good = bob.lease().await?;
    let poison = 1 - training(&good).shard;
    let mut victims = 0;
    loop {
        let victim = world.volunteer(&format!("victim {victims}")).await?;
        // It dies and says nothing, is started again, and dies again: once may have been bad luck.
        let mut deaths = 0;
        while let Some(lease) = victim.claim().await? {
            ensure!(training(&lease).shard == poison, "another shard");
            deaths += 1;
            ensure!(deaths <= 2, "the same worker is given it again and again");
            run_out(world).await?;
            bob.renew(&good).await?;
        }
        if deaths == 0 {
            break;
        }
        victims += 1;
        ensure!(victims <= 3, "a fourth worker was sent to its death");
    }
    ensure!(victims == 3, "given up after {victims}");
    let view = world.maintainer().round(&round).await?;
    let state = view.shards.get(poison as usize).map(v1::Shard::state);
    ensure!(state == Some(ShardState::Stopped), "{state:?}");
    world.hand_in(&bob, &good, &honest(1)).await?;
    world.publish(&round).await?;
    Ok(Told::saw("stopped after three, the other shard published"))
}
