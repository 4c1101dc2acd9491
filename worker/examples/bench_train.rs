//! Our side of `make bench-train`: loads a model and batches, says that it is ready, and then does one
//! block of work for every line on its standard input, saying what it took. `scripts/bench_train.py`
//! makes the model and the data and lets the two sides take turns.

use std::io::BufRead;
use std::path::PathBuf;

use anyhow::{Context, bail};
use cairn_stack::adapter::{AdapterFile, AdapterWriteConfig, write_adapter};
use cairn_stack::recipe::Recipe;
use cairn_worker::allocator::{MiMalloc, keep_pages};
use cairn_worker::cancel::CancelFlag;
use cairn_worker::clock::Stopwatch;
use cairn_worker::data::{Batch, Example, batches, pack};
use cairn_worker::device::DeviceName;
use cairn_worker::evaluate::score;
use cairn_worker::memory::peak_rss_bytes;
use cairn_worker::model::{Adapter, LoadedModel};
use cairn_worker::train::trainer::Trainer;
use serde::Deserialize;
use serde_json::json;

/// As in `cairn-worker`.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// What to work on.
#[derive(Deserialize)]
struct Work {
    examples: Vec<Record>,
    recipe: String,
    evaluate: bool,
}

#[derive(Deserialize)]
struct Record {
    tokens: Vec<u32>,
    scored: Vec<bool>,
}

fn main() -> anyhow::Result<()> {
    keep_pages();
    let [model, work, device] = arguments()?;
    let device: DeviceName = device.parse()?;
    let watch = Stopwatch::start();
    let model = LoadedModel::load(&PathBuf::from(model), device)?;
    let load_seconds = watch.seconds();
    let work: Work = serde_json::from_str(&std::fs::read_to_string(work)?)?;
    let recipe = Recipe::parse_toml(&work.recipe)?;
    let examples: Vec<Example> = work.examples.into_iter().map(Example::from).collect();
    let order: Vec<usize> = (0..examples.len()).collect();
    let length = recipe.sequence_length as usize;
    let rows = pack(&examples, &order, length, recipe.packing);
    let batches = batches(rows, recipe.batch_size as usize);

    let config = &model.llama.config;
    let (rank, targets) = (recipe.rank as usize, &recipe.target_modules);
    let fresh = Adapter::fresh(config, targets, rank, recipe.scale(), recipe.seed);
    let adapter = Adapter::new(config, &fresh, &model.device)?;
    let (save, reload) = adapter_seconds(&model, &recipe, &adapter)?;
    let mut trainer = Trainer::new(&model.llama, adapter, &recipe);
    let ready = json!({
        "ready": true, "load_seconds": load_seconds, "gemm_gflops": gemm(),
        "adapter_save_seconds": save, "adapter_load_seconds": reload,
    });
    println!("{ready}");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (watch, cpu) = (Stopwatch::start(), cpu_seconds()?);
        let done = match line.as_str() {
            "go" if work.evaluate => {
                let report = score(&model, &fresh, &examples, &mut |_| (), &CancelFlag::new())?;
                let tokens = examples.iter().map(|example| example.tokens.len()).sum();
                (report.loss, tokens, report.tokens as usize)
            }
            "go" => train(&mut trainer, &batches, recipe.learning_rate)?,
            _ => break,
        };
        let (loss, tokens, scored) = done;
        let (seconds, cpu_seconds) = (watch.seconds(), cpu_seconds()? - cpu);
        let block = json!({
            "seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss, "tokens": tokens,
            "scored_tokens": scored, "peak_rss_bytes": peak_rss_bytes(),
        });
        println!("{block}");
    }
    Ok(())
}

/// Seconds from a device to PEFT's files, and from the files to the device: the best of three.
fn adapter_seconds(
    model: &LoadedModel,
    recipe: &Recipe,
    adapter: &Adapter,
) -> anyhow::Result<(f64, f64)> {
    let config = &model.llama.config;
    let (mut save, mut load) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..3 {
        let folder = tempfile::tempdir()?;
        let watch = Stopwatch::start();
        let write = AdapterWriteConfig::of_recipe(recipe, None, None);
        write_adapter(folder.path(), &adapter.to_pairs(config), &write)?;
        save = save.min(watch.seconds());
        let watch = Stopwatch::start();
        let pairs = AdapterFile::open(folder.path())?.pairs()?;
        Adapter::new(config, &pairs, &model.device)?;
        load = load.min(watch.seconds());
    }
    Ok((save, load))
}

/// One optimiser step a batch: the first loss, and what was read and scored.
fn train(
    trainer: &mut Trainer<'_>,
    batches: &[Batch],
    rate: f64,
) -> anyhow::Result<(f64, usize, usize)> {
    let (mut first, mut tokens, mut scored) = (None, 0, 0);
    for batch in batches {
        let step = trainer.step(std::slice::from_ref(batch), rate)?;
        first = first.or(Some(step.loss));
        tokens += step.tokens as usize;
        scored += step.scored_tokens as usize;
    }
    Ok((first.context("no batch")?, tokens, scored))
}

impl From<Record> for Example {
    fn from(record: Record) -> Self {
        Self {
            tokens: record.tokens,
            scored: record.scored,
            cut: false,
        }
    }
}

fn arguments() -> anyhow::Result<[String; 3]> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.try_into() {
        Ok(arguments) => Ok(arguments),
        Err(_) => bail!("usage: bench_train MODEL_FOLDER WORK_FILE DEVICE"),
    }
}

/// Processor time of this process and its threads so far.
fn cpu_seconds() -> anyhow::Result<f64> {
    /// Ticks of `/proc` a second, on every Linux.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').context("a name in brackets")?.1;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |place: usize| -> anyhow::Result<f64> {
        Ok(fields.get(place).context("too few fields")?.parse()?)
    };
    Ok((ticks(11)? + ticks(12)?) / TICKS)
}

/// What a product of a usual shape reaches on this machine, in GFLOP/s: the best of several.
fn gemm() -> f64 {
    use cairn_kernels::product::{Into, Matrix, Threads, product};
    let (rows, inner, columns) = (1024, 512, 1408);
    let (a, b) = (vec![0.5_f32; rows * inner], vec![0.5_f32; columns * inner]);
    let mut out = vec![0.0; rows * columns];
    let operations = 2.0 * (rows * inner * columns) as f64;
    let best = (0..20).map(|_| {
        let watch = Stopwatch::start();
        let (a, b) = (
            Matrix::new(&a, rows, inner),
            Matrix::new(&b, columns, inner),
        );
        product(
            &mut out,
            Into::Replace,
            a,
            b.transposed(),
            1.0,
            Threads::All,
        );
        operations / watch.seconds() / 1e9
    });
    best.fold(0.0, f64::max)
}
