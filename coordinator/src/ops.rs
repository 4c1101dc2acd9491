//! One use case a file: each reads top to bottom as the story of one request, and alone begins and
//! commits.
pub mod abort_round;
pub mod claim_work;
pub mod create_challenge;
pub mod create_dataset;
pub mod create_join_token;
pub mod create_model;
pub mod create_round;
pub mod create_session;
pub mod enroll;
pub mod find_blobs;
pub mod read_blob;
pub mod read_contributions;
pub mod read_datasets;
pub mod read_log;
pub mod read_models;
pub mod read_rounds;
pub mod read_standing;
pub mod release_lease;
pub mod renew_lease;
pub mod revoke_contribution;
pub mod submit_adapter;
pub mod submit_findings;
pub mod submit_scores;
pub mod watch_round;
pub mod write_blob;
