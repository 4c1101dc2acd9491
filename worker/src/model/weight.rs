//! A frozen matrix of the model, as it is kept, and on its way there.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use cairn_kernels::stored::{Format, Packed, Packer, Stored};
use cairn_stack::quantize::Quantize;

use super::ops::{self, Factor};

/// A frozen matrix `[out, in]`.
///
/// On the host's processor, a matrix whose every number is one of bfloat16, as those of a model that
/// was saved so, is kept in 16 bits: half the memory, and what is computed is the same. A quantised
/// matrix is kept in 8 or 4 bits there; on a card it is the same numbers in `f32`.
#[derive(Debug, Clone)]
#[cfg_attr(
    feature = "flex",
    expect(clippy::large_enum_variant, reason = "a few a layer")
)]
pub enum Weight {
    /// In `f32`.
    Dense(Tensor<2>),
    /// In fewer bits.
    Stored(Arc<Stored>),
}

/// A matrix on its way to a device, a piece at a time: in the host's memory it is never held in more
/// bits than it is kept in, but on devices that keep `f32`.
pub struct Arriving {
    packing: Packing,
    shape: [usize; 2],
    device: Device,
}

enum Packing {
    /// For a device that keeps every number in 32 bits.
    Floats(Vec<f32>),
    Packed(Packer),
}

/// How [`Quantize`] is kept.
fn format(quantize: Quantize) -> Format {
    match quantize {
        Quantize::None => Format::Exact,
        Quantize::Int8 => Format::Int8,
        Quantize::Nf4 => Format::Nf4,
    }
}

impl Arriving {
    /// A matrix of which nothing is there yet.
    #[must_use]
    pub fn new(shape: [usize; 2], quantize: Quantize, device: &Device) -> Self {
        let [rows, columns] = shape;
        let packing = if quantize == Quantize::None && !ops::is_host(device) {
            Packing::Floats(Vec::with_capacity(rows * columns))
        } else {
            Packing::Packed(Packer::new(format(quantize), rows, columns))
        };
        Self {
            packing,
            shape,
            device: device.clone(),
        }
    }

    /// The next numbers, row-major; every piece but the last a multiple of
    /// [`cairn_kernels::stored::PUSHED_MULTIPLE`].
    pub fn push(&mut self, values: &[f32]) {
        match &mut self.packing {
            Packing::Floats(floats) => floats.extend_from_slice(values),
            Packing::Packed(packer) => packer.push(values),
        }
    }

    /// The matrix on its device.
    #[must_use]
    pub fn finish(self) -> Weight {
        let floats = match self.packing {
            Packing::Floats(floats) => floats,
            Packing::Packed(packer) => match packer.finish() {
                Packed::Floats(floats) => floats,
                Packed::Stored(stored) if ops::is_host(&self.device) => {
                    return Weight::Stored(Arc::new(stored));
                }
                Packed::Stored(stored) => stored.values(),
            },
        };
        let data = TensorData::new(floats, self.shape);
        Weight::Dense(Tensor::from_data(data, &self.device))
    }
}

impl Weight {
    /// Puts a matrix on a device.
    ///
    /// # Shapes
    /// - values: `rows · columns` of them, row-major
    #[must_use]
    pub fn new(values: &[f32], shape: [usize; 2], quantize: Quantize, device: &Device) -> Self {
        let mut arriving = Arriving::new(shape, quantize, device);
        arriving.push(values);
        arriving.finish()
    }

    /// Bytes it takes on its device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.shape().num_elements() * size_of::<f32>(),
            Self::Stored(stored) => stored.bytes(),
        }
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
            Self::Stored(stored) => ops::stored_product(onto, gradient, stored, false),
        }
    }

    /// Some of its rows, `[N, in]`.
    #[must_use]
    pub fn rows(&self, places: Tensor<1, Int>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => weight.clone().select(0, places),
            Self::Stored(stored) => ops::stored_rows(stored, places),
        }
    }

    /// All of it in `f32`, row-major; for tests.
    #[must_use]
    pub fn values(&self) -> Vec<f32> {
        match self {
            Self::Dense(weight) => weight.to_data().iter::<f32>().collect(),
            Self::Stored(stored) => stored.values(),
        }
    }
}
