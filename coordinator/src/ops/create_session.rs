//! A signed challenge buys a session.
use cairn_proto::reason::ErrorReason;
use cairn_stack::digest::Digest;
use ed25519_dalek::VerifyingKey;

use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::db::challenges::challenge_take;
use crate::db::sessions::{session_insert, session_purge};
use crate::error::Error;
use crate::limits;
use crate::secret::{self, SecretKind};

use super::create_challenge::known;

/// A begun session; the token is told once.
pub struct NewSession {
    /// The secret.
    pub token: String,
    /// Until when.
    pub expires: Timestamp,
    /// Whose.
    pub caller: Caller,
}

/// Begins a session for a key whose signature over the challenge has been checked.
///
/// # Errors
/// CHALLENGE_INVALID when it is unknown, used, another's or too old.
pub async fn create_session(
    app: &App,
    key: &VerifyingKey,
    challenge: &[u8],
) -> Result<NewSession, Error> {
    let token = SecretKind::Session.fresh()?;
    let now = app.clock.now_ms();
    let expires = now.plus(limits::SESSION_TTL);
    let mut tx = app.db.begin().await?;
    let caller = known(&mut tx, key).await?;
    if !challenge_take(&mut tx, Digest::of(challenge), key, now).await? {
        let reason = ErrorReason::ChallengeInvalid;
        return Err(Error::denied(reason, reason.sentence()));
    }
    session_purge(&mut tx, now.minus(limits::SESSION_TTL)).await?;
    let hash = secret::hash(&token);
    session_insert(
        &mut tx,
        hash,
        caller.worker,
        expires,
        limits::SESSIONS_PER_WORKER_MAX,
    )
    .await?;
    tx.commit().await?;
    Ok(NewSession {
        token,
        expires,
        caller,
    })
}
