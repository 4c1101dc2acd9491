//! The gRPC services: decode, call one operation, encode. Wire types and `tonic::Status` stop here.
pub mod auth;
pub mod blob;
pub mod contribution;
pub mod dataset;
pub mod enrollment;
pub mod log;
pub mod model;
pub mod pages;
pub mod round;
pub mod status;
pub mod volunteer;
pub mod work;
