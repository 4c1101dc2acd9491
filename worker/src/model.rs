//! The Llama family on burn: frozen weights in Hugging Face layout, LoRA pairs beside them.
//!
//! Reading order: [`input`] (what a batch becomes), [`rope`], [`ops`] (what everything is computed
//! with), [`weight`], [`linear`], [`lora`], [`mixture`], [`pass`], [`attention`], [`block`], [`llama`], [`distill`],
//! [`loss`], [`weights`] (from files), [`loaded`] (a model ready to work).
//!
//! # Shapes
//!
//! One legend for every shape comment:
//!
//! | letter | meaning |
//! |---|---|
//! | `R` | rows of a batch |
//! | `L` | tokens a row, padding included |
//! | `N` | `R * L` |
//! | `S` | scored tokens of a batch |
//! | `D` | width of the residual stream |
//! | `F` | width of the feed-forward layers |
//! | `H`, `K` | query heads, key-value heads |
//! | `G` | `H / K`, query heads a key-value head |
//! | `E` | width of a head |
//! | `V` | vocabulary |
//! | `r` | LoRA rank |
//!
//! Activations are kept flat, `[N, D]`, so that every linear layer is one matrix product over the
//! whole batch; only attention sees rows and heads.
//!
//! Base weights are plain tensors and frozen: gradients are formed for LoRA factors alone, and passed
//! on only as far down as the lowest of them. The way back is written out beside the way there.

pub mod attention;
pub mod block;
pub mod distill;
pub mod input;
pub mod linear;
pub mod llama;
pub mod loaded;
pub mod lora;
pub mod loss;
pub mod mixture;
pub mod ops;
pub mod pass;
pub mod rope;
pub mod weight;
pub mod weights;

pub use input::Input;
pub use llama::Llama;
pub use loaded::{LoadedModel, ModelError};
pub use lora::Adapter;
#[doc(hidden)]
pub use ops::without_kernels;
