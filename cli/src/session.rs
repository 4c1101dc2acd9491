//! Who we are to the coordinator, and what to do when that does not work.

use std::path::PathBuf;

use anyhow::{Context, Result};
use cairn_proto::client::{Client, ClientError, Options};
use cairn_proto::identity::{self, Identity, IdentityError, MAINTAINER_FILE};
use cairn_proto::reason::ErrorReason;

use crate::Globals;

/// Where this machine's maintainer identity lies.
pub fn identity_path(globals: &Globals) -> Result<PathBuf> {
    Ok(identity::home(globals.home.as_deref())?.join(MAINTAINER_FILE))
}

/// How this program talks: it waits a while for a coordinator that restarts, then says so.
pub fn options(globals: &Globals) -> Options {
    Options {
        force_insecure: globals.force_insecure,
        ..Options::default()
    }
}

/// A client signed on as the identity that `cairn login` kept.
pub fn connect(globals: &Globals) -> Result<Client> {
    let identity = Identity::load(&identity_path(globals)?)?;
    Client::new(identity, options(globals)).context("connect to the coordinator")
}

/// A fresh request id, so that a repeated call counts once.
pub fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// What somebody who reads this error should do next, where that is known.
pub fn next_step(error: &anyhow::Error) -> Option<&'static str> {
    if let Some(IdentityError::NotJoined { .. }) =
        error.chain().find_map(|cause| cause.downcast_ref())
    {
        return Some(NOT_LOGGED_IN);
    }
    match error
        .chain()
        .find_map(|cause| cause.downcast_ref::<ClientError>())?
    {
        ClientError::Identity(IdentityError::NotJoined { .. }) => Some(NOT_LOGGED_IN),
        ClientError::Unreachable { .. } => {
            Some("is `cairn-coordinator serve` running there, and the port open?")
        }
        ClientError::Refused {
            reason: Some(reason),
            ..
        } => match reason {
            ErrorReason::TokenUnknown | ErrorReason::TokenExpired | ErrorReason::TokenSpent => {
                Some(
                    "make a new one beside the server: cairn-coordinator token create --role maintainer",
                )
            }
            ErrorReason::RoleRequired => {
                Some("sign in with a maintainer's join URL: cairn login 'cairn://...'")
            }
            _ => None,
        },
        _ => None,
    }
}

const NOT_LOGGED_IN: &str = "sign in first: cairn login 'cairn://host:port/#TOKEN...' (ask the operator for a join URL, or \
make one with `cairn-coordinator token create --role maintainer`)";
