//! LibTorch's tensors: their numbers in the host's memory, for kernels of our own; and on a graphics
//! card what is one operation there where burn's interface has several.
#![expect(
    deprecated,
    reason = "burn-tch is deprecated upstream; supported here while it lasts"
)]

use std::ops::{Deref, DerefMut};

use burn::backend::LibTorch;
use burn::backend::libtorch::TchTensor;
use burn::tensor::{Device, Tensor};
use tch::{Device as Place, Kind};

use super::Factor;

/// Whether a device is LibTorch on the host's processor.
pub(super) fn is_host(device: &Device) -> bool {
    *device == Device::libtorch()
}

/// LibTorch's tensor behind one of burn's; `None` where it is another backend's.
fn of<const D: usize>(tensor: Tensor<D>) -> Option<TchTensor> {
    tensor.try_into_primitive::<LibTorch>().ok()
}

fn known<const D: usize>(tensor: Tensor<D>) -> TchTensor {
    of(tensor).expect("the caller has asked for the device")
}

/// Where the numbers of a tensor begin, and how many there are.
///
/// # Panics
/// Unless they are in the host's memory, of 32 bits, and one after the other.
fn place(tensor: &tch::Tensor) -> (*mut f32, usize) {
    assert_eq!(tensor.device(), Place::Cpu);
    assert_eq!(tensor.kind(), Kind::Float);
    assert!(tensor.is_contiguous());
    (tensor.data_ptr().cast(), tensor.numel())
}

/// The numbers of a tensor, as [`place`] asks for them.
fn read(tensor: &TchTensor) -> &[f32] {
    let (begin, count) = place(&tensor.tensor);
    if count == 0 {
        return &[];
    }
    // SAFETY: `count` initialised numbers of LibTorch's own, aligned to 64 bytes or as a view of such,
    // which live as long as the tensor. Nobody writes them meanwhile: burn-tch and `Numbers` write only
    // what has one holder, and this one and whoever lent it are two, unless it is gone.
    #[expect(unsafe_code, reason = "LibTorch lends its memory as a pointer alone")]
    unsafe {
        std::slice::from_raw_parts(begin, count)
    }
}

/// Numbers to be read where they are.
pub(super) struct Values(TchTensor);

impl Values {
    /// Those of a tensor on the host; a view that is not row-major is copied.
    pub(super) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        let tensor = known(tensor.clone());
        Self(if tensor.tensor.is_contiguous() {
            tensor
        } else {
            TchTensor::new(tensor.tensor.contiguous())
        })
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        read(&self.0)
    }
}

/// Numbers to be written, held by nobody else.
pub(super) struct Numbers(TchTensor);

impl Numbers {
    pub(super) fn zeros(count: usize) -> Self {
        let zeros = tch::Tensor::zeros([count as i64], (Kind::Float, Place::Cpu));
        Self(TchTensor::new(zeros))
    }

    /// Those of a tensor on the host; moved where nobody else holds them.
    pub(super) fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        let tensor = known(tensor);
        if tensor.can_mut() && tensor.tensor.is_contiguous() {
            return Self(tensor);
        }
        let row_major = tensor.tensor.contiguous();
        let copied = row_major.data_ptr() != tensor.tensor.data_ptr();
        Self(TchTensor::new(if copied {
            row_major
        } else {
            row_major.copy()
        }))
    }

    pub(super) fn tensor<const D: usize>(self, shape: [usize; D]) -> Tensor<D> {
        let shape = shape.map(|size| size as i64);
        let TchTensor { tensor, storage } = self.0;
        let tensor = TchTensor::from_existing(tensor.view(shape.as_slice()), storage);
        Tensor::from_primitive::<LibTorch>(tensor)
    }
}

impl Deref for Numbers {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        read(&self.0)
    }
}

impl DerefMut for Numbers {
    fn deref_mut(&mut self) -> &mut [f32] {
        let (begin, count) = place(&self.0.tensor);
        if count == 0 {
            return &mut [];
        }
        // SAFETY: as for `read`, and held by nobody else, which both ways to make one see to: neither
        // another tensor nor another slice is of this memory while `self` is borrowed.
        #[expect(unsafe_code, reason = "LibTorch lends its memory as a pointer alone")]
        unsafe {
            std::slice::from_raw_parts_mut(begin, count)
        }
    }
}

/// `onto + scale · a b` in one operation, in place where nobody else holds `onto`. What is given comes
/// back where the tensors are not LibTorch's.
pub(super) fn product(
    onto: Tensor<2>,
    a: Factor<'_>,
    b: Factor<'_>,
    scale: f64,
) -> Result<Tensor<2>, Tensor<2>> {
    let (Some(mut left), Some(mut right)) = (of(a.tensor()), of(b.tensor())) else {
        return Err(onto);
    };
    if scale != 1.0 {
        // Where there is a scale, one of the two is as thin as the rank.
        let thin = if left.tensor.numel() < right.tensor.numel() {
            &mut left
        } else {
            &mut right
        };
        *thin = TchTensor::new(thin.tensor.g_mul_scalar(scale));
    }
    let mut onto = known(onto);
    let sum = onto.mut_ops(|onto| onto.addmm_(&left.tensor, &right.tensor));
    let sum = sum.unwrap_or_else(|| TchTensor::new(onto.tensor.addmm(&left.tensor, &right.tensor)));
    Ok(Tensor::from_primitive::<LibTorch>(sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(shape: [usize; 2]) -> Tensor<2> {
        let values = (0..shape[0] * shape[1]).map(|n| n as f32).collect();
        let data = burn::tensor::TensorData::new::<f32, _>(values, shape);
        Tensor::from_data(data, &Device::libtorch())
    }

    #[test]
    fn numbers_are_read_row_by_row_whatever_the_layout() {
        let x = counted([2, 3]);
        assert_eq!(&*Values::of(&x), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let turned = x.clone().transpose();
        assert_eq!(&*Values::of(&turned), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(&*Numbers::of(turned), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(&*Values::of(&x.clone().narrow(0, 1, 1)), [3.0, 4.0, 5.0]);
        let wide = x.narrow(0, 0, 1).expand([2, 3]);
        assert_eq!(&*Numbers::of(wide), [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
    }

    #[test]
    fn what_somebody_else_holds_is_not_written() {
        let x = counted([2, 3]);
        for other in [x.clone(), x.clone().transpose(), x.clone().narrow(1, 0, 2)] {
            Numbers::of(other).fill(9.0);
        }
        Numbers::of(x.clone().reshape([3, 2])).fill(9.0);
        assert_eq!(&*Values::of(&x), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn what_nobody_else_holds_is_written_where_it_is() {
        let mut numbers = Numbers::of(counted([2, 3]));
        let begin = numbers.as_ptr();
        numbers[5] = 7.0;
        let x = numbers.tensor([3, 2]);
        assert_eq!(Values::of(&x).as_ptr(), begin);
        let again = Numbers::of(x);
        assert_eq!(again.as_ptr(), begin);
        assert_eq!(again[5], 7.0);
    }

    #[test]
    fn nothing_is_nothing() {
        let x = Numbers::zeros(0).tensor([0, 3]);
        assert!(Values::of(&x).is_empty());
        assert!(Numbers::of(x).is_empty());
    }
}
