//! The connection that worker and command line share: pinned TLS, sessions, deadlines, retries.
//!
//! ```no_run
//! # async fn example(identity: cairn_proto::identity::Identity)
//! # -> Result<(), cairn_proto::client::ClientError> {
//! use cairn_proto::{client::{Client, Options}, v1};
//! let client = Client::new(identity, Options::default())?;
//! let rounds = client
//!     .call(|mut to| async move { to.rounds.list_rounds(v1::ListRoundsRequest::default()).await })
//!     .await?;
//! # Ok(()) }
//! ```
mod blobs;
mod direct;
mod error;
mod retry;
mod tls;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Response, Status};

pub use error::ClientError;
pub use retry::Backoff;

use crate::identity::{Identity, joining_done, joining_key};
use crate::limits::{MESSAGE_BYTES_MAX, NONCE_BYTES};
use crate::signing::{self, parse_public_key};
use crate::url::{JoinUrl, Server, Transport};
use crate::v1;
use crate::v1::blob_service_client::BlobServiceClient;
use crate::v1::contribution_service_client::ContributionServiceClient;
use crate::v1::dataset_service_client::DatasetServiceClient;
use crate::v1::enrollment_service_client::EnrollmentServiceClient;
use crate::v1::log_service_client::LogServiceClient;
use crate::v1::model_service_client::ModelServiceClient;
use crate::v1::round_service_client::RoundServiceClient;
use crate::v1::volunteer_service_client::VolunteerServiceClient;
use crate::v1::work_service_client::WorkServiceClient;

/// How often an idle connection is probed: below the idle limits of common home routers.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// How long a probe may stay unanswered.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// HTTP/2 window of a stream, bytes: a few chunks in flight without much memory.
const WINDOW_BYTES: u32 = 2 * 1024 * 1024;

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long a call that is not a stream may take, above the long poll of `ClaimWork`.
    pub deadline: Duration,
    /// How long to keep trying while the coordinator cannot be reached, summed over the waits.
    pub patience: Duration,
    /// Plain text to other machines.
    pub force_insecure: bool,
    /// The address of this machine to connect from; the system's choice where it does not matter.
    pub local_address: Option<IpAddr>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            deadline: Duration::from_mins(1),
            patience: Duration::from_secs(20),
            force_insecure: false,
            local_address: None,
        }
    }
}

/// Adds the session token and a deadline to each call.
#[derive(Clone)]
pub struct Bearer {
    token: Option<MetadataValue<Ascii>>,
    deadline: Option<Duration>,
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.token {
            request
                .metadata_mut()
                .insert("authorization", token.clone());
        }
        if let Some(deadline) = self.deadline
            && !request.metadata().contains_key("grpc-timeout")
        {
            request.set_timeout(deadline);
        }
        Ok(request)
    }
}

/// A channel whose calls carry a session token.
pub type Authed = InterceptedService<Channel, Bearer>;

/// One client a service, cheap to clone, signed on.
#[derive(Clone)]
#[expect(
    missing_docs,
    reason = "the services are documented in the .proto files"
)]
pub struct Services {
    pub enrollment: EnrollmentServiceClient<Authed>,
    pub work: WorkServiceClient<Authed>,
    /// Streams: without a deadline of their own.
    pub blobs: BlobServiceClient<Authed>,
    pub contributions: ContributionServiceClient<Authed>,
    pub log: LogServiceClient<Authed>,
    pub models: ModelServiceClient<Authed>,
    pub datasets: DatasetServiceClient<Authed>,
    pub rounds: RoundServiceClient<Authed>,
    /// `WatchRound`: without a deadline.
    pub watch: RoundServiceClient<Authed>,
    pub volunteer: VolunteerServiceClient<Authed>,
}

macro_rules! service {
    ($type:ident, $channel:expr) => {
        $type::new($channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    };
}

impl Services {
    fn new(channel: &Channel, token: Option<MetadataValue<Ascii>>, deadline: Duration) -> Self {
        let stream = Bearer {
            token,
            deadline: None,
        };
        let unary = Bearer {
            deadline: Some(deadline),
            ..stream.clone()
        };
        let unary = || InterceptedService::new(channel.clone(), unary.clone());
        let stream = || InterceptedService::new(channel.clone(), stream.clone());
        Self {
            enrollment: service!(EnrollmentServiceClient, unary()),
            work: service!(WorkServiceClient, unary()),
            blobs: service!(BlobServiceClient, stream()),
            contributions: service!(ContributionServiceClient, unary()),
            log: service!(LogServiceClient, unary()),
            models: service!(ModelServiceClient, unary()),
            datasets: service!(DatasetServiceClient, unary()),
            rounds: service!(RoundServiceClient, unary()),
            watch: service!(RoundServiceClient, stream()),
            volunteer: service!(VolunteerServiceClient, unary()),
        }
    }
}

/// The wire to one coordinator, not signed on.
#[derive(Clone)]
struct Wire {
    channel: Channel,
    server: String,
    verifier: Option<Arc<tls::PinVerifier>>,
}

impl Wire {
    fn open(server: &Server, options: &Options) -> Result<Self, ClientError> {
        let authority = server.authority();
        let (scheme, verifier) = match server.transport {
            Transport::Tls(pin) => ("https", Some(Arc::new(tls::PinVerifier::new(pin)))),
            Transport::Insecure if server.is_loopback() || options.force_insecure => ("http", None),
            Transport::Insecure => {
                return Err(ClientError::InsecureRemote { server: authority });
            }
        };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{authority}"))
            .map_err(|error| unreachable_error(&authority, &error))?
            .connect_timeout(options.connect_timeout)
            .local_address(options.local_address)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .tcp_nodelay(true);
        let endpoint = match &verifier {
            None => endpoint,
            Some(verifier) => endpoint
                .tls_config_with_verifier(ClientTlsConfig::new(), verifier.clone())
                .map_err(|error| unreachable_error(&authority, &error))?,
        };
        Ok(Self {
            channel: endpoint.connect_lazy(),
            server: authority,
            verifier,
        })
    }

    /// Reads a status, asking the verifier whether a wrong key was the cause.
    fn error(&self, status: &Status) -> ClientError {
        let error = ClientError::from_status(status, &self.server);
        let mismatch = self
            .verifier
            .as_ref()
            .and_then(|verifier| verifier.take_mismatch());
        match (mismatch, &error) {
            (Some((expected, shown)), ClientError::Unreachable { .. }) => ClientError::WrongKey {
                server: self.server.clone(),
                expected,
                shown,
            },
            _ => error,
        }
    }
}

fn unreachable_error(server: &str, error: &dyn std::fmt::Display) -> ClientError {
    ClientError::Unreachable {
        server: server.to_owned(),
        detail: error.to_string(),
    }
}

/// Enrols this machine with a join URL and keeps the identity at `path`.
///
/// Safe to repeat after a lost answer: the key is kept before it is sent, and the same token with
/// the same key gives the same identity.
///
/// # Errors
/// When the coordinator cannot be reached or refuses, or the identity cannot be kept.
pub async fn join(
    url: &JoinUrl,
    display_name: &str,
    path: &std::path::Path,
    options: &Options,
) -> Result<Identity, ClientError> {
    let wire = Wire::open(&url.server, options)?;
    let key = joining_key(path, url)?;
    let mut request = v1::EnrollRequest {
        join_token: url.token.secret().to_owned(),
        display_name: display_name.to_owned(),
        ..Default::default()
    };
    signing::sign_enrolment(&key, &mut request);
    let services = Services::new(&wire.channel, None, options.deadline);
    let mut backoff = Backoff::default();
    let answer = loop {
        let sent = services.enrollment.clone().enroll(request.clone()).await;
        match sent.map_err(|status| wire.error(&status)) {
            Ok(answer) => break answer.into_inner(),
            Err(error) => wait_or_fail(&mut backoff, error, options.patience).await?,
        }
    };
    let identity = Identity {
        server: url.server.clone(),
        worker_id: answer.worker_id,
        role: crate::convert::role(answer.role)?,
        display_name: display_name.to_owned(),
        server_key: parse_public_key(&answer.server_public_key)?,
        key,
    };
    identity.save(path)?;
    joining_done(path)?;
    Ok(identity)
}

async fn wait_or_fail(
    backoff: &mut Backoff,
    error: ClientError,
    patience: Duration,
) -> Result<(), ClientError> {
    if !error.retry() || backoff.waited() >= patience {
        return Err(error);
    }
    tokio::time::sleep(backoff.next_wait(error.retry_after())).await;
    Ok(())
}

/// A client signed on as one identity. Clones share connection and session.
#[derive(Clone)]
pub struct Client {
    wire: Wire,
    identity: Arc<Identity>,
    session: Arc<Mutex<Option<MetadataValue<Ascii>>>>,
    options: Options,
    direct: direct::Direct,
}

impl Client {
    /// Nothing comes any more from the coordinator.
    fn cut_off(&self, detail: &dyn std::fmt::Display) -> ClientError {
        unreachable_error(&self.wire.server, detail)
    }

    /// Opens a connection when first used.
    ///
    /// # Errors
    /// When the server's address cannot be used, or plain text would leave this machine.
    pub fn new(identity: Identity, options: Options) -> Result<Self, ClientError> {
        let wire = Wire::open(&identity.server, &options)?;
        Ok(Self::over(wire, identity, options))
    }

    /// Uses a channel that exists already, such as an in-process one.
    #[must_use]
    pub fn with_channel(channel: Channel, identity: Identity, options: Options) -> Self {
        let server = identity.server.authority();
        Self::over(
            Wire {
                channel,
                server,
                verifier: None,
            },
            identity,
            options,
        )
    }

    fn over(wire: Wire, identity: Identity, options: Options) -> Self {
        Self {
            wire,
            identity: Arc::new(identity),
            session: Arc::default(),
            options,
            direct: direct::Direct::default(),
        }
    }

    /// Who we are.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The same connection and session, trying for longer or shorter.
    #[must_use]
    pub fn with_patience(&self, patience: Duration) -> Self {
        let mut other = self.clone();
        other.options.patience = patience;
        other
    }

    /// Makes one call, signing on first where needed, and again when the session has run out;
    /// repeats it while the coordinator cannot be reached, up to the patience of [`Options`].
    /// The call must be safe to repeat: read-only, or with a request id.
    ///
    /// # Errors
    /// When the coordinator refuses, or cannot be reached for longer than the patience.
    pub async fn call<T, F, Fut>(&self, call: F) -> Result<T, ClientError>
    where
        F: Fn(Services) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut backoff = Backoff::default();
        loop {
            match self.call_once(&call).await {
                Ok(answer) => return Ok(answer),
                Err(error) => wait_or_fail(&mut backoff, error, self.options.patience).await?,
            }
        }
    }

    /// Like [`Client::call`], without waiting and trying again.
    ///
    /// # Errors
    /// When the coordinator refuses or cannot be reached.
    pub async fn call_once<T, F, Fut>(&self, call: F) -> Result<T, ClientError>
    where
        F: Fn(Services) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let token = self.token(None).await?;
        let error = match call(self.services(token.clone())).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => self.wire.error(&status),
        };
        if !error.needs_login() {
            return Err(error);
        }
        let token = self.token(Some(&token)).await?;
        let answer = call(self.services(token))
            .await
            .map_err(|status| self.wire.error(&status))?;
        Ok(answer.into_inner())
    }

    /// Reads a status of a stream that was opened with [`Client::call`].
    #[must_use]
    pub fn error(&self, status: &Status) -> ClientError {
        self.wire.error(status)
    }

    fn services(&self, token: MetadataValue<Ascii>) -> Services {
        Services::new(&self.wire.channel, Some(token), self.options.deadline)
    }

    /// The session's token; a new one when there is none, or when it is the `stale` one.
    async fn token(
        &self,
        stale: Option<&MetadataValue<Ascii>>,
    ) -> Result<MetadataValue<Ascii>, ClientError> {
        let mut session = self.session.lock().await;
        if let Some(token) = session.as_ref()
            && Some(token) != stale
        {
            return Ok(token.clone());
        }
        *session = None;
        let token = self.sign_on().await?;
        *session = Some(token.clone());
        Ok(token)
    }

    async fn sign_on(&self) -> Result<MetadataValue<Ascii>, ClientError> {
        let mut to = Services::new(&self.wire.channel, None, self.options.deadline).enrollment;
        let key = &self.identity.key;
        let public_key = key.verifying_key().to_bytes().to_vec();
        let challenge = to
            .create_challenge(v1::CreateChallengeRequest { public_key })
            .await
            .map_err(|status| self.wire.error(&status))?
            .into_inner()
            .challenge;
        if challenge.len() != NONCE_BYTES {
            return Err(ClientError::Malformed(
                "a challenge of the wrong length".to_owned(),
            ));
        }
        let session = to
            .create_session(signing::sign_session(key, &challenge))
            .await
            .map_err(|status| self.wire.error(&status))?
            .into_inner();
        let mut token: MetadataValue<Ascii> = format!("Bearer {}", session.session_token)
            .parse()
            .map_err(|_| {
            ClientError::Malformed("a session token that is no token".to_owned())
        })?;
        token.set_sensitive(true);
        Ok(token)
    }
}
