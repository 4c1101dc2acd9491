//! Evaluators' work that is not scoring: guides and replays; and handing findings in.

use cairn_proto::client::ClientError;
use cairn_proto::convert::BlobName;
use cairn_proto::v1::submit_findings_request::Findings;
use cairn_proto::{signing, v1};
use cairn_stack::adapter::{CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::digest::Digest;

use super::audits::upload;
use super::context::{Context, Ctx, Patient};
use super::fetch::Materials;
use super::training::{Watched, shard};
use super::unit::{ADAPTER_FOLDER, Outcome, Unit};
use super::work::Desk;
use crate::limits::DISTANCE_BROKEN;
use crate::train::{
    GuideJob, ReplayError, ReplayJob, ReplayReport, StartState, TrainError, guide as train_guide,
    replay as train_again,
};

/// Trains a guide into the unit's folder. Blocking.
pub fn guide(
    context: &Context,
    unit: &Unit,
    work: &v1::GuideWork,
    materials: &Materials,
    desk: &mut Desk,
) -> Outcome {
    let train = work.train.clone().unwrap_or_default();
    let shard = match shard(context, unit, &train, materials, desk) {
        Ok(shard) => shard,
        Err(outcome) => return outcome,
    };
    let mut watched = Watched::new(unit);
    let result = train_guide(
        &shard.model.loaded,
        GuideJob {
            examples: &shard.examples,
            recipe: &shard.recipe,
            initial: None,
            carry: shard.carry.as_deref(),
            teacher: shard.teacher,
            steps: work.steps,
            out_dir: &unit.dir.join(ADAPTER_FOLDER),
            on_progress: &mut |progress| watched.show(progress),
            cancel: &unit.cancel,
        },
    );
    watched.finish();
    match result.and_then(|_| guide_findings(unit)) {
        Ok(findings) => Outcome::Found(Findings::Guide(findings)),
        Err(TrainError::Cancelled { .. }) => Outcome::Stopped,
        Err(error @ (TrainError::Write(_) | TrainError::Hash(_) | TrainError::Memory { .. })) => {
            Outcome::Trouble(format!("keep the guide: {error}"))
        }
        Err(error) => Outcome::Failed(format!("train a guide: {error}")),
    }
}

fn guide_findings(unit: &Unit) -> Result<v1::GuideFindings, TrainError> {
    let folder = unit.dir.join(ADAPTER_FOLDER);
    let (digest, size_bytes) =
        Digest::of_file(&folder.join(WEIGHTS_FILE)).map_err(TrainError::Hash)?;
    let adapter_config = std::fs::read(folder.join(CONFIG_FILE)).map_err(TrainError::Hash)?;
    Ok(v1::GuideFindings {
        adapter: Some(BlobName { digest, size_bytes }.into()),
        adapter_config,
    })
}

/// Trains a segment of a submission again. Blocking.
pub fn replay(
    context: &Context,
    unit: &Unit,
    work: &v1::ReplayWork,
    materials: &Materials,
    desk: &mut Desk,
) -> Outcome {
    let Some(opened) = &materials.opened else {
        return Outcome::Failed("the replay names no state".to_owned());
    };
    let train = work.train.clone().unwrap_or_default();
    let shard = match shard(context, unit, &train, materials, desk) {
        Ok(shard) => shard,
        Err(outcome) => return outcome,
    };
    let start = opened.start.as_ref();
    let start = start.map(|(factors, moments)| StartState { factors, moments });
    let mut watched = Watched::new(unit);
    let result = train_again(
        &shard.model.loaded,
        ReplayJob {
            examples: &shard.examples,
            recipe: &shard.recipe,
            initial: None,
            carry: shard.carry.as_deref(),
            teacher: shard.teacher,
            segments: train.segments,
            start,
            first_step: u64::from(work.first_step),
            last_step: u64::from(work.last_step),
            end_factors: &opened.end,
            on_progress: &mut |progress| watched.show(progress),
            cancel: &unit.cancel,
        },
    );
    watched.finish();
    let report = match result {
        Ok(report) => report,
        Err(ReplayError::Cancelled) => return Outcome::Stopped,
        Err(error) if error.is_claim() => {
            // The volunteer's fault, not this machine's: an answer.
            eprintln!("{}: {error}", unit.name());
            ReplayReport {
                distance: f64::INFINITY,
                identical: false,
                steps: 0,
                seconds: 0.0,
            }
        }
        Err(error @ ReplayError::Memory(_)) => {
            return Outcome::Trouble(format!("train the segment again: {error}"));
        }
        Err(error) => return Outcome::Failed(format!("train the segment again: {error}")),
    };
    let distance = report.distance.min(DISTANCE_BROKEN);
    let line = match (report.identical, distance >= DISTANCE_BROKEN) {
        (true, _) => "the same bit for bit".to_owned(),
        (_, true) => "nothing like what was opened".to_owned(),
        _ => format!("off by {distance:.2e} of what the segment moved"),
    };
    eprintln!("{}: {line} ({:.1} s)", unit.name(), report.seconds);
    Outcome::Found(Findings::Replay(v1::ReplayFindings {
        distance,
        identical: report.identical,
        device: context.device().to_string(),
        seconds: report.seconds,
    }))
}

/// Hands findings in; a guide's adapter is uploaded before.
///
/// # Errors
/// When the coordinator refuses.
pub async fn hand_in(context: &Ctx, unit: &Unit, findings: Findings) -> Result<bool, ClientError> {
    if let Findings::Guide(guide) = &findings {
        let weights = unit.dir.join(ADAPTER_FOLDER).join(WEIGHTS_FILE);
        let blob = guide.adapter.clone().unwrap_or_default();
        if !upload(context, &weights, &blob, &unit.lease.id).await? {
            return Ok(gave_up(unit));
        }
    }
    let mut request = v1::SubmitFindingsRequest {
        request_id: unit.saved().request_id.clone(),
        lease_id: unit.lease.id.clone(),
        generation: unit.lease.generation,
        findings: Some(findings),
        signature: Vec::new(),
    };
    let key = &context.client.identity().key;
    signing::sign_findings(key, &unit.lease.nonce, &mut request);
    let request = &request;
    let sent = context
        .patiently(&context.state.give_up, || {
            context.client.call_once(|mut to| {
                let request = request.clone();
                async move { to.work.submit_findings(request).await }
            })
        })
        .await?;
    Ok(match sent {
        Patient::Answer(_) => true,
        Patient::Stopped => gave_up(unit),
    })
}

/// Findings are not kept: the lease runs out and another evaluator does them.
fn gave_up(unit: &Unit) -> bool {
    let name = unit.name();
    eprintln!("{name}: not handed in; another evaluator will do it");
    true
}
