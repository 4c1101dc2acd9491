//! A TCP line that misbehaves: it cuts, delays, throttles, and swallows one direction or both.
//!
//! It knows nothing of what passes: TLS stays whole between the two ends.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Bytes passed on at once.
const PIECE_BYTES: usize = 16 * 1024;

/// How the line behaves; both directions behave when all is at its default.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rules {
    /// What clients send goes nowhere. Nobody is told: the connection is half-open.
    pub swallow_up: bool,
    /// What the coordinator answers goes nowhere.
    pub swallow_down: bool,
    /// How much later each piece arrives.
    pub delay: Duration,
    /// Most bytes a second, each way.
    pub bytes_per_second: Option<u64>,
    /// The connection is cut after so many bytes from the client.
    pub cut_after_up: Option<u64>,
    /// Nothing more is passed on after so many bytes from the client, and nobody is told.
    pub swallow_after_up: Option<u64>,
}

struct Line {
    target: String,
    rules: watch::Sender<Rules>,
    cuts: watch::Sender<u64>,
    up: AtomicU64,
    connections: AtomicU64,
    /// Connections up to this number are dead.
    dead: AtomicU64,
}

/// A running proxy; gone when dropped.
pub struct Proxy {
    /// Where clients connect.
    pub address: String,
    line: Arc<Line>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Between clients and `target`.
    ///
    /// # Errors
    /// When there is no port.
    pub async fn start(target: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let line = Arc::new(Line {
            target: target.to_owned(),
            rules: watch::Sender::default(),
            cuts: watch::Sender::default(),
            up: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            dead: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&line)));
        Ok(Self {
            address,
            line,
            accepting,
        })
    }

    /// Changes how the line behaves, for connections that are open too.
    pub fn set(&self, rules: Rules) {
        self.line.rules.send_replace(rules);
    }

    /// Cuts every connection that is open.
    pub fn cut(&self) {
        self.line.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Lets every connection that is open go dead: nothing passes any more, and nobody is told. New
    /// ones work.
    pub fn deaden(&self) {
        self.line.dead.store(self.connections(), Ordering::Relaxed);
    }

    /// Bytes that clients have sent so far, passed on or not.
    #[must_use]
    pub fn bytes_up(&self) -> u64 {
        self.line.up.load(Ordering::Relaxed)
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.line.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn accept(listener: TcpListener, line: Arc<Line>) {
    while let Ok((client, _)) = listener.accept().await {
        let number = line.connections.fetch_add(1, Ordering::Relaxed) + 1;
        tokio::spawn(carry(client, number, Arc::clone(&line)));
    }
}

async fn carry(client: TcpStream, number: u64, line: Arc<Line>) {
    let mut cuts = line.cuts.subscribe();
    // A target that is down closes the connection, as its own system would.
    let Ok(server) = TcpStream::connect(&line.target).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = pump(from_client, to_server, &line, number, true) => {}
        () = pump(from_server, to_client, &line, number, false) => {}
        _ = cuts.changed() => {}
    }
}

/// Passes bytes on one way, until the end or a cut.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, line: &Line, number: u64, up: bool) {
    let mut piece = vec![0; PIECE_BYTES];
    let (mut passed, mut broken) = (0_u64, false);
    loop {
        let Ok(count @ 1..) = from.read(&mut piece).await else {
            return;
        };
        let rules = *line.rules.borrow();
        let mut count = count as u64;
        if up {
            line.up.fetch_add(count, Ordering::Relaxed);
            for limit in [rules.cut_after_up, rules.swallow_after_up] {
                count = count.min(limit.unwrap_or(u64::MAX).saturating_sub(passed));
            }
        }
        broken |= number <= line.dead.load(Ordering::Relaxed);
        broken |= if up {
            rules.swallow_up
        } else {
            rules.swallow_down
        };
        // A stream with a hole in it is of no use any more: what follows a swallowed piece goes too.
        if broken {
            continue;
        }
        if !rules.delay.is_zero() {
            tokio::time::sleep(rules.delay).await;
        }
        if let Some(rate) = rules.bytes_per_second {
            tokio::time::sleep(Duration::from_secs_f64(count as f64 / rate as f64)).await;
        }
        let whole = &piece[..usize::try_from(count).unwrap_or(0)];
        if to.write_all(whole).await.is_err() {
            return;
        }
        passed += count;
        if up && rules.cut_after_up.is_some_and(|limit| passed >= limit) {
            return;
        }
        broken |= up && rules.swallow_after_up.is_some_and(|limit| passed >= limit);
    }
}
