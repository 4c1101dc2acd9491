//! What a training or an evaluation takes, from config and recipe alone.
//!
//! Counted in numbers of `f32` a token, tensor by tensor, as [`crate::model`] makes them; what is held
//! at one time is added up where it is held. `docs/results/memory.md` compares it with what was measured.

use cairn_kernels::stored::Format;
use cairn_stack::config::{ModelConfig, Target};
use cairn_stack::quantize::Quantize;
use cairn_stack::recipe::Recipe;

use crate::device::DeviceName;
use crate::evaluate::BATCH_TOKENS_MAX;
use crate::model::llama::Keep;
use crate::model::loss::LOGITS_MAX;
use crate::model::ops::QUERIES_MAX;

/// Bytes of a number in `f32`.
const FLOAT: f64 = 4.0;

/// The program itself, its tokenizer and its threads, bytes.
const PROGRAM: f64 = (64_u64 << 20) as f64;

/// The same with LibTorch, and what the system's allocator, which LibTorch uses, keeps for later; bytes.
const PROGRAM_WITH_LIBTORCH: f64 = (256_u64 << 20) as f64;

/// Numbers kept of every number of the factors: itself, two moments and its gradient; and one more where
/// the gradients of several passes are summed.
const OF_A_FACTOR: f64 = 4.0;

/// What the allocator and pages of 2 MiB take beyond what is asked for, as a part of it.
const SLACK: f64 = 0.05;

/// Numbers a token that are formed around the head, of the width of the residual stream each.
const HEAD: f64 = 6.0;

/// Bytes of the program without a model.
pub(super) fn program(device: DeviceName) -> u64 {
    bytes(match device {
        DeviceName::Tch | DeviceName::TchCuda(_) => PROGRAM_WITH_LIBTORCH,
        _ => PROGRAM,
    })
}

/// What something takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// The program without a model.
    pub program: u64,
    /// The frozen weights.
    pub weights: u64,
    /// The teacher's.
    pub teacher: u64,
    /// Factors, moments and gradients.
    pub adapter: u64,
    /// What one pass keeps and forms.
    pub pass: u64,
}

impl Needs {
    /// All together.
    #[must_use]
    pub fn total(self) -> u64 {
        let parts = [
            self.program,
            self.weights,
            self.teacher,
            self.adapter,
            self.pass,
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// How the numbers of the weight files are kept where they are not quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// In 16 bits: the files are in bfloat16, and the device is the host's processor.
    Halves,
    /// In 32 bits.
    Floats,
}

impl Numbers {
    /// What is kept of weight files of so many bytes, with a `config.json` that may say which numbers
    /// they hold.
    #[must_use]
    pub fn of_files(config: &ModelConfig, json: &[u8], bytes: u64, device: DeviceName) -> Self {
        let count: f64 = config
            .weights()
            .iter()
            .map(|(_, shape)| product(shape))
            .sum();
        let said = serde_json::from_slice::<serde_json::Value>(json).ok();
        let other = said.is_some_and(|config| {
            let word = |key: &str| config.get(key)?.as_str();
            word("dtype").or(word("torch_dtype")) == Some("float16")
        });
        if device.is_host() && !other && (bytes as f64) < 3.0 * count {
            Self::Halves
        } else {
            Self::Floats
        }
    }

    fn bytes(self, count: f64) -> f64 {
        match self {
            Self::Halves => 2.0 * count,
            Self::Floats => FLOAT * count,
        }
    }
}

/// A model on a device.
#[derive(Debug, Clone, Copy)]
pub struct Frozen<'a> {
    /// Its shape.
    pub config: &'a ModelConfig,
    /// How its files' numbers are kept.
    pub numbers: Numbers,
    /// Where.
    pub device: DeviceName,
    /// Bytes of the weights of a teacher that is held beside it.
    pub teacher: u64,
}

impl<'a> Frozen<'a> {
    /// A model by itself.
    #[must_use]
    pub const fn new(config: &'a ModelConfig, numbers: Numbers, device: DeviceName) -> Self {
        Self {
            config,
            numbers,
            device,
            teacher: 0,
        }
    }

    /// The same with a teacher beside it, which is kept as it is.
    #[must_use]
    pub fn beside(self, teacher: Frozen<'_>) -> Self {
        Self {
            teacher: teacher.weights(Quantize::None),
            ..self
        }
    }

    /// Bytes of the weights themselves.
    #[must_use]
    pub fn weights(self, quantize: Quantize) -> u64 {
        let config = self.config;
        let linear: f64 = Target::ALL.iter().map(|target| area(config, *target)).sum();
        let linear = linear * config.layers as f64;
        let all: f64 = config
            .weights()
            .iter()
            .map(|(_, shape)| product(shape))
            .sum();
        let kept = match (quantize, self.device.is_host()) {
            (Quantize::Int8, true) => quantised(Format::Int8, linear),
            (Quantize::Nf4, true) => quantised(Format::Nf4, linear),
            (Quantize::None, _) => self.numbers.bytes(linear),
            // The same numbers in f32: fewer bits are for the host.
            _ => FLOAT * linear,
        };
        bytes(kept + self.numbers.bytes(all - linear))
    }

    /// What an evaluation takes.
    #[must_use]
    pub fn evaluating(self, quantize: Quantize) -> Needs {
        let shape = Shape::of(self.config);
        let tokens = BATCH_TOKENS_MAX as f64;
        let scores = self.scores(1.0, tokens);
        let block = tokens * shape.block + scores;
        let head = tokens * HEAD * shape.hidden + self.logits(tokens);
        let pass = FLOAT * (tokens * (shape.hidden + shape.kept) + block.max(head));
        Needs {
            program: program(self.device),
            weights: with_slack(self.weights(quantize)),
            teacher: 0,
            adapter: 0,
            pass: bytes(pass * (1.0 + SLACK)),
        }
    }

    /// What a training by a recipe takes whose passes have so many rows of so many tokens.
    #[must_use]
    pub fn training(self, recipe: &Recipe, rows: usize, length: usize, keep: Keep) -> Needs {
        let weights = self.weights(recipe.quantize);
        self.training_beside(weights, recipe, (rows, length), keep)
    }

    /// The same beside weights of so many bytes.
    #[must_use]
    pub fn training_beside(
        self,
        weights: u64,
        recipe: &Recipe,
        (rows, length): (usize, usize),
        keep: Keep,
    ) -> Needs {
        let config = self.config;
        let (shape, layers) = (Shape::of(config), config.layers as f64);
        let rank = f64::from(recipe.rank);
        let targets = || recipe.target_modules.iter();
        let sides = |target: &Target| {
            let (input, output) = config.linear(*target);
            (input as f64, output as f64)
        };
        let factors: f64 = targets()
            .map(|target| sides(target).0 + sides(target).1)
            .sum();
        let factors = factors * rank * layers;

        let tokens = rows as f64 * length as f64;
        let narrows = rank * targets().count() as f64;
        let kept = shape.kept + narrows;
        // The blocks' part of the way back is over the tape, the head's before it.
        let (tape, again) = match keep {
            Keep::Everything => (layers * kept, 0.0),
            Keep::Inputs => (layers * shape.hidden, kept),
        };
        let scores = self.scores(rows as f64, length as f64);
        let block = tokens * (again + shape.block) + scores;
        let head = tokens * HEAD * shape.hidden + self.logits(tokens);
        let noise = if recipe.neftune_noise_alpha > 0.0 {
            2.0 * shape.hidden
        } else {
            0.0
        };
        let inputs: f64 = targets().map(|target| sides(target).0).sum();
        let dropout = if recipe.lora_dropout > 0.0 {
            inputs * layers
        } else {
            0.0
        };
        let pass = FLOAT * (tokens * (tape + noise + dropout) + block.max(head));
        let several = rows < super::rows_of(recipe).1 || recipe.accumulation > 1;
        let of_a_factor = OF_A_FACTOR + f64::from(u8::from(several));
        Needs {
            program: program(self.device),
            weights: with_slack(weights),
            teacher: with_slack(self.teacher),
            adapter: bytes(FLOAT * of_a_factor * factors),
            pass: bytes(pass * (1.0 + SLACK)),
        }
    }

    /// A chunk of logits, and what comes of it.
    fn logits(self, tokens: f64) -> f64 {
        let all = tokens * self.config.vocab_size as f64;
        1.5 * all.min(LOGITS_MAX as f64)
    }

    /// Scores of attention, where they are held: on a card, those of some queries, three times.
    fn scores(self, rows: f64, length: f64) -> f64 {
        if self.device.is_host() {
            return 0.0;
        }
        3.0 * rows * self.config.heads as f64 * length.min(QUERIES_MAX as f64) * length
    }
}

/// Numbers a token.
struct Shape {
    hidden: f64,
    /// What a block keeps for the way back.
    kept: f64,
    /// What is formed beside it while a block is passed.
    block: f64,
}

impl Shape {
    fn of(config: &ModelConfig) -> Self {
        let hidden = config.hidden_size as f64;
        let wide = config.intermediate_size as f64;
        let heads = config.heads as f64;
        let (queries, keys) = (
            heads * config.head_dim as f64,
            (config.kv_heads * config.head_dim) as f64,
        );
        // Once more before their norms, where they have one.
        let times = if config.qk_norm { 3.0 } else { 2.0 };
        Self {
            hidden,
            kept: 2.0 * hidden + times * (queries + keys) + heads + 2.0 * wide,
            block: 4.0 * hidden + 2.0 * wide + 2.0 * (queries + keys),
        }
    }
}

fn area(config: &ModelConfig, target: Target) -> f64 {
    let (input, output) = config.linear(target);
    input as f64 * output as f64
}

fn product(shape: &[usize]) -> f64 {
    shape.iter().map(|size| *size as f64).product()
}

fn quantised(format: Format, count: f64) -> f64 {
    const SAMPLE: usize = 1 << 24;
    count * (format.bytes(SAMPLE) as f64 / SAMPLE as f64)
}

fn with_slack(count: u64) -> u64 {
    bytes(count as f64 * (1.0 + SLACK))
}

/// Whole bytes; what no machine has stays more than any has.
fn bytes(count: f64) -> u64 {
    count.ceil() as u64
}
