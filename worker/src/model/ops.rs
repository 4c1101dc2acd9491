//! What the model is computed with: each operation as one pass of [`cairn_kernels`] where the tensors
//! are in the host's memory, whoever keeps them there, and as burn's own operations everywhere else.
//!
//! Operations that are trained through come in pairs, the way there and the way back. Everything in
//! between is frozen, so the chain of gradients is short and known, and is written down in
//! [`super::block`] rather than recorded by an autodiff graph: nothing is kept that the way back does
//! not read, and nothing is computed that no factor needs.

#[cfg(test)]
pub(crate) mod bent;

pub(super) mod host;
#[cfg(feature = "tch")]
mod libtorch;
mod parts;

use burn::tensor::{Int, Tensor, TensorData, activation};
use cairn_kernels::stored::Stored;

use super::input::Input;

use host::{Numbers, Values};
pub use host::{is_host, without_kernels};
pub use parts::QUERIES_MAX;

/// Runs a pass among the threads that compute it: whoever calls from outside hands over every piece of
/// work and waits to be woken, which takes longer than most pieces of a small model.
pub fn inside<T: Send>(pass: impl FnOnce() -> T + Send) -> T {
    #[cfg(test)]
    let pass = bent::carried(pass);
    cairn_kernels::inside(pass)
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
    if is_host(&a.matrix.device()) {
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

/// `x Wᵀ`, or `x W`, with a weight of fewer bits, added to `onto` where there is such.
#[must_use]
pub fn stored_product(
    onto: Option<Tensor<2>>,
    x: &Tensor<2>,
    weight: &Stored,
    transposed: bool,
) -> Tensor<2> {
    let [rows, columns] = weight.shape();
    let shape = [x.dims()[0], if transposed { rows } else { columns }];
    let (mut out, into) = fused::output(onto, shape, &x.device());
    if transposed {
        weight.times_transposed(&mut out, into, &Values::of(x));
    } else {
        weight.times(&mut out, into, &Values::of(x));
    }
    out.tensor(shape)
}

/// Some rows of a weight of fewer bits, `[N, in]`.
#[must_use]
pub fn stored_rows(weight: &Stored, places: Tensor<1, Int>) -> Tensor<2> {
    let device = places.device();
    let places: Vec<i64> = places.into_data().iter::<i64>().collect();
    let width = weight.shape()[1];
    let mut out = Numbers::zeros(places.len() * width, &device);
    for (place, out) in places.iter().zip(out.chunks_exact_mut(width)) {
        let place = *place as usize;
        weight.unfold(place..place + 1, out);
    }
    out.tensor([places.len(), width])
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
    if is_host(&x.device()) {
        let [rows, width] = x.dims();
        let zeros = |count| Numbers::zeros(count, &x.device());
        let (mut y, mut inverse) = (zeros(rows * width), zeros(rows));
        let (x, gain) = (Values::of(x), Values::of(gain));
        cairn_kernels::norm::rms_norm(&x, &gain, epsilon as f32, &mut y, &mut inverse);
        return (y.tensor([rows, width]), inverse.tensor([rows, 1]));
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
    if is_host(&x.device()) {
        let shape = x.dims();
        let mut into = Numbers::of(onto);
        let (gradient, x) = (Values::of(gradient), Values::of(x));
        let (inverse, gain) = (Values::of(inverse), Values::of(gain));
        cairn_kernels::norm::rms_norm_backward(&gradient, &x, &inverse, &gain, &mut into);
        return into.tensor(shape);
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
    if is_host(&gate.device()) {
        let mut out = Numbers::zeros(gate.shape().num_elements(), &gate.device());
        cairn_kernels::gate::swiglu(&Values::of(gate), &Values::of(up), &mut out);
        return out.tensor(gate.dims());
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
    if is_host(&gate.device()) {
        let shape = gate.dims();
        let [mut gradient, mut gate, mut up] = [gradient, gate, up].map(Numbers::of);
        cairn_kernels::gate::swiglu_backward(&mut gradient, &mut gate, &mut up);
        return Gated {
            gate: gate.tensor(shape),
            up: up.tensor(shape),
            product: gradient.tensor(shape),
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
    if is_host(&x.device()) {
        let layout = cairn_kernels::heads::Layout {
            length,
            heads,
            width,
        };
        let mut out = Numbers::zeros(x.shape().num_elements(), &x.device());
        fused::with_rotation(rotate, input, |rotation| {
            cairn_kernels::heads::split(&Values::of(&x), layout, rotation, &mut out);
        });
        return out.tensor([rows, heads, length, width]);
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
    if is_host(&x.device()) {
        let layout = cairn_kernels::heads::Layout {
            length,
            heads,
            width,
        };
        let mut out = Numbers::zeros(x.shape().num_elements(), &x.device());
        fused::with_rotation(rotate, input, |rotation| {
            cairn_kernels::heads::merge(&Values::of(&x), layout, rotation, &mut out);
        });
        return out.tensor([rows * length, heads * width]);
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
    if is_host(&q.device()) {
        return fused::attend(q, k, v, window, input);
    }
    parts::attend(q, k, v, window, input)
}

/// The gradients by q, k and v, from the gradient by the merged output.
#[must_use]
pub fn attend_backward(
    gradient: Tensor<2>,
    forward: Attended,
    window: Option<usize>,
    input: &Input,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let heads = forward.q.dims()[1];
    let gradient = split_heads(gradient, heads, Rotate::Not, input);
    if is_host(&gradient.device()) {
        return fused::attend_backward(&gradient, &forward, window, input);
    }
    parts::attend_backward(&gradient, forward, window, input)
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
    if is_host(&logits.device()) {
        let shape = logits.dims();
        let mut logits = Numbers::of(logits);
        let Some(scale) = scale else {
            return (cairn_kernels::loss::losses(&mut logits, targets), None);
        };
        let losses = cairn_kernels::loss::cross_entropy(&mut logits, targets, scale as f32);
        return (losses, Some(logits.tensor(shape)));
    }
    let device = logits.device();
    let column = TensorData::new(targets.to_vec(), [targets.len(), 1]);
    let column: Tensor<2, Int> = Tensor::from_data(column, &device);
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
mod fused {
    use burn::tensor::{Device, Tensor};
    use cairn_kernels::attention::{Forward, Shape, attention, attention_backward};
    use cairn_kernels::heads::{Layout, Rotation, merge};
    use cairn_kernels::product::{Into, Matrix, Threads};

    use super::{Attended, Factor, Numbers, Rotate, Values};
    use crate::model::input::Input;

    /// What a product is written to: what there is, to be added to, or zeros.
    pub(super) fn output(
        onto: Option<Tensor<2>>,
        [rows, columns]: [usize; 2],
        device: &Device,
    ) -> (Numbers, Into) {
        match onto {
            Some(onto) => (Numbers::of(onto), Into::Add),
            None => (Numbers::zeros(rows * columns, device), Into::Replace),
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
        let mut left = Matrix::new(&a_values, a_rows, a_columns);
        let mut right = Matrix::new(&b_values, b_rows, b_columns);
        let (mut rows, mut columns) = (a_rows, b_columns);
        if a.transposed {
            (left, rows) = (left.transposed(), a_columns);
        }
        if b.transposed {
            (right, columns) = (right.transposed(), b_rows);
        }
        let (mut out, into) = output(onto, [rows, columns], &a.matrix.device());
        cairn_kernels::product::product(&mut out, into, left, right, scale, Threads::All);
        out.tensor([rows, columns])
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
                    cos: &cos,
                    sin: &sin,
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
        let zeros = |count| Numbers::zeros(count, &q.device());
        let (mut out, mut log_sums) = (zeros(count), zeros(count / shape.width));
        let (queries, keys, values) = (Values::of(&q), Values::of(&k), Values::of(&v));
        let read = (&*queries, &*keys, &*values);
        attention(shape, read, input.first(window), &mut out, &mut log_sums);
        let layout = Layout {
            length: shape.length,
            heads: shape.heads,
            width: shape.width,
        };
        let mut merged = zeros(count);
        merge(&out, layout, None, &mut merged);
        let (rows, length) = (input.rows, input.length);
        Attended {
            merged: merged.tensor([rows * length, shape.heads * shape.width]),
            log_sums: Some(log_sums.tensor([rows, shape.heads, length])),
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
        let read = [&forward.q, &forward.k, &forward.v];
        let [q, k, v] = read.map(Values::of);
        let (merged, log_sums) = (Values::of(&forward.merged), Values::of(log_sums));
        let zeros = |like: &Tensor<4>| Numbers::zeros(like.shape().num_elements(), &like.device());
        let [mut dq, mut dk, mut dv] = read.map(zeros);
        let kept = Forward {
            q: &q,
            k: &k,
            v: &v,
            merged: &merged,
            log_sums: &log_sums,
        };
        attention_backward(
            shape(&forward.q, &forward.k),
            kept,
            &Values::of(gradient),
            input.first(window),
            (&mut dq, &mut dk, &mut dv),
        );
        (
            dq.tensor(forward.q.dims()),
            dk.tensor(forward.k.dims()),
            dv.tensor(forward.v.dims()),
        )
    }
}
