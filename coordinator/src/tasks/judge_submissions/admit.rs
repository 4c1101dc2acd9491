//! Beside the others of its round: norm, shape, copies, direction. What passes is evaluated.
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use cairn_stack::recipe::RoundFile;

use super::compare::{Compared, compare};
use super::guide::guided;
use super::measure::is_gone;
use super::verdict::{settle, unreadable};
use crate::app::App;
use crate::db::audits::audit_get;
use crate::db::evaluations::evaluation_open;
use crate::db::rounds::Round;
use crate::db::shards::shard_count;
use crate::db::submissions::peers::{Peer, submission_peers};
use crate::db::submissions::{Findings, Submission, submission_move};
use crate::domain::candidate::{Candidate, Scope, Sets};
use crate::domain::cohort::{Ruling, Shape, foreign_shard, judge_norm, judge_shape};
use crate::domain::evidence::Evidence;
use crate::domain::round;
use crate::domain::stacker::Request;
use crate::domain::submission::State;
use crate::domain::verdict::judge_audit;
use crate::error::Error;
use crate::ids::{RoundId, SubmissionId};
use crate::ops::claim_work::round_of;

/// Separates the draw of foreign shards from every other use of the coordinator's key.
const FOREIGN_CONTEXT: &str = "cairn 2026-11-25 the foreign shard of a submission";

/// What a round's submissions are compared with.
pub(super) struct Cohort {
    /// The round.
    pub(super) round: Round,
    /// All of them, in order of arrival.
    pub(super) peers: Vec<Peer>,
    /// No more will come.
    pub(super) complete: bool,
}

/// Cohorts read in this pass.
pub(super) type Rounds = BTreeMap<RoundId, Cohort>;

impl Cohort {
    /// Reads a round's.
    pub(super) async fn read(app: &App, id: RoundId) -> Result<Self, Error> {
        let mut tx = app.db.read().await?;
        let round = round_of(&mut tx, id).await?;
        let peers = submission_peers(&mut tx, id).await?;
        let unfinished = shard_count(&mut tx, id).await?.unfinished;
        let complete = unfinished == 0 || round.phase.state() != round::State::Training;
        Ok(Self {
            round,
            peers,
            complete,
        })
    }

    /// Norms of the measured ones that have not been rejected.
    pub(super) fn norms(&self) -> Vec<f64> {
        self.standing().filter_map(|peer| peer.norm).collect()
    }

    /// Shapes of the same.
    pub(super) fn shapes(&self) -> Vec<Shape> {
        let shape = |peer: &Peer| peer.evidence.spectral.map(|facts| facts.shape);
        self.standing().filter_map(shape).collect()
    }

    /// By how much likelier the others make each probe's answers, with `own` among them; and whether
    /// no more will come. What was rejected does not count: enough noise would make honest work odd.
    pub(super) fn probed(
        &self,
        id: SubmissionId,
        own: &BTreeMap<String, f64>,
    ) -> (BTreeMap<String, Vec<f64>>, bool) {
        let mut found: BTreeMap<String, Vec<f64>> = own
            .iter()
            .map(|(name, likelier)| (name.clone(), vec![*likelier]))
            .collect();
        let mut pending = false;
        for peer in self.standing().filter(|peer| peer.id != id) {
            let Some(facts) = &peer.evidence.probes else {
                pending |= matches!(peer.state, State::Received | State::Evaluating);
                continue;
            };
            for (name, (likelier, _)) in &facts.sets {
                if let Some(cohort) = found.get_mut(name) {
                    cohort.push(*likelier);
                }
            }
        }
        (found, self.complete && !pending)
    }

    fn standing(&self) -> impl Iterator<Item = &Peer> {
        self.peers
            .iter()
            .filter(|peer| peer.state != State::Rejected)
    }
}

/// One measured submission.
pub(super) async fn admit(
    app: &App,
    submission: &Submission,
    norm: f64,
    rounds: &mut Rounds,
) -> Result<bool, Error> {
    let cohort = match rounds.entry(submission.round) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(place) => place.insert(Cohort::read(app, submission.round).await?),
    };
    let mut evidence = submission.evidence.clone();
    let audit = match audited(app, submission, &mut evidence).await? {
        // It need not have ended yet.
        Ruling::Wait => Ruling::Pass,
        ruling => ruling,
    };
    let [size, shape] = beside_cohort(norm, &mut evidence, cohort);
    for ruling in [audit, size, shape] {
        if let Some(moved) = settle(app, submission, &evidence, None, ruling).await? {
            rejected(cohort, submission, moved);
            return Ok(moved);
        }
    }
    if evidence.copy.is_none() {
        match compare(app, submission, norm, cohort, evidence).await? {
            // Found again in the next pass, with the evidence it has now.
            Compared::Stored => return Ok(true),
            Compared::Moved(moved) => return Ok(moved),
            Compared::NotYet => return Ok(false),
            Compared::Ruled(evidence, ruling) => {
                let moved = settle(app, submission, &evidence, None, ruling).await?;
                return Ok(moved.unwrap_or(true));
            }
        }
    }
    let ruling = match guided(app, submission, &cohort.round, &mut evidence).await {
        Err(error) if is_gone(&error) => return unreadable(app, submission).await,
        ruling => ruling?,
    };
    if let Some(moved) = settle(app, submission, &evidence, None, ruling).await? {
        rejected(cohort, submission, moved);
        return Ok(moved);
    }
    evaluate(app, submission, &cohort.round, evidence).await
}

/// How the submission's audit stands, if it has one.
pub(super) async fn audited(
    app: &App,
    submission: &Submission,
    evidence: &mut Evidence,
) -> Result<Ruling, Error> {
    let mut tx = app.db.read().await?;
    let audit = audit_get(&mut tx, submission.id).await?;
    drop(tx);
    let Some(audit) = audit else {
        return Ok(Ruling::Pass);
    };
    let (facts, ruling) = judge_audit(&audit, app.clock.now_ms());
    evidence.audit = Some(facts);
    Ok(ruling)
}

/// Norm and shape against the cohort, from what has been measured.
pub(super) fn beside_cohort(norm: f64, evidence: &mut Evidence, cohort: &Cohort) -> [Ruling; 2] {
    let policy = &cohort.round.file.policy;
    let (facts, size) = judge_norm(norm, &cohort.norms(), cohort.complete, policy);
    evidence.norm = Some(facts);
    let Some(spectral) = evidence.spectral else {
        return [size, Ruling::Pass];
    };
    let (facts, shape) = judge_shape(spectral.shape, &cohort.shapes(), policy);
    evidence.spectral = Some(facts);
    [size, shape]
}

/// Those that come after it in this pass are no longer compared with what was just rejected.
fn rejected(cohort: &mut Cohort, submission: &Submission, moved: bool) {
    let found = cohort
        .peers
        .iter_mut()
        .find(|peer| peer.id == submission.id);
    if let Some(peer) = found.filter(|_| moved) {
        peer.state = State::Rejected;
    }
}

/// What a submission is evaluated as: alone, on everything it is judged by.
pub(super) fn candidate_of(app: &App, submission: &Submission, file: &RoundFile) -> Candidate {
    let (own, shards, policy) = (submission.shard, file.shards, &file.policy);
    let key = blake3::derive_key(FOREIGN_CONTEXT, app.key.as_bytes());
    let scope = match foreign_shard(&key, submission.id, own, shards) {
        Some(other) => Scope::Shard { own, other },
        // Without another shard; what the model must keep is looked at all the same.
        None if policy.guards.is_empty() && policy.probes.is_empty() => Scope::Plain,
        None => Scope::Final,
    };
    Candidate::single(submission.id, Sets::of(policy.audit.is_some(), scope))
}

/// Opens its evaluation.
async fn evaluate(
    app: &App,
    submission: &Submission,
    round: &Round,
    evidence: Evidence,
) -> Result<bool, Error> {
    let to = submission.progress.clone().evaluate();
    let to = to.map_err(|error| Error::internal("open an evaluation", error))?;
    let request = Request {
        candidate: candidate_of(app, submission, &round.file),
        purpose: format!("shard {} by {}", submission.shard, submission.worker_name),
    };
    let findings = Findings {
        evidence: Some(evidence),
        ..Findings::default()
    };
    let mut tx = app.db.begin().await?;
    if submission_move(&mut tx, submission.id, State::Received, &to, &findings).await? {
        evaluation_open(&mut tx, round.id, &request, app.clock.now_ms()).await?;
        tx.commit().await?;
    }
    Ok(true)
}
