//! Handing in again what a coordinator, restored from an old backup, acknowledged and forgot.

use cairn_proto::client::ClientError;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use cairn_stack::adapter::WEIGHTS_FILE;

use super::audits::upload;
use super::context::{Ctx, Patient};
use super::kept::Kept;
use crate::receipts;

/// How often an adapter that vanished between upload and hand-in is uploaded again.
const UPLOADS_MAX: u32 = 3;

/// Hands a kept submission in again with its receipt. Safe to repeat; what the coordinator does not
/// take back is said, noted, and not asked again.
pub async fn restore(context: &Ctx, kept: &mut Kept) {
    let name = kept.info.name.clone();
    let stored = receipts::read(&context.receipts, &kept.id);
    let (Some(receipt), Some(submission)) = (stored, kept.request()) else {
        return;
    };
    let line = format!(
        "{name}: the coordinator has lost submission {}; handing it in again with its receipt",
        kept.id
    );
    context.state.say_once(line);
    let request = v1::RestoreSubmissionRequest {
        receipt: Some(receipt.newest()),
        submission: Some(submission),
    };
    let line = match send(context, kept, &request).await {
        Ok(Some(answer)) if answer.restored => format!("{name}: taken back by the coordinator"),
        Ok(Some(_)) => {
            // Not listed, and not lost: there is nothing more to hear of it.
            kept.info.refused = Some("the coordinator has it and does not judge it".to_owned());
            kept.save();
            format!("{name}: the coordinator has it, and does not judge it any more")
        }
        Ok(None) => return,
        Err(error) => {
            let line = format!("{name}: not taken back: {error}");
            if !error.retry() {
                kept.info.refused = Some(error.to_string());
                kept.save();
            }
            line
        }
    };
    context.state.say_once(line);
}

async fn send(
    context: &Ctx,
    kept: &Kept,
    request: &v1::RestoreSubmissionRequest,
) -> Result<Option<v1::RestoreSubmissionResponse>, ClientError> {
    let mut uploads = 0;
    loop {
        let sent = context
            .patiently(&context.state.give_up, || {
                context.client.call_once(|mut to| {
                    let request = request.clone();
                    async move { to.volunteer.restore_submission(request).await }
                })
            })
            .await;
        let blob = request.submission.as_ref().and_then(|s| s.adapter.as_ref());
        match (sent, blob) {
            (Ok(Patient::Answer(answer)), _) => return Ok(Some(answer)),
            (Ok(Patient::Stopped), _) => return Ok(None),
            // The receipt is believed; now its adapter may come.
            (Err(error), Some(blob))
                if error.reason() == Some(ErrorReason::BlobMissing) && uploads < UPLOADS_MAX =>
            {
                let weights = kept.adapter().join(WEIGHTS_FILE);
                if !upload(context, &weights, blob, &kept.info.lease_id).await? {
                    return Ok(None);
                }
                uploads += 1;
            }
            (Err(error), _) => return Err(error),
        }
    }
}
