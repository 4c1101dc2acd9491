//! `cairn` in a home of its own: what anybody has who looks at a coordinator from outside.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use cairn_proto::v1;
use serde_json::{Value, json};

use crate::process::built;

/// Arguments that verify the log pulled to `log.jsonl`, with the receipts that [`Stranger::keep`] kept.
pub const VERIFY_LOG: [&str; 6] = [
    "log",
    "verify",
    "log.jsonl",
    "--receipts",
    "receipts",
    "--json",
];

/// Somebody with a folder, signed in.
pub struct Stranger {
    folder: PathBuf,
}

impl Stranger {
    /// Signs in by a join URL; the folder is made when absent.
    ///
    /// # Errors
    /// When the program is not built or is refused.
    pub fn log_in(folder: impl Into<PathBuf>, url: &str) -> Result<Self> {
        let stranger = Self {
            folder: folder.into(),
        };
        fs::create_dir_all(&stranger.folder)?;
        succeeded(stranger.cairn(&["login", url, "--name", "stranger", "--replace"])?)?;
        Ok(stranger)
    }

    /// Where the program runs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Runs `cairn`, and waits for it.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn cairn(&self, arguments: &[&str]) -> Result<Output> {
        let run = || {
            Ok(Command::new(built("cairn-cli", "cairn")?)
                .env_clear()
                .env("CAIRN_HOME", self.folder.join("home"))
                .args(arguments)
                .current_dir(&self.folder)
                .output()?)
        };
        tokio::task::block_in_place(run)
    }

    /// Runs `cairn` for the JSON that it prints.
    ///
    /// # Errors
    /// When it fails, or prints none.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = succeeded(self.cairn(arguments)?)?;
        serde_json::from_slice(&text).with_context(|| format!("cairn {}", arguments.join(" ")))
    }

    /// Keeps a receipt in the folder `receipts`, as `cairn-worker` does.
    ///
    /// # Errors
    /// When it is no text, or cannot be written.
    pub fn keep(&self, name: &str, receipt: &v1::Receipt) -> Result<()> {
        let receipts = self.folder.join("receipts");
        fs::create_dir_all(&receipts)?;
        let kept = json!({
            "statement": std::str::from_utf8(&receipt.statement)?,
            "signature": hex::encode(&receipt.signature),
            "verdict": null,
        });
        fs::write(receipts.join(format!("{name}.json")), kept.to_string())?;
        Ok(())
    }
}

/// What a program printed that has succeeded.
///
/// # Errors
/// With what it said when it has not.
pub fn succeeded(output: Output) -> Result<Vec<u8>> {
    let says = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cairn says: {}", says.trim());
    Ok(output.stdout)
}
