//! A join token brings a public key in.
use cairn_proto::limits::DISPLAY_NAME_CHARS_MAX;
use cairn_proto::reason::ErrorReason;
use ed25519_dalek::VerifyingKey;
use tracing::info;

use crate::app::App;
use crate::caller::Caller;
use crate::db::tokens::{enrolment_exists, enrolment_insert, token_get, token_spend};
use crate::db::workers::{worker_by_key, worker_insert};
use crate::error::Error;
use crate::ids::WorkerId;
use crate::secret::{self, SecretKind};

/// A checked request: the signature holds.
pub struct NewEnrolment {
    /// The secret part of the join URL.
    pub join_token: String,
    /// The key to enrol.
    pub public_key: VerifyingKey,
    /// How to call its owner.
    pub display_name: String,
}

/// Enrols a key. The same key with the same token gets the same answer and spends nothing.
///
/// # Errors
/// TOKEN_UNKNOWN, TOKEN_EXPIRED, TOKEN_SPENT; ALREADY_EXISTS when the key joined with another
/// token.
pub async fn enroll(app: &App, new: NewEnrolment) -> Result<Caller, Error> {
    check_name(&new.display_name)?;
    if !SecretKind::Join.is_whole(&new.join_token) {
        return Err(Error::new(
            ErrorReason::TokenUnknown,
            "this is not a whole join token; was the join URL cut off?",
        ));
    }
    let hash = secret::hash(&new.join_token);
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let token = token_get(&mut tx, hash)
        .await?
        .ok_or_else(|| refused(ErrorReason::TokenUnknown))?;
    if let Some(known) = worker_by_key(&mut tx, &new.public_key).await? {
        // Also after the token's end: the first answer may have been lost.
        if enrolment_exists(&mut tx, hash, known.caller.worker).await? {
            return Ok(known.caller);
        }
        return Err(Error::new(
            ErrorReason::AlreadyExists,
            format!("this key is enrolled already, as a {}", known.caller.role),
        ));
    }
    if token.expires <= now {
        return Err(refused(ErrorReason::TokenExpired));
    }
    if !token_spend(&mut tx, hash, now).await? {
        return Err(refused(ErrorReason::TokenSpent));
    }
    let caller = Caller {
        worker: WorkerId::new(),
        role: token.role,
        public_key: new.public_key,
        name: new.display_name,
    };
    if !worker_insert(&mut tx, &caller, now).await? {
        return Err(Error::unavailable(
            "the same key is being enrolled by another call; try again",
        ));
    }
    enrolment_insert(&mut tx, hash, caller.worker).await?;
    tx.commit().await?;
    info!(worker.id = %caller.worker, "enrolled {} {} ({})", caller.role, caller.worker, caller.name);
    Ok(caller)
}

fn refused(reason: ErrorReason) -> Error {
    Error::new(reason, reason.sentence())
}

fn check_name(name: &str) -> Result<(), Error> {
    let printable = !name.chars().any(char::is_control) && !name.trim().is_empty();
    if printable && name.chars().count() <= DISPLAY_NAME_CHARS_MAX {
        Ok(())
    } else {
        Err(Error::invalid(
            "display_name",
            format!("1 to {DISPLAY_NAME_CHARS_MAX} printable characters"),
        ))
    }
}
