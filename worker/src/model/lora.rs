//! LoRA pairs beside a frozen model.

use std::collections::HashMap;

use burn::tensor::{Device, Tensor, TensorData};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use cairn_stack::adapter::Pair;
use cairn_stack::config::{ModelConfig, Target};

use super::ops::{self, Factor};

/// One pair's factors in PEFT's layout.
#[derive(Debug, Clone)]
pub struct Factors {
    /// `[r, in]`.
    pub a: Tensor<2>,
    /// `[out, r]`.
    pub b: Tensor<2>,
    /// The factor on `B A`: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    pub scale: f64,
    /// A and B whose delta, of the same scale, is taken away: the base weight contains it already,
    /// and the pair goes on from it. Never trained.
    pub carried: Option<(Tensor<2>, Tensor<2>)>,
    /// A further factor on each direction, `[1, r]`, where directions are weighted one by one
    /// ([`super::mixture`]).
    pub gains: Option<Tensor<2>>,
    /// What A's inputs are multiplied with, `[N, in]`, in a training with dropout: 0, or
    /// `1 / (1 - p)`.
    pub dropout: Option<Tensor<2>>,
}

/// Which gradients of the pairs a pass back is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Those of A and B.
    Factors,
    /// Those of B alone: A stays as it is (FFA-LoRA, arXiv 2403.12313).
    OnlyB,
    /// Those of the gains alone.
    Gains,
}

/// The gradients of one pair, those that were wanted.
#[derive(Debug, Clone)]
#[cfg_attr(
    feature = "flex",
    expect(
        clippy::large_enum_variant,
        reason = "a few hundred, of one variant, for a moment"
    )
)]
pub enum Gradient {
    /// Of the factors.
    Factors {
        /// By A, `[r, in]`, unless it stays as it is.
        a: Option<Tensor<2>>,
        /// By B, `[out, r]`.
        b: Tensor<2>,
    },
    /// By the gains, `[1, r]`.
    Gains(Tensor<2>),
}

impl Factors {
    /// Adds `s · (x Aᵀ) Bᵀ - s · (x A_cᵀ) B_cᵀ` to `onto`, the second term with carried factors only;
    /// beside it `x Aᵀ`.
    ///
    /// Two more thin products instead of a second copy of every adapted weight, `W - s B_c A_c`: the
    /// model is shared with other work and stays as it is, memory grows by the factors alone, and a
    /// pair that still equals what was carried adds exactly zero, so that the first loss is the
    /// base's bit for bit.
    ///
    /// # Shapes
    /// - x: `[N, in]`
    /// - onto, output: `[N, out]`
    /// - narrow: `[N, r]`
    #[must_use]
    pub fn forward(&self, x: &Tensor<2>, onto: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let narrow = match &self.dropout {
            None => product(x, &self.a),
            Some(mask) => product(&(x.clone() * mask.clone()), &self.a),
        };
        let onto = match &self.carried {
            None => self.widen(Some(onto), &narrow, &self.b),
            Some((a, b)) => {
                let own = self.widen(None, &narrow, &self.b);
                onto + (own - self.widen(None, &product(x, a), b))
            }
        };
        (onto, narrow)
    }

    fn widen(&self, onto: Option<Tensor<2>>, narrow: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
        let narrow = self.gained(narrow.clone());
        let (narrow, b) = (Factor::of(&narrow), Factor::transposed(b));
        ops::product(onto, narrow, b, self.scale)
    }

    fn gained(&self, narrow: Tensor<2>) -> Tensor<2> {
        match &self.gains {
            Some(gains) => narrow * gains.clone(),
            None => narrow,
        }
    }

    /// What B makes of the gradient by the output, `s · d B`.
    ///
    /// # Shapes
    /// - gradient: `[N, out]`
    /// - output: `[N, r]`
    #[must_use]
    pub fn narrowed(&self, gradient: &Tensor<2>) -> Tensor<2> {
        let (d, b) = (Factor::of(gradient), Factor::of(&self.b));
        ops::product(None, d, b, self.scale)
    }

    /// Adds the gradient by x, `s · (d B) A`, to `onto`.
    ///
    /// # Shapes
    /// - gradient: `[N, out]`
    /// - narrowed: `[N, r]`, as [`Self::narrowed`] has it
    /// - onto, output: `[N, in]`
    #[must_use]
    pub fn backward(
        &self,
        gradient: &Tensor<2>,
        narrowed: &Tensor<2>,
        onto: Tensor<2>,
    ) -> Tensor<2> {
        let back = self.gained(narrowed.clone());
        let onto = match &self.dropout {
            None => ops::product(Some(onto), Factor::of(&back), Factor::of(&self.a), 1.0),
            Some(mask) => {
                let own = ops::product(None, Factor::of(&back), Factor::of(&self.a), 1.0);
                onto + own * mask.clone()
            }
        };
        match &self.carried {
            None => onto,
            Some((a, b)) => {
                let back = ops::product(None, Factor::of(gradient), Factor::of(b), -self.scale);
                let back = self.gained(back);
                ops::product(Some(onto), Factor::of(&back), Factor::of(a), 1.0)
            }
        }
    }

    /// The gradients of the pair: with `u = x Aᵀ` and `v = s · d B`, by B `s · dᵀ u`, by A `vᵀ x`, by
    /// the gains `Σ v ∘ u`.
    ///
    /// # Shapes
    /// - x: `[N, in]`
    /// - narrow: `[N, r]`, as [`Self::forward`] left it
    /// - gradient: `[N, out]`
    /// - narrowed: `[N, r]`, as [`Self::narrowed`] has it
    #[must_use]
    pub fn gradient(
        &self,
        x: &Tensor<2>,
        narrow: Tensor<2>,
        gradient: &Tensor<2>,
        narrowed: Tensor<2>,
        wanted: Wanted,
    ) -> Gradient {
        if wanted == Wanted::Gains {
            return Gradient::Gains((narrowed * narrow).sum_dim(0));
        }
        let narrow = self.gained(narrow);
        let (d, u) = (Factor::transposed(gradient), Factor::of(&narrow));
        let b = ops::product(None, d, u, self.scale);
        if wanted == Wanted::OnlyB {
            return Gradient::Factors { a: None, b };
        }
        let back = self.gained(narrowed);
        let v = Factor::transposed(&back);
        let a = match &self.dropout {
            None => ops::product(None, v, Factor::of(x), 1.0),
            Some(mask) => ops::product(None, v, Factor::of(&(x.clone() * mask.clone())), 1.0),
        };
        Gradient::Factors { a: Some(a), b }
    }
}

/// `x Aᵀ`.
fn product(x: &Tensor<2>, a: &Tensor<2>) -> Tensor<2> {
    ops::product(None, Factor::of(x), Factor::transposed(a), 1.0)
}

/// The pairs of a model, by layer and target.
#[derive(Debug, Clone)]
pub struct Adapter {
    layers: Vec<[Option<Factors>; Target::ALL.len()]>,
}

/// The pairs of one layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerFactors<'a>(Option<&'a [Option<Factors>; Target::ALL.len()]>);

impl<'a> LayerFactors<'a> {
    /// The pair of a target, where it has one.
    #[must_use]
    pub fn get(self, target: Target) -> Option<&'a Factors> {
        self.0?[target as usize].as_ref()
    }
}

/// A pair of an adapter that no layer of the model answers to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the adapter's module {module} ({out_features} x {in_features}) is none of the model's")]
pub struct ForeignPair {
    /// Its module path.
    pub module: String,
    /// Its input features.
    pub in_features: usize,
    /// Its output features.
    pub out_features: usize,
}

impl Adapter {
    /// A fresh adapter as PEFT makes it: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt(5)),
    /// B zero. A function of the seed alone: one `ChaCha20` stream over all pairs in order.
    #[must_use]
    pub fn fresh(
        config: &ModelConfig,
        targets: &[Target],
        rank: usize,
        scale: f64,
        seed: u64,
    ) -> Vec<Pair> {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        places(config, targets)
            .map(|(layer, target)| {
                let (in_features, out_features) = config.linear(target);
                let bound = 1.0 / (in_features as f32).sqrt();
                let a = (0..rank * in_features)
                    .map(|_| bound * uniform(&mut rng))
                    .collect();
                Pair {
                    module: config.module(layer, target),
                    rank,
                    in_features,
                    out_features,
                    a,
                    b: vec![0.0; out_features * rank],
                    scale,
                }
            })
            .collect()
    }

    /// Puts pairs on a device. Pairs of one module are concatenated along their rank, each with
    /// its scale in B: a weighted sum of deltas is one adapter of the summed rank.
    ///
    /// # Errors
    /// [`ForeignPair`] when a pair's module or shape is not the model's.
    pub fn new(config: &ModelConfig, pairs: &[Pair], device: &Device) -> Result<Self, ForeignPair> {
        let mut layers = Vec::new();
        layers.resize_with(config.layers, Default::default);
        let mut adapter = Self { layers };
        for (pair, (layer, target)) in pairs.iter().zip(places_of(config, pairs)?) {
            adapter.add(layer, target, pair, device);
        }
        Ok(adapter)
    }

    fn add(&mut self, layer: usize, target: Target, pair: &Pair, device: &Device) {
        let tensor = |values: &[f32], shape: [usize; 2]| -> Tensor<2> {
            Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
        };
        let a = tensor(&pair.a, [pair.rank, pair.in_features]);
        let b = tensor(&pair.b, [pair.out_features, pair.rank]);
        let slot = &mut self.layers[layer][target as usize];
        *slot = Some(match slot.take() {
            None => Factors {
                a,
                b,
                scale: pair.scale,
                carried: None,
                gains: None,
                dropout: None,
            },
            Some(before) => Factors {
                a: Tensor::cat(vec![before.a, a], 0),
                b: Tensor::cat(vec![before.b * before.scale, b * pair.scale], 1),
                scale: 1.0,
                carried: None,
                gains: None,
                dropout: None,
            },
        });
    }

    /// The same pairs on a base that contains the delta of `carried`: that delta is taken away
    /// wherever a pair adds its own. Both must have the same modules, ranks and scales
    /// ([`cairn_stack::carry::check_factors`]).
    #[must_use]
    pub fn instead_of(mut self, carried: &Self) -> Self {
        for (layer, old) in self.layers.iter_mut().zip(&carried.layers) {
            for (slot, old) in layer.iter_mut().zip(old) {
                if let (Some(slot), Some(old)) = (slot, old) {
                    slot.carried = Some((old.a.clone(), old.b.clone()));
                }
            }
        }
        self
    }

    /// The pairs of one layer; none without an adapter.
    #[must_use]
    pub fn layer(adapter: Option<&Self>, layer: usize) -> LayerFactors<'_> {
        LayerFactors(adapter.and_then(|adapter| adapter.layers.get(layer)))
    }

    /// Every pair's factors, by layer, then in the order of [`Target::ALL`].
    pub fn factors(&self) -> impl Iterator<Item = &Factors> {
        self.layers.iter().flatten().flatten()
    }

    /// One pair's factors, to be changed.
    pub fn factors_of(&mut self, layer: usize, target: Target) -> Option<&mut Factors> {
        self.layers.get_mut(layer)?[target as usize].as_mut()
    }

    /// Every pair's factors, in the same order, to be changed.
    pub fn factors_mut(&mut self) -> impl Iterator<Item = &mut Factors> {
        self.layers.iter_mut().flatten().flatten()
    }

    /// The lowest layer that has a pair: nothing below it is trained.
    #[must_use]
    pub fn lowest_layer(&self) -> Option<usize> {
        self.layers
            .iter()
            .position(|layer| layer.iter().any(Option::is_some))
    }

    /// The pairs as plain numbers, in the order of [`Self::factors`].
    #[must_use]
    pub fn to_pairs(&self, config: &ModelConfig) -> Vec<Pair> {
        let values = |tensor: &Tensor<2>| -> Vec<f32> { tensor.to_data().iter::<f32>().collect() };
        places(config, &Target::ALL)
            .filter_map(|(layer, target)| {
                let factors = self.layers[layer][target as usize].as_ref()?;
                let (in_features, out_features) = config.linear(target);
                Some(Pair {
                    module: config.module(layer, target),
                    rank: factors.a.dims()[0],
                    in_features,
                    out_features,
                    a: values(&factors.a),
                    b: values(&factors.b),
                    scale: factors.scale,
                })
            })
            .collect()
    }
}

/// Where each pair belongs.
///
/// # Errors
/// [`ForeignPair`] when a pair's module or shape is not the model's.
pub(super) fn places_of(
    config: &ModelConfig,
    pairs: &[Pair],
) -> Result<Vec<(usize, Target)>, ForeignPair> {
    let known: HashMap<String, (usize, Target)> = places(config, &Target::ALL)
        .map(|(layer, target)| (config.module(layer, target), (layer, target)))
        .collect();
    let place = |pair: &Pair| {
        let shape = (pair.in_features, pair.out_features);
        let place = known.get(&pair.module).copied();
        place
            .filter(|(_, target)| config.linear(*target) == shape)
            .ok_or_else(|| ForeignPair {
                module: pair.module.clone(),
                in_features: pair.in_features,
                out_features: pair.out_features,
            })
    };
    pairs.iter().map(place).collect()
}

/// Every layer with every target, layer by layer.
fn places(config: &ModelConfig, targets: &[Target]) -> impl Iterator<Item = (usize, Target)> {
    let targets: Vec<Target> = Target::ALL
        .into_iter()
        .filter(|t| targets.contains(t))
        .collect();
    (0..config.layers).flat_map(move |layer| {
        targets
            .clone()
            .into_iter()
            .map(move |target| (layer, target))
    })
}

/// Uniform in [-1, 1) from 24 random bits; spelled out so that no library's sampling algorithm
/// is part of what a seed means.
fn uniform(rng: &mut ChaCha20Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
}
