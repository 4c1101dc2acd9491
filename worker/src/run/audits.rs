//! Opening training states that an audit has drawn.

use std::path::{Path, PathBuf};
use std::time::Duration;

use cairn_proto::client::ClientError;
use cairn_proto::convert;
use cairn_proto::v1;
use cairn_stack::adapter::WEIGHTS_FILE;

use super::context::{Context, Ctx, Patient};
use super::kept::{Audit, Kept};
use crate::train::states::{Commitment, MOMENTS_FILE, state_dir};

/// What one answer to an audit takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// What is said.
    pub request: v1::RevealAuditRequest,
    /// Files that must have been uploaded for it.
    pub uploads: Vec<(PathBuf, v1::BlobRef)>,
}

/// The answer that opens a segment. The first state of all needs no upload: anybody can make it.
#[must_use]
pub fn answer(kept: &Kept, commitment: &Commitment, segment: u32) -> Option<Answer> {
    let first = usize::try_from(segment).ok()?;
    let start = commitment.revealed(first)?;
    let end = commitment.revealed(first.checked_add(1)?)?;
    let states = kept.states();
    let file = |state: &v1::RevealedState, name: &str| state_dir(&states, state.step).join(name);
    let mut uploads = vec![(file(&end, WEIGHTS_FILE), end.factors.clone()?)];
    if segment > 0 {
        uploads.push((file(&start, WEIGHTS_FILE), start.factors.clone()?));
        uploads.push((file(&start, MOMENTS_FILE), start.moments.clone()?));
    }
    Some(Answer {
        request: v1::RevealAuditRequest {
            submission_id: kept.id.clone(),
            start: Some(start),
            end: Some(end),
        },
        uploads,
    })
}

/// Opens a segment, unless that has been done: uploads its states and names them. Safe to repeat.
/// What stands in the way is said once.
pub async fn open(context: &Ctx, kept: &mut Kept, asked: &v1::AuditRequest) {
    let known = kept.info.audit;
    let audit = Audit::from(asked);
    if known.is_none_or(|known| known.segment != audit.segment) {
        kept.info.audit = Some(audit);
        kept.save();
    }
    let name = &kept.info.name;
    let Some(commitment) = kept.commitment() else {
        let line = format!("{name}: audited, but its training states are no longer here");
        return context.state.say_once(line);
    };
    let segments = commitment.states.len().saturating_sub(1);
    let Some(answer) = answer(kept, &commitment, audit.segment) else {
        let line = format!("{name}: audited, but there are only {segments} segments to open");
        return context.state.say_once(line);
    };
    let number = u64::from(audit.segment) + 1;
    let line = format!("{name}: audited: opening segment {number} of {segments}");
    context.state.say_once(line);
    match send(context, kept, &answer).await {
        Ok(true) => {
            kept.info.audit = Some(Audit {
                opened: true,
                ..audit
            });
            kept.save();
            let line = format!(
                "{name}: segment {number} of {segments} is open; an evaluator trains it again"
            );
            context.state.say_once(line);
        }
        Ok(false) => (),
        Err(error) => {
            let line = format!("{name}: segment {number} could not be opened: {error}");
            context.state.say_once(line);
        }
    }
}

/// Opens what earlier answers asked for and has not been opened, before the program ends.
pub async fn finish(context: &Ctx) {
    let worker_id = &context.client.identity().worker_id;
    for mut kept in Kept::all(&context.submitted, worker_id) {
        // Once it is judged, its states are gone and nobody asks for them.
        let waiting = kept.info.audit.filter(|audit| !audit.opened);
        if let Some(audit) = waiting.filter(|_| kept.states().exists()) {
            let asked = v1::AuditRequest {
                segment: audit.segment,
                until_ms: audit.until_ms,
            };
            open(context, &mut kept, &asked).await;
        }
    }
}

async fn send(context: &Ctx, kept: &Kept, answer: &Answer) -> Result<bool, ClientError> {
    for (path, blob) in &answer.uploads {
        if !upload(context, path, blob, &kept.info.lease_id).await? {
            return Ok(false);
        }
    }
    let request = &answer.request;
    let sent = context
        .patiently(&context.state.give_up, || {
            context.client.call_once(|mut to| {
                let request = request.clone();
                async move { to.work.reveal_audit(request).await }
            })
        })
        .await?;
    Ok(matches!(sent, Patient::Answer(_)))
}

/// Uploads a file under a lease, for as long as nobody gives up. Whether it arrived.
///
/// # Errors
/// As [`cairn_proto::client::Client::upload`].
pub async fn upload(
    context: &Context,
    path: &Path,
    blob: &v1::BlobRef,
    lease_id: &str,
) -> Result<bool, ClientError> {
    let blob = convert::blob("blob", Some(blob))?;
    // Short patience inside: every silence is reported, and the wish to stop is seen soon.
    let client = context.client.with_patience(Duration::from_secs(2));
    let uploaded = context
        .patiently(&context.state.give_up, || {
            client.upload(path, blob, lease_id, &|_| ())
        })
        .await?;
    Ok(matches!(uploaded, Patient::Answer(())))
}
