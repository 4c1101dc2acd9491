//! `cairn.v1.ContributionService`.
use cairn_proto::v1;
use cairn_proto::v1::contribution_service_server::ContributionService;
use tonic::{Request, Response, Status};

use super::auth::caller;
use super::model::checkpoint_to_wire;
use super::pages;
use super::round::{Sight, contribution_to_wire, time_and_id};
use crate::app::App;
use crate::ids::{RequestId, SubmissionId};
use crate::ops::read_contributions::{
    RefoldView, RevocationView, get_contribution, list_revocations,
};
use crate::ops::revoke_contribution::{NewRevocation, revoke_contribution};
use crate::ops::void_strike::void_strike;

/// The service.
pub struct Contributions(pub App);

#[tonic::async_trait]
impl ContributionService for Contributions {
    async fn get_contribution(
        &self,
        request: Request<v1::GetContributionRequest>,
    ) -> Result<Response<v1::GetContributionResponse>, Status> {
        let caller = caller(&request)?;
        let id = SubmissionId::from_field("id", &request.get_ref().id)?;
        let view = get_contribution(&self.0, id).await?;
        let sight = Sight::of(&caller, &view.submission);
        Ok(Response::new(v1::GetContributionResponse {
            round_id: view.submission.round.to_string(),
            contribution: Some(contribution_to_wire(&view.submission, sight)),
            checkpoints: view
                .checkpoints
                .into_iter()
                .map(|one| checkpoint_to_wire(one, false))
                .collect(),
        }))
    }

    async fn revoke_contribution(
        &self,
        request: Request<v1::RevokeContributionRequest>,
    ) -> Result<Response<v1::RevokeContributionResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let new = NewRevocation {
            id: SubmissionId::from_field("id", &request.id)?,
            request: RequestId::from_field("request_id", &request.request_id)?,
            reason: request.reason,
            refold: request.refold,
        };
        let view = revoke_contribution(&self.0, &caller, new).await?;
        Ok(Response::new(v1::RevokeContributionResponse {
            revocation: Some(revocation_to_wire(view)),
        }))
    }

    async fn list_revocations(
        &self,
        request: Request<v1::ListRevocationsRequest>,
    ) -> Result<Response<v1::ListRevocationsResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let size = pages::page_size(request.page_size)?;
        let after = time_and_id(&request.page_token)?;
        let views = list_revocations(&self.0, &request.model, after, size + 1).await?;
        let (views, next_page_token) = pages::cut(views, size, |view| {
            let one = &view.revocation;
            format!("{} {}", one.revoked, one.submission)
        });
        Ok(Response::new(v1::ListRevocationsResponse {
            revocations: views.into_iter().map(revocation_to_wire).collect(),
            next_page_token,
        }))
    }

    async fn void_strike(
        &self,
        request: Request<v1::VoidStrikeRequest>,
    ) -> Result<Response<v1::VoidStrikeResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let id = SubmissionId::from_field("submission_id", &request.submission_id)?;
        void_strike(&self.0, &caller, id, &request.reason).await?;
        Ok(Response::new(v1::VoidStrikeResponse {}))
    }
}

fn revocation_to_wire(view: RevocationView) -> v1::Revocation {
    let one = view.revocation;
    v1::Revocation {
        contribution_id: one.submission.to_string(),
        worker: one.worker,
        round_id: one.round.to_string(),
        reason: one.reason,
        revoked_ms: one.revoked.0,
        refolds: view.refolds.into_iter().map(refold_to_wire).collect(),
    }
}

fn refold_to_wire(view: RefoldView) -> v1::Refold {
    v1::Refold {
        affected: Some(checkpoint_to_wire(view.affected, false)),
        replacement: view.replacement.map(|one| checkpoint_to_wire(one, false)),
        failure: view.failure,
    }
}
