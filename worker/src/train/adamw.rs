//! `AdamW` over LoRA factors, step for step as `torch.optim.AdamW`.

use burn::tensor::{Tensor, TensorData};

use crate::model::Adapter;

/// The numbers of one update.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// First and second moment of one factor.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Tensor<2>,
    /// Running mean of its square.
    pub second: Tensor<2>,
}

impl Moments {
    /// Zero moments for a parameter.
    #[must_use]
    pub fn zeros(parameter: &Tensor<2>) -> Self {
        Self {
            first: parameter.zeros_like(),
            second: parameter.zeros_like(),
        }
    }
}

impl AdamW {
    /// One update; `step` counts from 1 (arXiv 1711.05101, algorithm 2):
    /// `p ← p − η λ p`, `p ← p − η · (m / c₁) / (sqrt(v) / sqrt(c₂) + ε)`, `c = 1 − βᵗ`.
    #[must_use]
    pub fn update(
        self,
        parameter: Tensor<2>,
        gradient: Tensor<2>,
        moments: Moments,
        rate: f64,
        step: u64,
    ) -> (Tensor<2>, Moments) {
        let power = i32::try_from(step).unwrap_or(i32::MAX);
        let correction1 = 1.0 - self.beta1.powi(power);
        let correction2 = 1.0 - self.beta2.powi(power);
        let first = moments.first * self.beta1 + gradient.clone() * (1.0 - self.beta1);
        let second = moments.second * self.beta2 + gradient.clone() * gradient * (1.0 - self.beta2);
        let denominator = second.clone().sqrt() / correction2.sqrt() + self.epsilon;
        let parameter = parameter * (1.0 - rate * self.weight_decay);
        let parameter = parameter - first.clone() / denominator * (rate / correction1);
        (parameter, Moments { first, second })
    }
}

/// Global norm of gradients: `sqrt(sum of squares)`, summed in f64 in the order given.
#[must_use]
pub fn global_norm(gradients: &[Tensor<2>]) -> f64 {
    let squares = gradients
        .iter()
        .map(|gradient| (gradient.clone() * gradient.clone()).sum())
        .collect();
    let squares: Tensor<1> = Tensor::cat(squares, 0); // one transfer for all
    squares
        .to_data()
        .iter::<f32>()
        .map(f64::from)
        .sum::<f64>()
        .sqrt()
}

/// What gradients are multiplied with so that their global norm is at most `clip`; torch's
/// `clip_grad_norm_`. `clip` 0 is off.
#[must_use]
pub fn clip_factor(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 {
        (clip / (norm + 1e-6)).min(1.0)
    } else {
        1.0
    }
}

/// The factors of an adapter as one list: A and B of the first pair, of the second, and so on.
#[must_use]
pub fn parameters(adapter: &Adapter) -> Vec<Tensor<2>> {
    adapter
        .factors()
        .flat_map(|factors| [factors.a.clone(), factors.b.clone()])
        .collect()
}

/// A tensor's numbers, row-major.
#[must_use]
pub fn values(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

/// A tensor like `like` with these numbers; `None` when there are too many or too few.
#[must_use]
pub fn with_values(like: &Tensor<2>, values: Vec<f32>) -> Option<Tensor<2>> {
    let shape = like.dims();
    (values.len() == shape[0] * shape[1])
        .then(|| Tensor::from_data(TensorData::new(values, shape), &like.device()))
}
