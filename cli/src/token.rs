//! `cairn token`: join tokens for volunteers, evaluators and maintainers.

use anyhow::{Context, Result};
use cairn_proto::v1::{CreateJoinTokenRequest, Role};
use clap::{Subcommand, ValueEnum};
use serde_json::json;

use crate::clock;
use crate::output::Output;
use crate::{Globals, session};

/// What `cairn token` can do.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a join token; stdout is the join URL alone
    #[command(after_help = "Example:\n  cairn token create --role volunteer --uses 20 --ttl 24h")]
    Create {
        /// What those who join with it may do
        #[arg(long)]
        role: RoleWord,
        /// How many may join with it
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// How long it is valid, e.g. 30m, 2h
        #[arg(long, default_value = "1h", value_parser = parse_ttl)]
        ttl: i64,
    },
}

/// A role as written on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum RoleWord {
    /// Claims training work.
    Volunteer,
    /// Claims evaluation work and reads the secret sets.
    Evaluator,
    /// Schedules rounds.
    Maintainer,
}

impl From<RoleWord> for Role {
    fn from(word: RoleWord) -> Self {
        match word {
            RoleWord::Volunteer => Self::Volunteer,
            RoleWord::Evaluator => Self::Evaluator,
            RoleWord::Maintainer => Self::Maintainer,
        }
    }
}

fn parse_ttl(text: &str) -> Result<i64, String> {
    let ms = cairn_stack::duration::parse_duration_ms(text).map_err(|error| error.to_string())?;
    i64::try_from(ms).map_err(|_| "too long".to_owned())
}

/// Runs `cairn token`.
pub async fn run(globals: &Globals, command: TokenCommand, output: Output) -> Result<()> {
    let TokenCommand::Create { role, uses, ttl } = command;
    let request = CreateJoinTokenRequest {
        role: Role::from(role).into(),
        uses,
        ttl_ms: ttl,
    };
    let answer = session::connect(globals)?
        .call(|mut to| async move { to.enrollment.create_join_token(request).await })
        .await
        .context("make a join token")?;
    eprintln!(
        "valid until {}, for {uses} machine(s)",
        clock::date(answer.expires_ms)
    );
    output.result(
        &json!({ "join_url": answer.join_url, "expires_ms": answer.expires_ms, "uses": uses }),
        || answer.join_url.clone(),
    )
}
