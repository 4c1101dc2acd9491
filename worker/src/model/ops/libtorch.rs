//! What LibTorch does in one operation where burn's interface has several: a product added to what is
//! there, and attention on the CPU that never holds all scores at once.
#![expect(
    deprecated,
    reason = "burn-tch is deprecated upstream; supported here while it lasts"
)]

use burn::backend::LibTorch;
use burn::backend::libtorch::TchTensor;
use burn::tensor::{Device, Tensor};

use super::{Attended, Factor, Rotate, merge_heads, split_heads};
use crate::model::input::Input;

const NO_DROPOUT: f64 = 0.0;
/// The queries have `1 / sqrt(E)`.
const SCALED_ALREADY: f64 = 1.0;

/// Whether a device is LibTorch on the CPU.
pub(super) fn is_cpu(device: &Device) -> bool {
    *device == Device::libtorch()
}

/// LibTorch's tensor behind one of burn's; `None` where it is another backend's.
fn of<const D: usize>(tensor: &Tensor<D>) -> Option<TchTensor> {
    tensor.clone().try_into_primitive::<LibTorch>().ok()
}

fn known<const D: usize>(tensor: Tensor<D>) -> TchTensor {
    let primitive = tensor.try_into_primitive::<LibTorch>();
    primitive.expect("the caller has asked for the device")
}

fn tensor<const D: usize>(primitive: TchTensor) -> Tensor<D> {
    Tensor::from_primitive::<LibTorch>(primitive)
}

/// `onto + scale · a b` in one operation, in place where nobody else holds `onto`. What is given comes
/// back where the tensors are not LibTorch's.
pub(super) fn product(
    onto: Tensor<2>,
    a: Factor<'_>,
    b: Factor<'_>,
    scale: f64,
) -> Result<Tensor<2>, Tensor<2>> {
    let (Some(mut left), Some(mut right)) = (of(&a.tensor()), of(&b.tensor())) else {
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
    Ok(tensor(sum.unwrap_or_else(|| {
        TchTensor::new(onto.tensor.addmm(&left.tensor, &right.tensor))
    })))
}

/// Keys or values once for every query head, `[R, H, L, E]`.
fn for_every_head(x: &Tensor<4>, heads: usize) -> Tensor<4> {
    let [rows, kv_heads, length, width] = x.dims();
    if heads == kv_heads {
        return x.clone();
    }
    let group = heads / kv_heads;
    let x = x.clone().unsqueeze_dim::<5>(2);
    x.expand([rows, kv_heads, group, length, width])
        .reshape([rows, heads, length, width])
}

/// The mask as LibTorch takes it, `[R or 1, 1, L, L]`; `None` where causality says it all, so that
/// what lies behind the diagonal is not computed.
fn mask(window: Option<usize>, input: &Input) -> Option<TchTensor> {
    if input.first(window).iter().all(|first| *first == 0) {
        return None;
    }
    let mask = input.mask(window);
    let [tables, _, _, length, _] = mask.dims();
    Some(known(mask.reshape([tables, 1, length, length])))
}

/// Attention as [`super::attend`] has it.
pub(super) fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    window: Option<usize>,
    input: &Input,
) -> Attended {
    let heads = q.dims()[1];
    let mask = mask(window, input);
    let mask = mask.as_ref().map(|mask| &mask.tensor);
    let (keys, values) = (for_every_head(&k, heads), for_every_head(&v, heads));
    let (queries, keys, values) = (known(q.clone()), known(keys), known(values));
    let (out, log_sums) = tch::Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
        &queries.tensor,
        &keys.tensor,
        &values.tensor,
        NO_DROPOUT,
        mask.is_none(),
        mask,
        SCALED_ALREADY,
    );
    Attended {
        merged: merge_heads(tensor(TchTensor::new(out)), Rotate::Not, input),
        log_sums: Some(tensor(TchTensor::new(log_sums))),
        q,
        k,
        v,
    }
}

/// The way back, as [`super::attend_backward`] has it.
///
/// # Shapes
/// - gradient: `[R, H, L, E]`
pub(super) fn attend_backward(
    gradient: Tensor<4>,
    forward: Attended,
    window: Option<usize>,
    input: &Input,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let [rows, heads, length, width] = forward.q.dims();
    let kv_heads = forward.k.dims()[1];
    let log_sums = forward.log_sums.expect("attended on this device");
    let mask = mask(window, input);
    let mask = mask.as_ref().map(|mask| &mask.tensor);
    let keys = known(for_every_head(&forward.k, heads));
    let values = known(for_every_head(&forward.v, heads));
    let out = known(split_heads(forward.merged, heads, Rotate::Not, input));
    let (dq, dk, dv) = tch::Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
        &known(gradient).tensor,
        &known(forward.q).tensor,
        &keys.tensor,
        &values.tensor,
        &out.tensor,
        &known(log_sums).tensor,
        NO_DROPOUT,
        mask.is_none(),
        mask,
        SCALED_ALREADY,
    );
    let of_group = |x: tch::Tensor| {
        let x: Tensor<4> = tensor(TchTensor::new(x));
        if heads == kv_heads {
            return x;
        }
        let x = x.reshape([rows, kv_heads, heads / kv_heads, length, width]);
        x.sum_dim(2).reshape([rows, kv_heads, length, width])
    };
    (tensor(TchTensor::new(dq)), of_group(dk), of_group(dv))
}
