//! The scorecard: a line as each scenario ends, a table at the end, and one line of JSON.
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use super::suite::{Outcome, Played, Scenario};

/// One line as it comes.
#[must_use]
pub fn line(played: &Played) -> String {
    let name = played.scenario.name;
    let seconds = played.took.as_secs_f64();
    match &played.outcome {
        Outcome::Survived(told) => format!("{seconds:>6.1} s  survived  {name}: {}", told.saw),
        Outcome::Broken(why) => format!("{seconds:>6.1} s  BROKEN    {name}: {why}"),
        Outcome::LeftOut(why) => format!("{seconds:>6.1} s  left out  {name}: {why}"),
    }
}

/// What `--list` shows.
#[must_use]
pub fn list(scenarios: &[&Scenario]) -> String {
    let mut text = String::new();
    for one in scenarios {
        let _ = writeln!(
            text,
            "{:<26} {}\n{:<26} -> {}",
            one.name, one.does, "", one.expects
        );
    }
    text
}

/// The table, in Markdown.
#[must_use]
pub fn table(all: &[Played]) -> String {
    let mut text =
        "| scenario | what is done | expected | outcome | recovery | acks |\n|---|---|---|---|---|---|\n".to_owned();
    for played in all {
        let outcome = match &played.outcome {
            Outcome::Survived(told) => format!("survived: {}", told.saw),
            Outcome::Broken(why) => format!("**broken**: {why}"),
            Outcome::LeftOut(why) => format!("left out: {why}"),
        };
        let seconds = recovery(played).map(|time| format!("{:.1} s", time.as_secs_f64()));
        let Scenario {
            name,
            does,
            expects,
            ..
        } = played.scenario;
        let _ = writeln!(
            text,
            "| {name} | {does} | {expects} | {} | {} | {} |",
            outcome.replace('|', "/").replace('\n', " "),
            seconds.unwrap_or_default(),
            played.findings.acks
        );
    }
    text
}

fn recovery(played: &Played) -> Option<Duration> {
    match &played.outcome {
        Outcome::Survived(told) => told.recovery,
        Outcome::Broken(_) | Outcome::LeftOut(_) => None,
    }
}

/// Whether everything that was played was survived.
#[must_use]
pub fn all_survived(all: &[Played]) -> bool {
    !all.iter()
        .any(|played| matches!(played.outcome, Outcome::Broken(_)))
}

/// The last line. `scenarios` counts those that were played.
#[must_use]
pub fn json(all: &[Played]) -> Value {
    let of =
        |wanted: fn(&Outcome) -> bool| all.iter().filter(|played| wanted(&played.outcome)).count();
    let left_out = of(|outcome| matches!(outcome, Outcome::LeftOut(_)));
    let worst = all
        .iter()
        .flat_map(|played| [recovery(played), Some(played.findings.recovery)])
        .flatten()
        .max()
        .unwrap_or_default();
    let sum = |count: fn(&Played) -> usize| all.iter().map(count).sum::<usize>();
    json!({
        "scenarios": all.len() - left_out,
        "survived": of(|outcome| matches!(outcome, Outcome::Survived(_))),
        "acks": sum(|played| played.findings.acks),
        "acks_lost": sum(|played| played.findings.acks_lost),
        "double_credits": sum(|played| played.findings.double_credits),
        "worst_recovery_s": (worst.as_secs_f64() * 10.0).round() / 10.0,
        "left_out": left_out,
        "reproduced": sum(|played| played.findings.reproduced),
    })
}
