//! The program at work for a coordinator in memory: audits opened, segments trained again, guides,
//! samples, and what a coordinator lost.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
mod fake;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use cairn_proto::signing::state_leaf;
use cairn_proto::v1;
use cairn_proto::v1::lease::Work;
use cairn_proto::v1::submit_findings_request::Findings;
use cairn_stack::merkle::{Hash, leaf_hash, verify_inclusion};
use cairn_worker::device::DeviceName;
use cairn_worker::limits::DISTANCE_BROKEN;
use common::{device, reference};
use fake::{Fake, World, receipt};
use serde_json::{Value, json};

/// How long any awaited condition may take.
const WAIT: Duration = Duration::from_mins(2);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(20);

const RECIPE: &str = "rank = 2\nalpha = 4\ntarget_modules = [\"q_proj\", \"v_proj\"]\n\
    learning_rate = 0.01\nsteps = 10\nbatch_size = 4\nsequence_length = 14\nseed = 1\n";

/// A coordinator with a base and a chunk of records, and homes for workers.
struct Desk {
    fake: Fake,
    port: u16,
    dir: tempfile::TempDir,
    train: v1::TrainWork,
}

impl Desk {
    async fn new() -> Self {
        let fake = Fake::default();
        let port = fake.serve().await;
        let train = {
            let mut world = fake.world();
            let model = reference().join("models/llama-default");
            let mut files = Vec::new();
            for path in ["config.json", "model.safetensors"] {
                let blob = world.hold_file(&model.join(path));
                files.push((path, blob));
            }
            let blob = world.hold(tokenizer().to_string().as_bytes());
            files.push(("tokenizer.json", blob));
            let base_files = files.into_iter().map(|(path, blob)| v1::File {
                path: path.to_owned(),
                blob: Some(blob),
                sha256: String::new(),
            });
            let chunk = v1::Chunk {
                blob: Some(world.hold(lines(24).as_bytes())),
                records: 24,
            };
            v1::TrainWork {
                round_id: "r".to_owned(),
                shard: 2,
                base_commit: "ab".repeat(20),
                base_files: base_files.collect(),
                records: vec![v1::RecordRange {
                    chunk: Some(chunk),
                    first: 0,
                    count: 20,
                }],
                recipe: RECIPE.to_owned(),
                adapter_bytes_max: 1 << 20,
                carry: None,
                segments: 4,
                teacher: None,
            }
        };
        let desk = Self {
            fake,
            port,
            dir: tempfile::tempdir().unwrap(),
            train,
        };
        for role in ["volunteer", "evaluator"] {
            let url = format!("cairn+insecure://127.0.0.1:{}/#{role}", desk.port);
            let mut join = desk.command(role, &["join", &url, "--name", role]);
            let joined = tokio::task::spawn_blocking(move || join.output().unwrap());
            assert!(joined.await.unwrap().status.success());
        }
        desk
    }

    fn home(&self, role: &str) -> PathBuf {
        self.dir.path().join(role)
    }

    fn command(&self, role: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cairn-worker"));
        command.args(args).env("CAIRN_HOME", self.home(role));
        command.env("CAIRN_DEVICE", device().to_string());
        command.stdin(Stdio::null());
        command
    }

    /// Runs a worker until the world is as told, then kills it; what it said meanwhile.
    async fn run(&self, role: &str, until: impl Fn(&World) -> bool) -> String {
        self.run_args(role, &["run"], |desk| until(&desk.fake.world()))
            .await
    }

    async fn run_args(&self, role: &str, args: &[&str], until: impl Fn(&Self) -> bool) -> String {
        let said = self.dir.path().join("said");
        let mut command = self.command(role, args);
        command.stderr(fs::File::create(&said).unwrap());
        let mut child = command.spawn().unwrap();
        let waited = tokio::time::timeout(WAIT, async {
            while !until(self) && child.try_wait().unwrap().is_none() {
                tokio::time::sleep(LOOK).await;
            }
        });
        let in_time = waited.await.is_ok();
        let _ = child.kill();
        child.wait().unwrap();
        let said = fs::read_to_string(said).unwrap();
        println!("--- {role}\n{said}");
        assert!(in_time && until(self), "not in time");
        said
    }

    async fn status(&self) -> (Value, String) {
        let mut json = self.command("volunteer", &["status", "--json"]);
        let mut words = self.command("volunteer", &["status"]);
        let asked = tokio::task::spawn_blocking(move || {
            (
                json.output().unwrap().stdout,
                words.output().unwrap().stdout,
            )
        });
        let (json, words) = asked.await.unwrap();
        (
            serde_json::from_slice(&json).unwrap(),
            String::from_utf8(words).unwrap(),
        )
    }

    /// The replay of an opened segment.
    fn replay(&self, revealed: &v1::RevealAuditRequest) -> v1::ReplayWork {
        let (start, end) = (
            revealed.start.clone().unwrap(),
            revealed.end.clone().unwrap(),
        );
        v1::ReplayWork {
            submission_id: revealed.submission_id.clone(),
            train: Some(self.train.clone()),
            first_step: start.step,
            last_step: end.step,
            start_state: start.factors,
            end_factors: end.factors,
            start_moments: start.moments,
        }
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

fn lines(count: usize) -> String {
    let line = |n: usize| {
        let words: Vec<String> = (0..12 + n % 5)
            .map(|t| format!("w{}", (7 * n + 3 * t) % 64))
            .collect();
        json!({"text": words.join(" ")}).to_string() + "\n"
    };
    (0..count).map(line).collect()
}

/// Whether a state is the leaf `index` of what was committed to.
fn is_committed(commitment: &v1::TrainCommitment, state: &v1::RevealedState, index: u64) -> bool {
    let digest = |blob: &Option<v1::BlobRef>| blob.clone().unwrap().digest.parse().unwrap();
    let leaf = state_leaf(state.step, digest(&state.factors), digest(&state.moments));
    let proof: Vec<Hash> = state
        .proof
        .iter()
        .map(|node| node.as_slice().try_into().unwrap())
        .collect();
    let root: Hash = commitment.root.as_slice().try_into().unwrap();
    verify_inclusion(
        &leaf_hash(&leaf),
        index,
        u64::from(commitment.leaves),
        &proof,
        &root,
    )
}

fn replays(world: &World) -> Vec<v1::ReplayFindings> {
    let replay = |request: &v1::SubmitFindingsRequest| match &request.findings {
        Some(Findings::Replay(replay)) => Some(replay.clone()),
        _ => None,
    };
    world.findings.iter().filter_map(replay).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audited_segment_is_opened_and_trained_again() {
    let desk = Desk::new().await;
    {
        let mut world = desk.fake.world();
        world.work.push_back(Work::Train(desk.train.clone()));
        world.audit = Some(v1::AuditRequest {
            segment: 2,
            until_ms: i64::MAX,
        });
    }
    // With --once it leaves only after the audit is answered.
    let said = desk
        .run_args("volunteer", &["run", "--once"], |desk| {
            !desk.fake.world().revealed.is_empty()
        })
        .await;
    assert!(
        said.contains("shard 2 of round r: audited: opening segment 3 of 4"),
        "{said}"
    );
    let revealed = {
        let world = desk.fake.world();
        let (submitted, revealed) = (&world.submitted[0], world.revealed[0].clone());
        let commitment = submitted.commitment.as_ref().unwrap();
        let (start, end) = (
            revealed.start.as_ref().unwrap(),
            revealed.end.as_ref().unwrap(),
        );
        let last = commitment.last.as_ref().unwrap();
        assert_eq!(
            (commitment.leaves, start.step, end.step, last.step),
            (5, 5, 7, 10)
        );
        for (state, leaf) in [(start, 2), (end, 3), (last, 4)] {
            assert!(is_committed(commitment, state, leaf));
        }
        assert!(!is_committed(commitment, start, 3));
        assert_eq!(last.factors, submitted.adapter);
        let uploads = &world.uploads;
        for blob in [
            &start.factors,
            &start.moments,
            &end.factors,
            &submitted.adapter,
        ] {
            let digest = blob.clone().unwrap().digest;
            assert!(uploads.contains(&(digest, submitted.lease_id.clone())));
        }
        assert_eq!(uploads.len(), 4);
        revealed
    };

    let honest = desk.replay(&revealed);
    let skipped = v1::ReplayWork {
        end_factors: honest.start_state.clone(),
        ..honest.clone()
    };
    let nonsense = v1::ReplayWork {
        end_factors: honest.start_moments.clone(),
        ..honest.clone()
    };
    let mut foreign = honest.clone();
    foreign.train.as_mut().unwrap().records[0].first = 4;
    let works = [honest, skipped, nonsense, foreign];
    desk.fake.world().work.extend(works.map(Work::Replay));
    desk.run("evaluator", |world| replays(world).len() == 4)
        .await;
    let found = replays(&desk.fake.world());
    assert!(found[0].distance < 1e-3, "{found:?}");
    assert!(
        found[0].identical || device() != DeviceName::Flex,
        "{found:?}"
    );
    assert!(found[1].distance >= DISTANCE_BROKEN && found[2].distance >= DISTANCE_BROKEN);
    assert!(
        found[3].distance > 0.05 && found[3].distance.is_finite(),
        "{found:?}"
    );
    assert!(found.iter().skip(1).all(|found| !found.identical));
    assert!(desk.fake.world().released.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_asked_for_later_is_opened_after_a_restart() {
    let desk = Desk::new().await;
    desk.fake
        .world()
        .work
        .push_back(Work::Train(desk.train.clone()));
    let kept = desk.home("volunteer").join("submitted/submission-1");
    desk.run_args("volunteer", &["run"], |_| kept.join("kept.json").exists())
        .await;
    assert!(kept.join("states/states.json").exists());

    // The first segment: nothing is uploaded for its start.
    desk.fake.world().listed[0].audit = Some(v1::AuditRequest {
        segment: 0,
        until_ms: 1_790_000_000_000,
    });
    let (status, words) = desk.status().await;
    assert_eq!(status["unsettled"][0]["segments"], 4);
    assert_eq!(status["standing"]["strikes"], 1);
    assert!(
        words.contains("segment 1 of 4 waits to be opened until 2026-09-21"),
        "{words}"
    );
    assert!(
        words.contains("1 strike; 20 % of the next trainings"),
        "{words}"
    );
    desk.run("volunteer", |world| world.revealed.len() == 1)
        .await;
    let revealed = desk.fake.world().revealed[0].clone();
    assert_eq!(desk.fake.world().uploads.len(), 2);
    let work = desk.replay(&revealed);
    assert_eq!((work.first_step, work.last_step), (0, 2));
    desk.fake.world().work.push_back(Work::Replay(work));
    desk.run("evaluator", |world| !world.findings.is_empty())
        .await;
    assert!(replays(&desk.fake.world())[0].distance < 1e-3);

    // Judged: the states go. Sealed: all of it goes.
    let submitted = desk.fake.world().submitted[0].clone();
    let accept = |world: &mut World| {
        let contribution = world.listed[0].contribution.as_mut().unwrap();
        contribution.verdict = v1::Verdict::Accepted.into();
    };
    accept(&mut desk.fake.world());
    desk.run_args("volunteer", &["run"], |_| !kept.join("states").exists())
        .await;
    assert!(kept.join("adapter/adapter_model.safetensors").exists());
    desk.fake.world().listed[0].receipt = Some(receipt(&submitted, "submission-1", "accepted"));
    desk.run_args("volunteer", &["run"], |_| !kept.exists())
        .await;
    let file = desk.home("volunteer").join("receipts/submission-1.json");
    let stored: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert!(
        stored["sealed"]["statement"]
            .as_str()
            .unwrap()
            .contains("accepted")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_coordinator_lost_is_handed_in_again() {
    let desk = Desk::new().await;
    desk.fake
        .world()
        .work
        .push_back(Work::Train(desk.train.clone()));
    let kept = desk
        .home("volunteer")
        .join("submitted/submission-1/kept.json");
    desk.run_args("volunteer", &["run"], |_| kept.exists())
        .await;
    let adapter = {
        let mut world = desk.fake.world();
        let adapter = world.submitted[0].adapter.clone().unwrap();
        world.listed.clear();
        world.uploads.clear();
        world.blobs.remove(&adapter.digest).unwrap();
        adapter
    };
    let said = desk
        .run("volunteer", |world| !world.restored.is_empty())
        .await;
    assert!(said.contains("lost submission submission-1"), "{said}");
    {
        let world = desk.fake.world();
        let restored = world.restored[0].submission.as_ref();
        assert_eq!(restored, world.submitted.first());
        let lease = world.submitted[0].lease_id.clone();
        assert_eq!(world.uploads, [(adapter.digest, lease)]);
    }

    // Its round is over, so it is listed no more: asked for once more, and then never again.
    let info = || fs::read_to_string(&kept).unwrap();
    desk.run_args("volunteer", &["run"], |_| {
        info().contains("does not judge it")
    })
    .await;
    let asked = desk.fake.world().restored.len();
    let mut again = desk.command("volunteer", &["run", "--exit-when-idle", "1"]);
    let again = tokio::task::spawn_blocking(move || again.output().unwrap());
    assert!(again.await.unwrap().status.success());
    assert_eq!(desk.fake.world().restored.len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guide_and_a_sample_of_a_shard() {
    let desk = Desk::new().await;
    let guide = v1::GuideWork {
        train: Some(desk.train.clone()),
        steps: 3,
    };
    let sample = v1::RecordRange {
        first: 3,
        count: 5,
        ..desk.train.records[0].clone()
    };
    let evaluate = v1::EvaluateWork {
        round_id: "r".to_owned(),
        evaluation_id: "e".to_owned(),
        base_commit: desk.train.base_commit.clone(),
        base_files: desk.train.base_files.clone(),
        adapters: Vec::new(),
        sets: vec![
            v1::EvalSet {
                dataset: "shard/2".to_owned(),
                records: vec![sample],
                ..Default::default()
            },
            v1::EvalSet {
                dataset: "gate".to_owned(),
                chunks: desk.train.records[0].chunk.clone().into_iter().collect(),
                ..Default::default()
            },
        ],
        sequence_length: 14,
        dpo_beta: 0.1,
    };
    let works = [Work::Guide(guide), Work::Evaluate(evaluate)];
    desk.fake.world().work.extend(works);
    desk.run("evaluator", |world| {
        !world.findings.is_empty() && !world.scores.is_empty()
    })
    .await;
    let world = desk.fake.world();
    let Some(Findings::Guide(guide)) = &world.findings[0].findings else {
        panic!("{:?}", world.findings);
    };
    let adapter = guide.adapter.clone().unwrap();
    assert!(world.blobs.contains_key(&adapter.digest));
    assert_eq!(
        world.uploads,
        [(adapter.digest, world.findings[0].lease_id.clone())]
    );
    assert!(serde_json::from_slice::<Value>(&guide.adapter_config).is_ok());
    let sets = &world.scores[0].sets;
    assert_eq!((sets[0].nll.len(), sets[1].nll.len()), (5, 24));
    for (sampled, whole) in sets[0].nll.iter().zip(&sets[1].nll[3..8]) {
        assert!((sampled - whole).abs() < 1e-3, "{sampled} {whole}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_in_four_bits_is_trained_again_in_four_bits() {
    let mut desk = Desk::new().await;
    desk.train.recipe = format!("{RECIPE}quantize = \"nf4\"\n");
    {
        let mut world = desk.fake.world();
        world.work.push_back(Work::Train(desk.train.clone()));
        world.audit = Some(v1::AuditRequest {
            segment: 2,
            until_ms: i64::MAX,
        });
    }
    desk.run("volunteer", |world| world.revealed.len() == 1)
        .await;
    let revealed = desk.fake.world().revealed[0].clone();
    let honest = desk.replay(&revealed);
    let mut whole = honest.clone();
    RECIPE.clone_into(&mut whole.train.as_mut().unwrap().recipe);
    let works = [honest, whole].map(Work::Replay);
    desk.fake.world().work.extend(works);
    desk.run("evaluator", |world| replays(world).len() == 2)
        .await;
    let found = replays(&desk.fake.world());
    assert!(found[0].distance < 1e-3, "{found:?}");
    assert!(found[1].distance > 1e-3, "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_given_back_before_it_is_fetched() {
    let desk = Desk::new().await;
    let mut large = desk.train.clone();
    let weights = {
        let mut world = desk.fake.world();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": 32_000, "hidden_size": 65_536, "intermediate_size": 229_376,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": false,
        });
        large.base_files[0].blob = Some(world.hold(config.to_string().as_bytes()));
        // Nobody holds it: asking for it would be an error of another kind.
        let weights = v1::BlobRef {
            digest: "c".repeat(64),
            size_bytes: 10 << 40,
        };
        large.base_files[1].blob = Some(weights.clone());
        world.work.push_back(Work::Train(large));
        weights
    };
    let said = desk
        .run("volunteer", |world| world.released.len() == 1)
        .await;
    let reason = desk.fake.world().released[0].clone();
    assert!(
        reason.starts_with("too large for this machine: needs "),
        "{reason}"
    );
    assert!(reason.contains(" are free "), "{reason}");
    assert!(said.contains("given back"), "{said}");
    assert!(!desk.fake.world().blobs.contains_key(&weights.digest));
}
