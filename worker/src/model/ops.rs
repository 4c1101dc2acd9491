//! What the model is computed with: each operation as one pass of [`cairn_kernels`] where the tensors
//! are on the pure Rust CPU device, and as burn's own operations everywhere else.
//!
//! Operations that are trained through come in pairs, the way there and the way back. Everything in
//! between is frozen, so the chain of gradients is short and known, and is written down in
//! [`super::block`] rather than recorded by an autodiff graph: nothing is kept that the way back does
//! not read, and nothing is computed that no factor needs.

#[cfg(test)]
pub(crate) mod bent;

#[cfg(feature = "flex")]
use burn::tensor::Int;
use burn::tensor::{Device, Tensor, TensorData, activation};
#[cfg(feature = "flex")]
use cairn_kernels::stored::Stored;

use super::input::Input;

#[cfg(feature = "tch")]
mod libtorch;

#[cfg(feature = "flex")]
use fused::Values;
#[cfg(feature = "flex")]
pub(super) use fused::{tensor, values};

/// Runs a pass among the threads that compute it: whoever calls from outside hands over every piece of
/// work and waits to be woken, which takes longer than most pieces of a small model.
pub fn inside<T: Send>(pass: impl FnOnce() -> T + Send) -> T {
    #[cfg(test)]
    let pass = bent::carried(pass);
    #[cfg(feature = "flex")]
    return cairn_kernels::inside(pass);
    #[cfg(not(feature = "flex"))]
    pass()
}

/// A factor of a product.
#[derive(Clone, Copy)]
pub struct Factor<'a> {
    matrix: &'a Tensor<2>,
    transposed: bool,
}

impl<'a> Factor<'a> {
    /// A matrix as it is.
    #[must_use]
    pub fn of(matrix: &'a Tensor<2>) -> Self {
        Self {
            matrix,
            transposed: false,
        }
    }

    /// A matrix transposed.
    #[must_use]
    pub fn transposed(matrix: &'a Tensor<2>) -> Self {
        Self {
            matrix,
            transposed: true,
        }
    }

    fn tensor(self) -> Tensor<2> {
        let matrix = self.matrix.clone();
        if self.transposed {
            matrix.transpose()
        } else {
            matrix
        }
    }
}

/// `scale · a b`, added to `onto` where there is such.
#[must_use]
pub fn product(onto: Option<Tensor<2>>, a: Factor<'_>, b: Factor<'_>, scale: f64) -> Tensor<2> {
    #[cfg(test)]
    let bent = bent::factors(a, b);
    #[cfg(test)]
    let (a, b) = match &bent {
        Some([a, b]) => (Factor::of(a), Factor::of(b)),
        None => (a, b),
    };
    #[cfg(test)]
    let scale = if bent::is(bent::Bend::LoraScale) {
        1.0
    } else {
        scale
    };
    #[cfg(feature = "flex")]
    if is_cpu(&a.matrix.device()) {
        return fused::product(onto, a, b, scale as f32);
    }
    #[cfg(feature = "tch")]
    let onto = match onto.map(|onto| libtorch::product(onto, a, b, scale)) {
        Some(Ok(sum)) => return sum,
        onto => onto.and_then(Result::err),
    };
    let product = a.tensor().matmul(b.tensor());
    let product = if scale == 1.0 {
        product
    } else {
        product * scale
    };
    match onto {
        Some(onto) => onto + product,
        None => product,
    }
}

/// Whether a device is the pure Rust CPU device, where kernels are ours.
#[must_use]
pub fn is_cpu(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    return *device == Device::flex();
    #[cfg(not(feature = "flex"))]
    return {
        let _ = device;
        false
    };
}

/// `x Wᵀ`, or `x W`, with a weight of fewer bits, added to `onto` where there is such.
#[cfg(feature = "flex")]
#[must_use]
pub fn stored_product(
    onto: Option<Tensor<2>>,
    x: &Tensor<2>,
    weight: &Stored,
    transposed: bool,
) -> Tensor<2> {
    let [rows, columns] = weight.shape();
    let shape = [x.dims()[0], if transposed { rows } else { columns }];
    let (mut out, into) = fused::output(onto, shape);
    let values = Values::of(x);
    if transposed {
        weight.times_transposed(&mut out, into, values.slice());
    } else {
        weight.times(&mut out, into, values.slice());
    }
    tensor(out, shape, &x.device())
}

/// Some rows of a weight of fewer bits, `[N, in]`.
#[cfg(feature = "flex")]
#[must_use]
pub fn stored_rows(weight: &Stored, places: Tensor<1, Int>) -> Tensor<2> {
    let device = places.device();
    let places: Vec<i64> = places.into_data().iter::<i64>().collect();
    let width = weight.shape()[1];
    let mut out = vec![0.0; places.len() * width];
    for (place, out) in places.iter().zip(out.chunks_exact_mut(width)) {
        let place = *place as usize;
        weight.unfold(place..place + 1, out);
    }
    tensor(out, [places.len(), width], &device)
}

/// Root mean square norm (arXiv 1910.07467): `x / sqrt(mean(x²) + ε) · g`; and the inverse root of
/// every row, for the way back.
///
/// # Shapes
/// - x, output: `[N, width]`
/// - gain: `[width]`
/// - inverse: `[N, 1]`
#[must_use]
pub fn norm(x: &Tensor<2>, gain: &Tensor<1>, epsilon: f64) -> (Tensor<2>, Tensor<2>) {
    #[cfg(test)]
    if bent::is(bent::Bend::Norm) {
        return bent::norm(x, gain, epsilon);
    }
    #[cfg(feature = "flex")]
    if is_cpu(&x.device()) {
        let [rows, width] = x.dims();
        let (mut y, mut inverse) = (vec![0.0; rows * width], vec![0.0; rows]);
        let (x_values, gain) = (Values::of(x), Values::of(gain));
        let (x_values, gain) = (x_values.slice(), gain.slice());
        cairn_kernels::norm::rms_norm(x_values, gain, epsilon as f32, &mut y, &mut inverse);
        return (
            tensor(y, [rows, width], &x.device()),
            tensor(inverse, [rows, 1], &x.device()),
        );
    }
    let mean_square = (x.clone() * x.clone()).mean_dim(1); // [N, 1]
    let inverse = (mean_square + epsilon).sqrt().recip();
    let y = x.clone() * inverse.clone() * gain.clone().unsqueeze();
    (y, inverse)
}

/// The gradient of [`norm`] by x, added to `onto`: `i (g d) - x i³ · mean(g d x)`.
#[must_use]
pub fn norm_backward(
    onto: Tensor<2>,
    gradient: &Tensor<2>,
    x: &Tensor<2>,
    inverse: &Tensor<2>,
    gain: &Tensor<1>,
) -> Tensor<2> {
    #[cfg(test)]
    if bent::is(bent::Bend::NormBack) {
        return bent::norm_backward(onto, gradient, inverse, gain);
    }
    #[cfg(feature = "flex")]
    if is_cpu(&x.device()) {
        let shape = x.dims();
        let mut into = values(onto);
        let (gradient, x_values) = (Values::of(gradient), Values::of(x));
        let (inverse, gain) = (Values::of(inverse), Values::of(gain));
        cairn_kernels::norm::rms_norm_backward(
            gradient.slice(),
            x_values.slice(),
            inverse.slice(),
            gain.slice(),
            &mut into,
        );
        return tensor(into, shape, &x.device());
    }
    let weighted = gradient.clone() * gain.clone().unsqueeze(); // [N, width]
    let mean = (weighted.clone() * x.clone()).mean_dim(1); // [N, 1]
    let cubed = inverse.clone() * inverse.clone() * inverse.clone();
    onto + weighted * inverse.clone() - x.clone() * (cubed * mean)
}

/// `silu(gate) · up` (arXiv 2002.05202).
#[must_use]
pub fn swiglu(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    #[cfg(test)]
    if bent::is(bent::Bend::Gate) {
        return bent::swiglu(gate, up);
    }
    #[cfg(feature = "flex")]
    if is_cpu(&gate.device()) {
        let mut out = vec![0.0; gate.shape().num_elements()];
        let (gates, ups) = (Values::of(gate), Values::of(up));
        cairn_kernels::gate::swiglu(gates.slice(), ups.slice(), &mut out);
        return tensor(out, gate.dims(), &gate.device());
    }
    activation::silu(gate.clone()) * up.clone()
}

/// What [`swiglu_backward`] comes to.
pub struct Gated {
    /// Gradient by the gate.
    pub gate: Tensor<2>,
    /// Gradient by `up`.
    pub up: Tensor<2>,
    /// `silu(gate) · up` once more.
    pub product: Tensor<2>,
}

/// The way back through [`swiglu`]. Its output is formed again on the way: a pass that is made
/// anyway costs less than a tensor that is kept.
#[must_use]
pub fn swiglu_backward(gradient: Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> Gated {
    #[cfg(test)]
    if bent::is(bent::Bend::GateBack) {
        return bent::swiglu_backward(gradient, gate, up);
    }
    #[cfg(feature = "flex")]
    if is_cpu(&gate.device()) {
        let (shape, device) = (gate.dims(), gate.device());
        let (mut gradient, mut gate, mut up) = (values(gradient), values(gate), values(up));
        cairn_kernels::gate::swiglu_backward(&mut gradient, &mut gate, &mut up);
        let tensor = |values| tensor(values, shape, &device);
        return Gated {
            gate: tensor(gate),
            up: tensor(up),
            product: tensor(gradient),
        };
    }
    let sigmoid = activation::sigmoid(gate.clone());
    let silu = gate * sigmoid.clone();
    let slope = sigmoid.clone() + silu.clone() * (sigmoid.neg() + 1.0);
    Gated {
        gate: gradient.clone() * up.clone() * slope,
        up: gradient * silu.clone(),
        product: silu * up,
    }
}

/// Whether and how heads are rotated on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotate {
    /// As queries are, with attention's `1 / sqrt(E)` folded in.
    Queries,
    /// As keys are.
    Keys,
    /// Not at all.
    Not,
}

/// Heads side by side become heads one after the other, rotated (arXiv 2104.09864).
///
/// # Shapes
/// - x: `[N, heads E]`
/// - output: `[R, heads, L, E]`
#[must_use]
pub fn split_heads(x: Tensor<2>, heads: usize, rotate: Rotate, input: &Input) -> Tensor<4> {
    #[cfg(test)]
    let rotate = bent::rotated(rotate, bent::Bend::Rotation);
    let (rows, length) = (input.rows, input.length);
    let width = x.dims()[1] / heads;
    #[cfg(feature = "flex")]
    if is_cpu(&x.device()) {
        let layout = cairn_kernels::heads::Layout {
            length,
            heads,
            width,
        };
        let mut out = vec![0.0; x.shape().num_elements()];
        let from = Values::of(&x);
        fused::with_rotation(rotate, input, |rotation| {
            cairn_kernels::heads::split(from.slice(), layout, rotation, &mut out);
        });
        return tensor(out, [rows, heads, length, width], &x.device());
    }
    let x = match input.rotation(rotate) {
        None => x.reshape([rows, length, heads, width]),
        Some((cos, sin)) => {
            let x = x.reshape([rows, length, heads, 2, width / 2]);
            let rotated = x.clone() * cos.clone() + x.flip([3]) * sin.clone();
            rotated.reshape([rows, length, heads, width])
        }
    };
    x.permute([0, 2, 1, 3])
}

/// The way back, and the gradient, of [`split_heads`].
#[must_use]
pub fn merge_heads(x: Tensor<4>, rotate: Rotate, input: &Input) -> Tensor<2> {
    #[cfg(test)]
    let rotate = bent::rotated(rotate, bent::Bend::RotationBack);
    let [rows, heads, length, width] = x.dims();
    #[cfg(feature = "flex")]
    if is_cpu(&x.device()) {
        let layout = cairn_kernels::heads::Layout {
            length,
            heads,
            width,
        };
        let mut out = vec![0.0; x.shape().num_elements()];
        let from = Values::of(&x);
        fused::with_rotation(rotate, input, |rotation| {
            cairn_kernels::heads::merge(from.slice(), layout, rotation, &mut out);
        });
        return tensor(out, [rows * length, heads * width], &x.device());
    }
    let x = x.permute([0, 2, 1, 3]);
    match input.rotation(rotate) {
        None => x.reshape([rows * length, heads * width]),
        Some((cos, sin)) => {
            let x = x.reshape([rows, length, heads, 2, width / 2]);
            // The transpose of a rotation: the signed sines change halves too.
            let back = x.clone() * cos.clone() + (x * sin.clone()).flip([3]);
            back.reshape([rows * length, heads * width])
        }
    }
}

/// What attention reads, after rotation, and what it left.
#[derive(Debug, Clone)]
pub struct Attended {
    /// Queries, `[R, H, L, E]`.
    pub q: Tensor<4>,
    /// Keys, `[R, K, L, E]`.
    pub k: Tensor<4>,
    /// Values, `[R, K, L, E]`.
    pub v: Tensor<4>,
    /// The output, heads side by side, `[N, H E]`.
    pub merged: Tensor<2>,
    /// Logarithms of the softmax's denominators, `[R, H, L]`; where fused.
    #[cfg(any(feature = "flex", feature = "tch"))]
    log_sums: Option<Tensor<3>>,
}

/// `softmax(q kᵀ + mask) v`; the queries have the scale. Keys and values serve `H / K` heads each.
///
/// # Shapes
/// - q: `[R, H, L, E]`
/// - k, v: `[R, K, L, E]`
#[must_use]
pub fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    window: Option<usize>,
    input: &Input,
) -> Attended {
    #[cfg(feature = "flex")]
    if is_cpu(&q.device()) {
        return fused::attend(q, k, v, window, input);
    }
    #[cfg(feature = "tch")]
    if libtorch::is_cpu(&q.device()) {
        return libtorch::attend(q, k, v, window, input);
    }
    let weights = weights(&q, &k, window, input); // [R, K, G, L, L]
    let shape = q.dims();
    let context = weights.matmul(v.clone().unsqueeze_dim(2)).reshape(shape);
    Attended {
        merged: merge_heads(context, Rotate::Not, input),
        q,
        k,
        v,
        #[cfg(any(feature = "flex", feature = "tch"))]
        log_sums: None,
    }
}

/// The gradients by q, k and v, from the gradient by the merged output.
#[must_use]
pub fn attend_backward(
    gradient: Tensor<2>,
    forward: Attended,
    window: Option<usize>,
    input: &Input,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let [rows, heads, length, width] = forward.q.dims();
    let kv_heads = forward.k.dims()[1];
    let gradient = split_heads(gradient, heads, Rotate::Not, input);
    #[cfg(feature = "flex")]
    if is_cpu(&gradient.device()) {
        return fused::attend_backward(&gradient, &forward, window, input);
    }
    #[cfg(feature = "tch")]
    if libtorch::is_cpu(&gradient.device()) {
        return libtorch::attend_backward(gradient, forward, window, input);
    }
    let grouped = |x: Tensor<4>| {
        let width = x.dims()[3];
        x.reshape([rows, kv_heads, heads / kv_heads, length, width])
    };
    let out = split_heads(forward.merged, heads, Rotate::Not, input);
    let mean = grouped((gradient.clone() * out).sum_dim(3)); // [R, K, G, L, 1]
    let weights = weights(&forward.q, &forward.k, window, input); // [R, K, G, L, L]
    let gradient = grouped(gradient); // [R, K, G, L, E]
    let (q, k) = (grouped(forward.q), forward.k.unsqueeze_dim::<5>(2));
    let slopes = gradient
        .clone()
        .matmul(forward.v.unsqueeze_dim::<5>(2).transpose());
    let slopes = weights.clone() * (slopes - mean);
    let of_group = |x: Tensor<5>| x.sum_dim(2).reshape([rows, kv_heads, length, width]);
    (
        slopes
            .clone()
            .matmul(k)
            .reshape([rows, heads, length, width]),
        of_group(slopes.transpose().matmul(q)),
        of_group(weights.transpose().matmul(gradient)),
    )
}

/// `softmax(q kᵀ + mask)`, `[R, K, G, L, L]`.
fn weights(q: &Tensor<4>, k: &Tensor<4>, window: Option<usize>, input: &Input) -> Tensor<5> {
    let [rows, heads, length, width] = q.dims();
    let kv_heads = k.dims()[1];
    let q = q
        .clone()
        .reshape([rows, kv_heads, heads / kv_heads, length, width]);
    let keys = k.clone().unsqueeze_dim::<5>(2).transpose(); // [R, K, 1, E, L]
    activation::softmax(q.matmul(keys) + input.mask(window), 4)
}

/// Loss of every row's target in nats, and, where a scale is given, `scale` times its gradient by the
/// logits.
///
/// # Shapes
/// - logits, gradient: `[S, V]`
/// - targets, losses: `[S]`
#[must_use]
pub fn cross_entropy(
    logits: Tensor<2>,
    targets: &[i32],
    scale: Option<f64>,
) -> (Vec<f32>, Option<Tensor<2>>) {
    #[cfg(test)]
    let logits = bent::logits(logits);
    #[cfg(feature = "flex")]
    if is_cpu(&logits.device()) {
        let (shape, device) = (logits.dims(), logits.device());
        let mut logits = values(logits);
        let Some(scale) = scale else {
            return (cairn_kernels::loss::losses(&mut logits, targets), None);
        };
        let losses = cairn_kernels::loss::cross_entropy(&mut logits, targets, scale as f32);
        return (losses, Some(tensor(logits, shape, &device)));
    }
    let device = logits.device();
    let column = TensorData::new(targets.to_vec(), [targets.len(), 1]);
    let column: Tensor<2, burn::tensor::Int> = Tensor::from_data(column, &device);
    let shifted = logits.clone() - logits.max_dim(1); // [S, V]
    let at_target = shifted.clone().gather(1, column.clone()); // [S, 1]
    let exponentials = shifted.exp();
    let totals = exponentials.clone().sum_dim(1); // [S, 1]
    let losses = totals.clone().log() - at_target;
    let losses = losses.to_data().iter::<f32>().collect();
    let gradient = scale.map(|scale| {
        let ones = Tensor::<2>::full([targets.len(), 1], -scale, &device);
        let chances = exponentials / totals * scale;
        chances.scatter(1, column, ones, burn::tensor::IndexingUpdateOp::Add)
    });
    (losses, gradient)
}

/// The same on slices, without a tensor in between.
#[cfg(feature = "flex")]
mod fused {
    use burn::backend::Flex;
    use burn::backend::tensor::FloatTensor;
    use burn::tensor::{Device, Tensor, TensorData};
    use cairn_kernels::attention::{Forward, Shape, attention, attention_backward};
    use cairn_kernels::heads::{Layout, Rotation, merge};
    use cairn_kernels::product::{Into, Matrix, Threads};

    use super::{Attended, Factor, Rotate};
    use crate::model::input::Input;

    /// A tensor's numbers, row-major, to be read where they are.
    pub(super) struct Values(FloatTensor<Flex>);

    impl Values {
        /// The numbers of a tensor on the CPU device; a view that is not row-major is copied.
        pub(super) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
            let primitive = tensor.clone().try_into_primitive::<Flex>();
            let primitive = primitive.expect("the caller has asked for the device");
            if primitive.is_contiguous() {
                Self(primitive)
            } else {
                Self(primitive.to_contiguous())
            }
        }

        pub(super) fn slice(&self) -> &[f32] {
            self.0.as_slice().expect("contiguous numbers of 32 bits")
        }
    }

    /// A tensor's numbers to be changed; moved where nobody else holds them.
    pub(in crate::model) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        let data = tensor.into_data();
        data.try_into_vec().expect("numbers of 32 bits")
    }

    /// A tensor of these numbers; nothing is copied.
    pub(in crate::model) fn tensor<const D: usize>(
        values: Vec<f32>,
        shape: [usize; D],
        device: &Device,
    ) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    /// What a product is written to: what there is, to be added to, or zeros.
    pub(super) fn output(onto: Option<Tensor<2>>, [rows, columns]: [usize; 2]) -> (Vec<f32>, Into) {
        match onto {
            Some(onto) => (values(onto), Into::Add),
            None => (vec![0.0; rows * columns], Into::Replace),
        }
    }

    pub(super) fn product(
        onto: Option<Tensor<2>>,
        a: Factor<'_>,
        b: Factor<'_>,
        scale: f32,
    ) -> Tensor<2> {
        let (a_values, b_values) = (Values::of(a.matrix), Values::of(b.matrix));
        let ([a_rows, a_columns], [b_rows, b_columns]) = (a.matrix.dims(), b.matrix.dims());
        let mut left = Matrix::new(a_values.slice(), a_rows, a_columns);
        let mut right = Matrix::new(b_values.slice(), b_rows, b_columns);
        let (mut rows, mut columns) = (a_rows, b_columns);
        if a.transposed {
            (left, rows) = (left.transposed(), a_columns);
        }
        if b.transposed {
            (right, columns) = (right.transposed(), b_rows);
        }
        let (mut out, into) = output(onto, [rows, columns]);
        cairn_kernels::product::product(&mut out, into, left, right, scale, Threads::All);
        tensor(out, [rows, columns], &a.matrix.device())
    }

    pub(super) fn with_rotation(
        rotate: Rotate,
        input: &Input,
        run: impl FnOnce(Option<Rotation<'_>>),
    ) {
        match input.rotation(rotate) {
            None => run(None),
            Some((cos, sin)) => {
                let (cos, sin) = (Values::of(cos), Values::of(sin));
                run(Some(Rotation {
                    cos: cos.slice(),
                    sin: sin.slice(),
                }));
            }
        }
    }

    fn shape(q: &Tensor<4>, k: &Tensor<4>) -> Shape {
        let [_, heads, length, width] = q.dims();
        Shape {
            length,
            heads,
            kv_heads: k.dims()[1],
            width,
        }
    }

    pub(super) fn attend(
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        window: Option<usize>,
        input: &Input,
    ) -> Attended {
        let shape = shape(&q, &k);
        let count = q.shape().num_elements();
        let (mut out, mut log_sums) = (vec![0.0; count], vec![0.0; count / shape.width]);
        let (queries, keys, served) = (Values::of(&q), Values::of(&k), Values::of(&v));
        let read = (queries.slice(), keys.slice(), served.slice());
        attention(shape, read, input.first(window), &mut out, &mut log_sums);
        let layout = Layout {
            length: shape.length,
            heads: shape.heads,
            width: shape.width,
        };
        let mut merged = vec![0.0; count];
        merge(&out, layout, None, &mut merged);
        let (rows, length) = (input.rows, input.length);
        Attended {
            merged: tensor(
                merged,
                [rows * length, shape.heads * shape.width],
                &q.device(),
            ),
            log_sums: Some(tensor(log_sums, [rows, shape.heads, length], &q.device())),
            q,
            k,
            v,
        }
    }

    pub(super) fn attend_backward(
        gradient: &Tensor<4>,
        forward: &Attended,
        window: Option<usize>,
        input: &Input,
    ) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let log_sums = forward.log_sums.as_ref().expect("attended on this device");
        let (q, k, v) = (
            Values::of(&forward.q),
            Values::of(&forward.k),
            Values::of(&forward.v),
        );
        let (merged, log_sums) = (Values::of(&forward.merged), Values::of(log_sums));
        let zeros = |like: &Tensor<4>| vec![0.0; like.shape().num_elements()];
        let (mut dq, mut dk, mut dv) = (zeros(&forward.q), zeros(&forward.k), zeros(&forward.v));
        let kept = Forward {
            q: q.slice(),
            k: k.slice(),
            v: v.slice(),
            merged: merged.slice(),
            log_sums: log_sums.slice(),
        };
        attention_backward(
            shape(&forward.q, &forward.k),
            kept,
            Values::of(gradient).slice(),
            input.first(window),
            (&mut dq, &mut dk, &mut dv),
        );
        let device = gradient.device();
        (
            tensor(dq, forward.q.dims(), &device),
            tensor(dk, forward.k.dims(), &device),
            tensor(dv, forward.v.dims(), &device),
        )
    }
}
