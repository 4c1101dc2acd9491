//! The only way from our errors to `tonic::Status`.
use tonic::Status;
use tracing::error;

use crate::error::Error;

impl From<Error> for Status {
    fn from(problem: Error) -> Self {
        // Here the error is handled, so here it is logged, once.
        if problem.is_internal() {
            error!("call failed: {}", problem.full());
        } else {
            tracing::debug!(reason = %problem.reason(), "call refused: {}", problem.full());
        }
        let metadata: Vec<(&str, &str)> = problem
            .metadata()
            .iter()
            .map(|(key, value)| (*key, value.as_str()))
            .collect();
        cairn_proto::reason::status(
            problem.reason(),
            problem.to_string(),
            &metadata,
            problem.retry_after(),
        )
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::reason::{self, ErrorReason};

    use super::*;

    #[test]
    fn every_reason_travels_and_only_our_faults_are_hidden() {
        for reason in ErrorReason::ALL {
            let status = Status::from(Error::new(*reason, "said aloud").with("id", 7));
            assert_eq!(status.code(), reason.code());
            assert_eq!(reason::of_status(&status), Some(*reason));
            assert_eq!(status.message(), "said aloud");
        }
        let secret = std::io::Error::other("/var/lib/secret is broken");
        let status = Status::from(Error::internal("open", secret));
        assert!(!status.message().contains("secret"), "{}", status.message());
    }
}
