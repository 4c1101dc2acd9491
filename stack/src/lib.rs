//! What a stacked model is made of: digests, recipes, records, adapter and checkpoint files,
//! product-space algebra, the fold and the signed manifest.
//!
//! Pure and blocking: no network, no async runtime, no database, no tensor framework, no clock.
//! Every parser here reads files that strangers may have written: input is bounded before it is
//! believed, and nothing panics on it.
//!
//! In reading order:
//!
//! - [`digest`]: BLAKE3 content addresses
//! - [`duration`], [`quantize`], [`objective`], [`recipe`], [`round`]: what a maintainer writes in TOML
//! - [`config`]: a Hugging Face `config.json`, typed
//! - [`records`]: training and evaluation data, line by line
//! - [`tensors`]: strict, bounded safetensors
//! - [`peft`], [`adapter`], [`check`]: LoRA adapters in PEFT's file format, in, out and judged
//! - [`algebra`]: norms and inner products of deltas that are never built
//! - [`aggregate`]: robust means of deltas, from their inner products
//! - [`carry`]: a round that starts from the factors of the one before
//! - [`compress`], [`spectral`]: several adapters as one, exactly or at a smaller rank
//! - [`files`], [`checkpoint`], [`fold`]: a Hugging Face folder, and `W0 + sum of deltas`
//! - [`merkle`]: trees of hashes, for the log and for commitments
//! - [`lineage`]: the signed manifest from which a checkpoint can be rebuilt

pub mod adapter;
pub mod aggregate;
pub mod algebra;
pub mod carry;
pub mod check;
pub mod checkpoint;
pub mod compress;
pub mod config;
pub mod digest;
pub mod duration;
pub mod files;
pub mod fold;
mod json;
pub mod lineage;
pub mod merkle;
pub mod objective;
pub mod peft;
pub mod quantize;
pub mod recipe;
pub mod records;
pub mod round;
pub mod spectral;
pub mod tensors;
#[cfg(test)]
mod testing;
