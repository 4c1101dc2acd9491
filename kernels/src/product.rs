//! Matrix products into memory that is there, over what is there if asked.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// Products smaller than this many multiplications stay on one thread: waking another takes longer.
const PARALLEL_MIN: usize = 1 << 21;

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
    let accumulate = match into {
        Into::Replace => Accum::Replace,
        Into::Add => Accum::Add,
    };
    let parallel = threads == Threads::All && m * n * k >= PARALLEL_MIN;
    let parallel = if parallel { Par::rayon(0) } else { Par::Seq };
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    matmul(out, accumulate, a.0, b.0, scale, parallel);
}

#[cfg(test)]
mod tests {
    use super::*;

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
