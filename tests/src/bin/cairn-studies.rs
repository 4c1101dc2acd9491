//! `cairn-studies`: what stacking is worth, measured. Tables and one last line of JSON on standard
//! output, progress on standard error.

use std::path::PathBuf;

use anyhow::{Result, bail};
use cairn_stack::recipe::Recipe;
use cairn_tests::attacks::kinds::Kind;
use cairn_tests::attacks::report as attack_report;
use cairn_tests::attacks::suite::{self, Settings};
use cairn_tests::study::arms::{Arm, Setup};
use cairn_tests::study::material::{gsm8k, own};
use cairn_tests::study::runs::{Plan, all};
use cairn_tests::study::shards::Split;
use cairn_tests::study::{hand, report};
use clap::{Args, Parser, Subcommand};

/// Measures what Cairn claims
#[derive(Parser)]
#[command(name = "cairn-studies", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Study(StudyArgs),
    Attacks(AttacksArgs),
}

/// Saboteurs against the real pipeline: caught where, at what cost, with what damage
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cairn-studies attacks\n  cairn-studies attacks --quick\n  cairn-studies attacks --kind scale --kind backdoor"
)]
struct AttacksArgs {
    /// Trials of each basic kind
    #[arg(long, default_value_t = 50)]
    trials: usize,
    /// Trials of each other kind
    #[arg(long, default_value_t = 12)]
    trials_other: usize,
    /// Only this kind; may be given several times
    #[arg(long = "kind", value_name = "KIND", value_parser = parse_kind)]
    kinds: Vec<Kind>,
    /// Minutes instead of half an hour: three kinds, few trials
    #[arg(long)]
    quick: bool,
    /// Keep trainings here
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// The worker's program [default: beside this one]
    #[arg(long, value_name = "FILE")]
    worker: Option<PathBuf>,
}

fn parse_kind(text: &str) -> Result<Kind, String> {
    let known = Kind::ALL.iter().copied().find(|kind| kind.name() == text);
    known.ok_or_else(|| {
        let names: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        format!("no such kind; there are {}", names.join(", "))
    })
}

/// One central LoRA, FedIT, FFA, FedEx and Cairn's stack on the same data and tokens
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cairn-studies study\n  cairn-studies study --quick\n  cairn-studies study --data ./gsm8k    # gsm8k-train.jsonl, gsm8k-test.jsonl, gsm8k-base/"
)]
struct StudyArgs {
    /// GSM8K and a base model; our own data where absent
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Seeds
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Rounds
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// Volunteers, one shard each a round
    #[arg(long, default_value_t = 4)]
    volunteers: usize,
    /// Records a round, over all volunteers
    #[arg(long, default_value_t = 240)]
    records: usize,
    /// Rank of one adapter
    #[arg(long, default_value_t = 1)]
    rank: u32,
    /// Adapted layers: names with commas, or all-linear
    #[arg(long, default_value = "v_proj")]
    targets: String,
    /// Records a step
    #[arg(long, default_value_t = 4)]
    batch: u32,
    /// Steps over which the learning rate rises
    #[arg(long, default_value_t = 2)]
    warmup: u32,
    /// Peak learning rate of an arm; may be given several times
    #[arg(long = "rate", value_name = "ARM=RATE", value_parser = parse_rate)]
    rates: Vec<(Arm, f64)>,
    /// What is left of the peak learning rate in the last round
    #[arg(long, default_value_t = 0.3)]
    late: f64,
    /// Only these arms
    #[arg(long = "arm", value_name = "ARM")]
    arms: Vec<Arm>,
    /// Only this split: iid or dirichlet
    #[arg(long)]
    split: Option<String>,
    /// Choose learning rates: another seed, and the gate set in the audit set's place
    #[arg(long)]
    tune: bool,
    /// A minute instead of half an hour: one seed, two small rounds
    #[arg(long)]
    quick: bool,
    /// Runs at a time, each on one thread
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Keep adapters and checkpoints here
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// The worker's program [default: beside this one]
    #[arg(long, value_name = "FILE")]
    worker: Option<PathBuf>,
}

/// The seed that learning rates are chosen with; none of the study's.
const TUNING_SEED: u64 = 100;

fn parse_rate(text: &str) -> Result<(Arm, f64), String> {
    let (arm, rate) = text
        .split_once('=')
        .ok_or("write ARM=RATE, as in stack=5e-3")?;
    let rate: f64 = rate.parse().map_err(|_| format!("{rate:?} is no number"))?;
    Ok((<Arm as clap::ValueEnum>::from_str(arm, false)?, rate))
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Study(args) => study(&args),
        Command::Attacks(args) => attacks(&args),
    }
}

fn attacks(args: &AttacksArgs) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let quick_kinds = [Kind::Nan, Kind::Scale, Kind::WrongShard];
    let settings = Settings {
        trials: if args.quick { 3 } else { args.trials },
        trials_other: if args.quick { 3 } else { args.trials_other },
        rounds_max: if args.quick { 1 } else { 4 },
        clean_rounds: if args.quick { 1 } else { 8 },
        epochs: if args.quick { 2 } else { 6 },
        kinds: match args.kinds.as_slice() {
            [] if args.quick => quick_kinds.to_vec(),
            some => some.to_vec(),
        },
        worker: match &args.worker {
            Some(path) => path.clone(),
            None => hand::program()?,
        },
        work: args
            .keep
            .clone()
            .unwrap_or_else(|| folder.path().to_owned()),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(suite::run(&settings))?;
    println!("{}", attack_report::table(&report));
    println!("{}", attack_report::json_line(&report));
    Ok(())
}

fn study(args: &StudyArgs) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let work = args.keep.as_deref().unwrap_or(folder.path());
    let mut material = match &args.data {
        Some(data) => gsm8k(work, data)?,
        None => own(work)?,
    };
    if args.tune {
        material.audit = material.gate.clone();
    }
    let splits = match args.split.as_deref() {
        None => Split::ALL.to_vec(),
        Some(name) => match Split::ALL.into_iter().find(|split| split.name() == name) {
            Some(split) => vec![split],
            None => bail!("{name:?} is no split; say iid or dirichlet"),
        },
    };
    let setup = setup(args, material.sequence_length)?;
    let worker = match &args.worker {
        Some(path) => path.clone(),
        None => hand::program()?,
    };
    eprintln!(
        "{}: {} records, {} topics; {} rounds of {} records for {} volunteers, rank {}",
        material.name,
        material.pool.len(),
        material.topics,
        setup.rounds,
        setup.records,
        setup.volunteers,
        setup.recipe.rank
    );
    let outcomes = all(&Plan {
        material: &material,
        setup: &setup,
        arms: if args.arms.is_empty() {
            &Arm::ALL
        } else {
            &args.arms
        },
        splits: &splits,
        seeds: match (args.tune, args.quick) {
            (true, _) => TUNING_SEED..=TUNING_SEED,
            (_, true) => 1..=1,
            _ => 1..=args.seeds,
        },
        worker: &worker,
        jobs: args.jobs,
        work,
    })?;
    let lines = report::lines(&outcomes, &splits)?;
    println!("{}\n{}", report::table(&lines), report::bars(&lines));
    println!("{}", report::json_line(&lines));
    Ok(())
}

/// Peak learning rates, the best of those tried; docs/results/study.md has the grids.
const RATES: [f64; 7] = [1.0, 3e-2, 4e-2, 6e-2, 4e-1, 6e-2, 6e-2];

fn setup(args: &StudyArgs, sequence_length: u32) -> Result<Setup> {
    let targets = match args.targets.as_str() {
        "all-linear" => "\"all-linear\"".to_owned(),
        names => format!("{:?}", names.split(',').map(str::trim).collect::<Vec<_>>()),
    };
    let recipe = Recipe::parse_toml(&format!(
        "rank = {}\nalpha = {}\ntarget_modules = {targets}\nlearning_rate = 1.0\nepochs = 1\n\
         warmup_steps = {}\nbatch_size = {}\nsequence_length = {sequence_length}\nseed = 1\n",
        args.rank,
        2 * args.rank,
        args.warmup,
        args.batch,
    ))?;
    let mut rates = RATES;
    for (arm, rate) in &args.rates {
        rates[*arm as usize] = *rate;
    }
    Ok(Setup {
        rounds: if args.quick { 2 } else { args.rounds },
        volunteers: args.volunteers.max(1),
        records: if args.quick { 64 } else { args.records },
        recipe,
        rates,
        late: args.late,
    })
}
