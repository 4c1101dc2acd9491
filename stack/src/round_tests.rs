use super::*;

const FILE: &str = r#"
model = "tiny"
dataset = "gsm8k"
shards = 8
[recipe]
rank = 8
alpha = 16
target_modules = "all-linear"
learning_rate = 1e-3
epochs = 1
batch_size = 8
sequence_length = 256
[policy]
gate = "gsm8k-gate"
audit = "gsm8k-audit"
aggregation = "stack"
deadline = "2h"
"#;

#[test]
fn reads_the_round_of_the_manual() {
    let round = RoundFile::parse_toml(FILE).unwrap();
    assert_eq!(
        (round.model.as_str(), round.shards, &round.revision),
        ("tiny", 8, &None)
    );
    assert_eq!(
        (round.policy.deadline_ms, round.policy.lease_ms),
        (7_200_000, 600_000)
    );
    assert_eq!(
        (
            round.policy.gate_z,
            round.policy.norm_mad_reject,
            round.policy.norm_mad_hold
        ),
        (2.33, 6.0, 3.5)
    );
    assert_eq!(RoundFile::parse_toml(&round.to_toml()).unwrap(), round);
    let json = serde_json::to_string(&round).unwrap();
    assert_eq!(serde_json::from_str::<RoundFile>(&json).unwrap(), round);
}

#[test]
fn keys_are_known_at_every_level() {
    for (old, new, nearest) in [
        ("dataset =", "datset =", "dataset"),
        ("rank =", "rnk =", "rank"),
        ("deadline =", "dedline =", "deadline"),
        ("[policy]", "[policies]", "policy"),
    ] {
        let error = RoundFile::parse_toml(&FILE.replace(old, new))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&format!("did you mean `{nearest}`?")),
            "{error}"
        );
    }
}

#[test]
fn values_are_checked() {
    for (old, new, says) in [
        ("shards = 8", "shards = 0", "shards"),
        ("\"2h\"", "\"two hours\"", "duration"),
        ("\"2h\"", "\"10ms\"", "from 1s to 60d"),
        ("\"2h\"", "7200", "string"),
        ("\"stack\"", "\"fedavg\"", "one of stack, fedex"),
        ("gsm8k-gate", "gsm8k", "does not train on"),
        ("gsm8k-audit", "gsm8k-gate", "never decides"),
        ("\"tiny\"", "\"../tiny\"", "a name has"),
        ("\"tiny\"", "\"\"", "a name has"),
        ("gate = \"gsm8k-gate\"", "", "`gate` is missing"),
        (
            "deadline = \"2h\"",
            "deadline = \"2h\"\nnorm_mad_hold = 7.0",
            "norm_mad_hold",
        ),
        (
            "deadline = \"2h\"",
            "deadline = \"2h\"\ngate_z = nan",
            "gate_z",
        ),
        (
            "deadline = \"2h\"",
            "deadline = \"2h\"\nlease = \"2d\"",
            "from 1s to 1d",
        ),
        (
            "deadline = \"2h\"",
            "deadline = \"2h\"\nmin_cohort = 1",
            "min_cohort",
        ),
    ] {
        let error = RoundFile::parse_toml(&FILE.replace(old, new))
            .unwrap_err()
            .to_string();
        assert!(error.contains(says), "{new}: {error}");
    }
}

#[test]
fn names_are_safe_paths() {
    for good in ["tiny", "org/tiny-1.5B_v2", "0"] {
        assert!(name("model", good.to_owned()).is_ok(), "{good}");
    }
    for bad in [
        "a/b/c",
        "/a",
        "a/",
        ".a",
        "a/..",
        "-a",
        "a b",
        "é",
        "a\0",
        &"x".repeat(97),
    ] {
        assert!(name("model", bad.to_owned()).is_err(), "{bad:?}");
    }
}
