//! A frozen matrix of the model, as it is kept.

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::ops::{self, Factor};

/// A frozen matrix `[out, in]`.
///
/// On the pure Rust CPU device, a matrix whose every number is one of bfloat16, as those of a model
/// that was saved so, is kept in 16 bits: half the memory, and what is computed is the same.
#[derive(Debug, Clone)]
#[cfg_attr(
    feature = "flex",
    expect(clippy::large_enum_variant, reason = "a few a layer")
)]
pub enum Weight {
    /// In `f32`.
    Dense(Tensor<2>),
    /// In 16 bits.
    #[cfg(feature = "flex")]
    Stored(std::sync::Arc<cairn_kernels::stored::Stored>),
}

impl Weight {
    /// Puts a matrix on a device.
    ///
    /// # Shapes
    /// - values: `rows · columns` of them, row-major
    #[must_use]
    pub fn new(values: Vec<f32>, [rows, columns]: [usize; 2], device: &Device) -> Self {
        #[cfg(feature = "flex")]
        if ops::is_cpu(device)
            && let Some(stored) = cairn_kernels::stored::Stored::exactly(&values, rows, columns)
        {
            return Self::Stored(std::sync::Arc::new(stored));
        }
        let data = TensorData::new(values, [rows, columns]);
        Self::Dense(Tensor::from_data(data, device))
    }

    /// `x Wᵀ`, added to `onto` where there is such.
    ///
    /// # Shapes
    /// - x: `[N, in]`
    /// - onto, output: `[N, out]`
    #[must_use]
    pub fn forward(&self, x: &Tensor<2>, onto: Option<Tensor<2>>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => {
                ops::product(onto, Factor::of(x), Factor::transposed(weight), 1.0)
            }
            #[cfg(feature = "flex")]
            Self::Stored(stored) => ops::stored_product(onto, x, stored, true),
        }
    }

    /// `d W`, added to `onto` where there is such.
    ///
    /// # Shapes
    /// - gradient: `[N, out]`
    /// - onto, output: `[N, in]`
    #[must_use]
    pub fn backward(&self, gradient: &Tensor<2>, onto: Option<Tensor<2>>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => {
                ops::product(onto, Factor::of(gradient), Factor::of(weight), 1.0)
            }
            #[cfg(feature = "flex")]
            Self::Stored(stored) => ops::stored_product(onto, gradient, stored, false),
        }
    }

    /// Some of its rows, `[N, in]`.
    #[must_use]
    pub fn rows(&self, places: Tensor<1, Int>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => weight.clone().select(0, places),
            #[cfg(feature = "flex")]
            Self::Stored(stored) => ops::stored_rows(stored, places),
        }
    }

    /// All of it in `f32`, row-major; for tests.
    #[must_use]
    pub fn values(&self) -> Vec<f32> {
        match self {
            Self::Dense(weight) => weight.to_data().iter::<f32>().collect(),
            #[cfg(feature = "flex")]
            Self::Stored(stored) => {
                let [rows, columns] = stored.shape();
                let mut values = vec![0.0; rows * columns];
                stored.unfold(0..rows, &mut values);
                values
            }
        }
    }
}
