//! The arithmetic of a transformer block on a CPU, forwards and backwards, over plain slices.
//!
//! Matrix products are faer's; everything between them is here, each piece in one pass over memory.
//! On a CPU such passes cost as much as they move bytes, and a chain of elementwise operations, one
//! tensor each, spends half of a training step in them.
//!
//! Rules of the house:
//!
//! - A function reads slices and writes slices, row-major, `f32`. Shapes are its contract, and it
//!   panics where a length is not the product of its shape: callers are our own code.
//! - Work is divided in pieces that do not depend on the number of threads, and nothing is summed
//!   across pieces: results are the same bits on one thread and on many.
//! - Loops are plain Rust, compiled for several instruction sets ([`pulp`]).
//!
//! # Shapes
//!
//! | letter | meaning |
//! |---|---|
//! | `R` | rows of a batch |
//! | `L` | tokens a row |
//! | `N` | `R * L` |
//! | `H`, `K` | query heads, key-value heads |
//! | `E` | width of a head |
//! | `V` | vocabulary |

#![expect(
    clippy::inline_always,
    reason = "a function is compiled for the instructions of the loop that it is inlined into"
)]

pub mod attention;
pub mod distill;
pub mod gate;
pub mod heads;
mod lanes;
pub mod loss;
pub mod norm;
pub mod product;
pub mod stored;

/// Runs work on a thread of the pool. Kernels that are called from there start at once, and small ones
/// stay on it.
pub fn inside<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let mut result = None;
    rayon::scope(|_| result = Some(work()));
    result.expect("the scope has ended")
}
