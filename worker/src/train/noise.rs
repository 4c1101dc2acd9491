//! What a recipe disturbs training with: dropout before A, and noise on the embeddings.
//!
//! Every draw is a function of the recipe's seed, the step, the micro-batch and the place alone, so a
//! training that is resumed, or a segment of it that is replayed, sees the same.

use burn::tensor::{Tensor, TensorData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use cairn_stack::digest::Digest;
use cairn_stack::recipe::Recipe;

use crate::model::lora::Factors;
use crate::model::{Adapter, Input};

/// Which forward pass of a training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Optimiser steps before it.
    pub step: u64,
    /// Its micro-batch in the step.
    pub micro_batch: usize,
    /// Tokens of that micro-batch, padding included, that were passed before: where memory is short, a
    /// batch is passed in parts, and each is disturbed as it would have been in the whole.
    pub first_token: usize,
}

/// The disturbances of one recipe.
#[derive(Debug, Clone, Copy)]
pub struct Noise {
    dropout: f64,
    neftune_alpha: f64,
    seed: u64,
}

impl Noise {
    /// Those of a recipe.
    #[must_use]
    pub fn of(recipe: &Recipe) -> Self {
        Self {
            dropout: recipe.lora_dropout,
            neftune_alpha: recipe.neftune_noise_alpha,
            seed: recipe.seed,
        }
    }

    /// Disturbs one forward pass of an adapter in training.
    pub fn disturb(self, pass: Pass, adapter: &mut Adapter, input: &mut Input, hidden: usize) {
        let tokens = input.rows * input.length;
        if self.neftune_alpha > 0.0 {
            let most = self.neftune_alpha / ((input.length * hidden) as f64).sqrt();
            let mut rng = self.generator("embedding", pass, 0);
            // One word a number.
            rng.set_word_pos((pass.first_token * hidden) as u128);
            let values = (0..tokens * hidden)
                .map(|_| most as f32 * symmetric(&mut rng))
                .collect::<Vec<f32>>();
            let data = TensorData::new(values, [tokens, hidden]);
            input.embedding_noise = Some(Tensor::from_data(data, &input.tokens.device()));
        }
        if self.dropout > 0.0 {
            for (place, factors) in adapter.factors_mut().enumerate() {
                let mut rng = self.generator("dropout", pass, place);
                let places = (pass.first_token, tokens);
                factors.dropout = Some(mask(factors, places, self.dropout, &mut rng));
            }
        }
    }

    fn generator(self, what: &str, pass: Pass, place: usize) -> ChaCha8Rng {
        let Pass {
            step, micro_batch, ..
        } = pass;
        let name = format!("{what} {} {step} {micro_batch} {place}", self.seed);
        ChaCha8Rng::from_seed(*Digest::of(name.as_bytes()).as_bytes())
    }
}

/// Uniform in -1 to 1.
fn symmetric(rng: &mut ChaCha8Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// `[N, in]`: 0 with probability `p`, to a 65,536th, else `1 / (1 - p)`; for `tokens` from `first` on.
fn mask(
    factors: &Factors,
    (first, tokens): (usize, usize),
    p: f64,
    rng: &mut ChaCha8Rng,
) -> Tensor<2> {
    let inputs = factors.a.dims()[1];
    let dropped = (p * 65_536.0).round() as u32;
    let kept = 65_536.0 / (65_536 - dropped) as f32;
    // Two bytes a number, and the generator's words have four.
    let before = 2 * first * inputs;
    rng.set_word_pos((before / 4) as u128);
    let mut words = vec![0_u8; before % 4 + 2 * tokens * inputs];
    rng.fill_bytes(&mut words);
    let values = words[before % 4..]
        .chunks_exact(2)
        .map(|word| {
            if u32::from(u16::from_le_bytes([word[0], word[1]])) < dropped {
                0.0
            } else {
                kept
            }
        })
        .collect::<Vec<f32>>();
    Tensor::from_data(
        TensorData::new(values, [tokens, inputs]),
        &factors.a.device(),
    )
}
