//! Negative log-likelihood of the scored tokens, a bounded number of logits at a time.

use burn::tensor::{Tensor, TensorData};

use super::llama::{Llama, indices};

/// Most logits in memory at once, in elements (32 MiB in f32). A vocabulary of 150 000 over a
/// batch of thousands of tokens would otherwise be the largest buffer of all.
const LOGITS_MAX: usize = 8 << 20;

/// Loss of every scored token in nats, in order; what evaluation reports.
///
/// # Shapes
/// - normed: `[S, D]`
/// - targets: `[S]`
#[must_use]
pub fn token_losses(model: &Llama, normed: &Tensor<2>, targets: &[i32]) -> Vec<f32> {
    let mut losses = Vec::with_capacity(targets.len());
    for (start, chunk) in chunks(model, targets) {
        let hidden = normed.clone().narrow(0, start, chunk.len()); // [C, D]
        let parts = Chunk::new(model, hidden, chunk);
        losses.extend(parts.losses().to_data().iter::<f32>());
    }
    losses
}

/// Summed loss in nats, and `scale` times its gradient by `normed`.
///
/// The head is frozen, so its gradient ends here and can be written down:
/// `d nll / d h = softmax(h Wᵀ) W - W[target]`. One chunk of logits lives at a time, where an
/// autodiff graph would keep them all until the backward pass.
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
        let parts = Chunk::new(model, hidden, chunk);
        sum += parts
            .losses()
            .to_data()
            .iter::<f32>()
            .map(f64::from)
            .sum::<f64>();
        let expected = parts.exponentials.matmul(model.head.clone()) / parts.totals; // [C, D]
        gradients.push((expected - parts.target_rows) * scale);
    }
    (sum, Tensor::cat(gradients, 0))
}

/// The pieces of one chunk's softmax.
struct Chunk {
    /// `exp(logit - max)`, `[C, V]`.
    exponentials: Tensor<2>,
    /// Their sums, `[C, 1]`.
    totals: Tensor<2>,
    /// `target logit - max`, `[C, 1]`.
    target_logits: Tensor<2>,
    /// Head rows of the targets, `[C, D]`.
    target_rows: Tensor<2>,
}

impl Chunk {
    fn new(model: &Llama, hidden: Tensor<2>, targets: &[i32]) -> Self {
        let device = model.head.device();
        let target_rows = model.head.clone().select(0, indices(targets, &device));
        let logits = hidden.matmul(model.head.clone().transpose()); // [C, V]
        let shifted = logits.clone() - logits.max_dim(1); // [C, V]
        let column = TensorData::new(targets.to_vec(), [targets.len(), 1]);
        let target_logits = shifted
            .clone()
            .gather(1, Tensor::from_data(column, &device));
        let exponentials = shifted.exp();
        let totals = exponentials.clone().sum_dim(1);
        Self {
            exponentials,
            totals,
            target_logits,
            target_rows,
        }
    }

    /// `ln(sum) - target logit`, `[C, 1]`.
    fn losses(&self) -> Tensor<2> {
        self.totals.clone().log() - self.target_logits.clone()
    }
}

fn chunks<'a>(model: &Llama, targets: &'a [i32]) -> impl Iterator<Item = (usize, &'a [i32])> {
    let size = (LOGITS_MAX / model.config.vocab_size).max(1);
    targets
        .chunks(size)
        .enumerate()
        .map(move |(number, chunk)| (number * size, chunk))
}
