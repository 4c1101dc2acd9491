//! Four bits a number, as QLoRA keeps a frozen model (arXiv 2305.14314) and bitsandbytes computes it:
//! blocks of 64 numbers with one scale each, and the scales quantised again.

use std::sync::LazyLock;

use super::{BLOCK, by_block, encode_blocks, largest_magnitude};
use crate::lanes::vectorised;

/// NF4: quantiles of the normal distribution scaled to -1 to 1, zero among them; the sixteen numbers of
/// arXiv 2305.14314, appendix E, as bitsandbytes has them.
#[expect(
    clippy::excessive_precision,
    clippy::unreadable_literal,
    reason = "as they are published"
)]
pub const CODE_BOOK: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// Between which numbers of the book a value is nearer to the upper one.
const MIDDLES: [f32; 15] = {
    let mut middles = [0.0; 15];
    let mut n = 0;
    while n < 15 {
        middles[n] = f32::midpoint(CODE_BOOK[n], CODE_BOOK[n + 1]);
        n += 1;
    }
    middles
};

/// What a byte stands for: the number of its upper half, then that of its lower.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODE_BOOK[byte >> 4], CODE_BOOK[byte & 15]];
        byte += 1;
    }
    pairs
};

/// Blocks whose scales share a scale of their own.
pub const BLOCKS_A_SCALE: usize = 256;

/// The 256 numbers that scales are kept as, in rising order: bitsandbytes' signed dynamic map with seven
/// bits of exponent (8-bit optimizers, arXiv 2110.02861). For every power `10^-6` to `10^0`, `2^i`
/// numbers evenly in its upper nine tenths, of either sign; zero and one.
#[must_use]
pub fn scale_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut map = vec![0.0_f32, 1.0];
        for exponent in 0..7 {
            let (power, count) = (10_f64.powi(exponent - 6), 1 << exponent);
            for n in 0..count {
                let number = power * (0.1 + 0.9 * (f64::from(n) + 0.5) / f64::from(count));
                map.extend([number as f32, -number as f32]);
            }
        }
        map.sort_by(f32::total_cmp);
        map.try_into().expect("2 + 2 (1 + 2 + ... + 64) numbers")
    });
    &MAP
}

/// Numbers in blocks of [`BLOCK`], two a byte, the first in the upper half.
#[derive(Debug, Clone)]
pub(super) struct Nf4 {
    codes: Vec<u8>,
    scales: Scales,
}

/// One scale a block: `offset + map[code] · coarse`.
#[derive(Debug, Clone)]
struct Scales {
    codes: Vec<u8>,
    /// One for [`BLOCKS_A_SCALE`] blocks.
    coarse: Vec<f32>,
    offset: f32,
}

/// Numbers on their way: a scale is quantised when all of them are known.
#[derive(Debug)]
pub(super) struct Filling {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Filling {
    /// Zeros, to be filled.
    pub fn zeros(count: usize) -> Self {
        Self {
            codes: vec![0; count.div_ceil(2)],
            scales: vec![0.0; count.div_ceil(BLOCK)],
        }
    }

    /// Keeps `values` from `first` on, the beginning of a block.
    pub fn encode(&mut self, first: usize, values: &[f32]) {
        let codes = &mut self.codes[first / 2..][..values.len().div_ceil(2)];
        let scales = &mut self.scales[first / BLOCK..][..values.len().div_ceil(BLOCK)];
        encode_blocks(values, (codes, BLOCK / 2), scales, block);
    }

    pub fn finish(self) -> Nf4 {
        Nf4 {
            codes: self.codes,
            scales: Scales::of(&self.scales),
        }
    }
}

impl Nf4 {
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.codes.len() + 4 * self.scales.coarse.len() + 4
    }

    /// Codes, codes of the scales, their scales, and the offset.
    #[cfg(test)]
    pub fn parts(&self) -> (&[u8], &[u8], &[f32], f32) {
        let scales = &self.scales;
        (&self.codes, &scales.codes, &scales.coarse, scales.offset)
    }

    /// Writes the numbers from `first` on to `out`.
    pub fn decode(&self, first: usize, out: &mut [f32]) {
        let map = scale_map();
        vectorised(
            #[inline(always)]
            || {
                by_block(
                    first,
                    out,
                    #[inline(always)]
                    |block, place, out| {
                        let scale = self.scales.at(block, map);
                        if place % 2 == 0 {
                            unpack(&self.codes[place / 2..], scale, out);
                        } else if let Some((head, rest)) = out.split_first_mut() {
                            *head = PAIRS[usize::from(self.codes[place / 2])][1] * scale;
                            unpack(&self.codes[place / 2 + 1..], scale, rest);
                        }
                    },
                );
            },
        );
    }
}

#[inline(always)]
fn unpack(codes: &[u8], scale: f32, out: &mut [f32]) {
    let (pairs, rest) = out.as_chunks_mut::<2>();
    let (whole, last) = codes.split_at(pairs.len());
    for (out, byte) in pairs.iter_mut().zip(whole) {
        let [upper, lower] = PAIRS[usize::from(*byte)];
        *out = [upper * scale, lower * scale];
    }
    if let (Some(out), Some(byte)) = (rest.first_mut(), last.first()) {
        *out = PAIRS[usize::from(*byte)][0] * scale;
    }
}

/// The codes of one block: of every number the nearest in the book, times the largest magnitude, which
/// is returned.
#[inline(always)]
fn block(values: &[f32], codes: &mut [u8]) -> f32 {
    let scale = largest_magnitude(values);
    let mut nearest = [0_u8; BLOCK];
    let inverse = inverse(scale);
    for (value, nearest) in values.iter().zip(&mut nearest) {
        let value = value * inverse;
        *nearest = MIDDLES.iter().map(|middle| u8::from(value > *middle)).sum();
    }
    // An odd number of values leaves half a byte: zero.
    if let Some(after) = nearest.get_mut(values.len()) {
        *after = 7;
    }
    for (code, pair) in codes.iter_mut().zip(nearest.as_chunks::<2>().0) {
        *code = pair[0] << 4 | pair[1];
    }
    scale
}

/// One over a scale; 0 for a scale that has none, whose numbers become zeros.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

impl Scales {
    /// The mean goes off first, so that both signs of the map are used. Summed in f64, one after the
    /// other: the same on every machine.
    fn of(scales: &[f32]) -> Self {
        let sum: f64 = scales.iter().copied().map(f64::from).sum();
        let offset = (sum / (scales.len() as f64).max(1.0)) as f32;
        let mut codes = Vec::with_capacity(scales.len());
        let map = scale_map();
        let coarse = scales
            .chunks(BLOCKS_A_SCALE)
            .map(|scales| {
                let apart = |scale: &f32| scale - offset;
                let coarse = largest_magnitude(&scales.iter().map(apart).collect::<Vec<_>>());
                let inverse = inverse(coarse);
                codes.extend(
                    scales
                        .iter()
                        .map(|scale| nearest(apart(scale) * inverse, map)),
                );
                coarse
            })
            .collect();
        Self {
            codes,
            coarse,
            offset,
        }
    }

    #[inline(always)]
    fn at(&self, block: usize, map: &[f32; 256]) -> f32 {
        let coarse = self.coarse[block / BLOCKS_A_SCALE];
        map[usize::from(self.codes[block])] * coarse + self.offset
    }
}

/// The place of the number of the map that is nearest.
fn nearest(value: f32, map: &[f32; 256]) -> u8 {
    let above = map.partition_point(|number| *number < value).clamp(1, 255);
    let below = above - 1;
    let nearer_below = value - map[below] < map[above] - value;
    if nearer_below {
        below as u8
    } else {
        above as u8
    }
}
