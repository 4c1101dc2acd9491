//! The study of stacking runs, small, and prints what its readers read.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::Command;

use serde_json::Value;

/// The last line of a study's output.
fn last_line(arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_cairn-studies"))
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn the_study_of_stacking() {
    let line = last_line(&["study", "--quick", "--split", "iid"]);
    let arms = line["arms"].as_array().unwrap();
    let loss = |name: &str| {
        let arm = arms.iter().find(|arm| arm["arm"] == name).unwrap();
        assert_eq!(arm["split"], "iid");
        assert!(arm["se"].is_f64() && arm["bytes"].is_f64());
        arm["audit_loss"].as_f64().unwrap()
    };
    for arm in ["central", "central-wide", "fedit", "ffa", "stack", "fedex"] {
        assert!(loss(arm) < loss("base"), "{arm}");
    }
}
