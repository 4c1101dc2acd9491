//! The log: every receipt and every published checkpoint is a leaf, and nothing can be taken back.
use cairn_coordinator::caller::Caller;
use cairn_coordinator::domain::submission::Progress;
use cairn_coordinator::ops::read_log::{
    get_consistency_proof, get_inclusion_proof, get_tree_head, list_entries,
};
use cairn_coordinator::ops::read_standing::list_submissions;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::{ReceiptStatement, TreeHeadStatement};
use cairn_proto::v1;
use cairn_stack::merkle::{Hash, leaf_hash, root, verify_consistency, verify_inclusion};

use super::{reason, whole_round};
use crate::world::World;

async fn head(world: &World) -> TreeHeadStatement {
    let head = get_tree_head(world.app()).await.unwrap();
    TreeHeadStatement::verify(&head, world.app().key.verifying_key().as_bytes()).unwrap()
}

fn hash(text: &str) -> Hash {
    hex::decode(text).unwrap().try_into().unwrap()
}

/// The newest receipt of each of a worker's submissions, checked.
async fn receipts(world: &World, caller: &Caller) -> Vec<(ReceiptStatement, String)> {
    let key = world.app().key.verifying_key();
    let own = list_submissions(world.app(), caller, None, 99)
        .await
        .unwrap();
    own.into_iter()
        .map(|own| {
            let receipt = v1::Receipt {
                statement: own.statement.clone().into_bytes(),
                signature: own.signature.clone(),
            };
            let statement = ReceiptStatement::verify(&receipt, key.as_bytes()).unwrap();
            assert_eq!(
                statement.verdict == "accepted",
                matches!(
                    own.submission().unwrap().progress,
                    Progress::Accepted { .. }
                )
            );
            (statement, own.statement)
        })
        .collect()
}

pub async fn the_log_holds_every_receipt_and_checkpoint(world: World) {
    let before = head(&world).await;
    assert_eq!(before.size, 1, "the base checkpoint is published already");
    let (world, _) = whole_round(world, false).await;
    world.settle().await;

    let now = head(&world).await;
    let entries = list_entries(world.app(), 0, 1_000).await.unwrap();
    assert_eq!(entries.len() as u64, now.size);
    let leaves: Vec<Hash> = entries
        .iter()
        .map(|entry| leaf_hash(entry.body.as_bytes()))
        .collect();
    assert_eq!(root(&leaves), hash(&now.root));
    let manifests = entries.iter().filter(|entry| entry.kind == "manifest");
    assert_eq!(manifests.count(), 2, "the base and the round's checkpoint");
    let (mut pending, mut decided) = (0, 0);
    for (index, entry) in entries.iter().enumerate() {
        if entry.kind == "receipt" {
            let statement: ReceiptStatement = serde_json::from_str(&entry.body).unwrap();
            assert_eq!(statement.log_index, index as u64);
            if statement.verdict == "pending" {
                pending += 1;
            } else {
                decided += 1;
                assert_eq!(statement.reason.is_empty(), statement.verdict == "accepted");
            }
        }
    }
    assert!(pending > 0 && pending == decided, "{pending} {decided}");

    for size in 1..=now.size {
        let smaller = root(&leaves[..size as usize]);
        let proof = get_consistency_proof(world.app(), size, now.size)
            .await
            .unwrap();
        assert!(verify_consistency(
            size,
            &smaller,
            now.size,
            &hash(&now.root),
            &proof
        ));
        for index in 0..size {
            let proof = get_inclusion_proof(world.app(), index, size).await.unwrap();
            let leaf = &leaves[index as usize];
            assert!(verify_inclusion(leaf, index, size, &proof, &smaller));
        }
    }
    let beyond = get_inclusion_proof(world.app(), 0, now.size + 1).await;
    assert_eq!(reason(beyond), ErrorReason::InvalidArgument);
    let beyond = get_inclusion_proof(world.app(), now.size, now.size).await;
    assert_eq!(reason(beyond), ErrorReason::InvalidArgument);
    let none = get_consistency_proof(world.app(), 0, now.size).await;
    assert_eq!(reason(none), ErrorReason::InvalidArgument);

    let old = hash(&before.root);
    let proof = get_consistency_proof(world.app(), 1, now.size)
        .await
        .unwrap();
    assert!(verify_consistency(
        1,
        &old,
        now.size,
        &hash(&now.root),
        &proof
    ));
}

pub async fn a_verdict_has_a_signed_receipt_in_the_log(mut world: World) {
    world.round(2).await;
    let caller = world.volunteer().await;
    let work = world.claim(&caller).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let first = world.submit(&caller, &work, &adapter).await.unwrap();
    let (acknowledged, _) = receipts(&world, &caller).await.remove(0);
    assert_eq!(acknowledged.verdict, "pending");
    assert_eq!(acknowledged.submission, first.id.to_string());
    world.judge().await;
    world.settle().await;
    let (verdict, text) = receipts(&world, &caller).await.remove(0);
    assert_eq!(
        (verdict.verdict.as_str(), verdict.reason.as_str()),
        ("accepted", "")
    );
    assert!(verdict.credit_tokens > 0 && verdict.log_index > acknowledged.log_index);
    let entry = list_entries(world.app(), verdict.log_index, 1)
        .await
        .unwrap()
        .remove(0);
    assert_eq!(entry.body, text);
    // Sealed once: nothing more is appended, however often the tasks run.
    let size = head(&world).await.size;
    world.settle().await;
    assert_eq!(head(&world).await.size, size);
}
