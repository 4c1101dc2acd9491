//! A coordinator on fresh stores, with a clock that the test moves.
pub mod s3;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use cairn_coordinator::app::App;
use cairn_coordinator::caller::{Caller, Role};
use cairn_coordinator::clock::{Clock, Timestamp};
use cairn_coordinator::error::Error;
use cairn_coordinator::limits::Limits;
use cairn_coordinator::net::Connection;
use cairn_coordinator::ops::create_join_token::{NewJoinToken, create_join_token};
use cairn_coordinator::ops::enroll::{NewEnrolment, enroll};
use cairn_coordinator::ops::write_blob::{Progress, UploadHeader, write_blob};
use cairn_coordinator::server::{self, DataFolder, Options};
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use ed25519_dalek::SigningKey;
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use sqlx::Connection as _;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use s3::S3;

pub const START: Timestamp = Timestamp(1_700_000_000_000);

pub struct Fixture {
    pub folder: TempDir,
    pub app: App,
    pub stores: Stores,
    /// A database of its own on a PostgreSQL server; SQLite in the folder when absent.
    pub database_url: Option<String>,
    /// A bucket of its own; a folder when absent.
    pub s3: Option<S3>,
}

impl Fixture {
    /// The folder that holds the blobs, by any store.
    pub fn blobs_folder(&self) -> PathBuf {
        match &self.s3 {
            None => self.folder.path().join("store/blobs"),
            Some(s3) => s3.file("blobs"),
        }
    }
}

/// What a coordinator keeps its things in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stores {
    /// PostgreSQL instead of SQLite.
    pub postgres: bool,
    /// S3 instead of a folder.
    pub s3: bool,
}

impl Stores {
    /// Whether this machine has them: PostgreSQL where `scripts/postgres.sh` offers one.
    pub fn are_here(self) -> bool {
        let here = !self.postgres || std::env::var_os("CAIRN_TEST_POSTGRES").is_some();
        if !here {
            eprintln!("left out: CAIRN_TEST_POSTGRES names no server");
        }
        here
    }
}

/// Opens a coordinator, again if need be, without background tasks.
pub async fn open(
    folder: &Path,
    database_url: Option<&String>,
    s3: Option<&S3>,
    clock: Clock,
    limits: Limits,
) -> App {
    server::open_idle(Options {
        data: DataFolder::lock(folder).unwrap(),
        database_url: database_url.cloned(),
        blobs: s3.map(S3::location),
        endpoint: "cairn+insecure://127.0.0.1:7600/#".parse().unwrap(),
        clock,
        limits,
    })
    .await
    .unwrap()
}

pub async fn coordinator() -> Fixture {
    coordinator_with(Limits {
        disk_free_bytes_min: 0,
        ..Limits::default()
    })
    .await
}

pub async fn coordinator_with(limits: Limits) -> Fixture {
    coordinator_on(Stores::default(), limits).await
}

/// A fresh database on the PostgreSQL server that `scripts/postgres.sh` runs; none without one.
pub async fn postgres() -> Option<String> {
    let server = std::env::var("CAIRN_TEST_POSTGRES").ok()?;
    sqlx::any::install_default_drivers();
    let name = format!("cairn_{}", uuid::Uuid::new_v4().simple());
    let mut connection = sqlx::AnyConnection::connect(&server).await.unwrap();
    let create = sqlx::AssertSqlSafe(format!("create database {name}"));
    sqlx::raw_sql(create)
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
    Some(server.replacen("///cairn?", &format!("///{name}?"), 1))
}

pub async fn coordinator_on(stores: Stores, limits: Limits) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let database_url = if stores.postgres {
        postgres().await
    } else {
        None
    };
    let s3 = if stores.s3 {
        Some(S3::start().await)
    } else {
        None
    };
    let clock = Clock::settable(START);
    let app = open(
        folder.path(),
        database_url.as_ref(),
        s3.as_ref(),
        clock,
        limits,
    )
    .await;
    Fixture {
        folder,
        app,
        stores,
        database_url,
        s3,
    }
}

pub fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

impl Fixture {
    pub async fn token(&self, role: Role, uses: u32) -> String {
        let new = NewJoinToken {
            role,
            uses,
            ttl: Duration::from_hours(1),
        };
        let app = &self.app;
        let made = create_join_token(&app.db, &app.clock, &app.endpoint, new)
            .await
            .unwrap();
        made.0.token.secret().to_owned()
    }

    pub async fn enroll(&self, token: &str, seed: u8) -> Result<Caller, Error> {
        let new = NewEnrolment {
            join_token: token.to_owned(),
            public_key: key(seed).verifying_key(),
            display_name: format!("key {seed}"),
        };
        enroll(&self.app, new).await
    }

    pub async fn member(&self, role: Role, seed: u8) -> Caller {
        let token = self.token(role, 1).await;
        self.enroll(&token, seed).await.unwrap()
    }

    pub async fn send(
        &self,
        caller: &Caller,
        name: BlobName,
        offset: u64,
        chunks: &[&[u8]],
    ) -> Result<Progress, Error> {
        let chunks: Vec<_> = chunks
            .iter()
            .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
            .collect();
        let header = UploadHeader {
            name,
            offset,
            lease: None,
        };
        write_blob(&self.app, caller, header, futures::stream::iter(chunks)).await
    }

    /// Stores bytes as this caller and returns their name.
    pub async fn put(&self, caller: &Caller, bytes: &[u8]) -> BlobName {
        let name = name(bytes);
        let progress = self.send(caller, name, 0, &[bytes]).await.unwrap();
        assert!(progress.complete);
        name
    }

    /// The file that holds a blob's bytes, in whichever store.
    pub fn blob_file(&self, name: BlobName) -> PathBuf {
        let hex = name.digest.to_string();
        let key = format!("blobs/{}/{hex}", &hex[..2]);
        match &self.s3 {
            Some(s3) => s3.file(&key),
            None => self.folder.path().join("store").join(key),
        }
    }

    /// A gRPC channel in memory.
    pub async fn channel(&self) -> Channel {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let app = self.app.clone();
        let connection = Connection::new(theirs, Duration::from_mins(1));
        // No other connection comes, but the listener stays: its end would end this one too.
        let incoming = futures::stream::iter([Ok(connection)]).chain(futures::stream::pending());
        tokio::spawn(async move { server::serve_grpc(&app, incoming).await });
        let mut ours = Some(ours);
        Endpoint::from_static("http://memory")
            .connect_with_connector(tower::service_fn(move |_| {
                let io = ours
                    .take()
                    .ok_or_else(|| std::io::Error::other("one connection only"));
                std::future::ready(io.map(TokioIo::new))
            }))
            .await
            .unwrap()
    }
}

pub fn name(bytes: &[u8]) -> BlobName {
    BlobName {
        digest: Digest::of(bytes),
        size_bytes: bytes.len() as u64,
    }
}
