//! Several adapters on one model, each with a weight that gradients flow to.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};

use cairn_stack::adapter::Pair;
use cairn_stack::config::ModelConfig;

use super::lora::{Adapter, ForeignPair, Gradient, places_of};

/// Adapters side by side along the rank: `sum_i w_i s_i B_i A_i` is `B diag(w E) A`, with all the B
/// and all the A of a module in one matrix each, and `E [K, r]` holding `s_i` where direction `k` is
/// adapter `i`'s. One thin product a module and factor, however many adapters there are.
pub struct Mixture {
    adapter: Adapter,
    /// `E` of every pair, in the order of [`Adapter::factors`].
    spreads: Vec<Tensor<2>>,
}

impl Mixture {
    /// Puts adapters on a device.
    ///
    /// # Errors
    /// [`ForeignPair`] when a pair's module or shape is not the model's.
    pub fn new(
        config: &ModelConfig,
        adapters: &[&[Pair]],
        device: &Device,
    ) -> Result<Self, ForeignPair> {
        // By layer and target, as `factors` has them.
        let mut modules: BTreeMap<(usize, usize), Vec<(usize, &Pair)>> = BTreeMap::new();
        for (number, pairs) in adapters.iter().enumerate() {
            for (pair, (layer, target)) in pairs.iter().zip(places_of(config, pairs)?) {
                let place = (layer, target as usize);
                modules.entry(place).or_default().push((number, pair));
            }
        }
        let joined: Vec<Pair> = modules.values().map(|parts| side_by_side(parts)).collect();
        let spreads = modules.values().map(|parts| {
            let rank = parts.iter().map(|(_, pair)| pair.rank).sum();
            let mut values = vec![0.0_f32; adapters.len() * rank];
            let mut first = 0;
            for (number, pair) in parts {
                let row = number * rank;
                values[row + first..row + first + pair.rank].fill(pair.scale as f32);
                first += pair.rank;
            }
            Tensor::from_data(TensorData::new(values, [adapters.len(), rank]), device)
        });
        Ok(Self {
            spreads: spreads.collect(),
            adapter: Adapter::new(config, &joined, device)?,
        })
    }

    /// The one adapter that the weights make of them.
    #[must_use]
    pub fn at(&self, weights: &[f64]) -> Adapter {
        let weights: Vec<f32> = weights.iter().map(|weight| *weight as f32).collect();
        let mut adapter = self.adapter.clone();
        for (factors, spread) in adapter.factors_mut().zip(&self.spreads) {
            let data = TensorData::new(weights.clone(), [1, weights.len()]);
            let weights: Tensor<2> = Tensor::from_data(data, &spread.device());
            factors.gains = Some(weights.matmul(spread.clone())); // [1, r]
        }
        adapter
    }

    /// The gradient by every weight, from those by the gains: `Σ_modules g Eᵀ`.
    #[must_use]
    pub fn slopes(&self, gradients: &[Gradient]) -> Vec<f64> {
        let adapters = self.spreads.first().map_or(0, |spread| spread.dims()[0]);
        let mut slopes = vec![0.0; adapters];
        for (gradient, spread) in gradients.iter().zip(&self.spreads) {
            if let Gradient::Gains(gains) = gradient {
                let of_module = gains.clone().matmul(spread.clone().transpose()); // [1, K]
                for (sum, slope) in slopes.iter_mut().zip(of_module.to_data().iter::<f32>()) {
                    *sum += f64::from(slope);
                }
            }
        }
        slopes
    }
}

/// `[A_1; A_2; ...]` and `[B_1 | B_2 | ...]` of one module, scales left out.
fn side_by_side(parts: &[(usize, &Pair)]) -> Pair {
    let pairs = || parts.iter().map(|(_, pair)| *pair);
    let rank = pairs().map(|pair| pair.rank).sum();
    let (_, first) = parts[0];
    let mut b = Vec::with_capacity(first.out_features * rank);
    for row in 0..first.out_features {
        for pair in pairs() {
            b.extend_from_slice(&pair.b[row * pair.rank..(row + 1) * pair.rank]);
        }
    }
    Pair {
        module: first.module.clone(),
        rank,
        in_features: first.in_features,
        out_features: first.out_features,
        a: pairs().flat_map(|pair| pair.a.iter().copied()).collect(),
        b,
        scale: 1.0,
    }
}
