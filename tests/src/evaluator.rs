//! An evaluator that answers by the hidden rule instead of running a model.
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use cairn_proto::client::ClientError;
use cairn_proto::signing::{sign_findings, sign_scores};
use cairn_proto::v1;
use cairn_stack::adapter::{AdapterFile, Pair};
use cairn_stack::checkpoint::Checkpoint;
use tempfile::TempDir;

use crate::adapters::honest;
use crate::member::{Member, request_id};
use crate::puzzle::{Puzzle, nll, tokens};
use crate::training::MADE_UP;

/// How it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    /// By the rule.
    Honest,
    /// By the rule, but a stack that is measured on all sets turns out to be no better than the
    /// base: what was chosen had been luck.
    Fickle,
}

/// A signed answer to work.
#[derive(Debug, Clone)]
pub enum Answer {
    /// To a score.
    Scores(v1::SubmitScoresRequest),
    /// To anything else.
    Findings(v1::SubmitFindingsRequest),
}

/// Seeds of the guides, apart from those of volunteers.
const GUIDE_SEED: u64 = 50_000;

/// An evaluator.
pub struct Evaluator {
    /// Its connection.
    pub member: Member,
    /// How it answers.
    pub habit: Habit,
    /// What `e` is on one set for one adapter alone, by the digest of its file and the set's name.
    pub exceptions: BTreeMap<(String, String), f64>,
    puzzle: Puzzle,
    folder: TempDir,
}

impl Evaluator {
    /// An honest evaluator who knows the better weights over the base in `base`.
    ///
    /// # Errors
    /// When the base cannot be read.
    pub fn new(member: Member, base: &Path) -> Result<Self> {
        let puzzle = Puzzle::new(&Checkpoint::open(base)?)?;
        Ok(Self {
            member,
            habit: Habit::Honest,
            exceptions: BTreeMap::new(),
            puzzle,
            folder: tempfile::tempdir()?,
        })
    }

    /// Claims an evaluation and answers it. False: there is none now.
    ///
    /// # Errors
    /// As the calls.
    pub async fn step(&self) -> Result<bool> {
        let Some(lease) = self.member.claim().await? else {
            return Ok(false);
        };
        match self.answer_any(&lease).await {
            Ok(answer) => self.send(&answer).await?,
            // States that cannot be read back are nobody's to replay.
            Err(_) if matches!(&lease.work, Some(v1::lease::Work::Replay(_))) => {
                self.member.release(&lease, true).await?;
            }
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Claims the next score, answering all other work that comes before it.
    ///
    /// # Errors
    /// When there is none, or as the calls.
    pub async fn next_score(&self) -> Result<v1::Lease> {
        loop {
            let lease = self.member.lease().await?;
            if matches!(&lease.work, Some(v1::lease::Work::Evaluate(_))) {
                return Ok(lease);
            }
            self.send(&self.answer_any(&lease).await?).await?;
        }
    }

    /// The signed answer to a lease of any kind.
    ///
    /// # Errors
    /// When something cannot be downloaded or read.
    pub async fn answer_any(&self, lease: &v1::Lease) -> Result<Answer> {
        if let Some(v1::lease::Work::Evaluate(_)) = &lease.work {
            return Ok(Answer::Scores(self.answer(lease).await?));
        }
        Ok(Answer::Findings(self.findings(lease).await?))
    }

    /// Sends an answer of any kind.
    ///
    /// # Errors
    /// As the call.
    pub async fn send(&self, answer: &Answer) -> Result<(), ClientError> {
        match answer {
            Answer::Scores(scores) => self.submit(scores).await,
            Answer::Findings(findings) => self.submit_findings(findings).await,
        }
    }

    /// The signed findings of a guide, a replay or a learning.
    ///
    /// A guide is an honest adapter; a replay ends where the worker said unless its states are made
    /// up; a learning finds nothing better than what it started from.
    ///
    /// # Errors
    /// When something cannot be downloaded or uploaded.
    pub async fn findings(&self, lease: &v1::Lease) -> Result<v1::SubmitFindingsRequest> {
        use v1::submit_findings_request::Findings;
        let findings = match &lease.work {
            Some(v1::lease::Work::Guide(work)) => {
                let shard = work.train.as_ref().map_or(0, |train| train.shard);
                let adapter = honest(GUIDE_SEED + u64::from(shard));
                let name = self.member.upload(&adapter.weights, &lease.id).await?;
                Findings::Guide(v1::GuideFindings {
                    adapter: Some(name.into()),
                    adapter_config: adapter.config,
                })
            }
            Some(v1::lease::Work::Replay(work)) => {
                let mut honest = true;
                for blob in [&work.start_state, &work.start_moments, &work.end_factors] {
                    let Some(blob) = blob else { continue };
                    let bytes = self.member.fetch(blob).await?;
                    honest &= !bytes.windows(MADE_UP.len()).any(|part| part == MADE_UP);
                }
                Findings::Replay(v1::ReplayFindings {
                    distance: if honest { 0.0 } else { 1.0 },
                    identical: honest,
                    device: "made up".to_owned(),
                    seconds: 0.5,
                })
            }
            Some(v1::lease::Work::Learn(work)) => {
                let evaluate = work.evaluate.as_ref().context("nothing to learn on")?;
                let weights = evaluate.adapters.iter().map(|adapter| adapter.weight);
                Findings::Learn(v1::LearnFindings {
                    weights: weights.collect(),
                    loss_before: 1.0,
                    loss_after: 1.0,
                })
            }
            other => bail!("no findings answer {other:?}"),
        };
        let mut request = v1::SubmitFindingsRequest {
            request_id: request_id(),
            lease_id: lease.id.clone(),
            generation: lease.generation,
            findings: Some(findings),
            signature: Vec::new(),
        };
        self.sign_findings(lease, &mut request);
        Ok(request)
    }

    /// Signs findings, whatever they say.
    pub fn sign_findings(&self, lease: &v1::Lease, request: &mut v1::SubmitFindingsRequest) {
        sign_findings(&self.member.client.identity().key, &lease.nonce, request);
    }

    /// Sends findings as they are.
    ///
    /// # Errors
    /// As the call.
    pub async fn submit_findings(
        &self,
        request: &v1::SubmitFindingsRequest,
    ) -> Result<(), ClientError> {
        self.member
            .client
            .call(|mut to| {
                let request = request.clone();
                async move { to.work.submit_findings(request).await }
            })
            .await
            .map(|_| ())
    }

    /// The signed answer to a lease.
    ///
    /// # Errors
    /// When something cannot be downloaded or read.
    pub async fn answer(&self, lease: &v1::Lease) -> Result<v1::SubmitScoresRequest> {
        let Some(v1::lease::Work::Evaluate(work)) = &lease.work else {
            bail!("expected an evaluation, got {:?}", lease.work);
        };
        let mut request = v1::SubmitScoresRequest {
            request_id: request_id(),
            lease_id: lease.id.clone(),
            generation: lease.generation,
            sets: self.score(work).await?,
            signature: Vec::new(),
        };
        self.sign(lease, &mut request);
        Ok(request)
    }

    /// Signs an answer, whatever it says.
    pub fn sign(&self, lease: &v1::Lease, request: &mut v1::SubmitScoresRequest) {
        sign_scores(&self.member.client.identity().key, &lease.nonce, request);
    }

    /// Sends an answer as it is.
    ///
    /// # Errors
    /// As the call.
    pub async fn submit(&self, request: &v1::SubmitScoresRequest) -> Result<(), ClientError> {
        self.member
            .client
            .call(|mut to| {
                let request = request.clone();
                async move { to.work.submit_scores(request).await }
            })
            .await
            .map(|_| ())
    }

    async fn score(&self, work: &v1::EvaluateWork) -> Result<Vec<v1::SetScores>> {
        let base = self.base(work).await?;
        let mut adapters = Vec::new();
        for adapter in &work.adapters {
            adapters.push((self.adapter(adapter).await?, adapter.weight));
        }
        let mut error = self.puzzle.error(&base, &adapters)?;
        if self.habit == Habit::Fickle && adapters.len() > 1 && work.sets.len() > 1 {
            error = 1.0;
        }
        let mut sets = Vec::new();
        for set in &work.sets {
            let records = self.records(set).await?;
            let error = self.exception(work, set).unwrap_or(error);
            sets.push(v1::SetScores {
                dataset: set.dataset.clone(),
                nll: (0..records).map(|j| nll(j, error)).collect(),
                tokens: (0..records).map(tokens).collect(),
                cut: 0,
            });
        }
        Ok(sets)
    }

    fn exception(&self, work: &v1::EvaluateWork, set: &v1::EvalSet) -> Option<f64> {
        let [alone] = &work.adapters[..] else {
            return None;
        };
        let digest = alone.weights.as_ref()?.digest.clone();
        self.exceptions.get(&(digest, set.dataset.clone())).copied()
    }

    async fn base(&self, work: &v1::EvaluateWork) -> Result<Checkpoint> {
        let dir = self.folder.path().join(&work.base_commit);
        if !dir.exists() {
            self.member.fetch_folder(&work.base_files, &dir).await?;
        }
        Ok(Checkpoint::open(&dir)?)
    }

    async fn adapter(&self, adapter: &v1::WeightedAdapter) -> Result<Vec<Pair>> {
        let blob = adapter
            .weights
            .as_ref()
            .context("an adapter without weights")?;
        let path = self.folder.path().join(&blob.digest);
        std::fs::write(&path, self.member.fetch(blob).await?)?;
        let file = AdapterFile::open_parts(&path, &adapter.config)?;
        Ok(file.pairs()?)
    }

    /// Reads the set as a real evaluator would and counts its records.
    async fn records(&self, set: &v1::EvalSet) -> Result<usize> {
        let mut records = 0;
        for chunk in &set.chunks {
            let bytes = self
                .member
                .fetch(chunk.blob.as_ref().context("a chunk's blob")?)
                .await?;
            let lines = bytes.split_inclusive(|byte| *byte == b'\n').count();
            anyhow::ensure!(lines == chunk.records as usize, "{lines} lines in a chunk");
            records += lines;
        }
        for range in &set.records {
            let chunk = range.chunk.as_ref().context("a range's chunk")?;
            let bytes = self
                .member
                .fetch(chunk.blob.as_ref().context("a chunk's blob")?)
                .await?;
            let lines = bytes.split_inclusive(|byte| *byte == b'\n').count();
            let end = (range.first + range.count) as usize;
            anyhow::ensure!(end <= lines, "{lines} lines where {end} are asked for");
            records += range.count as usize;
        }
        Ok(records)
    }
}
