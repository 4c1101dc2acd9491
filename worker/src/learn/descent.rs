//! Descent of a smooth function of few numbers between bounds, each look at which is dear.
//!
//! BFGS (Nocedal and Wright, section 6.1) on the numbers that are free, steps projected onto the
//! bounds (Bertsekas 1982), and a backtracking line search: one look a step nearly always. Plain
//! arithmetic in f64; the same function gives the same path.

/// Length of the first step as a part of the start's norm.
const FIRST_STEP: f64 = 0.25;
/// Norm that a start near zero is taken for.
const NORM_MIN: f64 = 0.25;
/// Longest step as a part of the point's norm.
const STEP_MAX: f64 = 2.0;
/// A step that promises, or a search that leaves, less than this part of the point's norm is none.
const STEP_MIN: f64 = 1e-5;
/// Two steps in a row that lower the loss by less than this part of it are the last: sums in f32
/// resolve no more.
const GAIN_MIN: f64 = 1e-7;

/// What one look gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// The function.
    pub loss: f64,
    /// Its slope by each number.
    pub slopes: Vec<f64>,
}

/// The best point that was looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Minimum {
    /// The point.
    pub point: Vec<f64>,
    /// The function there.
    pub loss: f64,
    /// The function at the start.
    pub first_loss: f64,
    /// Looks taken.
    pub passes: u32,
}

/// Lowers a function from `start` in at most `passes` looks; the first is at the start itself. Each
/// number stays between 0 and `most`, or between it and its start where that lies outside. A value
/// that is not finite counts as worse than any.
///
/// # Errors
/// What `look` answers.
pub fn minimise<E>(
    start: &[f64],
    most: f64,
    passes: u32,
    mut look: impl FnMut(&[f64]) -> Result<Value, E>,
) -> Result<Minimum, E> {
    let bounds: Vec<(f64, f64)> = start.iter().map(|x| (x.min(0.0), x.max(most))).collect();
    let mut at = look(start)?;
    let mut best = Minimum {
        point: start.to_vec(),
        loss: at.loss,
        first_loss: at.loss,
        passes: 1,
    };
    let mut curvature: Option<Vec<f64>> = None;
    let mut poor = 0;
    while poor < 2 && at.loss.is_finite() {
        let point = best.point.clone();
        let free = free(&point, &at.slopes, &bounds);
        let step = direction(&point, &at.slopes, &free, curvature.as_deref());
        let slope = dot(&step, &at.slopes);
        if norm(&step) <= STEP_MIN * scale(&point) || slope >= 0.0 || slope.is_nan() {
            // Down the plain slope once more, then it is over.
            if curvature.take().is_some() {
                continue;
            }
            break;
        }
        let mut length = 1.0;
        let next = loop {
            if best.passes >= passes || length * norm(&step) <= STEP_MIN * scale(&point) {
                return Ok(best);
            }
            let tried = moved(&point, &step, length, &bounds);
            let value = look(&tried)?;
            best.passes += 1;
            if value.loss.is_finite() && value.loss < at.loss {
                break (tried, value);
            }
            length *= shorter(length, slope, value.loss - at.loss);
        };
        let (tried, value) = next;
        let moved = difference(&tried, &point);
        let bent = difference(&value.slopes, &at.slopes);
        update(&mut curvature, &moved, &bent);
        poor = if at.loss - value.loss <= GAIN_MIN * at.loss.abs() {
            poor + 1
        } else {
            0
        };
        best.point = tried;
        best.loss = value.loss;
        at = value;
    }
    Ok(best)
}

/// Which numbers may move: those not held at a bound by the slope.
fn free(point: &[f64], slopes: &[f64], bounds: &[(f64, f64)]) -> Vec<bool> {
    let held = |((x, slope), (low, high)): ((&f64, &f64), &(f64, f64))| {
        (*x <= *low && *slope >= 0.0) || (*x >= *high && *slope <= 0.0)
    };
    let all = point.iter().zip(slopes).zip(bounds);
    all.map(|number| !held(number)).collect()
}

/// `-H g` among the free numbers, no longer than allowed; down the slope while nothing is known of
/// the curvature.
fn direction(point: &[f64], slopes: &[f64], free: &[bool], inverse: Option<&[f64]>) -> Vec<f64> {
    let count = point.len();
    let slopes: Vec<f64> = slopes
        .iter()
        .zip(free)
        .map(|(slope, free)| if *free { *slope } else { 0.0 })
        .collect();
    let (mut step, longest): (Vec<f64>, f64) = match inverse {
        Some(inverse) => {
            let row = |i: usize| -dot(&inverse[i * count..(i + 1) * count], &slopes);
            let step = (0..count).map(|i| if free[i] { row(i) } else { 0.0 });
            (step.collect(), STEP_MAX * scale(point))
        }
        None => {
            let length = FIRST_STEP * scale(point) / norm(&slopes).max(f64::MIN_POSITIVE);
            let step = slopes.iter().map(|slope| -slope * length);
            (step.collect(), FIRST_STEP * scale(point))
        }
    };
    let length = norm(&step);
    if length > longest {
        for value in &mut step {
            *value *= longest / length;
        }
    }
    step
}

/// How much shorter the next try is: where the parabola through what was seen has its lowest point.
fn shorter(length: f64, slope: f64, rise: f64) -> f64 {
    let lowest = -slope * length / (2.0 * (rise - slope * length));
    if lowest.is_finite() {
        lowest.clamp(0.1, 0.5)
    } else {
        0.1
    }
}

/// The BFGS update of the inverse curvature, row-major; left as it is where the function bends the
/// wrong way.
fn update(inverse: &mut Option<Vec<f64>>, moved: &[f64], bent: &[f64]) {
    let along = dot(moved, bent);
    if along <= 1e-10 * norm(moved) * norm(bent) || !along.is_finite() {
        return;
    }
    let count = moved.len();
    let before = inverse.take().unwrap_or_else(|| {
        let first = along / dot(bent, bent);
        let mut identity = vec![0.0; count * count];
        for i in 0..count {
            identity[i * count + i] = first;
        }
        identity
    });
    let carried: Vec<f64> = (0..count)
        .map(|i| dot(&before[i * count..(i + 1) * count], bent))
        .collect();
    let factor = (1.0 + dot(bent, &carried) / along) / along;
    let mut after = before;
    for i in 0..count {
        for j in 0..count {
            after[i * count + j] += factor * moved[i] * moved[j]
                - (carried[i] * moved[j] + moved[i] * carried[j]) / along;
        }
    }
    *inverse = Some(after);
}

fn moved(point: &[f64], step: &[f64], length: f64, bounds: &[(f64, f64)]) -> Vec<f64> {
    let number = |((x, step), (low, high)): ((&f64, &f64), &(f64, f64))| {
        (x + length * step).clamp(*low, *high)
    };
    point.iter().zip(step).zip(bounds).map(number).collect()
}

fn difference(x: &[f64], y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| x - y).collect()
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

fn scale(point: &[f64]) -> f64 {
    norm(point).max(NORM_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sum_i c_i (x_i - t_i)^2 + coupling * (sum_i (x_i - t_i))^2 + 2`.
    fn bowl(x: &[f64], target: &[f64], steep: &[f64], coupling: f64) -> Value {
        let apart = difference(x, target);
        let sum: f64 = apart.iter().sum();
        let own = apart.iter().zip(steep).map(|(a, c)| c * a * a).sum::<f64>();
        let slope = |(a, c): (&f64, &f64)| 2.0 * c * a + 2.0 * coupling * sum;
        Value {
            loss: own + coupling * sum * sum + 2.0,
            slopes: apart.iter().zip(steep).map(slope).collect(),
        }
    }

    fn run(start: &[f64], passes: u32, look: impl Fn(&[f64]) -> Value) -> Minimum {
        minimise(start, 10.0, passes, |x| Ok::<_, ()>(look(x))).unwrap()
    }

    #[test]
    fn the_bottom_of_a_bowl_is_found_in_few_looks() {
        let target = [0.3, 2.0, 1.0, 0.7];
        let found = run(&[0.25; 4], 40, |x| {
            bowl(x, &target, &[1.0, 0.05, 3.0, 0.4], 0.5)
        });
        assert!(norm(&difference(&found.point, &target)) < 1e-2, "{found:?}");
        assert!(found.loss - 2.0 < 1e-5 && found.passes < 40, "{found:?}");
    }

    #[test]
    fn what_would_be_subtracted_is_left_out() {
        let target = [0.8, -0.6, 1.2];
        let found = run(&[0.33; 3], 30, |x| bowl(x, &target, &[1.0, 1.0, 0.2], 0.0));
        assert_eq!(found.point[1], 0.0);
        assert!((found.point[0] - 0.8).abs() < 1e-2 && (found.point[2] - 1.2).abs() < 1e-2);
        // The upper bound holds too, and a start outside the bounds is no fault.
        let far = run(&[1.0], 30, |x| bowl(x, &[50.0], &[0.1], 0.0));
        assert_eq!(far.point, [10.0]);
        let outside = run(&[-1.0, 12.0], 30, |x| {
            bowl(x, &[0.5, 1.0], &[1.0, 1.0], 0.0)
        });
        assert!(norm(&difference(&outside.point, &[0.5, 1.0])) < 1e-2);
    }

    #[test]
    fn a_curved_valley_is_followed() {
        let found = run(&[0.1, 2.0], 120, |x| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            Value {
                loss: a * a + 100.0 * b * b,
                slopes: vec![-2.0 * a - 400.0 * x[0] * b, 200.0 * b],
            }
        });
        assert!(
            norm(&difference(&found.point, &[1.0, 1.0])) < 1e-2,
            "{found:?}"
        );
    }

    #[test]
    fn looks_are_bounded_and_the_best_is_kept() {
        for passes in 1..12 {
            let count = std::cell::Cell::new(0);
            let least = std::cell::Cell::new(f64::INFINITY);
            let found = run(&[1.0, 1.0], passes, |x| {
                count.set(count.get() + 1);
                // A wall of no numbers beside the start, and a slope that lies about its height.
                let mut value = bowl(x, &[3.0, 0.2], &[1.0, 4.0], 0.0);
                if x[0] > 1.3 {
                    value.loss = f64::NAN;
                }
                if value.loss < least.get() {
                    least.set(value.loss);
                }
                value
            });
            assert!(count.get() <= passes.max(1) && count.get() == found.passes);
            assert_eq!(found.loss.to_bits(), least.get().to_bits());
            assert!(found.loss <= found.first_loss);
        }
    }

    #[test]
    fn nothing_moves_where_nothing_slopes_or_nothing_is_a_number() {
        let flat = |x: &[f64]| Value {
            loss: 1.0,
            slopes: vec![0.0; x.len()],
        };
        assert_eq!(run(&[0.5, 0.5], 20, flat).passes, 1);
        let broken = |x: &[f64]| Value {
            loss: f64::NAN,
            slopes: vec![f64::NAN; x.len()],
        };
        let found = run(&[0.5], 20, broken);
        assert_eq!((found.point, found.passes), (vec![0.5], 1));
        let steep = |x: &[f64]| Value {
            loss: 1.0 - x[0],
            slopes: vec![f64::NAN],
        };
        assert_eq!(run(&[0.5], 20, steep).point, [0.5]);
        assert_eq!(
            run(&[], 20, |_| Value {
                loss: 1.0,
                slopes: Vec::new()
            })
            .passes,
            1
        );
    }
}
