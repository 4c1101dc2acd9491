//! `x Wᵀ + s (x Aᵀ) Bᵀ` against burn's own `apply_lora`, which builds the dense weight.

mod common;

use burn::module::{Lora, LoraAdapter, Module, Param, Reparameterizer};
use burn::nn::LinearConfig;
use burn::tensor::{Distribution, Tensor};
use cairn_worker::model::linear::Linear;
use cairn_worker::model::lora::{Factors, Gradient, Wanted};
use cairn_worker::model::weight::Weight;

/// burn's LoRA with a B that is not zero, so that both factors have a gradient.
struct LoraWithB(Lora, Tensor<2>);

impl Reparameterizer for LoraWithB {
    type Reparam = LoraAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<LoraAdapter>) {
        let (base, adapter) = self.0.reparameterize(path, param);
        let b = || Param::from_tensor(self.1.clone());
        (
            base,
            adapter.map(|adapter| LoraAdapter { b: b(), ..adapter }),
        )
    }
}

fn assert_close(what: &str, ours: Tensor<2>, burns: Tensor<2>) {
    let (ours, burns) = (ours.without_autodiff(), burns.without_autodiff());
    assert_eq!(ours.dims(), burns.dims(), "{what}");
    let largest: f32 = burns.clone().abs().max().into_scalar();
    let difference: f32 = (ours - burns).abs().max().into_scalar();
    // Relative to the largest value: backends sum in different orders.
    assert!(
        difference < 1e-6 * largest.max(1.0),
        "{what}: {difference} of {largest}"
    );
}

#[test]
fn forward_and_gradients_agree() {
    let device = common::device().open().unwrap();
    let (rows, input, output, rank) = (7, 10, 6, 3);
    let tracked = device.clone().autodiff();
    let random =
        |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);

    let lora = LoraWithB(Lora::new(rank, 6.0), random([rank, output]).autodiff());
    let burns = LinearConfig::new(input, output)
        .init(&tracked)
        .apply_reparameterization(lora);
    let adapter = burns.weight.adapter().expect("burn attached an adapter");
    let (a, b) = (adapter.a.val(), adapter.b.val());

    let plain = |tensor: &Tensor<2>| tensor.clone().without_autodiff().transpose();
    let ours = Linear {
        weight: Weight::Dense(plain(&burns.weight.base())),
        bias: burns
            .bias
            .as_ref()
            .map(|bias| bias.val().without_autodiff()),
    };
    let factors = Factors {
        a: plain(&a),
        b: plain(&b),
        scale: adapter.scale,
        carried: None,
        gains: None,
        dropout: None,
    };

    // The loss is the sum of squares, so that its gradient by the output is twice the output.
    let x = random([rows, input]);
    let burns_x = x.clone().autodiff().require_grad();
    let expected = burns.forward(burns_x.clone());
    let (output, narrow) = factors.forward(&x, ours.forward(&x, None));
    assert_close("output", output.clone(), expected.clone());
    let expected = expected.clone().mul(expected).sum().backward();
    let of_burn = |tensor: &Tensor<2>| tensor.grad(&expected).expect("burn has a gradient");

    let gradient = output * 2.0;
    let narrowed = factors.narrowed(&gradient);
    let found = factors.gradient(&x, narrow, &gradient, narrowed.clone(), Wanted::Factors);
    let Gradient::Factors {
        a: Some(by_a),
        b: by_b,
    } = found
    else {
        panic!("the factors' gradients were asked for");
    };
    assert_close("gradient of A", by_a, of_burn(&a).transpose());
    assert_close("gradient of B", by_b, of_burn(&b).transpose());
    let by_x = factors.backward(&gradient, &narrowed, ours.backward(&gradient, None));
    assert_close("gradient of x", by_x, of_burn(&burns_x));
}
