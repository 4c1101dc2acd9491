//! A recipe file or a round file.

use cairn_stack::recipe::Recipe;
use cairn_stack::round::RoundFile;

use crate::assert_short;

/// What is accepted is written to a file that reads the same.
pub fn check(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    match Recipe::parse_toml(text) {
        Ok(recipe) => {
            assert!(recipe.scale().is_finite());
            let again = Recipe::parse_toml(&recipe.to_toml());
            assert_eq!(again.expect("what we write is read"), recipe);
        }
        Err(error) => assert_short(&error.to_string()),
    }
    match RoundFile::parse_toml(text) {
        Ok(round) => {
            let again = RoundFile::parse_toml(&round.to_toml());
            assert_eq!(again.expect("what we write is read"), round);
        }
        Err(error) => assert_short(&error.to_string()),
    }
}

/// Two recipes and two rounds.
pub fn seeds() -> Vec<Vec<u8>> {
    let short = "rank = 2\nalpha = 4\ntarget_modules = [\"q_proj\"]\nlearning_rate = 1e-3\n\
                 epochs = 1\nbatch_size = 1\nsequence_length = 8\n";
    let long = Recipe::parse_toml(
        "rank = 8\nalpha = 0.5\ntarget_modules = \"all-linear\"\nuse_rslora = true\n\
         learning_rate = 1e-3\nschedule = \"cosine\"\nwarmup_steps = 3\nsteps = 10\nbatch_size = 4\n\
         accumulation = 2\nsequence_length = 256\npacking = true\nweight_decay = 0.1\nseed = 17\n",
    );
    let round = |aggregation: &str, recipe: &str| {
        format!(
            "model = \"tiny\"\ndataset = \"gsm8k\"\nshards = 8\n[recipe]\n{recipe}[policy]\n\
             gate = \"gate\"\naudit = \"audit\"\naggregation = \"{aggregation}\"\ndeadline = \"2h\"\n"
        )
    };
    let whole = RoundFile::parse_toml(&round("learned", short)).map(|round| round.to_toml());
    [
        Some(short.to_owned()),
        long.map(|recipe| recipe.to_toml()).ok(),
        Some(round("stack", short)),
        whole.ok(),
    ]
    .map(|text| text.expect("a sound seed").into_bytes())
    .to_vec()
}
