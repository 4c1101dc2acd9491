//! `devices`, `--device auto`, and what happens where a device is not there.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::process::{Command, Output, Stdio};

use cairn_worker::device::DeviceName;
use serde_json::Value;

fn worker(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn-worker"));
    command.args(args).stdin(Stdio::null());
    command.env_remove("CAIRN_DEVICE");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn objects(output: &Output) -> Vec<Value> {
    let lines = text(&output.stdout);
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn every_device_built_in_is_listed_and_the_tested_one_is_right() {
    let output = worker(&["devices", "--json"]).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let reports = objects(&output);
    println!("{reports:#?}\n{said}");
    for name in DeviceName::built_in() {
        let report = reports.iter().find(|r| r["device"] == name.to_string());
        let report = report.unwrap_or_else(|| panic!("{name} is not listed"));
        assert_ne!(
            report["usable"].as_bool().unwrap(),
            report["reason"].is_string()
        );
    }
    let own = common::device().to_string();
    let own = reports.iter().find(|r| r["device"] == own).unwrap();
    assert_eq!(own["usable"], true, "{own}");
    assert_eq!(own["canary"]["passed"], true);
    assert!(own["canary"]["worst"].as_f64() < own["canary"]["allowed"].as_f64());
    assert!(own["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(said.contains("--device auto takes "), "{said}");
}

#[test]
fn people_get_a_line_a_device() {
    let output = worker(&["devices"]).output().unwrap();
    let lines = text(&output.stdout);
    assert_eq!(
        lines.lines().count(),
        DeviceName::built_in().len(),
        "{lines}"
    );
    assert!(lines.contains("tokens/s; canary passed: "), "{lines}");
}

#[test]
fn a_probe_answers_with_one_object_whatever_happens() {
    let own = common::device().to_string();
    let good = worker(&["probe", &own]).output().unwrap();
    assert_eq!(objects(&good)[0]["usable"], true);
    for name in ["cuda:200", "rocm:200", "metal"] {
        let output = worker(&["probe", name]).output().unwrap();
        let reports = objects(&output);
        assert_eq!(reports.len(), 1, "{name}: {}", text(&output.stderr));
        assert_eq!(reports[0]["usable"], false);
        assert!(reports[0]["reason"].as_str().unwrap().len() > 10);
    }
}

/// A graphics interface without a driver: the loader finds no manifest.
#[test]
#[cfg(feature = "vulkan")]
fn a_driver_that_is_missing_is_a_reason() {
    let mut command = worker(&["devices", "--json"]);
    command.env("VK_DRIVER_FILES", "/no/such/driver.json");
    command.env("VK_ICD_FILENAMES", "/no/such/driver.json");
    let output = command.output().unwrap();
    let reports = objects(&output);
    println!("{reports:#?}");
    let vulkan = reports.iter().find(|r| r["device"] == "vulkan").unwrap();
    assert_eq!(vulkan["usable"], false);
    let reason = vulkan["reason"].as_str().unwrap();
    assert!(reason.contains("mesa-vulkan-drivers"), "{reason}");
    if DeviceName::built_in().len() == 1 {
        assert!(!output.status.success());
        assert!(text(&output.stderr).contains("no device is usable"));
    }
}
