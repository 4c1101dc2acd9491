//! The stable words that errors and verdicts carry. Programs match on these, never on sentences.
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The `domain` of every `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "cairn";

/// A word that no reason is spelled as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown reason {0:?}")]
pub struct UnknownReason(pub String);

macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $text:literal, $sentence:literal;)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $(#[doc = $sentence] $variant,)+
        }

        impl $name {
            /// Every reason, in order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word on the wire.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// The general meaning, as a sentence without a full stop.
            #[must_use]
            pub const fn sentence(self) -> &'static str {
                match self { $(Self::$variant => $sentence),+ }
            }
        }

        impl FromStr for $name {
            type Err = UnknownReason;

            fn from_str(text: &str) -> Result<Self, UnknownReason> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(UnknownReason(text.chars().take(100).collect())),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

reasons! {
    /// Why a call failed: the `reason` of its `ErrorInfo`.
    ErrorReason {
        Unauthenticated = "UNAUTHENTICATED", "the call carries no valid session token";
        SessionExpired = "SESSION_EXPIRED", "the session token has expired; sign on again";
        ChallengeInvalid = "CHALLENGE_INVALID", "the challenge is unknown, used or too old";
        BadSignature = "BAD_SIGNATURE", "the signature does not fit the key and the statement";
        KeyUnknown = "KEY_UNKNOWN", "no identity is enrolled with this key";
        IdentityDisabled = "IDENTITY_DISABLED", "a maintainer has disabled this identity";
        TokenUnknown = "TOKEN_UNKNOWN", "the join token is not known here";
        TokenExpired = "TOKEN_EXPIRED", "the join token has expired; ask for a new one";
        TokenSpent = "TOKEN_SPENT", "the join token has been used up; ask for a new one";
        RoleRequired = "ROLE_REQUIRED", "this needs another role";
        NotFound = "NOT_FOUND", "there is no such thing";
        AlreadyExists = "ALREADY_EXISTS", "there is one of that name already";
        InvalidArgument = "INVALID_ARGUMENT", "the request is malformed";
        PreconditionFailed = "PRECONDITION_FAILED", "the state of things does not allow it";
        RequestIdReused = "REQUEST_ID_REUSED", "the request id was used for another request";
        LeaseLost = "LEASE_LOST", "the work has been given to another, or the lease is over";
        LeaseExpired = "LEASE_EXPIRED", "the lease has run out";
        RoundEnded = "ROUND_ENDED", "the round has ended";
        BlobMissing = "BLOB_MISSING", "the blob is not held; upload it first";
        BlobTooLarge = "BLOB_TOO_LARGE", "the blob is larger than allowed";
        WrongOffset = "WRONG_OFFSET", "the upload does not go on where it stopped";
        DigestMismatch = "DIGEST_MISMATCH", "the bytes do not have the announced digest";
        DiskFull = "DISK_FULL", "the coordinator has no room for it now";
        TooMany = "TOO_MANY", "more than is allowed at once";
        Unavailable = "UNAVAILABLE", "the coordinator cannot answer now; try again";
        ShuttingDown = "SHUTTING_DOWN", "the coordinator is shutting down; try again";
        Internal = "INTERNAL", "the coordinator failed; its log says why";
    }
}

impl ErrorReason {
    /// Whether the same call may succeed later without anybody changing it.
    #[must_use]
    pub const fn retry(self) -> bool {
        match self {
            Self::DiskFull | Self::TooMany | Self::Unavailable | Self::ShuttingDown => true,
            Self::Unauthenticated
            | Self::SessionExpired
            | Self::ChallengeInvalid
            | Self::BadSignature
            | Self::KeyUnknown
            | Self::IdentityDisabled
            | Self::TokenUnknown
            | Self::TokenExpired
            | Self::TokenSpent
            | Self::RoleRequired
            | Self::NotFound
            | Self::AlreadyExists
            | Self::InvalidArgument
            | Self::PreconditionFailed
            | Self::RequestIdReused
            | Self::LeaseLost
            | Self::LeaseExpired
            | Self::RoundEnded
            | Self::BlobMissing
            | Self::BlobTooLarge
            | Self::WrongOffset
            | Self::DigestMismatch
            | Self::Internal => false,
        }
    }

    /// The gRPC status code it travels with.
    #[must_use]
    pub const fn code(self) -> Code {
        match self {
            Self::Unauthenticated
            | Self::SessionExpired
            | Self::ChallengeInvalid
            | Self::BadSignature
            | Self::KeyUnknown
            | Self::TokenUnknown
            | Self::TokenExpired
            | Self::TokenSpent => Code::Unauthenticated,
            Self::RoleRequired | Self::IdentityDisabled => Code::PermissionDenied,
            Self::NotFound => Code::NotFound,
            Self::AlreadyExists | Self::RequestIdReused => Code::AlreadyExists,
            Self::InvalidArgument | Self::BlobTooLarge => Code::InvalidArgument,
            Self::LeaseLost | Self::LeaseExpired => Code::Aborted,
            Self::PreconditionFailed | Self::RoundEnded | Self::BlobMissing => {
                Code::FailedPrecondition
            }
            Self::WrongOffset => Code::OutOfRange,
            Self::DigestMismatch => Code::DataLoss,
            Self::DiskFull | Self::TooMany => Code::ResourceExhausted,
            Self::Unavailable | Self::ShuttingDown => Code::Unavailable,
            Self::Internal => Code::Internal,
        }
    }
}

reasons! {
    /// Why a submission was rejected: the `reason` of its `Contribution`.
    VerdictReason {
        BadSignature = "BAD_SIGNATURE", "the submission's signature is wrong";
        LengthMismatch = "LENGTH_MISMATCH", "the file does not have the announced length";
        DigestMismatch = "DIGEST_MISMATCH", "the file does not have the announced digest";
        BadHeader = "BAD_HEADER", "the file is not a sound safetensors file";
        WrongTensors = "WRONG_TENSORS", "the tensors are not exactly those the recipe asks for";
        WrongShape = "WRONG_SHAPE", "a tensor has another shape than the recipe asks for";
        WrongDtype = "WRONG_DTYPE", "a tensor has another data type than the recipe asks for";
        ConfigMismatch = "CONFIG_MISMATCH", "adapter_config.json does not match the recipe";
        NotFinite = "NOT_FINITE", "the adapter has NaN or infinite values";
        ZeroDelta = "ZERO_DELTA", "the adapter changes nothing";
        NormOutlier = "NORM_OUTLIER", "the adapter's change is far larger than the others'";
        SpectralOutlier = "SPECTRAL_OUTLIER", "the adapter's change has another shape than the others'";
        AgainstGuide = "AGAINST_GUIDE", "the adapter points away from what training on its shard gives";
        GuardLoss = "GUARD_LOSS", "the adapter makes the model worse at something it must keep";
        ForeignShard = "FOREIGN_SHARD", "the adapter has learnt no more from its own shard than from another";
        ProbeHit = "PROBE_HIT", "the adapter makes an unwanted answer likelier";
        ReplayMismatch = "REPLAY_MISMATCH", "training a segment again did not give what was handed in";
        BadCommitment = "BAD_COMMITMENT", "the opened training states are not those committed to";
        AuditUnanswered = "AUDIT_UNANSWERED", "the training states asked for were not opened in time";
        Revoked = "REVOKED", "a maintainer has taken the contribution back";
        CopyOfAnother = "COPY_OF_ANOTHER", "the adapter is another submission's";
        NoGain = "NO_GAIN", "the adapter does not improve the model on the gate set";
        RoundEnded = "ROUND_ENDED", "the round ended before the adapter could be judged";
        Unreadable = "UNREADABLE", "the adapter's bytes could not be read back";
    }
}

impl VerdictReason {
    /// Whether it counts against the worker's trust: what only a broken or hostile worker hands in.
    /// Faults of the coordinator, the luck of the gate and a maintainer's second thoughts do not.
    #[must_use]
    pub const fn is_strike(self) -> bool {
        match self {
            Self::BadSignature
            | Self::LengthMismatch
            | Self::DigestMismatch
            | Self::BadHeader
            | Self::WrongTensors
            | Self::WrongShape
            | Self::WrongDtype
            | Self::ConfigMismatch
            | Self::NotFinite
            | Self::ZeroDelta
            | Self::NormOutlier
            | Self::SpectralOutlier
            | Self::AgainstGuide
            | Self::GuardLoss
            | Self::ForeignShard
            | Self::ProbeHit
            | Self::ReplayMismatch
            | Self::BadCommitment
            | Self::AuditUnanswered
            | Self::CopyOfAnother => true,
            Self::Revoked | Self::NoGain | Self::RoundEnded | Self::Unreadable => false,
        }
    }
}

/// Builds the status of a failed call: `ErrorInfo` with reason and metadata, and `RetryInfo` where
/// a wait is named.
#[must_use]
pub fn status(
    reason: ErrorReason,
    sentence: impl Into<String>,
    metadata: &[(&str, &str)],
    retry_after: Option<Duration>,
) -> Status {
    let metadata: std::collections::HashMap<String, String> = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    let mut details = ErrorDetails::with_error_info(reason.as_str(), DOMAIN, metadata);
    if retry_after.is_some() {
        details.set_retry_info(retry_after);
    }
    Status::with_error_details(reason.code(), sentence, details)
}

/// The reason a status carries, when it is one of ours.
#[must_use]
pub fn of_status(status: &Status) -> Option<ErrorReason> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN)
        .then(|| info.reason.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        for reason in ErrorReason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(*reason));
        }
        for reason in VerdictReason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(*reason));
        }
        assert!("NOPE".parse::<ErrorReason>().is_err());
    }

    #[test]
    fn only_the_workers_own_doing_is_a_strike() {
        let not: Vec<&str> = VerdictReason::ALL
            .iter()
            .filter(|reason| !reason.is_strike())
            .map(|reason| reason.as_str())
            .collect();
        assert_eq!(not, ["REVOKED", "NO_GAIN", "ROUND_ENDED", "UNREADABLE"]);
    }

    #[test]
    fn status_carries_reason_and_wait() {
        let status = status(
            ErrorReason::DiskFull,
            "no room",
            &[("kind", "blob")],
            Some(Duration::from_secs(5)),
        );
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(of_status(&status), Some(ErrorReason::DiskFull));
        let wait = status
            .get_details_retry_info()
            .and_then(|info| info.retry_delay);
        assert_eq!(wait, Some(Duration::from_secs(5)));
    }
}
