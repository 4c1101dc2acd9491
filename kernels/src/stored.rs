//! Frozen matrices in fewer bits than they are computed with: unfolded a few rows at a time, into
//! memory that is used again, right before a product reads them.

use std::ops::Range;

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use crate::lanes::{rows_a_piece, vectorised};
use crate::product::{Into, multiply};

/// Numbers that are unfolded at once, 4 MiB in f32: a product over as many rows runs at full speed,
/// and they are still in the third-level cache when it reads them.
const UNFOLDED: usize = 1 << 20;

/// A matrix `[rows, columns]` in 16 bits a number.
#[derive(Debug, Clone)]
pub struct Stored {
    rows: usize,
    columns: usize,
    bits: Vec<u16>,
}

impl Stored {
    /// Keeps a matrix in bfloat16, the upper half of every number, where nothing is lost by it: what
    /// comes out is what went in, bit for bit. `None` for every other matrix.
    #[must_use]
    pub fn exactly(values: &[f32], rows: usize, columns: usize) -> Option<Self> {
        assert_eq!(values.len(), rows * columns);
        let fits = |value: &f32| value.to_bits().trailing_zeros() >= 16;
        values.par_iter().all(fits).then(|| Self {
            rows,
            columns,
            bits: values
                .par_iter()
                .map(|value| (value.to_bits() >> 16) as u16)
                .collect(),
        })
    }

    /// Rows and columns.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Writes some rows to `out`, `[rows, columns]`.
    pub fn unfold(&self, rows: Range<usize>, out: &mut [f32]) {
        let bits = &self.bits[rows.start * self.columns..rows.end * self.columns];
        assert_eq!(bits.len(), out.len());
        let piece = rows_a_piece(1);
        bits.par_chunks(piece)
            .zip(out.par_chunks_mut(piece))
            .for_each(|(bits, out)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for (out, bits) in out.iter_mut().zip(bits) {
                            *out = f32::from_bits(u32::from(*bits) << 16);
                        }
                    },
                );
            });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product::{Matrix, Threads, product};

    /// Numbers that bfloat16 has.
    fn halves(count: usize, seed: u32) -> Vec<f32> {
        let number = |n: u32| ((n.wrapping_mul(2_654_435_761).wrapping_add(seed)) >> 24) as f32;
        (0..count as u32)
            .map(|n| (number(n) - 128.0) / 64.0)
            .collect()
    }

    #[test]
    fn what_fits_comes_out_as_it_went_in_and_nothing_else_is_kept() {
        let values = halves(6, 1);
        let stored = Stored::exactly(&values, 2, 3).expect("eight bits each");
        let mut out = vec![0.0; 3];
        stored.unfold(1..2, &mut out);
        assert_eq!(out, values[3..]);
        assert_eq!(stored.shape(), [2, 3]);
        assert!(Stored::exactly(&[0.1], 1, 1).is_none());
        assert!(Stored::exactly(&[1.0, f32::from_bits(1)], 1, 2).is_none());
    }

    #[test]
    fn products_are_those_of_the_unfolded_matrix() {
        // More than one block, and a last one that is smaller.
        for (rows, columns, count) in [(5, 3, 4), (1100, 2048, 3)] {
            let weights = halves(rows * columns, 2);
            let stored = Stored::exactly(&weights, rows, columns).expect("eight bits each");
            let (x, d) = (halves(count * columns, 3), halves(count * rows, 4));
            let weights = Matrix::new(&weights, rows, columns);
            let check = |found: &[f32], expected: &[f32]| {
                for (found, expected) in found.iter().zip(expected) {
                    assert!((found - expected).abs() <= 1e-5 * expected.abs().max(100.0));
                }
            };
            for into in [Into::Replace, Into::Add] {
                let mut found = vec![2.0; count * rows];
                let mut expected = found.clone();
                stored.times_transposed(&mut found, into, &x);
                let (a, b) = (Matrix::new(&x, count, columns), weights.transposed());
                product(&mut expected, into, a, b, 1.0, Threads::One);
                check(&found, &expected);

                let mut found = vec![2.0; count * columns];
                let mut expected = found.clone();
                stored.times(&mut found, into, &d);
                let d = Matrix::new(&d, count, rows);
                product(&mut expected, into, d, weights, 1.0, Threads::One);
                check(&found, &expected);
            }
        }
    }
}
