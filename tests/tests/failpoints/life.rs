//! A whole small life, driven from outside by calls that are repeated with the same request ids
//! until they are answered, and what must be true at its end.
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use cairn_coordinator::clock::Clock;
use cairn_proto::client::{Client, Options, join};
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::ReceiptStatement;
use cairn_proto::url::JoinUrl;
use cairn_proto::v1;
use cairn_proto::v1::RoundState;
use cairn_stack::adapter::AdapterFile;
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::digest::Digest;
use cairn_stack::fold::{Term, fold};
use cairn_stack::lineage::verify_folder;
use cairn_tests::adapters::{Adapter, Sabotage, honest};
use cairn_tests::evaluator::{Answer, Evaluator};
use cairn_tests::member::{Member, request_id};
use cairn_tests::process::{command, member};
use cairn_tests::tiny::{self, round_file};
use ed25519_dalek::SigningKey;
use sqlx::{Connection as _, Row as _};

use crate::keeper::Keeper;

/// How long a claim waits: background tasks decide in between.
const WAIT_MS: i64 = 2_000;
/// How long to wait between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// How long anything may take, retries and restarts included.
const PATIENCE: Duration = Duration::from_mins(3);
/// Honest volunteers: one a shard.
const SHARDS: u64 = 3;

/// What was acknowledged.
struct Acknowledged {
    volunteer: Member,
    adapter: Adapter,
    answer: v1::SubmitAdapterResponse,
}

/// What the life has come to.
struct Life {
    maintainer: Member,
    evaluator: Evaluator,
    rounds: Vec<(String, RoundState)>,
    honest: Vec<Acknowledged>,
    cheat: Acknowledged,
    garbage: Digest,
    half: BlobName,
}

/// Lives it and checks its end.
pub async fn live(keeper: &mut Keeper) -> Result<()> {
    let life = tokio::time::timeout(PATIENCE, begin(keeper))
        .await
        .context("the life does not come to its end")??;
    revoke(&life).await.context("revoke and fold again")?;
    a_day_passes(keeper, &life).await.context("a day passes")?;
    check(keeper, &life).await.context("check")?;
    keeper.stop().await?;
    fsck(keeper)
}

async fn begin(keeper: &Keeper) -> Result<Life> {
    let data = keeper.data();
    let maintainer = member(&data, "maintainer", "ada").await?;
    let base = keeper.folder().join("base");
    maintainer.add_tiny(&base).await.context("add the model")?;
    let evaluator = invite(keeper, &maintainer, v1::Role::Evaluator, "eve").await?;
    let evaluator = Evaluator::new(evaluator, &base)?;
    let garbage = maintainer.upload(b"nobody will name this", "").await?;
    let half = half_upload(&maintainer).await?;

    let aborted = maintainer.open_round(&round_file(1)).await?;
    maintainer.abort(&aborted).await?;
    let round = maintainer.open_round(&round_file(SHARDS as u32)).await?;
    let lost = invite(keeper, &maintainer, v1::Role::Volunteer, "lost").await?;
    let lease = claim(&lost).await?;
    lost.renew(&lease).await?;
    ensure!(claim(&lost).await?.id == lease.id, "another lease");
    lost.release(&lease, false).await?;

    let cheat = volunteer(keeper, &maintainer, Sabotage::Nan.adapter(9), "cheat").await?;
    let mut seeds = 1..=SHARDS;
    let mut honest_ones = Vec::new();
    for seed in seeds.by_ref() {
        let name = format!("v{seed}");
        honest_ones.push(volunteer(keeper, &maintainer, honest(seed), &name).await?);
    }
    evaluate(&maintainer, &evaluator, &round).await?;
    void_strike(&maintainer, &cheat).await?;
    Ok(Life {
        maintainer,
        evaluator,
        rounds: vec![
            (aborted, RoundState::Aborted),
            (round, RoundState::Published),
        ],
        honest: honest_ones,
        cheat,
        garbage: garbage.digest,
        half,
    })
}

/// Joins by a token that the maintainer asks for.
async fn invite(
    keeper: &Keeper,
    maintainer: &Member,
    role: v1::Role,
    name: &str,
) -> Result<Member> {
    let url = maintainer.create_token(role, 1, 3_600_000).await?;
    let url: JoinUrl = url.parse()?;
    let path = keeper.folder().join(format!("{name}.json"));
    let identity = join(&url, name, &path, &Options::default()).await?;
    Member::new(Client::new(identity, Options::default())?)
}

async fn claim(volunteer: &Member) -> Result<v1::Lease> {
    loop {
        if let Some(lease) = volunteer.claim_within(WAIT_MS).await? {
            return Ok(lease);
        }
    }
}

async fn volunteer(
    keeper: &Keeper,
    maintainer: &Member,
    adapter: Adapter,
    name: &str,
) -> Result<Acknowledged> {
    let volunteer = invite(keeper, maintainer, v1::Role::Volunteer, name).await?;
    let lease = claim(&volunteer).await?;
    volunteer.upload(&adapter.weights, &lease.id).await?;
    let request = volunteer.submission(&lease, &adapter);
    let answer = volunteer.submit(&request).await?;
    ensure!(
        volunteer.submit(&request).await? == answer,
        "another answer"
    );
    // A broken adapter may have its verdict before its states are opened.
    match volunteer.open_audit(&lease, &adapter, &answer).await {
        Err(error) if name != "cheat" || error.retry() => return Err(error.into()),
        _ => {}
    }
    Ok(Acknowledged {
        volunteer,
        adapter,
        answer,
    })
}

/// An upload that stops half way, and one of bytes that are not what their name says.
async fn half_upload(maintainer: &Member) -> Result<BlobName> {
    let bytes = [7; 4_000];
    let name = BlobName {
        digest: Digest::of(&bytes),
        size_bytes: bytes.len() as u64,
    };
    loop {
        let held = usize::try_from(maintainer.committed(name).await?)?;
        if held >= 2_000 {
            break;
        }
        let rest = &bytes[held..2_000];
        match maintainer.upload_raw(name, held as u64, "", &[rest]).await {
            Err(error) if !error.retry() => return Err(error.into()),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
    let wrong = BlobName {
        digest: Digest::of(b"something else"),
        size_bytes: 5,
    };
    loop {
        let held = usize::try_from(maintainer.committed(wrong).await?)?;
        let rest = &b"wrong"[held..];
        let sent = maintainer.upload_raw(wrong, held as u64, "", &[rest]).await;
        match sent {
            Err(error) if error.reason() == Some(ErrorReason::DigestMismatch) => return Ok(name),
            Err(error) if error.retry() => tokio::time::sleep(LOOK).await,
            other => bail!("wrong bytes were answered with {other:?}"),
        }
    }
}

async fn evaluate(maintainer: &Member, evaluator: &Evaluator, round: &str) -> Result<()> {
    loop {
        if let Some(lease) = evaluator.member.claim_within(WAIT_MS).await? {
            let answer = evaluator.answer_any(&lease).await?;
            evaluator.send(&answer).await?;
            continue;
        }
        let view = maintainer.round(round).await?;
        let view = view.round.context("a view without a round")?;
        if view.ended_ms != 0 {
            ensure!(view.state() == RoundState::Published, "{}", view.reason);
            return Ok(());
        }
    }
}

async fn void_strike(maintainer: &Member, cheat: &Acknowledged) -> Result<()> {
    let request = v1::VoidStrikeRequest {
        submission_id: cheat.answer.submission_id.clone(),
        reason: "a broken disk, not a cheat".to_owned(),
    };
    let call = |mut to: cairn_proto::client::Services| {
        let request = request.clone();
        async move { to.contributions.void_strike(request).await }
    };
    match maintainer.client.call(call).await {
        Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Revokes a stacked contribution and waits until the head is a checkpoint without it.
async fn revoke(life: &Life) -> Result<()> {
    let request = v1::RevokeContributionRequest {
        id: life.honest[0].answer.submission_id.clone(),
        reason: "its data was poisoned".to_owned(),
        refold: true,
        request_id: request_id(),
    };
    let call = |mut to: cairn_proto::client::Services| {
        let request = request.clone();
        async move { to.contributions.revoke_contribution(request).await }
    };
    life.maintainer.client.call(call).await?;
    head(&life.maintainer, 2).await
}

async fn head(maintainer: &Member, revision: u32) -> Result<()> {
    let wait = async {
        loop {
            let head = maintainer.checkpoint("").await?;
            let now = head.checkpoint.context("no checkpoint")?.revision;
            if now == revision {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await?
}

/// The coordinator is down while everything becomes a day older; then garbage is collected and a
/// lease that was held is handed out again.
async fn a_day_passes(keeper: &mut Keeper, life: &Life) -> Result<()> {
    let last = life.maintainer.open_round(&round_file(1)).await?;
    let gone = invite(keeper, &life.maintainer, v1::Role::Volunteer, "gone").await?;
    let lease = claim(&gone).await?;
    keeper.stop().await?;
    let orphan = orphan(&keeper.blobs())?;
    let secret = age(&keeper.data(), &keeper.blobs()).await?;
    keeper.resume()?;
    for digest in [life.garbage, orphan] {
        let path = blob_path(&keeper.blobs(), digest);
        let wait = async {
            while path.exists() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .context("garbage is not collected")?;
    }
    let next = invite(keeper, &life.maintainer, v1::Role::Volunteer, "next").await?;
    let again = claim(&next).await?;
    ensure!(again.generation > lease.generation, "{again:?}");
    restore(&next, &again, &secret).await.context("restore")?;
    spoil(life, &last).await.context("spoil")
}

/// A worker hands in what a coordinator with this key acknowledged, and this one has never heard of.
async fn restore(volunteer: &Member, lease: &v1::Lease, secret: &str) -> Result<()> {
    let mut bytes = [0; 32];
    for (byte, digits) in bytes.iter_mut().zip(secret.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits)?, 16)?;
    }
    let adapter = honest(77);
    let lost = v1::Lease {
        id: request_id(),
        ..lease.clone()
    };
    let statement = ReceiptStatement {
        submission: request_id(),
        lease: lost.id.clone(),
        worker: volunteer.id().to_owned(),
        round: request_id(),
        shard: 0,
        adapter: adapter.name().digest,
        adapter_bytes: adapter.name().size_bytes,
        received_ms: 1,
        verdict: "pending".to_owned(),
        reason: String::new(),
        credit_tokens: 0,
        log_index: 0,
    };
    let receipt = statement.sign(&SigningKey::from_bytes(&bytes))?;
    let submission = volunteer.submission(&lost, &adapter);
    match volunteer.restore(&receipt, &submission).await {
        Err(error) if error.reason() == Some(ErrorReason::BlobMissing) => {}
        other => bail!("before the upload: {other:?}"),
    }
    volunteer.upload(&adapter.weights, &lost.id).await?;
    volunteer.restore(&receipt, &submission).await?;
    let restored = volunteer.restore(&receipt, &submission).await?;
    ensure!(!restored, "restored twice");
    let own = volunteer.submissions().await?;
    ensure!(
        own.len() == 1 && own[0].id == statement.submission,
        "{own:?}"
    );
    Ok(())
}

/// An evaluator whose losses are no numbers: the base cannot be scored, and the round fails.
async fn spoil(life: &Life, round: &str) -> Result<()> {
    let evaluator = &life.evaluator;
    loop {
        let view = life.maintainer.round(round).await?;
        let view = view.round.context("a view without a round")?;
        if view.ended_ms != 0 {
            ensure!(view.state() == RoundState::Failed, "{:?}", view.state());
            return Ok(());
        }
        let Some(lease) = evaluator.member.claim_within(WAIT_MS).await? else {
            continue;
        };
        let mut answer = evaluator.answer_any(&lease).await?;
        if let Answer::Scores(scores) = &mut answer {
            for set in &mut scores.sets {
                set.nll.fill(f32::NAN);
            }
            evaluator.sign(&lease, scores);
        }
        evaluator.send(&answer).await?;
    }
}

/// Bytes in the store whose row never came.
fn orphan(blobs: &Path) -> Result<Digest> {
    let digest = Digest::of(b"an orphan");
    let path = blob_path(blobs, digest);
    std::fs::create_dir_all(path.parent().context("a folder")?)?;
    std::fs::write(&path, b"an orphan")?;
    Ok(digest)
}

fn blob_path(blobs: &Path, digest: Digest) -> std::path::PathBuf {
    let hex = digest.to_string();
    blobs.join(&hex[..2]).join(hex)
}

/// Makes everything a day older; returns the server's secret key.
async fn age(data: &Path, blobs: &Path) -> Result<String> {
    const DAY_MS: i64 = 25 * 3_600 * 1_000;
    sqlx::any::install_default_drivers();
    let url = cairn_coordinator::db::sqlite_url(&data.join("cairn.db"));
    let mut rows = sqlx::AnyConnection::connect(&url).await?;
    for aged in [
        "update blobs set created_ms = created_ms - $1",
        "update uploads set created_ms = created_ms - $1",
        "update leases set expires_ms = expires_ms - $1 where state = 'active'",
    ] {
        sqlx::query(aged).bind(DAY_MS).execute(&mut rows).await?;
    }
    let key = sqlx::query("select value from settings where name = 'server_key'");
    let secret = key.fetch_one(&mut rows).await?.try_get("value")?;
    rows.close().await?;
    let then = Clock::System.now_ms().0 - DAY_MS;
    let then = UNIX_EPOCH + Duration::from_millis(then.unsigned_abs());
    for folder in std::fs::read_dir(blobs)? {
        for file in std::fs::read_dir(folder?.path())? {
            std::fs::File::open(file?.path())?.set_modified(then)?;
        }
    }
    Ok(secret)
}

/// What was acknowledged is there, counted once, and published checkpoints are what they say.
async fn check(keeper: &Keeper, life: &Life) -> Result<()> {
    let maintainer = &life.maintainer;
    for (round, state) in &life.rounds {
        let view = maintainer.round(round).await?;
        let found = view.round.context("a view without a round")?;
        ensure!(
            found.state() == *state,
            "round {round}: {:?}",
            found.state()
        );
    }
    for (name, records) in tiny::RECORDS {
        let dataset = maintainer.dataset(name).await?;
        let chunks = tiny::chunks(name, records);
        ensure!(dataset.chunks.len() == chunks.len(), "{name} is cut");
        for (held, (bytes, _)) in dataset.chunks.iter().zip(&chunks) {
            let blob = held.blob.as_ref().context("a chunk's blob")?;
            ensure!(maintainer.fetch(blob).await? == *bytes, "{name} differs");
        }
    }
    let view = maintainer.round(&life.rounds[1].0).await?;
    let known: BTreeSet<&str> = view.contributions.iter().map(|c| c.id.as_str()).collect();
    ensure!(known.len() == life.honest.len() + 1, "{known:?}");
    for one in life.honest.iter().chain([&life.cheat]) {
        check_acknowledged(maintainer, one, &known).await?;
    }
    let mut credits = BTreeSet::new();
    for one in &life.honest {
        let standing = one.volunteer.standing().await?;
        let revoked = one.answer.submission_id == life.honest[0].answer.submission_id;
        let counted = (standing.accepted, standing.rejected);
        ensure!(
            counted == if revoked { (0, 1) } else { (1, 0) },
            "{standing:?}"
        );
        credits.insert(standing.credit_tokens);
    }
    // Each did one shard and said the same of it; a revocation takes no credit.
    ensure!(credits.len() == 1 && !credits.contains(&0), "{credits:?}");
    let standing = life.cheat.volunteer.standing().await?;
    ensure!(standing.credit_tokens == 0, "{standing:?}");
    ensure!(maintainer.committed(life.half).await? <= 2_000);
    for revision in ["0", "1", "2"] {
        reproduce(keeper, maintainer, revision)
            .await
            .with_context(|| format!("revision {revision}"))?;
    }
    // The evaluator has nothing left to do.
    ensure!(life.evaluator.member.claim().await?.is_none());
    Ok(())
}

async fn check_acknowledged(
    maintainer: &Member,
    one: &Acknowledged,
    known: &BTreeSet<&str>,
) -> Result<()> {
    let id = &one.answer.submission_id;
    ensure!(known.contains(id.as_str()), "submission {id} is lost");
    let own = one.volunteer.submissions().await?;
    ensure!(own.len() == 1 && own[0].id == *id, "{own:?}");
    let bytes = maintainer.fetch(&one.adapter.name().into()).await?;
    ensure!(bytes == one.adapter.weights, "adapter of {id} differs");
    let receipt = one.answer.receipt.as_ref().context("no receipt")?;
    let key = maintainer.client.identity().server_key.to_bytes();
    let statement = ReceiptStatement::verify(receipt, &key)?;
    ensure!(statement.submission == *id, "a receipt for another");
    Ok(())
}

/// Downloads a checkpoint, verifies it, and folds it again from its base and contributions.
async fn reproduce(keeper: &Keeper, maintainer: &Member, revision: &str) -> Result<()> {
    let folder = keeper.folder().join(format!("revision-{revision}"));
    let published = maintainer.checkpoint(revision).await?;
    let files = folder.join("published");
    maintainer.fetch_folder(&published.files, &files).await?;
    let report = verify_folder(&files, Some(&maintainer.client.identity().server_key))?;
    ensure!(report.is_intact(), "{report:?}");
    let manifest = report.signed.manifest();
    if manifest.contributions.is_empty() {
        return Ok(());
    }
    let adapters = folder.join("adapters");
    maintainer
        .fetch_folder(&published.adapter_files, &adapters)
        .await?;
    let mut opened = Vec::new();
    for one in &manifest.contributions {
        opened.push(AdapterFile::open(&adapters.join(&one.id))?);
    }
    let terms: Vec<Term<'_>> = opened
        .iter()
        .zip(&manifest.contributions)
        .map(|(adapter, one)| Term {
            adapter,
            weight: one.weight,
        })
        .collect();
    let base = Checkpoint::open(&keeper.folder().join("base"))?;
    let made = fold(&base, &terms, &folder.join("folded"))?;
    let expected: BTreeSet<_> = manifest.files.iter().map(|f| (&f.path, f.blake3)).collect();
    let found: BTreeSet<_> = made.files.iter().map(|f| (&f.path, f.blake3)).collect();
    ensure!(expected == found, "folded again, it is another");
    Ok(())
}

/// What `cairn-coordinator fsck` says of it.
fn fsck(keeper: &Keeper) -> Result<()> {
    let mut command = command()?;
    command.envs(keeper.environment()).args(["fsck", "--data"]);
    let checked = command.arg(keeper.data()).output()?;
    ensure!(
        checked.status.success(),
        "fsck: {}{}",
        String::from_utf8_lossy(&checked.stdout),
        String::from_utf8_lossy(&checked.stderr)
    );
    Ok(())
}
