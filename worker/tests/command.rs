//! The commands `train` and `evaluate` as the outside sees them: JSON, exit codes, kill -9.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use cairn_worker::device::DeviceName;
use common::reference;
use serde_json::{Value, json};

/// A model folder with a word-level tokenizer, data and a recipe, in a temporary folder.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new(recipe: &str) -> Self {
        let desk = Self(tempfile::tempdir().unwrap());
        let model = desk.path("model");
        fs::create_dir(&model).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(
                reference().join("models/llama-default").join(file),
                model.join(file),
            )
            .unwrap();
        }
        fs::write(model.join("tokenizer.json"), tokenizer().to_string()).unwrap();
        let record = |n: usize| {
            let words: Vec<String> = (0..12 + n % 5)
                .map(|t| format!("w{}", (7 * n + 3 * t) % 64))
                .collect();
            json!({"text": words.join(" ")}).to_string() + "\n"
        };
        fs::write(
            desk.path("data.jsonl"),
            (0..24).map(record).collect::<String>(),
        )
        .unwrap();
        let standard = "rank = 2\nalpha = 4\ntarget_modules = [\"q_proj\", \"v_proj\"]\nlearning_rate = 0.01\n\
            batch_size = 4\nsequence_length = 14\nseed = 1\n";
        fs::write(desk.path("recipe.toml"), format!("{standard}{recipe}")).unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, name: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cairn-worker"));
        command.arg(name).arg("--model").arg(self.path("model"));
        command
            .arg("--data")
            .arg(self.path("data.jsonl"))
            .args(more);
        command.arg("--device").arg(common::device().to_string());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn train(&self, out: &str, more: &[&str]) -> Command {
        let mut command = self.command("train", more);
        command
            .arg("--recipe")
            .arg(self.path("recipe.toml"))
            .arg("--out")
            .arg(self.path(out));
        command
    }
}

fn tokenizer() -> Value {
    let words: serde_json::Map<String, Value> =
        (0..64).map(|n| (format!("w{n}"), n.into())).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    })
}

fn json_of(output: &Output) -> Value {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn train_and_evaluate_print_the_contracts_json() {
    let desk = Desk::new("epochs = 4\n");
    let trained = json_of(&desk.train("out", &["--json"]).output().unwrap());
    let keys: Vec<&str> = trained
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "steps",
            "tokens",
            "scored_tokens",
            "seconds",
            "tokens_per_second",
            "first_loss",
            "last_loss",
            "peak_rss_bytes",
            "device",
            "adapter_blake3"
        ]
    );
    assert_eq!(trained["steps"], 24);
    assert!(trained["last_loss"].as_f64() < trained["first_loss"].as_f64());

    let adapter = format!("{}:0.5", desk.path("out").display());
    let plain = json_of(
        &desk
            .command("evaluate", &["--json", "--sequence-length", "14"])
            .output()
            .unwrap(),
    );
    let more = ["--json", "--sequence-length", "14", "--adapter", &adapter];
    let scored = json_of(&desk.command("evaluate", &more).output().unwrap());
    let keys: Vec<&str> = scored
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "loss",
            "tokens",
            "examples",
            "cut",
            "seconds",
            "per_example"
        ]
    );
    assert_eq!(scored["examples"], 24);
    assert_eq!(scored["cut"], 9);
    let examples = scored["per_example"].as_array().unwrap();
    let sum = |key: &str| {
        examples
            .iter()
            .map(|example| example[key].as_f64().unwrap())
            .sum::<f64>()
    };
    assert_eq!(Some(sum("tokens")), scored["tokens"].as_f64());
    assert!((sum("nll") / sum("tokens") - scored["loss"].as_f64().unwrap()).abs() < 1e-9);
    assert!(scored["loss"].as_f64() < plain["loss"].as_f64());
}

/// Preferences for counting on by three over standing still.
fn preferences(desk: &Desk) {
    let words = |of: &dyn Fn(usize) -> usize| -> String {
        let words: Vec<String> = (0..4).map(|t| format!("w{}", 2 + of(t) % 62)).collect();
        words.join(" ")
    };
    let record = |n: usize| {
        let (prompt, chosen) = (words(&|t| 7 * n + 3 * t), words(&|t| 7 * n + 3 * (t + 4)));
        let rejected = words(&|_| 7 * n);
        json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}).to_string() + "\n"
    };
    let lines: String = (0..24).map(record).collect();
    fs::write(desk.path("data.jsonl"), lines).unwrap();
    let config = json!({"eos_token": "w1"}).to_string();
    fs::write(desk.path("model/tokenizer_config.json"), config).unwrap();
}

#[test]
fn preferences_are_learnt_and_scored_offline() {
    let desk = Desk::new("epochs = 6\nobjective = \"dpo\"\n");
    preferences(&desk);
    let trained = json_of(&desk.train("out", &["--json"]).output().unwrap());
    assert_eq!(trained["first_loss"], std::f64::consts::LN_2);
    assert!(trained["last_loss"].as_f64().unwrap() < 0.6, "{trained}");
    assert!(
        trained["rewards/accuracies"].as_f64().unwrap() > 0.5,
        "{trained}"
    );
    assert!(
        trained["rewards/margins"].as_f64().unwrap() > 0.0,
        "{trained}"
    );

    let adapter = desk.path("out").display().to_string();
    let base = json_of(&desk.command("evaluate", &["--json"]).output().unwrap());
    let more = ["--json", "--adapter", &adapter];
    let scored = json_of(&desk.command("evaluate", &more).output().unwrap());
    for report in [&base, &scored] {
        assert_eq!(
            (&report["examples"], &report["tokens"]),
            (&json!(24), &json!(24))
        );
    }
    assert_eq!(base["loss"], std::f64::consts::LN_2);
    assert!(scored["loss"].as_f64().unwrap() < 0.6, "{scored}");
    assert!(
        scored["rewards/accuracies"].as_f64().unwrap() > 0.5,
        "{scored}"
    );
    let more = [&more[..], &["--dpo-beta", "0.2"]].concat();
    let stronger = json_of(&desk.command("evaluate", &more).output().unwrap());
    let margin = |report: &Value| report["rewards/margins"].as_f64().unwrap();
    assert!((margin(&stronger) - 2.0 * margin(&scored)).abs() < 1e-9);

    let desk = Desk::new("epochs = 1\n");
    preferences(&desk);
    let refused = desk.train("out", &[]).output().unwrap();
    let says = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && says.contains("objective = \"dpo\""),
        "{says}"
    );
}

#[test]
fn a_teacher_has_the_same_tokenizer_and_something_to_teach() {
    let desk = Desk::new("epochs = 2\nobjective = \"distill\"\ndistill_top_k = 8\n");
    let teacher = desk.path("teacher");
    fs::create_dir(&teacher).unwrap();
    for file in ["config.json", "model.safetensors"] {
        let from = reference().join("models/qwen2-tied").join(file);
        fs::copy(from, teacher.join(file)).unwrap();
    }
    fs::copy(
        desk.path("model/tokenizer.json"),
        teacher.join("tokenizer.json"),
    )
    .unwrap();
    let more = ["--json", "--teacher", teacher.to_str().unwrap()];
    let trained = json_of(&desk.train("out", &more).output().unwrap());
    assert!(
        trained["last_loss"].as_f64() < trained["first_loss"].as_f64(),
        "{trained}"
    );

    let refused = |command: &mut Command, named: &str| {
        let output = command.output().unwrap();
        let says = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && says.contains(named),
            "{named}: {says}"
        );
    };
    refused(&mut desk.train("out", &[]), "--teacher");
    fs::write(teacher.join("tokenizer.json"), "{}").unwrap();
    refused(&mut desk.train("out", &more), "another tokenizer");
    refused(
        &mut Desk::new("epochs = 1\n").train("out", &more),
        "this one has \"sft\"",
    );
}

#[test]
fn the_device_of_choice_is_named_where_it_was_left_to_us() {
    let desk = Desk::new("steps = 2\n");
    let mut train = desk.train("out", &["--json"]);
    // What comes last counts; the environment counts only where nothing was said.
    let mut command = Command::new(train.get_program());
    let args: Vec<_> = train.get_args().collect();
    let named = args.iter().position(|arg| *arg == "--device").unwrap();
    command.args(&args[..named]).args(&args[named + 2..]);
    command.env("CAIRN_DEVICE", "auto");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let chosen = json_of(&command.output().unwrap());
    if DeviceName::built_in().len() == 1 {
        assert_eq!(chosen["device"], common::device().to_string());
        let named = json_of(&train.output().unwrap());
        assert_eq!(chosen["adapter_blake3"], named["adapter_blake3"]);
    }
    assert_ne!(chosen["device"], "auto");
    let missing = DeviceName::Metal;
    if !missing.is_built_in() {
        command.env("CAIRN_DEVICE", missing.to_string());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("built without `metal`"), "{said}");
    }
}

#[test]
fn kill_9_costs_nothing() {
    let desk = Desk::new("steps = 400\npacking = true\nschedule = \"cosine\"\n");
    let whole = json_of(&desk.train("whole", &["--json"]).output().unwrap());
    let often = [
        "--json",
        "--checkpoint-steps",
        "1",
        "--checkpoint-seconds",
        "1000",
    ];
    let checkpoint = desk.path("parts/.training/training.safetensors");
    let mut child = desk.train("parts", &often).spawn().unwrap();
    while !checkpoint.exists() {
        assert_eq!(
            child.try_wait().unwrap(),
            None,
            "it ended before its first checkpoint"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!desk.path("parts/adapter_model.safetensors").exists());
    let output = desk.train("parts", &often).output().unwrap();
    let resumed = json_of(&output);
    assert!(
        String::from_utf8_lossy(&output.stderr)
            .contains("going on from the local checkpoint at step")
    );
    assert_eq!(resumed["adapter_blake3"], whole["adapter_blake3"]);
    assert_eq!(weights(&desk.path("whole")), weights(&desk.path("parts")));
    assert_eq!(resumed["tokens"], whole["tokens"]);
    assert!(!checkpoint.exists());
}

#[test]
#[cfg(unix)]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let desk = Desk::new("steps = 100000\n");
    let args = ["--checkpoint-steps", "2", "--checkpoint-seconds", "1000"];
    let mut child = desk.train("out", &args).spawn().unwrap();
    let checkpoint = desk.path("out/.training/training.safetensors");
    while !checkpoint.exists() {
        assert_eq!(child.try_wait().unwrap(), None);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(
        Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("the same command goes on from there"),
        "{text}"
    );
    assert!(checkpoint.exists());
}

#[test]
fn bad_input_has_a_clear_error() {
    let desk = Desk::new("steps = 2\n");
    let fails = |what: &str, command: &mut Command| {
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(what), "expected {what:?} in {text:?}");
        assert!(!text.contains("panicked"), "{text}");
    };
    let good = fs::read(desk.path("data.jsonl")).unwrap();
    fs::write(
        desk.path("data.jsonl"),
        "{\"text\": \"w1 w2\"}\n{\"text\": oops}\n",
    )
    .unwrap();
    fails(":2", &mut desk.train("out", &[]));
    fs::write(desk.path("data.jsonl"), "").unwrap();
    fails("holds no record", &mut desk.train("out", &[]));
    fs::write(desk.path("data.jsonl"), good).unwrap();

    let recipe = fs::read_to_string(desk.path("recipe.toml")).unwrap();
    fs::write(
        desk.path("recipe.toml"),
        recipe.replace("learning_rate", "learning_rat"),
    )
    .unwrap();
    fails("learning_rate", &mut desk.train("out", &[]));
    fs::write(desk.path("recipe.toml"), recipe.replace("= 14", "= 4096")).unwrap();
    fails(
        "beyond the model's 64 positions",
        &mut desk.train("out", &[]),
    );
    fs::write(desk.path("recipe.toml"), recipe).unwrap();

    let weights = desk.path("model/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    fails("model.safetensors", &mut desk.train("out", &[]));
    fs::remove_file(&weights).unwrap();
    fails("model.safetensors", &mut desk.command("evaluate", &[]));
    fs::write(&weights, bytes).unwrap();

    let config = fs::read_to_string(desk.path("model/config.json")).unwrap();
    fs::write(
        desk.path("model/config.json"),
        config.replace("\"silu\"", "\"gelu\""),
    )
    .unwrap();
    fs::remove_file(&weights).unwrap();
    fails(
        "unsupported model: hidden_act",
        &mut desk.command("evaluate", &[]),
    );
    assert!(!desk.path("out").exists());
}
