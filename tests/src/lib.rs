//! Whole-system tests: the real coordinator behind its real wire, with honest, hostile and faulty
//! clients. No tensor framework: adapters are made here, and a hidden rule says what they are worth.
//!
//! In reading order:
//! - [`tiny`]: a model of a few kilobytes, its data, its round file
//! - [`puzzle`]: the hidden rule, and the scores that follow from it
//! - [`adapters`]: honest adapters, and everything a saboteur may send instead
//! - [`training`]: what a member commits to and opens
//! - [`member`]: one signed-on client, with the calls of its role
//! - [`evaluator`]: an evaluator that answers by the hidden rule
//! - [`cluster`]: a coordinator in this process, with a clock that the test moves
//! - [`process`]: the coordinator's program, to be killed
//! - [`balancer`]: what stands before several of them
//! - [`replicas`]: several of them over one database, killed at random
//! - [`attacks`]: what the checks catch, miss and cost, with real training
//! - [`chaos`]: faults of every kind, and what is survived
//! - [`s3`]: an S3 server, the one of the coordinator's own tests
//! - [`stranger`]: `cairn` in a home of its own
//! - [`study`]: how contributions add up, with real training

pub mod adapters;
pub mod attacks;
pub mod balancer;
pub mod chaos;
pub mod cluster;
pub mod evaluator;
pub mod member;
pub mod process;
pub mod puzzle;
pub mod replicas;
#[path = "../../coordinator/tests/support/s3.rs"]
pub mod s3;
pub mod stranger;
pub mod study;
pub mod tiny;
pub mod training;
