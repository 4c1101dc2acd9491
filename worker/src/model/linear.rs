//! Frozen linear layers and RMS norm, there and back.

use burn::tensor::Tensor;

use super::ops;
use super::weight::Weight;

/// A frozen linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`, as in the file; products read it transposed without a copy.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Tensor<1>>,
}

impl Linear {
    /// Bytes it takes on its device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let bias = self.bias.as_ref().map_or(0, |bias| bias.dims()[0]);
        self.weight.bytes() + bias * size_of::<f32>()
    }

    /// `x Wᵀ + b`, added to `onto` where there is such.
    ///
    /// # Shapes
    /// - x: `[N, in]`
    /// - onto, output: `[N, out]`
    #[must_use]
    pub fn forward(&self, x: &Tensor<2>, onto: Option<Tensor<2>>) -> Tensor<2> {
        let rows = x.dims()[0];
        let onto = match (&self.bias, onto) {
            (None, onto) => onto,
            (Some(bias), Some(onto)) => Some(onto + bias.clone().unsqueeze()),
            (Some(bias), None) => Some(bias.clone().unsqueeze().repeat_dim(0, rows)),
        };
        self.weight.forward(x, onto)
    }

    /// The gradient by x, `d W`, added to `onto` where there is such. `W` is frozen and has none.
    ///
    /// # Shapes
    /// - gradient: `[N, out]`
    /// - onto, output: `[N, in]`
    #[must_use]
    pub fn backward(&self, gradient: &Tensor<2>, onto: Option<Tensor<2>>) -> Tensor<2> {
        self.weight.backward(gradient, onto)
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
    /// Bytes it takes on its device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weight.dims()[0] * size_of::<f32>()
    }

    /// `x / sqrt(mean(x²) + ε) · g`.
    ///
    /// # Shapes
    /// - x, output: `[N, width]`
    #[must_use]
    pub fn forward(&self, x: &Tensor<2>) -> Tensor<2> {
        self.with_inverse(x).0
    }

    /// The same, and what [`Self::backward`] needs of it.
    ///
    /// # Shapes
    /// - inverse: `[N, 1]`
    #[must_use]
    pub fn with_inverse(&self, x: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        ops::norm(x, &self.weight, self.epsilon)
    }

    /// The gradient by x, added to `onto`.
    #[must_use]
    pub fn backward(
        &self,
        onto: Tensor<2>,
        gradient: &Tensor<2>,
        x: &Tensor<2>,
        inverse: &Tensor<2>,
    ) -> Tensor<2> {
        ops::norm_backward(onto, gradient, x, inverse, &self.weight)
    }
}
