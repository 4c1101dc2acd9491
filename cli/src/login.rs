//! `cairn login`: brings this machine in with a join URL.

use anyhow::{Context, Result, bail};
use cairn_proto::client;
use cairn_proto::convert::role_word;
use cairn_proto::url::JoinUrl;
use clap::Args;
use serde_json::json;

use crate::output::Output;
use crate::{Globals, session};

/// Enrols a key made on this machine and keeps it, with the server's address, under CAIRN_HOME.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  cairn login 'cairn://cairn.example.org:7600/#cairn_join_...~spki-sha256:...'"
)]
pub struct LoginArgs {
    /// Join URL, as `token create` printed it; put it in quotes
    url: String,
    /// Name shown to others [default: the user's name]
    #[arg(long)]
    name: Option<String>,
    /// Replace an identity that is already here
    #[arg(long)]
    replace: bool,
}

/// Runs `cairn login`.
pub async fn run(globals: &Globals, args: LoginArgs, output: Output) -> Result<()> {
    let url: JoinUrl = args.url.parse().context("read the join URL")?;
    let path = session::identity_path(globals)?;
    if path.exists() && !args.replace {
        bail!(
            "{} holds an identity already; add --replace to give it up, or set CAIRN_HOME to keep both",
            path.display()
        );
    }
    let name = args.name.unwrap_or_else(user_name);
    let identity = client::join(&url, &name, &path, &session::options(globals)).await?;
    let role = role_word(identity.role);
    output.result(
        &json!({
            "worker_id": identity.worker_id,
            "role": role,
            "server": identity.server.authority(),
            "identity": path,
        }),
        || {
            format!(
                "signed in to {} as {name} ({role}); identity kept in {}",
                identity.server.authority(),
                path.display()
            )
        },
    )
}

fn user_name() -> String {
    let name = std::env::var("USER")
        .or_else(|_| std::env::var("USERNAME"))
        .unwrap_or_default();
    if name.is_empty() {
        "maintainer".to_owned()
    } else {
        name
    }
}
