//! The coordinator's program.
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow};
use cairn_coordinator::blobs::Location;
use cairn_coordinator::clock::Clock;
use cairn_coordinator::config::{self, Cli, Command, ServeArgs, TokenArgs, TokenCommand};
use cairn_coordinator::db::Db;
use cairn_coordinator::db::settings::{ENDPOINT, setting_get};
use cairn_coordinator::limits::{self, Limits};
use cairn_coordinator::ops::create_join_token::{NewJoinToken, create_join_token};
use cairn_coordinator::server::{self, DataFolder, Options};
use cairn_coordinator::tls::TlsIdentity;
use cairn_coordinator::{http, lifecycle, net};
use cairn_proto::url::{Server, Transport};
use clap::Parser as _;
use tokio::net::TcpListener;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

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
    let ended = runtime.block_on(async {
        match cli.command {
            Command::Serve(arguments) => serve(&arguments).await,
            Command::Token {
                command: TokenCommand::Create(arguments),
            } => token(&arguments).await,
        }
    });
    // Blocking work that is still running is abandoned: it is idempotent.
    runtime.shutdown_background();
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
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
        _ => Some(TlsIdentity::load_or_make(&data.path().join("tls"))?),
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
    let incoming = net::accept(
        &app,
        grpc,
        tls,
        limits.connections_max,
        limits.connection_idle,
    );
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
    let plain = |error: cairn_coordinator::error::Error| anyhow!(error.full());
    let db = Db::open(&url)
        .await
        .map_err(plain)
        .context("open the database")?;
    let mut tx = db.read().await.map_err(plain)?;
    let known = setting_get(&mut tx, ENDPOINT).await.map_err(plain)?;
    drop(tx);
    let endpoint = match known {
        Some(text) => text.parse().context("read the stored address")?,
        None => default_endpoint(&data)?,
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

/// What `serve` would use without options, said aloud: nothing has been served from here yet.
fn default_endpoint(data: &Path) -> Result<Server> {
    let identity = TlsIdentity::load_or_make(&data.join("tls"))?;
    eprintln!(
        "note: nothing has been served from {} yet; the URL names the default address {} with TLS",
        data.display(),
        config::DEFAULT_GRPC
    );
    config::server(config::DEFAULT_GRPC, transport(Some(&identity)))
}
