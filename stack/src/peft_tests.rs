use super::*;

const PLAIN: &str = r#"{"peft_type":"LORA","r":8,"lora_alpha":16,"target_modules":["q_proj"]}"#;

fn with(key: &str, value: &str) -> Result<PeftConfig, PeftConfigError> {
    let rest = PLAIN.trim_end_matches('}');
    PeftConfig::from_json(format!("{rest},\"{key}\":{value}}}").as_bytes())
}

#[test]
fn reads_and_writes() {
    let config = with("rank_pattern", r#"{"k_proj":2}"#).unwrap();
    assert_eq!(
        (config.rank, config.alpha, config.use_rslora),
        (8, 16.0, false)
    );
    assert_eq!(
        PeftConfig::from_json(config.to_json().as_bytes()).unwrap(),
        config
    );
    assert!(config.to_json().contains("\"lora_alpha\": 16,"));
    let odd = PeftConfig {
        alpha: 0.1,
        ..config
    };
    assert_eq!(
        PeftConfig::from_json(odd.to_json().as_bytes()).unwrap(),
        odd
    );
}

#[test]
fn variants_are_refused_by_name() {
    for (key, value, says) in [
        ("use_dora", "true", "DoRA"),
        ("bias", "\"all\"", "biases"),
        ("bias", "\"lora_only\"", "biases"),
        ("lora_bias", "true", "biases"),
        ("modules_to_save", "[\"lm_head\"]", "modules_to_save"),
        ("fan_in_fan_out", "true", "fan_in_fan_out"),
        ("init_lora_weights", "\"pissa\"", "changed base weights"),
        ("init_lora_weights", "\"olora\"", "changed base weights"),
        ("layer_replication", "[[0,4]]", "layer_replication"),
        ("target_parameters", "[\"x\"]", "target_parameters"),
        ("trainable_token_indices", "[1]", "trainable_token_indices"),
        ("use_qalora", "true", "use_qalora"),
        ("arrow_config", "{\"a\":1}", "arrow_config"),
        ("task_type", "\"SEQ_CLS\"", "task_type"),
        ("next_years_variant", "true", "next_years_variant"),
    ] {
        let error = with(key, value).unwrap_err();
        assert!(
            matches!(error, PeftConfigError::Unsupported { .. }),
            "{key}: {error}"
        );
        assert!(error.to_string().contains(says), "{key}: {error}");
    }
    for (key, value) in [
        ("use_dora", "false"),
        ("bias", "\"none\""),
        ("modules_to_save", "null"),
        ("modules_to_save", "[]"),
        ("init_lora_weights", "true"),
        ("init_lora_weights", "\"gaussian\""),
        ("loftq_config", "{}"),
        ("next_years_variant", "null"),
        ("lora_dropout", "0.1"),
        ("peft_version", "\"0.21.2\""),
        ("task_type", "\"CAUSAL_LM\""),
    ] {
        with(key, value).unwrap_or_else(|error| panic!("{key}: {error}"));
    }
    for (old, new, says) in [
        ("\"LORA\"", "\"IA3\"", "only LORA"),
        ("\"peft_type\":\"LORA\",", "", "`peft_type` is missing"),
        ("\"r\":8", "\"r\":0", "`r` must"),
        ("\"r\":8", "\"r\":8.5", "`r` must"),
        (
            "\"lora_alpha\":16",
            "\"lora_alpha\":-1",
            "`lora_alpha` must",
        ),
        (
            "\"lora_alpha\":16",
            "\"lora_alpha\":\"16\"",
            "`lora_alpha` must",
        ),
        ("[\"q_proj\"]", "[1]", "`target_modules`"),
        ("\"r\":8", "\"r\":8,\"r\":8", "twice"),
    ] {
        let error = PeftConfig::from_json(PLAIN.replace(old, new).as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.contains(says), "{error}");
    }
    assert!(PeftConfig::from_json(&vec![b' '; CONFIG_BYTES_MAX + 1]).is_err());
    assert!(PeftConfig::from_json(b"[]").is_err());
}

#[test]
fn patterns_follow_pefts_rule() {
    let config = PeftConfig {
        rank: 8,
        alpha: 16.0,
        use_rslora: false,
        rank_pattern: vec![
            ("layers.1.self_attn.q_proj".to_owned(), 1),
            ("q_proj".to_owned(), 3),
            (r"mlp\.(gate|up)_proj".to_owned(), 2),
            ("^model.norm".to_owned(), 5),
        ],
        alpha_pattern: vec![("down_proj|up_proj".to_owned(), 1.0)],
        target_modules: TargetModules::List(vec![]),
        some_layers: false,
        base_model: None,
        revision: None,
    };
    let scales = Scales::new(&config).unwrap();
    for (module, rank, scale) in [
        ("model.layers.1.self_attn.q_proj", 1, 16.0),
        ("model.layers.0.self_attn.q_proj", 3, 16.0 / 3.0),
        ("model.layers.11.self_attn.q_proj", 3, 16.0 / 3.0),
        ("q_proj", 3, 16.0 / 3.0),
        ("model.layers.0.self_attn.xq_proj", 8, 2.0),
        ("model.layers.0.self_attn.q_proj.x", 8, 2.0),
        ("model.layers.0.mlp.up_proj", 2, 0.5),
        ("model.layers.0.mlp.down_proj", 8, 0.125),
    ] {
        assert_eq!(scales.of(module), (rank, scale), "{module}");
    }
    let rslora = PeftConfig {
        use_rslora: true,
        ..config
    };
    assert_eq!(
        Scales::new(&rslora).unwrap().of("k_proj").1,
        16.0 / 8.0_f64.sqrt()
    );
}

#[test]
fn hostile_patterns_are_refused() {
    for pattern in [r"(\\w{999}){999}", "(", "(?=x)", &"x".repeat(600)] {
        let config = with("rank_pattern", &format!("{{\"{pattern}\":2}}"));
        assert!(
            config.is_err() || Scales::new(&config.unwrap()).is_err(),
            "{pattern}"
        );
    }
    let many: Vec<String> = (0..=PATTERNS_MAX).map(|i| format!("\"m{i}\":2")).collect();
    assert!(with("alpha_pattern", &format!("{{{}}}", many.join(","))).is_err());
    assert!(with("rank_pattern", "{\"q_proj\":0}").is_err());
    assert!(with("rank_pattern", "[1]").is_err());
}

#[test]
fn names_split_and_join() {
    for factor in [Factor::A, Factor::B] {
        let name = tensor_name("model.layers.0.mlp.up_proj", factor);
        assert_eq!(
            split_tensor_name(&name),
            Some(("model.layers.0.mlp.up_proj", factor))
        );
    }
    for name in [
        "lora_A.weight",
        "base_model.model..lora_A.weight",
        "base_model.model.x.lora_A.default.weight",
        "base_model.model.x.lora_magnitude_vector",
    ] {
        assert_eq!(split_tensor_name(name), None, "{name}");
    }
}
