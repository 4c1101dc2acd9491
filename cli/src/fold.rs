//! `cairn fold`: base plus weighted adapters, offline.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cairn_stack::adapter::AdapterFile;
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::fold::{Term, fold};
use clap::Args;
use serde_json::json;

use crate::output::Output;

/// Most adapters in one call; far more than any stack published so far.
const ADAPTERS_MAX: usize = 10_000;

/// Folds adapters into a base checkpoint: W0 + sum of weight * delta, in f32, rounded once.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  cairn fold --base ./base --adapter ./adapter-a --adapter ./adapter-b:0.5 --out ./folded"
)]
pub struct FoldArgs {
    /// Folder of the base checkpoint, in Hugging Face layout
    #[arg(long, value_name = "DIR")]
    base: PathBuf,
    /// Folder of a PEFT adapter, and the factor on its delta (1 when not given); repeat to stack
    #[arg(long = "adapter", value_name = "DIR[:WEIGHT]", required = true, value_parser = parse_weighted)]
    adapters: Vec<Weighted>,
    /// Folder to write; must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// An adapter folder and the factor on its delta.
#[derive(Debug, Clone, PartialEq)]
struct Weighted {
    dir: PathBuf,
    weight: f64,
}

/// Reads `DIR` or `DIR:WEIGHT`. A colon that is not followed by a number belongs to the path, and
/// so does one in a folder that exists under its full name.
fn parse_weighted(text: &str) -> Result<Weighted, String> {
    let whole = Weighted {
        dir: PathBuf::from(text),
        weight: 1.0,
    };
    if Path::new(text).is_dir() {
        return Ok(whole);
    }
    let Some((dir, weight)) = text.rsplit_once(':') else {
        return Ok(whole);
    };
    match weight.parse::<f64>() {
        Ok(weight) if weight.is_finite() && !dir.is_empty() => Ok(Weighted {
            dir: PathBuf::from(dir),
            weight,
        }),
        Ok(_) => Err(format!(
            "the weight in `{text}` must be a finite number behind a folder"
        )),
        Err(_) if weight.contains(['/', '\\']) => Ok(whole),
        Err(_) => Err(format!(
            "`{weight}` in `{text}` is not a number; write DIR or DIR:WEIGHT"
        )),
    }
}

/// Runs `cairn fold`.
pub fn run(args: &FoldArgs, output: Output) -> Result<()> {
    ensure!(
        args.adapters.len() <= ADAPTERS_MAX,
        "at most {ADAPTERS_MAX} adapters in one call"
    );
    let base = Checkpoint::open(&args.base)
        .with_context(|| format!("open the base {}", args.base.display()))?;
    let mut opened = Vec::with_capacity(args.adapters.len());
    for Weighted { dir, weight } in &args.adapters {
        if !dir.is_dir() {
            bail!("there is no adapter folder {}", dir.display());
        }
        let adapter = AdapterFile::open(dir)
            .with_context(|| format!("open the adapter {}", dir.display()))?;
        // There may be more of them than files may be open.
        opened.push((adapter.closed(), *weight));
    }
    let terms: Vec<Term> = opened
        .iter()
        .map(|(adapter, weight)| Term {
            adapter,
            weight: *weight,
        })
        .collect();
    let report = fold(&base, &terms, &args.out).context("fold")?;
    output.result(
        &json!({
            "out": args.out,
            "adapters": terms.len(),
            "tensors_changed": report.folded,
        }),
        || {
            format!(
                "folded {} adapter(s) into {} tensors: {}",
                terms.len(),
                report.folded,
                args.out.display()
            )
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_and_weight() {
        let parse = |text| parse_weighted(text).map(|weighted| (weighted.dir, weighted.weight));
        assert_eq!(parse("a/b"), Ok((PathBuf::from("a/b"), 1.0)));
        assert_eq!(parse("a/b:0.25"), Ok((PathBuf::from("a/b"), 0.25)));
        assert_eq!(parse("a:b/c:-2e-1"), Ok((PathBuf::from("a:b/c"), -0.2)));
        assert_eq!(
            parse("c:/adapters"),
            Ok((PathBuf::from("c:/adapters"), 1.0))
        );
        assert!(parse("a:nan").is_err());
        assert!(parse("a:").is_err());
        assert!(parse(":1").is_err());
        assert!(parse("a:half").unwrap_err().contains("`half`"));
    }

    #[test]
    fn a_folder_with_a_colon_in_its_name_is_taken_whole() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("run:2");
        std::fs::create_dir(&dir).unwrap();
        let parsed = parse_weighted(dir.to_str().unwrap()).unwrap();
        assert_eq!(parsed, Weighted { dir, weight: 1.0 });
    }
}
