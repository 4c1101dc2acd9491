//! Every kernel against the formula written out in f64, and every gradient against differences of it.

#![expect(clippy::cast_possible_wrap, reason = "small numbers")]

use cairn_kernels::attention::{Forward, Shape, attention, attention_backward};
use cairn_kernels::distill::{Blend, Likeliest, distillation};
use cairn_kernels::gate::{swiglu, swiglu_backward};
use cairn_kernels::heads::{Layout, Rotation, merge, split};
use cairn_kernels::loss::{cross_entropy, losses};
use cairn_kernels::norm::{rms_norm, rms_norm_backward};

/// Numbers in -1 to 1 without a pattern.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn assert_close(what: &str, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (place, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*found) - expected).abs();
        assert!(
            difference <= 4e-6 * expected.abs().max(1.0),
            "{what} at {place}: {found} for {expected}"
        );
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// The gradient of `sum(d · f(x))` by x, by central differences in f64.
fn slopes(x: &[f64], d: &[f32], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let step = 1e-5;
    let value = |x: &[f64]| -> f64 { f(x).iter().zip(d).map(|(y, d)| y * f64::from(*d)).sum() };
    (0..x.len())
        .map(|place| {
            let mut moved = x.to_vec();
            moved[place] = x[place] + step;
            let above = value(&moved);
            moved[place] = x[place] - step;
            (above - value(&moved)) / (2.0 * step)
        })
        .collect()
}

fn norm_by_formula(x: &[f64], gain: &[f64], epsilon: f64) -> Vec<f64> {
    x.chunks_exact(gain.len())
        .flat_map(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let inverse = (mean + epsilon).sqrt().recip();
            row.iter()
                .zip(gain)
                .map(move |(x, g)| x * inverse * g)
                .collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn the_norm_and_its_gradient() {
    for (rows, width) in [(1, 1), (3, 8), (37, 96), (2, 300)] {
        let (x, gain) = (numbers(rows * width, 1), numbers(width, 2));
        let d = numbers(rows * width, 3);
        let (mut y, mut inverse) = (vec![0.0; x.len()], vec![0.0; rows]);
        rms_norm(&x, &gain, 1e-5, &mut y, &mut inverse);
        let by_formula = |x: &[f64]| norm_by_formula(x, &wide(&gain), 1e-5);
        assert_close("norm", &y, &by_formula(&wide(&x)));

        let before = numbers(x.len(), 4);
        let mut into = before.clone();
        rms_norm_backward(&d, &x, &inverse, &gain, &mut into);
        if x.len() > 1 && x.len() < 1000 {
            let mut expected = slopes(&wide(&x), &d, by_formula);
            expected
                .iter_mut()
                .zip(&before)
                .for_each(|(a, b)| *a += f64::from(*b));
            assert_close("norm backward", &into, &expected);
        }
    }
}

#[test]
fn the_gate_and_its_gradient() {
    let count = 40_000;
    let gate: Vec<f32> = numbers(count, 1).iter().map(|x| 12.0 * x).collect();
    let (up, d) = (numbers(count, 2), numbers(count, 3));
    let mut out = vec![0.0; count];
    swiglu(&gate, &up, &mut out);
    let silu = |g: f64| g / (1.0 + (-g).exp());
    let expected: Vec<f64> = wide(&gate)
        .iter()
        .zip(wide(&up))
        .map(|(g, u)| silu(*g) * u)
        .collect();
    assert_close("swiglu", &out, &expected);

    let (mut by_gate, mut by_up, mut again) = (gate.clone(), up.clone(), d.clone());
    swiglu_backward(&mut again, &mut by_gate, &mut by_up);
    assert_eq!(again, out);
    let step = 1e-5;
    for place in (0..count).step_by(97) {
        let (g, u, d) = (
            f64::from(gate[place]),
            f64::from(up[place]),
            f64::from(d[place]),
        );
        let slope = (silu(g + step) - silu(g - step)) / (2.0 * step) * u * d;
        assert_close("by gate", &by_gate[place..=place], &[slope]);
        assert_close("by up", &by_up[place..=place], &[silu(g) * d]);
    }
}

#[test]
fn the_loss_and_its_gradient() {
    for (rows, vocabulary) in [(1, 1), (3, 7), (5, 33), (2, 1000)] {
        let logits: Vec<f32> = numbers(rows * vocabulary, 5)
            .iter()
            .map(|x| 30.0 * x)
            .collect();
        let targets: Vec<i32> = (0..rows)
            .map(|row| ((row * 31) % vocabulary) as i32)
            .collect();
        let by_formula = |logits: &[f64]| -> Vec<f64> {
            let rows = logits.chunks_exact(vocabulary).zip(&targets);
            rows.map(|(row, target)| {
                let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = row.iter().map(|value| (value - most).exp()).sum();
                total.ln() + most - row[*target as usize]
            })
            .collect()
        };
        let expected = by_formula(&wide(&logits));
        assert_close("losses", &losses(&mut logits.clone(), &targets), &expected);
        let mut gradient = logits.clone();
        let found = cross_entropy(&mut gradient, &targets, 0.5);
        assert_close("losses", &found, &expected);
        let half = vec![0.5; rows];
        assert_close(
            "gradient",
            &gradient,
            &slopes(&wide(&logits), &half, by_formula),
        );
    }
}

#[test]
fn the_divergence_from_a_teacher_and_its_gradient() {
    for (rows, vocabulary, k, temperature, weight) in [
        (1, 2, 1, 1.0, 1.0),
        (3, 7, 7, 1.0, 1.0),
        (5, 33, 4, 2.0, 1.0),
        (4, 40, 8, 1.5, 0.5),
        (2, 1000, 32, 1.0, 0.25),
    ] {
        let logits: Vec<f32> = numbers(rows * vocabulary, 5)
            .iter()
            .map(|x| 6.0 * x)
            .collect();
        let targets: Vec<i32> = (0..rows)
            .map(|row| ((row * 31) % vocabulary) as i32)
            .collect();
        // Any tokens and chances will do, whatever teacher would say so.
        let mut tokens = Vec::new();
        let (mut chances, mut rest) = (Vec::new(), Vec::new());
        for row in 0..rows {
            let first = 3 * row;
            tokens.extend((0..k).map(|i| ((first + i) % vocabulary) as u32));
            let raw: Vec<f32> = numbers(k + 1, 90 + row as u64)
                .iter()
                .map(|x| x.abs())
                .collect();
            let last = if k == vocabulary { 0.0 } else { raw[k] };
            let total = raw[..k].iter().sum::<f32>() + last;
            chances.extend(raw[..k].iter().map(|x| x / total));
            rest.push(last / total);
        }
        let softmax = |row: &[f64], temperature: f64| -> Vec<f64> {
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let all = row.iter().map(|z| ((z - most) / temperature).exp());
            let total: f64 = all.clone().sum();
            all.map(|value| value / total).collect()
        };
        let by_formula = |logits: &[f64]| -> Vec<f64> {
            let one = |(number, row): (usize, &[f64])| {
                let q = softmax(row, temperature);
                let own = number * k..(number + 1) * k;
                let term = |p: f32, q: f64| {
                    let p = f64::from(p);
                    if p > 0.0 { p * (p / q).ln() } else { 0.0 }
                };
                let tops: Vec<usize> = tokens[own.clone()].iter().map(|t| *t as usize).collect();
                let others = (0..vocabulary).filter(|t| !tops.contains(t));
                let others: f64 = others.map(|t| q[t]).sum();
                let pairs = tops.iter().zip(&chances[own]);
                let divergence: f64 = pairs.map(|(t, p)| term(*p, q[*t])).sum();
                let divergence = divergence + term(rest[number], others);
                let plain = -softmax(row, 1.0)[targets[number] as usize].ln();
                weight * temperature * temperature * divergence + (1.0 - weight) * plain
            };
            logits
                .chunks_exact(vocabulary)
                .enumerate()
                .map(one)
                .collect()
        };
        let teacher = Likeliest {
            top_k: k,
            tokens: &tokens,
            chances: &chances,
            rest: &rest,
        };
        let blend = Blend {
            temperature,
            weight,
        };
        let mut gradient = logits.clone();
        let found = distillation(&mut gradient, &targets, teacher, blend, 0.5);
        assert_close("losses", &found, &by_formula(&wide(&logits)));
        let half = vec![0.5; rows];
        assert_close(
            "gradient",
            &gradient,
            &slopes(&wide(&logits), &half, by_formula),
        );
    }
}

/// Angles' cosines and signed sines for every token.
fn table(tokens: usize, width: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for token in 0..tokens {
        for sign in [-1.0, 1.0] {
            for pair in 0..width / 2 {
                let angle = token as f32 * 0.3 + pair as f32;
                cos.push(2.0 * angle.cos());
                sin.push(2.0 * sign * angle.sin());
            }
        }
    }
    (cos, sin)
}

#[test]
fn heads_are_split_rotated_and_merged() {
    let (rows, length, heads, width) = (2, 40, 3, 8);
    let layout = Layout {
        length,
        heads,
        width,
    };
    let flat = numbers(rows * length * heads * width, 6);
    let (mut parts, mut back) = (vec![0.0; flat.len()], vec![0.0; flat.len()]);
    split(&flat, layout, None, &mut parts);
    merge(&parts, layout, None, &mut back);
    assert_eq!(flat, back);

    for shared in [true, false] {
        let (cos, sin) = table(if shared { length } else { rows * length }, width);
        let rotation = Some(Rotation {
            cos: &cos,
            sin: &sin,
        });
        split(&flat, layout, rotation, &mut parts);
        let (row, t, head) = (1, 7, 2);
        let token = row * length + t;
        let x = &flat[(token * heads + head) * width..][..width];
        let y = &parts[((row * heads + head) * length + t) * width..][..width];
        let place = if shared { t } else { token };
        for pair in 0..width / 2 {
            let (c, s) = (
                cos[place * width + pair],
                sin[place * width + width / 2 + pair],
            );
            let (a, b) = (x[pair], x[pair + width / 2]);
            assert_close("low", &y[pair..=pair], &[f64::from(a * c - b * s)]);
            let high = pair + width / 2;
            assert_close("high", &y[high..=high], &[f64::from(b * c + a * s)]);
        }
        // The way back is the transpose: d · split(x) = merge(d) · x, for a rotation of any scale.
        let d = numbers(flat.len(), 7);
        merge(&d, layout, rotation, &mut back);
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        };
        assert!((dot(&d, &parts) - dot(&back, &flat)).abs() < 1e-3);
    }
}

/// Attention by its formula, `[R, H, L, E]`.
fn attention_by_formula(
    shape: Shape,
    rows: usize,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    first: &[u32],
) -> Vec<f64> {
    let Shape {
        length,
        heads,
        kv_heads,
        width,
    } = shape;
    let mut out = vec![0.0; q.len()];
    for row in 0..rows {
        for head in 0..heads {
            let query = |i: usize| ((row * heads + head) * length + i) * width;
            let served = head / (heads / kv_heads);
            let key = |j: usize| ((row * kv_heads + served) * length + j) * width;
            for i in 0..length {
                let seen = first[(row * length + i) % first.len()] as usize..=i;
                let score =
                    |j: usize| -> f64 { (0..width).map(|e| q[query(i) + e] * k[key(j) + e]).sum() };
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (j, weight) in seen.zip(&weights) {
                    for e in 0..width {
                        out[query(i) + e] += weight / total * v[key(j) + e];
                    }
                }
            }
        }
    }
    out
}

fn check_attention(shape: Shape, rows: usize, first: &[u32]) {
    let Shape {
        length,
        heads,
        kv_heads,
        width,
    } = shape;
    let (count, served) = (
        rows * heads * length * width,
        rows * kv_heads * length * width,
    );
    let (q, k, v) = (numbers(count, 8), numbers(served, 9), numbers(served, 10));
    let q: Vec<f32> = q.iter().map(|x| 3.0 * x).collect();
    let (mut out, mut log_sums) = (vec![0.0; count], vec![0.0; count / width]);
    attention(shape, (&q, &k, &v), first, &mut out, &mut log_sums);
    let (q_, k_, v_) = (wide(&q), wide(&k), wide(&v));
    let expected = attention_by_formula(shape, rows, &q_, &k_, &v_, first);
    assert_close("attention", &out, &expected);

    let d = numbers(count, 11);
    let mut merged = vec![0.0; count];
    merge(
        &out,
        Layout {
            length,
            heads,
            width,
        },
        None,
        &mut merged,
    );
    let forward = Forward {
        q: &q,
        k: &k,
        v: &v,
        merged: &merged,
        log_sums: &log_sums,
    };
    let (mut dq, mut dk, mut dv) = (vec![0.0; count], vec![0.0; served], vec![0.0; served]);
    attention_backward(shape, forward, &d, first, (&mut dq, &mut dk, &mut dv));
    if count < 1000 {
        let f = |q: &[f64], k: &[f64], v: &[f64]| attention_by_formula(shape, rows, q, k, v, first);
        assert_close("dq", &dq, &slopes(&q_, &d, |q| f(q, &k_, &v_)));
        assert_close("dk", &dk, &slopes(&k_, &d, |k| f(&q_, k, &v_)));
        assert_close("dv", &dv, &slopes(&v_, &d, |v| f(&q_, &k_, v)));
    } else {
        // By one random direction.
        let along = numbers(count, 12);
        let step = 1e-5;
        let at = |sign: f64| -> f64 {
            let q: Vec<f64> = q_
                .iter()
                .zip(&along)
                .map(|(q, a)| q + sign * step * f64::from(*a))
                .collect();
            let out = attention_by_formula(shape, rows, &q, &k_, &v_, first);
            out.iter().zip(&d).map(|(y, d)| y * f64::from(*d)).sum()
        };
        let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
        let found: f64 = dq
            .iter()
            .zip(&along)
            .map(|(g, a)| f64::from(*g) * f64::from(*a))
            .sum();
        assert!(
            (slope - found).abs() < 1e-3 * slope.abs().max(1.0),
            "{found} for {slope}"
        );
    }
}

#[test]
fn attention_and_its_gradients() {
    let shape = |length, heads, kv_heads, width| Shape {
        length,
        heads,
        kv_heads,
        width,
    };
    let all = |length: usize| vec![0; length];
    check_attention(shape(1, 1, 1, 2), 1, &all(1));
    check_attention(shape(9, 4, 2, 4), 2, &all(9));
    // Two documents and padding in one row, one document in the other.
    let packed = [0, 0, 0, 3, 3, 3, 6, 6, 0, 0, 0, 0, 0, 0, 0, 0];
    check_attention(shape(8, 2, 2, 4), 2, &packed);
    // A window of three tokens.
    let window: Vec<u32> = (0..10_u32).map(|i| i.saturating_sub(2)).collect();
    check_attention(shape(10, 2, 1, 4), 1, &window);
    // More than one block of queries, and documents that end inside blocks.
    check_attention(shape(150, 2, 1, 8), 1, &all(150));
    let long: Vec<u32> = (0..300_u32).map(|i| i / 70 * 70).collect();
    check_attention(
        shape(150, 3, 3, 8),
        2,
        &long
            .iter()
            .map(|f| f % 150)
            .zip(0_u32..)
            .map(|(f, i)| f.min(i % 150))
            .scan((0, 0), |(last, n), f| {
                if *n % 150 == 0 {
                    *last = 0;
                }
                *n += 1;
                *last = f.max(*last);
                Some(*last)
            })
            .collect::<Vec<_>>(),
    );
}
