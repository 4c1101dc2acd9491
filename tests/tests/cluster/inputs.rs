//! Bad input from maintainers: each with its clear error, and nothing half done.
use std::fs;

use cairn_proto::reason::ErrorReason::{self, *};
use cairn_proto::v1;
use cairn_tests::adapters::honest;
use cairn_tests::cluster::Ready;
use cairn_tests::member::refusal;
use cairn_tests::tiny::{self, round_file};

/// A well-formed id that nothing has.
const NOBODY: &str = "0190f3a4-0000-7000-8000-000000000000";

#[tokio::test]
async fn unknown_rounds_are_not_found() {
    let ready = Ready::start().await.unwrap();
    let maintainer = &ready.maintainer;
    assert_eq!(refusal(maintainer.round(NOBODY).await), NotFound);
    assert_eq!(refusal(maintainer.abort(NOBODY).await), NotFound);
    for malformed in ["", "1", "../../etc/passwd", "' or 1=1 --"] {
        assert_eq!(
            refusal(maintainer.round(malformed).await),
            InvalidArgument,
            "{malformed}"
        );
    }
    let watched = maintainer.client.call(|mut to| async move {
        let id = NOBODY.to_owned();
        let mut views = to
            .watch
            .watch_round(v1::WatchRoundRequest { id })
            .await?
            .into_inner();
        views.message().await.map(tonic::Response::new)
    });
    assert_eq!(refusal(watched.await), NotFound);
    assert_eq!(refusal(maintainer.checkpoint("7").await), NotFound);
    assert_eq!(refusal(maintainer.checkpoint("deadbeef").await), NotFound);
}

#[tokio::test]
async fn round_files_are_read_strictly() {
    let ready = Ready::start().await.unwrap();
    let sound = round_file(2);
    let cases: [(&str, &str, ErrorReason, &str); 9] = [
        ("\"tiny\"", "\"huge\"", NotFound, "huge"),
        ("\"train\"", "\"trian\"", NotFound, "trian"),
        ("\"train\"", "\"gate\"", InvalidArgument, "gate"),
        ("gate = \"gate\"", "gate = \"train2\"", NotFound, "train2"),
        ("shards = 2", "shards = 0", InvalidArgument, "shards"),
        ("shards = 2", "shards = 41", InvalidArgument, "41"),
        ("rank = 2", "rnak = 2", InvalidArgument, "rank"),
        (
            "sequence_length = 32",
            "sequence_length = 4096",
            InvalidArgument,
            "64",
        ),
        ("shards = 2", "shards = ", InvalidArgument, "round_file"),
    ];
    for (from, to, reason, says) in cases {
        let bad = sound.replacen(from, to, 1);
        assert_ne!(bad, sound, "{from} is not in the file");
        let error = ready.maintainer.open_round(&bad).await.unwrap_err();
        assert_eq!(error.reason(), Some(reason), "{to}: {error}");
        assert!(error.to_string().contains(says), "{to}: {error}");
    }
    // An audit set in place of the gate, and a second round beside the first.
    let swapped = sound.replacen("gate = \"gate\"", "gate = \"audit\"", 1);
    let swapped = swapped.replacen("audit = \"audit\"\n", "", 1);
    assert_eq!(
        refusal(ready.maintainer.open_round(&swapped).await),
        PreconditionFailed
    );
    ready.maintainer.open_round(&sound).await.unwrap();
    assert_eq!(
        refusal(ready.maintainer.open_round(&sound).await),
        PreconditionFailed
    );
}

#[tokio::test]
async fn models_are_opened_before_they_are_believed() {
    let ready = Ready::start().await.unwrap();
    let maintainer = &ready.maintainer;
    let files = maintainer.checkpoint("").await.unwrap().files;
    let ours = |path: &str| path.starts_with("cairn-manifest") || path == "SHA256SUMS";
    let files: Vec<v1::File> = files.into_iter().filter(|file| !ours(&file.path)).collect();
    let without = |path: &str| -> Vec<v1::File> {
        files
            .iter()
            .filter(|file| file.path != path)
            .cloned()
            .collect()
    };
    let says = async |name: &str, files: Vec<v1::File>, reason: ErrorReason, text: &str| {
        let error = maintainer.create_model(name, files).await.unwrap_err();
        assert_eq!(error.reason(), Some(reason), "{error}");
        let said = error.to_string();
        assert!(said.contains(text), "{said}");
        // Nobody learns where our folders are.
        assert!(
            !said.contains(&*ready.cluster.folder().to_string_lossy()),
            "{said}"
        );
    };
    says("a", without(tiny::WEIGHTS), InvalidArgument, "safetensors").await;
    says("a", without("config.json"), InvalidArgument, "config.json").await;
    says("a", Vec::new(), InvalidArgument, "files").await;
    says(tiny::MODEL, files.clone(), AlreadyExists, tiny::MODEL).await;
    for name in ["", "../up", "A", "a/b", "con text"] {
        says(name, files.clone(), InvalidArgument, "name").await;
    }

    // A sharded folder whose index names a file that is not there.
    let mut sharded = without(tiny::WEIGHTS);
    let map: serde_json::Map<_, _> = tiny::config()
        .weights()
        .into_iter()
        .map(|(name, _)| (name, "model-00001-of-00002.safetensors".into()))
        .collect();
    let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
    let path = "model.safetensors.index.json";
    fs::write(ready.base.path().join("index.json"), &index).unwrap();
    let entry = cairn_stack::files::FileEntry::of_file(ready.base.path(), "index.json").unwrap();
    let blob = maintainer.upload(index.as_bytes(), "").await.unwrap();
    sharded.push(v1::File {
        path: path.into(),
        blob: Some(blob.into()),
        sha256: entry.sha256,
    });
    says(
        "a",
        sharded,
        InvalidArgument,
        "model-00001-of-00002.safetensors",
    )
    .await;

    let altered = |change: fn(&mut v1::File)| {
        let mut files = files.clone();
        change(
            files
                .iter_mut()
                .find(|file| file.path == "config.json")
                .unwrap(),
        );
        files
    };
    says(
        "a",
        altered(|file| file.sha256 = "0".repeat(64)),
        InvalidArgument,
        "sha256",
    )
    .await;
    says(
        "a",
        altered(|file| file.path = "../config.json".into()),
        InvalidArgument,
        "path",
    )
    .await;
    says(
        "a",
        altered(|file| file.path = "/etc/cron.d/x".into()),
        InvalidArgument,
        "path",
    )
    .await;
    let lost = altered(|file| file.blob.as_mut().unwrap().digest = "0".repeat(64));
    says("a", lost, BlobMissing, "0000").await;

    // Weights cut short.
    let bytes = fs::read(ready.base.path().join(tiny::WEIGHTS)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    tiny::write_model(folder.path()).unwrap();
    fs::write(folder.path().join(tiny::WEIGHTS), &bytes[..bytes.len() - 4]).unwrap();
    let error = maintainer.add_model("a", folder.path()).await.unwrap_err();
    assert!(error.to_string().contains(tiny::WEIGHTS), "{error}");
    // After all of it, the sound one goes in.
    maintainer.create_model("a", files).await.unwrap();
}

#[tokio::test]
async fn datasets_have_records_and_keep_their_secrets() {
    let ready = Ready::start().await.unwrap();
    let maintainer = &ready.maintainer;
    let train = v1::DatasetSet::Train;
    assert_eq!(
        refusal(maintainer.add_dataset("none", train, &[]).await),
        InvalidArgument
    );
    let empty = [(Vec::new(), 0)];
    assert_eq!(
        refusal(maintainer.add_dataset("none", train, &empty).await),
        InvalidArgument
    );
    // The gate's own bytes, handed in again as training data, would give it away.
    let gate = tiny::chunks(tiny::GATE, 24);
    assert_eq!(
        refusal(maintainer.add_dataset("leak", train, &gate).await),
        PreconditionFailed
    );
    let gate_set = v1::DatasetSet::Gate;
    let public = tiny::chunks(tiny::TRAIN, 40);
    let refused = maintainer.add_dataset("known", gate_set, &public).await;
    assert_eq!(refusal(refused), PreconditionFailed);
    // Nor can a file of a model be a chunk of the gate's.
    let files = maintainer.checkpoint("").await.unwrap().files;
    let mut leak: Vec<v1::File> = files
        .into_iter()
        .filter(|file| !file.path.contains("cairn") && file.path != "SHA256SUMS")
        .collect();
    let chunk = maintainer
        .dataset(tiny::GATE)
        .await
        .unwrap()
        .chunks
        .remove(0)
        .blob
        .unwrap();
    let path = ready.base.path().join("leak.txt");
    fs::write(&path, maintainer.fetch(&chunk).await.unwrap()).unwrap();
    let entry = cairn_stack::files::FileEntry::of_file(ready.base.path(), "leak.txt").unwrap();
    leak.push(v1::File {
        path: "leak.txt".into(),
        blob: Some(chunk),
        sha256: entry.sha256,
    });
    assert_eq!(
        refusal(maintainer.create_model("leaky", leak).await),
        PreconditionFailed
    );
}

#[tokio::test]
async fn leases_that_never_were_are_not_found() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(1)).await.unwrap();
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let sound = bob.lease().await.unwrap();
    let made_up = v1::Lease {
        id: NOBODY.to_owned(),
        ..sound.clone()
    };
    assert_eq!(refusal(bob.renew(&made_up).await), NotFound);
    assert_eq!(refusal(bob.release(&made_up, true).await), NotFound);
    let adapter = honest(1);
    bob.upload(&adapter.weights, &sound.id).await.unwrap();
    assert_eq!(
        refusal(bob.submit(&bob.submission(&made_up, &adapter)).await),
        NotFound
    );
    let no_id = v1::Lease {
        id: "7".to_owned(),
        ..sound
    };
    assert_eq!(refusal(bob.renew(&no_id).await), InvalidArgument);
}
