//! The command line.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use cairn_proto::url::{Server, Transport};
use clap::{Args, Parser, Subcommand};

use crate::caller::Role;

/// The coordinator: hands out work, checks what comes back, stacks it, publishes checkpoints.
#[derive(Debug, Parser)]
#[command(
    name = "cairn-coordinator",
    version,
    after_help = "Examples:\n  \
        cairn-coordinator serve --data ./cairn-data\n  \
        cairn-coordinator token create --role maintainer --data ./cairn-data\n  \
        cairn-coordinator token create --role volunteer --uses 20 --ttl 24h --data ./cairn-data"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve, until SIGTERM or Ctrl-C; running calls are finished first.
    #[command(after_help = "Examples:\n  \
        cairn-coordinator serve\n      \
        on this machine alone, with TLS by a certificate made once\n  \
        cairn-coordinator serve --grpc 0.0.0.0:7600 --public-address cairn.example.org:7600\n      \
        for volunteers elsewhere; join URLs carry the certificate's key, no CA is needed\n  \
        cairn-coordinator serve --insecure\n      \
        plain text, on this machine only\n  \
        cairn-coordinator serve --database-url postgres://cairn@db/cairn --blobs s3://cairn/blobs\n      \
        stores of their own; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for\n      \
        another S3 than Amazon's, AWS_ENDPOINT (AWS_ALLOW_HTTP=true for http://) say the rest")]
    Serve(Box<ServeArgs>),
    /// Join tokens.
    Token {
        /// What to do with them.
        #[command(subcommand)]
        command: TokenCommand,
    },
}

/// What to do with join tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a join token and print its URL, alone, on stdout. Works beside a running server.
    Create(TokenArgs),
}

/// Where things are kept.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Folder of the database, blobs, uploads and TLS files; made when absent.
    #[arg(
        long,
        env = "CAIRN_DATA",
        default_value = "cairn-data",
        value_name = "DIR"
    )]
    pub data: PathBuf,
    /// Database: sqlite:///PATH?mode=rwc or postgres://...; default: DIR/cairn.db.
    #[arg(
        long,
        env = "CAIRN_DATABASE_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    pub database_url: Option<String>,
}

/// How to serve.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where things are kept.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Address for gRPC: volunteers, evaluators, maintainers.
    #[arg(long, env = "CAIRN_GRPC", default_value = DEFAULT_GRPC, value_name = "ADDR")]
    pub grpc: SocketAddr,
    /// Address for HTTP: /healthz, /readyz, /metrics. Plain text: keep it on this machine or
    /// behind a proxy.
    #[arg(
        long,
        env = "CAIRN_HTTP",
        default_value = "127.0.0.1:7601",
        value_name = "ADDR"
    )]
    pub http: SocketAddr,
    /// What join URLs say, when volunteers reach us by another name; default: the gRPC address.
    #[arg(long, env = "CAIRN_PUBLIC_ADDRESS", value_name = "HOST:PORT")]
    pub public_address: Option<String>,
    /// Blob store: a folder, s3://BUCKET/PREFIX, gs://..., az://... or abfss://..., with
    /// credentials and endpoint in AWS_, GOOGLE_ or AZURE_ variables; default: DIR/store.
    #[arg(long, env = "CAIRN_BLOBS", value_name = "URL")]
    pub blobs: Option<String>,
    /// Let clients send and fetch bytes straight to and from an s3, gs or az store; =false where
    /// they cannot reach it.
    #[arg(
        long,
        env = "CAIRN_DIRECT_TRANSFERS",
        default_value_t = true,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub direct_transfers: bool,
    /// TLS certificate chain, PEM; default: one made once, in DIR/tls.
    #[arg(
        long,
        env = "CAIRN_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    pub tls_cert: Option<PathBuf>,
    /// Key of the TLS certificate, PEM.
    #[arg(
        long,
        env = "CAIRN_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,
    /// Plain text instead of TLS; only on a loopback address.
    #[arg(long, env = "CAIRN_INSECURE", conflicts_with_all = ["tls_cert", "tls_key"])]
    pub insecure: bool,
    /// Plain text on any address: everybody on the way can read and change everything.
    #[arg(long, conflicts_with_all = ["tls_cert", "tls_key"])]
    pub force_insecure: bool,
    /// One JSON object a log line.
    #[arg(long, env = "CAIRN_LOG_JSON")]
    pub log_json: bool,
}

/// Where gRPC is served when nobody says otherwise.
pub const DEFAULT_GRPC: &str = "127.0.0.1:7600";

/// What kind of token.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Where things are kept.
    #[command(flatten)]
    pub store: StoreArgs,
    /// The role it gives: volunteer, evaluator or maintainer.
    #[arg(long)]
    pub role: Role,
    /// How many identities may join with it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub uses: u32,
    /// How long it is valid: 90s, 30m, 1h, 7d.
    #[arg(long, default_value = "1h", value_parser = parse_ttl)]
    pub ttl: Duration,
}

impl ServeArgs {
    /// Whether to serve plain text.
    ///
    /// # Errors
    /// When that is asked for on an address others can reach, and not forced.
    pub fn is_plain(&self) -> Result<bool> {
        if self.insecure && !self.force_insecure && !self.grpc.ip().is_loopback() {
            bail!(
                "--insecure on {}: plain text is only served on a loopback address; \
                 leave it out to use TLS, or add --force-insecure",
                self.grpc
            );
        }
        Ok(self.insecure || self.force_insecure)
    }

    /// What join URLs say, once the port is known.
    ///
    /// # Errors
    /// When the public address is none.
    pub fn endpoint(&self, bound: SocketAddr, transport: Transport) -> Result<Server> {
        match &self.public_address {
            Some(address) => server(address, transport)
                .with_context(|| format!("--public-address {address:?} is not HOST:PORT")),
            None => server(&bound.to_string(), transport),
        }
    }
}

/// A server at an address.
///
/// # Errors
/// When the address is not `host:port`.
pub fn server(address: &str, transport: Transport) -> Result<Server> {
    // The one parser of addresses is that of join URLs.
    let parsed: Server = format!("cairn+insecure://{address}/#").parse()?;
    Ok(Server {
        transport,
        ..parsed
    })
}

fn parse_ttl(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 24 * 3_600,
        _ => return Err("expected a number and s, m, h or d, such as 1h".to_owned()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "expected a number, such as 1h".to_owned())?;
    match number.checked_mul(seconds) {
        Some(0) | None => Err("out of range".to_owned()),
        Some(seconds) => Ok(Duration::from_secs(seconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn plain_text_stays_on_loopback_unless_forced() {
        let parse = |extra: &[&str]| {
            let arguments = ["cairn-coordinator", "serve"].iter().chain(extra);
            match Cli::try_parse_from(arguments).unwrap().command {
                Command::Serve(serve) => serve,
                Command::Token { .. } => unreachable!("serve was asked for"),
            }
        };
        assert!(!parse(&[]).is_plain().unwrap());
        assert!(parse(&["--insecure"]).is_plain().unwrap());
        assert!(
            parse(&["--insecure", "--grpc", "0.0.0.0:1"])
                .is_plain()
                .is_err()
        );
        assert!(
            parse(&["--force-insecure", "--grpc", "0.0.0.0:1"])
                .is_plain()
                .unwrap()
        );
    }

    #[test]
    fn times() {
        assert_eq!(parse_ttl("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_ttl("2d"), Ok(Duration::from_hours(48)));
        for bad in ["", "1", "h", "0h", "1w", "-1h", "99999999999999999999h"] {
            assert!(parse_ttl(bad).is_err(), "{bad}");
        }
    }
}
