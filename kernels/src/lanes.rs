//! Loops that become vector instructions: sums in lanes, and an exponential without a branch.

use pulp::Arch;

/// Partial sums: wide enough for two AVX-512 registers, so that additions do not wait for each other.
const LANES: usize = 32;

/// Numbers in a piece of work: enough that handing it to another thread pays, and few enough to stay
/// in a core's second-level cache.
pub(crate) const PIECE: usize = 16 << 10;

/// Rows of this width in a piece of work.
pub(crate) fn rows_a_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

/// Runs a loop compiled for the best instruction set of this machine. What it calls must be inlined.
#[inline]
pub(crate) fn vectorised<T>(work: impl FnOnce() -> T) -> T {
    struct Work<F>(F);
    impl<T, F: FnOnce() -> T> pulp::NullaryFnOnce for Work<F> {
        type Output = T;
        #[inline(always)]
        fn call(self) -> T {
            (self.0)()
        }
    }
    Arch::new().dispatch(Work(work))
}

/// `sum_i f(a_i, b_i)` over two slices of one length, in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    sum3(a, b, b, |a, b, _| f(a, b))
}

/// `sum_i f(a_i, b_i, c_i)` over three.
#[inline(always)]
pub(crate) fn sum3(a: &[f32], b: &[f32], c: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (a, b, c) = (
        a.chunks_exact(LANES),
        b.chunks_exact(LANES),
        c.chunks_exact(LANES),
    );
    let rest = a.remainder().iter().zip(b.remainder()).zip(c.remainder());
    for ((a, b), c) in a.zip(b).zip(c) {
        for lane in 0..LANES {
            sums[lane] += f(a[lane], b[lane], c[lane]);
        }
    }
    for (lane, ((a, b), c)) in rest.enumerate() {
        sums[lane] += f(*a, *b, *c);
    }
    fold(sums, |a, b| a + b)
}

/// The largest value; `-inf` of none.
#[inline(always)]
pub(crate) fn largest(values: &[f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    let lanes = values.chunks_exact(LANES);
    let rest = lanes.remainder();
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    for values in lanes {
        for lane in 0..LANES {
            most[lane] = larger(values[lane], most[lane]);
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        most[lane] = larger(*value, most[lane]);
    }
    fold(most, larger)
}

/// Replaces every value by `exp(value - shift)`, and sums them.
#[inline(always)]
pub(crate) fn exponentials(values: &mut [f32], shift: f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let mut lanes = values.chunks_exact_mut(LANES);
    for values in &mut lanes {
        for lane in 0..LANES {
            values[lane] = exp(values[lane] - shift);
            sums[lane] += values[lane];
        }
    }
    for (lane, value) in lanes.into_remainder().iter_mut().enumerate() {
        *value = exp(*value - shift);
        sums[lane] += *value;
    }
    fold(sums, |a, b| a + b)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = f(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x`, within 2 units in the last place; 0 below the smallest normal number, and the largest
/// finite power of e above. NaN stays NaN.
///
/// Cody and Waite's reduction to `2^n e^r`, `|r| <= ln(2) / 2`, and Cephes' polynomial (`expf.c`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Added and taken away again, it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -87.336_54;
    const HIGHEST: f32 = 88.376_26;
    let inside = if x > HIGHEST { HIGHEST } else { x };
    let inside = if inside < LOWEST { LOWEST } else { inside };
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = inside - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 0.166_666_65;
    p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    let result = value * power;
    if x < LOWEST { 0.0 } else { result }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_the_exponential() {
        let mut worst = 0.0_f64;
        for step in -870_000..880_000 {
            let x = step as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::INFINITY).is_finite() && exp(f32::INFINITY) > 1e38);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_take_every_value() {
        for length in [0, 1, 31, 32, 33, 100] {
            let values: Vec<f32> = (0..length).map(|n| n as f32).collect();
            let sum = vectorised(|| sum2(&values, &values, |a, b| a + b));
            assert_eq!(sum, (length * (length.max(1) - 1)) as f32);
            let most = vectorised(|| largest(&values));
            let expected = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(most, expected);
        }
    }
}
