//! A backup made while work goes on, put back beside blobs of another time.
use std::path::{Path, PathBuf};
use std::process::Command;

use cairn_coordinator::backup::back_up;
use cairn_coordinator::caller::Caller;
use cairn_coordinator::db::check::Need;
use cairn_coordinator::fsck::Fault;
use cairn_coordinator::ops::claim_work::Assignment;
use cairn_coordinator::ops::read_standing::get_standing;
use cairn_coordinator::ops::restore_submission::restore_submission;
use cairn_coordinator::ops::submit_adapter::Acknowledged;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use tempfile::TempDir;

use super::fsck::{blobs, checked};
use super::reason;
use crate::world::{Adapter, World, new_adapter};

/// Database and blobs as the handbook has it: the database first.
async fn backup(world: &World) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    if let Some(url) = &world.fixture.database_url {
        let dump = to.path().join("dump.sql");
        let dump = dump.to_str().unwrap();
        run(Command::new(program("pg_dump")).args(["--clean", "--if-exists", "-f", dump, url]));
    }
    let app = world.app();
    let data = world.fixture.folder.path();
    let copied = back_up(&app.db, &app.blobs, data, to.path()).await.unwrap();
    assert_eq!(copied.database, world.fixture.database_url.is_none());
    assert!(copied.unreadable.is_empty(), "{copied}");
    // Once more, nothing is copied again.
    let again = back_up(&app.db, &app.blobs, data, to.path()).await.unwrap();
    assert_eq!((again.blobs, again.known), (0, copied.blobs));
    to
}

/// A program of PostgreSQL's, beside its server's.
fn program(name: &str) -> PathBuf {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .map(|version| version.unwrap().path().join("bin").join(name))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| PathBuf::from(name))
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
}

async fn put_back_database(from: PathBuf, data: PathBuf, database_url: Option<String>) {
    let Some(url) = database_url else {
        for rest in ["cairn.db-wal", "cairn.db-shm"] {
            let _ = std::fs::remove_file(data.join(rest));
        }
        std::fs::copy(from.join("cairn.db"), data.join("cairn.db")).unwrap();
        return;
    };
    let dump = from.join("dump.sql");
    let dump = dump.to_str().unwrap();
    run(Command::new(program("psql")).args(["-q", "-v", "ON_ERROR_STOP=1", "-f", dump, &url]));
}

fn put_back_blobs(from: &Path, blobs: &Path) {
    std::fs::remove_dir_all(blobs).unwrap();
    let kept = from.join("store/blobs");
    run(Command::new("cp").arg("-r").args([kept.as_path(), blobs]));
}

/// A worker shows its receipt, as it does at every start, and is asked for the bytes; whether the
/// submission was unknown until then.
async fn hand_in_again(
    world: &World,
    caller: &Caller,
    work: &Assignment,
    adapter: &Adapter,
    answer: &Acknowledged,
) -> bool {
    let receipt = v1::Receipt {
        statement: answer.statement.clone(),
        signature: answer.signature.clone(),
    };
    let new = new_adapter(work, adapter);
    let ask = || restore_submission(world.app(), caller, &receipt, &new, |_| Ok(()));
    assert_eq!(reason(ask().await), ErrorReason::BlobMissing);
    world
        .send(caller, work.lease.id, &adapter.weights)
        .await
        .unwrap();
    ask().await.unwrap()
}

pub async fn a_database_older_than_the_blobs_takes_back_what_came_after(mut world: World) {
    let round = world.round(3).await;
    let ann = world.volunteer().await;
    world.contribute(1, [0.5, 0.3]).await;
    let backup = backup(&world).await;
    // Handed in and acknowledged after the backup.
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(2, [0.3, 0.5]);
    let answer = world.submit(&ann, &work, &adapter).await.unwrap();
    let from = backup.path().to_owned();
    let world = world
        .restart_after(|data, url| put_back_database(from, data, url))
        .await;
    let report = checked(&world).await;
    assert!(report.is_clean(), "{:#?}", report.problems);
    assert_eq!(world.view(round.id).await.submissions.len(), 1);
    let bytes = adapter.name().digest;
    assert!(
        report.young > 0,
        "the adapter's bytes have no row: {report}"
    );
    assert!(world.app().blobs.exists(bytes).await.unwrap());

    assert!(hand_in_again(&world, &ann, &work, &adapter, &answer).await);
    let view = world.view(round.id).await;
    assert!(view.submissions.iter().any(|one| one.id == answer.id));
    assert!(checked(&world).await.is_clean());
}

pub async fn a_database_newer_than_the_blobs_names_what_is_missing(mut world: World) {
    world.round(2).await;
    world.contribute(1, [0.5, 0.3]).await;
    let backup = backup(&world).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(2, [0.3, 0.5]);
    let answer = world.submit(&ann, &work, &adapter).await.unwrap();
    let from = backup.path().to_owned();
    let blobs_folder = world.fixture.blobs_folder();
    let world = world
        .restart_after(|_, _| async move { put_back_blobs(&from, &blobs_folder) })
        .await;
    let report = checked(&world).await;
    let found = blobs(&report);
    let needed = Need::Adapter {
        submission: answer.id.to_string(),
        worker: ann.worker,
    };
    let lost = found
        .iter()
        .find(|(digest, ..)| *digest == adapter.name().digest);
    let (_, fault, needs) = lost.expect("the adapter is named");
    assert_eq!(*fault, Fault::Missing);
    assert!(needs.contains(&needed), "{needs:?}");
    assert!(
        report
            .problems
            .iter()
            .any(|problem| problem.remedy().contains("hands it in again"))
    );

    let restored = hand_in_again(&world, &ann, &work, &adapter, &answer).await;
    assert!(!restored, "it was known all the time");
    let left = blobs(&checked(&world).await);
    assert!(
        left.iter()
            .all(|(digest, ..)| *digest != adapter.name().digest),
        "{left:#?}"
    );
    let counts = get_standing(world.app(), &ann).await.unwrap().counts;
    assert_eq!((counts.pending, counts.credit_tokens), (1, 0));
}
