//! Volunteers, evaluators and rounds, all behind the balancer.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use cairn_proto::client::{Client, ClientError, Options, join};
use cairn_proto::reason::ErrorReason;
use cairn_proto::url::JoinUrl;
use cairn_proto::v1;
use futures::StreamExt as _;
use futures::stream;
use tokio::time::Instant;

use super::Size;
use super::group::Group;
use crate::adapters::honest;
use crate::evaluator::Evaluator;
use crate::member::{Member, training};
use crate::tiny;

/// How long a claim waits for work.
const CLAIM_WAIT_MS: i64 = 2_000;
/// How long anybody keeps trying while nobody answers: far longer than any kill lasts.
const PATIENCE: Duration = Duration::from_mins(5);
/// How often a round is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// One in so many submissions is sent once more: its answer might have been lost.
const AGAIN_EVERY: u64 = 10;
/// Joins at once.
const JOINS: usize = 4;
/// A round that takes longer stands still.
const ROUND_MAX: Duration = Duration::from_mins(20);

/// An acknowledged submission.
#[derive(Debug, Clone)]
pub struct Ack {
    /// Its id.
    pub id: String,
    /// What was signed.
    pub receipt: v1::Receipt,
    /// The worker's place among the volunteers.
    pub volunteer: usize,
}

/// What came of all the work.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Every acknowledgement.
    pub acks: Vec<Ack>,
    /// Ids of all rounds.
    pub rounds: Vec<String>,
    /// Model and revision of every checkpoint that a round published.
    pub published: Vec<(String, u32)>,
    /// Calls that failed for good, for no reason that a kill explains.
    pub unexpected: Vec<String>,
    /// The longest time between two acknowledgements, seconds.
    pub longest_pause: f64,
}

/// Everybody who is signed on.
pub struct People {
    /// The one who opens rounds.
    pub maintainer: Member,
    /// Whoever submits.
    pub volunteers: Vec<Member>,
    evaluators: Vec<Evaluator>,
    base: PathBuf,
    files: Vec<v1::File>,
}

struct Shared {
    over: AtomicBool,
    seeds: AtomicU64,
    outcome: Mutex<Outcome>,
    last: Mutex<Option<Instant>>,
}

impl Shared {
    fn note<T>(&self, note: impl FnOnce(&mut Outcome) -> T) -> T {
        note(&mut self.outcome.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn acknowledged(&self, ack: Ack) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let pause = last
            .replace(Instant::now())
            .map_or(0.0, |last| last.elapsed().as_secs_f64());
        drop(last);
        self.note(|outcome| {
            outcome.longest_pause = outcome.longest_pause.max(pause);
            outcome.acks.push(ack);
        });
    }

    /// Some refusals are part of life: the round has ended, the lease has gone.
    fn refused(&self, what: &str, error: &ClientError) {
        let fine = matches!(
            error.reason(),
            Some(ErrorReason::RoundEnded | ErrorReason::LeaseLost)
        );
        if !fine {
            self.note(|outcome| outcome.unexpected.push(format!("{what}: {error}")));
        }
    }
}

async fn signed_on(url: &JoinUrl, name: &str, folder: &Path) -> Result<Member> {
    let options = Options {
        patience: PATIENCE,
        ..Options::default()
    };
    let path = folder.join(format!("{name}.json"));
    let identity = join(url, name, &path, &options).await?;
    Member::new(Client::new(identity, options)?)
}

impl People {
    /// Signs everybody on and uploads model and sets.
    ///
    /// # Errors
    /// When somebody is refused.
    pub async fn join(size: &Size, group: &Group, folder: &Path) -> Result<Self> {
        let base = folder.join("base");
        let maintainer = signed_on(&group.join_url("maintainer")?, "ada", folder).await?;
        maintainer.add_tiny(&base).await?;
        let files = maintainer.checkpoint("").await?.files;
        // The manifest's files lie beside them.
        let own = |file: &v1::File| base.join(&file.path).exists();
        let files = files.into_iter().filter(own).collect();
        let mut people = Self {
            maintainer,
            volunteers: Vec::new(),
            evaluators: Vec::new(),
            files,
            base,
        };
        for (role, word, count) in [
            (v1::Role::Evaluator, "evaluator", size.evaluators),
            (v1::Role::Volunteer, "volunteer", size.volunteers),
        ] {
            let uses = u32::try_from(count)?;
            let url = people.maintainer.create_token(role, uses, 600_000).await?;
            let url = url.parse::<JoinUrl>().map_err(|error| anyhow!("{error}"))?;
            let joining = (0..count).map(|number| {
                let (url, name) = (&url, format!("{word}-{number}"));
                async move { signed_on(url, &name, folder).await }
            });
            let joined: Vec<Result<Member>> = stream::iter(joining).buffered(JOINS).collect().await;
            for member in joined {
                match role {
                    v1::Role::Evaluator => {
                        let evaluator = Evaluator::new(member?, &people.base)?;
                        people.evaluators.push(evaluator);
                    }
                    _ => people.volunteers.push(member?),
                }
            }
        }
        Ok(people)
    }

    /// Runs all rounds to their ends.
    ///
    /// # Errors
    /// When a round stands still or cannot be opened.
    pub async fn work(&self, size: &Size) -> Result<Outcome> {
        let shared = Shared {
            over: AtomicBool::new(false),
            seeds: AtomicU64::new(1),
            outcome: Mutex::default(),
            last: Mutex::default(),
        };
        let rounds = async {
            let rounds = (0..size.rounds).map(|number| self.round(size, number, &shared));
            let ended: Vec<Result<()>> = stream::iter(rounds)
                .buffer_unordered(size.rounds_at_once)
                .collect()
                .await;
            shared.over.store(true, Ordering::Relaxed);
            ended.into_iter().collect::<Result<()>>()
        };
        let volunteers = self.volunteers.iter().enumerate();
        let volunteers =
            volunteers.map(|(number, member)| volunteer(size, number, member, &shared));
        let evaluators = self.evaluators.iter().map(|one| evaluate(one, &shared));
        let (rounds, _, _) = tokio::join!(
            rounds,
            futures::future::join_all(volunteers),
            futures::future::join_all(evaluators)
        );
        rounds?;
        Ok(shared
            .outcome
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner))
    }

    /// One round of a model of its own.
    async fn round(&self, size: &Size, number: usize, shared: &Shared) -> Result<()> {
        let model = format!("tiny-{number}");
        self.maintainer
            .create_model(&model, self.files.clone())
            .await
            .with_context(|| format!("add {model}"))?;
        let rule = ["stack", "multi-krum", "geometric-median"][number % 3];
        let file = tiny::round_file(size.shards).replace(
            &format!("model = \"{}\"", tiny::MODEL),
            &format!("model = \"{model}\""),
        );
        // Without audits: their uploads and replays show nothing more here.
        let file = format!("{file}segments = 0\naggregation = \"{rule}\"\n");
        let id = self
            .maintainer
            .open_round(&file)
            .await
            .context("open a round")?;
        shared.note(|outcome| outcome.rounds.push(id.clone()));
        let opened = Instant::now();
        loop {
            tokio::time::sleep(LOOK).await;
            let view = self.maintainer.round(&id).await?;
            let round = view.round.context("a view without a round")?;
            if round.ended_ms != 0 {
                eprintln!(
                    "round {number} ({rule}): {:?} {}, {} submissions, {} s",
                    round.state(),
                    round.reason,
                    view.contributions.len(),
                    opened.elapsed().as_secs()
                );
                if round.state() == v1::RoundState::Published {
                    let revision = round.published_revision;
                    shared.note(|outcome| outcome.published.push((model, revision)));
                }
                return Ok(());
            }
            ensure!(opened.elapsed() < ROUND_MAX, "round {id} stands still");
        }
    }
}

async fn volunteer(size: &Size, number: usize, member: &Member, shared: &Shared) {
    let mut copies: BTreeMap<String, u32> = BTreeMap::new();
    while !shared.is_over() {
        let lease = match member.claim_within(CLAIM_WAIT_MS).await {
            Ok(Some(lease)) => lease,
            Ok(None) => continue,
            Err(error) => {
                shared.refused("claim", &error);
                continue;
            }
        };
        let copied = copies.entry(training(&lease).round_id.clone()).or_default();
        let seed = if *copied < size.copies {
            *copied += 1;
            0
        } else {
            shared.seeds.fetch_add(1, Ordering::Relaxed)
        };
        let adapter = honest(seed);
        if let Err(error) = member.upload(&adapter.weights, &lease.id).await {
            shared.refused("upload", &error);
            continue;
        }
        let request = member.submission(&lease, &adapter);
        let answer = match member.submit(&request).await {
            Ok(answer) => answer,
            Err(error) => {
                shared.refused("submit", &error);
                continue;
            }
        };
        if seed % AGAIN_EVERY == 1 {
            match member.submit(&request).await {
                Ok(again) if again == answer => {}
                Ok(_) => shared.note(|outcome| {
                    outcome
                        .unexpected
                        .push("the same request had another answer".to_owned());
                }),
                Err(error) => shared.refused("submit again", &error),
            }
        }
        shared.acknowledged(Ack {
            id: answer.submission_id,
            receipt: answer.receipt.unwrap_or_default(),
            volunteer: number,
        });
    }
}

async fn evaluate(evaluator: &Evaluator, shared: &Shared) {
    while !shared.is_over() {
        let lease = match evaluator.member.claim_within(CLAIM_WAIT_MS).await {
            Ok(Some(lease)) => lease,
            Ok(None) => continue,
            Err(error) => {
                shared.refused("claim an evaluation", &error);
                continue;
            }
        };
        match evaluator.answer_any(&lease).await {
            Ok(answer) => {
                if let Err(error) = evaluator.send(&answer).await {
                    shared.refused("score", &error);
                }
            }
            Err(error) => {
                let text = format!("evaluate: {error:#}");
                shared.note(|outcome| outcome.unexpected.push(text));
            }
        }
    }
}
