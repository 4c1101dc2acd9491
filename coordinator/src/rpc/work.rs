//! `cairn.v1.WorkService`.
use std::time::Duration;

use cairn_proto::convert::{self, BlobName};
use cairn_proto::limits::{EVAL_RECORDS_MAX, EVAL_SETS_MAX};
use cairn_proto::signing::{verify_scores, verify_submission};
use cairn_proto::v1;
use cairn_proto::v1::work_service_server::WorkService;
use tonic::{Request, Response, Status};

use super::auth::caller;
use super::dataset::chunk_to_wire;
use super::model::file_to_wire;
use crate::app::App;
use crate::db::submissions::Numbers;
use crate::domain::plan::Range;
use crate::domain::statistics::Scores;
use crate::error::Error;
use crate::ids::{Generation, LeaseId, RequestId};
use crate::ops::claim_work::{Assignment, EvalSet, Task, WeightedAdapter, claim_work};
use crate::ops::release_lease::release_lease;
use crate::ops::renew_lease::renew_lease;
use crate::ops::submit_adapter::{NewAdapter, submit_adapter};
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
            audit: None,
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
        _: Request<v1::SubmitFindingsRequest>,
    ) -> Result<Response<v1::SubmitFindingsResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn reveal_audit(
        &self,
        _: Request<v1::RevealAuditRequest>,
    ) -> Result<Response<v1::RevealAuditResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }
}

fn adapter_from_wire(request: &v1::SubmitAdapterRequest) -> Result<NewAdapter, Error> {
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

/// A lease with its work as the wire spells it.
#[must_use]
pub fn lease_to_wire(assignment: Assignment) -> v1::Lease {
    let lease = assignment.lease;
    let round_id = lease.round.to_string();
    let base_commit = assignment.base_commit.to_string();
    let base_files = assignment
        .base_files
        .into_iter()
        .map(file_to_wire)
        .collect();
    let work = match assignment.task {
        Task::Train {
            shard,
            records,
            recipe,
            adapter_bytes_max,
        } => v1::lease::Work::Train(v1::TrainWork {
            round_id,
            shard,
            base_commit,
            base_files,
            records: records.iter().map(range_to_wire).collect(),
            recipe,
            adapter_bytes_max,
            carry: None,
            segments: 0,
        }),
        Task::Evaluate {
            evaluation,
            adapters,
            sets,
            sequence_length,
        } => v1::lease::Work::Evaluate(v1::EvaluateWork {
            round_id,
            evaluation_id: evaluation.to_string(),
            base_commit,
            base_files,
            adapters: adapters.into_iter().map(adapter_to_wire).collect(),
            sets: sets.into_iter().map(set_to_wire).collect(),
            sequence_length,
        }),
    };
    v1::Lease {
        id: lease.id.to_string(),
        nonce: lease.nonce,
        generation: lease.generation.0,
        expires_ms: lease.expires.0,
        work: Some(work),
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
        records: Vec::new(),
    }
}
