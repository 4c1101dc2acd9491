//! Lines that are dead, slow on purpose, or far too many.
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use cairn_coordinator::caller::{Caller, Role};
use cairn_coordinator::clock::Clock;
use cairn_coordinator::db::Db;
use cairn_coordinator::db::workers::worker_insert;
use cairn_coordinator::ids::WorkerId;
use cairn_coordinator::server::database_url;
use cairn_proto::client::{Client, ClientError, Options};
use cairn_proto::identity::{Identity, new_key};
use cairn_proto::v1;
use cairn_proto::v1::write_blob_request::{Header, Part};
use futures::{FutureExt as _, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Instant;

use super::proxy::Proxy;
use super::suite::{Stage, Told};
use super::uploads::{name_of, noise};
use super::world::{Setting, World};
use crate::adapters::honest;
use crate::member::Member;
use crate::tiny::round_file;

/// How long a call may take while others misbehave, on a busy machine.
const PROMPT: Duration = Duration::from_secs(3);
/// How often others are asked how they are.
const ASK: Duration = Duration::from_millis(200);

fn bare() -> Setting {
    Setting {
        bare: true,
        ..Setting::default()
    }
}

/// Asks as somebody else until `work` is over; the longest answer.
async fn meanwhile<T>(
    other: &Member,
    work: impl Future<Output = Result<T>>,
) -> Result<(T, Duration)> {
    let mut slowest = Duration::ZERO;
    let asking = async {
        loop {
            let asked = Instant::now();
            let standing = other.client.with_patience(Duration::ZERO);
            standing
                .call(|mut to| async move {
                    to.volunteer.get_standing(v1::GetStandingRequest {}).await
                })
                .await
                .context("somebody else's call")?;
            slowest = slowest.max(asked.elapsed());
            tokio::time::sleep(ASK).await;
        }
    };
    let done = tokio::select! {
        done = work => done?,
        failed = asking => return failed,
    };
    ensure!(slowest < PROMPT, "others waited for {slowest:?}");
    Ok((done, slowest))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn half_open(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(bare()).await?;
    let proxy = Proxy::start(&world.address).await?;
    let role = v1::Role::Volunteer;
    let bob = world.member_at(role, "bob", &proxy.address).await?;
    bob.standing().await?;
    let before = proxy.connections();
    proxy.deaden();
    let since = Instant::now();
    bob.standing().await?;
    let recovery = since.elapsed();
    ensure!(proxy.connections() > before, "over the dead line");
    Ok(Told::saw("noticed by pings, and connected anew").after(recovery))
}

/// An address of this machine that is not the one everybody else comes from.
fn loopback(number: usize) -> IpAddr {
    let [high, low] = u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, 1, high, low.max(1)))
}

async fn connect_from(from: IpAddr, to: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(from, 0))?;
    Ok(socket.connect(to).await?)
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn slowloris(stage: &mut Stage) -> Result<Told> {
    const CONNECTIONS: usize = 500;
    /// Below the limit of connections from one address.
    const PER_ADDRESS: usize = 125;
    /// The limit of a handshake, and a little.
    const CUT_MAX: Duration = Duration::from_secs(20);
    let world = stage.set(bare()).await?;
    let address: SocketAddr = world.address.parse()?;
    let bob = world.volunteer("bob").await?;
    bob.standing().await?;
    // The start of a TLS greeting, a byte a second.
    let slow = (0..CONNECTIONS).map(async |number| {
        let mut line = connect_from(loopback(257 + number / PER_ADDRESS), address).await?;
        let since = Instant::now();
        let mut answer = [0; 64];
        for byte in [0x16, 3, 1, 2, 0, 1].into_iter().cycle() {
            if line.write_all(&[byte]).await.is_err() {
                break;
            }
            let read = tokio::time::timeout(Duration::from_secs(1), line.read(&mut answer));
            if let Ok(Ok(0) | Err(_)) = read.await {
                break;
            }
            ensure!(since.elapsed() < CUT_MAX, "never cut");
        }
        anyhow::Ok(since.elapsed())
    });
    let (cut, slowest) = meanwhile(&bob, futures::future::try_join_all(slow)).await?;
    let last = cut.into_iter().max().unwrap_or_default();
    Ok(Told::saw(format!(
        "{CONNECTIONS} cut after {} s at most; others waited {} ms at most",
        last.as_secs(),
        slowest.as_millis()
    )))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn idle_streams(stage: &mut Stage) -> Result<Told> {
    const STREAMS: u32 = 60;
    /// As long as an upload takes on a busy machine.
    const UPLOAD_MAX: Duration = Duration::from_secs(10);
    let world = stage.set(Setting::default()).await?;
    let round = world.maintainer().open_round(&round_file(2)).await?;
    let (mallory, bob) = (
        world.volunteer("mallory").await?,
        world.volunteer("bob").await?,
    );
    let (of_mallory, of_bob) = (mallory.lease().await?, bob.lease().await?);
    let idle = (0..STREAMS).map(|number| {
        let header = Header {
            blob: Some(name_of(&noise(1_000 + number)).into()),
            offset: 0,
            lease_id: of_mallory.id.clone(),
        };
        mallory.client.call_once(move |mut to| {
            let first = v1::WriteBlobRequest {
                part: Some(Part::Header(header.clone())),
            };
            let silence = futures::stream::iter([first]).chain(futures::stream::pending());
            async move { to.blobs.write_blob(silence).await }
        })
    });
    // Whatever becomes of them: for as long as we look, they are there.
    let idle = futures::future::join_all(idle).then(|_| std::future::pending::<()>());
    let upload = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let since = Instant::now();
        let answer = world.hand_in(&bob, &of_bob, &honest(1)).await;
        answer.with_context(|| format!("another's upload, after {:?}", since.elapsed()))?;
        let took = since.elapsed();
        ensure!(took < UPLOAD_MAX, "another's upload took {took:?}");
        anyhow::Ok(took)
    };
    let took = tokio::select! {
        took = upload => took?,
        () = idle => unreachable!("they stay"),
    };
    ensure!(
        world.round(&round).await?.ended_ms == 0,
        "the round has ended"
    );
    Ok(Told::saw(format!(
        "{STREAMS} idle uploads; another's took {} ms",
        took.as_millis()
    )))
}

/// One HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(body);
    bytes
}

/// The headers of a call that needs no session, in HPACK without its table.
fn headers() -> Vec<u8> {
    let path = b"/cairn.v1.EnrollmentService/CreateChallenge";
    // POST, http, the path, an authority, a gRPC content type, trailers.
    let mut block = vec![0x83, 0x86, 0x04, path.len() as u8];
    block.extend(path);
    block.extend(b"\x01\x01x\x0f\x10\x10application/grpc\x00\x02te\x08trailers");
    block
}

/// Opens and resets streams on one line until the other side ends it; how many went out.
async fn resets(line: TcpStream, most: u32) -> Result<u32> {
    let (mut from, mut to) = line.into_split();
    let ended = tokio::spawn(async move {
        let mut answer = vec![0; 1 << 16];
        while let Ok(1..) = from.read(&mut answer).await {}
    });
    to.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    to.write_all(&frame(4, 0, 0, &[])).await?;
    let headers = headers();
    let mut streams = 0;
    while !ended.is_finished() {
        ensure!(streams < most, "a connection with {streams} resets goes on");
        let mut batch = Vec::new();
        for _ in 0..100 {
            let id = 2 * streams + 1;
            // The whole request, and at once a reset: CANCEL.
            batch.extend(frame(1, 0x4 | 0x1, id, &headers));
            batch.extend(frame(3, 0, id, &8_u32.to_be_bytes()));
            streams += 1;
        }
        if to.write_all(&batch).await.is_err() {
            break;
        }
    }
    Ok(streams)
}

/// Resident memory of a process, bytes.
fn resident_bytes(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .context("no VmRSS")?;
    Ok(kibibytes.trim().parse::<u64>()? * 1024)
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn rapid_reset(stage: &mut Stage) -> Result<Told> {
    const CONNECTIONS: usize = 8;
    /// Far more than any honest client resets on one connection.
    const STREAMS_MAX: u32 = 100_000;
    const FLOOD: Duration = Duration::from_secs(5);
    const GROWTH_MAX: u64 = 200 << 20;
    let setting = Setting {
        plain: true,
        ..bare()
    };
    let world = stage.set(setting).await?;
    let address: SocketAddr = world.address.parse()?;
    let process = world.process_id().context("a process")?;
    let bob = world.volunteer("bob").await?;
    bob.standing().await?;
    let before = resident_bytes(process)?;
    let since = Instant::now();
    let flood = (0..CONNECTIONS).map(async |number| {
        // Thrown out, it comes again.
        let (mut lines, mut streams) = (0_u32, 0);
        while since.elapsed() < FLOOD {
            let line = connect_from(loopback(513 + number), address).await?;
            streams += resets(line, STREAMS_MAX).await?;
            lines += 1;
        }
        anyhow::Ok((lines, streams))
    });
    let (floods, slowest) = meanwhile(&bob, futures::future::try_join_all(flood)).await?;
    let lines: u32 = floods.iter().map(|(lines, _)| lines).sum();
    let streams: u32 = floods.iter().map(|(_, streams)| streams).sum();
    let grown = resident_bytes(process)?.saturating_sub(before);
    ensure!(grown < GROWTH_MAX, "{grown} bytes of memory more");
    Ok(Told::saw(format!(
        "{streams} resets, {lines} connections ended; others waited {} ms at most; {} MiB more",
        slowest.as_millis(),
        grown >> 20
    )))
}

/// Sessions that come back at once.
const HERD: usize = 10_000;
/// Within this, each has had an answer.
const HERD_MAX: Duration = Duration::from_mins(2);
/// Signing on for the first time, which is a herd nobody promises anything to: two writes each.
const SIGN_ON_MAX: Duration = Duration::from_mins(5);
/// Those behind one router.
const HERD_PER_ADDRESS: usize = 200;
/// Open files that everything else in this process needs.
const FILES_SPARE: usize = 600;

/// How many files this process may have open.
fn files_max() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next());
    soft.and_then(|text| text.parse().ok()).unwrap_or(1_024)
}

/// Enrols many identities at once, past the wire: joining is not what is looked at.
async fn enrolled(world: &World, count: usize) -> Result<Vec<Client>> {
    let plain = |error: cairn_coordinator::error::Error| anyhow!(error.full());
    let db = Db::open(&database_url(None, &world.data()))
        .await
        .map_err(plain)?;
    let mut tx = db.begin().await.map_err(plain)?;
    let mut herd = Vec::with_capacity(count);
    let known = world.maintainer().client.identity();
    for number in 0..count {
        let key = new_key()?;
        let caller = Caller {
            worker: WorkerId::new(),
            role: Role::Volunteer,
            public_key: key.verifying_key(),
            name: format!("herd {number}"),
        };
        worker_insert(&mut tx, &caller, Clock::System.now_ms())
            .await
            .map_err(plain)?;
        let identity = Identity {
            server: known.server.clone(),
            worker_id: caller.worker.to_string(),
            role: v1::Role::Volunteer,
            display_name: caller.name,
            server_key: known.server_key,
            key,
        };
        let options = Options {
            patience: SIGN_ON_MAX,
            local_address: Some(loopback(1_025 + number / HERD_PER_ADDRESS)),
            ..Options::default()
        };
        herd.push(Client::new(identity, options)?);
    }
    tx.commit().await.map_err(plain)?;
    db.close().await;
    Ok(herd)
}

/// Every one of them asks how it stands, all at once.
async fn all_ask(
    herd: &[Client],
    to_go: &std::sync::atomic::AtomicUsize,
) -> Result<(), ClientError> {
    to_go.store(herd.len(), std::sync::atomic::Ordering::Relaxed);
    let asking = herd.iter().map(async |client| {
        let request = |mut to: cairn_proto::client::Services| async move {
            to.volunteer.get_standing(v1::GetStandingRequest {}).await
        };
        client.call(request).await?;
        to_go.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        Ok::<(), ClientError>(())
    });
    futures::future::try_join_all(asking).await?;
    Ok(())
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn herd(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(bare()).await?;
    let size = HERD.min(files_max().saturating_sub(FILES_SPARE));
    let herd = enrolled(world, size).await?;
    let to_go = std::sync::atomic::AtomicUsize::new(0);
    let left = || to_go.load(std::sync::atomic::Ordering::Relaxed);
    let since = Instant::now();
    tokio::time::timeout(SIGN_ON_MAX, all_ask(&herd, &to_go))
        .await
        .map_err(|_| anyhow!("{} of {size} could not sign on in five minutes", left()))??;
    let signed_on = since.elapsed();
    let process = world.process_id().context("a process")?;
    let memory = resident_bytes(process)? >> 20;
    world.kill_9().await?;
    let since = Instant::now();
    tokio::time::timeout(HERD_MAX, all_ask(&herd, &to_go))
        .await
        .map_err(|_| {
            anyhow!(
                "{} of {size} were without an answer after two minutes",
                left()
            )
        })??;
    let recovery = since.elapsed();
    let scaled = if size < HERD {
        format!(" (scaled: only {} files may be open)", files_max())
    } else {
        String::new()
    };
    Ok(Told::saw(format!(
        "{size} signed on in {:.1} s ({memory} MiB), all back in {:.1} s{scaled}",
        signed_on.as_secs_f64(),
        recovery.as_secs_f64()
    ))
    .after(recovery))
}
