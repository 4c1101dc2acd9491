//! The whole coordinator in this process, and what clients of every kind can do to it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod attacks;
mod enrolment;
mod evaluations;
mod inputs;
mod leases;
mod rounds;
mod uploads;
