//! HTTP for machines: liveness, readiness, metrics.
mod metrics;

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;

use crate::app::App;
use crate::error::Error;
use crate::limits;
use crate::net::{self, Connection};

/// The routes.
pub fn routes(app: App) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(app)
}

/// Ready when the database and the blob store answer, other coordinators are heard, and we are not
/// draining.
async fn ready(State(app): State<App>) -> (StatusCode, &'static str) {
    if app.lifecycle.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n");
    }
    if !answers(app.db.read()).await {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            "the database does not answer\n",
        );
    }
    if !app.wake.hears_others() {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            "other coordinators are not heard: the line to the database is lost\n",
        );
    }
    let probe = cairn_stack::digest::Digest::of(b"");
    if !answers(app.blobs.exists(probe)).await {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            "the blob store does not answer\n",
        );
    }
    if !app.disk_has_room() {
        // Still ready: reads and running work go on.
        return (
            StatusCode::OK,
            "ready, but the disk is nearly full: no new work\n",
        );
    }
    (StatusCode::OK, "ready\n")
}

async fn answers<T>(asked: impl Future<Output = Result<T, Error>>) -> bool {
    let answer = tokio::time::timeout(limits::READY_TIMEOUT, asked).await;
    matches!(answer, Ok(Ok(_)))
}

async fn metrics(State(app): State<App>) -> impl IntoResponse {
    match metrics::text(&app).await {
        Ok(text) => {
            let kind = [(
                header::CONTENT_TYPE,
                "text/plain; version=0.0.4; charset=utf-8",
            )];
            (kind, text).into_response()
        }
        Err(error) => {
            tracing::error!("collect metrics: {}", error.full());
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "the database does not answer\n",
            )
                .into_response()
        }
    }
}

/// Serves HTTP until the app drains.
///
/// # Errors
/// When the listener fails as a whole.
pub async fn serve(app: App, listener: TcpListener) -> std::io::Result<()> {
    let address = listener.local_addr()?;
    let incoming = Incoming {
        connections: net::accept(
            &app,
            listener,
            None,
            limits::HTTP_CONNECTIONS_MAX,
            limits::HTTP_HEADER_TIMEOUT,
        ),
        address,
    };
    let soft = app.lifecycle.soft().clone();
    axum::serve(incoming, routes(app))
        .with_graceful_shutdown(soft.cancelled_owned())
        .await
}

/// Our limited connections as axum takes them.
struct Incoming {
    connections: tokio_stream::wrappers::ReceiverStream<std::io::Result<Connection>>,
    address: std::net::SocketAddr,
}

impl axum::serve::Listener for Incoming {
    type Io = Connection;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Connection, std::net::SocketAddr) {
        loop {
            match self.connections.next().await {
                Some(Ok(connection)) => return (connection, self.address),
                Some(Err(_)) => {}
                // Draining: the graceful shutdown ends this wait.
                None => tokio::time::sleep(Duration::from_hours(1)).await,
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<std::net::SocketAddr> {
        Ok(self.address)
    }
}
