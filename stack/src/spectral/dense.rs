//! The little dense linear algebra that singular values need: Householder QR and one-sided Jacobi.

/// A dense matrix, column after column, f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    /// From a function of row and column.
    pub fn from_fn(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let places = (0..columns).flat_map(|c| (0..rows).map(move |r| (r, c)));
        let values = places.map(|(row, column)| value(row, column)).collect();
        Self {
            rows,
            columns,
            values,
        }
    }

    /// One entry.
    pub fn get(&self, row: usize, column: usize) -> f64 {
        self.values[column * self.rows + row]
    }

    fn column(&self, column: usize) -> &[f64] {
        &self.values[column * self.rows..(column + 1) * self.rows]
    }

    fn column_mut(&mut self, column: usize) -> &mut [f64] {
        &mut self.values[column * self.rows..(column + 1) * self.rows]
    }

    fn pair_mut(&mut self, first: usize, second: usize) -> (&mut [f64], &mut [f64]) {
        let (head, tail) = self.values.split_at_mut(second * self.rows);
        let at = first * self.rows;
        (&mut head[at..at + self.rows], &mut tail[..self.rows])
    }

    /// `self * other`.
    pub fn times(&self, other: &Self) -> Self {
        let mut out = Self::from_fn(self.rows, other.columns, |_, _| 0.0);
        for column in 0..other.columns {
            let target = &mut out.values[column * self.rows..(column + 1) * self.rows];
            for (k, factor) in other.column(column).iter().enumerate() {
                add_scaled(target, self.column(k), *factor);
            }
        }
        out
    }

    /// `self * other^T`.
    pub fn times_transposed(&self, other: &Self) -> Self {
        let transposed = Self::from_fn(other.columns, other.rows, |r, c| other.get(c, r));
        self.times(&transposed)
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn add_scaled(target: &mut [f64], source: &[f64], factor: f64) {
    target
        .iter_mut()
        .zip(source)
        .for_each(|(target, source)| *target += factor * source);
}

/// Thin QR by Householder reflections (Golub and Van Loan, section 5.2): `Q [rows, m]`, `R [m, columns]`
/// with `m = min(rows, columns)`.
pub fn qr(mut matrix: Matrix) -> (Matrix, Matrix) {
    let (rows, columns) = (matrix.rows, matrix.columns);
    let small = rows.min(columns);
    let mut reflections: Vec<Vec<f64>> = Vec::with_capacity(small);
    for k in 0..small {
        let mut normal = matrix.column(k)[k..].to_vec();
        let norm = dot(&normal, &normal).sqrt();
        if norm > 0.0 {
            // The sign that does not cancel.
            normal[0] += norm.copysign(normal[0]);
            let length = dot(&normal, &normal).sqrt();
            for value in &mut normal {
                *value /= length;
            }
            for column in k..columns {
                reflect(&mut matrix.column_mut(column)[k..], &normal);
            }
        }
        reflections.push(normal);
    }
    let upper = Matrix::from_fn(small, columns, |row, column| {
        if row <= column {
            matrix.get(row, column)
        } else {
            0.0
        }
    });
    let mut q = Matrix::from_fn(rows, small, |row, column| {
        f64::from(u8::from(row == column))
    });
    for (k, normal) in reflections.iter().enumerate().rev() {
        for column in 0..small {
            reflect(&mut q.column_mut(column)[k..], normal);
        }
    }
    (q, upper)
}

/// `x - 2 n (n . x)`; a zero normal changes nothing.
fn reflect(values: &mut [f64], normal: &[f64]) {
    let along = 2.0 * dot(values, normal);
    add_scaled(values, normal, -along);
}

/// `M = left * diag(singular) * right^T`.
pub struct Svd {
    /// `[rows, n]`, orthonormal columns (zero where the singular value is zero).
    pub left: Matrix,
    /// Descending.
    pub singular: Vec<f64>,
    /// `[columns, n]`.
    pub right: Matrix,
}

/// Sweeps of Jacobi rotations at most; ten are usual.
const SWEEPS_MAX: usize = 60;
/// Columns count as orthogonal when their cosine is below this.
const ORTHOGONAL: f64 = 1e-14;

/// Singular values by one-sided Jacobi (Hestenes; Golub and Van Loan, section 8.6): rotates pairs of
/// columns until all are orthogonal. Deterministic, and accurate for small values too.
pub fn svd(matrix: Matrix) -> Svd {
    if matrix.rows < matrix.columns {
        let transposed = Matrix::from_fn(matrix.columns, matrix.rows, |r, c| matrix.get(c, r));
        let Svd {
            left,
            singular,
            right,
        } = svd(transposed);
        return Svd {
            left: right,
            singular,
            right: left,
        };
    }
    let mut work = matrix;
    let n = work.columns;
    let mut right = Matrix::from_fn(n, n, |row, column| f64::from(u8::from(row == column)));
    for _ in 0..SWEEPS_MAX {
        let mut rotated = false;
        for first in 0..n {
            for second in first + 1..n {
                rotated |= rotate(&mut work, &mut right, first, second);
            }
        }
        if !rotated {
            break;
        }
    }
    sorted(&work, &right)
}

/// Makes two columns orthogonal. False: they were.
fn rotate(work: &mut Matrix, right: &mut Matrix, first: usize, second: usize) -> bool {
    let (x, y) = work.pair_mut(first, second);
    let (alpha, beta, gamma) = (dot(x, x), dot(y, y), dot(x, y));
    if gamma == 0.0 || gamma.abs() <= ORTHOGONAL * (alpha * beta).sqrt() {
        return false;
    }
    let zeta = (beta - alpha) / (2.0 * gamma);
    let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
    let cosine = tangent.hypot(1.0).recip();
    let sine = cosine * tangent;
    for (x, y) in [(x, y), right.pair_mut(first, second)] {
        for (x, y) in x.iter_mut().zip(y.iter_mut()) {
            (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
        }
    }
    true
}

fn sorted(work: &Matrix, right: &Matrix) -> Svd {
    let norms: Vec<f64> = (0..work.columns)
        .map(|column| dot(work.column(column), work.column(column)).sqrt())
        .collect();
    let mut order: Vec<usize> = (0..work.columns).collect();
    order.sort_by(|one, two| norms[*two].total_cmp(&norms[*one]).then(one.cmp(two)));
    let unit = |row: usize, column: usize| {
        let norm = norms[order[column]];
        if norm > 0.0 {
            work.get(row, order[column]) / norm
        } else {
            0.0
        }
    };
    Svd {
        left: Matrix::from_fn(work.rows, work.columns, unit),
        singular: order.iter().map(|column| norms[*column]).collect(),
        right: Matrix::from_fn(right.rows, work.columns, |row, column| {
            right.get(row, order[column])
        }),
    }
}
