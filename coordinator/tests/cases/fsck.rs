//! What `fsck` finds, and what it does about it.
use std::time::Duration;

use bytes::Bytes;
use cairn_coordinator::clock::Timestamp;
use cairn_coordinator::db::check::Need;
use cairn_coordinator::db::models::{Folder, checkpoint_files};
use cairn_coordinator::fsck::repair::repair;
use cairn_coordinator::fsck::{Depth, Fault, Problem, Report, check};
use cairn_stack::digest::Digest;

use super::whole_round;
use crate::world::World;

/// What a check of every byte finds.
pub async fn checked(world: &World) -> Report {
    look(world, Depth::Bytes).await
}

async fn look(world: &World, depth: Depth) -> Report {
    let app = world.app();
    let report = check(&app.db, &app.blobs, depth, world.now()).await;
    report.unwrap_or_else(|error| panic!("{}", error.full()))
}

/// What is wrong with blobs, and who needs them.
pub fn blobs(report: &Report) -> Vec<(Digest, Fault, Vec<Need>)> {
    let blob = |problem: &Problem| match problem {
        Problem::Blob { name, fault, needs } => Some((name.digest, *fault, needs.clone())),
        Problem::Contradiction { .. } => None,
    };
    report.problems.iter().filter_map(blob).collect()
}

fn rules(report: &Report) -> Vec<&'static str> {
    let rule = |problem: &Problem| match problem {
        Problem::Contradiction { rule, .. } => Some(*rule),
        Problem::Blob { .. } => None,
    };
    report.problems.iter().filter_map(rule).collect()
}

/// Damages a stored blob; its length stays.
fn rot(world: &World, digest: Digest) {
    let hex = digest.to_string();
    let path = world.fixture.blobs_folder().join(&hex[..2]).join(&hex);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[0] ^= 1;
    // The file may be linked from somewhere: another one takes its name.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
}

async fn execute(world: &World, sql: &'static str) {
    let mut tx = world.app().db.begin().await.unwrap();
    sqlx::query(sql).execute(tx.conn()).await.unwrap();
    tx.commit().await.unwrap();
}

pub async fn a_finished_round_is_clean(world: World) {
    let (world, _) = whole_round(world, false).await;
    let report = checked(&world).await;
    assert!(report.is_clean(), "{:#?}", report.problems);
    assert_eq!(report.checkpoints, 2);
    assert!(report.log_size >= 11 && report.blobs > 20, "{report}");
    assert!(report.orphans.is_empty() && report.young == 0, "{report}");
}

pub async fn what_can_be_computed_is_and_the_rest_says_who_has_it(world: World) {
    let (world, round) = whole_round(world, false).await;
    let app = world.app();
    let mut tx = app.db.read().await.unwrap();
    let mut files = Vec::new();
    for folder in [Folder::Checkpoint, Folder::Stack, Folder::Compressed] {
        files.extend(checkpoint_files(&mut tx, "tiny", 1, folder).await.unwrap());
    }
    let base = checkpoint_files(&mut tx, "tiny", 0, Folder::Checkpoint)
        .await
        .unwrap();
    drop(tx);
    // Everything that is not shared with the base or named by the manifest's own digest.
    files.retain(|file| {
        file.path != "cairn-manifest.json"
            && !base
                .iter()
                .any(|other| other.blob.digest == file.blob.digest)
    });
    assert!(files.len() >= 6, "{files:?}");
    let (rotten, lost) = files.split_at(2);
    for file in rotten {
        rot(&world, file.blob.digest);
    }
    for file in lost {
        app.blobs.delete(file.blob.digest).await.unwrap();
    }
    let found = blobs(&look(&world, Depth::Lengths).await);
    assert_eq!(
        found.len(),
        lost.len(),
        "lengths tell nothing of rot: {found:#?}"
    );
    let report = checked(&world).await;
    let found = blobs(&report);
    assert_eq!(found.len(), files.len(), "{found:#?}");
    for file in &files {
        let (_, fault, needs) = found.iter().find(|(d, ..)| *d == file.blob.digest).unwrap();
        assert_eq!(*fault == Fault::Damaged, rotten.contains(file));
        let Need::Checkpoint {
            revision: 1, path, ..
        } = &needs[0]
        else {
            panic!("{needs:?}")
        };
        assert_eq!(*path, file.path);
    }
    let data = world.fixture.folder.path();
    let done = repair(app, data, &report).await.unwrap();
    assert!(
        done.contains(&"computed tiny revision 1 again".to_owned()),
        "{done:?}"
    );
    let report = checked(&world).await;
    assert!(report.is_clean(), "{:#?}", report.problems);
    for file in rotten {
        let aside = std::fs::read(data.join("damaged").join(file.blob.digest.to_string()));
        assert_ne!(Digest::of(&aside.unwrap()), file.blob.digest);
    }

    // Without a contribution's adapter the fold cannot be repeated: its worker has it.
    let view = world.view(round).await;
    let stacked = view.submissions.iter().find(|s| s.weight > 0.0).unwrap();
    let weights = files
        .iter()
        .find(|file| file.path == "model.safetensors")
        .unwrap();
    for digest in [stacked.adapter, weights.blob.digest] {
        app.blobs.delete(digest).await.unwrap();
    }
    let report = checked(&world).await;
    let done = repair(app, data, &report).await.unwrap();
    assert!(done.is_empty(), "{done:?}");
    let report = checked(&world).await;
    assert_eq!(blobs(&report).len(), 2);
    let text = report
        .problems
        .iter()
        .map(Problem::remedy)
        .collect::<String>();
    let who = format!("worker {} hands it in again", stacked.worker);
    assert!(text.contains(&who), "{text}");
}

pub async fn rows_and_logs_that_contradict_themselves_are_named(world: World) {
    let (world, _) = whole_round(world, false).await;
    assert!(checked(&world).await.is_clean());
    execute(
        &world,
        "insert into restored_submissions (id, lease_id, worker_id, round_id, shard, adapter, \
         receipt_statement, receipt_signature, verdict, reason, credit_tokens, created_ms, \
         restored_ms) select 'again', lease_id, worker_id, round_id, shard, adapter, \
         receipt_statement, receipt_signature, 'accepted', '', 1, 1, 1 from submissions \
         order by id limit 1",
    )
    .await;
    assert_eq!(rules(&checked(&world).await), ["a lease is credited twice"]);
    execute(&world, "delete from restored_submissions").await;

    execute(
        &world,
        "update log_entries set body = body || ' ' where position = 3",
    )
    .await;
    let found = rules(&checked(&world).await);
    assert!(
        found.contains(&"the log is not the tree that its heads sign"),
        "{found:?}"
    );
    execute(
        &world,
        "update log_entries set body = trim(body) where position = 3",
    )
    .await;
    assert!(checked(&world).await.is_clean());
    execute(
        &world,
        "delete from log_nodes where level = 1 and position = 1",
    )
    .await;
    let found = rules(&checked(&world).await);
    assert_eq!(found, ["the log is not the tree that its heads sign"]);
}

pub async fn garbage_is_removed_when_it_is_old(world: World) {
    let app = world.app();
    let orphan = Bytes::from_static(b"no row will name this");
    let orphan = app.blobs.put_bytes(orphan).await.unwrap();
    let data = world.fixture.folder.path();
    // The store has its own clock, which is not the test's.
    let at = |moment: Timestamp| check(&app.db, &app.blobs, Depth::Bytes, moment);
    let modified = {
        let hex = orphan.digest.to_string();
        let path = world.fixture.blobs_folder().join(&hex[..2]).join(hex);
        let since = std::fs::metadata(path).unwrap().modified().unwrap();
        let since = since.duration_since(std::time::UNIX_EPOCH).unwrap();
        Timestamp(since.as_millis() as i64)
    };
    let report = at(modified.plus(Duration::from_mins(1))).await.unwrap();
    assert!(report.is_clean());
    assert_eq!((report.young, report.orphans.len()), (1, 0));
    repair(app, data, &report).await.unwrap();
    assert!(app.blobs.exists(orphan.digest).await.unwrap());
    let report = at(modified.plus(Duration::from_hours(25))).await.unwrap();
    assert!(report.is_clean(), "garbage is not wrong");
    assert_eq!(report.orphans, [orphan.digest]);
    repair(app, data, &report).await.unwrap();
    assert!(!app.blobs.exists(orphan.digest).await.unwrap());
}
