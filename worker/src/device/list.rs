//! `cairn-worker devices`: what this machine can compute with, how fast, and whether it is right.

use std::io::{self, Write, stdout};

use clap::Args;

use super::choice::{fastest, found};
use super::probe::{Depth, Report, here, remember_first_panic};
use super::{DeviceName, words};

/// List this machine's devices: usable or why not, speed, and whether each computes what it should
///
/// Each is tried with two small LoRA trainings of known outcome; one with a driver in a process of its
/// own. Exit status 1 when none is usable.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  cairn-worker devices\n  cairn-worker devices --json")]
pub struct DevicesArgs {
    /// Print one JSON object a device
    #[arg(long)]
    pub json: bool,
}

/// Try one device in this process, for `devices` and `run`
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// cuda:0, vulkan, ...
    pub device: DeviceName,
    /// The wide canary too
    #[arg(long)]
    pub whole: bool,
}

/// Runs `devices`.
///
/// # Errors
/// When no device is usable, or standard output fails.
pub fn run(args: &DevicesArgs) -> io::Result<()> {
    let mut all = Vec::new();
    for name in DeviceName::built_in() {
        eprintln!("trying {name}");
        all.extend(found(name, Depth::Whole));
    }
    let mut out = stdout().lock();
    for (_, report) in &all {
        if args.json {
            writeln!(out, "{}", serde_json::to_string(report)?)?;
        } else {
            writeln!(out, "{}", line(report))?;
        }
    }
    if let Some(line) = words::not_built_in() {
        eprintln!("{line}");
    }
    let settled = fastest(all).map_err(|_| io::Error::other("no device is usable"))?;
    eprintln!("--device auto takes {}", settled.name);
    Ok(())
}

/// Runs `probe`: one report on standard output.
///
/// # Errors
/// When standard output fails.
pub fn probe(args: &ProbeArgs) -> io::Result<()> {
    remember_first_panic();
    let depth = if args.whole {
        Depth::Whole
    } else {
        Depth::Small
    };
    let report = here(args.device, depth);
    writeln!(stdout().lock(), "{}", serde_json::to_string(&report)?)
}

/// A report for people.
fn line(report: &Report) -> String {
    let mut parts = vec![format!("{:<10}", report.device)];
    parts.extend(report.name.clone());
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64);
    parts.extend(report.memory_bytes.map(gib));
    parts.extend(
        report
            .tokens_per_second
            .map(|speed| format!("{speed:.0} tokens/s")),
    );
    match (&report.reason, &report.canary) {
        (Some(reason), _) => parts.push(format!("not usable: {reason}")),
        (None, Some(canary)) => parts.push(canary.to_string()),
        (None, None) => (),
    }
    let (device, rest) = parts.split_at(1);
    format!("{}{}", device[0], rest.join("; "))
}

#[cfg(test)]
mod tests {
    use super::super::probe::Canary;
    use super::*;

    #[test]
    fn a_line_says_what_there_is_and_what_is_wrong() {
        let mut report = Report {
            device: "vulkan".to_owned(),
            name: Some("Some Card 7".to_owned()),
            usable: true,
            reason: None,
            memory_bytes: Some(8 << 30),
            tokens_per_second: Some(5210.4),
            canary: Some(Canary {
                passed: true,
                worst: 3.1e-6,
                at: "the loss of step 2".to_owned(),
                allowed: 1e-3,
                seconds: 0.1,
            }),
        };
        assert_eq!(
            line(&report),
            "vulkan    Some Card 7; 8.0 GiB; 5210 tokens/s; canary passed: 3.1e-6 off where 0.001 is allowed"
        );
        report.reason = Some("it is off".to_owned());
        assert!(line(&report).ends_with("not usable: it is off"));
    }
}
