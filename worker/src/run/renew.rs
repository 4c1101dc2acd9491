//! Keeps one lease while its work goes on.

use std::sync::Arc;
use std::time::Duration;

use cairn_proto::client::ClientError;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;

use super::context::{Context, Ctx};
use super::unit::Unit;
use crate::clock;
use crate::limits::{FINISH_SECONDS, RENEW_MAX, RENEW_MIN};

/// Renews until the unit is over or the lease lost; on the wish to stop, puts down work that
/// would take long.
pub fn spawn(context: &Ctx, unit: &Arc<Unit>) {
    tokio::spawn(run(context.clone(), unit.clone()));
}

async fn run(context: Ctx, unit: Arc<Unit>) {
    let mut wait = pause(unit.lease.expires_ms);
    let mut stopping = false;
    loop {
        tokio::select! {
            () = unit.over.cancelled() => return,
            () = context.state.soft.cancelled(), if !stopping => {
                stopping = true;
                put_down_if_long(&unit);
                continue;
            }
            () = tokio::time::sleep(wait) => (),
        }
        match renew(&context, &unit).await {
            Ok(expires_ms) => {
                context.state.up();
                wait = pause(expires_ms);
            }
            Err(error) if is_lost(&error) => {
                // Handing in ends the lease too; then `over` is on its way.
                if !unit.over.is_cancelled() {
                    unit.lost.cancel();
                    unit.cancel.cancel();
                }
                return;
            }
            Err(error) => {
                if error.retry() {
                    context.state.down(&error);
                } else {
                    eprintln!("{}: the lease is not renewed: {error}", unit.name());
                }
                wait = (wait / 2).max(RENEW_MIN);
            }
        }
    }
}

fn put_down_if_long(unit: &Unit) {
    let left = unit.reported().eta_seconds;
    if left.is_none_or(|seconds| seconds > FINISH_SECONDS) {
        unit.cancel.cancel();
    }
}

/// Renews once; the new end of the lease.
///
/// # Errors
/// As [`cairn_proto::client::Client::call`].
pub async fn renew(context: &Context, unit: &Unit) -> Result<i64, ClientError> {
    let reported = unit.reported();
    let request = v1::RenewLeaseRequest {
        lease_id: unit.lease.id.clone(),
        generation: unit.lease.generation,
        step: u32::try_from(reported.step).unwrap_or(u32::MAX),
        steps: u32::try_from(reported.steps).unwrap_or(u32::MAX),
        loss: reported.loss.filter(|loss| loss.is_finite()),
    };
    let renewed = context
        .client
        .call_once(|mut to| {
            let request = request.clone();
            async move { to.work.renew_lease(request).await }
        })
        .await?;
    Ok(renewed.expires_ms)
}

/// Whether the answer means that the work is no longer ours.
pub fn is_lost(error: &ClientError) -> bool {
    matches!(
        error.reason(),
        Some(
            ErrorReason::LeaseLost
                | ErrorReason::LeaseExpired
                | ErrorReason::RoundEnded
                | ErrorReason::NotFound
        )
    )
}

/// A third of what is left. This machine's clock may be a day off, so the pause is kept within
/// bounds that suit any lease.
fn pause(expires_ms: i64) -> Duration {
    let left = u64::try_from(expires_ms.saturating_sub(clock::now_ms())).unwrap_or(0);
    Duration::from_millis(left / 3).clamp(RENEW_MIN, RENEW_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_fit_the_lease_and_survive_wrong_clocks() {
        let now = clock::now_ms();
        let pause_of = |left: i64| pause(now + left);
        assert!((9..=10).contains(&pause_of(30_000).as_secs()));
        assert_eq!(pause_of(86_400_000), RENEW_MAX);
        assert_eq!(pause_of(-86_400_000), RENEW_MIN);
        assert_eq!(pause(i64::MIN), RENEW_MIN);
    }
}
