//! What one training step holds: makes a random model straight in its format, without a file, does real
//! steps, and prints the peak beside what the preflight expected. `scripts/bench_memory.py` runs it for
//! several shapes and formats (`make bench-memory`).

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor};
use cairn_stack::config::{ModelConfig, Target};
use cairn_stack::quantize::Quantize;
use cairn_stack::recipe::Recipe;
use cairn_worker::allocator::{MiMalloc, keep_pages};
use cairn_worker::clock::Stopwatch;
use cairn_worker::data::{Example, batches, pack};
use cairn_worker::device::DeviceName;
use cairn_worker::memory::{Memory, peak_rss_bytes};
use cairn_worker::model::attention::Attention;
use cairn_worker::model::block::{Block, FeedForward};
use cairn_worker::model::linear::{Linear, RmsNorm};
use cairn_worker::model::llama::Keep;
use cairn_worker::model::weight::{Arriving, Weight};
use cairn_worker::model::{Adapter, Llama};
use cairn_worker::preflight::Passes;
use cairn_worker::preflight::estimate::{Frozen, Numbers};
use cairn_worker::train::trainer::Trainer;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::json;

/// As in `cairn-worker`.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// What to measure.
#[derive(Deserialize)]
struct Work {
    /// A `config.json`.
    config: serde_json::Value,
    recipe: String,
    /// Rows of a pass.
    rows: usize,
    /// `everything` or `inputs`.
    keep: String,
    steps: usize,
}

fn main() -> anyhow::Result<()> {
    keep_pages();
    let work = std::env::args()
        .nth(1)
        .context("usage: bench_memory JSON")?;
    let work: Work = serde_json::from_str(&work)?;
    let config = ModelConfig::from_json(work.config.to_string().as_bytes())?;
    let recipe = Recipe::parse_toml(&work.recipe)?;
    let keep = match work.keep.as_str() {
        "everything" => Keep::Everything,
        "inputs" => Keep::Inputs,
        other => bail!("keep is everything or inputs, not {other}"),
    };
    let device = DeviceName::Flex.open()?;
    let watch = Stopwatch::start();
    let llama = random(config, recipe.quantize, &device);
    let (weights, load_seconds) = (llama.bytes(), watch.seconds());
    let loaded = Memory::now().context("the system does not say")?.held;

    let config = &llama.config;
    let (rows, length) = (recipe.batch_size as usize, recipe.sequence_length as usize);
    let numbers = (0..rows).map(|row| {
        let token = |t: usize| (mixed((row * length + t) as u64) % config.vocab_size as u64) as u32;
        Example {
            tokens: (0..length).map(token).collect(),
            scored: (0..length).map(|t| t > 0).collect(),
            cut: false,
        }
    });
    let examples: Vec<Example> = numbers.collect();
    let order: Vec<usize> = (0..rows).collect();
    let batch = batches(pack(&examples, &order, length, false), rows);
    let targets = &recipe.target_modules;
    let (rank, scale) = (recipe.rank as usize, recipe.scale());
    let pairs = Adapter::fresh(config, targets, rank, scale, recipe.seed);
    let adapter = Adapter::new(config, &pairs, &device)?;
    drop(pairs);
    let mut trainer = Trainer::new(&llama, adapter, &recipe);
    trainer.passes = Passes {
        rows: work.rows,
        keep,
    };
    let watch = Stopwatch::start();
    let mut losses = Vec::new();
    for _ in 0..work.steps {
        losses.push(trainer.step(&batch, recipe.learning_rate)?.loss);
    }
    let step_seconds = watch.seconds() / work.steps.max(1) as f64;
    let frozen = Frozen {
        teacher: 0,
        config,
        numbers: Numbers::Halves,
        device: DeviceName::Flex,
    };
    let expected = frozen.training(&recipe, work.rows, length, keep);
    let found = json!({
        "weights_bytes": weights, "expected_weights_bytes": expected.weights,
        "loaded_rss_bytes": loaded, "peak_rss_bytes": peak_rss_bytes(),
        "expected_bytes": expected.total(), "expected_adapter_bytes": expected.adapter,
        "expected_pass_bytes": expected.pass, "load_seconds": load_seconds,
        "step_seconds": step_seconds, "losses": losses,
    });
    println!("{found}");
    Ok(())
}

/// A model whose numbers are those of bfloat16, as published ones have.
fn random(config: ModelConfig, quantize: Quantize, device: &Device) -> Llama {
    let mut seed = 0;
    let mut matrix = |rows: usize, columns: usize, quantize: Quantize| {
        seed += 1;
        weight([rows, columns], quantize, seed, device)
    };
    let norm = || RmsNorm {
        weight: Tensor::ones([config.hidden_size], device),
        epsilon: config.rms_norm_eps,
    };
    let embedding = matrix(config.vocab_size, config.hidden_size, Quantize::None);
    let head = matrix(config.vocab_size, config.hidden_size, Quantize::None);
    let mut block = || {
        let mut linear = |target: Target| {
            let (input, output) = config.linear(target);
            Linear {
                weight: matrix(output, input, quantize),
                bias: None,
            }
        };
        Block {
            attention_norm: norm(),
            attention: Attention {
                q: linear(Target::Q),
                k: linear(Target::K),
                v: linear(Target::V),
                o: linear(Target::O),
                qk_norm: None,
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                window: None,
            },
            feed_forward_norm: norm(),
            feed_forward: FeedForward {
                gate: linear(Target::Gate),
                up: linear(Target::Up),
                down: linear(Target::Down),
            },
        }
    };
    Llama {
        blocks: (0..config.layers).map(|_| block()).collect(),
        norm: norm(),
        device: device.clone(),
        embedding,
        head,
        config,
    }
}

/// Uniform, of the deviation that usual initialisations have.
fn weight([rows, columns]: [usize; 2], quantize: Quantize, seed: u64, device: &Device) -> Weight {
    const PIECE: usize = 1 << 20;
    let mut arriving = Arriving::new([rows, columns], quantize, device);
    let mut values = vec![0.0_f32; PIECE.min(rows * columns)];
    let bound = (1.0 / columns as f32).sqrt();
    for start in (0..rows * columns).step_by(PIECE) {
        let count = PIECE.min(rows * columns - start);
        let piece = &mut values[..count];
        piece
            .par_chunks_mut(1 << 14)
            .enumerate()
            .for_each(|(number, part)| {
                let first = (seed << 40) + (start + (number << 14)) as u64;
                for (place, value) in part.iter_mut().enumerate() {
                    let number =
                        (mixed(first + place as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
                    *value = f32::from_bits((bound * number).to_bits() & 0xffff_0000);
                }
            });
        arriving.push(piece);
    }
    arriving.finish()
}

/// SplitMix64.
fn mixed(state: u64) -> u64 {
    let z = state.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
