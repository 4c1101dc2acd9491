//! `cairn-worker evaluate`: per-example losses of a model, with any number of weighted adapters.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use serde_json::{Value, json};

use cairn_stack::quantize::Quantize;
use cairn_stack::recipe::DPO_BETA_DEFAULT;
use cairn_stack::records::Format;

use super::{OfflineError, json_number, read_file, with_rewards};
use crate::cancel::CancelFlag;
use crate::device::{Depth, DeviceChoice};
use crate::evaluate::{
    EvaluateProgress, EvaluateReport, encode_set, read_adapters, score_set, sequence_length,
};
use crate::interrupt::cancel_on_signal;
use crate::memory::Memory;
use crate::model::LoadedModel;
use crate::preflight::{self, estimate::Frozen};
use crate::progress::ProgressLine;

/// Score a model with adapters offline
///
/// Preferences ({"prompt","chosen","rejected"}) are measured by the DPO loss against the same model
/// without adapters, each as one token; the model by itself scores ln 2.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// Hugging Face folder of the model
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// PEFT adapter folder and its weight; may be given several times
    #[arg(long = "adapter", value_name = "DIR[:WEIGHT]")]
    pub adapters: Vec<WeightedAdapter>,
    /// Records to score (JSON lines or plain text)
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// How the records are written
    #[arg(long, default_value_t)]
    pub format: Format,
    /// Tokens after which a record is cut [default: 1024, or the model's positions if fewer]
    #[arg(long, value_name = "TOKENS")]
    pub sequence_length: Option<usize>,
    /// How strongly preferences hold to the base, as in the recipe that they were trained with
    #[arg(long, value_name = "BETA", default_value_t = DPO_BETA_DEFAULT, value_parser = parse_beta)]
    pub dpo_beta: f64,
    /// Keep the linear layers in fewer bits, as a recipe may: none, int8 or nf4. A round's gate never does
    #[arg(long, value_name = "FORMAT", default_value_t)]
    pub quantize: Quantize,
    /// auto, or flex, tch, cuda:0, vulkan, ... as far as built in (cairn-worker devices lists them)
    #[arg(long, env = "CAIRN_DEVICE", default_value_t)]
    pub device: DeviceChoice,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// An adapter folder with the factor on its delta.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedAdapter {
    /// The folder.
    pub dir: PathBuf,
    /// The factor, 1 where none is written.
    pub weight: f64,
}

impl FromStr for WeightedAdapter {
    type Err = String;

    /// `DIR` or `DIR:WEIGHT`; a colon that no number follows belongs to the path.
    fn from_str(text: &str) -> Result<Self, String> {
        let split = text
            .rsplit_once(':')
            .and_then(|(dir, weight)| Some((dir, weight.parse::<f64>().ok()?)));
        let (dir, weight) = split.unwrap_or((text, 1.0));
        if dir.is_empty() {
            return Err("the adapter's folder is missing".to_owned());
        }
        if !weight.is_finite() {
            return Err(format!("the weight {weight} is not a finite number"));
        }
        Ok(Self {
            dir: dir.into(),
            weight,
        })
    }
}

fn parse_beta(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(beta) if beta > 0.0 && beta <= 100.0 => Ok(beta),
        _ => Err("beta is a number above 0 and to 100".to_owned()),
    }
}

/// Runs the command.
///
/// # Errors
/// [`OfflineError`].
pub fn run(args: &EvaluateArgs) -> Result<(), OfflineError> {
    let cancel = CancelFlag::new();
    cancel_on_signal(&cancel)?;
    let records = read_file(&args.data, args.format)?;
    let adapters: Vec<(PathBuf, f64)> = args
        .adapters
        .iter()
        .map(|adapter| (adapter.dir.clone(), adapter.weight))
        .collect();
    let pairs = read_adapters(&adapters)?;
    let device = args.device.settle(Depth::Small)?.name;
    let (config, numbers) = preflight::folder(&args.model, device)?;
    preflight::plan_evaluation(
        Frozen::new(&config, numbers, device),
        args.quantize,
        &Quantize::ALL,
        Memory::of(device),
    )?;
    eprintln!("loading {} on {device}", args.model.display());
    let model = LoadedModel::load_quantised(&args.model, args.quantize, device)?;
    let length = sequence_length(&model, args.sequence_length);
    let set = encode_set(&model.encoder()?, records.into_iter(), length)?;
    let mut line = ProgressLine::new("example");
    let mut on_progress = |progress: &EvaluateProgress| {
        let (done, total) = (progress.done as u64, progress.total as u64);
        line.show(
            done,
            total,
            progress.loss,
            progress.tokens_per_second,
            progress.eta_seconds,
        );
    };
    let beta = args.dpo_beta;
    let result = score_set(&model, &pairs, &set, beta, &mut on_progress, &cancel);
    line.finish();
    Ok(print(args, length, &result?)?)
}

fn print(args: &EvaluateArgs, length: usize, report: &EvaluateReport) -> std::io::Result<()> {
    let mut out = stdout().lock();
    if !args.json {
        if let Some(rewards) = report.rewards {
            return writeln!(
                out,
                "loss {:.6} over {} preferences of {} ({} cut at {length} tokens) in {:.1} s; rewards: accuracy {:.4}, margin {:.4}",
                report.loss,
                report.tokens,
                report.per_example.len(),
                report.cut,
                report.seconds,
                rewards.accuracies,
                rewards.margins
            );
        }
        return writeln!(
            out,
            "loss {:.6} over {} tokens of {} examples ({} cut at {length} tokens) in {:.1} s",
            report.loss,
            report.tokens,
            report.per_example.len(),
            report.cut,
            report.seconds
        );
    }
    writeln!(out, "{}", to_json(report))
}

/// The report as `--json` prints it.
pub(super) fn to_json(report: &EvaluateReport) -> Value {
    let json = json!({
        "loss": json_number(report.loss),
        "tokens": report.tokens,
        "examples": report.per_example.len(),
        "cut": report.cut,
        "seconds": json_number(report.seconds),
        "per_example": report.per_example,
    });
    with_rewards(json, report.rewards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_split_off_the_path() {
        let parse = |text: &str| {
            text.parse::<WeightedAdapter>()
                .map(|a| (a.dir.display().to_string(), a.weight))
        };
        assert_eq!(parse("a/b"), Ok(("a/b".to_owned(), 1.0)));
        assert_eq!(parse("a/b:0.5"), Ok(("a/b".to_owned(), 0.5)));
        assert_eq!(parse("a:b:-1e-2"), Ok(("a:b".to_owned(), -0.01)));
        assert_eq!(parse("C:\\b"), Ok(("C:\\b".to_owned(), 1.0)));
        assert!(parse("a:nan").is_err() && parse(":1").is_err() && parse("a:inf").is_err());
    }
}
