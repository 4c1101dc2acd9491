//! The divergence from the likeliest tokens of a teacher, over rows of logits.

use rayon::prelude::*;

use crate::lanes::{exponentials, largest, rows_a_piece, vectorised};

/// What a teacher says of every row: its likeliest tokens with their probabilities, and the probability
/// of all others together.
#[derive(Debug, Clone, Copy)]
pub struct Likeliest<'a> {
    /// Tokens told apart in a row, `k`.
    pub top_k: usize,
    /// Their numbers, each once a row, `[S, k]`.
    pub tokens: &'a [u32],
    /// Their probabilities, `[S, k]`.
    pub chances: &'a [f32],
    /// The probability of all others, `[S]`.
    pub rest: &'a [f32],
}

/// How the loss is put together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Blend {
    /// What the student's logits are divided by; the teacher's were.
    pub temperature: f64,
    /// Part of the divergence; the rest is the loss of the targets.
    pub weight: f64,
}

/// `w T² (Σ p ln(p / q) + p_rest ln(p_rest / q_rest)) + (1 - w) (-ln softmax(z)_target)` of every row, with
/// `q = softmax(z / T)`; and, written over the logits, `scale` times its gradient by them:
/// `w T (q_j - p_j)` for the teacher's likeliest, `w T q_j (1 - p_rest / q_rest)` for all others, and
/// `1 - w` times the gradient of the targets' loss.
///
/// # Shapes
/// - logits: `[S, V]`
/// - targets, output: `[S]`
///
/// # Panics
/// When a token is not in the vocabulary.
pub fn distillation(
    logits: &mut [f32],
    targets: &[i32],
    teacher: Likeliest<'_>,
    blend: Blend,
    scale: f32,
) -> Vec<f32> {
    let (rows, k) = (targets.len(), teacher.top_k);
    let vocabulary = logits.len() / rows.max(1);
    assert_eq!(logits.len(), vocabulary * rows);
    assert_eq!((teacher.tokens.len(), teacher.rest.len()), (k * rows, rows));
    assert_eq!(teacher.chances.len(), k * rows);
    let pieces = logits.par_chunks_exact_mut(vocabulary.max(1));
    let pieces = pieces.with_min_len(rows_a_piece(vocabulary)).enumerate();
    pieces
        .map(|(number, row)| {
            let own = number * k..(number + 1) * k;
            let of_row = Likeliest {
                top_k: k,
                tokens: &teacher.tokens[own.clone()],
                chances: &teacher.chances[own],
                rest: &teacher.rest[number..=number],
            };
            one_row(row, targets[number] as usize, of_row, blend, scale)
        })
        .collect()
}

fn one_row(
    row: &mut [f32],
    target: usize,
    teacher: Likeliest<'_>,
    blend: Blend,
    scale: f32,
) -> f32 {
    let (temperature, weight) = (blend.temperature as f32, blend.weight as f32);
    let plain = (weight < 1.0).then(|| row.to_vec());
    let most = vectorised(
        #[inline(always)]
        || largest(row),
    );
    // The likeliest are taken out, so that what is left of them is summed by itself: as a difference
    // from one it would be noise where they hold nearly everything.
    let tops: Vec<f32> = teacher
        .tokens
        .iter()
        .map(|token| std::mem::replace(&mut row[*token as usize], f32::NEG_INFINITY))
        .map(|logit| (logit - most) / temperature)
        .collect();
    let others = vectorised(
        #[inline(always)]
        || {
            for value in row.iter_mut() {
                *value = (*value - most) / temperature;
            }
            exponentials(row, 0.0)
        },
    );
    // Where all tokens are told apart nothing is left, and its logarithm is not asked for.
    let others = if others < f32::MIN_POSITIVE {
        f32::MIN_POSITIVE
    } else {
        others
    };
    let total = tops.iter().fold(others, |sum, top| sum + top.exp());
    let log_total = total.ln();
    let term = |chance: f32, log_q: f32| {
        if chance > 0.0 {
            chance * (chance.ln() - log_q)
        } else {
            0.0
        }
    };
    let rest = teacher.rest[0];
    let of_tops = tops.iter().zip(teacher.chances);
    let of_tops: f32 = of_tops.map(|(top, p)| term(*p, top - log_total)).sum();
    let divergence = of_tops + term(rest, others.ln() - log_total);

    let slope = scale * weight * temperature;
    let of_others = slope * (1.0 / total - rest / others);
    vectorised(
        #[inline(always)]
        || {
            for value in row.iter_mut() {
                *value *= of_others;
            }
        },
    );
    for ((token, top), p) in teacher.tokens.iter().zip(&tops).zip(teacher.chances) {
        row[*token as usize] = slope * (top.exp() / total - p);
    }
    let divergence = weight * temperature * temperature * divergence;
    match plain {
        None => divergence,
        Some(mut plain) => {
            let part = 1.0 - weight;
            let losses = crate::loss::cross_entropy(&mut plain, &[target as i32], scale * part);
            for (value, more) in row.iter_mut().zip(&plain) {
                *value += more;
            }
            divergence + part * losses[0]
        }
    }
}
