//! The coordinator: who may contribute what, which work is next, what an adapter is worth, and
//! which checkpoint comes of it.
//!
//! It moves bytes, checks, decides and adds matrices; it knows no tensor framework and trains and
//! evaluates nothing itself.
//!
//! In reading order:
//! - [`config`]: the command line
//! - [`app`]: what every operation works with; [`clock`], [`limits`], [`error`], [`ids`],
//!   [`caller`], [`entropy`], [`secret`],
//!   [`lifecycle`]
//! - [`domain`]: the rules; no I/O, no clock, no wire
//! - [`db`]: the tables
//! - [`blobs`]: bytes by digest; [`manifests`]: what a checkpoint was made of, signed;
//!   [`folding`]: from contributions to a stored checkpoint; [`carry`]: the factors that a round's
//!   training starts from
//! - [`ops`]: one use case a file
//! - [`tasks`]: what happens without being asked
//! - [`rpc`] and [`http`]: the outside; [`net`] and [`tls`]: connections
//! - [`server`]: opening and serving all of it; [`fsck`] and [`backup`]: what an operator does beside it
//! - [`failpoint`]: where tests kill it

pub mod app;
pub mod backup;
pub mod blobs;
pub mod caller;
pub mod carry;
pub mod clock;
mod comparisons;
pub mod config;
pub mod db;
pub mod domain;
pub mod entropy;
pub mod error;
pub mod failpoint;
pub mod folding;
pub mod fsck;
pub mod http;
pub mod ids;
pub mod lifecycle;
pub mod limits;
pub mod manifests;
pub mod net;
pub mod ops;
pub mod rpc;
pub mod secret;
pub mod server;
pub mod tasks;
pub mod tls;
