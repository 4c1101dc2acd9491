//! Negative log-likelihood of the scored tokens, a bounded number of logits at a time.

use burn::tensor::Tensor;

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
/// The head is frozen, so its gradient ends here: `d nll / d h = softmax(h Wᵀ) W - W[target]`. One
/// chunk of logits lives at a time.
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
    let mut sum = 0.0;
    let mut gradients = Vec::new();
    for (start, chunk) in chunks(model, targets) {
        let hidden = normed.clone().narrow(0, start, chunk.len()); // [C, D]
        let (losses, gradient) =
            ops::cross_entropy(model.head.forward(&hidden, None), chunk, Some(scale));
        sum += losses.into_iter().map(f64::from).sum::<f64>();
        gradients.extend(gradient.map(|gradient| {
            model.head.backward(&gradient, None) // [C, D]
        }));
    }
    (sum, Tensor::cat(gradients, 0))
}

fn chunks<'a>(model: &Llama, targets: &'a [i32]) -> impl Iterator<Item = (usize, &'a [i32])> {
    let size = (LOGITS_MAX / model.config.vocab_size).max(1);
    targets
        .chunks(size)
        .enumerate()
        .map(move |(number, chunk)| (number * size, chunk))
}
