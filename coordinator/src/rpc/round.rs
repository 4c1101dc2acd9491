//! `cairn.v1.RoundService`.
use std::pin::Pin;

use cairn_proto::v1;
use cairn_proto::v1::round_service_server::RoundService;
use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::auth::{Caller, Role, caller};
use super::pages;
use crate::app::App;
use crate::clock::Timestamp;
use crate::db::rounds::Round;
use crate::db::submissions::Submission;
use crate::domain::submission::Progress;
use crate::domain::{round, shard};
use crate::error::Error;
use crate::ids::{RequestId, RoundId};
use crate::ops::abort_round::abort_round;
use crate::ops::create_round::create_round;
use crate::ops::read_rounds::{RoundView, SetLoss, ShardView, get_round, list_rounds};
use crate::ops::watch_round::watch_round;

/// The service.
pub struct Rounds(pub App);

#[tonic::async_trait]
impl RoundService for Rounds {
    async fn create_round(
        &self,
        request: Request<v1::CreateRoundRequest>,
    ) -> Result<Response<v1::CreateRoundResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let id = RequestId::from_field("request_id", &request.request_id)?;
        let round = create_round(&self.0, &caller, &request.round_file, id).await?;
        Ok(Response::new(v1::CreateRoundResponse {
            round: Some(round_to_wire(&round)),
        }))
    }

    async fn get_round(
        &self,
        request: Request<v1::GetRoundRequest>,
    ) -> Result<Response<v1::GetRoundResponse>, Status> {
        let caller = caller(&request)?;
        let id = RoundId::from_field("id", &request.get_ref().id)?;
        let view = view_to_wire(&get_round(&self.0, id).await?, &caller);
        Ok(Response::new(v1::GetRoundResponse { view: Some(view) }))
    }

    async fn list_rounds(
        &self,
        request: Request<v1::ListRoundsRequest>,
    ) -> Result<Response<v1::ListRoundsResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let size = pages::page_size(request.page_size)?;
        let after = time_and_id(&request.page_token)?;
        let rounds = list_rounds(&self.0, &request.model, after, size + 1).await?;
        let (rounds, next_page_token) = pages::cut(rounds, size, |round| {
            format!("{} {}", round.created, round.id)
        });
        let rounds = rounds.iter().map(round_to_wire).collect();
        Ok(Response::new(v1::ListRoundsResponse {
            rounds,
            next_page_token,
        }))
    }

    type WatchRoundStream =
        Pin<Box<dyn Stream<Item = Result<v1::WatchRoundResponse, Status>> + Send>>;

    async fn watch_round(
        &self,
        request: Request<v1::WatchRoundRequest>,
    ) -> Result<Response<Self::WatchRoundStream>, Status> {
        let caller = caller(&request)?;
        let id = RoundId::from_field("id", &request.get_ref().id)?;
        let views = watch_round(self.0.clone(), id).map(move |view| {
            let view = Some(view_to_wire(&view?, &caller));
            Ok(v1::WatchRoundResponse { view })
        });
        Ok(Response::new(Box::pin(views)))
    }

    async fn abort_round(
        &self,
        request: Request<v1::AbortRoundRequest>,
    ) -> Result<Response<v1::AbortRoundResponse>, Status> {
        let caller = caller(&request)?;
        let id = RoundId::from_field("id", &request.get_ref().id)?;
        let round = abort_round(&self.0, &caller, id, &request.get_ref().reason).await?;
        Ok(Response::new(v1::AbortRoundResponse {
            round: Some(round_to_wire(&round)),
        }))
    }
}

/// What a page token of a list by time says: the time and id after which the next page begins.
///
/// # Errors
/// INVALID_ARGUMENT when it is none of ours.
pub fn time_and_id<T: std::str::FromStr>(token: &str) -> Result<Option<(Timestamp, T)>, Error> {
    let bad = || Error::invalid("page_token", "not a token of this list");
    let after = pages::after(token)?;
    if after.is_empty() {
        return Ok(None);
    }
    let (time, id) = after.split_once(' ').ok_or_else(bad)?;
    let time = time.parse().map_err(|_| bad())?;
    Ok(Some((Timestamp(time), id.parse().map_err(|_| bad())?)))
}

/// A round as the wire spells it.
#[must_use]
pub fn round_to_wire(round: &Round) -> v1::Round {
    let state = match round.phase.state() {
        round::State::Draft => v1::RoundState::Draft,
        round::State::Training => v1::RoundState::Training,
        round::State::Judging => v1::RoundState::Judging,
        round::State::Folding => v1::RoundState::Folding,
        round::State::Published => v1::RoundState::Published,
        round::State::Failed => v1::RoundState::Failed,
        round::State::Aborted => v1::RoundState::Aborted,
    };
    v1::Round {
        id: round.id.to_string(),
        model: round.model.clone(),
        dataset: round.dataset.clone(),
        state: state.into(),
        reason: round.reason.clone(),
        base_commit: round.base_commit.to_string(),
        base_revision: round.base_revision,
        published_commit: round
            .published
            .map(|(_, commit)| commit.to_string())
            .unwrap_or_default(),
        published_revision: round.published.map_or(0, |(revision, _)| revision),
        gate_loss_before: round.losses.gate_before,
        gate_loss_after: round.losses.gate_after,
        audit_loss_before: round.losses.audit_before,
        audit_loss_after: round.losses.audit_after,
        created_ms: round.created.0,
        deadline_ms: round.deadline.0,
        ended_ms: round.ended.map_or(0, |ended| ended.0),
        round_file: round.file.to_toml(),
    }
}

/// A round's view as this caller may see it.
#[must_use]
pub fn view_to_wire(view: &RoundView, caller: &Caller) -> v1::RoundView {
    let contribution =
        |submission: &Submission| contribution_to_wire(submission, Sight::of(caller, submission));
    let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    v1::RoundView {
        round: Some(round_to_wire(&view.round)),
        shards: view.shards.iter().map(shard_to_wire).collect(),
        contributions: view.submissions.iter().map(contribution).collect(),
        evaluations: Some(v1::EvaluationProgress {
            done: small(view.evaluations.ended),
            open: small(view.evaluations.open),
            current: view.evaluations.current.clone(),
        }),
        // What volunteers see of probes would help those whom probes are to catch.
        sets: view
            .sets
            .iter()
            .filter(|set| caller.role != Role::Volunteer || !set.set.starts_with("probe/"))
            .map(set_to_wire)
            .collect(),
    }
}

fn set_to_wire(set: &SetLoss) -> v1::SetLoss {
    v1::SetLoss {
        set: set.set.clone(),
        before: set.before,
        after: set.after,
    }
}

fn shard_to_wire(view: &ShardView) -> v1::Shard {
    let state = match view.row.shard.state {
        shard::State::Open => v1::ShardState::Open,
        shard::State::Leased => v1::ShardState::Leased,
        shard::State::Submitted => v1::ShardState::Submitted,
        shard::State::Done => v1::ShardState::Done,
        shard::State::Stopped => v1::ShardState::Stopped,
    };
    let held = matches!(
        state,
        v1::ShardState::Leased | v1::ShardState::Submitted | v1::ShardState::Done
    );
    let lease = view.lease.as_ref().filter(|_| held);
    v1::Shard {
        index: view.row.position,
        state: state.into(),
        records: view.row.records,
        worker: lease.map(|lease| lease.worker.clone()).unwrap_or_default(),
        lease_expires_ms: lease
            .filter(|lease| lease.active)
            .map_or(0, |lease| lease.expires.0),
        step: lease.map_or(0, |lease| lease.step),
        steps: lease.map_or(0, |lease| lease.steps),
        failures: u32::try_from(view.failures).unwrap_or(u32::MAX),
    }
}

/// How much of a submission a caller may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    /// Every number: maintainers and evaluators.
    All,
    /// Why it was decided as it was, without what betrays another's work: who sent it.
    Own,
    /// That it was decided, and how: everybody else.
    Outcome,
}

impl Sight {
    /// What this caller may see of it.
    #[must_use]
    pub fn of(caller: &Caller, submission: &Submission) -> Self {
        match caller.role {
            Role::Maintainer | Role::Evaluator => Self::All,
            Role::Volunteer if caller.worker == submission.worker => Self::Own,
            Role::Volunteer => Self::Outcome,
        }
    }
}

/// A submission as the wire spells it, as far as `sight` goes. A volunteer gets the numbers once the
/// verdict is there: before it they would only help to aim.
#[must_use]
pub fn contribution_to_wire(submission: &Submission, sight: Sight) -> v1::Contribution {
    let (verdict, reason, detail) = match &submission.progress {
        Progress::Received { .. } => (v1::Verdict::Pending, "", "being checked"),
        Progress::Evaluating { .. } => (v1::Verdict::Pending, "", "being evaluated"),
        Progress::Accepted { .. } => (v1::Verdict::Accepted, "", ""),
        Progress::Rejected { reason, detail, .. } => {
            (v1::Verdict::Rejected, reason.as_str(), detail.as_str())
        }
    };
    let norm = submission.norm.filter(|_| sight == Sight::All);
    let evidence_json = match sight {
        Sight::All => submission.evidence.to_json().to_string(),
        Sight::Own if verdict != v1::Verdict::Pending => {
            submission.evidence.for_volunteer().to_string()
        }
        Sight::Own | Sight::Outcome => String::new(),
    };
    v1::Contribution {
        id: submission.id.to_string(),
        worker_id: submission.worker.to_string(),
        worker: submission.worker_name.clone(),
        shard: submission.shard,
        verdict: verdict.into(),
        reason: reason.to_owned(),
        detail: detail.to_owned(),
        weight: submission.weight,
        adapter_digest: submission.adapter.to_string(),
        norm: norm.unwrap_or_default(),
        gate_loss: submission.gate_loss,
        audit_loss: submission.audit_loss,
        gain: submission.gain.map(|(gain, _)| gain),
        gain_se: submission.gain.map(|(_, se)| se),
        submitted_ms: submission.created.0,
        evidence_json,
        revoked_ms: submission.revoked.map_or(0, |at| at.0),
    }
}
