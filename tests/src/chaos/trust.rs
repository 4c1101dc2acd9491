//! Thieves, impostors, and names that want to be somewhere else.
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use cairn_proto::client::{Client, ClientError, Options, join};
use cairn_proto::identity::{Identity, new_key};
use cairn_proto::reason::{ErrorReason, of_status};
use cairn_proto::signing::{sign_session, sign_submission};
use cairn_proto::url::{JoinUrl, Transport};
use cairn_proto::v1;
use cairn_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use cairn_proto::v1::work_service_client::WorkServiceClient;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::suite::{Stage, Told};
use super::world::{Setting, World};
use crate::adapters::honest;
use crate::member::Member;
use crate::process::Server;
use crate::tiny::{self, round_file};

/// A client that gives up at once.
fn hasty() -> Options {
    Options {
        patience: Duration::ZERO,
        ..Options::default()
    }
}

fn is<T>(what: &str, answer: Result<T, Status>, wanted: ErrorReason) -> Result<()> {
    match answer {
        Ok(_) => anyhow::bail!("{what}: not refused"),
        Err(status) => ensure!(
            of_status(&status) == Some(wanted),
            "{what}: {status}, not {wanted}"
        ),
    }
    Ok(())
}

fn refused<T>(what: &str, answer: Result<T, ClientError>, wanted: ErrorReason) -> Result<()> {
    match answer {
        Ok(_) => anyhow::bail!("{what}: not refused"),
        Err(error) => ensure!(
            error.reason() == Some(wanted),
            "{what}: {error}, not {wanted}"
        ),
    }
    Ok(())
}

/// A request with a session token, whoever's it is.
fn with<T>(token: &MetadataValue<Ascii>, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("authorization", token.clone());
    request
}

/// Signs on by hand; the token, and what was sent for it.
async fn sign_on(
    channel: &Channel,
    identity: &Identity,
) -> Result<(MetadataValue<Ascii>, v1::CreateSessionRequest)> {
    let mut enrolment = EnrollmentServiceClient::new(channel.clone());
    let public_key = identity.key.verifying_key().to_bytes().to_vec();
    let challenge = enrolment
        .create_challenge(v1::CreateChallengeRequest { public_key })
        .await?
        .into_inner()
        .challenge;
    let sent = sign_session(&identity.key, &challenge);
    let session = enrolment.create_session(sent.clone()).await?.into_inner();
    Ok((format!("Bearer {}", session.session_token).parse()?, sent))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn stolen_token(stage: &mut Stage) -> Result<Told> {
    let world = stage
        .set(Setting {
            here: true,
            ..Setting::default()
        })
        .await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let url = world.url(v1::Role::Volunteer, 1).await?;
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let identity = join(&url, "bob", &path("bob.json"), &hasty()).await?;
    // A join token that somebody has read over his shoulder is spent.
    refused(
        "a spent join token",
        join(&url, "thief", &path("thief.json"), &hasty()).await,
        ErrorReason::TokenSpent,
    )?;
    let bob = Member::new(Client::new(identity.clone(), hasty())?)?;
    let lease = bob.lease().await?;
    let adapter = honest(1);
    bob.upload(&adapter.weights, &lease.id).await?;
    // The thief's line, with Bob's session.
    let channel = Endpoint::from_shared(format!("http://{}", world.address))?
        .connect()
        .await?;
    let (token, sent) = sign_on(&channel, &identity).await?;
    let mut work = WorkServiceClient::new(channel.clone());
    let mut enrolment = EnrollmentServiceClient::new(channel.clone());
    let mut forged = bob.submission(&lease, &adapter);
    sign_submission(&new_key()?, &lease.nonce, &mut forged).map_err(|error| anyhow!("{error}"))?;
    let answer = work.submit_adapter(with(&token, forged)).await;
    is(
        "a submission by another key",
        answer,
        ErrorReason::BadSignature,
    )?;
    let mut changed = bob.submission(&lease, &adapter);
    if let Some(numbers) = &mut changed.numbers {
        numbers.tokens += 1;
    }
    let answer = work.submit_adapter(with(&token, changed)).await;
    is("a changed submission", answer, ErrorReason::BadSignature)?;
    let more = v1::CreateJoinTokenRequest {
        role: v1::Role::Maintainer.into(),
        uses: 1,
        ttl_ms: 60_000,
    };
    let answer = enrolment.create_join_token(with(&token, more)).await;
    is("a token for more", answer, ErrorReason::RoleRequired)?;
    let answer = enrolment.create_session(sent).await;
    is(
        "his sign-on, once more",
        answer,
        ErrorReason::ChallengeInvalid,
    )?;
    // Another volunteer's session is no key to Bob's lease.
    let carol = world.volunteer("carol").await?;
    refused(
        "his lease by another",
        carol.renew(&lease).await,
        ErrorReason::NotFound,
    )?;
    let renewal = v1::RenewLeaseRequest {
        lease_id: lease.id.clone(),
        generation: lease.generation,
        ..Default::default()
    };
    work.renew_lease(with(&token, renewal.clone())).await?;
    world.step_clock(3_601)?;
    let answer = work.renew_lease(with(&token, renewal)).await;
    is("an hour later", answer, ErrorReason::SessionExpired)?;
    world.step_clock(-3_601)?;
    world.hand_in(&bob, &lease, &adapter).await?;
    world.publish(&round).await?;
    Ok(Told::saw("7 attempts refused; Bob's own work counts"))
}

/// What a server answers to these bytes until it closes, or a while has passed.
async fn answer_to(address: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    /// A handshake's limit, and a little.
    const PATIENCE: Duration = Duration::from_secs(15);
    let mut line = TcpStream::connect(address).await?;
    line.write_all(bytes).await?;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, line.read_to_end(&mut answer)).await;
    ensure!(read.is_ok(), "the connection is kept");
    Ok(answer)
}

/// A greeting that offers TLS 1.1 at most.
fn tls_1_1() -> Vec<u8> {
    let mut hello = vec![3, 2];
    hello.extend([7; 32]);
    // No session; ECDHE-RSA and RSA with AES-128-CBC; no compression.
    hello.extend([0, 0, 4, 0xc0, 0x13, 0x00, 0x2f, 1, 0]);
    let mut handshake = vec![1, 0, 0, hello.len() as u8];
    handshake.extend(hello);
    let mut record = vec![0x16, 3, 1, 0, handshake.len() as u8];
    record.extend(handshake);
    record
}

async fn join_refused(text: &str) -> Result<ClientError> {
    let folder = tempfile::tempdir()?;
    let url: JoinUrl = text.parse().map_err(|error| anyhow!("{error}"))?;
    match join(&url, "bob", &folder.path().join("id.json"), &hasty()).await {
        Ok(_) => anyhow::bail!("joined over {text:?}"),
        Err(error) => Ok(error),
    }
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn tls_downgrade(stage: &mut Stage) -> Result<Told> {
    const ALERT: u8 = 0x15;
    let world = stage.set(Setting::default()).await?;
    let answer = answer_to(&world.address, &tls_1_1()).await?;
    ensure!(answer.first() == Some(&ALERT), "to TLS 1.1: {answer:?}");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let answer = answer_to(&world.address, preface).await?;
    ensure!(
        answer.is_empty() || answer[0] == ALERT,
        "to plain HTTP/2: {answer:?}"
    );
    let url = world.url(v1::Role::Volunteer, 1).await?;
    let (address, token) = (&world.address, url.token.secret());
    let error = join_refused(&format!("cairn+insecure://{address}/#{token}")).await?;
    ensure!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    // Somebody in between who speaks plain text only, and a client that was told to use TLS.
    let folder = tempfile::tempdir()?;
    let plain = tokio::task::block_in_place(|| {
        Server::start(folder.path(), "127.0.0.1:0", &["--insecure"])
    })?;
    let text = url.secret_text().replace(address.as_str(), &plain.address);
    let error = join_refused(&text).await?;
    ensure!(matches!(error, ClientError::NotTls { .. }), "{error}");
    ensure!(!error.retry(), "it would try again");
    join(&url, "bob", &folder.path().join("bob.json"), &hasty())
        .await
        .context("the token is spent")?;
    Ok(Told::saw("4 ways down refused, the token unspent"))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn wrong_certificate(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let bob = world.volunteer("bob").await?;
    let lease = bob.lease().await?;
    let url = world.url(v1::Role::Volunteer, 1).await?;
    world.kill().await?;
    let folder = tempfile::tempdir()?;
    let address = world.address.clone();
    let start = || Server::start(folder.path(), &address, &[]);
    let impostor = tokio::task::block_in_place(start)?;
    let wrong = |error: &ClientError| matches!(error, ClientError::WrongKey { .. });
    let Err(error) = bob.renew(&lease).await else {
        anyhow::bail!("an impostor was believed");
    };
    ensure!(wrong(&error) && !error.retry(), "{error}");
    let error = join_refused(&url.secret_text()).await?;
    ensure!(wrong(&error), "{error}");
    // One who knows the key but does not hold it: the pin is in every join URL.
    ensure!(matches!(url.server.transport, Transport::Tls(_)), "no pin");
    impostor.kill_9()?;
    world.restart().await?;
    bob.renew(&lease).await.context("the true one is back")?;
    join(&url, "carol", &folder.path().join("carol.json"), &hasty())
        .await
        .context("the token is spent")?;
    world.hand_in(&bob, &lease, &honest(1)).await?;
    world.publish(&round).await?;
    Ok(Told::saw(
        "a worker and a newcomer said nothing to the impostor",
    ))
}

/// Paths that no file of a folder has.
const PATHS: [&str; 18] = [
    "../config.json",
    "a/../../config.json",
    "/etc/cron.d/cairn",
    "//server/share/x",
    "C:\\windows\\x",
    "c:x",
    "..\\x",
    "a//b",
    "./x",
    "x/",
    "x\0.json",
    "x\n.json",
    "NUL",
    "con.json",
    "sub/Aux.txt",
    "COM1",
    "lpt9.safetensors",
    "dots.",
];

/// Names of models and sets that are none.
const NAMES: [&str; 9] = [
    "../x", "/x", "a/b", "..", ".x", "x\0", "nul", "con", "com1.x",
];

/// Everything below a folder, by name.
fn everything(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            found.push(entry.path().display().to_string());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
        }
    }
    found
}

async fn files_of(world: &World) -> Result<Vec<v1::File>> {
    let files = world.maintainer().checkpoint("").await?.files;
    Ok(files
        .into_iter()
        .filter(|file| !file.path.contains("cairn") && file.path != "SHA256SUMS")
        .collect())
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn path_tricks(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(Setting::default()).await?;
    let maintainer = world.maintainer();
    let invalid = ErrorReason::InvalidArgument;
    let sound = files_of(world).await?;
    for path in PATHS {
        let mut files = sound.clone();
        let last = files.last_mut().context("a file")?;
        path.clone_into(&mut last.path);
        let answer = maintainer.create_model("tricks", files).await;
        refused(&format!("a file at {path:?}"), answer, invalid)?;
    }
    let chunk = tiny::chunks("tricks", 4);
    for name in NAMES {
        let answer = maintainer.create_model(name, sound.clone()).await;
        refused(&format!("a model {name:?}"), answer, invalid)?;
        let answer = maintainer
            .add_dataset(name, v1::DatasetSet::Train, &chunk)
            .await;
        refused(&format!("a set {name:?}"), answer, invalid)?;
    }
    // An adapter has no names of its own: two files at fixed places, and a digest.
    maintainer.open_round(&round_file(1)).await?;
    let bob = world.volunteer("bob").await?;
    let lease = bob.lease().await?;
    let adapter = honest(1);
    bob.upload(&adapter.weights, &lease.id).await?;
    for digest in ["../../../etc/passwd", "/etc/passwd", "..", "\0"] {
        let mut request = bob.submission(&lease, &adapter);
        if let Some(blob) = &mut request.adapter {
            digest.clone_into(&mut blob.digest);
        }
        refused(
            &format!("an adapter {digest:?}"),
            bob.submit(&request).await,
            invalid,
        )?;
    }
    let inside: Vec<String> = everything(world.scratch());
    let data = world.data().display().to_string();
    let base = world.scratch().join("base").display().to_string();
    let outside = inside
        .iter()
        .find(|path| !path.starts_with(&data) && !path.starts_with(&base));
    ensure!(outside.is_none(), "{outside:?} has appeared");
    let tricks = inside
        .iter()
        .find(|path| path.contains("tricks") || path.to_lowercase().ends_with("nul"));
    ensure!(tricks.is_none(), "{tricks:?} has appeared");
    let count = PATHS.len() + 2 * NAMES.len() + 4;
    world.hand_in(&bob, &lease, &adapter).await?;
    Ok(Told::saw(format!("{count} names refused")))
}
