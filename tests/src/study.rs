//! How contributions add up: the same data and tokens, six ways of making one model of them.
//!
//! Training and evaluation are real, by `cairn-worker batch`; the choice of the stack, the means of
//! factors and the fold are the coordinator's and `cairn-stack`'s own functions. Nothing of it is
//! simulated but the network.
//!
//! In reading order:
//! - [`dice`]: numbers that follow from a seed
//! - [`material`]: base model, records, topics, sets
//! - [`shards`]: the records of a round, cut evenly or unevenly
//! - [`hand`]: a worker that trains and scores on request
//! - [`stacking`]: one round under Cairn's default rule
//! - [`arms`]: the six ways
//! - [`runs`]: every arm on every split with every seed, two at a time
//! - [`report`]: the table and the line of JSON

pub mod arms;
pub mod dice;
pub mod hand;
pub mod material;
pub mod report;
pub mod runs;
pub mod shards;
pub mod stacking;
