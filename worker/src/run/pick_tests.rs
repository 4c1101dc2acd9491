use std::path::Path;

use super::*;
use crate::cache::Cache;
use crate::device::DeviceName;
use crate::device::choice::fastest;
use crate::device::probe::{Depth, here};
use crate::home::Home;
use crate::join;
use crate::model::ops::bent::{Bend, with};
use crate::run::context::{Context, State};
use crate::run::ready::DeviceNote;
use cairn_proto::client::{Client, Options};

#[path = "../../tests/fake/mod.rs"]
#[expect(dead_code, reason = "the tests of audits use the rest")]
mod fake;

use fake::Fake;

/// The CPU device, its kernels bent or not.
fn settle(bend: Option<Bend>) -> Settle {
    Arc::new(move || {
        let name = DeviceName::default();
        let report = with(bend, || here(name, Depth::Small));
        fastest(vec![(name, report)])
    })
}

/// What `run` makes, for one unit.
fn context(home: &Path) -> Ctx {
    let home = Home::new(Some(home)).unwrap();
    let cache = Cache::open(&home.folder("cache").unwrap(), 1 << 30).unwrap();
    Arc::new(Context {
        client: Client::new(home.identity().unwrap(), Options::default()).unwrap(),
        cache,
        work: home.folder("work").unwrap(),
        checkpoints: home.folder("checkpoints").unwrap(),
        receipts: home.folder("receipts").unwrap(),
        submitted: home.folder("submitted").unwrap(),
        device_note: home.path.join("device.json"),
        once: true,
        exit_when_idle: None,
        keep_lease: false,
        checkpoint_seconds: 60.0,
        state: State::default(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_computes_wrong_claims_nothing_and_gives_nothing_back() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let fake = Fake::default();
    let work = v1::TrainWork::default();
    fake.world().work.push_back(v1::lease::Work::Train(work));
    let port = fake.serve().await;
    let dir = tempfile::tempdir().unwrap();
    let url = format!("cairn+insecure://127.0.0.1:{port}/#volunteer");
    join::run(join::JoinArgs {
        url,
        name: Some("ada".to_owned()),
        home: Some(dir.path().to_owned()),
        replace: false,
        force_insecure: false,
        json: false,
    })
    .await
    .unwrap();

    let (to_work, mut units) = mpsc::channel(1);
    let permits = Arc::new(Semaphore::new(1));
    let bent = settle(Some(Bend::LoraScale));
    let wrong = run(context(dir.path()), permits.clone(), to_work.clone(), bent).await;
    let reason = wrong.unwrap_err().to_string();
    assert!(reason.starts_with("this device computes "), "{reason}");
    assert_eq!(fake.world().work.len(), 1, "the work waits for another");
    assert!(fake.world().released.is_empty());
    let note = DeviceNote::read(&dir.path().join("device.json")).unwrap();
    assert_eq!(note.paused, Some(reason));

    let context = context(dir.path());
    let sound = run(context.clone(), permits, to_work, settle(None));
    let claimed = tokio::join!(sound, units.recv());
    claimed.0.unwrap();
    assert!(claimed.1.is_some());
    assert_eq!(fake.world().work.len(), 0);
    assert_eq!(context.device(), DeviceName::default());
}
