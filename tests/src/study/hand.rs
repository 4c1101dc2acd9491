//! A worker that trains and scores on request: `cairn-worker batch` as a child process, on one thread.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use cairn_coordinator::domain::statistics::Scores;
use cairn_stack::recipe::Recipe;
use serde::Deserialize;
use serde_json::{Value, json};

/// Ticks a second of `/proc/PID/stat`, the same on every Linux of today.
const TICKS_PER_SECOND: f64 = 100.0;

/// One child process.
pub struct Hand {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// An adapter to train.
#[derive(Debug, Clone, Copy)]
pub struct TrainJob<'a> {
    /// Hugging Face folder of the base.
    pub model: &'a Path,
    /// The records' file.
    pub data: &'a Path,
    /// How.
    pub recipe: &'a Recipe,
    /// An adapter to start from.
    pub initial: Option<&'a Path>,
    /// An adapter that the base contains and training goes on from; what is written is the change.
    pub carry: Option<&'a Path>,
    /// Leave every A as it starts.
    pub frozen_a: bool,
    /// A folder for training states, and how many segments they cut the training into.
    pub states: Option<(&'a Path, u32)>,
    /// The folder the adapter is written to.
    pub out: &'a Path,
}

/// What a training came to.
#[derive(Debug, Clone, Copy)]
pub struct Trained {
    /// Tokens, padding left out.
    pub tokens: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Processor time, seconds.
    pub cpu_seconds: f64,
}

/// What an evaluation came to.
#[derive(Debug, Clone)]
pub struct Scored {
    /// Record by record.
    pub scores: Scores,
    /// Processor time, seconds.
    pub cpu_seconds: f64,
}

impl Scored {
    /// Mean negative log-likelihood per scored token, nats.
    #[must_use]
    pub fn loss(&self) -> f64 {
        self.scores.loss().unwrap_or(f64::NAN)
    }
}

/// The built worker beside this program.
///
/// # Errors
/// When it has not been built.
pub fn program() -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found = here
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("cairn-worker"))
        .find(|path| path.is_file());
    found.context("cairn-worker is not beside this program; build it first: make build")
}

impl Hand {
    /// Starts one.
    ///
    /// # Errors
    /// When the program does not start.
    pub fn start(program: &Path) -> Result<Self> {
        let mut child = Command::new(program)
            .arg("batch")
            .env("RAYON_NUM_THREADS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let input = child.stdin.take().context("no pipe to the worker")?;
        let output = child.stdout.take().context("no pipe from the worker")?;
        Ok(Self {
            child,
            input,
            output: BufReader::new(output),
        })
    }

    /// Trains an adapter.
    ///
    /// # Errors
    /// When the worker says why not.
    pub fn train(&mut self, job: &TrainJob<'_>) -> Result<Trained> {
        #[derive(Deserialize)]
        struct Answer {
            tokens: u64,
            steps: u64,
        }
        let job = json!({"train": {
            "model": job.model, "data": job.data, "recipe": job.recipe, "initial": job.initial,
            "carry": job.carry, "frozen_a": job.frozen_a, "out": job.out,
            "states": job.states.map(|(dir, segments)| json!({"dir": dir, "segments": segments})),
        }});
        let (answer, cpu_seconds) = self.ask(&job)?;
        let Answer { tokens, steps } = serde_json::from_value(answer)?;
        Ok(Trained {
            tokens,
            steps,
            cpu_seconds,
        })
    }

    /// Scores a model with weighted adapters on `data`.
    ///
    /// # Errors
    /// When the worker says why not.
    pub fn evaluate(
        &mut self,
        model: &Path,
        adapters: &[(PathBuf, f64)],
        data: &Path,
        sequence_length: u32,
    ) -> Result<Scored> {
        #[derive(Deserialize)]
        struct Example {
            nll: f64,
            tokens: u32,
        }
        #[derive(Deserialize)]
        struct Answer {
            per_example: Vec<Example>,
        }
        let job = json!({"evaluate": {
            "model": model, "adapters": adapters, "data": data, "sequence_length": sequence_length,
        }});
        let (answer, cpu_seconds) = self.ask(&job)?;
        let Answer { per_example } = serde_json::from_value(answer)?;
        let scores = Scores {
            nll: per_example.iter().map(|one| one.nll as f32).collect(),
            tokens: per_example.iter().map(|one| one.tokens).collect(),
        };
        Ok(Scored {
            scores,
            cpu_seconds,
        })
    }

    /// One job, its answer, and the processor time it took.
    fn ask(&mut self, job: &Value) -> Result<(Value, f64)> {
        let before = cpu_seconds(self.child.id())?;
        writeln!(self.input, "{job}")?;
        self.input.flush()?;
        let mut line = String::new();
        let read = self.output.read_line(&mut line)?;
        ensure!(read > 0, "the worker ended; its last words are above");
        let answer: Value = serde_json::from_str(&line)?;
        if let Some(error) = answer.get("error") {
            bail!("the worker: {error}");
        }
        Ok((answer, cpu_seconds(self.child.id())? - before))
    }
}

/// Processor time of a process so far, user and system, seconds.
///
/// # Errors
/// When there is no such process.
pub fn cpu_seconds(process: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The program's name stands in parentheses and may hold anything; the numbers follow it.
    let numbers = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 = numbers
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|word| word.parse::<f64>().ok())
        .sum();
    Ok(ticks / TICKS_PER_SECOND)
}

impl Drop for Hand {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
