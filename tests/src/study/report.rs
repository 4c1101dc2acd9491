//! The table and the line of JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use cairn_coordinator::domain::statistics::Scores;
use serde_json::{Value, json};

use super::arms::{Arm, Outcome};
use super::runs::Key;
use super::shards::Split;

/// One line of the table: an arm on a split, over all seeds.
#[derive(Debug, Clone)]
pub struct Line {
    /// The arm.
    pub arm: Arm,
    /// The split.
    pub split: Split,
    /// Mean audit loss, nats a token.
    pub audit_loss: f64,
    /// Standard error of the audit loss's difference to central's, paired by record, each record's
    /// difference averaged over the seeds first. For central itself: to the base's.
    pub se: f64,
    /// `(base - arm) / (base - central)`.
    pub gain_recovered: f64,
    /// Lowest and highest audit loss of the seeds.
    pub range: (f64, f64),
    /// Bytes up and down for one volunteer.
    pub bytes: f64,
    /// Processor time of training, seconds, all volunteers, mean over the seeds.
    pub cpu_seconds: f64,
    /// Processor time of the evaluations that decide, seconds.
    pub judge_seconds: f64,
    /// Mean audit loss after each round.
    pub rounds: Vec<f64>,
    /// Mean loss on text of the base's own kind after each round.
    pub old: Vec<f64>,
    /// Mean effective rank after each round.
    pub effective_rank: Vec<f64>,
}

/// All lines that there are runs for.
///
/// # Errors
/// When the base was not scored.
pub fn lines(outcomes: &BTreeMap<Key, Outcome>, splits: &[Split]) -> Result<Vec<Line>> {
    let base = outcomes
        .iter()
        .find(|(key, _)| key.0 == Arm::Base)
        .and_then(|(_, outcome)| outcome.audit.first())
        .context("the base was not scored")?;
    let of = |arm: Arm, split: Split| -> Vec<&Outcome> {
        let split = if arm.deals() { split } else { Split::Iid };
        let same = |key: &Key| key.0 == arm && key.1 == split;
        let found = outcomes.iter().filter(|(key, _)| same(key));
        found.map(|(_, outcome)| outcome).collect()
    };
    let central: Vec<&Scores> = finals(&of(Arm::Central, Split::Iid));
    let base_loss = base.loss().unwrap_or(f64::NAN);
    let central_gain = base_loss - mean(central.iter().filter_map(|scores| scores.loss()));
    let mut lines = Vec::new();
    for split in splits.iter().copied() {
        for arm in Arm::ALL {
            let runs = of(arm, split);
            if runs.is_empty() {
                continue;
            }
            let last = finals(&runs);
            let losses: Vec<f64> = last.iter().filter_map(|scores| scores.loss()).collect();
            let audit_loss = mean(losses.iter().copied());
            let against = match arm {
                Arm::Base | Arm::Central => vec![base],
                _ => central.clone(),
            };
            lines.push(Line {
                arm,
                split,
                audit_loss,
                se: paired_se(&against, &last),
                gain_recovered: (base_loss - audit_loss) / central_gain,
                range: (
                    losses.iter().copied().fold(f64::INFINITY, f64::min),
                    losses.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                ),
                bytes: mean(runs.iter().map(|run| run.bytes)),
                cpu_seconds: mean(runs.iter().map(|run| run.cpu_seconds)),
                judge_seconds: mean(runs.iter().map(|run| run.judge_seconds)),
                rounds: by_round(&runs, |run| {
                    run.audit.iter().filter_map(Scores::loss).collect()
                }),
                old: by_round(&runs, |run| run.old.clone()),
                effective_rank: by_round(&runs, |run| run.effective_rank.clone()),
            });
        }
    }
    Ok(lines)
}

fn finals<'a>(runs: &[&'a Outcome]) -> Vec<&'a Scores> {
    runs.iter().filter_map(|run| run.audit.last()).collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, n), value| (sum + value, n + 1.0));
    if count > 0.0 { sum / count } else { f64::NAN }
}

fn by_round(runs: &[&Outcome], values: impl Fn(&Outcome) -> Vec<f64>) -> Vec<f64> {
    let all: Vec<Vec<f64>> = runs.iter().map(|run| values(run)).collect();
    let rounds = all.iter().map(Vec::len).max().unwrap_or(0);
    (0..rounds)
        .map(|round| mean(all.iter().filter_map(|run| run.get(round).copied())))
        .collect()
}

/// Standard error of the mean difference of two arms' losses, over records, seeds averaged first.
fn paired_se(reference: &[&Scores], candidate: &[&Scores]) -> f64 {
    let (Some(first), false) = (reference.first(), candidate.is_empty()) else {
        return f64::NAN;
    };
    let records = first.nll.len();
    let tokens = first.tokens_total() as f64 / records.max(1) as f64;
    let of = |runs: &[&Scores], j: usize| {
        mean(
            runs.iter()
                .filter_map(|run| run.nll.get(j))
                .map(|nll| f64::from(*nll)),
        )
    };
    let differences: Vec<f64> = (0..records)
        .map(|j| (of(reference, j) - of(candidate, j)) / tokens)
        .collect();
    let middle = mean(differences.iter().copied());
    let squares: f64 = differences.iter().map(|d| (d - middle).powi(2)).sum();
    let n = records as f64;
    (squares / (n - 1.0).max(1.0) / n).sqrt()
}

/// The table, for people.
#[must_use]
pub fn table(lines: &[Line]) -> String {
    let mut out = String::from(
        "split      arm           audit loss  +- paired  seeds            gain recovered  bytes/volunteer  train CPU s  judge CPU s\n",
    );
    for line in lines {
        let _ = writeln!(
            out,
            "{:<10} {:<13} {:>10.4}  {:>9.4}  {:.4} - {:.4}  {:>14.2} %  {:>15.0}  {:>11.1}  {:>11.1}",
            line.split.name(),
            line.arm.name(),
            line.audit_loss,
            line.se,
            line.range.0,
            line.range.1,
            100.0 * line.gain_recovered,
            line.bytes,
            line.cpu_seconds,
            line.judge_seconds,
        );
    }
    for (title, values) in [
        (
            "audit loss by round",
            (|line| &line.rounds) as fn(&Line) -> &Vec<f64>,
        ),
        ("loss on the base's own kind of text by round", |line| {
            &line.old
        }),
        ("effective rank by round, mean over modules", |line| {
            &line.effective_rank
        }),
    ] {
        let _ = writeln!(out, "\n{title}");
        for line in lines {
            let numbers: Vec<String> = values(line)
                .iter()
                .map(|value| format!("{value:.3}"))
                .collect();
            let (split, arm) = (line.split.name(), line.arm.name());
            let _ = writeln!(out, "{split:<10} {arm:<13} {}", numbers.join(" "));
        }
    }
    out
}

/// The bars, each with what was measured.
#[must_use]
pub fn bars(lines: &[Line]) -> String {
    let find = |arm: Arm, split: Split| lines.iter().find(|l| (l.arm, l.split) == (arm, split));
    let mut out = String::from("bars\n");
    let mut bar = |held: bool, text: String| {
        let _ = writeln!(out, "{} {text}", if held { "held  " } else { "missed" });
    };
    for (split, least) in [(Split::Iid, 0.99), (Split::Dirichlet, 0.97)] {
        let name = split.name();
        for arm in [Arm::Stack, Arm::Fedex] {
            let Some(line) = find(arm, split) else {
                continue;
            };
            let arm = line.arm.name();
            let recovered = line.gain_recovered;
            bar(
                recovered >= least,
                format!(
                    "{arm}, {name}: {:.2} % of the central gain; at least {:.0} %",
                    100.0 * recovered,
                    100.0 * least
                ),
            );
            if let Some(fedit) = find(Arm::Fedit, split) {
                bar(
                    line.audit_loss < fedit.audit_loss,
                    format!(
                        "{arm}, {name}: audit loss {:.4} below FedIT's {:.4}",
                        line.audit_loss, fedit.audit_loss
                    ),
                );
            }
            if let Some(central) = find(Arm::Central, split) {
                bar(
                    line.audit_loss < central.audit_loss,
                    format!(
                        "{arm}, {name}: audit loss {:.4} below one central LoRA's {:.4}",
                        line.audit_loss, central.audit_loss
                    ),
                );
            }
            let improving = line
                .rounds
                .windows(2)
                .take_while(|pair| pair[1] < pair[0])
                .count();
            let rounds = if line.rounds.is_empty() {
                0
            } else {
                improving + 1
            };
            bar(
                rounds >= 6,
                format!("{arm}, {name}: the audit loss improves for {rounds} rounds; at least 6"),
            );
        }
    }
    out
}

/// The last line.
#[must_use]
pub fn json_line(lines: &[Line]) -> Value {
    let arms: Vec<Value> = lines
        .iter()
        .map(|line| {
            json!({
                "arm": line.arm.name(),
                "split": line.split.name(),
                "audit_loss": line.audit_loss,
                "se": line.se,
                "gain_recovered": line.gain_recovered,
                "bytes": line.bytes.round(),
                "cpu_seconds": line.cpu_seconds,
                "judge_cpu_seconds": line.judge_seconds,
                "audit_loss_by_round": line.rounds,
                "old_loss_by_round": line.old,
                "effective_rank_by_round": line.effective_rank,
            })
        })
        .collect();
    json!({"arms": arms})
}
