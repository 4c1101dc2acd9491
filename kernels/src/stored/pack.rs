//! Matrices on their way into a format, a piece at a time: nobody needs to hold one in `f32`.

use rayon::prelude::*;

use super::int8::Int8;
use super::{BLOCK, Format, Numbers, Stored, nf4};

/// All pieces but the last are a multiple of so many numbers: pieces end where blocks do.
pub const PUSHED_MULTIPLE: usize = BLOCK;

/// A matrix that is being filled.
#[derive(Debug)]
pub struct Packer {
    rows: usize,
    columns: usize,
    filled: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    Halves(Vec<u16>),
    Floats(Vec<f32>),
    Int8(Int8),
    Nf4(nf4::Filling),
}

/// A matrix in its format.
#[derive(Debug)]
pub enum Packed {
    /// In fewer bits.
    Stored(Stored),
    /// In `f32`, row-major: fewer bits would lose some.
    Floats(Vec<f32>),
}

impl Packer {
    /// An empty matrix `[rows, columns]`.
    #[must_use]
    pub fn new(format: Format, rows: usize, columns: usize) -> Self {
        let count = rows * columns;
        let state = match format {
            Format::Exact => State::Halves(Vec::with_capacity(count)),
            Format::Int8 => State::Int8(Int8::zeros(count)),
            Format::Nf4 => State::Nf4(nf4::Filling::zeros(count)),
        };
        Self {
            rows,
            columns,
            filled: 0,
            state,
        }
    }

    /// The next numbers, row-major.
    ///
    /// # Panics
    /// When they are more than the matrix has, or a piece before was no multiple of
    /// [`PUSHED_MULTIPLE`].
    pub fn push(&mut self, values: &[f32]) {
        let first = self.filled;
        self.filled += values.len();
        assert!(self.filled <= self.rows * self.columns && first.is_multiple_of(PUSHED_MULTIPLE));
        match &mut self.state {
            State::Halves(halves) => {
                let fits = |value: &f32| value.to_bits().trailing_zeros() >= 16;
                if values.par_iter().all(fits) {
                    halves.extend(values.iter().map(|value| (value.to_bits() >> 16) as u16));
                } else {
                    let mut floats = Vec::with_capacity(self.rows * self.columns);
                    let wide = |half: &u16| f32::from_bits(u32::from(*half) << 16);
                    floats.extend(halves.iter().map(wide));
                    floats.extend_from_slice(values);
                    self.state = State::Floats(floats);
                }
            }
            State::Floats(floats) => floats.extend_from_slice(values),
            State::Int8(numbers) => numbers.encode(first, values),
            State::Nf4(numbers) => numbers.encode(first, values),
        }
    }

    /// The matrix.
    ///
    /// # Panics
    /// When numbers are missing.
    #[must_use]
    pub fn finish(self) -> Packed {
        assert_eq!(self.filled, self.rows * self.columns);
        let numbers = match self.state {
            State::Halves(halves) => Numbers::Halves(halves),
            State::Floats(floats) => return Packed::Floats(floats),
            State::Int8(numbers) => Numbers::Int8(numbers),
            State::Nf4(numbers) => Numbers::Nf4(numbers.finish()),
        };
        Packed::Stored(Stored {
            rows: self.rows,
            columns: self.columns,
            numbers,
        })
    }
}
