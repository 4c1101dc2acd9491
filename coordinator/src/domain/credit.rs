//! What an accepted submission is worth: the tokens its lease asked for, at most.

use cairn_stack::recipe::{Length, Recipe};

/// The tokens to credit: what the worker says, but no more than its lease asked for. Records count
/// at full sequence length, so this is a ceiling; a worker that claims less gets less.
pub fn tokens(claimed: u64, records: u64, recipe: &Recipe) -> u64 {
    let sequence = u64::from(recipe.sequence_length);
    let asked = match recipe.length {
        Length::Epochs(epochs) => records
            .saturating_mul(sequence)
            .saturating_mul(u64::from(epochs)),
        Length::Steps(steps) => u64::from(steps)
            .saturating_mul(u64::from(recipe.batch_size))
            .saturating_mul(u64::from(recipe.accumulation))
            .saturating_mul(sequence),
    };
    claimed.min(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(length: &str) -> Recipe {
        Recipe::parse_toml(&format!(
            "rank = 2\nalpha = 4\ntarget_modules = [\"q_proj\"]\nlearning_rate = 1e-3\n{length}\n\
             batch_size = 4\nsequence_length = 100\n"
        ))
        .unwrap()
    }

    #[test]
    fn never_more_than_asked() {
        assert_eq!(tokens(u64::MAX, 10, &recipe("epochs = 2")), 2_000);
        assert_eq!(tokens(1_500, 10, &recipe("epochs = 2")), 1_500);
        assert_eq!(tokens(u64::MAX, 10, &recipe("steps = 3")), 1_200);
        assert_eq!(tokens(1, u64::MAX, &recipe("epochs = 2")), 1);
    }
}
