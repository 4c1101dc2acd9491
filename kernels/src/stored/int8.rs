//! Eight bits a number: whole multiples of a block's largest magnitude over 127.

use super::{BLOCK, by_block, encode_blocks, largest_magnitude};
use crate::lanes::vectorised;

/// Largest code: one of the 256 is not used, so that zero is in the middle.
const CODE_MAX: f32 = 127.0;

/// Numbers in blocks of [`BLOCK`].
#[derive(Debug, Clone)]
pub(super) struct Int8 {
    codes: Vec<i8>,
    /// A block's largest magnitude over 127.
    steps: Vec<f32>,
}

impl Int8 {
    /// Zeros, to be filled.
    pub fn zeros(count: usize) -> Self {
        Self {
            codes: vec![0; count],
            steps: vec![0.0; count.div_ceil(BLOCK)],
        }
    }

    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.steps.len()
    }

    /// Keeps `values` from `first` on, the beginning of a block: `q = round(x / step)`, ties to even.
    pub fn encode(&mut self, first: usize, values: &[f32]) {
        let codes = &mut self.codes[first..first + values.len()];
        let blocks = values.len().div_ceil(BLOCK);
        let steps = &mut self.steps[first / BLOCK..][..blocks];
        encode_blocks(values, (codes, BLOCK), steps, block);
    }

    /// Writes the numbers from `first` on to `out`.
    pub fn decode(&self, first: usize, out: &mut [f32]) {
        vectorised(
            #[inline(always)]
            || {
                by_block(
                    first,
                    out,
                    #[inline(always)]
                    |block, place, out| {
                        let step = self.steps[block];
                        for (out, code) in out.iter_mut().zip(&self.codes[place..]) {
                            *out = f32::from(*code) * step;
                        }
                    },
                );
            },
        );
    }
}

/// The codes of one block; its step.
#[inline(always)]
fn block(values: &[f32], codes: &mut [i8]) -> f32 {
    let step = largest_magnitude(values) / CODE_MAX;
    // Nothing but zeros, or numbers too small for a step: zeros.
    let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    for (value, code) in values.iter().zip(codes) {
        let scaled = (value * inverse).round_ties_even();
        *code = scaled.clamp(-CODE_MAX, CODE_MAX) as i8;
    }
    step
}
