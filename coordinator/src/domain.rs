//! The rules of rounds: no I/O, no clock, no wire.
//!
//! States are enums whose transitions consume them; decisions are pure functions of facts that the
//! database holds, so that a coordinator killed anywhere decides the same again.
//!
//! In reading order:
//! - [`round`], [`shard`], [`lease`], [`submission`], [`evaluation`]: the state machines
//! - [`plan`]: cutting a dataset into shards
//! - [`statistics`]: paired comparison, medians, robust z-scores
//! - [`candidate`]: what is evaluated, and under which name
//! - [`audit`]: commitments to training states, and one segment done again
//! - [`trust`]: how often that is asked of whom
//! - [`cohort`], [`verdict`]: whether one submission is accepted: first beside its round's others, then by
//!   its losses
//! - [`evidence`]: the numbers behind that
//! - [`stacker`]: which accepted submissions are stacked, and how strongly
//! - [`credit`]: what an accepted submission is worth

pub mod audit;
pub mod candidate;
pub mod cohort;
pub mod credit;
pub mod evaluation;
pub mod evidence;
pub mod lease;
pub mod plan;
pub mod round;
pub mod shard;
pub mod stacker;
pub mod statistics;
pub mod submission;
pub mod trust;
pub mod verdict;

/// A move that the state machine does not know: somebody was faster, or a bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a {what} does not go from {from} to {to}")]
pub struct InvalidTransition {
    /// What kind of thing.
    pub what: &'static str,
    /// The state it is in.
    pub from: &'static str,
    /// The state it was to go to.
    pub to: &'static str,
}

/// A word that names no state, reason or set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a known word")]
pub struct UnknownWord(pub String);

/// Gives a plain enum its words: `as_str`, `FromStr` and `Display`.
macro_rules! words {
    ($name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl $name {
            /// The word in the database.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::domain::UnknownWord;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err($crate::domain::UnknownWord(text.chars().take(80).collect())),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use words;
