//! An enrolled key asks for something fresh to sign.
use cairn_proto::reason::ErrorReason;
use cairn_stack::digest::Digest;
use ed25519_dalek::VerifyingKey;

use crate::app::App;
use crate::db::challenges::{challenge_count, challenge_insert, challenge_purge};
use crate::db::workers::worker_by_key;
use crate::entropy;
use crate::error::Error;
use crate::limits;

/// Makes a challenge, good for a minute and for one session.
///
/// # Errors
/// KEY_UNKNOWN, IDENTITY_DISABLED, or TOO_MANY unanswered ones.
pub async fn create_challenge(app: &App, key: &VerifyingKey) -> Result<[u8; 32], Error> {
    let challenge = entropy::bytes::<32>()?;
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    known(&mut tx, key).await?;
    challenge_purge(&mut tx, now).await?;
    if challenge_count(&mut tx, key).await? >= limits::CHALLENGES_PER_KEY_MAX {
        return Err(Error::new(
            ErrorReason::TooMany,
            "too many unanswered challenges; wait a minute",
        ));
    }
    let expires = now.plus(limits::CHALLENGE_TTL);
    challenge_insert(&mut tx, Digest::of(&challenge), key, expires).await?;
    tx.commit().await?;
    Ok(challenge)
}

/// The identity with this key, unless it has been disabled.
pub(super) async fn known(
    tx: &mut crate::db::Tx,
    key: &VerifyingKey,
) -> Result<crate::caller::Caller, Error> {
    let refused = |reason: ErrorReason| Error::denied(reason, reason.sentence());
    let worker = worker_by_key(tx, key)
        .await?
        .ok_or_else(|| refused(ErrorReason::KeyUnknown))?;
    if worker.revoked {
        Err(refused(ErrorReason::IdentityDisabled))
    } else {
        Ok(worker.caller)
    }
}
