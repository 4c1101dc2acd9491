//! A volunteer hands in an adapter. Once this answers, the submission is durable, readable, and
//! credited at most once. One that comes after its shard has gone to another is judged and credited
//! like any other, and becomes part of nothing.
use std::time::Duration;

use cairn_proto::convert::BlobName;
use cairn_proto::limits::ADAPTER_CONFIG_BYTES_MAX;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::{ReceiptStatement, SignatureError};
use cairn_stack::recipe::{Length, Policy};
use tracing::info;

use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::audits::{audit_get, commitment_put};
use crate::db::blobs::blob_get;
use crate::db::leases::{lease_get, lease_hold, lease_move, lease_renewed_since};
use crate::db::log::{EntryKind, log_hold, log_reserve, log_write};
use crate::db::rounds::{Round, round_hold};
use crate::db::shards::{shard_failure_forgive, shard_get, shard_move};
use crate::db::strikes::trust_of;
use crate::db::submissions::{
    Answer, NewSubmission, Numbers, submission_answer, submission_arrival, submission_insert,
};
use crate::domain::audit::{Audit, Commitment, File, boundaries, draw};
use crate::domain::lease::{Lease, Standing, State, Work};
use crate::domain::round;
use crate::domain::trust::audit_share;
use crate::error::Error;
use crate::ids::{Generation, LeaseId, RequestId, SubmissionId};
use crate::ops::claim_work::round_of;
use crate::ops::release_lease::{lost, refused};

/// Longest device name kept, characters.
const DEVICE_CHARS_MAX: usize = 64;

/// What is handed in.
#[derive(Debug, Clone)]
pub struct NewAdapter {
    /// The caller's request.
    pub request: RequestId,
    /// The lease.
    pub lease: LeaseId,
    /// Its generation.
    pub generation: Generation,
    /// The uploaded weight file.
    pub adapter: BlobName,
    /// `adapter_config.json`.
    pub config: Vec<u8>,
    /// What the worker says.
    pub numbers: Numbers,
    /// The worker's signature over all of it.
    pub signature: Vec<u8>,
    /// What it commits to; required where the round asks for segments.
    pub commitment: Option<Commitment>,
}

/// What is answered: the same for the same submission, however often it is sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Acknowledged {
    /// The submission.
    pub id: SubmissionId,
    /// The receipt's statement.
    pub statement: Vec<u8>,
    /// The coordinator's signature under it.
    pub signature: Vec<u8>,
    /// The audit, while it waits to be answered.
    pub audit: Option<Audit>,
}

/// Takes an adapter in. `verify` checks the signature with the lease's nonce.
///
/// # Errors
/// LEASE_LOST, BAD_SIGNATURE, ROUND_ENDED, BLOB_MISSING, BLOB_TOO_LARGE, REQUEST_ID_REUSED,
/// NOT_FOUND; INVALID_ARGUMENT for a commitment that is not one to this training.
pub async fn submit_adapter(
    app: &App,
    caller: &Caller,
    new: NewAdapter,
    verify: impl Fn(&[u8]) -> Result<(), SignatureError> + Send,
) -> Result<Acknowledged, Error> {
    let config = config_text(&new.config)?;
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let unknown = || Error::not_found("lease", new.lease);
    let lease = lease_get(&mut tx, new.lease).await?.ok_or_else(unknown)?;
    let is_training = round_hold(&mut tx, lease.round, round::State::Training).await?;
    // Again, held: the same request may be under way at another coordinator.
    let lease = lease_hold(&mut tx, new.lease).await?.ok_or_else(unknown)?;
    let standing = lease
        .standing(&caller.worker, new.generation)
        .map_err(|refusal| refused(refusal, new.lease))?;
    verify(&lease.nonce)
        .map_err(|error| Error::denied(ErrorReason::BadSignature, error.to_string()))?;
    if let Some(first) = submission_answer(&mut tx, new.lease, new.request).await? {
        return answer_again(&mut tx, first, &new, now).await;
    }
    let Work::Train(position) = lease.work else {
        return Err(Error::invalid(
            "lease_id",
            "this lease is for an evaluation",
        ));
    };
    let from = match standing {
        Standing::Held => State::Active,
        Standing::Grace => State::Expired,
        Standing::Answered => return Err(lost()),
    };
    if !is_training {
        return Err(Error::conflict(
            ErrorReason::RoundEnded,
            format!("round {} takes no more adapters", lease.round),
        ));
    }
    let round = round_of(&mut tx, lease.round).await?;
    check_blob(&mut tx, &round, new.adapter).await?;
    let committed = committed(&round, new.adapter, new.commitment.as_ref())?;
    let row = shard_get(&mut tx, lease.round, position)
        .await?
        .ok_or_else(lost)?;
    if from == State::Expired && lease.generation < row.shard.generation {
        // Another has been given the shard, and it is theirs. What was trained is judged and credited
        // all the same; the lease stays expired, which is how a late adapter is known.
        if lease_renewed_since(&mut tx, &lease, position).await? {
            return Err(lost());
        }
        shard_failure_forgive(&mut tx, lease.round, position, lease.worker).await?;
        info!(lease.id = %lease.id, "{} is late with shard {position}", caller.name);
    } else {
        let next = row.shard.submit(lease.generation).map_err(|_| lost())?;
        let done = shard_move(&mut tx, lease.round, position, row.shard, next).await?
            && lease_move(&mut tx, lease.id, from, State::Done).await?;
        if !done {
            return Err(lost());
        }
    }
    let mut answer = store(app, &mut tx, &lease, position, &new, config, now).await?;
    if let Some(commitment) = committed {
        let policy = &round.file.policy;
        let share = audit_share(&trust_of(&mut tx, caller.worker).await?, policy);
        let segment = draw(&app.audit_secret, answer.id, share, commitment.segments());
        answer.audit = segment.and_then(|segment| new_audit(commitment, policy, segment, now));
        commitment_put(&mut tx, answer.id, commitment, answer.audit.as_ref()).await?;
    }
    tx.commit().await?;
    app.wake.all();
    info!(
        submission.id = %answer.id, round.id = %lease.round,
        "received an adapter of shard {position} from {}", caller.name
    );
    Ok(answer)
}

/// The text of an `adapter_config.json`.
///
/// # Errors
/// INVALID_ARGUMENT when it is too long or no text.
pub(super) fn config_text(bytes: &[u8]) -> Result<&str, Error> {
    if bytes.len() > ADAPTER_CONFIG_BYTES_MAX {
        let text = format!("at most {ADAPTER_CONFIG_BYTES_MAX} bytes");
        return Err(Error::invalid("adapter_config", text));
    }
    // PostgreSQL's text has no NUL, and neither has JSON.
    std::str::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
        .ok_or_else(|| Error::invalid("adapter_config", "it is not JSON"))
}

/// The audit of a drawn segment: it may be answered for as long as a lease lives.
pub(super) fn new_audit(
    commitment: &Commitment,
    policy: &Policy,
    segment: u32,
    now: Timestamp,
) -> Option<Audit> {
    let until = now.plus(Duration::from_millis(policy.lease_ms));
    let cut = boundaries(commitment.last.step, policy.segments);
    Audit::new(segment, &cut, until)
}

/// The commitment that a round asks for, checked; nothing where it asks for none.
///
/// # Errors
/// INVALID_ARGUMENT when it is missing, or not one to a training of this round and this adapter.
pub(super) fn committed<'a>(
    round: &Round,
    adapter: BlobName,
    commitment: Option<&'a Commitment>,
) -> Result<Option<&'a Commitment>, Error> {
    let policy = &round.file.policy;
    if policy.segments == 0 {
        return Ok(None);
    }
    let commitment = commitment.ok_or_else(|| {
        let text = "this round asks for a commitment to the training states; update cairn-worker";
        Error::invalid("commitment", text)
    })?;
    // Under a carry the adapter is the difference to it; the judge compares its first half.
    let adapter = match round.carry {
        Some(_) => None,
        None => Some(File {
            digest: adapter.digest,
            size_bytes: adapter.size_bytes,
        }),
    };
    let steps = match round.file.recipe.length {
        Length::Steps(steps) => Some(steps),
        Length::Epochs(_) => None,
    };
    commitment
        .check(policy.segments, steps, adapter)
        .and_then(|()| commitment.last.check_sizes(round.adapter_bytes_max))
        .map_err(|error| Error::invalid("commitment", error))?;
    Ok(Some(commitment))
}

async fn answer_again(
    tx: &mut Tx,
    first: Answer,
    new: &NewAdapter,
    now: Timestamp,
) -> Result<Acknowledged, Error> {
    if first.lease != new.lease {
        return Err(Error::conflict(
            ErrorReason::RequestIdReused,
            "the request id was used for another submission",
        ));
    }
    if first.adapter != new.adapter.digest {
        return Err(Error::conflict(
            ErrorReason::LeaseLost,
            "another adapter has been handed in under this lease",
        ));
    }
    let audit = audit_get(tx, first.id).await?;
    Ok(Acknowledged {
        id: first.id,
        statement: first.receipt_statement.into_bytes(),
        signature: first.receipt_signature,
        audit: audit.filter(|audit| audit.is_waiting(now)),
    })
}

/// Checks that an adapter is held and small enough.
///
/// # Errors
/// BLOB_MISSING, BLOB_TOO_LARGE.
pub(super) async fn check_blob(tx: &mut Tx, round: &Round, adapter: BlobName) -> Result<(), Error> {
    let held = blob_get(tx, adapter.digest).await?;
    if held.is_none_or(|blob| blob.name != adapter) {
        return Err(Error::conflict(
            ErrorReason::BlobMissing,
            format!(
                "blob {} of {} bytes is not held",
                adapter.digest, adapter.size_bytes
            ),
        ));
    }
    if adapter.size_bytes > round.adapter_bytes_max {
        return Err(Error::conflict(
            ErrorReason::BlobTooLarge,
            format!(
                "the recipe's adapter has at most {} bytes",
                round.adapter_bytes_max
            ),
        ));
    }
    Ok(())
}

/// Makes a statement the next leaf of the log and signs it.
///
/// # Errors
/// When the database fails.
pub(super) async fn receipt_write(
    app: &App,
    tx: &mut Tx,
    statement: ReceiptStatement,
    now: Timestamp,
) -> Result<(String, Vec<u8>), Error> {
    let statement = ReceiptStatement {
        log_index: log_reserve(tx).await?,
        ..statement
    };
    let receipt = statement
        .sign(&app.key)
        .map_err(|error| Error::internal("sign a receipt", error))?;
    let text = String::from_utf8(receipt.statement)
        .map_err(|error| Error::internal("write a receipt", error))?;
    log_write(tx, statement.log_index, EntryKind::Receipt, &text, now).await?;
    Ok((text, receipt.signature))
}

async fn store(
    app: &App,
    tx: &mut Tx,
    lease: &Lease,
    shard: u32,
    new: &NewAdapter,
    config: &str,
    now: Timestamp,
) -> Result<Acknowledged, Error> {
    log_hold(tx).await?;
    let now = submission_arrival(tx, lease.round, now).await?;
    let id = SubmissionId::new();
    let receipt = ReceiptStatement {
        submission: id.to_string(),
        lease: lease.id.to_string(),
        worker: lease.worker.to_string(),
        round: lease.round.to_string(),
        shard,
        adapter: new.adapter.digest,
        adapter_bytes: new.adapter.size_bytes,
        received_ms: now.0,
        verdict: "pending".to_owned(),
        reason: String::new(),
        credit_tokens: 0,
        log_index: 0,
    };
    let (statement, signature) = receipt_write(app, tx, receipt, now).await?;
    let row = NewSubmission {
        id,
        lease: lease.id,
        request: new.request,
        round: lease.round,
        shard,
        worker: lease.worker,
        adapter: new.adapter.digest,
        adapter_bytes: new.adapter.size_bytes,
        adapter_config: config,
        numbers: &tidy(new.numbers.clone()),
        signature: &new.signature,
        receipt_statement: &statement,
        receipt_signature: &signature,
        created: now,
    };
    submission_insert(tx, &row).await?;
    Ok(Acknowledged {
        id,
        statement: statement.into_bytes(),
        signature,
        audit: None,
    })
}

/// JSON has no NaN, and nobody needs a device's whole biography.
pub(super) fn tidy(mut numbers: Numbers) -> Numbers {
    for number in [
        &mut numbers.seconds,
        &mut numbers.first_loss,
        &mut numbers.last_loss,
    ] {
        if !number.is_finite() {
            *number = 0.0;
        }
    }
    numbers.device = device_text(&numbers.device);
    numbers
}

/// A device's name as it is kept.
pub(super) fn device_text(device: &str) -> String {
    let printable = device.chars().filter(|c| !c.is_control());
    printable.take(DEVICE_CHARS_MAX).collect()
}
