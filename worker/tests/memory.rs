//! What is kept, and in how many bits, changes nothing that is computed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use burn::tensor::{Tensor, TensorData};
use cairn_kernels::stored::{Format, Packed, Packer};
use cairn_stack::config::Target;
use cairn_stack::quantize::Quantize;
use cairn_worker::model::llama::Keep;
use cairn_worker::model::lora::{Gradient, Wanted};
use cairn_worker::model::weight::Weight;
use cairn_worker::model::{Adapter, Input};
use common::{batch_of, examples, model};

fn numbers(gradients: Vec<Gradient>) -> Vec<Vec<f32>> {
    let of_pair = |gradient| match gradient {
        Gradient::Factors { a, b } => [a.unwrap(), b],
        Gradient::Gains(_) => panic!("the factors' gradients were asked for"),
    };
    let tensors = gradients.into_iter().flat_map(of_pair);
    tensors
        .map(|tensor: Tensor<2>| tensor.to_data().iter::<f32>().collect())
        .collect()
}

#[test]
fn computed_again_or_kept_the_gradients_are_the_same_bits() {
    for name in ["llama-default", "qwen3-yarn"] {
        let model = model(name);
        let config = &model.llama.config;
        let pairs = Adapter::fresh(config, &Target::ALL, 3, 2.0, 5);
        let adapter = Adapter::new(config, &pairs, &model.device).unwrap();
        let batch = batch_of(&examples(4, config.vocab_size as u32));
        let input = Input::new(config, &batch, &model.device);
        let found = [Keep::Everything, Keep::Inputs].map(|keep| {
            let llama = &model.llama;
            let (loss, found) =
                llama.loss_and_gradients_keeping(keep, &adapter, &input, Wanted::Factors, 0.1);
            (loss.to_bits(), numbers(found))
        });
        assert!(found[0].1.iter().flatten().any(|number| *number != 0.0));
        assert_eq!(found[0], found[1], "{name}");
    }
}

#[test]
fn what_is_kept_is_chosen_by_what_is_left() {
    assert_eq!(Keep::that_fits(100, None), Keep::Everything);
    assert_eq!(Keep::that_fits(100, Some(200)), Keep::Everything);
    assert_eq!(Keep::that_fits(101, Some(200)), Keep::Inputs);
}

#[test]
fn a_weight_of_sixteen_bits_is_the_same_weight() {
    let device = common::device().open().unwrap();
    let (rows, columns) = (6, 4);
    let values: Vec<f32> = (0..rows * columns).map(|n| n as f32 / 8.0 - 1.0).collect();
    let shape = [rows, columns];
    let kept = Weight::new(&values, shape, Quantize::None, &device);
    let dense = Weight::Dense(Tensor::from_data(
        TensorData::new(values.clone(), shape),
        &device,
    ));
    assert_eq!(kept.values(), values);
    let tensor = |count: usize, width: usize| -> Tensor<2> {
        let values = (0..count * width).map(|n| n as f32).collect::<Vec<f32>>();
        Tensor::from_data(TensorData::new(values, [count, width]), &device)
    };
    let same = |a: Tensor<2>, b: Tensor<2>| assert_eq!(a.to_data(), b.to_data());
    let (x, d) = (tensor(3, columns), tensor(3, rows));
    same(kept.forward(&x, None), dense.forward(&x, None));
    same(
        kept.forward(&x, Some(d.clone())),
        dense.forward(&x, Some(d.clone())),
    );
    same(kept.backward(&d, None), dense.backward(&d, None));
    same(
        kept.backward(&d, Some(x.clone())),
        dense.backward(&d, Some(x)),
    );
    let places = || Tensor::from_data(TensorData::new(vec![5_i32, 0, 5], [3]), &device);
    same(kept.rows(places()), dense.rows(places()));
}

#[test]
fn quantised_weights_are_the_same_numbers_on_every_device() {
    let device = common::device().open().unwrap();
    let (rows, columns) = (6, 160);
    let values: Vec<f32> = (0..rows * columns)
        .map(|n| ((n * 37 % 101) as f32 - 50.0) / 61.0)
        .collect();
    for quantize in [Quantize::Int8, Quantize::Nf4] {
        let kept = Weight::new(&values, [rows, columns], quantize, &device);
        // What our own kernels make of them, whatever the device.
        let format = match quantize {
            Quantize::Int8 => Format::Int8,
            _ => Format::Nf4,
        };
        let mut packer = Packer::new(format, rows, columns);
        packer.push(&values);
        let Packed::Stored(stored) = packer.finish() else {
            panic!("{quantize} is kept in fewer bits");
        };
        let mut expected = vec![0.0; rows * columns];
        stored.unfold(0..rows, &mut expected);
        assert_eq!(kept.values(), expected, "{quantize}");
        assert_ne!(kept.values(), values, "{quantize}");

        let dense = Weight::Dense(Tensor::from_data(
            TensorData::new(expected, [rows, columns]),
            &device,
        ));
        let tensor = |count: usize, width: usize| -> Tensor<2> {
            let values = (0..count * width)
                .map(|n| (n % 13) as f32)
                .collect::<Vec<f32>>();
            Tensor::from_data(TensorData::new(values, [count, width]), &device)
        };
        let close = |a: Tensor<2>, b: Tensor<2>| {
            let apart: f32 = (a - b.clone()).abs().max().into_scalar();
            let most: f32 = b.abs().max().into_scalar();
            assert!(apart <= 1e-5 * most, "{quantize}: {apart} of {most}");
        };
        let (x, d) = (tensor(3, columns), tensor(3, rows));
        close(
            kept.forward(&x, Some(d.clone())),
            dense.forward(&x, Some(d.clone())),
        );
        close(
            kept.backward(&d, Some(x.clone())),
            dense.backward(&d, Some(x)),
        );
    }
}
