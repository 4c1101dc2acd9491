//! The built program under kill -9, SIGTERM, wrong keys and a full disk.
//!
//! What one process alone can show (port in use, a second server on the same data, peak memory of
//! a large upload) is tested beside the program itself.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use cairn_proto::client::{Client, ClientError, Options, join};
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_proto::url::JoinUrl;
use cairn_proto::v1;
use cairn_proto::v1::RoundState::Published;
use cairn_proto::v1::write_blob_request::{Header, Part};
use cairn_stack::digest::Digest;
use cairn_stack::lineage::verify_folder;
use cairn_tests::adapters::honest;
use cairn_tests::evaluator::Evaluator;
use cairn_tests::member::Member;
use cairn_tests::process::{Server, eventually, join_url, member};
use cairn_tests::tiny::round_file;
use futures::StreamExt as _;
use tempfile::TempDir;

const ANY_PORT: &str = "127.0.0.1:0";
/// How long a claim waits: background tasks decide in between.
const WAIT_MS: i64 = 2_000;

/// How long after an acknowledgement the process is killed.
const MOMENTS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(2),
    Duration::from_millis(6),
    Duration::from_millis(15),
    Duration::from_millis(40),
];

/// A coordinator that is killed and started again on the same data and address.
struct Victim {
    folder: TempDir,
    address: String,
    server: Option<Server>,
    kills: u32,
}

impl Victim {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let server = Server::start(&folder.path().join("data"), ANY_PORT, &[])?;
        let address = server.address.clone();
        Ok(Self {
            folder,
            address,
            server: Some(server),
            kills: 0,
        })
    }

    fn data(&self) -> std::path::PathBuf {
        self.folder.path().join("data")
    }

    fn kill_9(&mut self) -> Result<()> {
        self.server.take().context("it runs")?.kill_9()?;
        self.kills += 1;
        self.server = Some(Server::start(&self.data(), &self.address, &[])?);
        Ok(())
    }
}

/// One with the tiny model, a maintainer and an evaluator.
async fn furnished() -> Result<(Victim, Member, Evaluator)> {
    let victim = Victim::start()?;
    let maintainer = member(&victim.data(), "maintainer", "ada").await?;
    let base = victim.folder.path().join("base");
    maintainer.add_tiny(&base).await?;
    let evaluator = Evaluator::new(member(&victim.data(), "evaluator", "eve").await?, &base)?;
    Ok((victim, maintainer, evaluator))
}

async fn state(maintainer: &Member, round: &str) -> Result<v1::Round> {
    maintainer
        .round(round)
        .await?
        .round
        .context("a view without a round")
}

async fn verify_head(maintainer: &Member, to: &Path) -> Result<()> {
    let head = maintainer.checkpoint("").await?;
    maintainer.fetch_folder(&head.files, to).await?;
    let report = verify_folder(to, Some(&maintainer.client.identity().server_key))?;
    anyhow::ensure!(report.is_intact(), "{report:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_after_every_acknowledgement_loses_nothing() {
    let (mut victim, maintainer, evaluator) = furnished().await.unwrap();
    let round = maintainer.open_round(&round_file(3)).await.unwrap();
    victim.kill_9().unwrap();
    let mut acknowledged = BTreeSet::new();
    for seed in 1..=3 {
        let worker = member(&victim.data(), "volunteer", &format!("v{seed}"))
            .await
            .unwrap();
        let lease = worker.claim_within(WAIT_MS).await.unwrap().unwrap();
        // Killed with the lease given, and with the adapter half on its way.
        victim.kill_9().unwrap();
        assert_eq!(
            worker.claim_within(WAIT_MS).await.unwrap().unwrap().id,
            lease.id
        );
        let adapter = honest(seed);
        worker.upload(&adapter.weights, &lease.id).await.unwrap();
        let request = worker.submission(&lease, &adapter);
        let answer = worker.submit(&request).await.unwrap();
        victim.kill_9().unwrap();
        // The worker does not know whether its answer was real: it asks again, and gets the same.
        assert_eq!(worker.submit(&request).await.unwrap(), answer);
        worker.open_audit(&lease, &adapter, &answer).await.unwrap();
        acknowledged.insert(answer.submission_id);
    }
    let (mut answered, mut empty) = (0, 0);
    let round_ended = loop {
        match evaluator.member.claim_within(WAIT_MS).await.unwrap() {
            Some(lease) => {
                let answer = evaluator.answer_any(&lease).await.unwrap();
                evaluator.send(&answer).await.unwrap();
                // At once, or while the next step is being decided, or the fold is running.
                tokio::time::sleep(MOMENTS[answered % MOMENTS.len()]).await;
                victim.kill_9().unwrap();
                evaluator.send(&answer).await.unwrap();
                answered += 1;
            }
            None => {
                let round = state(&maintainer, &round).await.unwrap();
                if round.ended_ms != 0 {
                    break round;
                }
                empty += 1;
            }
        }
        assert!(answered < 100 && empty < 30, "evaluations without end");
    };
    assert_eq!(round_ended.state(), Published, "{}", round_ended.reason);
    let view = maintainer.round(&round).await.unwrap();
    let held: BTreeSet<String> = view
        .contributions
        .iter()
        .map(|one| one.id.clone())
        .collect();
    assert_eq!(held, acknowledged);
    let accepted = view
        .contributions
        .iter()
        .filter(|one| one.verdict() == v1::Verdict::Accepted);
    assert_eq!(accepted.count(), 3);
    verify_head(&maintainer, &victim.folder.path().join("published"))
        .await
        .unwrap();
    println!(
        "{} kills, {answered} evaluations, 3 submissions, all there",
        victim.kills
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_cut_by_kill_9_goes_on_behind_what_is_held() {
    let (mut victim, maintainer, _) = furnished().await.unwrap();
    let bytes: Vec<u8> = (0..4_000_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let name = BlobName {
        digest: Digest::of(&bytes),
        size_bytes: bytes.len() as u64,
    };
    let header = Header {
        blob: Some(name.into()),
        offset: 0,
        lease_id: String::new(),
    };
    let parts = [
        Part::Header(header),
        Part::Chunk(bytes[..1_000_000].to_vec()),
    ];
    let messages: Vec<_> = parts
        .into_iter()
        .map(|part| v1::WriteBlobRequest { part: Some(part) })
        .collect();
    let hanging = maintainer.client.call_once(|mut to| {
        let messages = futures::stream::iter(messages.clone()).chain(futures::stream::pending());
        async move { to.blobs.write_blob(messages).await }
    });
    let arrived = eventually("the first bytes are held", || async {
        Ok((maintainer.committed(name).await? >= 1_000_000).then_some(()))
    });
    tokio::select! {
        answer = hanging => panic!("answered half an upload: {answer:?}"),
        arrived = arrived => arrived.unwrap(),
    }
    victim.kill_9().unwrap();
    let path = victim.folder.path().join("large");
    std::fs::write(&path, &bytes).unwrap();
    let first = std::sync::atomic::AtomicU64::new(u64::MAX);
    let note = |at: u64| {
        first.fetch_min(at, std::sync::atomic::Ordering::Relaxed);
    };
    maintainer
        .client
        .upload(&path, name, "", &note)
        .await
        .unwrap();
    assert_eq!(first.into_inner(), 1_000_000);
    assert_eq!(maintainer.fetch(&name.into()).await.unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_finishes_what_runs_and_takes_nothing_new() {
    let (mut victim, maintainer, _) = furnished().await.unwrap();
    maintainer.open_round(&round_file(1)).await.unwrap();
    let holder = member(&victim.data(), "volunteer", "holder").await.unwrap();
    holder.claim().await.unwrap().unwrap();
    let waiting = member(&victim.data(), "volunteer", "waiting")
        .await
        .unwrap();
    // Signed on already, so that nothing but the claim itself is on its way.
    waiting.standing().await.unwrap();
    let bytes = vec![5; 300_000];
    let name = BlobName {
        digest: Digest::of(&bytes),
        size_bytes: bytes.len() as u64,
    };
    let header = Header {
        blob: Some(name.into()),
        offset: 0,
        lease_id: String::new(),
    };
    let (more, rest) = tokio::sync::oneshot::channel::<Vec<u8>>();
    let more = std::sync::Mutex::new(Some(more));
    let rest = std::sync::Mutex::new(Some(rest));
    let upload = maintainer.client.call_once(|mut to| {
        let first = [
            Part::Header(header.clone()),
            Part::Chunk(bytes[..100_000].to_vec()),
        ];
        let rest = rest.lock().unwrap().take().expect("sent once");
        let last = async move { Part::Chunk(rest.await.expect("the rest comes")) };
        let parts = futures::stream::iter(first).chain(futures::stream::once(last));
        let messages = parts.map(|part| v1::WriteBlobRequest { part: Some(part) });
        async move { to.blobs.write_blob(messages).await }
    });
    let claim = waiting.client.call_once(|mut to| async move {
        to.work
            .claim_work(v1::ClaimWorkRequest { wait_ms: 30_000 })
            .await
    });
    let server = victim.server.as_mut().unwrap();
    let ending = async {
        eventually("the first bytes are held", || async {
            Ok((maintainer.committed(name).await? >= 100_000).then_some(()))
        })
        .await?;
        server.terminate()?;
        // The claimer learns at once that nothing will come.
        anyhow::Ok(())
    };
    let claimed_then_rest = async {
        let claimed = claim.await;
        let more = more.lock().unwrap().take().expect("once");
        more.send(bytes[100_000..].to_vec())
            .expect("the upload still runs");
        claimed
    };
    let (uploaded, claimed, ended) = tokio::join!(upload, claimed_then_rest, ending);
    ended.unwrap();
    let refused = claimed.unwrap_err();
    assert!(refused.retry(), "{refused}");
    assert_eq!(
        refused.reason(),
        Some(ErrorReason::ShuttingDown),
        "{refused}"
    );
    assert!(uploaded.unwrap().complete);
    let server = victim.server.as_mut().unwrap();
    let status = server.ended().await.unwrap();
    assert!(status.success(), "{status}:\n{}", server.log());
    victim.server = Some(Server::start(&victim.data(), &victim.address, &[]).unwrap());
    assert_eq!(maintainer.fetch(&name.into()).await.unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_named_and_loses_nothing() {
    const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let server = Server::start_limited(&data, ANY_PORT, FILE_BYTES_MAX).unwrap();
    let address = server.address.clone();
    let maintainer = member(&data, "maintainer", "ada").await.unwrap();
    let before = maintainer.upload(b"small", "").await.unwrap();

    let path = folder.path().join("large");
    let bytes: Vec<u8> = (0..24_000_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    std::fs::write(&path, &bytes).unwrap();
    let name = BlobName {
        digest: Digest::of(&bytes),
        size_bytes: bytes.len() as u64,
    };
    let hasty = maintainer.client.with_patience(Duration::ZERO);
    let error = hasty.upload(&path, name, "", &|_| {}).await.unwrap_err();
    assert_eq!(error.reason(), Some(ErrorReason::DiskFull), "{error}");
    assert!(error.retry() && error.retry_after().is_some());
    // What was there is there, and small things still go in.
    assert_eq!(maintainer.fetch(&before.into()).await.unwrap(), b"small");
    maintainer.upload(b"another", "").await.unwrap();
    let held = maintainer.committed(name).await.unwrap();
    assert!(held > 0 && held < name.size_bytes, "{held}");

    // Somebody made room: the upload goes on where it stopped.
    server.kill_9().unwrap();
    let _server = Server::start(&data, &address, &[]).unwrap();
    let first = std::sync::atomic::AtomicU64::new(u64::MAX);
    let note = |at: u64| {
        first.fetch_min(at, std::sync::atomic::Ordering::Relaxed);
    };
    maintainer
        .client
        .upload(&path, name, "", &note)
        .await
        .unwrap();
    assert!(first.into_inner() >= held);
    assert_eq!(maintainer.fetch(&name.into()).await.unwrap(), bytes);
}

async fn refused_join(url: &str) -> ClientError {
    let folder = tempfile::tempdir().unwrap();
    let url: JoinUrl = url.parse().ok().unwrap();
    let options = Options {
        patience: Duration::ZERO,
        ..Options::default()
    };
    match join(&url, "bob", &folder.path().join("identity.json"), &options).await {
        Ok(_) => panic!("joined"),
        Err(error) => error,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_in_the_join_url_is_the_only_one_trusted() {
    let victim = Victim::start().unwrap();
    let url = join_url(&victim.data(), "volunteer", &[]).unwrap();
    let sound = url.secret_text();
    // Somebody in between: the same address, another key.
    let last = if sound.ends_with('0') { "1" } else { "0" };
    let error = refused_join(&format!("{}{last}", &sound[..sound.len() - 1])).await;
    assert!(matches!(error, ClientError::WrongKey { .. }), "{error}");
    assert!(!error.retry());
    // Plain text to a server that speaks TLS.
    let (address, token) = (&victim.address, url.token.secret());
    let error = refused_join(&format!("cairn+insecure://{address}/#{token}")).await;
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    // A server that was told to speak plain text, and a URL that asks for TLS: no downgrade.
    let folder = tempfile::tempdir().unwrap();
    let plain = Server::start(folder.path(), ANY_PORT, &["--insecure"]).unwrap();
    let tls = sound.replace(victim.address.as_str(), &plain.address);
    let error = refused_join(&tls).await;
    assert!(matches!(error, ClientError::NotTls { .. }), "{error}");
    // Plain text to another machine is not even tried.
    let error = refused_join(&format!("cairn+insecure://192.0.2.7:7600/#{token}")).await;
    assert!(
        matches!(error, ClientError::InsecureRemote { .. }),
        "{error}"
    );
    // After all of it the token is unspent.
    member(&victim.data(), "volunteer", "carol").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("identity.json");
    let identity = join(&url, "bob", &path, &Options::default()).await.unwrap();
    // A new key on the old address, after the join: an identity does not follow it.
    let Victim {
        address, server, ..
    } = victim;
    drop(server);
    let impostor = tempfile::tempdir().unwrap();
    let _impostor = Server::start(impostor.path(), &address, &[]).unwrap();
    let options = Options {
        patience: Duration::ZERO,
        ..Options::default()
    };
    let bob = Member::new(Client::new(identity, options).unwrap()).unwrap();
    let error = bob.claim().await.unwrap_err();
    assert!(matches!(error, ClientError::WrongKey { .. }), "{error}");
}
