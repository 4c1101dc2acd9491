//! Learning rates as transformers' schedules give them.

use std::f64::consts::PI;

use cairn_stack::recipe::{Recipe, Schedule};

/// Learning rate of optimiser step `step` (from 0) of `total`.
///
/// transformers' `get_{constant,linear,cosine}_schedule_with_warmup`: a line from 0 over the
/// warm-up steps, then constant, a line to 0, or half a cosine to 0.
#[must_use]
pub fn learning_rate(recipe: &Recipe, step: u64, total: u64) -> f64 {
    let warmup = u64::from(recipe.warmup_steps);
    let factor = if step < warmup {
        step as f64 / warmup as f64
    } else {
        let rest = total.saturating_sub(warmup).max(1) as f64;
        let done = (step - warmup) as f64 / rest;
        match recipe.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => (1.0 - done).max(0.0),
            Schedule::Cosine => (0.5 * (1.0 + (PI * done).cos())).max(0.0),
        }
    };
    recipe.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: &str, warmup: u32, total: u64) -> Vec<f64> {
        let text = format!(
            "rank = 1\nalpha = 1\ntarget_modules = [\"q_proj\"]\nlearning_rate = 1.0\nsteps = {total}\n\
             batch_size = 1\nsequence_length = 8\nseed = 0\nschedule = \"{schedule}\"\nwarmup_steps = {warmup}"
        );
        let recipe = Recipe::parse_toml(&text).unwrap();
        (0..total)
            .map(|step| learning_rate(&recipe, step, total))
            .collect()
    }

    #[test]
    fn as_transformers_has_them() {
        assert_eq!(rates("constant", 2, 4), [0.0, 0.5, 1.0, 1.0]);
        assert_eq!(rates("linear", 0, 4), [1.0, 0.75, 0.5, 0.25]);
        assert_eq!(rates("linear", 2, 4), [0.0, 0.5, 1.0, 0.5]);
        let cosine = rates("cosine", 0, 4);
        assert!(
            (cosine[1] - 0.5 * (1.0 + (PI / 4.0).cos())).abs() < 1e-12
                && (cosine[2] - 0.5).abs() < 1e-12
        );
    }

    #[test]
    fn warm_up_longer_than_training_only_rises() {
        assert_eq!(rates("linear", 8, 3), [0.0, 0.125, 0.25]);
    }
}
