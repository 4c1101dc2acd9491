//! Handing in a trained adapter, with the commitment to its training states.

use std::fs;
use std::path::Path;

use cairn_proto::client::ClientError;
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1::lease::Work;
use cairn_proto::{signing, v1};
use cairn_stack::adapter::{CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::digest::Digest;

use super::audits::upload;
use super::context::{Ctx, Patient};
use super::kept::Kept;
use super::training::states_folder;
use super::unit::{ADAPTER_FOLDER, Numbers, STATES_FOLDER, Unit};
use crate::receipts;
use crate::train::record;

/// How often a blob that vanished between upload and hand-in is uploaded again.
const UPLOADS_MAX: u32 = 3;

/// Uploads, submits, and keeps what an audit or a restored coordinator may ask for. Whether it is
/// over: `false` when nobody answered for too long.
///
/// # Errors
/// When the coordinator refuses, or what was trained cannot be read back.
pub async fn hand_in(context: &Ctx, unit: &Unit, numbers: Numbers) -> Result<bool, ClientError> {
    let Work::Train(work) = &unit.work else {
        return Ok(true);
    };
    let request = signed(context, unit, work, numbers).await?;
    let weights = unit.dir.join(ADAPTER_FOLDER).join(WEIGHTS_FILE);
    let adapter = request.adapter.clone().unwrap_or_default();
    let mut uploads = 0;
    let answer = loop {
        if !upload(context, &weights, &adapter, &unit.lease.id).await? {
            return Ok(false);
        }
        uploads += 1;
        match submit(context, &request).await {
            Ok(Patient::Answer(answer)) => break answer,
            Ok(Patient::Stopped) => return Ok(false),
            Err(error)
                if error.reason() == Some(ErrorReason::BlobMissing) && uploads < UPLOADS_MAX => {}
            Err(error) => return Err(error),
        }
    };
    keep_receipt(context, unit, &request, &answer);
    let (id, audit) = (&answer.submission_id, answer.audit.as_ref());
    match Kept::take(&context.submitted, unit, &request, id, audit) {
        Ok(_) => context.state.look.notify_one(),
        Err(error) => eprintln!("{}: cannot be kept for an audit: {error}", unit.name()),
    }
    Ok(true)
}

/// The request, complete.
async fn signed(
    context: &Ctx,
    unit: &Unit,
    work: &v1::TrainWork,
    numbers: Numbers,
) -> Result<v1::SubmitAdapterRequest, ClientError> {
    let folder = unit.dir.join(ADAPTER_FOLDER);
    let (weights, config) = (folder.join(WEIGHTS_FILE), folder.join(CONFIG_FILE));
    let (digest, size_bytes) = {
        let path = weights.clone();
        tokio::task::spawn_blocking(move || Digest::of_file(&path))
            .await
            .map_err(|error| failed("hash", &weights)(std::io::Error::other(error)))?
            .map_err(failed("hash", &weights))?
    };
    let adapter_config = fs::read(&config).map_err(failed("read", &config))?;
    if size_bytes > work.adapter_bytes_max {
        return Err(ClientError::Malformed(format!(
            "it allows {} bytes for an adapter that has {size_bytes} by the recipe",
            work.adapter_bytes_max
        )));
    }
    let commitment = if work.segments > 0 {
        Some(commitment(context, unit, work)?)
    } else {
        None
    };
    let mut request = v1::SubmitAdapterRequest {
        request_id: unit.saved().request_id.clone(),
        lease_id: unit.lease.id.clone(),
        generation: unit.lease.generation,
        adapter: Some(BlobName { digest, size_bytes }.into()),
        adapter_config,
        numbers: Some(numbers.into()),
        signature: Vec::new(),
        commitment,
    };
    let key = &context.client.identity().key;
    signing::sign_submission(key, &unit.lease.nonce, &mut request)?;
    Ok(request)
}

/// Moves the training states to the unit they are handed in with, and reads what they commit to.
fn commitment(
    context: &Ctx,
    unit: &Unit,
    work: &v1::TrainWork,
) -> Result<v1::TrainCommitment, ClientError> {
    let here = unit.dir.join(STATES_FOLDER);
    if !here.exists() {
        let there = states_folder(context, unit, work);
        fs::rename(&there, &here).map_err(failed("move", &there))?;
        // The local checkpoint's folder, if nothing else is in it.
        let _ = there.parent().map(fs::remove_dir);
    }
    let found = record::commitment(&here)
        .ok_or_else(|| failed("read", &here)(std::io::Error::other("its index is broken")))?;
    Ok(found.to_wire())
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ClientError {
    let path = path.to_owned();
    move |source| ClientError::File {
        action,
        path,
        source,
    }
}

async fn submit(
    context: &Ctx,
    request: &v1::SubmitAdapterRequest,
) -> Result<Patient<v1::SubmitAdapterResponse>, ClientError> {
    context
        .patiently(&context.state.give_up, || {
            context.client.call_once(|mut to| {
                let request = request.clone();
                async move { to.work.submit_adapter(request).await }
            })
        })
        .await
}

fn keep_receipt(
    context: &Ctx,
    unit: &Unit,
    request: &v1::SubmitAdapterRequest,
    answer: &v1::SubmitAdapterResponse,
) {
    let identity = context.client.identity();
    let adapter = request.adapter.clone().unwrap_or_default();
    let expected = receipts::Expected {
        worker: &identity.worker_id,
        submission: &answer.submission_id,
        lease: &request.lease_id,
        adapter: &adapter,
    };
    let receipt = answer.receipt.as_ref();
    let name = unit.name();
    match receipts::keep(&context.receipts, receipt, &identity.server_key, &expected) {
        Ok(path) => eprintln!(
            "{name}: acknowledged as submission {}; signed receipt checked and kept in {}",
            answer.submission_id,
            path.display()
        ),
        Err(error) => eprintln!(
            "{name}: acknowledged as submission {}, but {error}",
            answer.submission_id
        ),
    }
}
