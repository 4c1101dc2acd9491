//! Whole rounds: to a published checkpoint that anybody can fold again, or to nothing at all.
use std::path::Path;
use std::time::Duration;

use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use cairn_proto::v1::RoundState::{Failed, Published};
use cairn_stack::adapter::{AdapterFile, CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::digest::Digest;
use cairn_stack::fold::{Term, fold};
use cairn_stack::lineage::{FolderReport, verify_folder};
use cairn_tests::adapters::{Adapter, Sabotage, honest, honest_on, scaled};
use cairn_tests::cluster::Ready;
use cairn_tests::evaluator::Habit;
use cairn_tests::member::refusal;
use cairn_tests::puzzle::Puzzle;
use cairn_tests::tiny::{WEIGHTS, round_file};
use tempfile::TempDir;

/// Fresh volunteers hand in these adapters, one each.
async fn hand_in(ready: &Ready, adapters: &[Adapter]) {
    for (volunteer, adapter) in ready
        .volunteers(adapters.len())
        .await
        .unwrap()
        .iter()
        .zip(adapters)
    {
        let lease = volunteer.lease().await.unwrap();
        volunteer.hand_in(&lease, adapter).await.unwrap();
    }
}

/// Downloads a checkpoint and verifies it against the coordinator's key.
async fn download(ready: &Ready, revision: &str) -> (TempDir, FolderReport) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = ready.maintainer.checkpoint(revision).await.unwrap();
    ready
        .maintainer
        .fetch_folder(&checkpoint.files, folder.path())
        .await
        .unwrap();
    let key = ready.maintainer.client.identity().server_key;
    let report = verify_folder(folder.path(), Some(&key)).unwrap();
    assert!(report.is_intact(), "{report:?}");
    assert_eq!(
        report.signed.commit(),
        checkpoint.checkpoint.unwrap().commit
    );
    (folder, report)
}

/// Fetches base and contributions as a maintainer may, folds them again and compares every file.
async fn refold(ready: &Ready, report: &FolderReport, published: &Path) {
    let scratch = tempfile::tempdir().unwrap();
    let head = ready.maintainer.checkpoint("").await.unwrap();
    let adapters = scratch.path().join("adapters");
    ready
        .maintainer
        .fetch_folder(&head.adapter_files, &adapters)
        .await
        .unwrap();
    let contributions = &report.signed.manifest().contributions;
    assert_eq!(head.adapter_files.len(), 2 * contributions.len());
    let mut files = Vec::new();
    for contribution in contributions {
        let dir = adapters.join(&contribution.id);
        let digest = |name: &str| Digest::of_file(&dir.join(name)).unwrap().0;
        assert_eq!(digest(WEIGHTS_FILE), contribution.adapter);
        assert_eq!(digest(CONFIG_FILE), contribution.adapter_config);
        files.push(AdapterFile::open(&dir).unwrap());
    }
    let terms: Vec<Term<'_>> = files
        .iter()
        .zip(contributions)
        .map(|(adapter, contribution)| Term {
            adapter,
            weight: contribution.weight,
        })
        .collect();
    let (base, _) = download(ready, "0").await;
    let out = scratch.path().join("again");
    let done = fold(&Checkpoint::open(base.path()).unwrap(), &terms, &out).unwrap();
    assert_eq!(done.files, report.signed.manifest().files);
    for file in done.files {
        let read = |dir: &Path| std::fs::read(dir.join(&file.path)).unwrap();
        assert_eq!(read(&out), read(published), "{}", file.path);
    }
}

#[tokio::test]
async fn two_rounds_publish_checkpoints_that_anybody_can_fold_again() {
    let ready = Ready::start().await.unwrap();
    let puzzle = Puzzle::new(&Checkpoint::open(ready.base.path()).unwrap()).unwrap();
    let mut errors = vec![1.0];
    for number in 1..=2_u32 {
        let round = ready.maintainer.open_round(&round_file(4)).await.unwrap();
        // Each round's workers see one half of what there is to learn.
        let layer = number as usize - 1;
        let seed = u64::from(number) * 10;
        let mut adapters: Vec<Adapter> = (1..4).map(|i| honest_on(layer, seed + i)).collect();
        adapters.push(Sabotage::SignFlipped.adapter(u64::from(number)));
        hand_in(&ready, &adapters).await;
        ready.judge().await.unwrap();
        // The cheat's shard is still open: an honest worker takes it.
        let last = honest_on(layer, seed + 9);
        hand_in(&ready, std::slice::from_ref(&last)).await;
        ready.judge().await.unwrap();

        let (state, reason) = ready.outcome(&round).await.unwrap();
        assert_eq!(state, Published, "{reason}");
        let view = ready.maintainer.round(&round).await.unwrap();
        let summary = view.round.unwrap();
        assert_eq!(summary.published_revision, number);
        assert!(summary.gate_loss_after < summary.gate_loss_before);
        assert!(summary.audit_loss_after < summary.audit_loss_before);
        let stacked = view
            .contributions
            .iter()
            .filter(|one| one.weight != 0.0)
            .count();
        let rejected = view
            .contributions
            .iter()
            .filter(|one| one.verdict() == v1::Verdict::Rejected)
            .count();
        assert!(
            stacked >= 1 && rejected == 1,
            "{stacked} stacked, {rejected} rejected"
        );

        let (folder, report) = download(&ready, "").await;
        let manifest = report.signed.manifest();
        assert_eq!(manifest.revision, u64::from(number));
        assert_eq!(manifest.round.as_deref(), Some(round.as_str()));
        let stack_of_round = manifest
            .contributions
            .iter()
            .filter(|one| one.round == round)
            .count();
        assert_eq!(stack_of_round, stacked);
        refold(&ready, &report, folder.path()).await;
        let bob = ready.cluster.volunteer("bob").await.unwrap();
        // Volunteers see the checkpoint, not the adapters of others.
        assert!(bob.checkpoint("").await.unwrap().adapter_files.is_empty());
        let adapters = ready.maintainer.checkpoint("").await.unwrap().adapter_files;
        for file in adapters {
            let refused = bob.fetch(file.blob.as_ref().unwrap()).await;
            assert_eq!(refusal(refused), ErrorReason::NotFound, "{}", file.path);
        }
        let error = puzzle
            .error(&Checkpoint::open(folder.path()).unwrap(), &[])
            .unwrap();
        assert!(error < *errors.last().unwrap(), "{errors:?} then {error}");
        errors.push(error);
    }
    println!("distance to the hidden weights: {errors:?}");
    // The base is what it was, and still verifies.
    let (folder, report) = download(&ready, "0").await;
    assert_eq!(report.signed.manifest().revision, 0);
    let read = |dir: &Path| std::fs::read(dir.join(WEIGHTS)).unwrap();
    assert_eq!(read(folder.path()), read(ready.base.path()));
}

#[tokio::test]
async fn the_round_s_stack_is_one_peft_adapter_with_the_same_delta() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(3)).await.unwrap();
    hand_in(&ready, &[honest(1), honest(2), honest(3)]).await;
    ready.judge().await.unwrap();
    let head = ready.maintainer.checkpoint("").await.unwrap();
    assert!(!head.stack_files.is_empty());
    let folder = tempfile::tempdir().unwrap();
    ready
        .maintainer
        .fetch_folder(&head.stack_files, folder.path())
        .await
        .unwrap();
    let dir = if folder.path().join("stack").is_dir() {
        folder.path().join("stack")
    } else {
        folder.path().to_owned()
    };
    let stack = AdapterFile::open(&dir).unwrap();
    let out = folder.path().join("folded");
    let base = Checkpoint::open(ready.base.path()).unwrap();
    fold(
        &base,
        &[Term {
            adapter: &stack,
            weight: 1.0,
        }],
        &out,
    )
    .unwrap();
    let (published, _) = download(&ready, "").await;
    let (ours, theirs) = (
        Checkpoint::open(&out).unwrap(),
        Checkpoint::open(published.path()).unwrap(),
    );
    for (name, _) in base.config().weights() {
        let (a, b) = (
            ours.read_f32(&name).unwrap().1,
            theirs.read_f32(&name).unwrap().1,
        );
        let close = a
            .iter()
            .zip(&b)
            .all(|(a, b)| (a - b).abs() <= 1e-6 * (1.0 + b.abs()));
        assert!(close, "{name}");
    }
}

#[tokio::test]
async fn what_does_not_improve_is_not_published() {
    let mut ready = Ready::start().await.unwrap();
    // Every stack that looked good on the gate turns out to be luck when it is tested again.
    ready.evaluator.habit = Habit::Fickle;
    let before = ready
        .maintainer
        .checkpoint("")
        .await
        .unwrap()
        .checkpoint
        .unwrap();
    let round = ready.maintainer.open_round(&round_file(3)).await.unwrap();
    hand_in(&ready, &[honest(1), honest(2), honest(3)]).await;
    ready.judge().await.unwrap();
    let outcome = ready.outcome(&round).await.unwrap();
    assert_eq!(outcome, (Failed, "NO_IMPROVEMENT".to_owned()));
    let after = ready
        .maintainer
        .checkpoint("")
        .await
        .unwrap()
        .checkpoint
        .unwrap();
    assert_eq!(after, before);
    // The volunteers did their part: accepted and credited all the same.
    let view = ready.maintainer.round(&round).await.unwrap();
    assert!(
        view.contributions
            .iter()
            .all(|one| one.verdict() == v1::Verdict::Accepted)
    );
    assert!(view.contributions.iter().all(|one| one.weight == 0.0));
    // And the model is free for another try.
    ready.evaluator.habit = Habit::Honest;
    let round = ready.maintainer.open_round(&round_file(3)).await.unwrap();
    hand_in(&ready, &[honest(1), honest(2), honest(3)]).await;
    ready.judge().await.unwrap();
    assert_eq!(ready.outcome(&round).await.unwrap().0, Published);
}

#[tokio::test]
async fn a_round_of_cheats_publishes_nothing() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(2)).await.unwrap();
    for turn in 0..3 {
        let poison = [turn * 2, turn * 2 + 1].map(|seed| Sabotage::RandomDelta.adapter(seed));
        hand_in(&ready, &poison).await;
        ready.judge().await.unwrap();
    }
    let outcome = ready.outcome(&round).await.unwrap();
    assert_eq!(outcome, (Failed, "NO_ACCEPTED".to_owned()));
    assert_eq!(
        ready
            .maintainer
            .checkpoint("")
            .await
            .unwrap()
            .checkpoint
            .unwrap()
            .revision,
        0
    );
}

#[tokio::test]
async fn the_deadline_ends_a_round_with_what_is_there() {
    let ready = Ready::start().await.unwrap();
    let nobody_came = ready.maintainer.open_round(&round_file(2)).await.unwrap();
    ready.cluster.advance(Duration::from_secs(3_601));
    ready.judge().await.unwrap();
    let outcome = ready.outcome(&nobody_came).await.unwrap();
    assert_eq!(outcome, (Failed, "NO_SUBMISSIONS".to_owned()));

    let round = ready.maintainer.open_round(&round_file(3)).await.unwrap();
    let slow = ready.cluster.volunteer("slow").await.unwrap();
    let lease = slow.lease().await.unwrap();
    hand_in(&ready, &[honest(1)]).await;
    ready.cluster.advance(Duration::from_secs(3_601));
    // Acknowledged before the deadline is judged after it.
    ready.judge().await.unwrap();
    assert_eq!(ready.outcome(&round).await.unwrap().0, Published);
    assert!(slow.hand_in(&lease, &honest(2)).await.is_err());
}

#[tokio::test]
async fn half_a_crowd_of_cheats_costs_the_round_nothing_but_their_shards() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(8)).await.unwrap();
    let mut adapters: Vec<Adapter> = (0..5).map(honest).collect();
    adapters.push(Sabotage::SignFlipped.adapter(50));
    adapters.push(Sabotage::RandomDelta.adapter(51));
    adapters.push(scaled(52, 50.0));
    hand_in(&ready, &adapters).await;
    ready.judge().await.unwrap();
    // Nobody takes the three shards up again; the deadline comes.
    ready.cluster.advance(Duration::from_secs(3_601));
    ready.judge().await.unwrap();
    assert_eq!(ready.outcome(&round).await.unwrap().0, Published);
    let view = ready.maintainer.round(&round).await.unwrap();
    let rejected: Vec<&str> = view
        .contributions
        .iter()
        .filter(|one| one.verdict() == v1::Verdict::Rejected)
        .map(|one| one.reason.as_str())
        .collect();
    assert_eq!(rejected.len(), 3, "{rejected:?}");
    let summary = view.round.unwrap();
    let (before, after) = (
        summary.gate_loss_before.unwrap(),
        summary.gate_loss_after.unwrap(),
    );
    println!("gate loss {before:.4} -> {after:.4} with 3 cheats of 8");
    assert!(after < before);
}
