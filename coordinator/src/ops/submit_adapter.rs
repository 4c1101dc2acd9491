//! A volunteer hands in an adapter. Once this answers, the submission is durable, readable, and
//! credited at most once.
use cairn_proto::convert::BlobName;
use cairn_proto::limits::ADAPTER_CONFIG_BYTES_MAX;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::{ReceiptStatement, SignatureError};
use cairn_proto::v1;
use tracing::info;

use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::blobs::blob_get;
use crate::db::leases::{lease_get, lease_move};
use crate::db::log::{EntryKind, log_reserve, log_write};
use crate::db::rounds::round_hold;
use crate::db::shards::{shard_get, shard_move};
use crate::db::submissions::{
    Answer, NewSubmission, Numbers, submission_answer, submission_insert,
};
use crate::domain::lease::{Lease, Standing, State, Work};
use crate::domain::round;
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
}

/// Takes an adapter in. `verify` checks the signature with the lease's nonce.
///
/// # Errors
/// LEASE_LOST, BAD_SIGNATURE, ROUND_ENDED, BLOB_MISSING, BLOB_TOO_LARGE, REQUEST_ID_REUSED,
/// NOT_FOUND.
pub async fn submit_adapter(
    app: &App,
    caller: &Caller,
    new: NewAdapter,
    verify: impl Fn(&[u8]) -> Result<(), SignatureError> + Send,
) -> Result<Acknowledged, Error> {
    let config = config_text(&new.config)?;
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let lease = lease_get(&mut tx, new.lease)
        .await?
        .ok_or_else(|| Error::not_found("lease", new.lease))?;
    let standing = lease
        .standing(&caller.worker, new.generation)
        .map_err(|refusal| refused(refusal, new.lease))?;
    verify(&lease.nonce)
        .map_err(|error| Error::denied(ErrorReason::BadSignature, error.to_string()))?;
    if let Some(first) = submission_answer(&mut tx, new.lease, new.request).await? {
        return answer_again(first, &new);
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
    if !round_hold(&mut tx, lease.round, round::State::Training).await? {
        return Err(Error::conflict(
            ErrorReason::RoundEnded,
            format!("round {} takes no more adapters", lease.round),
        ));
    }
    check_blob(&mut tx, &lease, new.adapter).await?;
    let row = shard_get(&mut tx, lease.round, position)
        .await?
        .ok_or_else(lost)?;
    let next = row.shard.submit(lease.generation).map_err(|_| lost())?;
    let done = shard_move(&mut tx, lease.round, position, row.shard, next).await?
        && lease_move(&mut tx, lease.id, from, State::Done).await?;
    if !done {
        return Err(lost());
    }
    let answer = store(app, &mut tx, &lease, position, &new, config, now).await?;
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

fn answer_again(first: Answer, new: &NewAdapter) -> Result<Acknowledged, Error> {
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
    Ok(Acknowledged {
        id: first.id,
        statement: first.receipt_statement.into_bytes(),
        signature: first.receipt_signature,
    })
}

async fn check_blob(tx: &mut Tx, lease: &Lease, adapter: BlobName) -> Result<(), Error> {
    let round = round_of(tx, lease.round).await?;
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

async fn store(
    app: &App,
    tx: &mut Tx,
    lease: &Lease,
    shard: u32,
    new: &NewAdapter,
    config: &str,
    now: Timestamp,
) -> Result<Acknowledged, Error> {
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
        log_index: log_reserve(tx).await?,
    };
    let v1::Receipt {
        statement,
        signature,
    } = receipt
        .sign(&app.key)
        .map_err(|error| Error::internal("sign a receipt", error))?;
    let receipt_statement = std::str::from_utf8(&statement)
        .map_err(|error| Error::internal("write a receipt", error))?;
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
        receipt_statement,
        receipt_signature: &signature,
        created: now,
    };
    submission_insert(tx, &row).await?;
    log_write(
        tx,
        receipt.log_index,
        EntryKind::Receipt,
        receipt_statement,
        now,
    )
    .await?;
    Ok(Acknowledged {
        id,
        statement,
        signature,
    })
}

/// JSON has no NaN, and nobody needs a device's whole biography.
fn tidy(mut numbers: Numbers) -> Numbers {
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
