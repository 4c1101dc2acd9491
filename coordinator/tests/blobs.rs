//! Blobs and datasets: what arrives, what is kept, who may read it; in a folder and on S3.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod support;

use cairn_coordinator::caller::{Caller, Role};
use cairn_coordinator::db::datasets::{ChunkRow, SetKind};
use cairn_coordinator::error::Error;
use cairn_coordinator::ids::RequestId;
use cairn_coordinator::limits::{Limits, PUT_PART_BYTES, READ_BYTES};
use cairn_coordinator::ops::create_dataset::{NewDataset, create_dataset};
use cairn_coordinator::ops::find_blobs::find_missing;
use cairn_coordinator::ops::read_blob::read_blob;
use cairn_coordinator::ops::read_datasets::{get_dataset, list_datasets};
use cairn_coordinator::ops::write_blob::query_write_status;
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use futures::TryStreamExt;
use support::{Fixture, Stores, coordinator_on, name};

macro_rules! cases {
    ($($name:ident;)+) => {
        cases! { @on folder, false, $($name)+ }
        cases! { @on s3, true, $($name)+ }
    };
    (@on $store:ident, $s3:literal, $($name:ident)+) => {
        mod $store {
            const STORES: crate::Stores = crate::Stores { postgres: false, s3: $s3 };
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    crate::$name(STORES).await;
                }
            )+
        }
    };
}

cases! {
    what_was_put_is_there;
    an_upload_goes_on_where_it_stopped;
    wrong_bytes_are_refused_and_the_upload_begins_anew;
    too_many_bytes_are_cut_and_too_large_blobs_refused;
    a_full_disk_takes_no_uploads_and_says_so;
    nobody_uploads_without_a_right_to;
    damaged_bytes_are_noticed_while_they_are_read;
    the_set_decides_who_reads_its_chunks;
    datasets_are_made_once_and_listed_in_pages;
}

async fn on(stores: Stores) -> Fixture {
    let limits = Limits {
        disk_free_bytes_min: 0,
        ..Limits::default()
    };
    coordinator_on(stores, limits).await
}

async fn read(
    fixture: &Fixture,
    caller: &Caller,
    name: BlobName,
    offset: u64,
) -> Result<Vec<u8>, Error> {
    let pieces: Vec<bytes::Bytes> = read_blob(&fixture.app, caller, name, offset)
        .await?
        .try_collect()
        .await?;
    Ok(pieces.concat())
}

/// Two parts and a bit of an object that is put part by part.
const LARGE: usize = 2 * PUT_PART_BYTES + 12_345;

async fn what_was_put_is_there(stores: Stores) {
    let fixture = on(stores).await;
    let blobs = &fixture.app.blobs;
    let large: Vec<u8> = (0..LARGE as u32).map(|i| (i % 251) as u8).collect();
    for bytes in [&b""[..], b"small", &large] {
        let blob = name(bytes);
        assert_eq!(blobs.size(blob.digest).await.unwrap(), None);
        let error = blobs.open_at(blob.digest, 0).await.err().unwrap();
        assert_eq!(error.reason(), ErrorReason::BlobMissing);
        let file = fixture.folder.path().join("in");
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(blobs.put_file(&file).await.unwrap(), blob);
        // Again, and from memory: the same blob.
        assert_eq!(blobs.put_file(&file).await.unwrap(), blob);
        if bytes.len() < LARGE {
            let again = bytes::Bytes::copy_from_slice(bytes);
            assert_eq!(blobs.put_bytes(again).await.unwrap(), blob);
        }
        let read = blobs.get_bytes(blob.digest, LARGE as u64).await.unwrap();
        assert!(read == bytes);
        let middle = bytes.len() / 2;
        if middle > 0 {
            let rest = blobs.open_at(blob.digest, middle as u64).await.unwrap();
            let rest: Vec<bytes::Bytes> = rest.try_collect().await.unwrap();
            assert!(rest.iter().all(|piece| piece.len() <= READ_BYTES));
            assert!(rest.concat() == bytes[middle..]);
        }
        let out = fixture.folder.path().join("out");
        assert_eq!(
            blobs.materialise(blob.digest, &out).await.unwrap(),
            blob.size_bytes
        );
        assert!(std::fs::read(&out).unwrap() == bytes);
        let listed: Vec<_> = blobs.list().try_collect().await.unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].0, blob.digest);
        std::fs::remove_file(&out).unwrap();
        std::fs::remove_file(&file).unwrap();
        blobs.delete(blob.digest).await.unwrap();
        blobs.delete(blob.digest).await.unwrap();
        assert!(!blobs.exists(blob.digest).await.unwrap());
    }
    // A file that is not what it is said to be is kept by nobody, however large.
    let file = fixture.folder.path().join("in");
    std::fs::write(&file, &large).unwrap();
    if let Some(s3) = &fixture.s3 {
        let error = blobs.put_verified(&file, name(b"other")).await.unwrap_err();
        assert_eq!(error.reason(), ErrorReason::DigestMismatch);
        assert_eq!(s3.keys(""), Vec::<String>::new());
        assert_eq!(s3.unfinished(), 0);
    }
}

async fn an_upload_goes_on_where_it_stopped(stores: Stores) {
    let fixture = on(stores).await;
    let ada = fixture.member(Role::Maintainer, 1).await;
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let blob = name(&bytes);
    let half = fixture
        .send(&ada, blob, 0, &[&bytes[..1_000_000]])
        .await
        .unwrap();
    assert_eq!((half.committed_bytes, half.complete), (1_000_000, false));
    // Invisible until whole.
    assert_eq!(
        find_missing(&fixture.app, &ada, vec![blob]).await.unwrap(),
        vec![blob]
    );
    let error = read(&fixture, &ada, blob, 0).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::NotFound);
    let error = fixture
        .send(&ada, blob, 5, &[&bytes[5..10]])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::WrongOffset);
    assert_eq!(
        error.metadata(),
        [("committed_bytes", "1000000".to_owned())]
    );
    let status = query_write_status(&fixture.app, &ada, blob).await.unwrap();
    assert_eq!(status, half);
    let rest: Vec<&[u8]> = bytes[1_000_000..].chunks(1_000_000).collect();
    assert!(
        fixture
            .send(&ada, blob, 1_000_000, &rest)
            .await
            .unwrap()
            .complete
    );
    assert_eq!(read(&fixture, &ada, blob, 0).await.unwrap(), bytes);
    assert_eq!(
        read(&fixture, &ada, blob, 2_999_990).await.unwrap(),
        bytes[2_999_990..]
    );
    // Held already: answered at once, whatever is sent.
    assert!(fixture.send(&ada, blob, 0, &[b"x"]).await.unwrap().complete);
    assert!(
        find_missing(&fixture.app, &ada, vec![blob])
            .await
            .unwrap()
            .is_empty()
    );
    let left = std::fs::read_dir(fixture.folder.path().join("uploads"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
}

async fn wrong_bytes_are_refused_and_the_upload_begins_anew(stores: Stores) {
    let fixture = on(stores).await;
    let ada = fixture.member(Role::Maintainer, 1).await;
    let blob = name(b"right");
    let error = fixture.send(&ada, blob, 0, &[b"wrong"]).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::DigestMismatch);
    assert_eq!(
        query_write_status(&fixture.app, &ada, blob)
            .await
            .unwrap()
            .committed_bytes,
        0
    );
    assert!(
        fixture
            .send(&ada, blob, 0, &[b"right"])
            .await
            .unwrap()
            .complete
    );
}

async fn too_many_bytes_are_cut_and_too_large_blobs_refused(stores: Stores) {
    let limits = Limits {
        disk_free_bytes_min: 0,
        upload_bytes_max: 10,
        ..Limits::default()
    };
    let fixture = coordinator_on(stores, limits).await;
    let ada = fixture.member(Role::Maintainer, 1).await;
    let blob = name(b"right");
    let error = fixture
        .send(&ada, blob, 0, &[b"rig", b"htandmore"])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::BlobTooLarge);
    assert_eq!(
        query_write_status(&fixture.app, &ada, blob)
            .await
            .unwrap()
            .committed_bytes,
        3
    );
    assert!(
        fixture
            .send(&ada, blob, 3, &[b"ht"])
            .await
            .unwrap()
            .complete
    );
    let error = fixture
        .send(&ada, name(b"eleven bytes"), 0, &[])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::BlobTooLarge);
    let lying = BlobName {
        size_bytes: 4,
        ..blob
    };
    let error = fixture.send(&ada, lying, 0, &[]).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::InvalidArgument);
}

async fn a_full_disk_takes_no_uploads_and_says_so(stores: Stores) {
    let limits = Limits {
        disk_free_bytes_min: u64::MAX / 2,
        ..Limits::default()
    };
    let fixture = coordinator_on(stores, limits).await;
    let ada = fixture.member(Role::Maintainer, 1).await;
    let error = fixture
        .send(&ada, name(b"x"), 0, &[b"x"])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::DiskFull);
    assert!(error.retry_after().is_some());
    assert!(!fixture.app.disk_has_room());
}

async fn nobody_uploads_without_a_right_to(stores: Stores) {
    let fixture = on(stores).await;
    let eve = fixture.member(Role::Evaluator, 1).await;
    let bob = fixture.member(Role::Volunteer, 2).await;
    let error = fixture
        .send(&eve, name(b"x"), 0, &[b"x"])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::RoleRequired);
    let error = fixture
        .send(&bob, name(b"x"), 0, &[b"x"])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::InvalidArgument);
}

async fn damaged_bytes_are_noticed_while_they_are_read(stores: Stores) {
    let fixture = on(stores).await;
    let ada = fixture.member(Role::Maintainer, 1).await;
    let blob = fixture.put(&ada, b"sound").await;
    std::fs::write(fixture.blob_file(blob), b"rotten").unwrap();
    let error = read(&fixture, &ada, blob, 0).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::DigestMismatch);
    let target = fixture.folder.path().join("out");
    let error = fixture
        .app
        .blobs
        .materialise(blob.digest, &target)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::DigestMismatch);
    assert!(!target.exists());
    // The length no longer fits, so the blob is welcome again, and heals.
    assert_eq!(
        find_missing(&fixture.app, &ada, vec![blob]).await.unwrap(),
        vec![blob]
    );
    fixture.put(&ada, b"sound").await;
    assert_eq!(read(&fixture, &ada, blob, 0).await.unwrap(), b"sound");
}

fn dataset(name: &str, set: SetKind, blobs: &[BlobName]) -> NewDataset {
    NewDataset {
        name: name.into(),
        set,
        license: "MIT".into(),
        source: "made here".into(),
        chunks: blobs
            .iter()
            .map(|blob| ChunkRow {
                blob: *blob,
                records: 1,
            })
            .collect(),
        request: RequestId::new(),
    }
}

async fn the_set_decides_who_reads_its_chunks(stores: Stores) {
    let fixture = on(stores).await;
    let ada = fixture.member(Role::Maintainer, 1).await;
    let bob = fixture.member(Role::Volunteer, 2).await;
    let eve = fixture.member(Role::Evaluator, 3).await;
    let train = fixture.put(&ada, b"{\"text\":\"a\"}\n").await;
    let gate = fixture.put(&ada, b"{\"text\":\"b\"}\n").await;
    assert_eq!(
        read(&fixture, &bob, train, 0).await.unwrap_err().reason(),
        ErrorReason::NotFound
    );
    let app = &fixture.app;
    create_dataset(app, &ada, dataset("train", SetKind::Train, &[train]))
        .await
        .unwrap();
    create_dataset(app, &ada, dataset("gate", SetKind::Gate, &[gate]))
        .await
        .unwrap();
    read(&fixture, &bob, train, 0).await.unwrap();
    assert_eq!(
        read(&fixture, &bob, gate, 0).await.unwrap_err().reason(),
        ErrorReason::NotFound
    );
    read(&fixture, &eve, gate, 0).await.unwrap();
    assert_eq!(
        find_missing(app, &bob, vec![gate]).await.unwrap(),
        vec![gate]
    );
    assert!(get_dataset(app, &bob, "gate").await.unwrap().1.is_empty());
    assert_eq!(get_dataset(app, &bob, "train").await.unwrap().1.len(), 1);
    // A secret stays one, and what was public cannot become one.
    let error = create_dataset(app, &ada, dataset("dev", SetKind::Dev, &[gate]))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::PreconditionFailed);
    let error = create_dataset(app, &ada, dataset("audit", SetKind::Audit, &[train]))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::PreconditionFailed);
    assert_eq!(
        read(&fixture, &bob, gate, 0).await.unwrap_err().reason(),
        ErrorReason::NotFound
    );
}

async fn datasets_are_made_once_and_listed_in_pages(stores: Stores) {
    let fixture = on(stores).await;
    let app = &fixture.app;
    let ada = fixture.member(Role::Maintainer, 1).await;
    let bob = fixture.member(Role::Volunteer, 2).await;
    let blob = fixture.put(&ada, b"{\"text\":\"a\"}\n").await;
    let new = dataset("one", SetKind::Train, &[blob]);
    let refused = create_dataset(app, &bob, new.clone()).await.unwrap_err();
    assert_eq!(refused.reason(), ErrorReason::RoleRequired);
    create_dataset(app, &ada, new.clone()).await.unwrap();
    create_dataset(app, &ada, new.clone()).await.unwrap();
    let reused = NewDataset {
        name: "two".into(),
        ..new.clone()
    };
    let error = create_dataset(app, &ada, reused).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::RequestIdReused);
    let error = create_dataset(app, &ada, dataset("one", SetKind::Train, &[blob]))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::AlreadyExists);
    let error = create_dataset(app, &ada, dataset("none", SetKind::Train, &[]))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::InvalidArgument);
    let error = create_dataset(
        app,
        &ada,
        dataset("lost", SetKind::Train, &[name(b"not here")]),
    )
    .await
    .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::BlobMissing);
    for bad in ["", "../x", "A", "a b"] {
        let error = create_dataset(app, &ada, dataset(bad, SetKind::Train, &[blob]))
            .await
            .unwrap_err();
        assert_eq!(error.reason(), ErrorReason::InvalidArgument, "{bad}");
    }
    create_dataset(app, &ada, dataset("two", SetKind::Train, &[blob]))
        .await
        .unwrap();
    let names = |rows: Vec<cairn_coordinator::db::datasets::DatasetRow>| {
        rows.into_iter().map(|row| row.name).collect::<Vec<_>>()
    };
    assert_eq!(names(list_datasets(app, "", 1).await.unwrap()), ["one"]);
    assert_eq!(names(list_datasets(app, "one", 9).await.unwrap()), ["two"]);
}
