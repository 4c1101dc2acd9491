//! What an evaluator is asked to score: the base, with weighted adapters on it.

use std::fmt::Write as _;

use cairn_stack::digest::Digest;
use serde::{Deserialize, Serialize};

use super::UnknownWord;
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

/// Which sets are scored: the gate set always.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sets {
    /// And the audit set.
    pub audit: bool,
    /// And what else.
    pub scope: Scope,
}

/// What is scored beside gate and audit set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Nothing.
    Plain,
    /// All that anything of the round is compared with: guards, probes, a sample of every shard,
    /// eval sets of earlier rounds.
    Base,
    /// Guards, probes, a sample of the submission's shard and of another.
    Shard {
        /// The submission's shard.
        own: u32,
        /// One it was not trained on.
        other: u32,
    },
    /// Guards, probes, eval sets of earlier rounds: the aggregate.
    Final,
}

impl Sets {
    /// The gate set alone.
    pub const GATE: Self = Self::of(false, Scope::Plain);
    /// The gate and the audit set.
    pub const GATE_AND_AUDIT: Self = Self::of(true, Scope::Plain);

    /// Gate, audit where said, and more.
    pub const fn of(audit: bool, scope: Scope) -> Self {
        Self { audit, scope }
    }

    /// The word in column `sets`.
    pub const fn as_str(self) -> &'static str {
        if self.audit { "gate+audit" } else { "gate" }
    }

    /// The word in column `scope`.
    pub fn scope_word(self) -> String {
        match self.scope {
            Scope::Plain => String::new(),
            Scope::Base => "base".to_owned(),
            Scope::Final => "final".to_owned(),
            Scope::Shard { own, other } => format!("shard:{own}:{other}"),
        }
    }

    /// Reads both columns.
    ///
    /// # Errors
    /// [`UnknownWord`].
    pub fn parse(sets: &str, scope: &str) -> Result<Self, UnknownWord> {
        let unknown = |word: &str| UnknownWord(word.chars().take(80).collect());
        let audit = match sets {
            "gate" => false,
            "gate+audit" => true,
            _ => return Err(unknown(sets)),
        };
        let scope = match scope {
            "" => Scope::Plain,
            "base" => Scope::Base,
            "final" => Scope::Final,
            _ => {
                let shards = scope
                    .strip_prefix("shard:")
                    .and_then(|rest| rest.split_once(':'));
                let (own, other) = shards.ok_or_else(|| unknown(scope))?;
                let number = |text: &str| text.parse().map_err(|_| unknown(scope));
                Scope::Shard {
                    own: number(own)?,
                    other: number(other)?,
                }
            }
        };
        Ok(Self { audit, scope })
    }
}

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

    /// BLAKE3 of the canonical text: one line a term with the weight's IEEE 754 bits, then the sets and the scope.
    pub fn key(&self) -> CandidateKey {
        let mut text = String::new();
        for term in &self.terms {
            let _ = writeln!(text, "{} {:016x}", term.submission, term.weight.to_bits());
        }
        text.push_str(self.sets.as_str());
        text.push_str(&self.sets.scope_word());
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
        let one = Candidate::stack(vec![term(a, 0.5), term(b, 0.25)], Sets::GATE);
        let two = Candidate::stack(vec![term(b, 0.25), term(a, 0.5)], Sets::GATE);
        assert_eq!(one.key(), two.key());
        let other = Candidate::stack(vec![term(a, 0.5), term(b, 0.26)], Sets::GATE);
        assert_ne!(one.key(), other.key());
        let audited = Candidate::stack(one.terms().to_vec(), Sets::GATE_AND_AUDIT);
        assert_ne!(one.key(), audited.key());
        assert_ne!(Candidate::base(Sets::GATE).key(), one.key());
        let single = Candidate::single(a, Sets::GATE);
        assert_eq!(
            single.key(),
            Candidate::stack(vec![term(a, 1.0)], Sets::GATE).key()
        );
    }

    #[test]
    fn sets_survive_their_columns() {
        for scope in [
            Scope::Plain,
            Scope::Base,
            Scope::Final,
            Scope::Shard { own: 3, other: 7 },
        ] {
            for audit in [false, true] {
                let sets = Sets::of(audit, scope);
                assert_eq!(Sets::parse(sets.as_str(), &sets.scope_word()), Ok(sets));
            }
        }
        for (sets, scope) in [
            ("gat", ""),
            ("gate", "shard:1"),
            ("gate", "shard:x:2"),
            ("gate", "x"),
        ] {
            assert!(Sets::parse(sets, scope).is_err(), "{sets} {scope}");
        }
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
