//! Opening a coordinator on its data folder, and serving it.
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use cairn_proto::limits::MESSAGE_BYTES_MAX;
use cairn_proto::url::Server;
use cairn_proto::v1::blob_service_server::BlobServiceServer;
use cairn_proto::v1::contribution_service_server::ContributionServiceServer;
use cairn_proto::v1::dataset_service_server::DatasetServiceServer;
use cairn_proto::v1::enrollment_service_server::EnrollmentServiceServer;
use cairn_proto::v1::log_service_server::LogServiceServer;
use cairn_proto::v1::model_service_server::ModelServiceServer;
use cairn_proto::v1::round_service_server::RoundServiceServer;
use cairn_proto::v1::volunteer_service_server::VolunteerServiceServer;
use cairn_proto::v1::work_service_server::WorkServiceServer;
use ed25519_dalek::SigningKey;
use futures::Stream;
use tonic::transport::server::Router;
use tracing::warn;

use crate::app::{App, AppInner, Wake};
use crate::blobs::{Blobs, Location, UploadSlots};
use crate::clock::Clock;
use crate::comparisons::Comparisons;
use crate::db::audits::audit_prolong;
use crate::db::settings::{
    AUDIT_SECRET, ENDPOINT, SERVER_KEY, TLS_IDENTITY, setting_first, setting_get, setting_put,
};
use crate::db::{Db, sqlite_url};
use crate::lifecycle::Lifecycle;
use crate::limits::{self, Limits};
use crate::manifests::note_contributions;
use crate::net::Connection;
use crate::rpc::auth::{AuthLayer, Gate};
use crate::tls::{self, TlsIdentity};
use crate::{entropy, rpc, tasks};

/// What a coordinator is opened with.
pub struct Options {
    /// Its folder: database, blobs, uploads, TLS files.
    pub data: DataFolder,
    /// Another database than the one in the folder.
    pub database_url: Option<String>,
    /// Another blob store than the one in the folder.
    pub blobs: Option<Location>,
    /// What join URLs say.
    pub endpoint: Server,
    /// The time.
    pub clock: Clock,
    /// What is allowed.
    pub limits: Limits,
}

/// A data folder that this process alone serves from, as long as the value lives.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    lock: File,
}

impl DataFolder {
    /// Makes the folder when absent and takes its lock.
    ///
    /// # Errors
    /// When it cannot be made or written, or another coordinator serves from it.
    pub fn lock(path: &Path) -> Result<Self> {
        let path = make_folder(path)?;
        let lock_path = path.join("lock");
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .with_context(|| format!("the data folder {} cannot be written", path.display()))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, lock }),
            Err(TryLockError::WouldBlock) => {
                bail!("another coordinator serves from {} already", path.display())
            }
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("lock {}", lock_path.display()))
            }
        }
    }

    /// Where it is, absolute.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes a folder when absent; returns its absolute path.
///
/// # Errors
/// When it cannot be made.
pub fn make_folder(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)?;
    // For its owner alone: the server's keys lie in it.
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .with_context(|| format!("the data folder {} cannot be made", path.display()))?;
    Ok(path)
}

/// The database's URL: the given one, or the file in the data folder.
#[must_use]
pub fn database_url(given: Option<&str>, data: &Path) -> String {
    given.map_or_else(|| sqlite_url(&data.join("cairn.db")), str::to_owned)
}

/// What a coordinator that was given no certificate shows: the one in its data folder; over a
/// database that others may serve from, the one in the database, which the first of them puts there
/// from its folder. Join URLs pin it, so all have to have the same.
///
/// # Errors
/// When database or folder cannot be used.
pub async fn tls_identity(data: &Path, given_database: Option<&str>) -> Result<TlsIdentity> {
    let folder = data.join("tls");
    let url = database_url(given_database, data);
    if !Db::is_shared_url(&url) {
        return TlsIdentity::load_or_make(&folder);
    }
    let db = Db::open(&url).await;
    let db = db.map_err(plain).context("open the database")?;
    let mut tx = db.begin().await.map_err(plain)?;
    let pem = match setting_get(&mut tx, TLS_IDENTITY).await.map_err(plain)? {
        Some(pem) => pem,
        None => {
            let own = tls::kept_pem(&folder)?;
            let first = setting_first(&mut tx, TLS_IDENTITY, &own).await;
            first.map_err(plain)?
        }
    };
    tx.commit().await.map_err(plain)?;
    db.close().await;
    TlsIdentity::parse(&pem).context("read the TLS certificate in the database")
}

/// Opens everything and starts the background tasks.
///
/// # Errors
/// When a folder, the database or the blob store cannot be used.
pub async fn open(options: Options) -> Result<App> {
    let app = open_idle(options).await?;
    tasks::share::beat(&app).await.map_err(plain)?;
    tasks::start(&app, &app.lifecycle);
    Ok(app)
}

/// Opens everything but starts no background task, for tests that drive them by hand.
///
/// # Errors
/// As [`open`].
pub async fn open_idle(options: Options) -> Result<App> {
    let data = options.data.path().to_owned();
    let scratch = data.join("scratch");
    match fs::remove_dir_all(&scratch) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("clear {}", scratch.display()));
        }
        _ => {}
    }
    let uploads_folder = data.join("uploads");
    for folder in [&scratch, &uploads_folder] {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let url = database_url(options.database_url.as_deref(), &data);
    let db = Db::open(&url)
        .await
        .map_err(plain)
        .context("open the database")?;
    let store = data.join("store");
    let blobs = match &options.blobs {
        Some(location) => Blobs::open_at_location(location),
        None => Blobs::open(&store.to_string_lossy()),
    };
    let blobs = blobs.map_err(plain).context("open the blob store")?;
    blobs
        .probe()
        .await
        .map_err(plain)
        .context("try the blob store out")?;
    let key = server_key(&db).await.context("read the server's key")?;
    let audit_secret = audit_secret(&db).await.context("read the audit secret")?;
    let id = coordinator_id(&data).context("read the coordinator's id")?;
    let mut tx = db.begin().await.map_err(plain)?;
    let endpoint = options.endpoint.to_string();
    let before = setting_get(&mut tx, ENDPOINT).await.map_err(plain)?;
    if db.is_shared() && before.as_ref().is_some_and(|before| *before != endpoint) {
        warn!(
            "join URLs name {} from now on, not {}; several coordinators are started with the same \
             --public-address, TLS certificate and key",
            endpoint,
            before.unwrap_or_default()
        );
    }
    setting_put(&mut tx, ENDPOINT, &endpoint)
        .await
        .map_err(plain)?;
    // While we were away, nobody could answer.
    let until = options.clock.now_ms().plus(limits::AUDIT_AFTER_START);
    audit_prolong(&mut tx, until).await.map_err(plain)?;
    tx.commit().await.map_err(plain)?;
    let app = App::new(AppInner {
        id,
        db,
        blobs,
        clock: options.clock,
        key,
        audit_secret,
        limits: options.limits,
        wake: Wake::default(),
        scratch,
        uploads_folder,
        endpoint: options.endpoint,
        lifecycle: Lifecycle::new(),
        creating: tokio::sync::Mutex::new(()),
        compared: Comparisons::default(),
        uploads: UploadSlots::new(
            limits::UPLOADS_RUNNING_MAX,
            limits::UPLOADS_RUNNING_PER_WORKER_MAX,
        ),
        gate: Gate::default(),
        _lock: options.data.lock,
    });
    note_contributions(&app).await.map_err(plain)?;
    Ok(app)
}

/// Our error with its causes as one text: `anyhow` shows causes that outsiders must not see.
pub fn plain(error: crate::error::Error) -> anyhow::Error {
    anyhow::anyhow!(error.full())
}

/// The id in a data folder, made once: a coordinator that is started again has its tasks at once.
fn coordinator_id(data: &Path) -> Result<String> {
    let path = data.join("id");
    let known = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        known => known?,
    };
    if let Ok(id) = known.trim().parse::<uuid::Uuid>() {
        return Ok(id.to_string());
    }
    let id = uuid::Uuid::new_v4().to_string();
    fs::write(&path, format!("{id}\n"))?;
    Ok(id)
}

async fn server_key(db: &Db) -> Result<SigningKey> {
    Ok(SigningKey::from_bytes(&secret(db, SERVER_KEY).await?))
}

async fn audit_secret(db: &Db) -> Result<[u8; 32]> {
    secret(db, AUDIT_SECRET).await
}

/// A secret of the server, made once: of several that start at once all have the same.
async fn secret(db: &Db, name: &str) -> Result<[u8; 32]> {
    let fresh = hex::encode(entropy::bytes::<32>().map_err(plain)?);
    let mut tx = db.begin().await.map_err(plain)?;
    let text = setting_first(&mut tx, name, &fresh).await.map_err(plain)?;
    tx.commit().await.map_err(plain)?;
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes)
        .with_context(|| format!("the stored {name} is malformed"))?;
    Ok(bytes)
}

macro_rules! limited {
    ($server:ident, $service:expr) => {
        $server::new($service)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    };
}

async fn router(
    app: &App,
) -> Result<(
    Router<tower::layer::util::Stack<AuthLayer, tower::layer::util::Identity>>,
    tonic_health::server::HealthReporter,
)> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<EnrollmentServiceServer<rpc::enrollment::Enrollment>>()
        .await;
    health
        .set_serving::<WorkServiceServer<rpc::work::Work>>()
        .await;
    health
        .set_serving::<BlobServiceServer<rpc::blob::Blob>>()
        .await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(cairn_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let router = tonic::transport::Server::builder()
        .layer(AuthLayer::new(app.clone()))
        .max_concurrent_streams(limits::STREAMS_PER_CONNECTION_MAX)
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(limits::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(limits::KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(limits::HEADER_LIST_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(limits::PENDING_RESETS_MAX))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(limited!(
            EnrollmentServiceServer,
            rpc::enrollment::Enrollment(app.clone())
        ))
        .add_service(limited!(BlobServiceServer, rpc::blob::Blob(app.clone())))
        .add_service(limited!(
            ModelServiceServer,
            rpc::model::Models(app.clone())
        ))
        .add_service(limited!(
            DatasetServiceServer,
            rpc::dataset::Datasets(app.clone())
        ))
        .add_service(limited!(WorkServiceServer, rpc::work::Work(app.clone())))
        .add_service(limited!(
            RoundServiceServer,
            rpc::round::Rounds(app.clone())
        ))
        .add_service(limited!(
            ContributionServiceServer,
            rpc::contribution::Contributions(app.clone())
        ))
        .add_service(limited!(LogServiceServer, rpc::log::Log(app.clone())))
        .add_service(limited!(
            VolunteerServiceServer,
            rpc::volunteer::Volunteers(app.clone())
        ));
    Ok((router, health))
}

/// Serves gRPC on whatever connections come, until the app drains and running calls have ended.
///
/// # Errors
/// When the server cannot be built, or its connections fail as a whole.
pub async fn serve_grpc(
    app: &App,
    incoming: impl Stream<Item = io::Result<Connection>> + Send + 'static,
) -> Result<()> {
    let (router, health) = router(app).await?;
    let soft = app.lifecycle.soft().clone();
    let drained = async move {
        soft.cancelled().await;
        health
            .set_service_status("", tonic_health::ServingStatus::NotServing)
            .await;
    };
    router
        .serve_with_incoming_shutdown(incoming, drained)
        .await?;
    Ok(())
}
