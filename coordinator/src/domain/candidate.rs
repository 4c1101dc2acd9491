//! What an evaluator is asked to score: the base, with weighted adapters on it.

use std::fmt::Write as _;

use cairn_stack::digest::Digest;
use serde::{Deserialize, Serialize};

use super::words;
use crate::ids::SubmissionId;

/// One adapter of a candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Term {
    /// Whose adapter.
    #[serde(with = "id_text")]
    pub submission: SubmissionId,
    /// Factor on its delta.
    pub weight: f64,
}

/// An id as its text.
mod id_text {
    use serde::{Deserialize, Deserializer, Serializer, de};

    use crate::ids::SubmissionId;

    pub fn serialize<S: Serializer>(id: &SubmissionId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SubmissionId, D::Error> {
        String::deserialize(from)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// Which sets are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sets {
    /// The gate set alone.
    Gate,
    /// The gate and the audit set.
    GateAndAudit,
}

words!(Sets { Gate = "gate", GateAndAudit = "gate+audit" });

/// A candidate's name within its round: asking for the same twice is asking once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CandidateKey(pub Digest);

/// The base with these adapters, on these sets. No adapters: the base itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Sorted by submission.
    terms: Vec<Term>,
    sets: Sets,
}

impl Candidate {
    /// The base alone.
    pub const fn base(sets: Sets) -> Self {
        Self {
            terms: Vec::new(),
            sets,
        }
    }

    /// One submission at full weight.
    pub fn single(submission: SubmissionId, sets: Sets) -> Self {
        Self {
            terms: vec![Term {
                submission,
                weight: 1.0,
            }],
            sets,
        }
    }

    /// Several, in any order.
    pub fn stack(mut terms: Vec<Term>, sets: Sets) -> Self {
        terms.sort_by_key(|term| term.submission);
        Self { terms, sets }
    }

    /// The adapters, sorted by submission.
    pub fn terms(&self) -> &[Term] {
        &self.terms
    }

    /// The sets to score.
    pub const fn sets(&self) -> Sets {
        self.sets
    }

    /// BLAKE3 of the canonical text: one line a term with the weight's IEEE 754 bits, then the sets.
    pub fn key(&self) -> CandidateKey {
        let mut text = String::new();
        for term in &self.terms {
            let _ = writeln!(text, "{} {:016x}", term.submission, term.weight.to_bits());
        }
        text.push_str(self.sets.as_str());
        CandidateKey(Digest::of(text.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_sees_terms_weights_and_sets_but_no_order() {
        let (a, b) = (SubmissionId::new(), SubmissionId::new());
        let term = |submission, weight| Term { submission, weight };
        let one = Candidate::stack(vec![term(a, 0.5), term(b, 0.25)], Sets::Gate);
        let two = Candidate::stack(vec![term(b, 0.25), term(a, 0.5)], Sets::Gate);
        assert_eq!(one.key(), two.key());
        let other = Candidate::stack(vec![term(a, 0.5), term(b, 0.26)], Sets::Gate);
        assert_ne!(one.key(), other.key());
        let audited = Candidate::stack(one.terms().to_vec(), Sets::GateAndAudit);
        assert_ne!(one.key(), audited.key());
        assert_ne!(Candidate::base(Sets::Gate).key(), one.key());
        let single = Candidate::single(a, Sets::Gate);
        assert_eq!(
            single.key(),
            Candidate::stack(vec![term(a, 1.0)], Sets::Gate).key()
        );
    }

    #[test]
    fn terms_survive_json() {
        let term = Term {
            submission: SubmissionId::new(),
            weight: 0.1 + 0.2,
        };
        let json = serde_json::to_string(std::slice::from_ref(&term)).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Term>>(&json).unwrap(), [term]);
    }
}
