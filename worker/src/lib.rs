//! The volunteer's program: a Llama-family model on burn, LoRA training and evaluation, and the
//! commands around them.
//!
//! Reading order:
//!
//! - [`device`], [`memory`]: what it runs on, and how much there is of it
//! - [`data`]: records to tokens, chat templates, masks, packing
//! - [`model`]: the forward pass, LoRA beside frozen weights, the loss
//! - [`preflight`]: whether model and recipe fit, and how batches are then passed
//! - [`train`]: one adapter, resumable
//! - [`evaluate`]: per-example losses
//! - [`canary`]: a training of known outcome, for devices that compute wrong
//! - [`learn`]: one weight an adapter, by gradient
//! - [`offline`]: the commands `train` and `evaluate`, without a coordinator
//! - [`join`], [`run`], [`status`]: the commands that talk to a coordinator
//! - [`home`], [`cache`], [`receipts`], [`limits`], [`error`]: what those keep, and may do
//! - [`cancel`], [`interrupt`], [`clock`], [`progress`]: what long work needs around it
//!
//! Tensors stop at this crate: what leaves it are PEFT folders and numbers.

pub mod allocator;
pub mod cache;
pub mod canary;
pub mod cancel;
pub mod clock;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod home;
pub mod interrupt;
pub mod join;
pub mod learn;
pub mod limits;
pub mod memory;
pub mod model;
pub mod offline;
pub mod preflight;
pub mod progress;
pub mod receipts;
pub mod run;
pub mod status;
pub mod train;
