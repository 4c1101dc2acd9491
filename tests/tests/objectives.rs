//! Three objectives on one model, by the built programs: a round of texts, one of preferences, one that
//! learns from an earlier revision; each judged, audited, stacked and folded by the same machinery.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use cairn_stack::adapter::{CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::recipe::Recipe;
use cairn_stack::records::{Format, Record, read_records};
use cairn_tests::adapters::Adapter;
use cairn_tests::member::Member;
use cairn_tests::process::{Server, built, join_url, member};
use cairn_tests::stranger::{Stranger, succeeded};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a round may take, on a machine that does much else.
const ROUND_TIMEOUT: Duration = Duration::from_mins(10);
/// How often a round is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// The demo's model and data, which this project made.
fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../cli/demo")
        .join(name)
}

/// A running `cairn-worker`; killed when dropped.
struct Worker {
    home: PathBuf,
    child: Child,
}

impl Worker {
    fn start(data: &Path, role: &str, home: PathBuf) -> Result<Self> {
        let url = join_url(data, role, &[])?.secret_text();
        let command = || -> Result<Command> {
            let mut command = Command::new(built("cairn-worker", "cairn-worker")?);
            command.env_clear().env("CAIRN_HOME", &home);
            Ok(command)
        };
        succeeded(command()?.args(["join", &url, "--name", role]).output()?)?;
        let log = fs::File::create(home.join("log"))?;
        let child = command()?
            .args(["run", "--threads", "1"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        Ok(Self { home, child })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.home.join("log")).unwrap_or_default()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A coordinator, its maintainer with a folder, and its machines.
struct World {
    server: Server,
    maintainer: Stranger,
    machines: Vec<Worker>,
    cheat: Member,
    folder: TempDir,
}

impl World {
    async fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let data = folder.path().join("data");
        let server = Server::start(&data, "127.0.0.1:0", &[])?;
        let url = join_url(&data, "maintainer", &[])?.secret_text();
        let maintainer = Stranger::log_in(folder.path().join("maintainer"), &url)?;
        let cheat = member(&data, "volunteer", "mallory").await?;
        Ok(Self {
            server,
            maintainer,
            machines: Vec::new(),
            cheat,
            folder,
        })
    }

    /// Lets the machines work: those that only one of the rounds is for come later.
    fn employ(&mut self, role: &str) -> Result<()> {
        let home = self.folder.path().join(role);
        let data = self.folder.path().join("data");
        self.machines.push(Worker::start(&data, role, home)?);
        Ok(())
    }

    /// Adds a dataset of these records.
    fn add(&self, name: &str, set: &str, records: &[Record]) -> Result<Value> {
        let lines: Vec<String> = records.iter().map(|r| r.to_json_line() + "\n").collect();
        let file = format!("{name}.jsonl");
        fs::write(self.maintainer.folder().join(&file), lines.concat())?;
        let arguments = ["dataset", "add", &file, "--name", name, "--set", set];
        let rest = ["--license", "MIT", "--drop-overlap", "--json"];
        self.maintainer.json(&[&arguments[..], &rest].concat())
    }

    fn create(&self, round_file: &str) -> Result<String> {
        fs::write(self.maintainer.folder().join("round.toml"), round_file)?;
        let made = self
            .maintainer
            .json(&["round", "create", "round.toml", "--json"])?;
        Ok(made["id"].as_str().context("an id")?.to_owned())
    }

    /// What the maintainer is told of a round that is refused.
    fn refused(&self, round_file: &str) -> Result<String> {
        fs::write(self.maintainer.folder().join("round.toml"), round_file)?;
        let output = self.maintainer.cairn(&["round", "create", "round.toml"])?;
        ensure!(!output.status.success(), "it was taken:\n{round_file}");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn show(&self, round: &str) -> Result<Value> {
        self.maintainer.json(&["round", "show", round, "--json"])
    }

    /// Waits until the round has what is asked for.
    async fn until(&self, round: &str, what: impl Fn(&Value) -> bool) -> Result<Value> {
        let wait = async {
            loop {
                let view = self.show(round)?;
                if what(&view) {
                    return anyhow::Ok(view);
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        match tokio::time::timeout(ROUND_TIMEOUT, wait).await {
            Ok(view) => view,
            Err(_) => bail!("{}\n{}", self.logs(), self.show(round)?),
        }
    }

    /// Waits for the end, which must be a checkpoint of this revision that anybody verifies and folds
    /// again.
    async fn publishes(&self, round: &str, revision: u32) -> Result<Value> {
        let ended = |view: &Value| {
            ["published", "failed", "aborted"]
                .iter()
                .any(|state| view["state"] == *state)
        };
        let view = self.until(round, ended).await?;
        ensure!(view["state"] == "published", "{view}\n{}", self.logs());
        let name = format!("village@{revision}");
        let folder = format!("village-{revision}");
        succeeded(
            self.maintainer
                .cairn(&["checkpoint", "pull", &name, &folder])?,
        )?;
        succeeded(self.maintainer.cairn(&["checkpoint", "verify", &folder])?)?;
        succeeded(self.maintainer.cairn(&["checkpoint", "reproduce", &name])?)?;
        Ok(view)
    }

    fn logs(&self) -> String {
        let logs = self.machines.iter().map(Worker::log);
        format!("{}\n{}", self.server.log(), logs.collect::<String>())
    }

    /// `cairn-worker evaluate` of a revision.
    fn evaluate(&self, revision: u32, data: &str) -> Result<Value> {
        let folder = self.maintainer.folder();
        let output = Command::new(built("cairn-worker", "cairn-worker")?)
            .args(["evaluate", "--json", "--model"])
            .arg(folder.join(format!("village-{revision}")))
            .arg("--data")
            .arg(folder.join(data))
            .output()?;
        Ok(serde_json::from_slice(&succeeded(output)?)?)
    }
}

fn records(file: &str) -> Vec<Record> {
    let reader = std::io::BufReader::new(fs::File::open(demo(file)).unwrap());
    read_records(reader, Format::Auto, file)
        .map(|found| found.unwrap().1)
        .collect()
}

/// A preference of every text: its own answer over that to another question.
fn preferences(texts: &[Record], swapped: bool) -> Vec<Record> {
    let parts = |record: &Record| match record {
        Record::Pair { prompt, completion } => (prompt.clone(), completion.clone()),
        _ => panic!("the demo's records are prompts with completions"),
    };
    let following = texts.iter().cycle().skip(1);
    let pairs = texts.iter().zip(following).map(|(own, other)| {
        let ((prompt, own), (_, other)) = (parts(own), parts(other));
        let (chosen, rejected) = if swapped { (other, own) } else { (own, other) };
        json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}).to_string()
    });
    // Where both have the same answer there is nothing to prefer.
    pairs
        .filter_map(|line| Record::from_json_line(&line).ok())
        .collect()
}

fn recipe(lines: &str) -> String {
    format!(
        "rank = 8\nalpha = 16\ntarget_modules = \"all-linear\"\nlearning_rate = 1.5e-3\n\
         warmup_steps = 2\nepochs = 1\nbatch_size = 8\nsequence_length = 128\n{lines}\n"
    )
}

/// A round whose every shard is audited and guided.
fn round_file(dataset: &str, gate: &str, shards: u32, lines: &str) -> String {
    format!(
        "model = \"village\"\ndataset = \"{dataset}\"\nshards = {shards}\n[recipe]\n{}\
         [policy]\ngate = \"{gate}\"\nguards = [\"dev\"]\nguard_z = 100\ndeadline = \"1h\"\n\
         segments = 3\naudit_first = 100\nguide_steps = 2\nguide_cosine = -1.0\n",
        recipe(lines)
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_preferences_and_a_teacher_stack_on_one_model() {
    let mut world = World::start().await.unwrap();
    let base = demo("base");
    let name = ["--name", "village"];
    let added = [&["model", "add", base.to_str().unwrap()][..], &name].concat();
    succeeded(world.maintainer.cairn(&added).unwrap()).unwrap();
    let (train, gate) = (records("train.jsonl"), records("gate.jsonl"));
    world.add("texts", "train", &train[..1200]).unwrap();
    world.add("more", "train", &train[1200..1600]).unwrap();
    world.add("texts-gate", "gate", &gate[..60]).unwrap();
    world.add("dev", "dev", &gate[120..]).unwrap();
    let pairs = preferences(&train[1600..2100], false);
    world.add("pairs", "train", &pairs).unwrap();
    world
        .add("pairs-gate", "gate", &preferences(&gate[60..120], false))
        .unwrap();

    refusals(&world, &train[..2], &pairs[..2]).await.unwrap();
    world.employ("evaluator").unwrap();

    // Texts.
    world.employ("volunteer").unwrap();
    let round = world
        .create(&round_file("texts", "texts-gate", 2, ""))
        .unwrap();
    let first = world.publishes(&round, 1).await.unwrap();
    assert!(
        loss(&first, "gate_loss_after") < loss(&first, "gate_loss_before") - 1.0,
        "{first}"
    );
    world.machines.pop();

    // Preferences. A cheat is there before the honest: she trains on them the wrong way round.
    let lines = "objective = \"dpo\"\ndpo_beta = 0.2\nseed = 2";
    let round = world
        .create(&round_file("pairs", "pairs-gate", 1, lines))
        .unwrap();
    let verdict = cheated(&world, &round, lines, &train[1600..2100])
        .await
        .unwrap();
    assert_eq!(verdict["reason"], "NO_GAIN", "{verdict}");
    world.machines.push(resumed(&world).unwrap());
    let second = world.publishes(&round, 2).await.unwrap();
    assert!((loss(&second, "gate_loss_before") - std::f64::consts::LN_2).abs() < 1e-6);
    assert!(loss(&second, "gate_loss_after") < 0.6, "{second}");
    let weights = second["contributions"].as_array().unwrap().iter();
    let stacked = weights.filter(|one| one["weight"].as_f64().unwrap() > 0.0);
    assert_eq!(stacked.count(), 1, "{second}");

    // What the first revision knew, back into what the second has become.
    let before = world.evaluate(2, "texts-gate.jsonl").unwrap();
    let lines = "objective = \"distill\"\nteacher = \"village@1\"\ndistill_top_k = 16\nseed = 3";
    let round = world
        .create(&round_file("more", "texts-gate", 1, lines))
        .unwrap();
    let third = world.publishes(&round, 3).await.unwrap();
    let after = world.evaluate(3, "texts-gate.jsonl").unwrap();
    assert!(
        loss(&after, "loss") < loss(&before, "loss"),
        "{before} {after}"
    );
    println!(
        "{first}\n{second}\n{third}\n{} -> {}",
        before["loss"], after["loss"]
    );

    // Every accepted training was trained again, with the base as reference and with the teacher.
    let log = world.logs();
    assert!(log.matches("the same bit for bit").count() >= 4, "{log}");
    assert!(log.contains("rewards of the last step"), "{log}");
}

fn loss(view: &Value, key: &str) -> f64 {
    view[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} of {view}"))
}

/// What does not fit is refused before anybody works.
async fn refusals(world: &World, texts: &[Record], pairs: &[Record]) -> Result<()> {
    let other = world.folder.path().join("other");
    fs::create_dir(&other)?;
    for file in fs::read_dir(demo("base"))? {
        let file = file?;
        fs::copy(file.path(), other.join(file.file_name()))?;
    }
    let tokenizer = fs::read_to_string(other.join("tokenizer.json"))?;
    fs::write(other.join("tokenizer.json"), tokenizer + "\n")?;
    let added = [
        "model",
        "add",
        other.to_str().context("a path")?,
        "--name",
        "other",
    ];
    succeeded(world.maintainer.cairn(&added)?)?;
    let dpo = "objective = \"dpo\"";
    let distill = |teacher: &str| format!("objective = \"distill\"\nteacher = {teacher:?}");
    for (dataset, gate, lines, named) in [
        ("texts", "pairs-gate", dpo, "dataset texts holds texts"),
        ("pairs", "texts-gate", dpo, "dataset texts-gate holds texts"),
        ("pairs", "texts-gate", "", "dataset pairs holds preferences"),
        (
            "texts",
            "pairs-gate",
            "",
            "dataset pairs-gate holds preferences",
        ),
        (
            "texts",
            "texts-gate",
            "objective = \"distill\"",
            "`teacher` is missing",
        ),
        (
            "texts",
            "texts-gate",
            &distill("village@9"),
            "no checkpoint village@9",
        ),
        (
            "texts",
            "texts-gate",
            &distill("nobody@1"),
            "no model nobody",
        ),
        (
            "texts",
            "texts-gate",
            &distill("other@0"),
            "have not the same tokenizer.json",
        ),
        ("texts", "texts-gate", &distill("village"), "NAME@REVISION"),
    ] {
        let error = world.refused(&round_file(dataset, gate, 1, lines))?;
        ensure!(error.contains(named), "{lines} on {dataset}: {error}");
    }
    let mixed = world.add("mixed", "train", &[texts, pairs].concat());
    let error = mixed.unwrap_err().to_string();
    ensure!(error.contains("two datasets"), "{error}");
    Ok(())
}

/// Trains on swapped preferences, hands in what comes of it, and waits for the verdict.
async fn cheated(world: &World, round: &str, lines: &str, texts: &[Record]) -> Result<Value> {
    let lease = world.cheat.lease().await?;
    let folder = world.folder.path().join("mallory");
    fs::create_dir_all(&folder)?;
    let swapped: Vec<String> = preferences(texts, true)
        .iter()
        .map(|record| record.to_json_line() + "\n")
        .collect();
    fs::write(folder.join("swapped.jsonl"), swapped.concat())?;
    let text = recipe(lines);
    Recipe::parse_toml(&text)?;
    fs::write(folder.join("recipe.toml"), text)?;
    let output = Command::new(built("cairn-worker", "cairn-worker")?)
        .current_dir(&folder)
        .args([
            "train",
            "--json",
            "--data",
            "swapped.jsonl",
            "--recipe",
            "recipe.toml",
        ])
        .args(["--out", "adapter", "--model"])
        .arg(world.maintainer.folder().join("village-1"))
        .output()?;
    let report: Value = serde_json::from_slice(&succeeded(output)?)?;
    ensure!(loss(&report, "rewards/accuracies") > 0.5, "{report}");
    let read = |name: &str| fs::read(folder.join("adapter").join(name));
    let adapter = Adapter {
        weights: read(WEIGHTS_FILE)?,
        config: read(CONFIG_FILE)?,
    };
    world.cheat.upload(&adapter.weights, &lease.id).await?;
    world
        .cheat
        .submit(&world.cheat.submission(&lease, &adapter))
        .await?;
    let judged = |view: &Value| {
        let all = view["contributions"].as_array();
        all.is_some_and(|all| all.iter().any(|one| one["verdict"] == "rejected"))
    };
    let view = world.until(round, judged).await?;
    let all = view["contributions"].as_array().context("a list")?;
    let rejected = all.iter().find(|one| one["verdict"] == "rejected");
    rejected.cloned().context("it was there")
}

/// The volunteer's machine again, with its home as it was.
fn resumed(world: &World) -> Result<Worker> {
    let home = world.folder.path().join("volunteer");
    let log = fs::File::options().append(true).open(home.join("log"))?;
    let child = Command::new(built("cairn-worker", "cairn-worker")?)
        .env_clear()
        .env("CAIRN_HOME", &home)
        .args(["run", "--threads", "1"])
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    Ok(Worker { home, child })
}
