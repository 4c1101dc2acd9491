//! `cairn.v1.VolunteerService`.
use cairn_proto::v1;
use cairn_proto::v1::volunteer_service_server::VolunteerService;
use tonic::{Request, Response, Status};

use super::auth::{Role, caller};
use super::pages;
use super::round::{contribution_to_wire, time_and_id};
use crate::app::App;
use crate::ops::read_standing::{get_standing, list_submissions};

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
            accepted: small(standing.accepted),
            rejected: small(standing.rejected),
            pending: small(standing.pending),
            credit_tokens: standing.credit_tokens,
            strikes: 0,
            audit_share: 0.0,
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
            format!("{} {}", row.submission.created, row.submission.id)
        });
        let submissions = rows.into_iter().map(|row| v1::OwnSubmission {
            round_id: row.submission.round.to_string(),
            contribution: Some(contribution_to_wire(&row.submission, false)),
            receipt: Some(v1::Receipt {
                statement: row.statement.into_bytes(),
                signature: row.signature,
            }),
            audit: None,
        });
        let submissions = submissions.collect();
        Ok(Response::new(v1::ListSubmissionsResponse {
            submissions,
            next_page_token,
        }))
    }

    async fn restore_submission(
        &self,
        _: Request<v1::RestoreSubmissionRequest>,
    ) -> Result<Response<v1::RestoreSubmissionResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }
}
