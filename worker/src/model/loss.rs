//! Losses of the scored tokens, a bounded number of logits at a time.

use burn::tensor::Tensor;

use cairn_kernels::distill::Blend;

use super::distill::{Likeliest, distillation, likeliest};
use super::llama::Llama;
use super::ops;

/// Most logits in memory at once, in elements (32 MiB in f32). A vocabulary of 150 000 over a
/// batch of thousands of tokens would otherwise be the largest buffer of all.
pub const LOGITS_MAX: usize = 8 << 20;

/// Loss of every scored token in nats, in order; what evaluation reports.
///
/// # Shapes
/// - normed: `[S, D]`
/// - targets: `[S]`
#[must_use]
pub fn token_losses(model: &Llama, normed: &Tensor<2>, targets: &[i32]) -> Vec<f32> {
    chunks(model, targets)
        .flat_map(|(start, chunk)| {
            let hidden = normed.clone().narrow(0, start, chunk.len()); // [C, D]
            ops::cross_entropy(model.head.forward(&hidden, None), chunk, None).0
        })
        .collect()
}

/// Summed loss in nats, and `scale` times its gradient by `normed`.
///
/// # Shapes
/// - normed, gradient: `[S, D]`
/// - targets: `[S]`
#[must_use]
pub fn loss_and_gradient(
    model: &Llama,
    normed: &Tensor<2>,
    targets: &[i32],
    scale: f64,
) -> (f64, Tensor<2>) {
    let (losses, gradient) = losses_and_gradient(model, normed, targets, scale);
    (losses.into_iter().map(f64::from).sum(), gradient)
}

/// Loss of every scored token in nats, and `scale` times the gradient of their sum by `normed`. A row
/// of it is the gradient of that token's loss alone, so a loss that weighs tokens multiplies rows.
///
/// The head is frozen, so its gradient ends here: `d nll / d h = softmax(h Wᵀ) W - W[target]`. One
/// chunk of logits lives at a time.
///
/// # Shapes
/// - normed, gradient: `[S, D]`
/// - targets: `[S]`
#[must_use]
pub fn losses_and_gradient(
    model: &Llama,
    normed: &Tensor<2>,
    targets: &[i32],
    scale: f64,
) -> (Vec<f32>, Tensor<2>) {
    by_chunks(model, normed, targets, |logits, chunk, _| {
        ops::cross_entropy(logits, chunk, Some(scale))
    })
}

/// The loss of every scored token against a teacher, and `scale` times the gradient of their sum by
/// `normed`; see [`cairn_stack::recipe::Distill`] for the formula.
///
/// # Shapes
/// - normed, gradient: `[S, D]`
/// - targets: `[S]`
#[must_use]
pub fn distillation_and_gradient(
    model: &Llama,
    normed: &Tensor<2>,
    targets: &[i32],
    teacher: &Likeliest,
    blend: Blend,
    scale: f64,
) -> (Vec<f32>, Tensor<2>) {
    by_chunks(model, normed, targets, |logits, chunk, start| {
        let teacher = teacher.rows(start..start + chunk.len());
        let (losses, gradient) = distillation(logits, chunk, &teacher, blend, scale);
        (losses, Some(gradient))
    })
}

/// Losses, and the gradient by what the head reads, from losses and gradients by one chunk of logits at
/// a time, whose first row is named.
fn by_chunks(
    model: &Llama,
    normed: &Tensor<2>,
    targets: &[i32],
    mut of_logits: impl FnMut(Tensor<2>, &[i32], usize) -> (Vec<f32>, Option<Tensor<2>>),
) -> (Vec<f32>, Tensor<2>) {
    let mut losses = Vec::with_capacity(targets.len());
    let mut gradients = Vec::new();
    for (start, chunk) in chunks(model, targets) {
        let hidden = normed.clone().narrow(0, start, chunk.len()); // [C, D]
        let (more, gradient) = of_logits(model.head.forward(&hidden, None), chunk, start);
        losses.extend(more);
        gradients.extend(gradient.map(|gradient| {
            model.head.backward(&gradient, None) // [C, D]
        }));
    }
    (losses, Tensor::cat(gradients, 0))
}

/// The likeliest tokens after every scored token's predecessors; see [`likeliest`].
///
/// # Shapes
/// - normed: `[S, D]`
#[must_use]
pub fn likeliest_tokens(
    model: &Llama,
    normed: &Tensor<2>,
    among: usize,
    top_k: usize,
    temperature: f64,
) -> Likeliest {
    let places = vec![0; normed.dims()[0]];
    let mut found = Likeliest::none(top_k.min(among));
    for (start, chunk) in chunks(model, &places) {
        let hidden = normed.clone().narrow(0, start, chunk.len()); // [C, D]
        found.extend(&likeliest(
            model.head.forward(&hidden, None),
            among,
            top_k,
            temperature,
        ));
    }
    found
}

fn chunks<'a>(model: &Llama, targets: &'a [i32]) -> impl Iterator<Item = (usize, &'a [i32])> {
    let size = (LOGITS_MAX / model.config.vocab_size).max(1);
    targets
        .chunks(size)
        .enumerate()
        .map(move |(number, chunk)| (number * size, chunk))
}
