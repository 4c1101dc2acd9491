//! The quick ones of `make chaos`, so that it keeps working. The others wait for timeouts, or need what
//! not every machine has.

use std::process::Command;

use cairn_tests::process::built;
use serde_json::Value;

#[test]
fn the_quick_scenarios_are_survived() {
    let program = built("cairn-tests", "cairn-chaos").unwrap();
    let run = Command::new(program).arg("--quick").output().unwrap();
    let text = String::from_utf8(run.stdout).unwrap();
    assert!(run.status.success(), "{text}");
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(last["scenarios"].as_u64().unwrap() >= 12, "{last}");
    assert!(last["acks"].as_u64().unwrap() >= 10, "{last}");
    for (key, wanted) in [("acks_lost", 0), ("double_credits", 0), ("left_out", 0)] {
        assert_eq!(last[key], wanted, "{key} of {last}");
    }
    assert_eq!(last["survived"], last["scenarios"]);
}
