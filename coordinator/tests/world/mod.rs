//! A coordinator with a tiny model, its data, and a hidden rule that says what adapters are worth.
//!
//! Each adapter the tests hand in has a quality: a point in a plane. The losses of a stack are a
//! quadratic in the weighted sum of its adapters' qualities, lowest at (1, 1).
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use cairn_coordinator::app::App;
use cairn_coordinator::caller::{Caller, Role};
use cairn_coordinator::clock::{Clock, Timestamp};
use cairn_coordinator::db::datasets::{ChunkRow, SetKind};
use cairn_coordinator::db::models::FileRow;
use cairn_coordinator::db::rounds::Round;
use cairn_coordinator::db::submissions::Numbers;
use cairn_coordinator::domain::audit::{Commitment, File, State};
use cairn_coordinator::domain::statistics::Scores;
use cairn_coordinator::error::Error;
use cairn_coordinator::ids::{LeaseId, RequestId, RoundId, SubmissionId};
use cairn_coordinator::limits::Limits;
use cairn_coordinator::ops::claim_work::eval_sets::EvalSet;
use cairn_coordinator::ops::claim_work::{Assignment, EvaluateTask, Task, claim_work};
use cairn_coordinator::ops::create_dataset::{NewDataset, create_dataset};
use cairn_coordinator::ops::create_model::{NewModel, create_model};
use cairn_coordinator::ops::create_round::create_round;
use cairn_coordinator::ops::read_rounds::{RoundView, get_round};
use cairn_coordinator::ops::reveal_audit::{Revealed, reveal_audit};
use cairn_coordinator::ops::submit_adapter::{Acknowledged, NewAdapter, submit_adapter};
use cairn_coordinator::ops::submit_findings::{NewFindings, submit_findings};
use cairn_coordinator::ops::submit_scores::{SetScores, submit_scores};
use cairn_coordinator::ops::write_blob::{Progress, UploadHeader, write_blob};
use cairn_coordinator::tasks;
use cairn_proto::convert::BlobName;
use cairn_proto::signing::state_leaf;
use cairn_stack::adapter::{
    AdapterFile, AdapterSpec, AdapterWriteConfig, Pair, WEIGHTS_FILE, write_adapter,
};
use cairn_stack::carry::trained_half;
use cairn_stack::config::ModelConfig;
use cairn_stack::digest::Digest;
use cairn_stack::files::{FileEntry, list_files};
use cairn_stack::merkle::{Hash, inclusion_proof, leaf_hash, root};
use cairn_stack::recipe::RoundFile;
use cairn_stack::tensors::{Dtype, TensorSpec, write_tensors};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use crate::support::{Fixture, Stores, name};

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
    /// Submissions whose training never was: a replay finds out.
    pub cheats: BTreeSet<SubmissionId>,
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
        weights: read(WEIGHTS_FILE),
        config: read(cairn_stack::adapter::CONFIG_FILE),
    }
}

/// The file of the factors that training ended in: the adapter's own, or its first half where it is
/// the difference to carried ones.
fn trained_factors(adapter: &Adapter) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(WEIGHTS_FILE);
    std::fs::write(&path, &adapter.weights).unwrap();
    let recipe = RoundFile::parse_toml(&round_text(1)).unwrap().recipe;
    let doubled = 2 * recipe.rank as usize;
    match AdapterFile::open_parts(&path, &adapter.config) {
        Ok(file) if file.config().rank == doubled => {
            let halves = (0..file.modules().len())
                .map(|place| trained_half(&file.pair(place).unwrap()).unwrap());
            let config = AdapterWriteConfig::of_recipe(&recipe, None, None);
            write_adapter(folder.path(), &halves.collect::<Vec<Pair>>(), &config).unwrap();
            std::fs::read(&path).unwrap()
        }
        _ => adapter.weights.clone(),
    }
}

/// Optimiser steps that volunteers of these tests claim.
pub const STEPS: u32 = 3;

/// Training states that nobody trained, one for each of [`STEPS`] and one before the first.
pub struct Training {
    /// The states with their proofs.
    pub states: Vec<State>,
    /// Of each, factors and moments.
    pub files: Vec<[Vec<u8>; 2]>,
    pub root: Hash,
}

impl Training {
    pub fn of(adapter: &Adapter) -> Self {
        let digest = adapter.name().digest;
        let files: Vec<[Vec<u8>; 2]> = (0..=STEPS)
            .map(|step| {
                let factors = if step == STEPS {
                    trained_factors(adapter)
                } else {
                    format!("factors {step} {digest}").into_bytes()
                };
                [factors, format!("moments {step} {digest}").into_bytes()]
            })
            .collect();
        let file = |bytes: &[u8]| File {
            digest: Digest::of(bytes),
            size_bytes: bytes.len() as u64,
        };
        let leaves: Vec<Hash> = (0..)
            .zip(&files)
            .map(|(step, [factors, moments])| {
                leaf_hash(&state_leaf(step, Digest::of(factors), Digest::of(moments)))
            })
            .collect();
        let state = |(step, [factors, moments]): (u32, &[Vec<u8>; 2])| State {
            step,
            factors: file(factors),
            moments: file(moments),
            proof: inclusion_proof(&leaves, u64::from(step)).unwrap(),
        };
        Self {
            states: (0..).zip(&files).map(state).collect(),
            root: root(&leaves),
            files,
        }
    }

    pub fn commitment(&self) -> Commitment {
        Commitment {
            root: self.root,
            leaves: STEPS + 1,
            last: self.states[STEPS as usize].clone(),
        }
    }

    /// What opens a segment.
    pub fn revealed(&self, segment: u32) -> Revealed {
        let at = segment as usize;
        Revealed {
            start: Some(self.states[at].clone()),
            end: self.states[at + 1].clone(),
        }
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
        commitment: Some(Training::of(adapter).commitment()),
    }
}

impl World {
    /// On stores of its own.
    pub async fn on(stores: Stores) -> Self {
        let limits = Limits {
            disk_free_bytes_min: 0,
            ..Limits::default()
        };
        let fixture = crate::support::coordinator_on(stores, limits).await;
        let clock = fixture.app.clock.clone();
        let maintainer = fixture.member(Role::Maintainer, 200).await;
        let evaluator = fixture.member(Role::Evaluator, 201).await;
        let world = Self {
            fixture,
            clock,
            maintainer,
            evaluator,
            qualities: BTreeMap::new(),
            cheats: BTreeSet::new(),
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

    pub async fn add_dataset(&self, set: &str, kind: SetKind, records: usize) {
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

    /// A round whose policy says more.
    pub async fn round_with(&self, shards: u32, policy: &str) -> Round {
        let text = format!("{}{policy}\n", round_text(shards));
        create_round(self.app(), &self.maintainer, &text, RequestId::new())
            .await
            .unwrap()
    }

    /// The same with another gate set.
    pub async fn round_on(&self, gate: &str, shards: u32, policy: &str) -> Round {
        let text = format!("{}{policy}\n", round_text(shards));
        let text = text.replace("gate = \"gate\"", &format!("gate = \"{gate}\""));
        create_round(self.app(), &self.maintainer, &text, RequestId::new())
            .await
            .unwrap()
    }

    pub async fn add_gate(&self, name: &str, records: usize) {
        self.add_dataset(name, SetKind::Gate, records).await;
    }

    pub async fn view(&self, id: RoundId) -> RoundView {
        get_round(self.app(), id).await.unwrap()
    }

    /// State and reason.
    pub async fn outcome(&self, id: RoundId) -> (&'static str, String) {
        let round = self.view(id).await.round;
        (round.phase.state().as_str(), round.reason)
    }

    /// How many volunteers there have been.
    pub const fn volunteers(&self) -> u8 {
        self.volunteers
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

    /// Says what an adapter that was made elsewhere is worth.
    pub fn register(&mut self, adapter: &Adapter, quality: Quality) {
        self.qualities.insert(adapter.name().digest, quality);
    }

    pub async fn upload(&self, caller: &Caller, work: &Assignment, adapter: &Adapter) {
        let sent = self.send(caller, work.lease.id, &adapter.weights).await;
        assert!(sent.unwrap().complete);
    }

    /// Uploads bytes under a lease.
    pub async fn send(
        &self,
        caller: &Caller,
        lease: LeaseId,
        bytes: &[u8],
    ) -> Result<Progress, Error> {
        let header = UploadHeader {
            name: name(bytes),
            offset: 0,
            lease: Some(lease),
        };
        let chunks = futures::stream::iter([Ok(Bytes::copy_from_slice(bytes))]);
        write_blob(self.app(), caller, header, chunks).await
    }

    /// Uploads, hands in, and opens what is audited.
    pub async fn submit(
        &self,
        caller: &Caller,
        work: &Assignment,
        adapter: &Adapter,
    ) -> Result<Acknowledged, Error> {
        let answer = self.submit_closed(caller, work, adapter).await?;
        self.open(caller, work, adapter, &answer).await?;
        Ok(answer)
    }

    /// Uploads and hands in.
    pub async fn submit_closed(
        &self,
        caller: &Caller,
        work: &Assignment,
        adapter: &Adapter,
    ) -> Result<Acknowledged, Error> {
        self.upload(caller, work, adapter).await;
        submit_adapter(self.app(), caller, new_adapter(work, adapter), |_| Ok(())).await
    }

    /// Opens what an answer asks for, if it asks.
    pub async fn open(
        &self,
        caller: &Caller,
        work: &Assignment,
        adapter: &Adapter,
        answer: &Acknowledged,
    ) -> Result<(), Error> {
        let Some(audit) = &answer.audit else {
            return Ok(());
        };
        let training = Training::of(adapter);
        self.upload_states(caller, work.lease.id, &training, audit.segment)
            .await?;
        let revealed = training.revealed(audit.segment);
        reveal_audit(self.app(), caller, answer.id, revealed).await
    }

    /// Uploads what opening a segment takes.
    pub async fn upload_states(
        &self,
        caller: &Caller,
        lease: LeaseId,
        training: &Training,
        segment: u32,
    ) -> Result<(), Error> {
        let at = segment as usize;
        self.send(caller, lease, &training.files[at + 1][0]).await?;
        if segment > 0 {
            for file in &training.files[at] {
                self.send(caller, lease, file).await?;
            }
        }
        Ok(())
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

    /// Answers one evaluation of any kind; false when there is none.
    pub async fn evaluate_one(&self) -> bool {
        let Some(work) = self.claim(&self.evaluator).await else {
            return false;
        };
        self.evaluate(&work).await;
        true
    }

    /// Answers an evaluation of any kind.
    pub async fn evaluate(&self, work: &Assignment) {
        if let Task::Evaluate(_) = &work.task {
            return self.hand_in(work, self.answer(work)).await.unwrap();
        }
        let findings = self.findings(work).await;
        self.find(work, findings).await.unwrap();
    }

    /// What honest findings say: replays end where they should, unless the adapter is a cheat's.
    pub async fn findings(&self, work: &Assignment) -> NewFindings {
        match &work.task {
            Task::Guide { train, .. } => {
                let adapter = adapter_of(&pairs(9_000 + u64::from(train.shard), 0.1));
                let (lease, bytes) = (work.lease.id, &adapter.weights);
                self.send(&self.evaluator, lease, bytes).await.unwrap();
                NewFindings::Guide {
                    adapter: adapter.name(),
                    config: adapter.config,
                }
            }
            Task::Replay(replay) => {
                let cheat = self.cheats.contains(&replay.submission);
                NewFindings::Replay {
                    distance: if cheat { 0.7 } else { 0.0 },
                    identical: !cheat,
                    device: "made up".to_owned(),
                    seconds: 1.0,
                }
            }
            Task::Learn { evaluate, .. } => NewFindings::Learn {
                weights: evaluate.adapters.iter().map(|a| a.weight).collect(),
                loss_before: 2.0,
                loss_after: 1.9,
            },
            Task::Train(_) | Task::Evaluate(_) => panic!("no findings answer this"),
        }
    }

    pub async fn find(&self, work: &Assignment, findings: NewFindings) -> Result<(), Error> {
        let lease = &work.lease;
        submit_findings(
            self.app(),
            &self.evaluator,
            lease.id,
            lease.generation,
            findings,
            |_| Ok(()),
        )
        .await
    }

    /// The next score to be claimed; other work before it is answered.
    pub async fn next_score(&self) -> Assignment {
        loop {
            let work = self.claim(&self.evaluator).await.expect("a score");
            if let Task::Evaluate(_) = &work.task {
                return work;
            }
            self.evaluate(&work).await;
        }
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
                    stores,
                    database_url,
                    s3,
                },
            clock,
            maintainer,
            evaluator,
            qualities,
            cheats,
            volunteers,
        } = self;
        app.db.close().await;
        drop(app);
        let limits = Limits {
            disk_free_bytes_min: 0,
            ..Limits::default()
        };
        let app = crate::support::open(
            folder.path(),
            database_url.as_ref(),
            s3.as_ref(),
            clock.clone(),
            limits,
        )
        .await;
        let fixture = Fixture {
            folder,
            app,
            stores,
            database_url,
            s3,
        };
        Self {
            fixture,
            clock,
            maintainer,
            evaluator,
            qualities,
            cheats,
            volunteers,
        }
    }
}
