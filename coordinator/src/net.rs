//! Connections: how many, from where, and how long they may be silent.
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::app::App;
use crate::limits;

/// Where a connection comes from; none for one in memory. In every gRPC request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerAddress(pub Option<SocketAddr>);

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Bytes that make a connection worth keeping: the HTTP/2 preface and an empty SETTINGS frame, or
/// the start of an HTTP/1 request.
const FIRST_BYTES: u64 = 24 + 9;

/// A connection that ends when its peer is silent for too long.
pub struct Connection {
    io: Box<dyn Io>,
    peer: PeerAddress,
    idle: Duration,
    read: u64,
    deadline: Pin<Box<Sleep>>,
    _places: Option<Places>,
}

impl Connection {
    /// A connection over anything, such as `tokio::io::duplex`, without limits on its number.
    pub fn new(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, idle: Duration) -> Self {
        Self {
            io: Box::new(io),
            peer: PeerAddress(None),
            idle,
            read: 0,
            deadline: Box::pin(tokio::time::sleep(limits::PREFACE_TIMEOUT)),
            _places: None,
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = PeerAddress;

    fn connect_info(&self) -> PeerAddress {
        self.peer
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.io).poll_read(cx, buffer) {
            Poll::Ready(answer) => {
                self.read += (buffer.filled().len() - before) as u64;
                // A trickle of first bytes does not extend the time for them.
                if self.read >= FIRST_BYTES {
                    let next = Instant::now() + self.idle;
                    self.deadline.as_mut().reset(next);
                }
                Poll::Ready(answer)
            }
            Poll::Pending => match self.deadline.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                Poll::Pending => Poll::Pending,
            },
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Raises how many files this process may have open to what the system allows it; how many
/// connections fit into that, beside everything else.
#[must_use]
pub fn connections_that_fit() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let allowed = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: allowed.maximum,
        maximum: allowed.maximum,
    };
    let files = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => allowed.maximum,
        Err(_) => allowed.current,
    };
    // No limit at all, or room for half of what there is where that is little.
    let files = files.unwrap_or(u64::MAX);
    let fit = files.saturating_sub(limits::FILES_SPARE).max(files / 2);
    usize::try_from(fit).unwrap_or(usize::MAX)
}

/// Counts connections by address.
type Addresses = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// A place among all connections and among those of an address, given back when dropped.
struct Places {
    _all: OwnedSemaphorePermit,
    addresses: Addresses,
    address: IpAddr,
}

impl Drop for Places {
    fn drop(&mut self) {
        let mut addresses = self
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = addresses.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                addresses.remove(&self.address);
            }
        }
    }
}

fn place(all: OwnedSemaphorePermit, addresses: &Addresses, address: IpAddr) -> Option<Places> {
    let mut counts = addresses.lock().unwrap_or_else(PoisonError::into_inner);
    let count = counts.entry(address).or_insert(0);
    if *count >= limits::CONNECTIONS_PER_ADDRESS_MAX {
        return None;
    }
    *count += 1;
    drop(counts);
    Some(Places {
        _all: all,
        addresses: Arc::clone(addresses),
        address,
    })
}

/// Accepts connections until the app drains: each gets its TLS handshake and its limits.
pub fn accept(
    app: &App,
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    connections_max: usize,
    idle: Duration,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(limits::HANDSHAKES_MAX);
    let lifecycle = app.lifecycle.clone();
    let soft = lifecycle.soft().clone();
    app.lifecycle.spawn(async move {
        let all = Arc::new(Semaphore::new(connections_max));
        let addresses = Addresses::default();
        loop {
            let accepted = tokio::select! {
                () = soft.cancelled() => return,
                accepted = next(&listener, &all) => accepted,
            };
            let Some((permit, stream, peer)) = accepted else {
                continue;
            };
            let Some(places) = place(permit, &addresses, peer.ip()) else {
                debug!("refused a connection from {peer}: too many from there");
                continue;
            };
            let (tls, sender) = (tls.clone(), sender.clone());
            lifecycle.spawn(async move {
                let greeted = greet(stream, tls);
                match tokio::time::timeout(limits::HANDSHAKE_TIMEOUT, greeted).await {
                    Ok(Ok(io)) => {
                        let connection = Connection {
                            io,
                            peer: PeerAddress(Some(peer)),
                            _places: Some(places),
                            ..Connection::new(tokio::io::empty(), idle)
                        };
                        // Fails only when the server has gone.
                        let _ = sender.send(Ok(connection)).await;
                    }
                    Ok(Err(error)) => debug!("handshake with {peer}: {error}"),
                    Err(_) => debug!("handshake with {peer} took too long"),
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

async fn next(
    listener: &TcpListener,
    all: &Arc<Semaphore>,
) -> Option<(OwnedSemaphorePermit, TcpStream, SocketAddr)> {
    let permit = Arc::clone(all).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => Some((permit, stream, peer)),
        Err(error) => {
            // Out of file descriptors, most likely: others must end before more can begin.
            warn!("accept a connection: {error}");
            tokio::time::sleep(Duration::from_millis(200)).await;
            None
        }
    }
}

async fn greet(stream: TcpStream, tls: Option<TlsAcceptor>) -> io::Result<Box<dyn Io>> {
    stream.set_nodelay(true)?;
    Ok(match tls {
        None => Box::new(stream),
        Some(tls) => Box::new(tls.accept(stream).await?),
    })
}
