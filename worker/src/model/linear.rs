//! Linear layers with an optional LoRA term, and RMS norm.

use burn::tensor::Tensor;

use super::lora::Factors;

/// A frozen linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`, as in the file; products read it transposed without a copy.
    pub weight: Tensor<2>,
    /// `[out]`.
    pub bias: Option<Tensor<1>>,
}

impl Linear {
    /// `x Wᵀ + b + s · (x Aᵀ) Bᵀ` (LoRA, arXiv 2106.09685): two thin products instead of a dense
    /// `ΔW`, and no gradient of `W`.
    ///
    /// # Shapes
    /// - x: `[N, in]`
    /// - output: `[N, out]`
    #[must_use]
    pub fn forward(&self, x: Tensor<2>, lora: Option<&Factors>) -> Tensor<2> {
        let base = x.clone().matmul(self.weight.clone().transpose());
        let base = match &self.bias {
            Some(bias) => base + bias.clone().unsqueeze(),
            None => base,
        };
        match lora {
            Some(lora) => base + lora.delta(x),
            None => base,
        }
    }
}

/// Root mean square norm (arXiv 1910.07467).
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// Gain, `[width]`.
    pub weight: Tensor<1>,
    /// Added to the mean square.
    pub epsilon: f64,
}

impl RmsNorm {
    /// `x / sqrt(mean(x²) + ε) · g`.
    ///
    /// # Shapes
    /// - x, output: `[N, width]`
    #[must_use]
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let mean_square = (x.clone() * x.clone()).mean_dim(1); // [N, 1]
        let inverse = (mean_square + self.epsilon).sqrt().recip();
        x * inverse * self.weight.clone().unsqueeze()
    }
}
