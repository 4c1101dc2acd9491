//! Who may call what. Every service needs a session but enrolment, health and reflection.
use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};

use cairn_proto::reason::ErrorReason;
use cairn_stack::digest::Digest;
use tokio::sync::Semaphore;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::{Request, Status};
use tower::{Layer, Service};

pub use crate::caller::{Caller, Role};

use crate::app::App;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::net::PeerAddress;
use crate::secret::{self, SecretKind};
use crate::{db, limits};

/// The caller of a request; the layer has put it there.
///
/// # Errors
/// UNAUTHENTICATED when there is none.
pub fn caller<T>(request: &Request<T>) -> Result<Caller, Error> {
    request
        .extensions()
        .get::<Caller>()
        .cloned()
        .ok_or_else(unauthenticated)
}

fn unauthenticated() -> Error {
    Error::new(
        ErrorReason::Unauthenticated,
        ErrorReason::Unauthenticated.sentence(),
    )
}

/// What is remembered between calls.
#[derive(Debug)]
pub struct Gate {
    sessions: Mutex<HashMap<Digest, Remembered>>,
    rates: Mutex<HashMap<IpAddr, Bucket>>,
    calls: Semaphore,
}

#[derive(Debug)]
struct Remembered {
    caller: Caller,
    expires: Timestamp,
    looked_up: Timestamp,
}

/// A token bucket.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at: Timestamp,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            sessions: Mutex::default(),
            rates: Mutex::default(),
            calls: Semaphore::new(limits::CALLS_MAX),
        }
    }
}

impl Gate {
    fn remembered(&self, token: Digest, now: Timestamp) -> Option<Caller> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let found = sessions.get(&token)?;
        let fresh = now < found.looked_up.plus(limits::SESSION_CACHE) && now >= found.looked_up;
        (fresh && now < found.expires).then(|| found.caller.clone())
    }

    fn remember(&self, token: Digest, caller: &Caller, expires: Timestamp, now: Timestamp) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.len() >= limits::SESSION_CACHE_MAX {
            sessions.clear();
        }
        sessions.insert(
            token,
            Remembered {
                caller: caller.clone(),
                expires,
                looked_up: now,
            },
        );
    }

    /// Whether one more call without a session may come from there now.
    fn admits(&self, address: IpAddr, now: Timestamp) -> bool {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        if rates.len() >= limits::OPEN_CALLS_ADDRESSES_MAX && !rates.contains_key(&address) {
            rates.clear();
        }
        let bucket = rates.entry(address).or_insert(Bucket {
            left: limits::OPEN_CALLS_BURST,
            at: now,
        });
        let seconds = bucket.at.until(now).as_secs_f64();
        bucket.left =
            (bucket.left + seconds * limits::OPEN_CALLS_PER_SECOND).min(limits::OPEN_CALLS_BURST);
        bucket.at = now;
        if bucket.left < 1.0 {
            return false;
        }
        bucket.left -= 1.0;
        true
    }
}

/// What a method asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Open,
    Session,
}

/// How long a method may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Span {
    /// At most `CALL_TIMEOUT`.
    Bounded,
    /// A stream, bounded by its own idle timeouts.
    Stream,
}

fn rules(path: &str) -> (Access, Span) {
    match path {
        "/cairn.v1.EnrollmentService/Enroll"
        | "/cairn.v1.EnrollmentService/CreateChallenge"
        | "/cairn.v1.EnrollmentService/CreateSession"
        | "/grpc.health.v1.Health/Check" => (Access::Open, Span::Bounded),
        "/grpc.health.v1.Health/Watch"
        | "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo" => {
            (Access::Open, Span::Stream)
        }
        "/cairn.v1.BlobService/WriteBlob"
        | "/cairn.v1.BlobService/CompleteUpload"
        | "/cairn.v1.BlobService/ReadBlob"
        | "/cairn.v1.RoundService/WatchRound" => (Access::Session, Span::Stream),
        // Whatever is added later is closed until somebody opens it here.
        _ => (Access::Session, Span::Bounded),
    }
}

async fn admit<B>(app: &App, access: Access, request: &mut http::Request<B>) -> Result<(), Error> {
    let now = app.clock.now_ms();
    match access {
        Access::Open => {
            let address = request
                .extensions()
                .get::<PeerAddress>()
                .and_then(|peer| peer.0);
            match address {
                Some(address) if !app.gate.admits(address.ip(), now) => Err(Error::new(
                    ErrorReason::TooMany,
                    "too many calls without a session from your address",
                )),
                _ => Ok(()),
            }
        }
        Access::Session => {
            let caller = session(app, request.headers(), now).await?;
            request.extensions_mut().insert(caller);
            Ok(())
        }
    }
}

async fn session(app: &App, headers: &http::HeaderMap, now: Timestamp) -> Result<Caller, Error> {
    let token = headers
        .get(http::header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .filter(|token| SecretKind::Session.is_whole(token))
        .ok_or_else(unauthenticated)?;
    let token = secret::hash(token);
    if let Some(caller) = app.gate.remembered(token, now) {
        return Ok(caller);
    }
    let mut tx = app.db.read().await?;
    let session = db::sessions::session_find(&mut tx, token)
        .await?
        .ok_or_else(unauthenticated)?;
    drop(tx);
    if session.expires <= now {
        return Err(Error::new(
            ErrorReason::SessionExpired,
            ErrorReason::SessionExpired.sentence(),
        ));
    }
    if session.revoked {
        return Err(Error::denied(
            ErrorReason::IdentityDisabled,
            ErrorReason::IdentityDisabled.sentence(),
        ));
    }
    app.gate
        .remember(token, &session.caller, session.expires, now);
    Ok(session.caller)
}

/// Puts [`Auth`] around the services.
#[derive(Clone)]
pub struct AuthLayer {
    app: App,
}

impl AuthLayer {
    /// Looks sessions up in this app.
    #[must_use]
    pub const fn new(app: App) -> Self {
        Self { app }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth {
            app: self.app.clone(),
            inner,
        }
    }
}

/// Admits calls, bounds their number and time, and puts the [`Caller`] into their extensions.
#[derive(Clone)]
pub struct Auth<S> {
    app: App,
    inner: S,
}

impl<S, B> Service<http::Request<B>> for Auth<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let app = self.app.clone();
        Box::pin(async move {
            let (access, span) = rules(request.uri().path());
            let Ok(_permit) = app.gate.calls.try_acquire() else {
                return Ok(refuse(Error::new(
                    ErrorReason::TooMany,
                    "too many calls at once",
                )));
            };
            if let Err(error) = admit(&app, access, &mut request).await {
                return Ok(refuse(error));
            }
            match span {
                Span::Stream => inner.call(request).await,
                Span::Bounded => {
                    match tokio::time::timeout(limits::CALL_TIMEOUT, inner.call(request)).await {
                        Ok(answer) => answer,
                        Err(_) => Ok(refuse(Error::unavailable("the call took too long"))),
                    }
                }
            }
        })
    }
}

fn refuse(error: Error) -> http::Response<Body> {
    Status::from(error).into_http()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn unknown_methods_are_closed() {
        assert_eq!(
            rules("/cairn.v1.NewService/Do"),
            (Access::Session, Span::Bounded)
        );
        assert_eq!(
            rules("/cairn.v1.EnrollmentService/CreateJoinToken"),
            (Access::Session, Span::Bounded)
        );
    }

    #[test]
    fn open_calls_are_rationed_by_address() {
        let gate = Gate::default();
        let (one, two) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let now = Timestamp(1_000);
        let admitted = (0..1_000).filter(|_| gate.admits(one, now)).count();
        assert_eq!(admitted, limits::OPEN_CALLS_BURST as usize);
        assert!(gate.admits(two, now));
        assert!(!gate.admits(one, now));
        assert!(gate.admits(one, now.plus(Duration::from_secs(1))));
    }
}
