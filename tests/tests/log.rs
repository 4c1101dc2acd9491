//! The log as a stranger sees it: `cairn log pull` from a real coordinator, `cairn log verify` with
//! no coordinator at all, and a coordinator that goes back to an older state.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use cairn_stack::merkle::{Hash, leaf_hash, root};
use cairn_tests::adapters::honest;
use cairn_tests::process::{Server, join_url, member};
use cairn_tests::stranger::{Stranger, VERIFY_LOG};
use cairn_tests::tiny::round_file;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a claim waits.
const WAIT_MS: i64 = 10_000;

/// A stranger's copy of the log.
fn copy(stranger: &Stranger) -> PathBuf {
    stranger.folder().join("log.jsonl")
}

fn lines(stranger: &Stranger) -> Vec<String> {
    let text = fs::read_to_string(copy(stranger)).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// What the program says of a changed copy, which it must not believe.
fn refusal(stranger: &Stranger, change: impl FnOnce(&mut Vec<String>)) -> String {
    let mut lines = lines(stranger);
    change(&mut lines);
    lines.push(String::new());
    fs::write(stranger.folder().join("changed.jsonl"), lines.join("\n")).unwrap();
    refused(stranger.cairn(&["log", "verify", "changed.jsonl"]).unwrap())
}

fn refused(output: Output) -> String {
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "believed: {text}");
    text
}

/// Submits an adapter; the receipt is the stranger's to keep.
async fn submit(data: &Path, stranger: &Stranger, seed: u64) {
    let name = format!("v{seed}");
    let volunteer = member(data, "volunteer", &name).await.unwrap();
    let lease = volunteer.claim_within(WAIT_MS).await.unwrap().unwrap();
    let answer = volunteer.hand_in(&lease, &honest(seed)).await.unwrap();
    stranger.keep(&name, &answer.receipt.unwrap()).unwrap();
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A log of four heads, its coordinator gone; the data it had after two submissions is kept.
struct World {
    _folder: TempDir,
    stranger: Stranger,
    address: String,
    older: PathBuf,
}

async fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (data, older) = (at("data"), at("older"));
    let server = Server::start(&data, "127.0.0.1:0", &[]).unwrap();
    let address = server.address.clone();
    let maintainer = member(&data, "maintainer", "ada").await.unwrap();
    maintainer.add_tiny(&at("base")).await.unwrap();
    maintainer.open_round(&round_file(3)).await.unwrap();
    // With any role: the log is open to all.
    let url = join_url(&data, "volunteer", &[]).unwrap().secret_text();
    let stranger = Stranger::log_in(folder.path(), &url).unwrap();
    let pull = |size: u64, new: u64| {
        let pulled = stranger
            .json(&["log", "pull", "log.jsonl", "--json"])
            .unwrap();
        assert_eq!(
            (&pulled["size"], &pulled["new"]),
            (&json!(size), &json!(new))
        );
    };
    pull(1, 1);
    submit(&data, &stranger, 1).await;
    pull(2, 1);
    submit(&data, &stranger, 2).await;
    pull(3, 1);
    pull(3, 0);
    server.kill_9().unwrap();
    copy_folder(&data, &older);

    let server = Server::start(&data, &address, &[]).unwrap();
    submit(&data, &stranger, 3).await;
    pull(4, 1);
    server.kill_9().unwrap();
    World {
        _folder: folder,
        stranger,
        address,
        older,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_needs_no_coordinator_to_see_what_was_changed() {
    let World {
        _folder, stranger, ..
    } = world().await;
    let sound = stranger.json(&VERIFY_LOG).unwrap();
    for (key, value) in [("size", 4), ("heads", 5), ("receipts", 3), ("manifests", 1)] {
        assert_eq!(sound[key], value, "{key} of {sound}");
    }
    // Start, manifest, head, receipt, head, receipt, head, head, receipt, head.
    let lines = lines(&stranger);
    assert_eq!(lines.len(), 10);
    let bodies = lines.iter().filter_map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        Some(leaf_hash(line.get("body")?.as_str()?.as_bytes()))
    });
    let leaves: Vec<Hash> = bodies.collect();
    let top = hex::encode(root(&leaves));
    assert_eq!(sound["root"], top, "by RFC 6962, from the file alone");

    let text = refusal(&stranger, |lines| {
        let shard = "\\\"adapter_bytes\\\":";
        assert!(lines[3].contains(shard), "{}", lines[3]);
        lines[3] = lines[3].replace(shard, &format!("{shard}1"));
    });
    assert!(text.contains("an entry was changed"), "{text}");
    let text = refusal(&stranger, |lines| drop(lines.remove(3)));
    assert!(
        text.contains("the head is over 2 entries, the copy has 1 before it"),
        "{text}"
    );
    let text = refusal(&stranger, |lines| lines.swap(3, 5));
    assert!(text.contains("entry 2 stands where 1 belongs"), "{text}");
    let text = refusal(&stranger, |lines| {
        let mut head: Value = serde_json::from_str(&lines[9]).unwrap();
        let later = head["head"]
            .as_str()
            .unwrap()
            .replace("\"size\":4", "\"size\":3");
        assert_ne!(head["head"], later);
        head["head"] = later.into();
        lines.remove(8);
        lines[8] = head.to_string();
    });
    assert!(text.contains("the signature does not fit"), "{text}");
    let text = refusal(&stranger, |lines| drop(lines.pop()));
    assert!(text.contains("ends without a signed head"), "{text}");

    // A whole history less, under a true head: only who holds a receipt can tell.
    let shorter: Vec<String> = lines[..8].to_vec();
    fs::write(copy(&stranger), shorter.join("\n") + "\n").unwrap();
    stranger
        .json(&["log", "verify", "log.jsonl", "--json"])
        .unwrap();
    let without = stranger.cairn(&["log", "verify", "log.jsonl", "--receipts", "receipts"]);
    let without = without.unwrap();
    let text = refused(without);
    assert!(
        text.contains("1 of 3 receipts are not in the log"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_goes_back_is_found_out() {
    let World {
        _folder,
        stranger,
        address,
        older,
    } = world().await;
    let before = fs::read(copy(&stranger)).unwrap();
    let _server = Server::start(&older, &address, &[]).unwrap();
    let text = refused(stranger.cairn(&["log", "pull", "log.jsonl"]).unwrap());
    assert!(text.contains("shrunk from 4 to 3 entries"), "{text}");
    // It catches up with another submission in the lost one's place.
    submit(&older, &stranger, 9).await;
    let text = refused(stranger.cairn(&["log", "pull", "log.jsonl"]).unwrap());
    assert!(text.contains("the log was rewritten"), "{text}");
    assert_eq!(
        fs::read(copy(&stranger)).unwrap(),
        before,
        "the proof is kept"
    );
}
