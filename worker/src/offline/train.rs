//! `cairn-worker train`: one adapter, from a model folder, a data file and a recipe file.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use cairn_stack::recipe::{Objective, Recipe};
use cairn_stack::records::Format;

use super::{OfflineError, json_number, read_file, with_rewards};
use crate::cancel::CancelFlag;
use crate::data::encode_to_learn;
use crate::device::{Depth, DeviceChoice, DeviceName};
use crate::interrupt::cancel_on_signal;
use crate::memory::{Memory, peak_rss_bytes};
use crate::model::LoadedModel;
use crate::preflight::estimate::Frozen;
use crate::preflight::{self, Plan};
use crate::progress::ProgressLine;
use crate::train::distill::same_vocabulary;
use crate::train::{Checkpoints, Progress, TrainError, TrainJob, TrainReport, train};

/// Longest recipe file read, in bytes; real ones have a dozen lines.
const RECIPE_BYTES_MAX: u64 = 64 << 10;

/// Train one adapter offline
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cairn-worker train --model base --data notes.jsonl --recipe recipe.toml --out adapter --dry-run\n  cairn-worker train --model base --data pairs.jsonl --recipe dpo.toml --out adapter       # objective = \"dpo\"\n  cairn-worker train --model base --teacher large --data notes.jsonl --recipe distill.toml --out adapter"
)]
pub struct TrainArgs {
    /// Hugging Face folder of the base model
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Records to learn from (JSON lines or plain text)
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// How the records are written
    #[arg(long, default_value_t)]
    pub format: Format,
    /// Recipe in TOML
    #[arg(long, value_name = "FILE")]
    pub recipe: PathBuf,
    /// Hugging Face folder of the model to learn from, with objective = "distill"
    #[arg(long, value_name = "DIR")]
    pub teacher: Option<PathBuf>,
    /// Folder the adapter is written to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// auto, or flex, tch, cuda:0, vulkan, ... as far as built in (cairn-worker devices lists them)
    #[arg(long, env = "CAIRN_DEVICE", default_value_t)]
    pub device: DeviceChoice,
    /// Folder for the local checkpoint [default: OUT/.training]
    #[arg(long, value_name = "DIR")]
    pub checkpoint_dir: Option<PathBuf>,
    /// Seconds between local checkpoints
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub checkpoint_seconds: u32,
    /// Steps between local checkpoints, besides the seconds
    #[arg(long, value_name = "STEPS")]
    pub checkpoint_steps: Option<u64>,
    /// Say what it takes and how it would be done, and end; no weight is read
    #[arg(long)]
    pub dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// [`OfflineError`]; after an interruption the same command goes on where it was.
pub fn run(args: &TrainArgs) -> Result<(), OfflineError> {
    let cancel = CancelFlag::new();
    cancel_on_signal(&cancel)?;
    let recipe = read_recipe(args)?;
    let device = args.device.settle(Depth::Small)?.name;
    let plan = look_ahead(args, &recipe, device)?;
    if args.dry_run {
        return Ok(());
    }
    eprintln!("{plan}");
    if let Some(teacher) = &args.teacher {
        check_teacher(teacher, &recipe, &args.model)?;
    }
    let records = read_file(&args.data, args.format)?;
    eprintln!("loading {} on {device}", args.model.display());
    let model = LoadedModel::load_quantised(&args.model, recipe.quantize, device)?;
    let sequence_length = recipe.sequence_length as usize;
    let positions = model.llama.config.max_positions;
    if sequence_length > positions {
        return Err(OfflineError::TooLong {
            asked: sequence_length,
            model: positions,
        });
    }
    let teacher = match &args.teacher {
        Some(folder) => {
            eprintln!("loading {}", folder.display());
            Some(LoadedModel::load(folder, device)?)
        }
        None => None,
    };
    let encoder = model.encoder()?;
    let (examples, encoded) = encode_to_learn(&encoder, records.into_iter(), &recipe)?;
    eprintln!(
        "{} records, {} tokens, {} scored; {} cut at {sequence_length}, {} with nothing left to score",
        encoded.records, encoded.tokens, encoded.scored_tokens, encoded.cut, encoded.dropped
    );

    let mut line = ProgressLine::new("step");
    let mut resumed = false;
    let mut on_progress = |progress: &Progress| {
        if let (Some(step), false) = (progress.resumed_at, resumed) {
            resumed = true;
            eprintln!("going on from the local checkpoint at step {step}");
        }
        line.note_rewards(progress.rewards);
        line.show(
            progress.step,
            progress.steps,
            progress.loss,
            progress.tokens_per_second,
            progress.eta_seconds,
        );
    };
    let base_model = args
        .model
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let result = train(
        &model,
        TrainJob {
            examples: &examples,
            recipe: &recipe,
            initial: None,
            carry: None,
            teacher: teacher.as_ref(),
            frozen_a: false,
            out_dir: &args.out,
            base_model: base_model.as_deref(),
            revision: None,
            checkpoints: Some(Checkpoints {
                dir: args
                    .checkpoint_dir
                    .clone()
                    .unwrap_or_else(|| args.out.join(".training")),
                every_seconds: f64::from(args.checkpoint_seconds),
                every_steps: args.checkpoint_steps,
            }),
            states: None,
            on_progress: &mut on_progress,
            cancel: &cancel,
        },
    );
    line.finish();
    match result {
        Ok(report) => print(args, device, &report).map_err(OfflineError::Io),
        Err(TrainError::Cancelled { done, total }) => {
            Err(OfflineError::Interrupted { done, total })
        }
        Err(error) => Err(error.into()),
    }
}

/// Checks that the teacher in a folder can teach a model; only a recipe that distils has one.
pub(super) fn check_teacher(
    teacher: &Path,
    recipe: &Recipe,
    model: &Path,
) -> Result<(), OfflineError> {
    if !matches!(recipe.objective, Objective::Distill(_)) {
        return Err(OfflineError::NothingToTeach(recipe.objective.as_str()));
    }
    Ok(same_vocabulary(model, teacher)?)
}

/// Whether it fits, and how it will be done; printed where that is all that is asked for.
fn look_ahead(args: &TrainArgs, recipe: &Recipe, device: DeviceName) -> Result<Plan, OfflineError> {
    let (config, numbers) = preflight::folder(&args.model, device)?;
    let mut frozen = Frozen::new(&config, numbers, device);
    if let Some(folder) = &args.teacher {
        let (config, numbers) = preflight::folder(folder, device)?;
        frozen = frozen.beside(Frozen::new(&config, numbers, device));
    }
    let plan = preflight::plan(frozen, recipe, Memory::of(device));
    if args.dry_run {
        let mut out = stdout().lock();
        match (&plan, args.json) {
            (Ok(plan), true) => writeln!(out, "{}", plan.to_json())?,
            (Ok(plan), false) => writeln!(out, "{plan}")?,
            (Err(error), true) => writeln!(out, "{}", error.to_json())?,
            (Err(_), false) => (),
        }
    }
    Ok(plan?)
}

fn read_recipe(args: &TrainArgs) -> Result<Recipe, OfflineError> {
    let path = &args.recipe;
    let read = || -> std::io::Result<String> {
        if std::fs::metadata(path)?.len() > RECIPE_BYTES_MAX {
            return Err(std::io::Error::other("longer than any recipe"));
        }
        std::fs::read_to_string(path)
    };
    let text = read().map_err(|source| OfflineError::Read {
        path: path.clone(),
        source,
    })?;
    Recipe::parse_toml(&text).map_err(|source| OfflineError::Recipe {
        path: path.clone(),
        source,
    })
}

fn print(args: &TrainArgs, device: DeviceName, report: &TrainReport) -> std::io::Result<()> {
    let mut out = stdout().lock();
    if args.json {
        return writeln!(out, "{}", to_json(report, device));
    }
    writeln!(
        out,
        "{} steps, {} tokens in {:.1} s ({:.0} tokens/s); loss {:.4} -> {:.4}; adapter in {}",
        report.steps,
        report.tokens,
        report.seconds,
        report.tokens_per_second,
        report.first_loss,
        report.last_loss,
        args.out.display()
    )?;
    match report.last_rewards {
        Some(rewards) => writeln!(out, "rewards of the last step: {rewards}"),
        None => Ok(()),
    }
}

/// The report as `--json` prints it.
pub(super) fn to_json(report: &TrainReport, device: DeviceName) -> Value {
    let json = json!({
        "steps": report.steps,
        "tokens": report.tokens,
        "scored_tokens": report.scored_tokens,
        "seconds": json_number(report.seconds),
        "tokens_per_second": json_number(report.tokens_per_second),
        "first_loss": json_number(report.first_loss),
        "last_loss": json_number(report.last_loss),
        "peak_rss_bytes": peak_rss_bytes(),
        "device": device.to_string(),
        "adapter_blake3": report.adapter_blake3.to_string(),
    });
    with_rewards(json, report.last_rewards)
}
