//! Who calls, and what they may do.
use std::fmt;
use std::str::FromStr;

use cairn_proto::reason::ErrorReason;
use ed25519_dalek::VerifyingKey;

use crate::error::Error;
use crate::ids::{IdError, WorkerId};

/// What an identity may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Claims training work.
    Volunteer,
    /// Claims evaluation work; reads gate and audit sets.
    Evaluator,
    /// Schedules rounds, adds models and datasets, makes join tokens.
    Maintainer,
}

impl Role {
    /// The word in the database and on command lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Volunteer => "volunteer",
            Self::Evaluator => "evaluator",
            Self::Maintainer => "maintainer",
        }
    }

    /// Whether it may read what is kept from volunteers: gate and audit sets, others' adapters.
    #[must_use]
    pub const fn is_trusted(self) -> bool {
        match self {
            Self::Volunteer => false,
            Self::Evaluator | Self::Maintainer => true,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match text {
            "volunteer" => Ok(Self::Volunteer),
            "evaluator" => Ok(Self::Evaluator),
            "maintainer" => Ok(Self::Maintainer),
            _ => Err(IdError {
                kind: "role (volunteer, evaluator or maintainer)",
                text: text.chars().take(80).collect(),
            }),
        }
    }
}

/// The identity behind a call's session token.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Its id.
    pub worker: WorkerId,
    /// Its role.
    pub role: Role,
    /// The key it enrolled with.
    pub public_key: VerifyingKey,
    /// Its display name.
    pub name: String,
}

impl Caller {
    /// Refuses callers of another role.
    ///
    /// # Errors
    /// ROLE_REQUIRED.
    pub fn require(&self, role: Role) -> Result<(), Error> {
        if self.role == role {
            return Ok(());
        }
        Err(Error::denied(
            ErrorReason::RoleRequired,
            format!("this needs the role {role}; you are a {}", self.role),
        )
        .with("role", role))
    }
}
