//! What the database's own errors mean to this crate.
use crate::error::Error;

/// SQLite's primary codes for "the disk is full", "busy" and "locked".
const SQLITE_FULL: &str = "13";
const SQLITE_BUSY: [&str; 4] = ["5", "6", "261", "517"];
/// PostgreSQL: disk full; serialisation failure, deadlock, a row held too long, idle for too long in
/// a transaction, too many connections, shutting down.
const POSTGRES_FULL: &str = "53100";
const POSTGRES_BUSY: [&str; 8] = [
    "40001", "40P01", "55P03", "25P03", "53300", "57P01", "57P02", "57P03",
];
/// PostgreSQL: another transaction has inserted such a row since we looked. On SQLite, where nobody
/// writes beside us, it is a mistake of ours.
const POSTGRES_DUPLICATE: &str = "23505";

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let code = error
            .as_database_error()
            .and_then(|error| error.code())
            .map(String::from);
        let code = code.as_deref();
        if code == Some(SQLITE_FULL) || code == Some(POSTGRES_FULL) {
            return Self::disk_full(error);
        }
        if code == Some(POSTGRES_DUPLICATE) {
            return Self::unavailable("another call was faster; try again").with_source(error);
        }
        let busy = code
            .is_some_and(|code| SQLITE_BUSY.contains(&code) || POSTGRES_BUSY.contains(&code))
            || matches!(
                error,
                sqlx::Error::Io(_)
                    | sqlx::Error::Tls(_)
                    | sqlx::Error::PoolTimedOut
                    | sqlx::Error::PoolClosed
                    | sqlx::Error::WorkerCrashed
            );
        if busy {
            Self::unavailable("the database does not answer; try again").with_source(error)
        } else {
            Self::internal("query the database", error)
        }
    }
}
