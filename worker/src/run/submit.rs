//! The third stage: hands results in and ends the unit.

use std::time::Duration;

use tokio::sync::mpsc;

use cairn_proto::client::ClientError;
use cairn_proto::convert::BlobName;
use cairn_proto::limits::DETAIL_CHARS_MAX;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1::lease::Work;
use cairn_proto::{signing, v1};
use cairn_stack::digest::Digest;

use super::context::{Ctx, Patient};
use super::renew::is_lost;
use super::unit::{ADAPTER_FOLDER, Numbers, Outcome, Unit};
use super::work::Worked;
use crate::error::WorkerError;
use crate::limits::{TROUBLE_PAUSE, TROUBLE_PAUSE_MAX};
use crate::receipts;

/// How often a blob that vanished between upload and hand-in is uploaded again.
const UPLOADS_MAX: u32 = 3;

/// Runs until the work stage has ended.
///
/// # Errors
/// When the coordinator no longer takes this identity.
pub async fn run(context: Ctx, mut units: mpsc::Receiver<Worked>) -> Result<(), WorkerError> {
    let mut troubles = 0;
    while let Some(Worked { unit, outcome }) = units.recv().await {
        let trouble = matches!(outcome, Outcome::Failed(_) | Outcome::Trouble(_));
        finish(&context, &unit, outcome).await?;
        drop(unit);
        if context.once {
            context.state.soft.cancel();
        }
        troubles = if trouble { troubles + 1 } else { 0 };
        if troubles > 0 {
            pause_after(&context, troubles).await;
        }
    }
    Ok(())
}

/// Keeps a machine that fails at everything from eating a round's shards. The next unit may be in
/// hand already; the pause then comes before the one after it.
async fn pause_after(context: &Ctx, troubles: u32) {
    let pause = TROUBLE_PAUSE
        .saturating_mul(1 << (troubles - 1).min(10))
        .min(TROUBLE_PAUSE_MAX);
    tokio::select! {
        () = tokio::time::sleep(pause) => (),
        () = context.state.soft.cancelled() => (),
    }
}

async fn finish(context: &Ctx, unit: &Unit, outcome: Outcome) -> Result<(), WorkerError> {
    let name = unit.name();
    let handed_in = match outcome {
        Outcome::Trained(numbers) => hand_in_adapter(context, unit, numbers).await,
        Outcome::Scored(sets) => hand_in_scores(context, unit, sets).await,
        Outcome::Stopped if context.keep_lease => {
            eprintln!("{name}: kept; goes on at the next start if the lease holds");
            unit.over.cancel();
            return Ok(());
        }
        Outcome::Stopped => release(context, unit, false, "stopped by its owner").await,
        Outcome::Lost => {
            eprintln!("{name}: the lease is lost (given to another, or the round ended); put down");
            Ok(true)
        }
        Outcome::Failed(detail) => {
            eprintln!("{name}: failed here, given back: {detail}");
            release(context, unit, true, &detail).await
        }
        Outcome::Trouble(detail) => {
            eprintln!("{name}: given back, {detail}");
            release(context, unit, false, &detail).await
        }
    };
    match handed_in {
        Ok(true) => unit.forget(),
        Ok(false) => {
            eprintln!("{name}: not handed in yet; goes in at the next start");
            unit.over.cancel();
        }
        Err(error) if is_fatal(&error) => return Err(error.into()),
        Err(error) if is_lost(&error) => {
            eprintln!("{name}: too late, not counted: {error}");
            unit.forget();
        }
        Err(error) => {
            eprintln!("{name}: not taken: {error}");
            unit.forget();
        }
    }
    Ok(())
}

/// The identity itself is refused: going on makes no sense.
fn is_fatal(error: &ClientError) -> bool {
    matches!(
        error.reason(),
        Some(ErrorReason::KeyUnknown | ErrorReason::IdentityDisabled | ErrorReason::RoleRequired)
    )
}

async fn hand_in_adapter(
    context: &Ctx,
    unit: &Unit,
    numbers: Numbers,
) -> Result<bool, ClientError> {
    let Work::Train(work) = &unit.work else {
        return Ok(true);
    };
    let folder = unit.dir.join(ADAPTER_FOLDER);
    let weights = folder.join("adapter_model.safetensors");
    let config = folder.join("adapter_config.json");
    let read = |action, path: &std::path::Path| {
        let path = path.to_owned();
        move |source| ClientError::File {
            action,
            path,
            source,
        }
    };
    let (digest, size_bytes) = {
        let path = weights.clone();
        tokio::task::spawn_blocking(move || Digest::of_file(&path))
            .await
            .map_err(|error| read("hash", &weights)(std::io::Error::other(error)))?
            .map_err(read("hash", &weights))?
    };
    let adapter_config = std::fs::read(&config).map_err(read("read", &config))?;
    let adapter = BlobName { digest, size_bytes };
    if size_bytes > work.adapter_bytes_max {
        return Err(ClientError::Malformed(format!(
            "it allows {} bytes for an adapter that has {size_bytes} by the recipe",
            work.adapter_bytes_max
        )));
    }
    let mut request = v1::SubmitAdapterRequest {
        request_id: unit.saved().request_id.clone(),
        lease_id: unit.lease.id.clone(),
        generation: unit.lease.generation,
        adapter: Some(adapter.into()),
        adapter_config,
        numbers: Some(numbers.into()),
        signature: Vec::new(),
        commitment: None,
    };
    let key = &context.client.identity().key;
    signing::sign_submission(key, &unit.lease.nonce, &mut request)?;

    let mut uploads = 0;
    let answer = loop {
        if !upload(context, unit, &weights, adapter).await? {
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
    Ok(true)
}

async fn upload(
    context: &Ctx,
    unit: &Unit,
    weights: &std::path::Path,
    adapter: BlobName,
) -> Result<bool, ClientError> {
    // Short patience inside: every silence is reported, and the wish to stop is seen soon.
    let client = context.client.with_patience(Duration::from_secs(2));
    let uploaded = context
        .patiently(&context.state.give_up, || {
            client.upload(weights, adapter, &unit.lease.id, &|_| ())
        })
        .await?;
    Ok(matches!(uploaded, Patient::Answer(())))
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

async fn hand_in_scores(
    context: &Ctx,
    unit: &Unit,
    sets: Vec<v1::SetScores>,
) -> Result<bool, ClientError> {
    let mut request = v1::SubmitScoresRequest {
        request_id: unit.saved().request_id.clone(),
        lease_id: unit.lease.id.clone(),
        generation: unit.lease.generation,
        sets,
        signature: Vec::new(),
    };
    signing::sign_scores(
        &context.client.identity().key,
        &unit.lease.nonce,
        &mut request,
    );
    let request = &request;
    let sent = context
        .patiently(&context.state.give_up, || {
            context.client.call_once(|mut to| {
                let request = request.clone();
                async move { to.work.submit_scores(request).await }
            })
        })
        .await?;
    if matches!(sent, Patient::Stopped) {
        // Scores are not kept: the lease runs out and another evaluator does them.
        eprintln!(
            "{}: not handed in; another evaluator will do it",
            unit.name()
        );
    }
    Ok(true)
}

async fn release(
    context: &Ctx,
    unit: &Unit,
    failed: bool,
    detail: &str,
) -> Result<bool, ClientError> {
    let request = v1::ReleaseLeaseRequest {
        lease_id: unit.lease.id.clone(),
        generation: unit.lease.generation,
        failed,
        detail: detail.chars().take(DETAIL_CHARS_MAX).collect(),
    };
    let request = &request;
    let released = context
        .patiently(&context.state.give_up, || {
            context.client.call_once(|mut to| {
                let request = request.clone();
                async move { to.work.release_lease(request).await }
            })
        })
        .await;
    match released {
        Ok(Patient::Answer(_)) if !failed => {
            eprintln!("{}: given back for another to do", unit.name());
            Ok(true)
        }
        // What cannot be given back runs out by itself.
        Ok(_) => Ok(true),
        Err(error) if is_lost(&error) => Ok(true),
        Err(error) => Err(error),
    }
}
