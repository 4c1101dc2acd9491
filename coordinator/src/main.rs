//! The coordinator's program.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow, bail};
use cairn_coordinator::backup::back_up;
use cairn_coordinator::blobs::{Blobs, Location};
use cairn_coordinator::clock::Clock;
use cairn_coordinator::config::{
    self, BackupArgs, Cli, Command, FsckArgs, ServeArgs, StoreArgs, TokenArgs, TokenCommand,
};
use cairn_coordinator::db::Db;
use cairn_coordinator::db::coordinators::coordinator_living;
use cairn_coordinator::db::settings::{ENDPOINT, setting_get};
use cairn_coordinator::fsck::repair::repair;
use cairn_coordinator::fsck::{Depth, check};
use cairn_coordinator::limits::{self, Limits};
use cairn_coordinator::ops::create_join_token::{NewJoinToken, create_join_token};
use cairn_coordinator::server::{self, DataFolder, Options, plain};
use cairn_coordinator::tls::TlsIdentity;
use cairn_coordinator::{http, lifecycle, net};
use cairn_proto::url::{Server, Transport};
use clap::Parser as _;
use tokio::net::TcpListener;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

/// Exit status of an `fsck` that has found nothing out; 1 is that it has found problems.
const FSCK_DID_NOT_RUN: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // One TLS provider for the whole process, before anything can ask for another.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let json = matches!(&cli.command, Command::Serve(serve) if serve.log_json);
    start_log(json);
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let status = runtime.block_on(async {
        let ended = match cli.command {
            Command::Serve(arguments) => serve(&arguments).await,
            Command::Token {
                command: TokenCommand::Create(arguments),
            } => token(&arguments).await,
            Command::Backup(arguments) => backup(&arguments).await,
            Command::Fsck(arguments) => {
                return fsck(&arguments).await.unwrap_or_else(|error| {
                    eprintln!("error: {error:#}");
                    ExitCode::from(FSCK_DID_NOT_RUN)
                });
            }
        };
        match ended {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        }
    });
    // Blocking work that is still running is abandoned: it is idempotent.
    runtime.shutdown_background();
    status
}

fn start_log(json: bool) {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn,h2=warn,hyper=warn"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if json {
        log.json().init();
    } else {
        log.with_target(false).init();
    }
}

async fn serve(arguments: &ServeArgs) -> Result<bool> {
    let plain = arguments.is_plain()?;
    let data = DataFolder::lock(&arguments.store.data)?;
    let identity = match (&arguments.tls_cert, &arguments.tls_key) {
        _ if plain => None,
        (Some(certificate), Some(key)) => Some(TlsIdentity::load(certificate, key)?),
        _ => {
            let database = arguments.store.database_url.as_deref();
            Some(server::tls_identity(data.path(), database).await?)
        }
    };
    let grpc = bind("--grpc", arguments.grpc).await?;
    let http = bind("--http", arguments.http).await?;
    let (grpc_address, http_address) = (grpc.local_addr()?, http.local_addr()?);
    let endpoint = arguments.endpoint(grpc_address, transport(identity.as_ref()))?;
    if grpc_address.ip().is_unspecified() && arguments.public_address.is_none() {
        warn!(
            "join URLs will say {}: others cannot use that, set --public-address",
            grpc_address
        );
    }
    if !http_address.ip().is_loopback() {
        warn!("HTTP on {http_address} is plain text; put a proxy before it");
    }
    let app = server::open(Options {
        data,
        database_url: arguments.store.database_url.clone(),
        blobs: arguments.blobs.clone().map(Location::from_env),
        endpoint,
        clock: Clock::System,
        limits: Limits {
            direct_url: arguments.direct_transfers.then_some(limits::DIRECT_URL),
            ..Limits::default()
        },
    })
    .await?;
    lifecycle::watch_signals(&app.lifecycle).context("listen for signals")?;
    let tls = identity.map(|identity| identity.acceptor()).transpose()?;
    let limits = &app.limits;
    let connections_max = limits.connections_max.min(net::connections_that_fit());
    if connections_max < limits.connections_max {
        warn!(
            "room for {connections_max} connections: the system allows no more open files; raise \
             its limit (ulimit -n, LimitNOFILE=) to have {}",
            limits.connections_max
        );
    }
    let incoming = net::accept(&app, grpc, tls, connections_max, limits.connection_idle);
    let grpc_app = app.clone();
    app.lifecycle.spawn_critical("grpc", async move {
        if let Err(problem) = server::serve_grpc(&grpc_app, incoming).await {
            error!("serve gRPC: {problem:#}");
        }
    });
    let http_app = app.clone();
    app.lifecycle.spawn_critical("http", async move {
        if let Err(problem) = http::serve(http_app, http).await {
            error!("serve HTTP: {problem}");
        }
    });
    let how = if plain { "plain text" } else { "TLS" };
    info!("serving gRPC on {grpc_address} ({how}) and HTTP on {http_address}");
    let well = app.lifecycle.run_until_drained(limits::DRAIN_GRACE).await;
    app.db.close().await;
    info!("stopped");
    Ok(well)
}

fn transport(identity: Option<&TlsIdentity>) -> Transport {
    identity.map_or(Transport::Insecure, |identity| Transport::Tls(identity.pin))
}

async fn bind(option: &str, address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => anyhow!(
                "{address} is in use by another program; choose another address with {option}"
            ),
            _ => anyhow!("listen on {address} ({option}): {error}"),
        })
}

async fn token(arguments: &TokenArgs) -> Result<bool> {
    let data = server::make_folder(&arguments.store.data)?;
    let url = server::database_url(arguments.store.database_url.as_deref(), &data);
    let db = Db::open(&url)
        .await
        .map_err(plain)
        .context("open the database")?;
    let endpoint = match stored_endpoint(&db).await? {
        Some(endpoint) => endpoint,
        None => default_endpoint(&data, arguments.store.database_url.as_deref()).await?,
    };
    let new = NewJoinToken {
        role: arguments.role,
        uses: arguments.uses,
        ttl: arguments.ttl,
    };
    let (url, _) = create_join_token(&db, &Clock::System, &endpoint, new)
        .await
        .map_err(plain)?;
    db.close().await;
    println!("{}", url.secret_text());
    Ok(true)
}

/// What join URLs say since the coordinator last served.
async fn stored_endpoint(db: &Db) -> Result<Option<Server>> {
    let mut tx = db.read().await.map_err(plain)?;
    let known = setting_get(&mut tx, ENDPOINT).await.map_err(plain)?;
    known
        .map(|text| text.parse().context("read the stored address"))
        .transpose()
}

/// Opens what was served from a data folder, and makes nothing.
async fn open_stores(store: &StoreArgs, blobs: Option<&str>) -> Result<(PathBuf, Db, Blobs)> {
    let data = std::path::absolute(&store.data)?;
    if store.database_url.is_none() && !data.join("cairn.db").is_file() {
        bail!(
            "there is no database in {}; name the coordinator's folder with --data, or its \
             database with --database-url",
            data.display()
        );
    }
    let url = server::database_url(store.database_url.as_deref(), &data);
    let db = Db::open(&url)
        .await
        .map_err(plain)
        .context("open the database")?;
    let local = data.join("store");
    let blobs = Blobs::open(blobs.unwrap_or(&local.to_string_lossy()))
        .map_err(plain)
        .context("open the blob store")?;
    Ok((data, db, blobs))
}

async fn fsck(arguments: &FsckArgs) -> Result<ExitCode> {
    let depth = if arguments.quick {
        Depth::Lengths
    } else {
        Depth::Bytes
    };
    let lock = arguments
        .repair
        .then(|| DataFolder::lock(&arguments.store.data))
        .transpose()
        .context("--repair wants the data folder alone: stop the coordinator first")?;
    let (data, db, blobs) = open_stores(&arguments.store, arguments.blobs.as_deref()).await?;
    let now = || Clock::System.now_ms();
    // On SQLite the folder's lock has said it.
    if arguments.repair && db.is_shared() {
        let mut tx = db.read().await.map_err(plain)?;
        let living = coordinator_living(&mut tx, now()).await.map_err(plain)?;
        if !living.is_empty() {
            bail!(
                "--repair wants database and store alone: stop the coordinators that serve from \
                 them first ({}); one that was killed counts for ten seconds more",
                living.join(", ")
            );
        }
    }
    let mut report = check(&db, &blobs, depth, now()).await.map_err(plain)?;
    let mut repaired = Vec::new();
    if let Some(lock) = lock {
        let endpoint = match stored_endpoint(&db).await? {
            Some(endpoint) => endpoint,
            None => default_endpoint(&data, arguments.store.database_url.as_deref()).await?,
        };
        let app = server::open_idle(Options {
            data: lock,
            database_url: arguments.store.database_url.clone(),
            blobs: arguments.blobs.clone().map(Location::from_env),
            endpoint,
            clock: Clock::System,
            limits: Limits::default(),
        })
        .await?;
        repaired = repair(&app, &data, &report).await.map_err(plain)?;
        app.db.close().await;
        report = check(&db, &blobs, depth, now()).await.map_err(plain)?;
    }
    db.close().await;
    if arguments.json {
        for done in &repaired {
            println!("{}", serde_json::json!({ "repaired": done }));
        }
        for problem in &report.problems {
            println!("{}", problem.json());
        }
        println!("{}", report.json());
    } else {
        for done in &repaired {
            println!("repaired: {done}");
        }
        for problem in &report.problems {
            println!("{problem}");
        }
        println!("{report}");
    }
    Ok(if report.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn backup(arguments: &BackupArgs) -> Result<bool> {
    let (data, db, blobs) = open_stores(&arguments.store, arguments.blobs.as_deref()).await?;
    let copied = back_up(&db, &blobs, &data, &arguments.to).await?;
    db.close().await;
    println!("{copied}");
    Ok(copied.unreadable.is_empty())
}

/// What `serve` would use without options, said aloud: nothing has been served from here yet.
async fn default_endpoint(data: &Path, database_url: Option<&str>) -> Result<Server> {
    let identity = server::tls_identity(data, database_url).await?;
    eprintln!(
        "note: nothing has been served from {} yet; the URL names the default address {} with TLS",
        data.display(),
        config::DEFAULT_GRPC
    );
    config::server(config::DEFAULT_GRPC, transport(Some(&identity)))
}
