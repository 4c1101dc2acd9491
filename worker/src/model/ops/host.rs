//! Tensors in the host's memory, their numbers read and written where they are.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(feature = "flex")]
use burn::backend::{Flex, tensor::FloatTensor};
use burn::tensor::{Device, Tensor};

#[cfg(feature = "tch")]
use super::libtorch;

static WITHOUT_KERNELS: AtomicBool = AtomicBool::new(false);

/// From now on everything is computed with burn's operations, as on a graphics card: for tests of that
/// code where there is none.
#[doc(hidden)]
pub fn without_kernels() {
    WITHOUT_KERNELS.store(true, Ordering::Relaxed);
}

/// Whether a device is the host's processor, where kernels are ours.
#[must_use]
pub fn is_host(device: &Device) -> bool {
    Keeper::of(device).is_some() && !WITHOUT_KERNELS.load(Ordering::Relaxed)
}

/// Who keeps tensors in the host's memory.
enum Keeper {
    #[cfg(feature = "flex")]
    Flex,
    #[cfg(feature = "tch")]
    LibTorch,
}

impl Keeper {
    fn of(device: &Device) -> Option<Self> {
        #[cfg(feature = "flex")]
        if *device == Device::flex() {
            return Some(Self::Flex);
        }
        #[cfg(feature = "tch")]
        if libtorch::is_host(device) {
            return Some(Self::LibTorch);
        }
        let _ = device;
        None
    }

    fn known(device: &Device) -> Self {
        Self::of(device).expect("the caller has asked for the device")
    }
}

/// A tensor's numbers, row-major, to be read where they are; a view that is not row-major is copied.
pub struct Values(Read);

enum Read {
    #[cfg(feature = "flex")]
    Flex(FloatTensor<Flex>),
    #[cfg(feature = "tch")]
    LibTorch(libtorch::Values),
}

impl Values {
    /// The numbers of a tensor on the host.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        Self(match Keeper::known(&tensor.device()) {
            #[cfg(feature = "flex")]
            Keeper::Flex => {
                let tensor = tensor.clone().try_into_primitive::<Flex>();
                let tensor = tensor.expect("of this device");
                Read::Flex(if tensor.is_contiguous() {
                    tensor
                } else {
                    tensor.to_contiguous()
                })
            }
            #[cfg(feature = "tch")]
            Keeper::LibTorch => Read::LibTorch(libtorch::Values::of(tensor)),
        })
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self.0 {
            #[cfg(feature = "flex")]
            Read::Flex(ref tensor) => tensor.as_slice().expect("contiguous numbers of 32 bits"),
            #[cfg(feature = "tch")]
            Read::LibTorch(ref values) => values,
        }
    }
}

/// Numbers to be written, which then are a tensor's.
pub struct Numbers(Written);

enum Written {
    #[cfg(feature = "flex")]
    Flex(Vec<f32>),
    #[cfg(feature = "tch")]
    LibTorch(libtorch::Numbers),
}

impl Numbers {
    /// So many zeros.
    pub fn zeros(count: usize, device: &Device) -> Self {
        Self(match Keeper::known(device) {
            #[cfg(feature = "flex")]
            Keeper::Flex => Written::Flex(vec![0.0; count]),
            #[cfg(feature = "tch")]
            Keeper::LibTorch => Written::LibTorch(libtorch::Numbers::zeros(count)),
        })
    }

    /// A tensor's numbers, row-major; moved where nobody else holds them.
    pub fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        Self(match Keeper::known(&tensor.device()) {
            #[cfg(feature = "flex")]
            Keeper::Flex => {
                let values = tensor.into_data().try_into_vec();
                Written::Flex(values.expect("numbers of 32 bits"))
            }
            #[cfg(feature = "tch")]
            Keeper::LibTorch => Written::LibTorch(libtorch::Numbers::of(tensor)),
        })
    }

    /// A tensor of these; nothing is copied.
    pub fn tensor<const D: usize>(self, shape: [usize; D]) -> Tensor<D> {
        match self.0 {
            #[cfg(feature = "flex")]
            Written::Flex(values) => {
                let data = burn::tensor::TensorData::new(values, shape);
                Tensor::from_data(data, &Device::flex())
            }
            #[cfg(feature = "tch")]
            Written::LibTorch(numbers) => numbers.tensor(shape),
        }
    }
}

impl Deref for Numbers {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self.0 {
            #[cfg(feature = "flex")]
            Written::Flex(ref values) => values,
            #[cfg(feature = "tch")]
            Written::LibTorch(ref numbers) => numbers,
        }
    }
}

impl DerefMut for Numbers {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self.0 {
            #[cfg(feature = "flex")]
            Written::Flex(ref mut values) => values,
            #[cfg(feature = "tch")]
            Written::LibTorch(ref mut numbers) => numbers,
        }
    }
}
