//! The shared client against a coordinator that misbehaves: sessions, retries, pinned TLS,
//! resumed uploads and downloads.
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod fake;

use std::sync::atomic::Ordering;
use std::time::Duration;

use cairn_proto::client::{Client, ClientError, Options, join};
use cairn_proto::convert::BlobName;
use cairn_proto::identity::{Identity, new_key};
use cairn_proto::reason::ErrorReason;
use cairn_proto::url::{JoinUrl, Server, SpkiPin};
use cairn_proto::v1;
use cairn_stack::digest::Digest;
use fake::Fake;
use rcgen::PublicKeyData;

fn identity(server: Server) -> Identity {
    Identity {
        server,
        worker_id: "w1".into(),
        role: v1::Role::Volunteer,
        display_name: "ada".into(),
        server_key: new_key().unwrap().verifying_key(),
        key: new_key().unwrap(),
    }
}

fn plain(port: u16) -> Server {
    format!("cairn+insecure://127.0.0.1:{port}/#")
        .parse()
        .unwrap()
}

fn pinned(port: u16, pin: SpkiPin) -> Server {
    format!("cairn://127.0.0.1:{port}/#~spki-sha256:{pin}")
        .parse()
        .unwrap()
}

fn impatient() -> Options {
    Options {
        patience: Duration::ZERO,
        ..Options::default()
    }
}

async fn standing(client: &Client) -> Result<v1::GetStandingResponse, ClientError> {
    client
        .call(|mut to| async move { to.volunteer.get_standing(v1::GetStandingRequest {}).await })
        .await
}

async fn client(fake: &Fake) -> Client {
    let port = fake.serve(None).await;
    Client::new(identity(plain(port)), Options::default()).unwrap()
}

fn blob(bytes: &[u8]) -> BlobName {
    BlobName {
        digest: Digest::of(bytes),
        size_bytes: bytes.len() as u64,
    }
}

/// Three chunks and a bit.
fn body() -> Vec<u8> {
    (0..3_500_000_u32).map(|n| (n % 251) as u8).collect()
}

#[tokio::test]
async fn a_session_is_made_once_and_again_when_it_runs_out() {
    let fake = Fake::default();
    let client = client(&fake).await;
    assert_eq!(standing(&client).await.unwrap().accepted, 3);
    assert_eq!(standing(&client.clone()).await.unwrap().accepted, 3);
    assert_eq!(fake.sessions.load(Ordering::SeqCst), 1);
    fake.sessions.fetch_add(1, Ordering::SeqCst);
    assert_eq!(standing(&client).await.unwrap().accepted, 3);
    assert_eq!(fake.sessions.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn unavailable_is_tried_again_and_refusals_are_not() {
    let fake = Fake::default();
    fake.failures.store(2, Ordering::SeqCst);
    let client = client(&fake).await;
    assert_eq!(standing(&client).await.unwrap().accepted, 3);
    let refused = client
        .call(|mut to| async move {
            to.volunteer
                .list_submissions(v1::ListSubmissionsRequest::default())
                .await
        })
        .await
        .unwrap_err();
    assert_eq!(refused.reason(), Some(ErrorReason::NotFound));
    assert_eq!(refused.to_string(), "there is none");
    assert!(!refused.retry());
}

#[tokio::test]
async fn nobody_there_is_said_clearly() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let client = Client::new(identity(plain(port)), impatient()).unwrap();
    let error = standing(&client).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Unreachable { .. }),
        "{error:?}"
    );
    assert!(error.retry());
    let text = error.to_string();
    assert!(
        text.contains(&port.to_string()) && text.contains("refused"),
        "{text}"
    );
}

#[tokio::test]
async fn the_pinned_key_is_accepted_and_no_other() {
    let made = rcgen::generate_simple_self_signed(["anything.example".to_owned()]).unwrap();
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let fake = Fake::default();
    let port = fake.serve(Some((&certificate, &key))).await;
    let pin = SpkiPin::of_spki(&made.signing_key.subject_public_key_info());

    let client = Client::new(identity(pinned(port, pin)), impatient()).unwrap();
    assert_eq!(standing(&client).await.unwrap().accepted, 3);

    let wrong = SpkiPin::from_bytes([7; 32]);
    let client = Client::new(identity(pinned(port, wrong)), impatient()).unwrap();
    let error = standing(&client).await.unwrap_err();
    assert!(matches!(error, ClientError::WrongKey { .. }), "{error:?}");
    assert!(!error.retry());
    assert!(error.to_string().contains("new join URL"), "{error}");
}

#[tokio::test]
async fn downgrades_are_refused() {
    let fake = Fake::default();
    let port = fake.serve(None).await;
    let server = pinned(port, SpkiPin::from_bytes([7; 32]));
    let client = Client::new(identity(server), impatient()).unwrap();
    let error = standing(&client).await.unwrap_err();
    assert!(matches!(error, ClientError::NotTls { .. }), "{error:?}");

    let remote: Server = "cairn+insecure://192.0.2.1:7600/#".parse().unwrap();
    let refused = Client::new(identity(remote.clone()), impatient()).err();
    assert!(matches!(refused, Some(ClientError::InsecureRemote { .. })));
    let forced = Options {
        force_insecure: true,
        ..impatient()
    };
    assert!(Client::new(identity(remote), forced).is_ok());
}

#[tokio::test]
async fn joining_keeps_an_identity() {
    let fake = Fake::default();
    let port = fake.serve(None).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("worker.json");
    let url = |token: &str| -> JoinUrl {
        format!("cairn+insecure://127.0.0.1:{port}/#{token}")
            .parse()
            .ok()
            .unwrap()
    };
    let refused = join(&url("old"), "ada", &path, &impatient())
        .await
        .err()
        .unwrap();
    assert_eq!(refused.reason(), Some(ErrorReason::TokenExpired));
    assert!(!path.exists());
    join(&url("good"), "ada", &path, &impatient())
        .await
        .ok()
        .unwrap();
    let kept = Identity::load(&path).ok().unwrap();
    assert_eq!(
        (kept.worker_id.as_str(), kept.role),
        ("w1", v1::Role::Volunteer)
    );
}

#[tokio::test]
async fn a_broken_upload_goes_on_where_it_was() {
    let fake = Fake::default();
    fake.cuts.store(2, Ordering::SeqCst);
    let client = client(&fake).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    std::fs::write(&path, body()).unwrap();
    let blob = blob(&body());
    client.upload(&path, blob, "lease", &|_| ()).await.unwrap();
    assert_eq!(fake.blobs.lock().unwrap()[&blob.digest.to_string()], body());
    assert_eq!(*fake.offsets.lock().unwrap(), [0, 1 << 20, 2 << 20]);

    // Once held, nothing is sent again.
    client.upload(&path, blob, "lease", &|_| ()).await.unwrap();
    assert_eq!(fake.offsets.lock().unwrap().len(), 3);
    assert!(client.missing_blobs(&[blob]).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_file_that_is_not_the_blob_is_not_sent() {
    let fake = Fake::default();
    let client = client(&fake).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    std::fs::write(&path, b"short").unwrap();
    let error = client
        .upload(&path, blob(&body()), "lease", &|_| ())
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::FileChanged { .. }));
    let other = BlobName {
        digest: Digest::of(b"other"),
        size_bytes: 5,
    };
    let error = client
        .upload(&path, other, "lease", &|_| ())
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Some(ErrorReason::DigestMismatch));
}

#[tokio::test]
async fn a_broken_download_goes_on_and_appears_whole() {
    let fake = Fake::default();
    let blob = blob(&body());
    fake.blobs
        .lock()
        .unwrap()
        .insert(blob.digest.to_string(), body());
    fake.cuts.store(2, Ordering::SeqCst);
    let client = client(&fake).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/blob");
    client.download(blob, &path, &|_| ()).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), body());
    assert_eq!(*fake.offsets.lock().unwrap(), [0, 200_000, 400_000]);
    assert_eq!(
        std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
        1
    );
}

#[tokio::test]
async fn other_bytes_never_become_visible() {
    let fake = Fake::default();
    let blob = blob(&body());
    fake.blobs
        .lock()
        .unwrap()
        .insert(blob.digest.to_string(), body());
    let client = client(&fake).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blob");

    fake.lies.store(9, Ordering::SeqCst);
    let error = client.download(blob, &path, &|_| ()).await.unwrap_err();
    assert!(matches!(error, ClientError::Malformed(_)), "{error:?}");
    assert!(!path.exists());

    // One damaged transfer heals by itself.
    fake.lies.store(1, Ordering::SeqCst);
    client.download(blob, &path, &|_| ()).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), body());
}
