//! A coordinator that was restored from an old backup takes back what it has acknowledged.
use cairn_coordinator::caller::Caller;
use cairn_coordinator::domain::shard::State as ShardState;
use cairn_coordinator::ids::{LeaseId, RoundId, SubmissionId};
use cairn_coordinator::ops::claim_work::Assignment;
use cairn_coordinator::ops::read_standing::{get_standing, list_submissions};
use cairn_coordinator::ops::restore_submission::restore_submission;
use cairn_coordinator::ops::submit_adapter::{Acknowledged, NewAdapter};
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::ReceiptStatement;
use cairn_proto::v1;
use ed25519_dalek::SigningKey;

use super::{reason, shard_of};
use crate::world::{Adapter, World, new_adapter};

/// Makes the coordinator as it was before the lease was given: nobody has heard of the submission,
/// and its adapter is gone.
async fn forget(world: &World, id: SubmissionId, work: &Assignment, adapter: &Adapter) {
    let digest = adapter.name().digest;
    let (round, shard) = (work.lease.round, shard_of(work));
    let mut tx = world.app().db.begin().await.unwrap();
    for statement in [
        "delete from evaluations where state = 'open' and candidate <> '[]'".to_owned(),
        format!(
            "delete from leases where evaluation_id in \
             (select id from evaluations where subject = '{id}')"
        ),
        format!("delete from evaluations where subject = '{id}'"),
        format!("delete from strikes where submission_id = '{id}'"),
        format!("delete from inner_products where one = '{id}' or other = '{id}'"),
        format!("delete from submissions where id = '{id}'"),
        format!("delete from leases where id = '{}'", work.lease.id),
        format!("delete from kept_blobs where digest = '{digest}'"),
        format!("delete from blobs where digest = '{digest}'"),
        format!(
            "update shards set state = 'open', generation = 0 \
             where round_id = '{round}' and position = {shard}"
        ),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(statement))
            .execute(tx.conn())
            .await
            .unwrap();
    }
    tx.commit().await.unwrap();
    world.app().blobs.delete(digest).await.unwrap();
}

fn receipt(answer: &Acknowledged) -> v1::Receipt {
    v1::Receipt {
        statement: answer.statement.clone(),
        signature: answer.signature.clone(),
    }
}

async fn restore(
    world: &World,
    caller: &Caller,
    receipt: &v1::Receipt,
    new: &NewAdapter,
) -> Result<bool, cairn_coordinator::error::Error> {
    restore_submission(world.app(), caller, receipt, new, |_| Ok(())).await
}

pub async fn a_lost_submission_comes_back_and_is_judged_anew(mut world: World) {
    let round = world.round(2).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let first = world.submit(&ann, &work, &adapter).await.unwrap();
    let (paper, new) = (receipt(&first), new_adapter(&work, &adapter));
    // Nothing was lost.
    assert!(!restore(&world, &ann, &paper, &new).await.unwrap());

    forget(&world, first.id, &work, &adapter).await;
    assert!(world.view(round.id).await.submissions.is_empty());
    let lease = work.lease.id;
    // Before the receipt is shown the door is closed; after it, open for this very blob.
    let early = world.send(&ann, lease, &adapter.weights).await;
    assert_eq!(reason(early), ErrorReason::LeaseLost);
    let absent = restore(&world, &ann, &paper, &new).await;
    assert_eq!(reason(absent), ErrorReason::BlobMissing);
    let mut world = world.restart().await;
    let other = world.send(&ann, lease, b"something else").await;
    assert_eq!(reason(other), ErrorReason::LeaseLost);
    world.send(&ann, lease, &adapter.weights).await.unwrap();
    assert!(restore(&world, &ann, &paper, &new).await.unwrap());
    assert!(!restore(&world, &ann, &paper, &new).await.unwrap());

    let view = world.view(round.id).await;
    assert_eq!(view.submissions.len(), 1);
    assert_eq!(view.submissions[0].id, first.id);
    let shard = &view.shards[shard_of(&work) as usize];
    assert_eq!(shard.row.shard.state, ShardState::Submitted);
    // It is audited, whoever it is from, and answers under the lease it always had.
    let listed = list_submissions(world.app(), &ann, None, 9).await.unwrap();
    let again = Acknowledged {
        audit: listed[0].audit.clone(),
        ..first.clone()
    };
    assert!(again.audit.is_some());
    world.open(&ann, &work, &adapter, &again).await.unwrap();
    world.contribute(2, [0.4, 0.4]).await;
    world.judge().await;
    let counts = get_standing(world.app(), &ann).await.unwrap().counts;
    assert_eq!((counts.accepted, counts.credit_tokens), (1, 100));
    assert_eq!(world.outcome(round.id).await.0, "published");
    assert!(!restore(&world, &ann, &paper, &new).await.unwrap());
}

pub async fn what_comes_back_too_late_keeps_its_credit(mut world: World) {
    let round = world.round(2).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let first = world.submit(&ann, &work, &adapter).await.unwrap();
    world.judge().await;
    let sealed = list_submissions(world.app(), &ann, None, 9).await.unwrap();
    let sealed = v1::Receipt {
        statement: sealed[0].statement.clone().into_bytes(),
        signature: sealed[0].signature.clone(),
    };
    forget(&world, first.id, &work, &adapter).await;
    // Meanwhile somebody else does the shard.
    for seed in 2..4 {
        world.contribute(seed, [0.4, 0.4]).await;
    }
    let new = new_adapter(&work, &adapter);
    let absent = restore(&world, &ann, &sealed, &new).await;
    assert_eq!(reason(absent), ErrorReason::BlobMissing);
    let lease = work.lease.id;
    world.send(&ann, lease, &adapter.weights).await.unwrap();
    assert!(restore(&world, &ann, &sealed, &new).await.unwrap());
    assert!(!restore(&world, &ann, &sealed, &new).await.unwrap());
    let counts = get_standing(world.app(), &ann).await.unwrap().counts;
    assert_eq!((counts.accepted, counts.credit_tokens), (1, 100));
    world.judge().await;
    assert_eq!(world.view(round.id).await.submissions.len(), 2);
    assert_eq!(world.outcome(round.id).await.0, "published");
    let counts = get_standing(world.app(), &ann).await.unwrap().counts;
    assert_eq!((counts.accepted, counts.credit_tokens), (1, 100));

    // Of a round that nobody knows, without a verdict: the paper is kept, nothing is credited.
    let unknown = ReceiptStatement {
        submission: SubmissionId::new().to_string(),
        lease: LeaseId::new().to_string(),
        worker: ann.worker.to_string(),
        round: RoundId::new().to_string(),
        shard: 3,
        adapter: adapter.name().digest,
        adapter_bytes: adapter.name().size_bytes,
        received_ms: 5,
        verdict: "pending".to_owned(),
        reason: String::new(),
        credit_tokens: 0,
        log_index: 999,
    };
    let paper = unknown.sign(&world.app().key).unwrap();
    let mut new = new_adapter(&work, &adapter);
    new.lease = unknown.lease.parse().unwrap();
    assert!(restore(&world, &ann, &paper, &new).await.unwrap());
    let listed = list_submissions(world.app(), &ann, None, 9).await.unwrap();
    assert_eq!(listed.len(), 2);
    let oldest = &listed[1];
    let statement: ReceiptStatement = serde_json::from_str(&oldest.statement).unwrap();
    assert_eq!(
        (statement.verdict.as_str(), statement.reason.as_str()),
        ("rejected", "ROUND_ENDED")
    );
    assert_ne!(statement.log_index, 999);
    let counts = get_standing(world.app(), &ann).await.unwrap().counts;
    assert_eq!((counts.rejected, counts.credit_tokens), (1, 100));
}

pub async fn only_our_own_receipts_bring_something_back(mut world: World) {
    world.round(2).await;
    let (ann, bob) = (world.volunteer().await, world.volunteer().await);
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let first = world.submit(&ann, &work, &adapter).await.unwrap();
    let statement: ReceiptStatement = serde_json::from_slice(&first.statement).unwrap();
    let new = new_adapter(&work, &adapter);
    let forged = statement.sign(&SigningKey::from_bytes(&[1; 32])).unwrap();
    assert_eq!(
        reason(restore(&world, &ann, &forged, &new).await),
        ErrorReason::BadSignature
    );
    let paper = receipt(&first);
    assert_eq!(
        reason(restore(&world, &bob, &paper, &new).await),
        ErrorReason::InvalidArgument
    );
    let mut other = new.clone();
    other.adapter = world.adapter(2, [0.5, 0.5]).name();
    assert_eq!(
        reason(restore(&world, &ann, &paper, &other).await),
        ErrorReason::InvalidArgument
    );
    // A lease brings in one submission, whatever a second receipt of ours would say.
    let second = ReceiptStatement {
        submission: SubmissionId::new().to_string(),
        ..statement
    };
    let second = second.sign(&world.app().key).unwrap();
    assert_eq!(
        reason(restore(&world, &ann, &second, &new).await),
        ErrorReason::LeaseLost
    );
    let empty = v1::Receipt::default();
    assert_eq!(
        reason(restore(&world, &ann, &empty, &new).await),
        ErrorReason::BadSignature
    );
}
