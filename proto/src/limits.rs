//! Named limits of the wire. Each has a unit and a reason; both sides hold to them.
use std::time::Duration;

/// Largest chunk of a blob stream, bytes: far below the message limit, large enough that framing
/// costs nothing.
pub const CHUNK_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of one part of an upload that goes straight to the store: seconds on a home line, so that
/// little is sent again after a break; the largest blob has 8,192.
pub const DIRECT_PART_BYTES: u64 = 8 * 1024 * 1024;

/// Most parts offered in one `BeginUpload`: 128 MiB, which a line of 2 Mbit/s sends before their URLs run out.
pub const DIRECT_PARTS_MAX: usize = 16;

/// Largest gRPC message, bytes: gRPC's customary default; anything larger must be streamed.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Largest `adapter_config.json`, bytes: a few hundred module names fit many times over.
pub const ADAPTER_CONFIG_BYTES_MAX: usize = 64 * 1024;

/// Largest round file, bytes: it is written by hand.
pub const ROUND_FILE_BYTES_MAX: usize = 64 * 1024;

/// Items of a list page when the caller does not say.
pub const PAGE_SIZE_DEFAULT: u32 = 50;

/// Most items of a list page; a larger wish is clamped.
pub const PAGE_SIZE_MAX: u32 = 500;

/// Most blobs named in one `FindMissingBlobs`: 1,000 references stay below 100 KiB.
pub const FIND_MISSING_MAX: usize = 1_000;

/// Most records over all sets of one evaluation: their losses (8 bytes a record, plus framing)
/// must fit in one message.
pub const EVAL_RECORDS_MAX: usize = 200_000;

/// Most sets of one evaluation: the base of a large round is scored on a sample of each shard.
pub const EVAL_SETS_MAX: usize = 8_192;

/// Most files of a checkpoint folder: shards of a very large model and its tokenizer.
pub const CHECKPOINT_FILES_MAX: usize = 2_000;

/// Longest relative path of a file in a folder, bytes.
pub const FILE_PATH_BYTES_MAX: usize = 255;

/// Most chunks of a dataset: together with 1 MiB chunks a terabyte.
pub const DATASET_CHUNKS_MAX: usize = 20_000;

/// Largest dataset chunk, bytes.
pub const DATASET_CHUNK_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Largest blob of any kind, bytes: one checkpoint shard file; guards disk accounting from
/// absurd sizes.
pub const BLOB_BYTES_MAX: u64 = 64 * 1024 * 1024 * 1024;

/// Longest wait of a `ClaimWork` long poll.
pub const CLAIM_WAIT_MAX: Duration = Duration::from_secs(30);

/// Length of nonces and challenges, bytes: more than can be guessed or collide.
pub const NONCE_BYTES: usize = 32;

/// Longest display name, characters.
pub const DISPLAY_NAME_CHARS_MAX: usize = 64;

/// Longest name of a model or dataset, bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Longest `detail` of a released lease or aborted round, characters.
pub const DETAIL_CHARS_MAX: usize = 1_000;

/// Longest licence expression or source note of a dataset, characters.
pub const NOTE_CHARS_MAX: usize = 10_000;

/// Longest join URL, bytes: host names end at 253, the rest is fixed.
pub const JOIN_URL_BYTES_MAX: usize = 1_024;

/// Longest join token, bytes.
pub const JOIN_TOKEN_BYTES_MAX: usize = 200;

/// Most uses of one join token: a class room, not the world.
pub const JOIN_TOKEN_USES_MAX: u32 = 10_000;

/// Longest life of a join token, milliseconds: 30 days.
pub const JOIN_TOKEN_TTL_MS_MAX: i64 = 30 * 24 * 3_600 * 1_000;
