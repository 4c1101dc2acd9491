//! A plain TCP balancer: one connection after another to the next backend that takes it.
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// How long a backend may take to accept: they are on this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A listening balancer; it ends when dropped.
pub struct Balancer {
    /// Where it listens.
    pub address: SocketAddr,
    backends: Arc<Mutex<Vec<String>>>,
    serving: AbortHandle,
}

impl Balancer {
    /// Listens on any port of this machine, without backends yet.
    ///
    /// # Errors
    /// When there is no port.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let backends: Arc<Mutex<Vec<String>>> = Arc::default();
        let (address, known) = (listener.local_addr()?, backends.clone());
        let serving = tokio::spawn(async move {
            let next = Arc::new(AtomicUsize::new(0));
            while let Ok((client, _)) = listener.accept().await {
                let backends = known.lock().unwrap_or_else(PoisonError::into_inner).clone();
                tokio::spawn(serve(client, backends, next.clone()));
            }
        });
        Ok(Self {
            address,
            backends,
            serving: serving.abort_handle(),
        })
    }

    /// Where new connections go from now on.
    pub fn set_backends(&self, addresses: Vec<String>) {
        *self.backends.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A client none of whose backends live is hung up on.
async fn serve(mut client: TcpStream, backends: Vec<String>, next: Arc<AtomicUsize>) {
    for _ in 0..backends.len() {
        let backend = &backends[next.fetch_add(1, Ordering::Relaxed) % backends.len()];
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(backend)).await;
        if let Ok(Ok(mut server)) = connected {
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            return;
        }
    }
}
