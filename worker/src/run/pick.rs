//! The first stage: takes up what an earlier run left, then claims, and fetches what is needed.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use cairn_proto::limits::CLAIM_WAIT_MAX;
use cairn_proto::v1;

use super::context::{Ctx, Patient};
use super::fetch::{Materials, Stop, fetch};
use super::fit;
use super::ready::{self, Patience, Settle};
use super::renew;
use super::unit::{Outcome, Unit};
use super::work::Prepared;
use crate::clock::Stopwatch;
use crate::error::WorkerError;
use crate::limits::DEVICE_AGAIN;

/// Runs until the wish to stop. What was trained already is handed in first; nothing else is done
/// before there is a device that computes what it should.
///
/// # Errors
/// When the coordinator no longer takes this identity, or the home cannot be used.
pub async fn run(
    context: Ctx,
    permits: Arc<Semaphore>,
    to_work: mpsc::Sender<Prepared>,
    settle: Settle,
) -> Result<(), WorkerError> {
    let worker_id = context.client.identity().worker_id.clone();
    let (trained, untrained): (Vec<Unit>, Vec<Unit>) = Unit::unfinished(&context.work, &worker_id)
        .into_iter()
        .partition(|unit| unit.saved().trained.is_some());
    if !go_on(&context, trained, &permits, &to_work).await?
        || !device(&context, &settle).await?
        || !go_on(&context, untrained, &permits, &to_work).await?
    {
        return Ok(());
    }
    let mut idle = Idle::new();
    while let Some(permit) = permit(&context, &permits).await {
        let Some(lease) = claim(&context, &mut idle).await? else {
            return Ok(());
        };
        let mut unit = Unit::claimed(&context.work, lease, &worker_id)?;
        unit.permit = Some(permit);
        let unit = Arc::new(unit);
        eprintln!("claimed {}", unit.name());
        renew::spawn(&context, &unit);
        let prepared = prepare(&context, unit).await;
        if to_work.send(prepared).await.is_err() || context.once {
            return Ok(());
        }
        idle = Idle::new();
    }
    Ok(())
}

/// Waits for a device to work on; false when it is time to leave.
async fn device(context: &Ctx, settle: &Settle) -> Result<bool, WorkerError> {
    let patience = Patience {
        again: DEVICE_AGAIN,
        once: context.once,
        leave_after: context.exit_when_idle,
    };
    let stop = &context.state.soft;
    let found = ready::device(&context.device_note, patience, stop, settle).await?;
    match found {
        Some(name) => {
            let _ = context.state.device.set(name);
        }
        None => context.state.soft.cancel(),
    }
    Ok(found.is_some())
}

/// Takes up units of an earlier run; false when stopping.
async fn go_on(
    context: &Ctx,
    units: Vec<Unit>,
    permits: &Arc<Semaphore>,
    to_work: &mpsc::Sender<Prepared>,
) -> Result<bool, WorkerError> {
    for unit in units {
        let Some(permit) = permit(context, permits).await else {
            return Ok(false);
        };
        if let Some(prepared) = take_up(context, unit, permit).await?
            && to_work.send(prepared).await.is_err()
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Waits until no other unit is in hand; `None` when stopping.
async fn permit(context: &Ctx, permits: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    if context.state.soft.is_cancelled() {
        return None;
    }
    tokio::select! {
        permit = permits.clone().acquire_owned() => permit.ok(),
        () = context.state.soft.cancelled() => None,
    }
}

/// Goes on with work of an earlier run, if its lease is still ours.
async fn take_up(
    context: &Ctx,
    mut unit: Unit,
    permit: OwnedSemaphorePermit,
) -> Result<Option<Prepared>, WorkerError> {
    unit.permit = Some(permit);
    let trained = unit.saved().trained.clone();
    if let Some(numbers) = trained {
        eprintln!(
            "{}: trained before the last stop; handing it in",
            unit.name()
        );
        let unit = Arc::new(unit);
        renew::spawn(context, &unit);
        return Ok(Some(Prepared {
            unit,
            materials: Err(Outcome::Trained(numbers)),
        }));
    }
    let renewed = context
        .patiently(&context.state.soft, || renew::renew(context, &unit))
        .await;
    match renewed {
        Ok(Patient::Answer(expires_ms)) => {
            eprintln!("{}: the lease is still ours; going on", unit.name());
            unit.lease.expires_ms = expires_ms;
            let unit = Arc::new(unit);
            renew::spawn(context, &unit);
            Ok(Some(prepare(context, unit).await))
        }
        Ok(Patient::Stopped) => Ok(None),
        Err(error) if renew::is_lost(&error) => {
            eprintln!(
                "{}: given to another while this machine was away",
                unit.name()
            );
            unit.forget();
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// How long there has been nothing to do.
struct Idle {
    since: Stopwatch,
    said: bool,
}

impl Idle {
    fn new() -> Self {
        Self {
            since: Stopwatch::start(),
            said: false,
        }
    }
}

/// Waits for a lease; `None` when stopping.
async fn claim(context: &Ctx, idle: &mut Idle) -> Result<Option<v1::Lease>, WorkerError> {
    loop {
        let left = context
            .exit_when_idle
            .map(|limit| limit.saturating_sub(Duration::from_secs_f64(idle.since.seconds())));
        if left.is_some_and(|left| left.is_zero()) {
            eprintln!("no work for a while; leaving");
            context.state.soft.cancel();
            return Ok(None);
        }
        let wait = left.unwrap_or(CLAIM_WAIT_MAX).min(CLAIM_WAIT_MAX);
        let request = v1::ClaimWorkRequest {
            wait_ms: i64::try_from(wait.as_millis()).unwrap_or(i64::MAX).max(1),
        };
        let waited = Stopwatch::start();
        let claimed = context
            .patiently(&context.state.soft, || {
                context
                    .client
                    .call_once(move |mut to| async move { to.work.claim_work(request).await })
            })
            .await?;
        match claimed {
            Patient::Stopped => return Ok(None),
            Patient::Answer(v1::ClaimWorkResponse { lease: Some(lease) }) => {
                return Ok(Some(lease));
            }
            Patient::Answer(_) => (),
        }
        if !idle.said {
            eprintln!("waiting for work");
            idle.said = true;
        }
        // A coordinator that answers at once instead of waiting must not be hammered.
        if waited.seconds() < 1.0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Fetches what fits this machine; what does not is given back before it is downloaded.
async fn check_and_fetch(context: &Ctx, unit: &Unit) -> Result<Materials, Outcome> {
    let stopped = |stop| match stop {
        Stop::Lost => Outcome::Lost,
        Stop::Stopping => Outcome::Stopped,
        Stop::Error(error) => Outcome::Trouble(format!("fetch: {error}")),
    };
    fit::check(context, unit)
        .await
        .map_err(stopped)?
        .map_err(|reason| Outcome::Trouble(format!("too large for this machine: {reason}")))?;
    fetch(context, unit).await.map_err(stopped)
}

async fn prepare(context: &Ctx, unit: Arc<Unit>) -> Prepared {
    let materials = tokio::select! {
        fetched = check_and_fetch(context, &unit) => fetched,
        () = unit.lost.cancelled() => Err(Outcome::Lost),
    };
    Prepared { unit, materials }
}

#[cfg(test)]
#[path = "pick_tests.rs"]
mod tests;
