//! Three coordinators over one PostgreSQL and one blob store, behind a balancer, killed at random
//! while volunteers submit, evaluators score and rounds publish; then everything that was
//! acknowledged is looked for.
//!
//! - `group`: the coordinators, and who kills them
//! - `people`: volunteers, evaluators and rounds
//! - `proof`: what must be true afterwards
mod group;
mod people;
mod proof;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use tokio::time::Instant;

use group::Group;
use people::People;

/// How much of it.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Coordinators.
    pub replicas: usize,
    /// Rounds, each of a model of its own.
    pub rounds: usize,
    /// How many of them run at once.
    pub rounds_at_once: usize,
    /// Shards of each.
    pub shards: u32,
    /// Volunteers.
    pub volunteers: usize,
    /// Submissions with which each volunteer cheats in a round: copies, rejected without an evaluation.
    pub copies: u32,
    /// Evaluators.
    pub evaluators: usize,
    /// Mean time between two kills.
    pub kill_every: Duration,
    /// Blobs in a bucket, an S3 server in this process, and not in a folder.
    pub bucket: bool,
}

/// What was seen.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Coordinators.
    pub replicas: usize,
    /// Submissions that were acknowledged.
    pub submissions: usize,
    /// Acknowledgements of which the log, the rounds or the worker's list know nothing.
    pub acks_lost: usize,
    /// Leases with more than one submission, or more than one credited verdict.
    pub double_credits: usize,
    /// Submissions with a credit.
    pub credited: usize,
    /// SIGKILLs.
    pub kills: usize,
    /// Entries of the log, whose root is the signed one.
    pub log_entries: usize,
    /// Rounds.
    pub rounds: usize,
    /// Checkpoints that rounds published.
    pub published: usize,
    /// Of these, rebuilt by `cairn checkpoint reproduce`, every byte identical.
    pub reproduced: usize,
    /// From the first claim to the last verdict, seconds.
    pub seconds: f64,
    /// Acknowledgements a second.
    pub submissions_per_second: f64,
    /// From the kill of a coordinator that ran tasks, and stayed away, to the next one that took them.
    pub takeover_seconds: Vec<f64>,
    /// Between two acknowledgements, the longest time, seconds.
    pub longest_pause_seconds: f64,
    /// Uploads that went straight to the bucket; `None` without one.
    pub direct_puts: Option<usize>,
    /// Calls that failed for good in an unexpected way.
    pub unexpected: Vec<String>,
}

impl Report {
    /// Whether nothing was lost and nothing counted twice.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.acks_lost == 0
            && self.double_credits == 0
            && self.published == self.reproduced
            && self.published > 0
            && self.unexpected.is_empty()
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let worst = self.takeover_seconds.iter().copied().fold(0.0, f64::max);
        let mut text = String::new();
        let rows = [
            ("coordinators", self.replicas.to_string()),
            ("submissions acknowledged", self.submissions.to_string()),
            ("kill -9", self.kills.to_string()),
            ("acknowledgements lost", self.acks_lost.to_string()),
            ("leases credited twice", self.double_credits.to_string()),
            ("submissions credited", self.credited.to_string()),
            ("log entries, root as signed", self.log_entries.to_string()),
            ("rounds", self.rounds.to_string()),
            ("checkpoints published", self.published.to_string()),
            ("checkpoints reproduced", self.reproduced.to_string()),
            ("seconds", format!("{:.0}", self.seconds)),
            (
                "submissions a second",
                format!("{:.1}", self.submissions_per_second),
            ),
            (
                "longest pause between two, seconds",
                format!("{:.1}", self.longest_pause_seconds),
            ),
            (
                "takeovers of a dead one's tasks",
                self.takeover_seconds.len().to_string(),
            ),
            ("slowest of them, seconds", format!("{worst:.1}")),
            (
                "uploads straight to the bucket",
                self.direct_puts
                    .map_or("-".to_owned(), |puts| puts.to_string()),
            ),
            ("unexpected refusals", self.unexpected.len().to_string()),
        ];
        for (name, value) in rows {
            let _ = writeln!(text, "| {name} | {value} |");
        }
        text
    }
}

/// Runs it on an empty database, in an empty folder.
///
/// # Errors
/// When something cannot be started, or stands still.
pub async fn run(size: &Size, database_url: &str, folder: &Path) -> Result<Report> {
    let group = Arc::new(Group::start(size, database_url, folder).await?);
    let people = People::join(size, &group, folder).await?;
    let killing = tokio::spawn(Arc::clone(&group).kill_now_and_then(size.kill_every));
    let began = Instant::now();
    let outcome = people.work(size).await;
    killing.abort();
    let seconds = began.elapsed().as_secs_f64();
    // Whoever is away comes back, to be asked.
    group.restart_all().await?;
    let outcome = outcome?;
    let mut report = Report {
        replicas: size.replicas,
        seconds,
        rounds: size.rounds,
        kills: group.kills(),
        takeover_seconds: group.takeovers(),
        direct_puts: group.direct_puts(),
        ..Report::default()
    };
    proof::check(&people, &outcome, folder, &mut report).await?;
    report.submissions_per_second = report.submissions as f64 / seconds;
    Ok(report)
}
