//! The whole coordinator in this process, and what clients of every kind can do to it.

mod attacks;
mod enrolment;
mod evaluations;
mod inputs;
mod leases;
mod rounds;
mod uploads;
