use proptest::prelude::*;

use super::*;
use crate::peft::{PeftConfig, TargetModules};

const FILE: &str = r#"
rank = 8
alpha = 16
target_modules = ["q_proj", "v_proj"]
learning_rate = 1e-3
epochs = 1
batch_size = 8
sequence_length = 256
seed = 17
"#;

fn changed(line: &str) -> Result<Recipe, RecipeError> {
    let key = line.split(' ').next().unwrap();
    let rest: String = FILE
        .lines()
        .filter(|old| !old.starts_with(&format!("{key} ")))
        .flat_map(|old| [old, "\n"])
        .collect();
    Recipe::parse_toml(&format!("{rest}{line}\n"))
}

#[test]
fn reads_a_recipe_and_fills_in_the_rest() {
    let recipe = Recipe::parse_toml(FILE).unwrap();
    assert_eq!((recipe.rank, recipe.alpha, recipe.scale()), (8, 16.0, 2.0));
    assert_eq!(recipe.target_modules, [Target::Q, Target::V]);
    assert_eq!(
        (recipe.length, recipe.schedule),
        (Length::Epochs(1), Schedule::Linear)
    );
    assert_eq!(
        (recipe.accumulation, recipe.warmup_steps, recipe.packing),
        (1, 0, false)
    );
    assert_eq!(
        (recipe.beta1, recipe.beta2, recipe.epsilon),
        (0.9, 0.999, 1e-8)
    );
    assert_eq!(
        (recipe.clip_norm, recipe.weight_decay, recipe.seed),
        (1.0, 0.0, 17)
    );
}

#[test]
fn later_keys_are_written_only_where_they_are_asked_for() {
    let plain = Recipe::parse_toml(FILE).unwrap();
    assert_eq!(
        (
            plain.lora_dropout,
            plain.neftune_noise_alpha,
            plain.loraplus_lr_ratio
        ),
        (0.0, 0.0, 1.0)
    );
    assert_eq!(plain.quantize, Quantize::None);
    let keys = [
        "lora_dropout",
        "neftune_noise_alpha",
        "loraplus_lr_ratio",
        "quantize",
    ];
    assert!(keys.iter().all(|key| !plain.to_toml().contains(key)));
    let said = changed("quantize = \"none\"").unwrap();
    assert_eq!((said.to_toml(), &said), (plain.to_toml(), &plain));
    let lines = "lora_dropout = 0.1\nneftune_noise_alpha = 5.0\nloraplus_lr_ratio = 16.0\nquantize = \"nf4\"";
    let all = changed(lines).unwrap();
    assert!(keys.iter().all(|key| all.to_toml().contains(key)));
    assert_eq!(Recipe::parse_toml(&all.to_toml()).unwrap(), all);
}

#[test]
fn rslora_divides_by_the_root_of_the_rank() {
    let recipe = changed("rank = 16").unwrap();
    assert_eq!(recipe.scale(), 1.0);
    assert_eq!(
        Recipe {
            use_rslora: true,
            ..recipe
        }
        .scale(),
        4.0
    );
}

#[test]
fn unknown_keys_name_the_nearest() {
    for (line, nearest) in [
        ("learning_rat = 1.0", "learning_rate"),
        ("rnak = 4", "rank"),
        ("lr_schedule = \"linear\"", "schedule"),
        ("batchsize = 4", "batch_size"),
        ("target_module = []", "target_modules"),
        ("seq_length = 4", "sequence_length"),
    ] {
        let error = changed(line).unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&format!("did you mean `{nearest}`?")),
            "{line}: {error}"
        );
    }
    let error = changed("zzz = 1").unwrap_err().to_string();
    assert!(
        error.contains("unknown key `zzz`; known keys are rank, alpha"),
        "{error}"
    );
}

#[test]
fn every_number_is_bounded() {
    for line in [
        "rank = 0",
        "rank = 1025",
        "rank = -1",
        "rank = 1.5",
        "alpha = 0",
        "alpha = -1",
        "alpha = inf",
        "alpha = nan",
        "learning_rate = 0.0",
        "learning_rate = 11",
        "lora_dropout = 0.95",
        "neftune_noise_alpha = -1",
        "loraplus_lr_ratio = 0",
        "warmup_steps = 10000001",
        "epochs = 0",
        "epochs = 1001",
        "batch_size = 0",
        "batch_size = 5000",
        "accumulation = 0",
        "sequence_length = 1",
        "sequence_length = 9999999",
        "weight_decay = -0.1",
        "beta1 = 1.0",
        "beta2 = -0.5",
        "epsilon = 0",
        "clip_norm = -1",
        "clip_norm = nan",
        "seed = -1",
    ] {
        let key = line.split(' ').next().unwrap();
        let error = changed(line).unwrap_err().to_string();
        assert!(error.contains(key), "{line}: {error}");
    }
    assert!(serde_json::from_str::<Recipe>(&format!("{{\"seed\":{}}}", u64::MAX)).is_err());
}

#[test]
fn one_length_only() {
    assert_eq!(changed("steps = 5").unwrap_err(), RecipeError::TwoLengths);
    let steps = FILE.replace("epochs = 1", "steps = 30");
    assert_eq!(
        Recipe::parse_toml(&steps).unwrap().length,
        Length::Steps(30)
    );
    let neither = Recipe::parse_toml(&FILE.replace("epochs = 1\n", "")).unwrap_err();
    assert_eq!(neither.to_string(), "`epochs` or `steps` is missing");
}

#[test]
fn targets_are_known_unique_and_ordered() {
    assert_eq!(
        changed("target_modules = \"all-linear\"")
            .unwrap()
            .target_modules,
        Target::ALL
    );
    let swapped = changed("target_modules = [\"down_proj\", \"q_proj\"]").unwrap();
    assert_eq!(swapped.target_modules, [Target::Q, Target::Down]);
    for value in [
        "[]",
        "\"q_proj\"",
        "[\"lm_head\"]",
        "[\"q_proj\", \"q_proj\"]",
    ] {
        assert!(
            changed(&format!("target_modules = {value}")).is_err(),
            "{value}"
        );
    }
}

#[test]
fn missing_keys_wrong_types_and_noise_are_errors() {
    for key in [
        "rank",
        "alpha",
        "target_modules",
        "learning_rate",
        "batch_size",
        "sequence_length",
    ] {
        let without: String = FILE
            .lines()
            .filter(|line| !line.starts_with(key))
            .flat_map(|line| [line, "\n"])
            .collect();
        assert_eq!(
            Recipe::parse_toml(&without).unwrap_err(),
            RecipeError::Missing(key)
        );
    }
    let error = changed("quantize = \"int4\"").unwrap_err().to_string();
    assert!(error.contains("none, int8 or nf4"), "{error}");
    for text in [
        "rank = \"eight\"",
        "rank = 8\nrank = 8",
        "=",
        "[recipe]\nrank = 8",
        "schedule = \"step\"",
    ] {
        assert!(Recipe::parse_toml(text).is_err(), "{text}");
    }
    let long = "#".repeat(TOML_BYTES_MAX + 1);
    assert!(matches!(
        Recipe::parse_toml(&long),
        Err(RecipeError::TooLong { .. })
    ));
}

#[test]
fn round_trips_as_toml_and_json() {
    for line in [
        "steps = 7",
        "schedule = \"cosine\"",
        "packing = true",
        "learning_rate = 0.00012345678901234567",
        "use_rslora = true",
        "quantize = \"int8\"",
    ] {
        let text = if line.starts_with("steps") {
            FILE.replace("epochs = 1", line)
        } else {
            format!("{FILE}{line}")
        };
        let text = if line.starts_with("learning") {
            FILE.replace("learning_rate = 1e-3", line)
        } else {
            text
        };
        let recipe = Recipe::parse_toml(&text).unwrap();
        assert_eq!(Recipe::parse_toml(&recipe.to_toml()).unwrap(), recipe);
        if !line.starts_with("learning") {
            let json = serde_json::to_string(&recipe).unwrap();
            assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe);
        }
    }
    let typo = serde_json::to_string(&Recipe::parse_toml(FILE).unwrap())
        .unwrap()
        .replace("\"rank\"", "\"rnk\"");
    assert!(
        serde_json::from_str::<Recipe>(&typo)
            .unwrap_err()
            .to_string()
            .contains("did you mean `rank`?")
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Or the config of an honest adapter would differ from its recipe in the last bit.
    #[test]
    fn an_adapters_config_says_a_recipes_alpha_to_the_bit(alpha in 1e-6_f64..1e3, root in 2_u32..1000) {
        for alpha in [alpha, f64::from(root).sqrt(), f64::from(root) * 1e3] {
            let recipe = changed(&format!("alpha = {alpha:?}")).unwrap();
            prop_assert!((recipe.alpha - alpha).abs() <= 1e-14 * alpha);
            prop_assert_eq!(Recipe::parse_toml(&recipe.to_toml()).unwrap(), recipe.clone());
            let config = PeftConfig {
                rank: 8,
                alpha: recipe.alpha,
                use_rslora: false,
                rank_pattern: Vec::new(),
                alpha_pattern: Vec::new(),
                target_modules: TargetModules::List(Vec::new()),
                some_layers: false,
                base_model: None,
                revision: None,
            };
            let read = PeftConfig::from_json(config.to_json().as_bytes()).unwrap();
            prop_assert_eq!(read.alpha.to_bits(), recipe.alpha.to_bits());
        }
    }
}

#[test]
fn the_page_about_round_files_names_every_key() {
    let page = include_str!("../../docs/round-file.md");
    for key in recipe_keys().chain(crate::round::POLICY_KEYS) {
        assert!(page.contains(&format!("`{key}`")), "{key}");
    }
}
