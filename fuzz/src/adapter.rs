//! A submitted adapter: flags, `adapter_config.json`, and the weight file.

use std::fs;
use std::sync::LazyLock;

use cairn_stack::adapter::{
    AdapterFile, AdapterSpec, AdapterWriteConfig, Pair, WEIGHTS_FILE, check_adapter, write_adapter,
};
use cairn_stack::algebra;
use cairn_stack::check::DELTA_NORM_MIN;
use cairn_stack::config::ModelConfig;
use cairn_stack::recipe::Recipe;

use crate::input::{FITTED, Input, join, split};
use crate::{assert_short, checkpoint, scratch};

const RECIPE: &str = "rank = 2\nalpha = 4\ntarget_modules = [\"q_proj\", \"down_proj\"]\n\
learning_rate = 1e-3\nepochs = 1\nbatch_size = 1\nsequence_length = 8\n";

static SPEC: LazyLock<(AdapterSpec, Recipe)> = LazyLock::new(|| {
    let model = ModelConfig::from_json(checkpoint::CONFIG.as_bytes()).expect("a supported model");
    let recipe = Recipe::parse_toml(RECIPE).expect("a sound recipe");
    (AdapterSpec::new(&model, &recipe), recipe)
});

/// What passes the check is what the recipe asked for, reads as finite numbers and is written to
/// the same factors again; what does not is the sender's fault, in a short text.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.byte();
    let config = input.text();
    let file = scratch::folder("adapter").join(WEIGHTS_FILE);
    scratch::write(&file, &input.safetensors(flags));
    let (spec, recipe) = &*SPEC;
    match check_adapter(&file, config, spec) {
        Ok(adapter) => {
            assert_eq!(adapter.modules().len(), spec.pairs.len());
            let norm = algebra::norm(&adapter).expect("a checked adapter is readable");
            assert!(norm.is_finite() && norm >= 0.999 * DELTA_NORM_MIN, "{norm}");
            AdapterFile::open_parts(&file, config).expect("a checked adapter opens");
            written_again(&adapter, recipe);
        }
        Err(reject) => {
            assert!(!reject.code.is_fault(), "{reject}");
            assert_short(&reject.text);
        }
    }
    // Without a recipe: what `cairn fold` reads.
    if let Ok(adapter) = AdapterFile::open_parts(&file, config) {
        algebra::module_norms(&adapter).expect("an open adapter is readable");
        let inner = algebra::inner_adapters(&adapter, &adapter).expect("it has its own shapes");
        assert!(inner.is_nan() || inner >= 0.0, "{inner}");
    }
}

fn written_again(adapter: &AdapterFile, recipe: &Recipe) {
    let pairs = adapter.pairs().expect("a checked adapter is readable");
    let folder = scratch::folder("again");
    let config = AdapterWriteConfig::of_recipe(recipe, None, None);
    write_adapter(&folder, &pairs, &config).expect("the folder is writable");
    let again = AdapterFile::open(&folder).expect("what we write opens");
    for (index, pair) in pairs.iter().enumerate() {
        let read = again.pair(index).expect("what we write is readable");
        assert_eq!(read, *pair);
    }
}

/// An honest adapter, fitted and as a plain file, and one whose config has patterns.
pub fn seeds() -> Vec<Vec<u8>> {
    let (spec, recipe) = &*SPEC;
    let pair = |module: &str, out_features: usize, in_features: usize, rank: usize, scale: f64| {
        let numbers = |count: usize| (0..count).map(|i| (i % 7) as f32 / 4.0 - 0.5).collect();
        Pair {
            module: module.to_owned(),
            rank,
            in_features,
            out_features,
            a: numbers(rank * in_features),
            b: numbers(rank * out_features),
            scale,
        }
    };
    let honest: Vec<Pair> = spec
        .pairs
        .iter()
        .map(|p| {
            pair(
                &p.module,
                p.out_features,
                p.in_features,
                spec.rank,
                spec.scale,
            )
        })
        .collect();
    let odd = [pair("l.q", 3, 2, 1, 0.5), pair("l.k", 2, 2, 2, 2.0)];
    let config = AdapterWriteConfig::of_recipe(recipe, Some("tiny"), Some("main"));
    let mut seeds = Vec::new();
    for pairs in [&honest[..], &odd] {
        let folder = scratch::folder("seed");
        write_adapter(&folder, pairs, &config).expect("the folder is writable");
        let json = fs::read(folder.join("adapter_config.json")).expect("it was written");
        let file = fs::read(folder.join(WEIGHTS_FILE)).expect("it was written");
        let (header, body) = split(&file);
        seeds.push(join(FITTED, &[&json, header], body));
        seeds.push(join(0, &[&json], &file));
    }
    seeds
}
