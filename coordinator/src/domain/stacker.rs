//! Which accepted submissions become the round's update, and how strongly.
//!
//! [`next`] is a pure function of the facts. Nothing but evaluations is stored on the way, and the
//! same facts give the same answer, so a coordinator killed anywhere goes on where it was, and the
//! order in which evaluations finish changes nothing.
//!
//! Each rule is one function from facts to a [`Proposal`], or to what it must know first; what is
//! proposed then passes one shared test, whatever the rule:
//! - [`greedy`]: `stack`, the default: clip, gate by blocks, line search
//! - [`mean`]: `fedex`, `multi-krum`, `geometric-median`: no search, one proposal
//! - [`learned`]: `learned`: an evaluator finds the factors
//! - [`shares`]: how much one identity, and all new ones together, may weigh
//! - [`momentum`]: what earlier rounds' updates add
//! - [`settle`]: the aggregate against the base on all sets, and the smaller step

pub mod greedy;
pub mod learned;
pub mod mean;
pub mod momentum;
pub mod settle;
pub mod shares;
#[cfg(test)]
mod testing;

use std::collections::BTreeMap;

use cairn_stack::algebra::{clip_factor, median};
use cairn_stack::digest::Digest;
use cairn_stack::recipe::{Aggregation, Policy};
use serde::{Deserialize, Serialize};

use super::candidate::{Candidate, CandidateKey, Scope, Sets, Term};
use super::evaluation::Job;
use super::round::FailReason;
use super::statistics::Paired;
use crate::ids::{SubmissionId, WorkerId};
use shares::{Claim, capped_shares};

/// An accepted submission.
#[derive(Debug, Clone, PartialEq)]
pub struct Accepted {
    /// Which.
    pub submission: SubmissionId,
    /// Whose.
    pub worker: WorkerId,
    /// Whether that identity has yet to earn trust.
    pub newcomer: bool,
    /// Its improvement over the base, alone, on the gate set.
    pub gain: f64,
    /// The standard error of that.
    pub gain_se: f64,
    /// Gate loss of the base with it alone.
    pub gate_loss: f64,
    /// Bytes of its shard: what the coordinator leased, never what the worker says.
    pub shard_bytes: u64,
    /// Product-space norm of its delta.
    pub norm: f64,
}

/// Losses of one set: their mean, and under which digest the losses of each record are stored.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SetResult {
    /// Nats per scored token.
    pub loss: f64,
    /// The blob of the losses.
    pub scores: Digest,
}

/// What an evaluation measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// On the gate set.
    pub gate: SetResult,
    /// Loss on the audit set, where it was asked for.
    pub audit_loss: Option<f64>,
    /// On further sets, by name: `guard/NAME`, `probe/NAME`, `history/NAME`, `shard/N`.
    pub extra: BTreeMap<String, SetResult>,
}

/// How an evaluation ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// With losses.
    Done(Measured),
    /// It cannot be evaluated.
    Failed,
}

/// How a learning of factors ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Learned {
    /// With factors.
    Done {
        /// One an adapter, in the order of the candidate's terms.
        weights: Vec<f64>,
        /// Loss with the factors it started from.
        loss_before: f64,
        /// Loss with these.
        loss_after: f64,
    },
    /// Nobody could do it.
    Failed,
}

/// A comparison that a decision rests on: the stored losses of the reference, then of the candidate.
pub type Comparison = (Digest, Digest);

/// What the round's policy asks of an aggregate.
#[derive(Debug, Clone, PartialEq)]
pub struct Bars {
    /// Whether there is an audit set.
    pub audit: bool,
    /// Standard errors by which the aggregate must beat the base.
    pub gate_z: f64,
    /// Datasets that must not get worse.
    pub guards: Vec<String>,
    /// Standard errors by which the loss of a guard may rise.
    pub guard_z: f64,
    /// Most that one identity may weigh.
    pub identity_share: f64,
    /// Most that all new identities together may weigh where there are others.
    pub newcomer_share: f64,
    /// Momentum of the outer step; 0 is off.
    pub momentum: f64,
}

impl Bars {
    /// As the policy says, with the standard errors that a round of its size asks for.
    pub fn of(policy: &Policy, gate_z: f64) -> Self {
        Self {
            audit: policy.audit.is_some(),
            gate_z,
            guards: policy.guards.clone(),
            guard_z: policy.guard_z,
            identity_share: policy.identity_share,
            newcomer_share: policy.newcomer_share,
            momentum: policy.momentum,
        }
    }
}

/// All that decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// The rule.
    pub rule: Aggregation,
    /// The accepted submissions, in any order.
    pub accepted: Vec<Accepted>,
    /// Every evaluation of the round that has ended.
    pub ended: BTreeMap<CandidateKey, Outcome>,
    /// Every learning of factors that has ended, by the name of its job.
    pub learned: BTreeMap<CandidateKey, Learned>,
    /// Comparisons made so far; nothing where two sets of losses are not of the same records.
    pub compared: BTreeMap<Comparison, Option<Paired>>,
    /// Product-space inner products of accepted submissions, the later id first.
    pub products: BTreeMap<(SubmissionId, SubmissionId), f64>,
    /// The velocity that the round before has left.
    pub velocity: Vec<Term>,
    /// What the policy asks.
    pub bars: Bars,
}

/// An evaluation to be opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What.
    pub candidate: Candidate,
    /// Why, for people.
    pub purpose: String,
}

/// What is folded and what it is expected to be worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The submissions with their effective factors, sorted by submission. With momentum, some may
    /// be of earlier rounds: their factors come on top of those they have in the base.
    pub terms: Vec<Term>,
    /// The factor on the mean of the deltas.
    pub lambda: f64,
    /// The norm above which deltas were clipped.
    pub tau: f64,
    /// Gate loss of the base.
    pub gate_before: f64,
    /// Gate loss with the stack.
    pub gate_after: f64,
    /// Audit loss of the base.
    pub audit_before: Option<f64>,
    /// Audit loss with the stack.
    pub audit_after: Option<f64>,
    /// Paired improvement on the gate set.
    pub gain: f64,
    /// Its standard error.
    pub gain_se: f64,
    /// What the next round's momentum starts from; empty when it is the terms themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub velocity: Vec<Term>,
}

impl Choice {
    /// The velocity that the next round starts from.
    pub fn velocity(&self) -> &[Term] {
        if self.velocity.is_empty() {
            &self.terms
        } else {
            &self.velocity
        }
    }
}

/// What a rule comes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposal {
    /// This round's submissions with their factors, momentum apart.
    pub terms: Vec<Term>,
    /// The factor on the mean of the deltas.
    pub lambda: f64,
    /// The norm above which deltas were clipped.
    pub tau: f64,
    /// Whether earlier rounds' updates go with it.
    pub momentum: bool,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Evaluate these, all at once; none has ended yet.
    Evaluate(Vec<Request>),
    /// Read the stored losses of these, compare them and ask again.
    Compare(Vec<Comparison>),
    /// Have an evaluator find the factors.
    Learn {
        /// Where it starts.
        job: Job,
        /// Why, for people.
        purpose: String,
    },
    /// Fold this.
    Choose(Choice),
    /// Publish nothing.
    Nothing(FailReason),
}

/// Decides what comes next.
pub fn next(facts: &Facts) -> Next {
    decide(facts).unwrap_or_else(|next| next)
}

fn decide(facts: &Facts) -> Result<Next, Next> {
    let base = base_candidate(facts.bars.audit);
    let base = match facts.outcome(&base) {
        None => return Err(Next::Evaluate(vec![request(base, "the base")])),
        Some(Outcome::Failed) => return Err(Next::Nothing(FailReason::EvaluationFailed)),
        Some(Outcome::Done(measured)) => measured,
    };
    if facts.accepted.is_empty() {
        return Err(Next::Nothing(FailReason::NoAccepted));
    }
    let proposal = match facts.rule {
        Aggregation::Stack => greedy::propose(facts, base)?,
        Aggregation::FedEx => mean::fedex(facts),
        Aggregation::MultiKrum => mean::multi_krum(facts)?,
        Aggregation::GeometricMedian => mean::geometric_median(facts)?,
        Aggregation::Learned => learned::propose(facts)?,
    };
    settle::settle(facts, base, &proposal)
}

/// The base on all sets that anything of its round is compared with.
pub const fn base_candidate(audit: bool) -> Candidate {
    Candidate::base(Sets::of(audit, Scope::Base))
}

/// These terms on the base, on all sets that decide over an aggregate.
pub fn final_candidate(terms: Vec<Term>, audit: bool) -> Candidate {
    Candidate::stack(terms, Sets::of(audit, Scope::Final))
}

impl Facts {
    fn outcome(&self, candidate: &Candidate) -> Option<&Outcome> {
        self.ended.get(&candidate.key())
    }

    /// How these terms fared on the gate set; or the request to find out.
    fn tried(&self, terms: Vec<Term>, purpose: &str) -> Result<&Outcome, Request> {
        let candidate = Candidate::stack(terms, Sets::GATE);
        match self.outcome(&candidate) {
            Some(outcome) => Ok(outcome),
            None => Err(request(candidate, purpose)),
        }
    }

    /// How much better the second losses are than the first; nothing when they cannot be compared.
    fn compare(&self, reference: Digest, candidate: Digest) -> Result<Option<Paired>, Next> {
        let asked = (reference, candidate);
        let known = self.compared.get(&asked).copied();
        known.ok_or_else(|| Next::Compare(vec![asked]))
    }

    /// The accepted submissions by id: an order that does not depend on who answered first.
    fn by_id(&self) -> Vec<&Accepted> {
        let mut sorted: Vec<&Accepted> = self.accepted.iter().collect();
        sorted.sort_by_key(|accepted| accepted.submission);
        sorted
    }

    /// The norm above which deltas are clipped: the median of all accepted.
    fn tau(&self) -> f64 {
        let norms: Vec<f64> = self.accepted.iter().map(|one| one.norm).collect();
        median(&norms).unwrap_or(0.0)
    }

    /// What each of `set` weighs, in its order: bytes of its shard, capped, summing to 1.
    fn shares(&self, set: &[&Accepted]) -> Vec<f64> {
        let claims: Vec<Claim> = set.iter().map(|one| Claim::from(*one)).collect();
        capped_shares(&claims, self.bars.identity_share, self.bars.newcomer_share)
    }

    /// `lambda * share_i * min(1, tau / norm_i)` for each of `set`.
    fn clipped_mean(&self, set: &[&Accepted], tau: f64, lambda: f64) -> Vec<Term> {
        let shares = self.shares(set);
        let weight = |(one, share): (&&Accepted, f64)| Term {
            submission: one.submission,
            weight: lambda * share * clip_factor(one.norm, tau),
        };
        set.iter().zip(shares).map(weight).collect()
    }

    /// The terms as they would be folded: with what earlier rounds add.
    fn with_momentum(&self, terms: &[Term]) -> Vec<Term> {
        momentum::outer_step(terms, &self.velocity, self.bars.momentum).update
    }
}

fn request(candidate: Candidate, purpose: &str) -> Request {
    Request {
        candidate,
        purpose: purpose.to_owned(),
    }
}

#[cfg(test)]
#[path = "stacker_tests.rs"]
mod tests;
