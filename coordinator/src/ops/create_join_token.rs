//! A maintainer, or the operator at the console, makes a join token.
use std::time::Duration;

use cairn_proto::limits::{JOIN_TOKEN_TTL_MS_MAX, JOIN_TOKEN_USES_MAX};
use cairn_proto::url::{JoinToken, JoinUrl, Server};

use crate::caller::Role;
use crate::clock::{Clock, Timestamp};
use crate::db::Db;
use crate::db::tokens::{JoinTokenRow, token_insert};
use crate::error::Error;
use crate::limits;
use crate::secret::{self, SecretKind};

/// What kind of token.
#[derive(Debug, Clone, Copy)]
pub struct NewJoinToken {
    /// The role it gives.
    pub role: Role,
    /// How many identities may join; 0 means 1.
    pub uses: u32,
    /// How long; zero means the default.
    pub ttl: Duration,
}

/// Makes a join token and its URL; only the token's hash is stored.
///
/// # Errors
/// INVALID_ARGUMENT for too many uses or too long a life.
pub async fn create_join_token(
    db: &Db,
    clock: &Clock,
    endpoint: &Server,
    new: NewJoinToken,
) -> Result<(JoinUrl, Timestamp), Error> {
    if new.uses > JOIN_TOKEN_USES_MAX {
        return Err(Error::invalid(
            "uses",
            format!("at most {JOIN_TOKEN_USES_MAX}"),
        ));
    }
    let ttl = if new.ttl.is_zero() {
        limits::JOIN_TOKEN_TTL
    } else {
        new.ttl
    };
    if ttl.as_millis() > JOIN_TOKEN_TTL_MS_MAX.unsigned_abs().into() {
        let days = JOIN_TOKEN_TTL_MS_MAX / (24 * 3_600 * 1_000);
        return Err(Error::invalid("ttl", format!("at most {days} days")));
    }
    let text = SecretKind::Join.fresh()?;
    let now = clock.now_ms();
    let expires = now.plus(ttl);
    let row = JoinTokenRow {
        role: new.role,
        uses_left: i64::from(new.uses.max(1)),
        expires,
    };
    let mut tx = db.begin().await?;
    token_insert(&mut tx, secret::hash(&text), row, now).await?;
    tx.commit().await?;
    let token =
        JoinToken::new(text).map_err(|error| Error::internal("spell a join token", error))?;
    Ok((
        JoinUrl {
            server: endpoint.clone(),
            token,
        },
        expires,
    ))
}
