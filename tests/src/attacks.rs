//! What the checks catch, miss and cost: saboteurs against the real coordinator, with real training.
//!
//! The coordinator's program serves over TLS; the evaluator is `cairn-worker run`, which scores,
//! guides and replays; volunteers are members that hand in what `cairn-worker batch` trained, or what
//! a saboteur makes of it. Honest trainings are kept and used again: they are what costs.
//!
//! In reading order:
//! - [`hall`]: coordinator, evaluator and members
//! - [`training`]: honest trainings with their states
//! - [`kinds`]: what a saboteur sends
//! - [`play`]: rounds with saboteurs in them
//! - [`rules`]: the same adapters under other rules
//! - [`suite`]: all of it, one after another
//! - [`report`]: the table and the line of JSON

pub mod hall;
pub mod kinds;
pub mod play;
pub mod report;
pub mod rules;
pub mod suite;
pub mod training;
