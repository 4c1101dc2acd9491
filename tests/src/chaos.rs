//! What is survived: faults put on the real programs, each with the outcome that is expected of it.
//!
//! Every scenario has a coordinator of its own on loopback, plays one fault, and says what it saw;
//! whatever it was, [`invariants`] then kills and starts that coordinator once more and looks whether
//! anything acknowledged is missing.
//!
//! In reading order:
//! - [`suite`]: what a scenario is, the table of all of them, and how they are run
//! - [`world`]: a coordinator to be broken, as a process or here with a clock that can be moved
//! - [`invariants`]: what must hold after every scenario
//! - [`proxy`]: a TCP line that cuts, delays, throttles, and swallows
//! - [`database`]: a PostgreSQL to be stopped and killed
//! - [`uploads`], [`crashes`], [`stores`], [`bucket`], [`leases`], [`network`], [`trust`], [`versions`]: the
//!   scenarios, one file a family
//! - [`report`]: the scorecard

pub mod bucket;
pub mod crashes;
pub mod database;
pub mod invariants;
pub mod leases;
pub mod network;
pub mod proxy;
pub mod report;
pub mod stores;
pub mod suite;
pub mod trust;
pub mod uploads;
pub mod versions;
pub mod world;
