//! The demo's own small model and data, built into this program (see `cli/demo/README.md`).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Licence of the data, which Cairn made itself.
pub const LICENSE: &str = "MIT OR Apache-2.0";

/// Name of the model and of the datasets, as in the round file.
pub const MODEL: &str = "village";
/// Training data.
pub const TRAIN: &str = "trail-notes";
/// Secret data that decides.
pub const GATE: &str = "trail-notes-gate";
/// Secret data that is only reported.
pub const AUDIT: &str = "trail-notes-audit";

/// Short, so that a killed volunteer's shard is open again while you watch.
const LEASE_MS: u64 = 20_000;

const ROUND_FILE: &str = include_str!("../../demo/round.toml");

const FILES: [(&str, &[u8]); 8] = [
    (
        "base/config.json",
        include_bytes!("../../demo/base/config.json"),
    ),
    (
        "base/generation_config.json",
        include_bytes!("../../demo/base/generation_config.json"),
    ),
    (
        "base/model.safetensors",
        include_bytes!("../../demo/base/model.safetensors"),
    ),
    (
        "base/tokenizer.json",
        include_bytes!("../../demo/base/tokenizer.json"),
    ),
    (
        "base/tokenizer_config.json",
        include_bytes!("../../demo/base/tokenizer_config.json"),
    ),
    ("train.jsonl", include_bytes!("../../demo/train.jsonl")),
    ("gate.jsonl", include_bytes!("../../demo/gate.jsonl")),
    ("audit.jsonl", include_bytes!("../../demo/audit.jsonl")),
];

/// Where the demo's inputs lie once written.
pub struct Inputs {
    /// Base checkpoint.
    pub base: PathBuf,
    /// Training records.
    pub train: PathBuf,
    /// Gate records.
    pub gate: PathBuf,
    /// Audit records.
    pub audit: PathBuf,
}

/// Writes model and data under `dir`.
pub fn write(dir: &Path) -> Result<Inputs> {
    for (name, bytes) in FILES {
        let path = dir.join(name);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("create {}", folder.display()))?;
        }
        std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(Inputs {
        base: dir.join("base"),
        train: dir.join("train.jsonl"),
        gate: dir.join("gate.jsonl"),
        audit: dir.join("audit.jsonl"),
    })
}

/// The round file of round `number` (from 1): each has its own seed, so its shards are cut anew,
/// and a short lease, so that a killed volunteer is noticed while you watch.
pub fn round_file(number: u32) -> Result<String> {
    let mut round = cairn_stack::round::RoundFile::parse_toml(ROUND_FILE)
        .context("read the demo's round file")?;
    round.recipe.seed += u64::from(number);
    round.policy.seed += u64::from(number);
    round.policy.lease_ms = LEASE_MS;
    Ok(round.to_toml())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_round_file_names_what_is_added_and_each_round_has_its_seed() {
        let first = cairn_stack::round::RoundFile::parse_toml(&round_file(1).unwrap()).unwrap();
        let second = cairn_stack::round::RoundFile::parse_toml(&round_file(2).unwrap()).unwrap();
        assert_eq!(
            (first.model.as_str(), first.dataset.as_str()),
            (MODEL, TRAIN)
        );
        assert_eq!(
            (first.policy.gate.as_str(), first.policy.audit.as_deref()),
            (GATE, Some(AUDIT))
        );
        assert_ne!(first.recipe.seed, second.recipe.seed);
        assert_ne!(first.policy.seed, second.policy.seed);
    }
}
