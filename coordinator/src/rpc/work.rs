//! `cairn.v1.WorkService`.
use std::time::Duration;

use cairn_proto::convert::{self, BlobName};
use cairn_proto::limits::{EVAL_RECORDS_MAX, EVAL_SETS_MAX};
use cairn_proto::signing::{verify_findings, verify_scores, verify_submission};
use cairn_proto::v1;
use cairn_proto::v1::work_service_server::WorkService;
use cairn_stack::merkle::{Hash, PROOF_NODES_MAX};
use tonic::{Request, Response, Status};

use super::auth::caller;
use super::dataset::chunk_to_wire;
use super::model::file_to_wire;
use crate::app::App;
use crate::db::submissions::Numbers;
use crate::domain::audit::{Audit, Commitment, File, State};
use crate::domain::plan::Range;
use crate::domain::statistics::Scores;
use crate::error::Error;
use crate::ids::{Generation, LeaseId, RequestId, SubmissionId};
use crate::ops::claim_work::eval_sets::EvalSet;
use crate::ops::claim_work::{
    Assignment, EvaluateTask, Task, TrainTask, WeightedAdapter, claim_work,
};
use crate::ops::release_lease::release_lease;
use crate::ops::renew_lease::renew_lease;
use crate::ops::reveal_audit::{Revealed, reveal_audit};
use crate::ops::submit_adapter::{NewAdapter, submit_adapter};
use crate::ops::submit_findings::{NewFindings, submit_findings};
use crate::ops::submit_scores::{SetScores, submit_scores};

/// The service.
pub struct Work(pub App);

#[tonic::async_trait]
impl WorkService for Work {
    async fn claim_work(
        &self,
        request: Request<v1::ClaimWorkRequest>,
    ) -> Result<Response<v1::ClaimWorkResponse>, Status> {
        let caller = caller(&request)?;
        let wait_ms = u64::try_from(request.get_ref().wait_ms)
            .map_err(|_| Error::invalid("wait_ms", "must not be negative"))?;
        let claimed = claim_work(&self.0, &caller, Duration::from_millis(wait_ms)).await?;
        Ok(Response::new(v1::ClaimWorkResponse {
            lease: claimed.map(lease_to_wire),
        }))
    }

    async fn renew_lease(
        &self,
        request: Request<v1::RenewLeaseRequest>,
    ) -> Result<Response<v1::RenewLeaseResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let id = LeaseId::from_field("lease_id", &request.lease_id)?;
        let generation = Generation(request.generation);
        let progress = (request.step, request.steps);
        let expires = renew_lease(&self.0, &caller, id, generation, progress).await?;
        Ok(Response::new(v1::RenewLeaseResponse {
            expires_ms: expires.0,
        }))
    }

    async fn release_lease(
        &self,
        request: Request<v1::ReleaseLeaseRequest>,
    ) -> Result<Response<v1::ReleaseLeaseResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let id = LeaseId::from_field("lease_id", &request.lease_id)?;
        let generation = Generation(request.generation);
        release_lease(
            &self.0,
            &caller,
            id,
            generation,
            request.failed,
            &request.detail,
        )
        .await?;
        Ok(Response::new(v1::ReleaseLeaseResponse {}))
    }

    async fn submit_adapter(
        &self,
        request: Request<v1::SubmitAdapterRequest>,
    ) -> Result<Response<v1::SubmitAdapterResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let new = adapter_from_wire(&request)?;
        let key = caller.public_key.to_bytes();
        let verify = |nonce: &[u8]| verify_submission(&key, nonce, &request);
        let done = submit_adapter(&self.0, &caller, new, verify).await?;
        let receipt = v1::Receipt {
            statement: done.statement,
            signature: done.signature,
        };
        Ok(Response::new(v1::SubmitAdapterResponse {
            submission_id: done.id.to_string(),
            receipt: Some(receipt),
            audit: done.audit.as_ref().map(audit_to_wire),
        }))
    }

    async fn submit_scores(
        &self,
        request: Request<v1::SubmitScoresRequest>,
    ) -> Result<Response<v1::SubmitScoresResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        RequestId::from_field("request_id", &request.request_id)?;
        let id = LeaseId::from_field("lease_id", &request.lease_id)?;
        let generation = Generation(request.generation);
        let sets = scores_from_wire(&request.sets)?;
        let key = caller.public_key.to_bytes();
        let verify = |nonce: &[u8]| verify_scores(&key, nonce, &request);
        submit_scores(&self.0, &caller, id, generation, sets, verify).await?;
        Ok(Response::new(v1::SubmitScoresResponse {}))
    }

    async fn submit_findings(
        &self,
        request: Request<v1::SubmitFindingsRequest>,
    ) -> Result<Response<v1::SubmitFindingsResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        RequestId::from_field("request_id", &request.request_id)?;
        let id = LeaseId::from_field("lease_id", &request.lease_id)?;
        let generation = Generation(request.generation);
        let findings = findings_from_wire(request.findings.as_ref())?;
        let key = caller.public_key.to_bytes();
        let verify = |nonce: &[u8]| verify_findings(&key, nonce, &request);
        submit_findings(&self.0, &caller, id, generation, findings, verify).await?;
        Ok(Response::new(v1::SubmitFindingsResponse {}))
    }

    async fn reveal_audit(
        &self,
        request: Request<v1::RevealAuditRequest>,
    ) -> Result<Response<v1::RevealAuditResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let id = SubmissionId::from_field("submission_id", &request.submission_id)?;
        let start = request
            .start
            .as_ref()
            .map(|state| state_from_wire("start", state));
        let end = request
            .end
            .as_ref()
            .ok_or_else(|| Error::invalid("end", "it is missing"))?;
        let revealed = Revealed {
            start: start.transpose()?,
            end: state_from_wire("end", end)?,
        };
        reveal_audit(&self.0, &caller, id, revealed).await?;
        Ok(Response::new(v1::RevealAuditResponse {}))
    }
}

/// An audit that waits to be answered.
#[must_use]
pub fn audit_to_wire(audit: &Audit) -> v1::AuditRequest {
    v1::AuditRequest {
        segment: audit.segment,
        until_ms: audit.until_ms,
    }
}

fn commitment_from_wire(wire: &v1::TrainCommitment) -> Result<Commitment, Error> {
    let last = wire
        .last
        .as_ref()
        .ok_or_else(|| Error::invalid("commitment", "it has no last state"))?;
    Ok(Commitment {
        root: hash_from_wire("commitment", &wire.root)?,
        leaves: wire.leaves,
        last: state_from_wire("commitment", last)?,
    })
}

fn state_from_wire(field: &'static str, wire: &v1::RevealedState) -> Result<State, Error> {
    if wire.proof.len() > PROOF_NODES_MAX {
        let text = format!("a proof has at most {PROOF_NODES_MAX} nodes");
        return Err(Error::invalid(field, text));
    }
    let file = |blob: Option<&v1::BlobRef>| -> Result<File, Error> {
        let name = convert::blob(field, blob)?;
        Ok(File {
            digest: name.digest,
            size_bytes: name.size_bytes,
        })
    };
    let node = |node: &Vec<u8>| hash_from_wire(field, node);
    Ok(State {
        step: wire.step,
        factors: file(wire.factors.as_ref())?,
        moments: file(wire.moments.as_ref())?,
        proof: wire.proof.iter().map(node).collect::<Result<_, _>>()?,
    })
}

fn hash_from_wire(field: &'static str, bytes: &[u8]) -> Result<Hash, Error> {
    bytes
        .try_into()
        .map_err(|_| Error::invalid(field, "a hash has 32 bytes"))
}

/// A submission as the wire spells it.
pub(super) fn adapter_from_wire(request: &v1::SubmitAdapterRequest) -> Result<NewAdapter, Error> {
    let numbers = request.numbers.clone().unwrap_or_default();
    Ok(NewAdapter {
        request: RequestId::from_field("request_id", &request.request_id)?,
        lease: LeaseId::from_field("lease_id", &request.lease_id)?,
        generation: Generation(request.generation),
        adapter: convert::blob("adapter", request.adapter.as_ref())?,
        config: request.adapter_config.clone(),
        numbers: Numbers {
            steps: numbers.steps,
            tokens: numbers.tokens,
            scored_tokens: numbers.scored_tokens,
            seconds: numbers.seconds,
            first_loss: numbers.first_loss,
            last_loss: numbers.last_loss,
            device: numbers.device,
        },
        signature: request.signature.clone(),
        commitment: request
            .commitment
            .as_ref()
            .map(commitment_from_wire)
            .transpose()?,
    })
}

fn scores_from_wire(sets: &[v1::SetScores]) -> Result<Vec<SetScores>, Error> {
    let records: usize = sets
        .iter()
        .map(|set| set.nll.len().max(set.tokens.len()))
        .sum();
    if sets.len() > EVAL_SETS_MAX || records > EVAL_RECORDS_MAX {
        let text = format!("at most {EVAL_SETS_MAX} sets and {EVAL_RECORDS_MAX} records");
        return Err(Error::invalid("sets", text));
    }
    let one = |set: &v1::SetScores| SetScores {
        dataset: set.dataset.clone(),
        scores: Scores {
            nll: set.nll.clone(),
            tokens: set.tokens.clone(),
        },
    };
    Ok(sets.iter().map(one).collect())
}

fn findings_from_wire(
    wire: Option<&v1::submit_findings_request::Findings>,
) -> Result<NewFindings, Error> {
    use v1::submit_findings_request::Findings;
    Ok(match wire {
        Some(Findings::Guide(guide)) => NewFindings::Guide {
            adapter: convert::blob("adapter", guide.adapter.as_ref())?,
            config: guide.adapter_config.clone(),
        },
        Some(Findings::Replay(replay)) => NewFindings::Replay {
            distance: replay.distance,
            identical: replay.identical,
            device: replay.device.clone(),
            seconds: replay.seconds,
        },
        Some(Findings::Learn(learn)) => NewFindings::Learn {
            weights: learn.weights.clone(),
            loss_before: learn.loss_before,
            loss_after: learn.loss_after,
        },
        None => return Err(Error::invalid("findings", "there are none")),
    })
}

/// What every kind of work names: the round and its base.
struct Base {
    round_id: String,
    base_commit: String,
    base_files: Vec<v1::File>,
}

/// A lease with its work as the wire spells it.
#[must_use]
pub fn lease_to_wire(assignment: Assignment) -> v1::Lease {
    let lease = assignment.lease;
    let files = assignment.base_files.into_iter().map(file_to_wire);
    let base = Base {
        round_id: lease.round.to_string(),
        base_commit: assignment.base_commit.to_string(),
        base_files: files.collect(),
    };
    v1::Lease {
        id: lease.id.to_string(),
        nonce: lease.nonce,
        generation: lease.generation.0,
        expires_ms: lease.expires.0,
        work: Some(task_to_wire(assignment.task, base)),
    }
}

fn task_to_wire(task: Task, base: Base) -> v1::lease::Work {
    use v1::lease::Work;
    match task {
        Task::Train(train) => Work::Train(train_to_wire(train, base)),
        Task::Evaluate(evaluate) => Work::Evaluate(evaluate_to_wire(evaluate, base)),
        Task::Guide { train, steps } => Work::Guide(v1::GuideWork {
            train: Some(train_to_wire(train, base)),
            steps,
        }),
        Task::Replay(replay) => {
            let (start, moments) = replay.start.unzip();
            Work::Replay(v1::ReplayWork {
                submission_id: replay.submission.to_string(),
                train: Some(train_to_wire(replay.train, base)),
                first_step: replay.first_step,
                last_step: replay.last_step,
                start_state: start.map(v1::BlobRef::from),
                end_factors: Some(replay.end.into()),
                start_moments: moments.map(v1::BlobRef::from),
            })
        }
        Task::Learn { evaluate, steps } => Work::Learn(v1::LearnWork {
            evaluate: Some(evaluate_to_wire(evaluate, base)),
            steps,
        }),
    }
}

fn train_to_wire(train: TrainTask, base: Base) -> v1::TrainWork {
    v1::TrainWork {
        round_id: base.round_id,
        shard: train.shard,
        base_commit: base.base_commit,
        base_files: base.base_files,
        records: train.records.iter().map(range_to_wire).collect(),
        recipe: train.recipe,
        adapter_bytes_max: train.adapter_bytes_max,
        carry: train.carry.map(adapter_to_wire),
        segments: train.segments,
        teacher: train.teacher.map(|teacher| v1::Teacher {
            commit: teacher.checkpoint.commit.to_string(),
            files: teacher.files.into_iter().map(file_to_wire).collect(),
        }),
    }
}

fn evaluate_to_wire(evaluate: EvaluateTask, base: Base) -> v1::EvaluateWork {
    v1::EvaluateWork {
        round_id: base.round_id,
        evaluation_id: evaluate.evaluation.to_string(),
        base_commit: base.base_commit,
        base_files: base.base_files,
        adapters: evaluate.adapters.into_iter().map(adapter_to_wire).collect(),
        sets: evaluate.sets.into_iter().map(set_to_wire).collect(),
        sequence_length: evaluate.sequence_length,
        dpo_beta: evaluate.dpo_beta,
    }
}

fn range_to_wire(range: &Range) -> v1::RecordRange {
    let blob = BlobName {
        digest: range.chunk,
        size_bytes: range.size_bytes,
    };
    v1::RecordRange {
        chunk: Some(v1::Chunk {
            blob: Some(blob.into()),
            records: range.records,
        }),
        first: range.first,
        count: range.count,
    }
}

fn adapter_to_wire(adapter: WeightedAdapter) -> v1::WeightedAdapter {
    v1::WeightedAdapter {
        weights: Some(adapter.weights.into()),
        config: adapter.config.into_bytes(),
        weight: adapter.weight,
    }
}

fn set_to_wire(set: EvalSet) -> v1::EvalSet {
    v1::EvalSet {
        dataset: set.dataset,
        set: super::dataset::set_to_wire(set.kind).into(),
        chunks: set.chunks.into_iter().map(chunk_to_wire).collect(),
        records: set.ranges.iter().map(range_to_wire).collect(),
    }
}
