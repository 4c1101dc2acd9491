//! Rotary position embedding: angles by transformers' formulas.

use std::f64::consts::PI;

use cairn_stack::config::{ModelConfig, RopeScaling};

/// Angle a position adds, per pair of dimensions.
pub struct Frequencies {
    /// `E/2` angles in radians a position.
    inverse: Vec<f32>,
    /// Factor on cosine and sine (`YaRN`'s attention factor), else 1.
    attention_factor: f32,
}

impl Frequencies {
    /// The frequencies of a model. Sources: `_compute_*_parameters` of transformers'
    /// `modeling_rope_utils.py`.
    #[must_use]
    pub fn new(config: &ModelConfig) -> Self {
        let dim = config.head_dim;
        let theta = config.rope.theta;
        let plain: Vec<f64> = (0..dim / 2)
            .map(|pair| theta.powf(-((2 * pair) as f64) / dim as f64))
            .collect();
        let mut attention_factor = 1.0;
        let inverse: Vec<f64> = match &config.rope.scaling {
            RopeScaling::Default => plain,
            RopeScaling::Linear { factor } => plain.iter().map(|f| f / factor).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_positions: original,
            } => plain
                .iter()
                .map(|&frequency| llama3(frequency, *factor, *low, *high, *original))
                .collect(),
            RopeScaling::Yarn {
                factor,
                original_max_positions,
                beta_fast,
                beta_slow,
                attention_factor: attention,
                truncate,
            } => {
                attention_factor = *attention;
                let ends = yarn_ramp(
                    dim,
                    theta,
                    *original_max_positions,
                    [*beta_fast, *beta_slow],
                    *truncate,
                );
                let blend = |(pair, frequency): (usize, &f64)| {
                    let ramp = ((pair as f64 - ends.0) / (ends.1 - ends.0)).clamp(0.0, 1.0);
                    frequency / factor * ramp + frequency * (1.0 - ramp)
                };
                plain.iter().enumerate().map(blend).collect()
            }
        };
        Self {
            inverse: inverse.into_iter().map(|f| f as f32).collect(),
            attention_factor: attention_factor as f32,
        }
    }

    /// Cosine and signed sine of every position, `[positions, 2, E/2]` each, times `scale`.
    /// The sine of the first half is negative, so that `x cos + swap(x) sin` is the rotation, `swap`
    /// exchanging the halves: neither a concatenation nor a sign is needed.
    #[must_use]
    pub fn table(&self, positions: &[u32], scale: f32) -> (Vec<f32>, Vec<f32>) {
        let half = self.inverse.len();
        let factor = self.attention_factor * scale;
        let mut cos = Vec::with_capacity(positions.len() * 2 * half);
        let mut sin = Vec::with_capacity(positions.len() * 2 * half);
        for &position in positions {
            // Products in f32, as transformers forms them; their rounding shows at long range.
            let angles = || {
                self.inverse
                    .iter()
                    .map(move |frequency| position as f32 * frequency)
            };
            for sign in [-1.0, 1.0] {
                cos.extend(angles().map(|angle| angle.cos() * factor));
                sin.extend(angles().map(|angle| angle.sin() * factor * sign));
            }
        }
        (cos, sin)
    }
}

/// Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1).
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * PI / frequency;
    if wavelength > original / low {
        frequency / factor
    } else if wavelength < original / high {
        frequency
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// First and last pair of the ramp between extrapolation and interpolation (arXiv 2309.00071).
fn yarn_ramp(dim: usize, theta: f64, original: f64, betas: [f64; 2], truncate: bool) -> (f64, f64) {
    let correction =
        |rotations: f64| dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let [mut low, mut high] = betas.map(correction);
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if (high - low).abs() < f64::EPSILON {
        high += 0.001;
    }
    (low, high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_and_divides_long_waves() {
        assert!((llama3(1.0, 8.0, 1.0, 4.0, 8192.0) - 1.0).abs() < 1e-12);
        assert!((llama3(1e-5, 8.0, 1.0, 4.0, 8192.0) - 1e-5 / 8.0).abs() < 1e-18);
        let between = llama3(2.0 * PI / 4096.0, 8.0, 1.0, 4.0, 8192.0) * 4096.0 / (2.0 * PI);
        assert!(between > 1.0 / 8.0 && between < 1.0);
    }

    #[test]
    fn yarn_ramp_is_inside_the_head() {
        let (low, high) = yarn_ramp(64, 1e4, 32.0, [32.0, 1.0], true);
        assert!(low >= 0.0 && high > low && high <= 63.0);
    }
}
