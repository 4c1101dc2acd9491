//! What the volunteer allows, and the program's own bounds.

use std::time::Duration;

use clap::Args;

use crate::device::DeviceChoice;

/// Cache size when the volunteer names none, GiB: a base model of 7B in bf16, its tokenizer, data
/// and a second checkpoint.
pub const CACHE_GIB_DEFAULT: u64 = 40;

/// Work that needs no longer than this is finished after the first signal instead of being put
/// down, seconds.
pub const FINISH_SECONDS: f64 = 30.0;

/// How long the hand-in may take after the first signal; what is not in by then lies on disk and
/// goes in at the next start.
pub const DRAIN: Duration = Duration::from_secs(90);

/// Local training checkpoints kept of work that was put down, most recent ones: coming back to the
/// same shard costs nothing, and a few gigabytes at most are held for it.
pub const CHECKPOINTS_KEPT: usize = 4;

/// Pause between looks at the verdicts.
pub const VERDICTS_EVERY: Duration = Duration::from_secs(10);

/// Longest pause between renewals: a lease that is given to another is noticed within it, and who
/// watches the round sees progress no older than it.
pub const RENEW_MAX: Duration = Duration::from_secs(20);

/// Shortest pause between renewals.
pub const RENEW_MIN: Duration = Duration::from_secs(1);

/// Pause after work that could not be done here, doubled each time in a row: a machine that fails
/// at everything must not eat a round's shards.
pub const TROUBLE_PAUSE: Duration = Duration::from_secs(5);

/// Longest such pause.
pub const TROUBLE_PAUSE_MAX: Duration = Duration::from_mins(10);

/// Pause before a device that computes wrong, or does not open, is tried again: a driver may have been
/// updated, a card come back.
pub const DEVICE_AGAIN: Duration = Duration::from_mins(10);

/// Encoded evaluation sets kept in memory: those of a round with many shards, each with a sample.
pub const EVAL_SETS_KEPT: usize = 64;

/// Most records in them together: the largest evaluation twice.
pub const EVAL_RECORDS_KEPT: usize = 400_000;

/// Submissions kept until they are settled, newest first: more than any machine trains while a
/// round is judged.
pub const KEPT_MAX: usize = 32;

/// Most disk space for them, bytes: the training states of a few adapters of a 7B model.
pub const KEPT_BYTES_MAX: u64 = 20 << 30;

/// Pages of the coordinator's list looked through for a submission before it is taken for lost.
pub const LIST_PAGES_MAX: usize = 20;

/// Distance reported of a segment that ends nowhere near what was claimed, or whose opened states
/// are none: JSON and databases have no infinity.
pub const DISTANCE_BROKEN: f64 = 1e6;

/// Lines remembered so as to be said once.
pub const LINES_REMEMBERED: usize = 1_000;

/// Receipts read back, newest first: `status` and verdict lines look no further.
pub const RECEIPTS_READ_MAX: usize = 200;

/// Longest id the coordinator may give to anything, characters.
pub const ID_CHARS_MAX: usize = 64;

/// Loss of each token, nats, that is reported of a candidate whose losses are not numbers: worse
/// than any model that works at all.
pub const NLL_BROKEN: f32 = 100.0;

/// Passes over a set that a learning of weights may ask for: it ends by itself long before.
pub const LEARN_PASSES_MAX: u32 = 256;

/// What the volunteer allows this machine to do.
#[derive(Debug, Clone, Args)]
pub struct Allowed {
    /// auto, or flex, tch, cuda:0, vulkan, ... as far as built in (cairn-worker devices lists them)
    #[arg(long, env = "CAIRN_DEVICE", default_value_t)]
    pub device: DeviceChoice,
    /// CPU threads to compute with [default: all]
    #[arg(long, env = "CAIRN_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Most disk space for downloaded checkpoints and data, GiB
    #[arg(long, env = "CAIRN_CACHE_GIB", value_name = "GIB", default_value_t = CACHE_GIB_DEFAULT)]
    pub cache_gib: u64,
}

impl Allowed {
    /// Cache size in bytes.
    #[must_use]
    pub const fn cache_bytes_max(&self) -> u64 {
        self.cache_gib.saturating_mul(1 << 30)
    }
}
