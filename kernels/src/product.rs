//! Matrix products into memory that is there, over what is there if asked.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// Products smaller than this many multiplications stay on one thread: waking another takes longer.
const PARALLEL_MIN: usize = 1 << 21;

/// Rows of the output that one thread computes at a time. Two threads that share a product evenly wait
/// for the slower one; pieces go to whoever is free, which on a machine that does other things, too, is
/// worth up to a half. Smaller ones pack the right matrix more often than pays.
const ROWS: usize = 256;

/// A matrix to read.
#[derive(Clone, Copy)]
pub struct Matrix<'a>(MatRef<'a, f32>);

impl<'a> Matrix<'a> {
    /// `[rows, columns]`, row-major.
    #[must_use]
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self(MatRef::from_row_major_slice(values, rows, columns))
    }

    /// Its transpose; nothing is moved.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self(self.0.transpose())
    }

    fn shape(self) -> (usize, usize) {
        (self.0.nrows(), self.0.ncols())
    }
}

/// What becomes of what the output held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// It is overwritten.
    Replace,
    /// The product is added to it.
    Add,
}

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The caller alone: it is itself one of many.
    One,
    /// Every thread of the current pool, where it pays.
    All,
}

/// `scale · a b`, written or added to `out` (row-major).
///
/// # Panics
/// When shapes do not fit each other.
pub fn product(
    out: &mut [f32],
    into: Into,
    a: Matrix<'_>,
    b: Matrix<'_>,
    scale: f32,
    threads: Threads,
) {
    let ((m, k), (inner, n)) = (a.shape(), b.shape());
    assert_eq!(k, inner, "inner dimensions");
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    match threads {
        Threads::One => matmul(out, into.into(), a.0, b.0, scale, Par::Seq),
        Threads::All => multiply(out, into, a.0, b.0, scale),
    }
}

/// `scale · a b` by every thread of the current pool, where it pays.
pub(crate) fn multiply(
    out: MatMut<'_, f32>,
    into: Into,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    scale: f32,
) {
    let (m, n, k) = (out.nrows(), out.ncols(), a.ncols());
    if m * n * k < PARALLEL_MIN {
        matmul(out, into.into(), a, b, scale, Par::Seq);
    } else if m >= 2 * ROWS {
        pieces(out, into, a, b, scale);
    } else {
        matmul(out, into.into(), a, b, scale, Par::rayon(0));
    }
}

fn pieces(out: MatMut<'_, f32>, into: Into, a: MatRef<'_, f32>, b: MatRef<'_, f32>, scale: f32) {
    let count = out.nrows().div_ceil(ROWS);
    if count == 1 {
        return matmul(out, into.into(), a, b, scale, Par::Seq);
    }
    let middle = count / 2 * ROWS;
    let (out_above, out_below) = out.split_at_row_mut(middle);
    let (a_above, a_below) = a.split_at_row(middle);
    rayon::join(
        || pieces(out_above, into, a_above, b, scale),
        || pieces(out_below, into, a_below, b, scale),
    );
}

impl From<Into> for Accum {
    fn from(into: Into) -> Self {
        match into {
            Into::Replace => Self::Replace,
            Into::Add => Self::Add,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole() {
        let (m, k, n) = (2 * ROWS + 7, 40, 210);
        let numbers = |count: usize, step: usize| -> Vec<f32> {
            (0..count).map(|n| ((n * step) % 17) as f32 - 8.0).collect()
        };
        let (a, b) = (numbers(m * k, 5), numbers(n * k, 7));
        let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, n, k).transposed());
        let (mut one, mut all) = (vec![1.0; m * n], vec![1.0; m * n]);
        product(&mut one, Into::Add, a, b, 0.5, Threads::One);
        product(&mut all, Into::Add, a, b, 0.5, Threads::All);
        assert!(m * n * k >= PARALLEL_MIN);
        assert_eq!(one, all); // whole numbers and halves: no sum is rounded
    }

    #[test]
    fn products_are_what_they_say() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // [2, 3]
        let b = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]; // [3, 2]
        let mut out = [f32::NAN; 4];
        let (a, b) = (Matrix::new(&a, 2, 3), Matrix::new(&b, 3, 2));
        product(&mut out, Into::Replace, a, b, 1.0, Threads::All);
        assert_eq!(out, [4.0, 5.0, 10.0, 11.0]);
        product(&mut out, Into::Add, a, b, 2.0, Threads::One);
        assert_eq!(out, [12.0, 15.0, 30.0, 33.0]);
        let mut square = [0.0; 9];
        let (left, right) = (a.transposed(), b.transposed());
        product(&mut square, Into::Replace, left, right, 1.0, Threads::One);
        assert_eq!(square, [1.0, 4.0, 5.0, 2.0, 5.0, 7.0, 3.0, 6.0, 9.0]);
    }
}
