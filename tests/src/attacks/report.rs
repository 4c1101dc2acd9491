//! The table and the line of JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::kinds::Kind;
use super::play::End;
use super::rules::Rule;

/// What one kind came to.
#[derive(Debug, Clone)]
pub struct Line {
    /// The kind.
    pub kind: Kind,
    /// How each trial ended.
    pub ends: Vec<End>,
    /// Trials of volunteers who had trust.
    pub trusted: usize,
    /// The same by one at a time.
    pub alone: Alone,
    /// Audit loss when a third of the volunteers does this: over the clean round's, less one.
    pub damage: Option<f64>,
    /// The same under other rules; `None` where the result is no model.
    pub rules: Vec<(Rule, Option<f64>)>,
}

/// What it came to with one saboteur at a time.
#[derive(Debug, Clone, Default)]
pub struct Alone {
    /// How each trial ended.
    pub ends: Vec<End>,
    /// Audit loss over the clean round's, less one.
    pub damage: Option<f64>,
}

impl Alone {
    /// Trials that did not become part of a round.
    #[must_use]
    pub fn caught(&self) -> usize {
        caught(&self.ends)
    }
}

fn caught(ends: &[End]) -> usize {
    ends.iter().filter(|end| **end != End::Accepted).count()
}

impl Line {
    /// Trials that did not become part of a round.
    #[must_use]
    pub fn caught(&self) -> usize {
        caught(&self.ends)
    }

    /// Each word with its count, most frequent first; accepted ones last.
    #[must_use]
    pub fn stages(&self) -> Vec<(String, usize)> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for end in &self.ends {
            *counts.entry(end.word()).or_default() += 1;
        }
        let mut stages: Vec<(String, usize)> = counts
            .into_iter()
            .map(|(word, count)| (word.to_owned(), count))
            .collect();
        stages.sort_by_key(|(word, count)| (word == "ACCEPTED", std::cmp::Reverse(*count)));
        stages
    }
}

/// Everything that is reported.
#[derive(Debug, Clone)]
pub struct Report {
    /// Kinds.
    pub lines: Vec<Line>,
    /// Honest submissions.
    pub honest: usize,
    /// Those rejected, with reason and count.
    pub honest_rejected: Vec<(String, usize)>,
    /// Processor time of coordinator and evaluator in rounds without saboteurs, over that of the
    /// trainings judged in them.
    pub verify_cost_share: f64,
    /// Processor time of the clean rounds' trainings, seconds.
    pub training_seconds: f64,
    /// Processor time of coordinator and evaluator in them, seconds.
    pub verify_seconds: f64,
    /// The share while all volunteers were new and every submission was audited.
    pub newcomer_cost_share: f64,
    /// Audit loss of the clean round with the first recipe seed.
    pub clean_audit_loss: f64,
    /// How many trainings were really done.
    pub trainings: usize,
    /// What was revoked of what got through.
    pub revocations: Vec<String>,
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(
        || "broken".to_owned(),
        |value| format!("{:+.2} %", 100.0 * value),
    )
}

fn damage(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |damage| percent(Some(damage)))
}

/// The table, for people.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut out = format!(
        "{:<14} {:>6} {:>6}  {:>9}  {:>6} {:>9}  {:>9}  {:>9}  {:>9}  {:>9}  stage\n",
        "attack", "trials", "caught", "Cairn", "alone", "Cairn", "mean", "clip", "krum", "median"
    );
    for line in &report.lines {
        let rule = |rule: Rule| {
            let found = line.rules.iter().find(|(one, _)| *one == rule);
            found.map_or_else(|| "-".to_owned(), |(_, damage)| percent(*damage))
        };
        let stages: Vec<String> = line
            .stages()
            .into_iter()
            .map(|(word, count)| format!("{word} {count}"))
            .collect();
        let trusted = match line.trusted {
            0 => String::new(),
            some => format!(" ({some} of volunteers with trust)"),
        };
        let _ = writeln!(
            out,
            "{:<14} {:>6} {:>6}  {:>9}  {:>6} {:>9}  {:>9}  {:>9}  {:>9}  {:>9}  {}{trusted}",
            line.kind.name(),
            line.ends.len(),
            line.caught(),
            damage(line.damage),
            format!("{}/{}", line.alone.caught(), line.alone.ends.len()),
            damage(line.alone.damage),
            rule(Rule::Mean),
            rule(Rule::Clip),
            rule(Rule::Krum),
            rule(Rule::Median),
            stages.join(", ")
        );
    }
    let rejected: usize = report.honest_rejected.iter().map(|(_, count)| count).sum();
    let _ = writeln!(
        out,
        "\nhonest submissions: {}, rejected: {rejected} ({:.2} %) {}",
        report.honest,
        100.0 * rejected as f64 / report.honest.max(1) as f64,
        report
            .honest_rejected
            .iter()
            .map(|(word, count)| format!("{word} {count}"))
            .collect::<Vec<_>>()
            .join(", ")
    );
    let _ = writeln!(
        out,
        "verification: {:.1} CPU s for {:.1} CPU s of training: {:.1} % ({:.1} % while all volunteers were new)",
        report.verify_seconds,
        report.training_seconds,
        100.0 * report.verify_cost_share,
        100.0 * report.newcomer_cost_share
    );
    let _ = writeln!(
        out,
        "clean round: audit loss {:.4}; {} trainings were done and handed in again and again",
        report.clean_audit_loss, report.trainings
    );
    for line in &report.revocations {
        let _ = writeln!(out, "{line}");
    }
    out
}

/// The last line.
#[must_use]
pub fn json_line(report: &Report) -> Value {
    let attacks: Vec<Value> = report
        .lines
        .iter()
        .map(|line| {
            let stages = line.stages();
            let rules: serde_json::Map<String, Value> = line
                .rules
                .iter()
                .map(|(rule, damage)| (rule.name().to_owned(), json!(damage)))
                .collect();
            json!({
                "kind": line.kind.name(),
                "trials": line.ends.len(),
                "caught": line.caught(),
                "trusted": line.trusted,
                "alone_trials": line.alone.ends.len(),
                "alone_caught": line.alone.caught(),
                "audit_damage_alone": line.alone.damage,
                "stage": stages.first().map(|(word, _)| word),
                "audit_damage_30pct": line.damage,
                "false_accepts": line.ends.len() - line.caught(),
                "stages": stages.iter().map(|(word, count)| json!([word, count])).collect::<Vec<_>>(),
                "audit_damage_30pct_other_rules": rules,
            })
        })
        .collect();
    let rejected: usize = report.honest_rejected.iter().map(|(_, count)| count).sum();
    json!({
        "attacks": attacks,
        "honest": report.honest,
        "honest_rejected": rejected,
        "verify_cost_share": report.verify_cost_share,
        "verify_cost_share_newcomers": report.newcomer_cost_share,
    })
}
