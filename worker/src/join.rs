//! `cairn-worker join`: brings this machine in with a one-time URL.

use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use cairn_proto::client::{self, Options};
use cairn_proto::convert::role_word;
use cairn_proto::limits::DISPLAY_NAME_CHARS_MAX;
use cairn_proto::url::JoinUrl;
use cairn_proto::v1;

use crate::error::WorkerError;
use crate::home::Home;

/// Join a coordinator with a one-time URL
///
/// The key that identifies this machine is made here and never leaves it.
#[derive(Args)]
#[command(
    after_help = "Example:\n  cairn-worker join 'cairn://host:7600/#TOKEN~spki-sha256:HEX' --name ada\n\nQuote the URL: a shell takes the part behind # for a comment."
)]
pub struct JoinArgs {
    /// The URL a maintainer gave you
    #[arg(value_name = "URL")]
    pub url: String,
    /// Name shown to others with your contributions [default: this machine's host name]
    #[arg(long)]
    pub name: Option<String>,
    /// Give up the identity that is already here
    #[arg(long)]
    pub replace: bool,
    /// Allow cairn+insecure:// to another machine: anybody in between can read and change all of it
    #[arg(long)]
    pub force_insecure: bool,
    /// Where identity, cache and unfinished work are kept
    #[arg(long, env = "CAIRN_HOME", value_name = "DIR")]
    pub home: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the URL is bad, the coordinator refuses, or the identity cannot be kept.
pub async fn run(args: JoinArgs) -> Result<(), WorkerError> {
    let url: JoinUrl = args.url.parse()?;
    let name = display_name(args.name)?;
    let home = Home::new(args.home.as_deref())?;
    let path = home.identity_file();
    if path.exists() && !args.replace {
        return Err(WorkerError::AlreadyJoined { path });
    }
    let options = Options {
        force_insecure: args.force_insecure,
        ..Options::default()
    };
    let identity = client::join(&url, &name, &path, &options).await?;
    let role = role_word(identity.role);
    if args.json {
        let object = json!({
            "worker_id": identity.worker_id,
            "role": role,
            "server": identity.server.to_string(),
            "home": home.path.display().to_string(),
        });
        return writeln!(stdout(), "{object}").map_err(WorkerError::home("write", &home.path));
    }
    eprintln!(
        "joined {} as {name}, {role} {}",
        identity.server.authority(),
        identity.worker_id
    );
    eprintln!("identity kept in {}; it is the only copy", path.display());
    if identity.role == v1::Role::Maintainer {
        eprintln!("note: a maintainer gets no work; this token was meant for `cairn login`");
    } else {
        eprintln!("next: cairn-worker run");
    }
    Ok(())
}

fn display_name(chosen: Option<String>) -> Result<String, WorkerError> {
    let name = chosen
        .or_else(host_name)
        .unwrap_or_else(|| "volunteer".to_owned());
    let name = name.trim().to_owned();
    let plain = !name.is_empty()
        && name.chars().count() <= DISPLAY_NAME_CHARS_MAX
        && !name.chars().any(char::is_control);
    if plain {
        Ok(name)
    } else {
        Err(WorkerError::Name)
    }
}

fn host_name() -> Option<String> {
    let variable = std::env::var("HOSTNAME")
        .or_else(|_| std::env::var("COMPUTERNAME"))
        .ok();
    let name = variable.or_else(|| std::fs::read_to_string("/etc/hostname").ok())?;
    let name: String = name.trim().chars().take(DISPLAY_NAME_CHARS_MAX).collect();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_printable_and_short() {
        assert_eq!(display_name(Some(" ada ".into())).unwrap(), "ada");
        assert!(display_name(Some(" ".into())).is_err());
        assert!(display_name(Some("a\u{7}".into())).is_err());
        assert!(display_name(Some("x".repeat(65))).is_err());
    }
}
