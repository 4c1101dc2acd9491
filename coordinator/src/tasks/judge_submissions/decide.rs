//! By its losses and its audit: the last word on a submission.
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use cairn_proto::reason::VerdictReason;
use cairn_stack::digest::Digest;

use super::admit::{Cohort, audited, beside_cohort, candidate_of};
use super::verdict::{move_on, reject, settle};
use crate::app::App;
use crate::db::evaluations::{EvalResult, evaluation_of};
use crate::db::rounds::Round;
use crate::db::shards::shard_get;
use crate::db::submissions::{Findings, Submission, submission_note};
use crate::domain::candidate::{Candidate, Scope};
use crate::domain::cohort::Ruling;
use crate::domain::evidence::{Evidence, GateFacts};
use crate::domain::statistics::{Paired, Scores, compare};
use crate::domain::submission::{Score, State};
use crate::domain::verdict::{gate_z, judge_gate, judge_guards, judge_probes, judge_shard};
use crate::domain::{credit, evaluation};
use crate::error::Error;
use crate::ids::RoundId;
use crate::ops::claim_work::round_of;
use crate::ops::create_round::base_of;
use crate::ops::submit_scores::scores_of;

/// What a round's submissions are compared with, read once a pass.
pub(super) struct Bench {
    round: Round,
    /// Nothing while the base has not been evaluated.
    base: Option<EvalResult>,
    /// Read when the first submission has been evaluated: most passes find none.
    cohort: Option<Cohort>,
    /// Losses read so far: the base's are asked for again and again.
    losses: BTreeMap<Digest, Scores>,
}

/// Benches of this pass.
pub(super) type Rounds = BTreeMap<RoundId, Bench>;

/// One submission whose evaluation has been opened.
pub(super) async fn decide(
    app: &App,
    submission: &Submission,
    norm: f64,
    rounds: &mut Rounds,
) -> Result<bool, Error> {
    let bench = match rounds.entry(submission.round) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(place) => place.insert(Bench::read(app, submission.round).await?),
    };
    let mut evidence = submission.evidence.clone();
    // Whoever failed the audit need not be evaluated.
    let audit = audited(app, submission, &mut evidence).await?;
    if let Ruling::Reject(..) = &audit {
        let moved = settle(app, submission, &evidence, None, audit).await?;
        return Ok(moved.unwrap_or(true));
    }
    let Some(base) = bench.base.clone() else {
        return Ok(false);
    };
    let candidate = candidate_of(app, submission, &bench.round.file);
    let mut tx = app.db.read().await?;
    let found = evaluation_of(&mut tx, submission.round, candidate.key()).await?;
    drop(tx);
    let Some(found) = found else { return Ok(false) };
    if found.state == evaluation::State::Failed {
        let text = "the model with this adapter could not be evaluated to finite losses";
        let (reason, findings) = (VerdictReason::NoGain, Findings::default());
        return reject(app, submission, reason, text, findings).await;
    }
    let Some(result) = found.result else {
        return Ok(false);
    };
    let scored = bench.score(app, &base, &result, &candidate).await?;
    let score = Score {
        gate_loss: result.gate_loss,
        audit_loss: result.audit_loss,
        paired: scored.gate.0,
    };
    let cohort = match &mut bench.cohort {
        Some(cohort) => cohort,
        none => none.insert(Cohort::read(app, submission.round).await?),
    };
    let rulings = rule(submission, norm, &scored, cohort, &mut evidence);
    for ruling in rulings.into_iter().chain([audit]) {
        match ruling {
            Ruling::Pass => {}
            Ruling::Wait => return wait(app, submission, &evidence).await,
            Ruling::Reject(..) => {
                let moved = settle(app, submission, &evidence, Some(score), ruling).await?;
                return Ok(moved.unwrap_or(true));
            }
        }
    }
    accept(app, submission, score, evidence, &bench.round).await
}

/// What the losses of a candidate come to beside the base's.
struct Scored {
    gate: (Paired, GateFacts, Ruling),
    /// By name.
    guards: BTreeMap<String, Paired>,
    /// By name: by how much likelier the unwanted answers became.
    probes: BTreeMap<String, f64>,
    /// On the own shard and on the other, whose number is behind.
    shards: Option<(Paired, Paired, u32)>,
}

impl Bench {
    async fn read(app: &App, id: RoundId) -> Result<Self, Error> {
        let mut tx = app.db.read().await?;
        let round = round_of(&mut tx, id).await?;
        let base = base_of(&round.file.policy);
        let found = evaluation_of(&mut tx, id, base.key()).await?;
        drop(tx);
        Ok(Self {
            round,
            cohort: None,
            base: found.and_then(|evaluation| evaluation.result),
            losses: BTreeMap::new(),
        })
    }

    async fn score(
        &mut self,
        app: &App,
        base: &EvalResult,
        result: &EvalResult,
        candidate: &Candidate,
    ) -> Result<Scored, Error> {
        let file = &self.round.file;
        let z = gate_z(&file.policy, file.shards);
        let before = self.losses_of(app, base.gate_scores).await?.clone();
        let gate = judge_gate(&before, &scores_of(app, result.gate_scores).await?, z)
            .map_err(|error| Error::internal("compare an evaluation with the base's", error))?;
        let mut scored = Scored {
            gate,
            guards: BTreeMap::new(),
            probes: BTreeMap::new(),
            shards: None,
        };
        let mut shards = BTreeMap::new();
        for (name, found) in &result.extra {
            // What only one of the two has says nothing.
            let Some(known) = base.extra.get(name) else {
                continue;
            };
            let before = self.losses_of(app, known.scores).await?;
            let after = scores_of(app, found.scores).await?;
            let paired = compare(before, &after)
                .map_err(|error| Error::internal("compare an evaluation with the base's", error))?;
            match name.split_once('/') {
                Some(("guard", _)) => drop(scored.guards.insert(name.clone(), paired)),
                Some(("probe", _)) => drop(scored.probes.insert(name.clone(), paired.gain)),
                Some(("shard", number)) => drop(shards.insert(number.to_owned(), paired)),
                _ => {}
            }
        }
        if let Scope::Shard { own, other } = candidate.sets().scope {
            let of = |shard: u32| shards.get(&shard.to_string()).copied();
            scored.shards = of(own).zip(of(other)).map(|(x, y)| (x, y, other));
        }
        Ok(scored)
    }

    async fn losses_of(&mut self, app: &App, digest: Digest) -> Result<&Scores, Error> {
        match self.losses.entry(digest) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(scores_of(app, digest).await?)),
        }
    }
}

/// Every rule on a scored submission, in order; the cohort's once more, for it has grown.
fn rule(
    submission: &Submission,
    norm: f64,
    scored: &Scored,
    cohort: &Cohort,
    evidence: &mut Evidence,
) -> Vec<Ruling> {
    let policy = &cohort.round.file.policy;
    let (_, facts, gate) = &scored.gate;
    evidence.gate = Some(*facts);
    let mut rulings = vec![gate.clone()];
    let (facts, ruling) = judge_guards(&scored.guards, policy);
    evidence.guards = facts;
    rulings.push(ruling);
    if let Some((own, other, other_shard)) = scored.shards {
        let (facts, ruling) = judge_shard(own, other, other_shard, policy);
        evidence.shard = Some(facts);
        rulings.push(ruling);
    }
    let again = beside_cohort(norm, evidence, cohort);
    // It has been admitted: nothing is held any more.
    rulings.extend(again.into_iter().filter(|ruling| *ruling != Ruling::Wait));
    let (others, complete) = cohort.probed(submission.id, &scored.probes);
    let (facts, ruling) = judge_probes(&scored.probes, &others, complete, policy);
    evidence.probes = facts;
    rulings.push(ruling);
    rulings
}

/// Keeps the numbers of a submission that waits for others or for its audit.
async fn wait(app: &App, submission: &Submission, evidence: &Evidence) -> Result<bool, Error> {
    // Numbers that went through JSON may come back different in the last bit: only news counts.
    let news = |evidence: &Evidence| {
        let probed = evidence.probes.as_ref().map(|facts| facts.cohort);
        (evidence.gate.is_some(), probed)
    };
    if news(&submission.evidence) == news(evidence) {
        return Ok(false);
    }
    let mut tx = app.db.begin().await?;
    submission_note(&mut tx, submission.id, State::Evaluating, evidence).await?;
    tx.commit().await?;
    Ok(true)
}

async fn accept(
    app: &App,
    submission: &Submission,
    score: Score,
    evidence: Evidence,
    round: &Round,
) -> Result<bool, Error> {
    let mut tx = app.db.read().await?;
    let row = shard_get(&mut tx, submission.round, submission.shard).await?;
    drop(tx);
    let records = row.map_or(0, |row| row.records);
    let (tokens, recipe) = (submission.numbers.tokens, &round.file.recipe);
    let findings = Findings {
        evidence: Some(evidence),
        credit_tokens: credit::tokens(tokens, records, recipe),
        score: Some(score),
    };
    let to = submission
        .progress
        .clone()
        .accept(score, app.clock.now_ms());
    move_on(app, submission, to, findings).await
}
