//! The third stage: hands results in and ends the unit.

use tokio::sync::mpsc;

use cairn_proto::client::ClientError;
use cairn_proto::limits::DETAIL_CHARS_MAX;
use cairn_proto::reason::ErrorReason;
use cairn_proto::{signing, v1};

use super::context::{Ctx, Patient};
use super::renew::is_lost;
use super::unit::{Outcome, Unit};
use super::work::Worked;
use super::{findings, hand_in};
use crate::error::WorkerError;
use crate::limits::{TROUBLE_PAUSE, TROUBLE_PAUSE_MAX};

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
        Outcome::Trained(numbers) => hand_in::hand_in(context, unit, numbers).await,
        Outcome::Scored(sets) => hand_in_scores(context, unit, sets).await,
        Outcome::Found(found) => findings::hand_in(context, unit, found).await,
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
