//! What coordinators on one PostgreSQL tell each other: that something has been committed.
use sqlx::Row;
use sqlx::postgres::PgListener;

use super::{Db, Dialect};
use crate::error::Error;
use crate::limits::{LISTEN_PROBE, LISTEN_TIMEOUT};

/// The channel's name.
const CHANNEL: &str = "cairn";

/// A connection on which others are heard.
pub struct Ear {
    listener: PgListener,
}

impl Db {
    /// Tells every other coordinator that something has been committed.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn tell(&self, from: &str) -> Result<(), Error> {
        if self.dialect == Dialect::Postgres {
            sqlx::query("select pg_notify($1, $2)")
                .bind(CHANNEL)
                .bind(from)
                .execute(&self.writers)
                .await?;
        }
        Ok(())
    }

    /// Begins to listen; nothing where nobody else can speak.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn listen(&self) -> Result<Option<Ear>, Error> {
        if self.dialect == Dialect::Sqlite {
            return Ok(None);
        }
        let opened = tokio::time::timeout(LISTEN_TIMEOUT, async {
            let mut listener = PgListener::connect(&self.url.0).await?;
            // A lost line is an answer of its own: what came meanwhile is lost with it.
            listener.eager_reconnect(false);
            listener.listen(CHANNEL).await?;
            Ok::<_, sqlx::Error>(listener)
        });
        let listener = opened.await.map_err(|_| silent())??;
        Ok(Some(Ear { listener }))
    }
}

impl Ear {
    /// Waits for the next wake-up; returns who sent it.
    ///
    /// # Errors
    /// When the line is lost: listen anew, and look at everything.
    pub async fn next(&mut self) -> Result<String, Error> {
        loop {
            match tokio::time::timeout(LISTEN_PROBE, self.listener.try_recv()).await {
                Ok(heard) => {
                    let heard = heard?.ok_or_else(silent)?;
                    return Ok(heard.payload().to_owned());
                }
                // Nobody speaks, or the line is dead and nothing says so.
                Err(_) => self.probe().await?,
            }
        }
    }

    async fn probe(&mut self) -> Result<(), Error> {
        let asked = sqlx::query("select 1 as one").fetch_one(&mut self.listener);
        let row = tokio::time::timeout(LISTEN_TIMEOUT, asked)
            .await
            .map_err(|_| silent())??;
        row.try_get::<i32, _>("one").map(drop)?;
        Ok(())
    }
}

fn silent() -> Error {
    Error::unavailable("the database does not answer; try again")
}
