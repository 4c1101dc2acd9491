//! A coordinator with a tiny model, its data, and a hidden rule that says what adapters are worth.
//!
//! Each adapter the tests hand in has a quality: a point in a plane. The losses of a stack are a
//! quadratic in the weighted sum of its adapters' qualities, lowest at (1, 1).
use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use cairn_coordinator::app::App;
use cairn_coordinator::caller::{Caller, Role};
use cairn_coordinator::clock::{Clock, Timestamp};
use cairn_coordinator::db::datasets::{ChunkRow, SetKind};
use cairn_coordinator::db::models::FileRow;
use cairn_coordinator::db::rounds::Round;
use cairn_coordinator::db::submissions::Numbers;
use cairn_coordinator::domain::statistics::Scores;
use cairn_coordinator::error::Error;
use cairn_coordinator::ids::{RequestId, RoundId};
use cairn_coordinator::limits::Limits;
use cairn_coordinator::ops::claim_work::eval_sets::EvalSet;
use cairn_coordinator::ops::claim_work::{Assignment, EvaluateTask, Task, claim_work};
use cairn_coordinator::ops::create_dataset::{NewDataset, create_dataset};
use cairn_coordinator::ops::create_model::{NewModel, create_model};
use cairn_coordinator::ops::create_round::create_round;
use cairn_coordinator::ops::read_rounds::{RoundView, get_round};
use cairn_coordinator::ops::submit_adapter::{Acknowledged, NewAdapter, submit_adapter};
use cairn_coordinator::ops::submit_scores::{SetScores, submit_scores};
use cairn_coordinator::ops::write_blob::{UploadHeader, write_blob};
use cairn_coordinator::server::{self, DataFolder, Options};
use cairn_coordinator::tasks;
use cairn_proto::convert::BlobName;
use cairn_stack::adapter::{AdapterSpec, AdapterWriteConfig, Pair, write_adapter};
use cairn_stack::config::ModelConfig;
use cairn_stack::digest::Digest;
use cairn_stack::files::{FileEntry, list_files};
use cairn_stack::recipe::RoundFile;
use cairn_stack::tensors::{Dtype, TensorSpec, write_tensors};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use crate::support::{Fixture, name};

pub const GATE_RECORDS: usize = 60;
pub const AUDIT_RECORDS: usize = 20;

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama",
  "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
  "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
  "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
  "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"}"#;

/// A quality; see the module.
pub type Quality = [f64; 2];

pub struct World {
    pub fixture: Fixture,
    pub clock: Clock,
    pub maintainer: Caller,
    pub evaluator: Caller,
    qualities: BTreeMap<Digest, Quality>,
    volunteers: u8,
}

/// An adapter's two files.
#[derive(Clone)]
pub struct Adapter {
    pub weights: Vec<u8>,
    pub config: Vec<u8>,
}

impl Adapter {
    pub fn name(&self) -> BlobName {
        name(&self.weights)
    }
}

pub fn round_text(shards: u32) -> String {
    format!(
        "model = \"tiny\"\ndataset = \"train\"\nshards = {shards}\n[recipe]\nrank = 2\nalpha = 4\n\
         target_modules = [\"q_proj\", \"v_proj\"]\nlearning_rate = 1e-3\nepochs = 1\n\
         batch_size = 4\nsequence_length = 32\n[policy]\ngate = \"gate\"\naudit = \"audit\"\n\
         deadline = \"1h\"\nlease = \"10m\"\n"
    )
}

fn floats(count: usize, seed: u64, size: f32) -> Vec<f32> {
    let mut random = ChaCha20Rng::seed_from_u64(seed);
    (0..count)
        .map(|_| size * (random.random::<f32>() - 0.5))
        .collect()
}

/// The pairs of a sound adapter; its norm is about the same for every seed.
pub fn pairs(seed: u64, size: f32) -> Vec<Pair> {
    let config = ModelConfig::from_json(CONFIG.as_bytes()).unwrap();
    let recipe = RoundFile::parse_toml(&round_text(1)).unwrap().recipe;
    let spec = AdapterSpec::new(&config, &recipe);
    let one = |(i, pair): (u64, &cairn_stack::adapter::PairSpec)| Pair {
        module: pair.module.clone(),
        rank: spec.rank,
        in_features: pair.in_features,
        out_features: pair.out_features,
        a: floats(spec.rank * pair.in_features, seed * 1_000 + i, 1.0),
        b: floats(spec.rank * pair.out_features, seed * 1_000 + 500 + i, size),
        scale: spec.scale,
    };
    (0..).zip(&spec.pairs).map(one).collect()
}

pub fn adapter_of(pairs: &[Pair]) -> Adapter {
    let recipe = RoundFile::parse_toml(&round_text(1)).unwrap().recipe;
    let folder = tempfile::tempdir().unwrap();
    let config = AdapterWriteConfig::of_recipe(&recipe, None, None);
    write_adapter(folder.path(), pairs, &config).unwrap();
    let read = |file: &str| std::fs::read(folder.path().join(file)).unwrap();
    Adapter {
        weights: read(cairn_stack::adapter::WEIGHTS_FILE),
        config: read(cairn_stack::adapter::CONFIG_FILE),
    }
}

/// What is handed in under a lease.
pub fn new_adapter(work: &Assignment, adapter: &Adapter) -> NewAdapter {
    NewAdapter {
        request: RequestId::new(),
        lease: work.lease.id,
        generation: work.lease.generation,
        adapter: adapter.name(),
        config: adapter.config.clone(),
        numbers: Numbers {
            tokens: 100,
            ..Numbers::default()
        },
        signature: vec![7; 64],
    }
}

impl World {
    /// On a database of its own; SQLite when there is no URL.
    pub async fn on(database_url: Option<String>) -> Self {
        let limits = Limits {
            disk_free_bytes_min: 0,
            ..Limits::default()
        };
        let fixture = crate::support::coordinator_on(database_url, limits).await;
        let clock = fixture.app.clock.clone();
        let maintainer = fixture.member(Role::Maintainer, 200).await;
        let evaluator = fixture.member(Role::Evaluator, 201).await;
        let world = Self {
            fixture,
            clock,
            maintainer,
            evaluator,
            qualities: BTreeMap::new(),
            volunteers: 0,
        };
        world.add_model().await;
        world.add_dataset("train", SetKind::Train, 40).await;
        world.add_dataset("gate", SetKind::Gate, GATE_RECORDS).await;
        world
            .add_dataset("audit", SetKind::Audit, AUDIT_RECORDS)
            .await;
        world
    }

    pub fn app(&self) -> &App {
        &self.fixture.app
    }

    async fn add_model(&self) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        std::fs::write(dir.join("config.json"), CONFIG).unwrap();
        std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        let weights = ModelConfig::from_json(CONFIG.as_bytes()).unwrap().weights();
        let specs: Vec<TensorSpec> = weights
            .into_iter()
            .map(|(name, shape)| TensorSpec {
                name,
                dtype: Dtype::F32,
                shape,
            })
            .collect();
        let mut bytes = Vec::new();
        write_tensors::<std::io::Error>(&mut bytes, &[("format", "pt")], &specs, |index| {
            let mut body = Vec::new();
            let count = specs[index].shape.iter().product();
            Dtype::F32.encode(&floats(count, index as u64, 1.0), &mut body);
            Ok(body)
        })
        .unwrap();
        std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
        let mut files = Vec::new();
        for path in list_files(dir).unwrap() {
            let entry = FileEntry::of_file(dir, &path).unwrap();
            let bytes = std::fs::read(dir.join(&path)).unwrap();
            let blob = self.fixture.put(&self.maintainer, &bytes).await;
            files.push(FileRow {
                path,
                blob,
                sha256: entry.sha256,
            });
        }
        let new = NewModel {
            name: "tiny".to_owned(),
            files,
            request: RequestId::new(),
        };
        create_model(self.app(), &self.maintainer, new)
            .await
            .unwrap();
    }

    async fn add_dataset(&self, set: &str, kind: SetKind, records: usize) {
        let lines: Vec<String> = (0..records)
            .map(|i| format!("{{\"text\":\"{set} {i}\"}}\n"))
            .collect();
        let mut chunks = Vec::new();
        for run in lines.chunks(records.div_ceil(3)) {
            let blob = self
                .fixture
                .put(&self.maintainer, run.concat().as_bytes())
                .await;
            chunks.push(ChunkRow {
                blob,
                records: run.len() as u32,
            });
        }
        let new = NewDataset {
            name: set.to_owned(),
            set: kind,
            license: "CC0-1.0".to_owned(),
            source: "made up".to_owned(),
            chunks,
            request: RequestId::new(),
        };
        create_dataset(self.app(), &self.maintainer, new)
            .await
            .unwrap();
    }

    pub async fn round(&self, shards: u32) -> Round {
        self.try_round(shards, RequestId::new()).await.unwrap()
    }

    pub async fn try_round(&self, shards: u32, request: RequestId) -> Result<Round, Error> {
        create_round(self.app(), &self.maintainer, &round_text(shards), request).await
    }

    pub async fn view(&self, id: RoundId) -> RoundView {
        get_round(self.app(), id).await.unwrap()
    }

    /// State and reason.
    pub async fn outcome(&self, id: RoundId) -> (&'static str, String) {
        let round = self.view(id).await.round;
        (round.phase.state().as_str(), round.reason)
    }

    pub async fn volunteer(&mut self) -> Caller {
        self.volunteers += 1;
        self.fixture.member(Role::Volunteer, self.volunteers).await
    }

    pub async fn claim(&self, caller: &Caller) -> Option<Assignment> {
        claim_work(self.app(), caller, Duration::ZERO)
            .await
            .unwrap()
    }

    /// A sound adapter of this quality.
    pub fn adapter(&mut self, seed: u64, quality: Quality) -> Adapter {
        let adapter = adapter_of(&pairs(seed, 0.1));
        self.qualities.insert(adapter.name().digest, quality);
        adapter
    }

    pub async fn upload(&self, caller: &Caller, work: &Assignment, adapter: &Adapter) {
        let header = UploadHeader {
            name: adapter.name(),
            offset: 0,
            lease: Some(work.lease.id),
        };
        let bytes = Ok(Bytes::from(adapter.weights.clone()));
        let chunks = futures::stream::iter([bytes]);
        assert!(
            write_blob(self.app(), caller, header, chunks)
                .await
                .unwrap()
                .complete
        );
    }

    /// Uploads and hands in.
    pub async fn submit(
        &self,
        caller: &Caller,
        work: &Assignment,
        adapter: &Adapter,
    ) -> Result<Acknowledged, Error> {
        self.upload(caller, work, adapter).await;
        submit_adapter(self.app(), caller, new_adapter(work, adapter), |_| Ok(())).await
    }

    /// A fresh volunteer claims a shard and hands in an adapter of this quality.
    pub async fn contribute(&mut self, seed: u64, quality: Quality) -> Acknowledged {
        let caller = self.volunteer().await;
        let work = self
            .claim(&caller)
            .await
            .expect("work for a fresh volunteer");
        let adapter = self.adapter(seed, quality);
        self.submit(&caller, &work, &adapter).await.unwrap()
    }

    /// Losses of a candidate on a set of so many records by the hidden rule.
    pub fn scores(&self, adapters: &[(Digest, f64)], dataset: &str, records: usize) -> Scores {
        let mut at = [0.0; 2];
        for (digest, weight) in adapters {
            let quality = self.qualities.get(digest).copied().unwrap_or([0.0; 2]);
            at[0] += weight * quality[0];
            at[1] += weight * quality[1];
        }
        let seed = match dataset {
            "gate" => 1,
            "audit" => 2,
            other => other.bytes().map(u64::from).sum(),
        };
        let mut random = ChaCha20Rng::seed_from_u64(seed);
        let tokens: Vec<u32> = (0..records).map(|_| random.random_range(3..20)).collect();
        let nll = tokens.iter().map(|tokens| {
            let off: [f64; 2] = std::array::from_fn(|_| 0.6 * (random.random::<f64>() - 0.5));
            let away: f64 = (0..2).map(|d| (at[d] - 1.0 - off[d]).powi(2)).sum();
            (f64::from(*tokens) * (0.5 + away)) as f32
        });
        Scores {
            nll: nll.collect(),
            tokens,
        }
    }

    /// The sets that answer an evaluation truthfully.
    pub fn answer(&self, work: &Assignment) -> Vec<SetScores> {
        let Task::Evaluate(EvaluateTask { adapters, sets, .. }) = &work.task else {
            panic!("an evaluator was given other work")
        };
        let adapters: Vec<(Digest, f64)> = adapters
            .iter()
            .map(|a| (a.weights.digest, a.weight))
            .collect();
        let one = |set: &EvalSet| SetScores {
            dataset: set.dataset.clone(),
            scores: self.scores(&adapters, &set.dataset, set.records() as usize),
        };
        sets.iter().map(one).collect()
    }

    pub async fn hand_in(&self, work: &Assignment, sets: Vec<SetScores>) -> Result<(), Error> {
        let lease = &work.lease;
        submit_scores(
            self.app(),
            &self.evaluator,
            lease.id,
            lease.generation,
            sets,
            |_| Ok(()),
        )
        .await
    }

    /// Answers one evaluation; false when there is none.
    pub async fn evaluate_one(&self) -> bool {
        let Some(work) = self.claim(&self.evaluator).await else {
            return false;
        };
        self.hand_in(&work, self.answer(&work)).await.unwrap();
        true
    }

    pub async fn settle(&self) {
        tasks::settle(self.app())
            .await
            .unwrap_or_else(|error| panic!("{}", error.full()));
    }

    /// Evaluates and decides until there is nothing left to do.
    pub async fn judge(&self) {
        loop {
            self.settle().await;
            if !self.evaluate_one().await {
                return;
            }
        }
    }

    pub fn advance(&self, minutes: u64) {
        self.clock.advance(Duration::from_secs(60 * minutes));
    }

    pub fn now(&self) -> Timestamp {
        self.clock.now_ms()
    }

    /// Closes the coordinator and opens another on the same folder.
    pub async fn restart(self) -> Self {
        let Self {
            fixture:
                Fixture {
                    folder,
                    app,
                    database_url,
                },
            clock,
            maintainer,
            evaluator,
            qualities,
            volunteers,
        } = self;
        app.db.close().await;
        drop(app);
        let app = server::open_idle(Options {
            data: DataFolder::lock(folder.path()).unwrap(),
            database_url: database_url.clone(),
            blobs: None,
            endpoint: "cairn+insecure://127.0.0.1:7600/#".parse().unwrap(),
            clock: clock.clone(),
            limits: Limits {
                disk_free_bytes_min: 0,
                ..Limits::default()
            },
        })
        .await
        .unwrap();
        let fixture = Fixture {
            folder,
            app,
            database_url,
        };
        Self {
            fixture,
            clock,
            maintainer,
            evaluator,
            qualities,
            volunteers,
        }
    }
}
