//! `cairn.v1.VolunteerService`.
use cairn_proto::signing::verify_submission;
use cairn_proto::v1;
use cairn_proto::v1::volunteer_service_server::VolunteerService;
use tonic::{Request, Response, Status};

use super::auth::{Role, caller};
use super::pages;
use super::round::{Sight, contribution_to_wire, time_and_id};
use super::work::{adapter_from_wire, audit_to_wire};
use crate::app::App;
use crate::caller::Caller;
use crate::db::restored::Restored;
use crate::ops::read_standing::{Own, OwnSubmission, get_standing, list_submissions};
use crate::ops::restore_submission::restore_submission;

/// The service.
pub struct Volunteers(pub App);

#[tonic::async_trait]
impl VolunteerService for Volunteers {
    async fn get_standing(
        &self,
        request: Request<v1::GetStandingRequest>,
    ) -> Result<Response<v1::GetStandingResponse>, Status> {
        let caller = caller(&request)?;
        let standing = get_standing(&self.0, &caller).await?;
        let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let role = match caller.role {
            Role::Volunteer => v1::Role::Volunteer,
            Role::Evaluator => v1::Role::Evaluator,
            Role::Maintainer => v1::Role::Maintainer,
        };
        Ok(Response::new(v1::GetStandingResponse {
            worker_id: caller.worker.to_string(),
            display_name: caller.name,
            role: role.into(),
            accepted: small(standing.counts.accepted),
            rejected: small(standing.counts.rejected),
            pending: small(standing.counts.pending),
            credit_tokens: standing.counts.credit_tokens,
            strikes: standing.strikes,
            audit_share: standing.audit_share,
        }))
    }

    async fn list_submissions(
        &self,
        request: Request<v1::ListSubmissionsRequest>,
    ) -> Result<Response<v1::ListSubmissionsResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let size = pages::page_size(request.page_size)?;
        let after = time_and_id(&request.page_token)?;
        let rows = list_submissions(&self.0, &caller, after, size + 1).await?;
        let (rows, next_page_token) = pages::cut(rows, size, |row| {
            let (created, id) = row.place();
            format!("{created} {id}")
        });
        let submissions = rows
            .into_iter()
            .map(|row| own_to_wire(row, &caller))
            .collect();
        Ok(Response::new(v1::ListSubmissionsResponse {
            submissions,
            next_page_token,
        }))
    }

    async fn restore_submission(
        &self,
        request: Request<v1::RestoreSubmissionRequest>,
    ) -> Result<Response<v1::RestoreSubmissionResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let receipt = request.receipt.unwrap_or_default();
        let submission = request.submission.unwrap_or_default();
        let new = adapter_from_wire(&submission)?;
        let key = caller.public_key.to_bytes();
        let verify = |nonce: &[u8]| verify_submission(&key, nonce, &submission);
        let restored = restore_submission(&self.0, &caller, &receipt, &new, verify).await?;
        Ok(Response::new(v1::RestoreSubmissionResponse { restored }))
    }
}

fn own_to_wire(own: OwnSubmission, caller: &Caller) -> v1::OwnSubmission {
    let (round_id, contribution) = match &own.what {
        Own::Submission(submission) => (
            submission.round.to_string(),
            contribution_to_wire(submission, Sight::of(caller, submission)),
        ),
        Own::Restored(restored) => (
            restored.round.to_string(),
            restored_to_wire(restored, caller),
        ),
    };
    v1::OwnSubmission {
        round_id,
        contribution: Some(contribution),
        receipt: Some(v1::Receipt {
            statement: own.statement.into_bytes(),
            signature: own.signature,
        }),
        audit: own.audit.as_ref().map(audit_to_wire),
    }
}

fn restored_to_wire(restored: &Restored, caller: &Caller) -> v1::Contribution {
    let verdict = if restored.verdict == "accepted" {
        v1::Verdict::Accepted
    } else {
        v1::Verdict::Rejected
    };
    let detail = "the coordinator lost it and has its receipt back; it is not judged any more";
    v1::Contribution {
        id: restored.id.to_string(),
        worker_id: restored.worker.to_string(),
        worker: caller.name.clone(),
        shard: restored.shard,
        verdict: verdict.into(),
        reason: restored.reason.clone(),
        detail: detail.to_owned(),
        adapter_digest: restored.adapter.digest.to_string(),
        submitted_ms: restored.created.0,
        ..v1::Contribution::default()
    }
}
