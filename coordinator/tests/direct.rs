//! Bytes straight between clients and the store, by presigned URLs, on an S3 server that checks
//! them; and what happens when that server fails.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod support;
#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod world;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cairn_coordinator::blobs::Blobs;
use cairn_coordinator::caller::{Caller, Role};
use cairn_coordinator::limits::Limits;
use cairn_coordinator::ops::submit_adapter::submit_adapter;
use cairn_coordinator::tasks;
use cairn_proto::client::{Client, Options};
use cairn_proto::convert::BlobName;
use cairn_proto::identity::Identity;
use cairn_proto::limits::DIRECT_PART_BYTES;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use support::s3::{Mode, S3};
use support::{Fixture, Stores, coordinator_on, key, name};
use tempfile::TempDir;
use tokio::sync::Notify;
use world::{World, new_adapter};

const ON_S3: Stores = Stores {
    postgres: false,
    s3: true,
};
const PART: usize = DIRECT_PART_BYTES as usize;

async fn fixture(direct_url: Option<Duration>) -> Fixture {
    let limits = Limits {
        disk_free_bytes_min: 0,
        direct_url,
        ..Limits::default()
    };
    coordinator_on(ON_S3, limits).await
}

async fn client(fixture: &Fixture, caller: &Caller, seed: u8) -> Client {
    let identity = Identity {
        server: fixture.app.endpoint.clone(),
        worker_id: caller.worker.to_string(),
        role: match caller.role {
            Role::Maintainer => v1::Role::Maintainer,
            Role::Evaluator => v1::Role::Evaluator,
            Role::Volunteer => v1::Role::Volunteer,
        },
        display_name: format!("key {seed}"),
        server_key: fixture.app.key.verifying_key(),
        key: key(seed),
    };
    let options = Options {
        patience: Duration::from_millis(100),
        ..Options::default()
    };
    Client::with_channel(fixture.channel().await, identity, options)
}

async fn maintainer(fixture: &Fixture) -> (Caller, Client) {
    let caller = fixture.member(Role::Maintainer, 1).await;
    let client = client(fixture, &caller, 1).await;
    (caller, client)
}

/// A file of some parts, and its name.
fn file(folder: &TempDir, parts: usize) -> (PathBuf, BlobName) {
    let bytes: Vec<u8> = (0..(parts * PART) as u32 - 1_000)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let path = folder.path().join("file");
    std::fs::write(&path, &bytes).unwrap();
    (path, name(&bytes))
}

fn s3(fixture: &Fixture) -> &S3 {
    fixture.s3.as_ref().unwrap()
}

/// Nothing went through the coordinator's streams: they leave files in its folder on the way.
fn went_directly(fixture: &Fixture, parts: usize) {
    let puts = s3(fixture).direct_puts();
    assert_eq!(puts.len(), parts, "{puts:?}");
    assert!(puts.keys().all(|key| key.starts_with("parts/")));
}

async fn download(client: &Client, blob: BlobName, path: &Path) {
    client.download(blob, path, &|_| ()).await.unwrap();
    assert_eq!(name(&std::fs::read(path).unwrap()), blob);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_upload_goes_straight_to_the_store_and_comes_straight_back() {
    let fixture = fixture(Some(Duration::from_mins(1))).await;
    let (_, client) = maintainer(&fixture).await;
    let folder = tempfile::tempdir().unwrap();
    let (path, blob) = file(&folder, 3);
    client.upload(&path, blob, "", &|_| ()).await.unwrap();
    went_directly(&fixture, 3);
    assert!(fixture.app.blobs.exists(blob.digest).await.unwrap());
    assert_eq!(s3(&fixture).keys("parts"), Vec::<String>::new());
    assert_eq!(s3(&fixture).unfinished(), 0);
    download(&client, blob, &folder.path().join("whole")).await;
    // What an earlier try left is kept, and only the rest is fetched.
    let rest = folder.path().join("rest");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(folder.path().join("rest.part"), &bytes[..2 * PART]).unwrap();
    let first = std::sync::Mutex::new(Vec::new());
    let note = |bytes| first.lock().unwrap().push(bytes);
    client.download(blob, &rest, &note).await.unwrap();
    assert_eq!(first.lock().unwrap()[0], 2 * DIRECT_PART_BYTES);
    assert!(std::fs::read(&rest).unwrap() == bytes);
    let gets = s3(&fixture).seen();
    let gets = gets
        .iter()
        .filter(|seen| seen.presigned && seen.method == "GET");
    let statuses: Vec<u16> = gets.map(|seen| seen.status.as_u16()).collect();
    assert_eq!(statuses, [200, 206]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_upload_that_was_broken_off_goes_on_with_the_parts_it_lacks() {
    let fixture = fixture(Some(Duration::from_mins(1))).await;
    let (_, client) = maintainer(&fixture).await;
    let folder = tempfile::tempdir().unwrap();
    let (path, blob) = file(&folder, 4);
    // Broken off in the middle of the third part.
    let far = Arc::new(Notify::new());
    let task = tokio::spawn({
        let (client, path, far) = (client.clone(), path.clone(), far.clone());
        s3(&fixture).set(Mode::Slow(Duration::from_millis(200)));
        async move {
            let note = |bytes| {
                if bytes >= 2 * DIRECT_PART_BYTES {
                    far.notify_one();
                }
            };
            client.upload(&path, blob, "", &note).await
        }
    });
    far.notified().await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    s3(&fixture).set(Mode::Sound);
    let before = s3(&fixture).direct_puts();
    assert!((2..4).contains(&before.len()), "{before:?}");
    // Another process of the same identity goes on: nothing is sent twice.
    let begun = std::sync::Mutex::new(Vec::new());
    let note = |bytes| begun.lock().unwrap().push(bytes);
    client.upload(&path, blob, "", &note).await.unwrap();
    assert!(begun.lock().unwrap()[0] >= 2 * DIRECT_PART_BYTES);
    let puts = s3(&fixture).direct_puts();
    assert_eq!(puts.len(), 4);
    assert!(puts.values().all(|times| *times == 1), "{puts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn wrong_bytes_are_refused_and_leave_nothing() {
    let fixture = fixture(Some(Duration::from_mins(1))).await;
    let (_, client) = maintainer(&fixture).await;
    let folder = tempfile::tempdir().unwrap();
    for parts in [1, 3] {
        let (path, blob) = file(&folder, parts);
        let lie = BlobName {
            digest: name(b"another").digest,
            ..blob
        };
        let error = client.upload(&path, lie, "", &|_| ()).await.unwrap_err();
        assert_eq!(error.reason(), Some(ErrorReason::DigestMismatch));
        assert_eq!(s3(&fixture).keys(""), Vec::<String>::new());
        assert_eq!(s3(&fixture).unfinished(), 0);
        assert_eq!(client.missing_blobs(&[lie]).await.unwrap(), [lie]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_url_that_ran_out_is_renewed() {
    let fixture = fixture(Some(Duration::from_secs(2))).await;
    let (_, client) = maintainer(&fixture).await;
    let folder = tempfile::tempdir().unwrap();
    let (path, blob) = file(&folder, 4);
    s3(&fixture).set(Mode::Slow(Duration::from_millis(900)));
    client.upload(&path, blob, "", &|_| ()).await.unwrap();
    s3(&fixture).set(Mode::Sound);
    went_directly(&fixture, 4);
    let refused = s3(&fixture)
        .seen()
        .into_iter()
        .filter(|seen| seen.presigned && seen.status == 403)
        .count();
    assert!(refused > 0, "every URL was used in time");
    // A URL by itself is good for as long as it says, and no longer.
    let request = v1::GetBlobUrlRequest {
        blob: Some(blob.into()),
    };
    let get = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.blobs.get_blob_url(request).await }
        })
        .await
        .unwrap()
        .get
        .unwrap();
    assert_eq!(get.valid_ms, 2_000);
    let status = || async { reqwest::get(&get.url).await.unwrap().status() };
    assert_eq!(status().await, 200);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(status().await, 403);
    let forged = get.url.replace("/blobs/", "/parts/");
    assert_eq!(reqwest::get(forged).await.unwrap().status(), 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_volunteer_sends_an_adapter_directly_and_gets_no_url_to_a_secret() {
    let mut world = World::on(ON_S3).await;
    let round = world.round(1).await;
    let ada = world.volunteer().await;
    let client = client(&world.fixture, &ada, 1).await;
    let work = world.claim(&ada).await.unwrap();
    let adapter = world.adapter(1, [1.0, 1.0]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    std::fs::write(&path, &adapter.weights).unwrap();
    let lease = work.lease.id.to_string();
    let blob = adapter.name();
    // Not under a lease of somebody else, nor more than the recipe's adapter has.
    let bob = world.volunteer().await;
    let other = self::client(&world.fixture, &bob, 2).await;
    let error = other
        .upload(&path, blob, &lease, &|_| ())
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Some(ErrorReason::LeaseLost));
    client.upload(&path, blob, &lease, &|_| ()).await.unwrap();
    went_directly(&world.fixture, 1);
    submit_adapter(world.app(), &ada, new_adapter(&work, &adapter), |_| Ok(()))
        .await
        .unwrap();
    assert_eq!(world.view(round.id).await.submissions.len(), 1);

    let url = |client: Client, blob: BlobName| async move {
        let request = v1::GetBlobUrlRequest {
            blob: Some(blob.into()),
        };
        let call = client.call(|mut to| {
            let request = request.clone();
            async move { to.blobs.get_blob_url(request).await }
        });
        call.await.map(|answer| answer.get.unwrap().url)
    };
    let chunk = |set: &'static str| {
        let app = world.app().clone();
        let caller = world.maintainer.clone();
        async move {
            let chunks = cairn_coordinator::ops::read_datasets::get_dataset(&app, &caller, set);
            chunks.await.unwrap().1[0].blob
        }
    };
    url(client.clone(), chunk("train").await).await.unwrap();
    for secret in ["gate", "audit"] {
        let secret = chunk(secret).await;
        let error = url(client.clone(), secret).await.unwrap_err();
        assert_eq!(error.reason(), Some(ErrorReason::NotFound));
        let eve = self::client(&world.fixture, &world.evaluator, 201).await;
        url(eve, secret).await.unwrap();
    }
    // Another's adapter is no business of theirs either.
    let error = url(other, blob).await.unwrap_err();
    assert_eq!(error.reason(), Some(ErrorReason::NotFound));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_direct_transfers_everything_goes_through_the_coordinator() {
    let fixture = fixture(None).await;
    let (_, client) = maintainer(&fixture).await;
    let folder = tempfile::tempdir().unwrap();
    let (path, blob) = file(&folder, 2);
    client.upload(&path, blob, "", &|_| ()).await.unwrap();
    download(&client, blob, &folder.path().join("out")).await;
    assert!(s3(&fixture).seen().iter().all(|seen| !seen.presigned));
    assert_eq!(s3(&fixture).unfinished(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_store_that_clients_cannot_reach_is_left_to_the_coordinator() {
    let fixture = fixture(Some(Duration::from_mins(1))).await;
    let ada = fixture.member(Role::Maintainer, 1).await;
    // Seen from another machine, the store's plain text is refused before it is tried.
    let mut identity = client(&fixture, &ada, 1).await.identity().clone();
    identity.server = "cairn+insecure://192.0.2.1:7600/#".parse().unwrap();
    let client = Client::with_channel(fixture.channel().await, identity, Options::default());
    let folder = tempfile::tempdir().unwrap();
    let (path, blob) = file(&folder, 2);
    client.upload(&path, blob, "", &|_| ()).await.unwrap();
    download(&client, blob, &folder.path().join("out")).await;
    assert!(s3(&fixture).seen().iter().all(|seen| !seen.presigned));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn parts_that_nobody_completes_are_collected() {
    let fixture = fixture(Some(Duration::from_mins(1))).await;
    let (_, client) = maintainer(&fixture).await;
    let blob = BlobName {
        size_bytes: 3 * DIRECT_PART_BYTES,
        ..name(b"x")
    };
    let request = v1::BeginUploadRequest {
        blob: Some(blob.into()),
        lease_id: String::new(),
    };
    let begun = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.blobs.begin_upload(request).await }
        })
        .await
        .unwrap();
    assert_eq!(begun.parts.len(), 3);
    let put = reqwest::Client::new()
        .put(&begun.parts[1].put.as_ref().unwrap().url)
        .body(vec![7; PART]);
    assert!(put.send().await.unwrap().status().is_success());
    assert_eq!(s3(&fixture).keys("parts").len(), 1);
    // The test's clock is years behind the store's: two steps, over the upload, then over it all.
    fixture.app.clock.advance(Duration::from_hours(25));
    tasks::collect_blobs::run(&fixture.app).await.unwrap();
    assert_eq!(s3(&fixture).keys("parts"), Vec::<String>::new());
    let again = reqwest::Client::new()
        .put(&begun.parts[0].put.as_ref().unwrap().url)
        .body(vec![7; PART]);
    assert!(again.send().await.unwrap().status().is_success());
    fixture
        .app
        .clock
        .advance(Duration::from_hours(24 * 365 * 20));
    tasks::collect_blobs::run(&fixture.app).await.unwrap();
    assert_eq!(s3(&fixture).keys("parts"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_failing_store_acknowledges_nothing_and_is_waited_for() {
    let fixture = fixture(Some(Duration::from_mins(1))).await;
    let (ada, client) = maintainer(&fixture).await;
    let folder = tempfile::tempdir().unwrap();
    let (path, blob) = file(&folder, 2);
    s3(&fixture).set(Mode::Failing);
    let error = client.upload(&path, blob, "", &|_| ()).await.unwrap_err();
    assert_eq!(error.reason(), Some(ErrorReason::Unavailable));
    assert!(error.retry() && error.retry_after().is_some());
    let error = fixture
        .send(&ada, name(b"x"), 0, &[b"x"])
        .await
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::Unavailable);
    s3(&fixture).set(Mode::Sound);
    assert_eq!(client.missing_blobs(&[blob]).await.unwrap(), [blob]);
    // One that waits long enough gets through without anybody's help.
    s3(&fixture).set(Mode::Failing);
    let patient = client.with_patience(Duration::from_mins(2));
    let sound = s3(&fixture).clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        sound.set(Mode::Sound);
    });
    patient.upload(&path, blob, "", &|_| ()).await.unwrap();
    download(&client, blob, &folder.path().join("out")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stalling_store_acknowledges_nothing() {
    let fixture = fixture(None).await;
    let ada = fixture.member(Role::Maintainer, 1).await;
    s3(&fixture).set(Mode::Stalling);
    let longest = Duration::from_secs(100);
    let sent = tokio::time::timeout(longest, fixture.send(&ada, name(b"x"), 0, &[b"x"]));
    let error = sent
        .await
        .expect("the wait for the store is bounded")
        .unwrap_err();
    assert_eq!(error.reason(), ErrorReason::Unavailable);
    s3(&fixture).set(Mode::Sound);
    // The byte is held, and the upload goes on behind it.
    assert!(
        fixture
            .send(&ada, name(b"x"), 1, &[])
            .await
            .unwrap()
            .complete
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_store_is_told_at_start() {
    let s3 = S3::start().await;
    let mut elsewhere = s3.location();
    elsewhere
        .variables
        .push(("AWS_ENDPOINT".to_owned(), "http://127.0.0.1:9".to_owned()));
    let mut unknown = s3.location();
    unknown
        .variables
        .push(("AWS_ACCESS_KEY_ID".to_owned(), "nobody".to_owned()));
    let mut absent = s3.location();
    absent.url = "s3://absent/x".to_owned();
    let mut wrong = s3.location();
    wrong
        .variables
        .push(("AWS_SECRET_ACCESS_KEY".to_owned(), "wrong".to_owned()));
    for (location, says) in [
        (elsewhere, "AWS_ENDPOINT"),
        (unknown, "credentials"),
        (absent, "no such bucket"),
        (wrong, "credentials"),
    ] {
        let blobs = Blobs::open_at_location(&location).unwrap();
        let error = blobs.probe().await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
    Blobs::open_at_location(&s3.location())
        .unwrap()
        .probe()
        .await
        .unwrap();
    assert_eq!(s3.keys(""), Vec::<String>::new());
}
