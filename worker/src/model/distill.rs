//! What a teacher says of a token, and how far a student is from it.

use std::ops::Range;

use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData, activation};
use cairn_kernels::distill::Blend;
use rayon::prelude::*;

use super::ops::{self, host::Numbers};

/// The likeliest tokens in many places, with their probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Likeliest {
    /// Tokens told apart in a place, `k`.
    pub top_k: usize,
    /// Their numbers, `[S, k]`.
    pub tokens: Vec<u32>,
    /// Their probabilities, `[S, k]`.
    pub chances: Vec<f32>,
    /// The probability of all other tokens, `[S]`.
    pub rest: Vec<f32>,
}

impl Likeliest {
    /// In no place yet.
    #[must_use]
    pub fn none(top_k: usize) -> Self {
        Self {
            top_k,
            tokens: Vec::new(),
            chances: Vec::new(),
            rest: Vec::new(),
        }
    }

    /// Bytes that this many tokens told apart take in one place.
    #[must_use]
    pub fn bytes_a_place(top_k: usize) -> usize {
        top_k * (size_of::<u32>() + size_of::<f32>()) + size_of::<f32>()
    }

    /// Some of the places.
    ///
    /// # Panics
    /// When there are not that many.
    #[must_use]
    pub fn rows(&self, places: Range<usize>) -> Self {
        let own = places.start * self.top_k..places.end * self.top_k;
        Self {
            top_k: self.top_k,
            tokens: self.tokens[own.clone()].to_vec(),
            chances: self.chances[own].to_vec(),
            rest: self.rest[places].to_vec(),
        }
    }

    /// Adds places behind these.
    pub fn extend(&mut self, more: &Self) {
        self.tokens.extend(&more.tokens);
        self.chances.extend(&more.chances);
        self.rest.extend(&more.rest);
    }
}

/// The `top_k` likeliest of the first `among` tokens in every place, by `softmax(logits / temperature)`
/// over those. Of equally likely ones the first.
///
/// # Shapes
/// - logits: `[S, V]`
#[must_use]
pub fn likeliest(logits: Tensor<2>, among: usize, top_k: usize, temperature: f64) -> Likeliest {
    let vocabulary = logits.dims()[1];
    let among = among.min(vocabulary);
    let top_k = top_k.min(among);
    let values: Vec<f32> = logits.to_data().iter::<f32>().collect();
    let mut found = Likeliest::none(top_k);
    let rows: Vec<Likeliest> = values
        .par_chunks_exact(vocabulary.max(1))
        .map(|row| of_row(&row[..among], top_k, temperature))
        .collect();
    for row in &rows {
        found.extend(row);
    }
    found
}

fn of_row(logits: &[f32], top_k: usize, temperature: f64) -> Likeliest {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let at = |token: &u32| logits[*token as usize];
    let by_logit = |a: &u32, b: &u32| at(b).total_cmp(&at(a)).then(a.cmp(b));
    if top_k < order.len() {
        order.select_nth_unstable_by(top_k, by_logit);
    }
    let (tops, others) = order.split_at_mut(top_k);
    tops.sort_unstable_by(by_logit);
    others.sort_unstable();
    let most = f64::from(tops.first().map_or(0.0, at));
    let power = |token: &u32| ((f64::from(at(token)) - most) / temperature).exp();
    let powers: Vec<f64> = tops.iter().map(power).collect();
    // By itself, and not as what is left of one: it may be far below what f32 sees beside one.
    let rest: f64 = others.iter().map(power).sum();
    let total = powers.iter().sum::<f64>() + rest;
    Likeliest {
        top_k,
        chances: powers.iter().map(|value| (value / total) as f32).collect(),
        rest: vec![(rest / total) as f32],
        tokens: tops.to_vec(),
    }
}

/// Loss of every row against a teacher, and `scale` times its gradient by the logits; see
/// [`cairn_stack::recipe::Distill`] for the formula.
///
/// # Shapes
/// - logits, gradient: `[S, V]`
/// - targets, losses: `[S]`
#[must_use]
pub fn distillation(
    logits: Tensor<2>,
    targets: &[i32],
    teacher: &Likeliest,
    blend: Blend,
    scale: f64,
) -> (Vec<f32>, Tensor<2>) {
    if ops::is_host(&logits.device()) {
        let shape = logits.dims();
        let mut values = Numbers::of(logits);
        let losses = cairn_kernels::distill::distillation(
            &mut values,
            targets,
            cairn_kernels::distill::Likeliest {
                top_k: teacher.top_k,
                tokens: &teacher.tokens,
                chances: &teacher.chances,
                rest: &teacher.rest,
            },
            blend,
            scale as f32,
        );
        return (losses, values.tensor(shape));
    }
    by_tensors(logits, targets, teacher, blend, scale)
}

/// The same with burn's operations.
fn by_tensors(
    logits: Tensor<2>,
    targets: &[i32],
    teacher: &Likeliest,
    blend: Blend,
    scale: f64,
) -> (Vec<f32>, Tensor<2>) {
    let device = logits.device();
    let (rows, k) = (targets.len(), teacher.top_k);
    let Blend {
        temperature,
        weight,
    } = blend;
    let numbers = |values: &[f32], width: usize| -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), [rows, width]), &device)
    };
    let tokens: Vec<i32> = teacher.tokens.iter().map(|token| *token as i32).collect();
    let tokens: Tensor<2, Int> = Tensor::from_data(TensorData::new(tokens, [rows, k]), &device);
    let (p, p_rest) = (numbers(&teacher.chances, k), numbers(&teacher.rest, 1));

    let log_q = activation::log_softmax(logits.clone() / temperature, 1); // [S, V]
    let at_tops = log_q.clone().gather(1, tokens.clone()); // [S, k]
    // What is left outside the likeliest, summed by itself.
    let q = log_q.exp();
    let away = (at_tops.clone().exp()).neg();
    let others = q
        .clone()
        .scatter(1, tokens.clone(), away, IndexingUpdateOp::Add);
    let q_rest = others.clone().clamp_min(0.0).sum_dim(1); // [S, 1]
    let q_rest = q_rest.clamp_min(f32::MIN_POSITIVE);
    let log = |x: Tensor<2>| x.clamp_min(f32::MIN_POSITIVE).log();
    let of_tops = (p.clone() * (log(p.clone()) - at_tops.clone())).sum_dim(1);
    let of_rest = p_rest.clone() * (log(p_rest.clone()) - log(q_rest.clone()));
    let divergence = (of_tops + of_rest) * (weight * temperature * temperature); // [S, 1]
    let slope = scale * weight * temperature;
    let gradient = others * ((p_rest / q_rest).neg() + 1.0) * slope;
    let by_tops = (at_tops.exp() - p) * slope;
    let gradient = gradient.scatter(1, tokens, by_tops, IndexingUpdateOp::Add);
    let losses: Vec<f32> = divergence.to_data().iter::<f32>().collect();
    if weight >= 1.0 {
        return (losses, gradient);
    }
    let part = 1.0 - weight;
    let (plain, more) = super::ops::cross_entropy(logits, targets, Some(scale * part));
    let both = losses.iter().zip(plain);
    let losses = both
        .map(|(loss, plain)| loss + part as f32 * plain)
        .collect();
    match more {
        Some(more) => (losses, gradient + more),
        None => (losses, gradient),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize) -> Vec<f32> {
        let mut state = 7_u32;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 21) as f32 - 4.0
            })
            .collect()
    }

    #[test]
    fn on_every_device_it_is_the_same_loss() {
        let device = crate::device::DeviceName::default().open().unwrap();
        let (rows, vocabulary) = (5, 40);
        let matrix = |values: Vec<f32>| -> Tensor<2> {
            Tensor::from_data(TensorData::new(values, [rows, vocabulary]), &device)
        };
        let all = numbers(2 * rows * vocabulary);
        let (student, teacher) = all.split_at(rows * vocabulary);
        let targets = [0, 3, 39, 7, 7];
        for (top_k, temperature, weight) in [(4, 1.0, 1.0), (8, 2.0, 0.5), (40, 1.0, 1.0)] {
            let teacher = likeliest(matrix(teacher.to_vec()), vocabulary, top_k, temperature);
            let blend = Blend {
                temperature,
                weight,
            };
            let [fused, plain] = [distillation, by_tensors].map(|by| {
                let (losses, gradient) =
                    by(matrix(student.to_vec()), &targets, &teacher, blend, 0.3);
                let gradient: Vec<f32> = gradient.to_data().iter::<f32>().collect();
                [losses, gradient].concat()
            });
            for (a, b) in fused.iter().zip(&plain) {
                assert!((a - b).abs() < 2e-5 * a.abs().max(1.0), "{a} {b}, {top_k}");
            }
        }
    }

    #[test]
    fn the_likeliest_are_found_with_what_is_left() {
        let row = [1.0, 3.0, 2.0, 3.0, -4.0];
        let found = of_row(&row, 2, 1.0);
        assert_eq!(found.tokens, [1, 3]);
        let total: f32 = row.iter().map(|x| x.exp()).sum();
        assert!((found.chances[0] - 3.0_f32.exp() / total).abs() < 1e-6);
        let sum = found.chances.iter().sum::<f32>() + found.rest[0];
        assert!((sum - 1.0).abs() < 1e-6);
        let all = of_row(&row, 5, 2.0);
        assert_eq!(all.tokens, [1, 3, 2, 0, 4]);
        assert_eq!(all.rest, [0.0]);
        assert_eq!(found.rows(0..1), found);
    }
}
