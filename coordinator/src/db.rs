//! The database: one SQL text for SQLite and PostgreSQL, one file a table below.
//!
//! This file alone knows the dialect. Queries are `async fn table_verb(tx: &mut Tx, ...)`; only
//! `ops` and `tasks` begin and commit; a dropped [`Tx`] rolls back.
pub mod audits;
pub mod blobs;
pub mod challenges;
pub mod check;
pub mod contributions;
pub mod coordinators;
pub mod counts;
pub mod datasets;
mod errors;
pub mod evaluations;
pub mod inner_products;
pub mod leases;
pub mod log;
mod migrations;
pub mod models;
pub mod outcomes;
pub mod receipts;
pub mod restored;
pub mod revocations;
pub mod rounds;
pub mod sessions;
pub mod settings;
pub mod shards;
pub mod strikes;
pub mod submissions;
pub mod tokens;
pub mod uploads;
mod wakes;
pub mod workers;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Once;

use cairn_stack::digest::Digest;
use sqlx::any::{AnyPoolOptions, AnyRow};
use sqlx::{Any, AnyConnection, AnyPool, Executor, Row, Transaction};

use crate::error::Error;
use crate::failpoint::Step;
use crate::limits;

pub use wakes::Ear;

/// A pool of connections; clones share it.
#[derive(Debug, Clone)]
pub struct Db {
    dialect: Dialect,
    url: Url,
    readers: AnyPool,
    /// On SQLite a pool of one connection: writers queue here instead of failing as "busy".
    writers: AnyPool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

/// May have a password in it.
#[derive(Clone)]
struct Url(String);

impl std::fmt::Debug for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Url")
    }
}

/// A transaction. Dropping it rolls back.
#[derive(Debug)]
pub struct Tx {
    inner: Transaction<'static, Any>,
    dialect: Dialect,
    /// Whether rows have to be locked: not on SQLite, where a writer is alone anyway, and not where
    /// nothing is written.
    locks: bool,
}

/// How a row that a writing transaction reads is held until it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::db) enum Hold {
    /// Others who want to hold or change it wait, then see what became of it.
    Alone,
    /// As [`Hold::Alone`], but rows that are held already are passed over.
    Free,
    /// Nobody changes it.
    Unchanged,
    /// Nobody deletes it.
    Kept,
}

impl Tx {
    /// What to append to a `select` on this table, or its alias, so that its rows are held.
    pub(in crate::db) fn hold(&self, hold: Hold, table: &str) -> String {
        let how = match hold {
            _ if !self.locks => return String::new(),
            // Not `for update`: rows elsewhere may name it meanwhile.
            Hold::Alone => "for no key update of",
            Hold::Free => {
                return format!(" for no key update of {table} skip locked");
            }
            Hold::Unchanged => "for share of",
            Hold::Kept => "for key share of",
        };
        format!(" {how} {table}")
    }

    /// The connection to run queries on.
    pub fn conn(&mut self) -> &mut AnyConnection {
        &mut self.inner
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// When the database does not confirm; nothing has happened then, or it cannot be known.
    #[track_caller]
    pub fn commit(self) -> impl Future<Output = Result<(), Error>> {
        Step::here("commit").around(async move { Ok(self.inner.commit().await?) })
    }
}

impl Db {
    /// Opens the database at a URL (`sqlite:///path?mode=rwc`, `postgres://...`) and brings its
    /// schema up to date.
    ///
    /// # Errors
    /// When it cannot be reached, or its schema is newer than this program.
    pub async fn open(url: &str) -> Result<Self, Error> {
        static DRIVERS: Once = Once::new();
        DRIVERS.call_once(sqlx::any::install_default_drivers);
        let dialect = if url.starts_with("sqlite:") {
            Dialect::Sqlite
        } else if Self::is_shared_url(url) {
            Dialect::Postgres
        } else {
            return Err(Error::invalid(
                "database-url",
                "only sqlite: and postgres: URLs are supported",
            ));
        };
        let db = match dialect {
            Dialect::Sqlite => {
                let writers = sqlite_pool(1).connect(url).await.map_err(open_error)?;
                let readers = sqlite_pool(limits::DATABASE_READERS_MAX)
                    .connect(url)
                    .await
                    .map_err(open_error)?;
                Self {
                    dialect,
                    url: Url(url.to_owned()),
                    readers,
                    writers,
                }
            }
            Dialect::Postgres => {
                let pool = AnyPoolOptions::new()
                    .max_connections(limits::DATABASE_READERS_MAX * 2)
                    .acquire_timeout(limits::DATABASE_WAIT)
                    .after_connect(|connection, _| {
                        Box::pin(async move {
                            connection
                                .execute(sqlx::AssertSqlSafe(postgres_session()))
                                .await?;
                            Ok(())
                        })
                    })
                    .connect(url)
                    .await
                    .map_err(open_error)?;
                Self {
                    dialect,
                    url: Url(url.to_owned()),
                    readers: pool.clone(),
                    writers: pool,
                }
            }
        };
        migrations::run(dialect, &db.writers).await?;
        Ok(db)
    }

    /// Begins a transaction that writes.
    ///
    /// # Errors
    /// UNAVAILABLE when no connection can be had.
    pub async fn begin(&self) -> Result<Tx, Error> {
        let inner = match self.dialect {
            // Taking the write lock at once: a deferred one could fail in the middle.
            Dialect::Sqlite => begin_sqlite(&self.writers, "begin immediate").await?,
            // Read committed: what is decided by what was read is held or guarded (ADR 18).
            Dialect::Postgres => self.writers.begin().await?,
        };
        Ok(Tx {
            inner,
            dialect: self.dialect,
            locks: self.dialect == Dialect::Postgres,
        })
    }

    /// Begins a transaction that only reads: one consistent view.
    ///
    /// # Errors
    /// UNAVAILABLE when no connection can be had.
    pub async fn read(&self) -> Result<Tx, Error> {
        let inner = match self.dialect {
            Dialect::Sqlite => begin_sqlite(&self.readers, "begin").await?,
            Dialect::Postgres => {
                let statement = "begin isolation level repeatable read read only";
                self.readers.begin_with(statement).await?
            }
        };
        Ok(Tx {
            inner,
            dialect: self.dialect,
            locks: false,
        })
    }

    /// Whether several coordinators may serve from a database at this URL.
    #[must_use]
    pub fn is_shared_url(url: &str) -> bool {
        url.starts_with("postgres:") || url.starts_with("postgresql:")
    }

    /// Whether several coordinators may serve from it.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.dialect == Dialect::Postgres
    }

    /// Writes a consistent copy of a SQLite database to a file that is empty or not there, while
    /// others go on writing. False on PostgreSQL, which has `pg_dump` for that.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub async fn copy_to(&self, path: &Path) -> Result<bool, Error> {
        if self.dialect == Dialect::Postgres {
            return Ok(false);
        }
        let mut connection = self.readers.acquire().await?;
        sqlx::query("vacuum into $1")
            .bind(path.to_string_lossy().into_owned())
            .execute(&mut *connection)
            .await?;
        Ok(true)
    }

    /// Closes all connections, after they have finished.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writers.close().await;
    }
}

fn open_error(error: sqlx::Error) -> Error {
    Error::unavailable("the database cannot be opened").with_source(error)
}

/// A coordinator that stops in the middle of a transaction, its machine gone, must not hold its rows
/// for ever.
fn postgres_session() -> String {
    format!(
        "set idle_in_transaction_session_timeout = {}; set lock_timeout = {}",
        limits::POSTGRES_IDLE_MS,
        limits::POSTGRES_LOCK_MS
    )
}

/// Begins a transaction on SQLite, on a connection that is fit for one.
///
/// A full or broken disk makes SQLite roll back by itself, and the connection goes on believing in a
/// transaction that nobody can end: it would refuse every later one. Such a connection is dropped.
async fn begin_sqlite(
    pool: &AnyPool,
    statement: &'static str,
) -> Result<Transaction<'static, Any>, sqlx::Error> {
    // Every connection of a pool may be unfit, one after another.
    for _ in 0..limits::DATABASE_READERS_MAX {
        match pool.begin_with(statement).await {
            Err(sqlx::Error::InvalidSavePointStatement) => {
                let unfit = pool.acquire().await?;
                let _ = unfit.close().await;
            }
            begun => return begun,
        }
    }
    pool.begin_with(statement).await
}

fn sqlite_pool(connections: u32) -> AnyPoolOptions {
    AnyPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(limits::DATABASE_WAIT)
        .idle_timeout(None)
        .max_lifetime(None)
        .after_connect(|connection, _| {
            Box::pin(async move {
                // `full`: what has been acknowledged survives a power cut.
                let pragmas = format!(
                    "pragma busy_timeout = {}; pragma journal_mode = wal; \
                     pragma synchronous = full; pragma foreign_keys = on;",
                    limits::SQLITE_BUSY_MS
                );
                connection.execute(sqlx::AssertSqlSafe(pragmas)).await?;
                Ok(())
            })
        })
}

/// The URL of a SQLite file that is made when absent. The path must be absolute.
#[must_use]
pub fn sqlite_url(path: &Path) -> String {
    let mut url = String::from("sqlite://");
    for byte in path.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(byte) {
            url.push(char::from(*byte));
        } else {
            let _ = write!(url, "%{byte:02X}");
        }
    }
    url.push_str("?mode=rwc");
    url
}

/// Reads a column that the schema says is there.
///
/// # Errors
/// INTERNAL when it is not, or has another type.
pub fn column<'r, T>(row: &'r AnyRow, name: &str) -> Result<T, Error>
where
    T: sqlx::Decode<'r, Any> + sqlx::Type<Any>,
{
    row.try_get(name)
        .map_err(|error| Error::internal("decode a row", error))
}

/// Reads a text column into a type that parses; a bad one is an inconsistency of that table.
///
/// # Errors
/// INTERNAL when the stored text does not parse.
pub fn parsed<T: std::str::FromStr>(
    row: &AnyRow,
    table: &'static str,
    name: &'static str,
) -> Result<T, Error> {
    let text: String = column(row, name)?;
    text.parse()
        .map_err(|_| Error::inconsistent(table, name, &text))
}

/// Reads a bigint column that is never negative.
///
/// # Errors
/// INTERNAL when it is.
pub fn unsigned(row: &AnyRow, table: &'static str, name: &'static str) -> Result<u64, Error> {
    let number: i64 = column(row, name)?;
    u64::try_from(number).map_err(|_| Error::inconsistent(table, name, number))
}

/// Reads a digest column.
///
/// # Errors
/// INTERNAL when it is malformed.
pub fn digest(row: &AnyRow, table: &'static str, name: &'static str) -> Result<Digest, Error> {
    parsed(row, table, name)
}

/// A count or length as the database stores it; all of ours are far below 2^63.
#[must_use]
pub fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A number that may be absent, as a parameter: `.bind(Double(loss))`.
///
/// sqlx 0.9.0 sends an absent `f64` to PostgreSQL as a `float4` and an absent `f32` as a `float8`
/// (the two are swapped in `AnyArguments`), and a statement prepared with the one then refuses the
/// other.
#[derive(Debug, Clone, Copy)]
pub struct Double(pub Option<f64>);

impl sqlx::Type<Any> for Double {
    fn type_info() -> sqlx::any::AnyTypeInfo {
        <f64 as sqlx::Type<Any>>::type_info()
    }
}

impl sqlx::Encode<'_, Any> for Double {
    fn encode_by_ref(
        &self,
        buffer: &mut <Any as sqlx::Database>::ArgumentBuffer,
    ) -> Result<sqlx::encode::IsNull, sqlx::error::BoxDynError> {
        match self.0 {
            Some(number) => sqlx::Encode::<Any>::encode_by_ref(&number, buffer),
            None => sqlx::Encode::<Any>::encode_by_ref(&None::<f32>, buffer),
        }
    }
}

/// Whether a statement failed because such a row exists already.
#[must_use]
pub fn is_duplicate(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.is_unique_violation())
}
