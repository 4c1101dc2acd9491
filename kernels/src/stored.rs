//! Frozen matrices in fewer bits than they are computed with: unfolded a few rows at a time, into
//! memory that is used again, right before a product reads them.

mod int8;
mod nf4;
mod pack;

use std::ops::Range;

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use crate::lanes::{PIECE, rows_a_piece, vectorised};
use crate::product::{Into, multiply};

pub use pack::{PUSHED_MULTIPLE, Packed, Packer};

use int8::Int8;
use nf4::{BLOCKS_A_SCALE, Nf4};

/// Numbers that are unfolded at once, 4 MiB in f32: a product over as many rows runs at full speed,
/// and they are still in the third-level cache when it reads them.
const UNFOLDED: usize = 1 << 20;

/// Numbers, in row-major order, that share one scale in a quantised matrix; as bitsandbytes has it for
/// 4 bits.
pub const BLOCK: usize = 64;

/// How the numbers of a matrix are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As they are: in bfloat16 where every one of them is such a number, else in `f32`.
    Exact,
    /// Eight bits: `q · m / 127`, `q` a whole number from -127 to 127 and `m` the largest magnitude of
    /// the block.
    Int8,
    /// Four bits: one of the sixteen numbers of NF4 times the largest magnitude of the block, which is
    /// itself kept in eight bits (QLoRA, arXiv 2305.14314).
    Nf4,
}

impl Format {
    /// Bytes of so many numbers; of [`Format::Exact`] where every one is a number of bfloat16.
    #[must_use]
    pub const fn bytes(self, count: usize) -> usize {
        let blocks = count.div_ceil(BLOCK);
        match self {
            Self::Exact => 2 * count,
            Self::Int8 => count + 4 * blocks,
            Self::Nf4 => count.div_ceil(2) + blocks + 4 * blocks.div_ceil(BLOCKS_A_SCALE) + 4,
        }
    }
}

/// A matrix `[rows, columns]` in fewer bits a number.
#[derive(Debug, Clone)]
pub struct Stored {
    rows: usize,
    columns: usize,
    numbers: Numbers,
}

#[derive(Debug, Clone)]
enum Numbers {
    /// The upper half of every `f32`, whose lower half is zero.
    Halves(Vec<u16>),
    Int8(Int8),
    Nf4(Nf4),
}

impl Stored {
    /// Rows and columns.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Bytes it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::Halves(bits) => 2 * bits.len(),
            Numbers::Int8(numbers) => numbers.bytes(),
            Numbers::Nf4(numbers) => numbers.bytes(),
        }
    }

    /// All of it in `f32`, row-major.
    #[must_use]
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.columns];
        self.unfold(0..self.rows, &mut values);
        values
    }

    /// Writes some rows to `out`, `[rows, columns]`.
    pub fn unfold(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(rows.end <= self.rows && out.len() == rows.len() * self.columns);
        let start = rows.start * self.columns;
        let piece = rows_a_piece(1);
        out.par_chunks_mut(piece)
            .enumerate()
            .for_each(|(number, out)| self.decode(start + number * piece, out));
    }

    /// Writes the numbers from `first` on to `out`.
    fn decode(&self, first: usize, out: &mut [f32]) {
        match &self.numbers {
            Numbers::Halves(bits) => vectorised(
                #[inline(always)]
                || {
                    for (out, bits) in out.iter_mut().zip(&bits[first..]) {
                        *out = f32::from_bits(u32::from(*bits) << 16);
                    }
                },
            ),
            Numbers::Int8(numbers) => numbers.decode(first, out),
            Numbers::Nf4(numbers) => numbers.decode(first, out),
        }
    }

    /// `x Wᵀ`, written or added to `out`.
    ///
    /// # Shapes
    /// - x: `[N, columns]`
    /// - out: `[N, rows]`
    pub fn times_transposed(&self, out: &mut [f32], into: Into, x: &[f32]) {
        let count = x.len() / self.columns.max(1);
        assert!(x.len() == count * self.columns && out.len() == count * self.rows);
        let x = MatRef::from_row_major_slice(x, count, self.columns);
        self.by_blocks(|rows, block| {
            let out = MatMut::from_row_major_slice_mut(&mut *out, count, self.rows);
            let out = out.subcols_mut(rows.start, rows.len());
            multiply(out, into, x, block.transpose(), 1.0);
        });
    }

    /// `d W`, written or added to `out`.
    ///
    /// # Shapes
    /// - d: `[N, rows]`
    /// - out: `[N, columns]`
    pub fn times(&self, out: &mut [f32], into: Into, d: &[f32]) {
        let count = d.len() / self.rows.max(1);
        assert!(d.len() == count * self.rows && out.len() == count * self.columns);
        let d = MatRef::from_row_major_slice(d, count, self.rows);
        if into == Into::Replace {
            out.fill(0.0);
        }
        self.by_blocks(|rows, block| {
            let out = MatMut::from_row_major_slice_mut(&mut *out, count, self.columns);
            let d = d.subcols(rows.start, rows.len());
            multiply(out, Into::Add, d, block, 1.0);
        });
    }

    fn by_blocks(&self, mut each: impl FnMut(Range<usize>, MatRef<'_, f32>)) {
        let step = (UNFOLDED / self.columns.max(1)).clamp(1, self.rows.max(1));
        let mut unfolded = vec![0.0; step * self.columns];
        for start in (0..self.rows).step_by(step) {
            let rows = start..(start + step).min(self.rows);
            let block = &mut unfolded[..rows.len() * self.columns];
            self.unfold(rows.clone(), block);
            let count = rows.len();
            each(
                rows,
                MatRef::from_row_major_slice(block, count, self.columns),
            );
        }
    }
}

/// Encodes `values`, the first of which begins a block, block by block: `block` writes the codes of one,
/// `codes_a_block` of them or fewer at the end, and answers with its scale.
fn encode_blocks<C: Send>(
    values: &[f32],
    (codes, codes_a_block): (&mut [C], usize),
    scales: &mut [f32],
    block: impl Fn(&[f32], &mut [C]) -> f32 + Sync,
) {
    const BLOCKS: usize = PIECE / BLOCK;
    values
        .par_chunks(PIECE)
        .zip(codes.par_chunks_mut(BLOCKS * codes_a_block))
        .zip(scales.par_chunks_mut(BLOCKS))
        .for_each(|((values, codes), scales)| {
            vectorised(
                #[inline(always)]
                || {
                    let codes = codes.chunks_mut(codes_a_block);
                    let blocks = values.chunks(BLOCK).zip(codes);
                    for ((values, codes), scale) in blocks.zip(scales) {
                        *scale = block(values, codes);
                    }
                },
            );
        });
}

/// Cuts what is to be decoded from `first` on at the ends of blocks: the block's number, the place of the
/// part's first number in the whole, and where the part goes.
#[inline(always)]
fn by_block(first: usize, mut out: &mut [f32], mut each: impl FnMut(usize, usize, &mut [f32])) {
    let mut place = first;
    while !out.is_empty() {
        let count = (BLOCK - place % BLOCK).min(out.len());
        let (part, rest) = std::mem::take(&mut out).split_at_mut(count);
        each(place / BLOCK, place, part);
        place += count;
        out = rest;
    }
}

/// The largest magnitude of a block; NaN where a number is not finite, so that a broken weight stays one.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    let (mut most, mut check) = (0.0_f32, 0.0_f32);
    for value in values {
        let magnitude = value.abs();
        most = if magnitude > most { magnitude } else { most };
        check += value * 0.0;
    }
    most + check
}

#[cfg(test)]
#[path = "stored/tests.rs"]
mod tests;
