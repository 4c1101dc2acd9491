use super::*;
use crate::memory::Limit;

/// Llama 2 7B.
fn seven_billion() -> ModelConfig {
    let json = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": false,
    });
    ModelConfig::from_json(json.to_string().as_bytes()).unwrap()
}

fn recipe(lines: &str) -> Recipe {
    Recipe::parse_toml(&format!(
        "rank = 8\nalpha = 16\ntarget_modules = \"all-linear\"\nlearning_rate = 1e-4\nsteps = 1\n{lines}"
    ))
    .unwrap()
}

fn frozen(config: &ModelConfig) -> Frozen<'_> {
    Frozen::new(config, Numbers::Halves, DeviceName::Flex)
}

fn machine(gib: f64) -> Option<Memory> {
    Some(Memory {
        available: (gib * f64::from(1 << 30)) as u64,
        held: 20 << 20,
        limit: Limit::Machine,
    })
}

#[test]
fn a_large_model_fits_a_small_machine_in_four_bits_and_the_error_says_so() {
    let config = seven_billion();
    let recipe_of = |quantize: &str| {
        recipe(&format!(
            "batch_size = 1\nsequence_length = 512\nquantize = \"{quantize}\""
        ))
    };
    let error = plan(frozen(&config), &recipe_of("none"), machine(8.0)).unwrap_err();
    assert!(error.needs > 12 << 30, "{error}");
    let (change, needs) = error.change.clone().unwrap();
    assert_eq!(change, "quantize = \"nf4\"");
    assert!(needs < 8 << 30);
    assert_eq!(
        error.to_string(),
        "needs 14.0 GiB, 8.0 GiB are free in this machine; with quantize = \"nf4\" 4.6 GiB"
    );

    let fits = plan(frozen(&config), &recipe_of("nf4"), machine(8.0)).unwrap();
    assert_eq!(fits.passes.rows, 1);
    assert!(plan(frozen(&config), &recipe_of("int8"), machine(8.0)).is_err());
    assert!(plan(frozen(&config), &recipe_of("int8"), machine(16.0)).is_ok());
}

#[test]
fn less_is_kept_before_a_batch_is_cut_and_nothing_before_it_must() {
    let config = seven_billion();
    let recipe = recipe("batch_size = 8\nsequence_length = 512\nquantize = \"nf4\"");
    let passes = |gib| plan(frozen(&config), &recipe, machine(gib)).map(|plan| plan.passes);
    assert_eq!(passes(200.0), Ok(Passes::whole(8)));
    let keep = Keep::Inputs;
    assert_eq!(passes(30.0), Ok(Passes { rows: 8, keep }));
    let rows: Vec<usize> = (40..300)
        .filter_map(|tenths| passes(f64::from(tenths) / 10.0).ok())
        .map(|passes| passes.rows)
        .collect();
    assert!(rows.is_sorted(), "{rows:?}");
    assert!(
        rows.first() < Some(&8) && rows.last() == Some(&8),
        "{rows:?}"
    );
    let unknown = plan(frozen(&config), &recipe, None).unwrap();
    assert_eq!(unknown.passes, Passes::whole(8));
}

#[test]
fn shorter_sequences_are_offered_where_bits_do_not_help() {
    let config = seven_billion();
    let recipe = recipe("batch_size = 1\nsequence_length = 4096\nquantize = \"nf4\"");
    let error = plan(frozen(&config), &recipe, machine(7.0)).unwrap_err();
    let (change, _) = error.change.unwrap();
    assert!(change.starts_with("sequence_length = "), "{change}");
    let error = plan(frozen(&config), &recipe, machine(2.0)).unwrap_err();
    assert_eq!(error.change, None);
    assert!(error.to_string().ends_with("no setting would make it fit"));
}

#[test]
fn an_evaluation_needs_the_model_as_it_is() {
    let config = seven_billion();
    let plan =
        |quantize, memory| plan_evaluation(frozen(&config), quantize, &Quantize::ALL, memory);
    let error = plan(Quantize::None, machine(12.0)).unwrap_err();
    assert!(
        error.to_string().contains("; with --quantize int8"),
        "{error}"
    );
    assert!(plan(Quantize::Int8, machine(12.0)).is_ok());
    assert!(plan(Quantize::None, machine(16.0)).is_ok());
    assert!(plan(Quantize::None, None).is_ok());
    let error = plan(Quantize::None, machine(1.0)).unwrap_err();
    assert!(error.to_string().contains("no setting"), "{error}");
}

#[test]
fn files_say_how_numbers_are_kept() {
    let config = seven_billion();
    let of =
        |json: &str, bytes: u64, device| Numbers::of_files(&config, json.as_bytes(), bytes, device);
    let (half, whole) = (13_476_839_424, 26_953_678_848);
    assert_eq!(of("{}", half, DeviceName::Flex), Numbers::Halves);
    assert_eq!(of("{}", whole, DeviceName::Flex), Numbers::Floats);
    assert_eq!(of("{}", half, DeviceName::Cuda(0)), Numbers::Floats);
    for key in ["torch_dtype", "dtype"] {
        let float16 = format!("{{\"{key}\": \"float16\"}}");
        assert_eq!(of(&float16, half, DeviceName::Flex), Numbers::Floats);
    }
}

#[test]
fn plans_are_printed_in_words_and_in_json() {
    let config = seven_billion();
    let recipe =
        recipe("batch_size = 32\nsequence_length = 512\naccumulation = 2\nquantize = \"nf4\"");
    let found = plan(frozen(&config), &recipe, machine(8.0)).unwrap();
    let text = found.to_string();
    assert!(
        text.contains("of 8.0 GiB in this machine: weights 3."),
        "{text}"
    );
    assert!(
        text.ends_with("of 32 rows a pass, blocks are computed again on the way back"),
        "{text}"
    );
    let value = found.to_json();
    assert_eq!(value["fits"], true);
    assert_eq!(
        (
            &value["batch_size"],
            &value["accumulation"],
            &value["quantize"],
            &value["keep"]
        ),
        (&json!(32), &json!(2), &json!("nf4"), &json!("inputs"))
    );
    let error = plan(frozen(&config), &recipe, machine(3.0)).unwrap_err();
    assert_eq!(error.to_json()["fits"], false);
}
