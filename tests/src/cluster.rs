//! A coordinator in this process: real operations, real wire over pipes in memory, a clock that
//! stands still until the test moves it, and background tasks that run when the test says so.
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use cairn_coordinator::app::App;
use cairn_coordinator::caller::Role;
use cairn_coordinator::clock::{Clock, Timestamp};
use cairn_coordinator::limits::Limits;
use cairn_coordinator::net::Connection;
use cairn_coordinator::ops::create_join_token::{NewJoinToken, create_join_token};
use cairn_coordinator::server::{self, DataFolder, Options};
use cairn_coordinator::tasks;
use cairn_proto::client::{self, Client};
use cairn_proto::identity::{Identity, new_key};
use cairn_proto::signing::{parse_public_key, sign_enrolment};
use cairn_proto::url::{JoinUrl, Server};
use cairn_proto::v1;
use cairn_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use ed25519_dalek::SigningKey;
use futures::StreamExt as _;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::task::AbortHandle;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::evaluator::Evaluator;
use crate::member::Member;

/// When every test begins, milliseconds since 1970.
const START: Timestamp = Timestamp(1_700_000_000_000);
/// Bytes in flight on a pipe.
const PIPE_BYTES: usize = 64 * 1024;
/// How long a stopped coordinator may take to let go of its folder.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A coordinator and its data folder.
pub struct Cluster {
    folder: TempDir,
    app: App,
    clock: Clock,
    serving: std::sync::Mutex<Vec<AbortHandle>>,
}

/// A coordinator with the tiny model, its sets, a maintainer and an evaluator.
pub struct Ready {
    /// The coordinator.
    pub cluster: Cluster,
    /// Its maintainer.
    pub maintainer: Member,
    /// Its evaluator.
    pub evaluator: Evaluator,
    /// The base model's folder.
    pub base: TempDir,
}

/// Limits for tests: any disk is large enough.
#[must_use]
pub fn limits() -> Limits {
    Limits {
        disk_free_bytes_min: 0,
        ..Limits::default()
    }
}

fn endpoint() -> Server {
    "cairn+insecure://127.0.0.1:7600/#"
        .parse()
        .expect("an address")
}

async fn open(folder: &Path, clock: &Clock, limits: Limits) -> Result<App> {
    server::open_idle(Options {
        data: DataFolder::lock(folder)?,
        database_url: None,
        blobs: None,
        endpoint: endpoint(),
        clock: clock.clone(),
        limits,
    })
    .await
}

impl Cluster {
    /// An empty coordinator.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let clock = Clock::settable(START);
        let app = open(folder.path(), &clock, limits()).await?;
        Ok(Self {
            folder,
            app,
            clock,
            serving: std::sync::Mutex::default(),
        })
    }

    /// Stops the coordinator and opens it again on the same folder. Members must be connected anew.
    ///
    /// # Errors
    /// When it does not stop or does not open.
    pub async fn reopen(self, limits: Limits) -> Result<Self> {
        let Self {
            folder,
            app,
            clock,
            serving,
        } = self;
        app.lifecycle.soft().cancel();
        app.lifecycle.hard().cancel();
        for task in serving.into_inner().unwrap_or_default() {
            task.abort();
        }
        app.db.close().await;
        drop(app);
        let opened = tokio::time::timeout(STOP_TIMEOUT, async {
            // Tasks of closed connections still hold the folder for a moment.
            loop {
                match open(folder.path(), &clock, limits.clone()).await {
                    Ok(app) => return app,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        let app = opened
            .await
            .context("the old coordinator does not let go of its folder")?;
        Ok(Self {
            folder,
            app,
            clock,
            serving: std::sync::Mutex::default(),
        })
    }

    /// The data folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Moves the clock.
    pub fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }

    /// The time now, milliseconds since 1970.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        self.clock.now_ms().0
    }

    /// Runs the background tasks until they have nothing left to do.
    ///
    /// # Errors
    /// The first failure of a task.
    pub async fn settle(&self) -> Result<()> {
        tasks::settle(&self.app)
            .await
            .map_err(|error| anyhow!(error.full()))
    }

    /// A new connection, not signed on.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn channel(&self) -> Result<Channel> {
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        let app = self.app.clone();
        let connection = Connection::new(theirs, Duration::from_mins(1));
        // The server ends when no more connections can come.
        let incoming = futures::stream::iter([Ok(connection)]).chain(futures::stream::pending());
        let task = tokio::spawn(async move { server::serve_grpc(&app, incoming).await });
        self.serving
            .lock()
            .expect("no test panics holding it")
            .push(task.abort_handle());
        let mut ours = Some(ours);
        let channel = Endpoint::from_static("http://memory")
            .connect_with_connector(tower::service_fn(move |_| {
                let io = ours
                    .take()
                    .ok_or_else(|| std::io::Error::other("one connection only"));
                std::future::ready(io.map(TokioIo::new))
            }))
            .await?;
        Ok(channel)
    }

    /// A join URL's token, made as the command line makes it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn token(&self, role: Role) -> Result<String> {
        let new = NewJoinToken {
            role,
            uses: 1,
            ttl: Duration::from_hours(1),
        };
        let app = &self.app;
        let made = create_join_token(&app.db, &app.clock, &app.endpoint, new).await;
        let (url, _) = made.map_err(|error| anyhow!(error.full()))?;
        Ok(url.token.secret().to_owned())
    }

    /// Enrols a key with a token.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn enroll(
        &self,
        token: &str,
        key: &SigningKey,
        name: &str,
    ) -> Result<v1::EnrollResponse, Status> {
        let channel = self
            .channel()
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        let mut request = v1::EnrollRequest {
            join_token: token.to_owned(),
            display_name: name.to_owned(),
            ..Default::default()
        };
        sign_enrolment(key, &mut request);
        let answer = EnrollmentServiceClient::new(channel)
            .enroll(request)
            .await?;
        Ok(answer.into_inner())
    }

    /// A fresh member of this role.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn member(&self, role: Role, name: &str) -> Result<Member> {
        let key = new_key()?;
        let answer = self.enroll(&self.token(role).await?, &key, name).await?;
        let identity = Identity {
            server: endpoint(),
            worker_id: answer.worker_id,
            role: cairn_proto::convert::role(answer.role)?,
            display_name: name.to_owned(),
            server_key: parse_public_key(&answer.server_public_key)?,
            key,
        };
        self.connect(identity).await
    }

    /// A volunteer.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn volunteer(&self, name: &str) -> Result<Member> {
        self.member(Role::Volunteer, name).await
    }

    /// Connects an identity that is enrolled already. It does not repeat refused calls.
    ///
    /// # Errors
    /// When there is no connection.
    pub async fn connect(&self, identity: Identity) -> Result<Member> {
        let options = client::Options {
            patience: Duration::ZERO,
            ..client::Options::default()
        };
        Member::new(Client::with_channel(
            self.channel().await?,
            identity,
            options,
        ))
    }

    /// Lets the evaluator answer and the coordinator decide, until neither has anything to do.
    ///
    /// # Errors
    /// When a task or a call fails, or there is no end to it.
    pub async fn judge(&self, evaluator: &Evaluator) -> Result<()> {
        const STEPS_MAX: usize = 2_000;
        for _ in 0..STEPS_MAX {
            self.settle().await?;
            if !evaluator.step().await? {
                return Ok(());
            }
        }
        bail!("evaluations without end")
    }
}

impl Ready {
    /// Makes all of it.
    ///
    /// # Errors
    /// When a call is refused.
    pub async fn start() -> Result<Self> {
        let cluster = Cluster::start().await?;
        let maintainer = cluster.member(Role::Maintainer, "ada").await?;
        let base = tempfile::tempdir()?;
        maintainer.add_tiny(base.path()).await?;
        let member = cluster.member(Role::Evaluator, "eve").await?;
        let evaluator = Evaluator::new(member, base.path())?;
        Ok(Self {
            cluster,
            maintainer,
            evaluator,
            base,
        })
    }

    /// Fresh volunteers.
    ///
    /// # Errors
    /// When one is refused.
    pub async fn volunteers(&self, count: usize) -> Result<Vec<Member>> {
        let mut volunteers = Vec::new();
        for index in 0..count {
            volunteers.push(
                self.cluster
                    .volunteer(&format!("volunteer {index}"))
                    .await?,
            );
        }
        Ok(volunteers)
    }

    /// Lets the evaluator answer and the coordinator decide.
    ///
    /// # Errors
    /// As [`Cluster::judge`].
    pub async fn judge(&self) -> Result<()> {
        self.cluster.judge(&self.evaluator).await
    }

    /// State and reason of a round.
    ///
    /// # Errors
    /// As the call.
    pub async fn outcome(&self, round: &str) -> Result<(v1::RoundState, String)> {
        let view = self.maintainer.round(round).await?;
        let round = view.round.context("a view without a round")?;
        Ok((round.state(), round.reason))
    }

    /// Reads a join URL a maintainer made.
    ///
    /// # Errors
    /// When it is refused or no URL.
    pub async fn url(&self, role: v1::Role, uses: u32, ttl: Duration) -> Result<JoinUrl> {
        let ttl_ms = i64::try_from(ttl.as_millis())?;
        let text = self.maintainer.create_token(role, uses, ttl_ms).await?;
        text.parse::<JoinUrl>().map_err(|error| anyhow!("{error}"))
    }
}

/// The reason of a refused enrolment.
///
/// # Panics
/// When it was not refused, or without a reason.
#[track_caller]
pub fn status_reason<T: std::fmt::Debug>(
    answer: Result<T, Status>,
) -> cairn_proto::reason::ErrorReason {
    let status = answer.expect_err("the call was not refused");
    cairn_proto::reason::of_status(&status).unwrap_or_else(|| panic!("without a reason: {status}"))
}
