//! A worker hands in again what a coordinator acknowledged and, restored from an old backup, forgot.
//!
//! What an acknowledgement promises is kept as far as it still can be: the adapter is durable, and
//! its lease is credited once at most.
//! - Is the round still in training and the shard not taken, the submission is received as it was
//!   the first time: it has its id and its time, is always audited, and is judged anew, whatever its
//!   verdict was.
//! - Otherwise, be the round over, unknown, or the shard done by somebody else, the receipt is
//!   written down with the credit it states, and the adapter is kept. It is not judged any more and
//!   becomes part of no checkpoint. A receipt without a verdict credits nothing: nobody has verified
//!   anything.
//! - Is the submission known and only its adapter lost, it is taken, and nothing else changes.
//!
//! The receipt is the authority: only this coordinator's key can have signed it. It also opens the
//! door for the upload: who shows a receipt whose adapter is not held is told BLOB_MISSING, and may
//! upload exactly that blob under the receipt's lease for a day.
use cairn_proto::convert::BlobName;
use cairn_proto::reason::{ErrorReason, VerdictReason};
use cairn_proto::signing::{ReceiptStatement, SignatureError};
use cairn_proto::v1;
use tracing::info;

use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::audits::commitment_put;
use crate::db::blobs::blob_get;
use crate::db::leases::{lease_get, lease_insert, lease_move};
use crate::db::restored::{
    Restored, grant_delete, grant_put, lease_spent, restored_insert, submission_known,
};
use crate::db::rounds::{Round, round_get, round_hold};
use crate::db::shards::{shard_get, shard_move};
use crate::db::submissions::{NewSubmission, submission_answer, submission_insert};
use crate::domain::audit::draw;
use crate::domain::lease::{Lease, State, Work};
use crate::domain::round;
use crate::error::Error;
use crate::ids::{Generation, LeaseId, RoundId, SubmissionId};
use crate::limits::RESTORE_UPLOAD;
use crate::ops::submit_adapter::{
    NewAdapter, check_blob, committed, config_text, new_audit, receipt_write, tidy,
};

/// What a receipt says, read.
struct Claim {
    id: SubmissionId,
    lease: LeaseId,
    round: RoundId,
    adapter: BlobName,
    /// When it was acknowledged; never later than now.
    created: Timestamp,
    statement: ReceiptStatement,
}

/// Takes a submission back. `verify` checks the worker's signature with the lease's nonce, where the
/// lease is known. False: it was here already.
///
/// # Errors
/// BAD_SIGNATURE when the receipt is not this coordinator's; INVALID_ARGUMENT when it is another's,
/// or not for what is handed in; BLOB_MISSING until the adapter has been uploaded; LEASE_LOST when
/// the lease has brought in something else.
pub async fn restore_submission(
    app: &App,
    caller: &Caller,
    receipt: &v1::Receipt,
    new: &NewAdapter,
    verify: impl Fn(&[u8]) -> Result<(), SignatureError> + Send,
) -> Result<bool, Error> {
    let now = app.clock.now_ms();
    let claim = claim(app, caller, receipt, new, now)?;
    // A row may outlive its bytes, where the store is older than the database.
    let stored = app.blobs.size(claim.adapter.digest).await? == Some(claim.adapter.size_bytes);
    let mut tx = app.db.begin().await?;
    let known = submission_known(&mut tx, claim.id).await?;
    if known && stored {
        return Ok(false);
    }
    if !known
        && (lease_spent(&mut tx, claim.lease).await?.is_some()
            || submission_answer(&mut tx, claim.lease, new.request)
                .await?
                .is_some())
    {
        let text = "another adapter has been handed in under this lease or request";
        return Err(Error::conflict(ErrorReason::LeaseLost, text));
    }
    let held = blob_get(&mut tx, claim.adapter.digest).await?;
    if !stored || held.is_none_or(|blob| blob.name != claim.adapter) {
        let until = now.plus(RESTORE_UPLOAD);
        grant_put(&mut tx, claim.lease, caller.worker, claim.adapter, until).await?;
        tx.commit().await?;
        let text = format!(
            "blob {} is not held; upload it under lease {} and ask again",
            claim.adapter, claim.lease
        );
        return Err(Error::conflict(ErrorReason::BlobMissing, text));
    }
    let round = round_get(&mut tx, claim.round).await?;
    let again = match &round {
        Some(round) => receive(app, &mut tx, caller, &claim, round, new, verify, now).await?,
        None => false,
    };
    if !again {
        write_down(app, &mut tx, caller, &claim, now).await?;
    }
    grant_delete(&mut tx, claim.lease, now).await?;
    tx.commit().await?;
    app.wake.all();
    let how = if again {
        "and it is judged anew"
    } else {
        "too late to be judged"
    };
    info!(
        submission.id = %claim.id, round.id = %claim.round,
        "{} has handed in again what was lost, {how}", caller.name
    );
    Ok(true)
}

fn claim(
    app: &App,
    caller: &Caller,
    receipt: &v1::Receipt,
    new: &NewAdapter,
    now: Timestamp,
) -> Result<Claim, Error> {
    let statement = ReceiptStatement::verify(receipt, app.key.verifying_key().as_bytes())
        .map_err(|error| Error::denied(ErrorReason::BadSignature, error.to_string()))?;
    if statement.worker != caller.worker.to_string() {
        return Err(Error::invalid("receipt", "it is another worker's"));
    }
    let lease = LeaseId::from_field("receipt", &statement.lease)?;
    let adapter = BlobName {
        digest: statement.adapter,
        size_bytes: statement.adapter_bytes,
    };
    if (lease, adapter) != (new.lease, new.adapter) {
        let text = "it is for another lease or adapter than the submission";
        return Err(Error::invalid("receipt", text));
    }
    Ok(Claim {
        id: SubmissionId::from_field("receipt", &statement.submission)?,
        lease,
        round: RoundId::from_field("receipt", &statement.round)?,
        adapter,
        created: Timestamp(statement.received_ms.min(now.0)),
        statement,
    })
}

/// Receives the submission as the first time. False: it cannot be any more, and nothing is done.
#[expect(clippy::too_many_arguments, reason = "one step of one story")]
async fn receive(
    app: &App,
    tx: &mut Tx,
    caller: &Caller,
    claim: &Claim,
    round: &Round,
    new: &NewAdapter,
    verify: impl Fn(&[u8]) -> Result<(), SignatureError> + Send,
    now: Timestamp,
) -> Result<bool, Error> {
    let position = claim.statement.shard;
    if now >= round.deadline || !round_hold(tx, round.id, round::State::Training).await? {
        return Ok(false);
    }
    let Some(row) = shard_get(tx, round.id, position).await? else {
        return Ok(false);
    };
    let lease = lease_get(tx, claim.lease).await?;
    if let Some(lease) = &lease {
        if lease.worker != caller.worker || lease.work != Work::Train(position) {
            return Err(Error::invalid("receipt", "its lease is another worker's"));
        }
        verify(&lease.nonce)
            .map_err(|error| Error::denied(ErrorReason::BadSignature, error.to_string()))?;
    }
    // Its own lease, if it is still the newest; else the shard, if nobody has it.
    let own = lease
        .as_ref()
        .and_then(|lease| row.shard.submit(lease.generation).ok());
    let fresh = || {
        let leased = row.shard.lease().ok()?;
        leased.submit(leased.generation).ok()
    };
    let Some(next) = own.or_else(fresh) else {
        return Ok(false);
    };
    check_blob(tx, round, new.adapter).await?;
    let config = config_text(&new.config)?;
    let committed = committed(round, new.adapter, new.commitment.as_ref())?;
    if !shard_move(tx, round.id, position, row.shard, next).await? {
        return Err(Error::unavailable("the shard has just moved; try again"));
    }
    spend_lease(tx, caller, claim, lease, next.generation, now).await?;
    let statement = ReceiptStatement {
        verdict: "pending".to_owned(),
        reason: String::new(),
        credit_tokens: 0,
        ..claim.statement.clone()
    };
    let (statement, signature) = receipt_write(app, tx, statement, now).await?;
    let numbers = tidy(new.numbers.clone());
    let submission = NewSubmission {
        id: claim.id,
        lease: claim.lease,
        request: new.request,
        round: round.id,
        shard: position,
        worker: caller.worker,
        adapter: claim.adapter.digest,
        adapter_bytes: claim.adapter.size_bytes,
        adapter_config: config,
        numbers: &numbers,
        signature: &new.signature,
        receipt_statement: &statement,
        receipt_signature: &signature,
        created: claim.created,
    };
    submission_insert(tx, &submission).await?;
    if let Some(commitment) = committed {
        // The commitment is not part of the receipt, so it may be another than the first time:
        // always audited, and drawn afresh.
        let fresh = SubmissionId::new();
        let audit = draw(&app.audit_secret, fresh, 1.0, commitment.segments())
            .and_then(|segment| new_audit(commitment, &round.file.policy, segment, now));
        commitment_put(tx, claim.id, commitment, audit.as_ref()).await?;
    }
    Ok(true)
}

/// Marks the receipt's lease done; one that this database has never seen is made.
async fn spend_lease(
    tx: &mut Tx,
    caller: &Caller,
    claim: &Claim,
    lease: Option<Lease>,
    generation: Generation,
    now: Timestamp,
) -> Result<(), Error> {
    match lease {
        Some(lease) => {
            if !lease_move(tx, lease.id, lease.state, State::Done).await? {
                return Err(Error::unavailable("the lease has just moved; try again"));
            }
            Ok(())
        }
        None => {
            let lease = Lease {
                id: claim.lease,
                round: claim.round,
                work: Work::Train(claim.statement.shard),
                worker: caller.worker,
                generation,
                nonce: Vec::new(),
                state: State::Done,
                expires: now,
            };
            lease_insert(tx, &lease, now).await
        }
    }
}

/// Keeps the receipt's credit and its adapter.
async fn write_down(
    app: &App,
    tx: &mut Tx,
    caller: &Caller,
    claim: &Claim,
    now: Timestamp,
) -> Result<(), Error> {
    let mut statement = claim.statement.clone();
    if statement.verdict == "pending" {
        "rejected".clone_into(&mut statement.verdict);
        VerdictReason::RoundEnded
            .as_str()
            .clone_into(&mut statement.reason);
    }
    let verdict = statement.verdict.clone();
    let (reason, credit_tokens) = (statement.reason.clone(), statement.credit_tokens);
    let (text, signature) = receipt_write(app, tx, statement, now).await?;
    let row = Restored {
        id: claim.id,
        lease: claim.lease,
        worker: caller.worker,
        round: claim.round,
        shard: claim.statement.shard,
        adapter: claim.adapter,
        verdict,
        reason,
        credit_tokens,
        statement: text,
        signature,
        created: claim.created,
    };
    restored_insert(tx, &row, now).await
}
