//! Uploads that break go on where they stopped.
use std::sync::Mutex;
use std::time::Duration;

use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use cairn_proto::v1::write_blob_request::{Header, Part};
use cairn_stack::digest::Digest;
use cairn_tests::adapters::honest;
use cairn_tests::cluster::Ready;
use cairn_tests::member::{Member, refusal};
use cairn_tests::tiny::round_file;
use futures::StreamExt as _;

const CHUNK: usize = 256 * 1024;

fn message(part: Part) -> v1::WriteBlobRequest {
    v1::WriteBlobRequest { part: Some(part) }
}

/// Sends the first bytes and then nothing, until they are held; then the line is cut.
async fn cut_upload(member: &Member, name: BlobName, bytes: &[u8], until: usize) {
    let header = Header {
        blob: Some(name.into()),
        offset: 0,
        lease_id: String::new(),
    };
    let mut messages = vec![message(Part::Header(header))];
    messages.extend(
        bytes[..until]
            .chunks(CHUNK)
            .map(|chunk| message(Part::Chunk(chunk.to_vec()))),
    );
    let hanging = member.client.call_once(|mut to| {
        let messages = futures::stream::iter(messages.clone()).chain(futures::stream::pending());
        async move { to.blobs.write_blob(messages).await }
    });
    let arrived = async {
        while member.committed(name).await.unwrap() < until as u64 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        answer = hanging => panic!("answered half an upload: {answer:?}"),
        () = arrived => {}
        () = tokio::time::sleep(Duration::from_secs(20)) => panic!("the bytes do not arrive"),
    }
}

#[tokio::test]
async fn a_cut_upload_goes_on_where_it_stopped() {
    let ready = Ready::start().await.unwrap();
    let member = &ready.maintainer;
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let name = BlobName {
        digest: Digest::of(&bytes),
        size_bytes: bytes.len() as u64,
    };
    cut_upload(member, name, &bytes, 4 * CHUNK).await;
    // Not there for anybody, not even for the sender.
    assert_eq!(
        refusal(member.fetch(&name.into()).await),
        ErrorReason::NotFound
    );
    assert_eq!(member.client.missing_blobs(&[name]).await.unwrap(), [name]);

    let path = ready.base.path().join("large.bin");
    std::fs::write(&path, &bytes).unwrap();
    let seen = Mutex::new(Vec::new());
    let note = |at: u64| seen.lock().unwrap().push(at);
    member.client.upload(&path, name, "", &note).await.unwrap();
    let seen = seen.into_inner().unwrap();
    assert_eq!(
        seen.first(),
        Some(&(4 * CHUNK as u64)),
        "it began at {seen:?}"
    );
    assert_eq!(member.fetch(&name.into()).await.unwrap(), bytes);
}

#[tokio::test]
async fn the_same_blob_may_come_twice_and_from_two_at_once() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let [bob, carol] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    let (one, two) = (bob.lease().await.unwrap(), carol.lease().await.unwrap());
    let adapter = honest(1);
    let sent = futures::future::join(
        bob.upload(&adapter.weights, &one.id),
        carol.upload(&adapter.weights, &two.id),
    );
    let (from_bob, from_carol) = sent.await;
    assert_eq!(from_bob.unwrap(), from_carol.unwrap());
    bob.upload(&adapter.weights, &one.id).await.unwrap();
    bob.submit(&bob.submission(&one, &adapter)).await.unwrap();
}

#[tokio::test]
async fn bit_rot_is_noticed_and_not_the_volunteer_s_fault() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let lease = bob.lease().await.unwrap();
    let adapter = honest(1);
    bob.hand_in(&lease, &adapter).await.unwrap();
    let hex = adapter.name().digest.to_string();
    let path = ready
        .cluster
        .folder()
        .join("store/blobs")
        .join(&hex[..2])
        .join(&hex);
    let mut rotten = adapter.weights.clone();
    rotten[300] ^= 1;
    std::fs::write(path, rotten).unwrap();
    ready.judge().await.unwrap();
    let (verdict, reason) = bob.verdict().await.unwrap();
    assert_eq!(
        (verdict, reason.as_str()),
        (v1::Verdict::Rejected, "UNREADABLE")
    );
    let view = ready.maintainer.round(&round).await.unwrap();
    assert!(view.shards.iter().all(|shard| shard.failures == 0));
}
