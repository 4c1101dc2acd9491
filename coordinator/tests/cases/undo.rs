//! Undo: a contribution is taken back, and every checkpoint with it is replaced by what it would have
//! been without it, bit for bit.
use std::collections::BTreeMap;
use std::time::Duration;

use cairn_coordinator::app::App;
use cairn_coordinator::caller::Caller;
use cairn_coordinator::db::models::{
    CheckpointRow, FileRow, Folder, checkpoint_files, checkpoint_get, model_get,
};
use cairn_coordinator::db::rounds::{round_get, round_move};
use cairn_coordinator::db::strikes::{strike_insert, trust_of};
use cairn_coordinator::domain::candidate::Term;
use cairn_coordinator::domain::round::{Phase, State};
use cairn_coordinator::domain::stacker::Choice;
use cairn_coordinator::error::Error;
use cairn_coordinator::folding::Spectra;
use cairn_coordinator::ids::{RequestId, RoundId, SubmissionId};
use cairn_coordinator::manifests::read_manifest;
use cairn_coordinator::ops::read_contributions::{
    RevocationView, get_contribution, list_revocations,
};
use cairn_coordinator::ops::read_log::list_entries;
use cairn_coordinator::ops::read_models::list_checkpoints;
use cairn_coordinator::ops::read_standing::list_submissions;
use cairn_coordinator::ops::revoke_contribution::{NewRevocation, revoke_contribution};
use cairn_coordinator::ops::void_strike::void_strike;
use cairn_coordinator::tasks::{advance_rounds, judge_submissions, refold, seal_verdicts};
use cairn_proto::reason::{ErrorReason, VerdictReason};
use cairn_proto::signing::ReceiptStatement;
use cairn_stack::adapter::{AdapterFile, CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::files::FileEntry;
use cairn_stack::fold::{Term as FoldTerm, fold};
use cairn_stack::lineage::{Contribution, Manifest};

use super::{reason, verdicts};
use crate::world::World;

const QUALITIES: [[f64; 2]; 3] = [[0.5, 0.3], [0.3, 0.5], [0.4, 0.4]];

/// A round of three honest volunteers whose adapters begin at a seed.
async fn round(world: &mut World, seed: u64) -> RoundId {
    let round = world.round(3).await.id;
    for (place, quality) in (0..).zip(QUALITIES) {
        world.contribute(seed + place, quality).await;
    }
    world.judge().await;
    assert_eq!(world.outcome(round).await.0, "published");
    round
}

async fn three_rounds(world: &mut World) -> Vec<RoundId> {
    let mut rounds = Vec::new();
    for seed in [10, 20, 30] {
        rounds.push(round(world, seed).await);
    }
    rounds
}

/// The stacked submissions of a round, as they were chosen.
async fn terms(world: &World, round: RoundId) -> Vec<Term> {
    let mut tx = world.app().db.read().await.unwrap();
    match round_get(&mut tx, round).await.unwrap().unwrap().phase {
        Phase::Published { choice, .. } => choice.terms,
        other => panic!("{other:?}"),
    }
}

async fn try_revoke(
    world: &World,
    caller: &Caller,
    id: SubmissionId,
    refold: bool,
    request: RequestId,
) -> Result<RevocationView, Error> {
    let new = NewRevocation {
        id,
        reason: "a poisoned record".to_owned(),
        refold,
        request,
    };
    revoke_contribution(world.app(), caller, new).await
}

async fn revoke(world: &World, id: SubmissionId, refold: bool) -> RevocationView {
    try_revoke(world, &world.maintainer, id, refold, RequestId::new())
        .await
        .unwrap()
}

async fn row(app: &App, revision: u32) -> CheckpointRow {
    let mut tx = app.db.read().await.unwrap();
    let row = checkpoint_get(&mut tx, "tiny", revision).await.unwrap();
    row.unwrap_or_else(|| panic!("no revision {revision}"))
}

async fn head(app: &App) -> u32 {
    let mut tx = app.db.read().await.unwrap();
    let model = model_get(&mut tx, "tiny").await.unwrap();
    model.unwrap().head_revision
}

async fn manifest(app: &App, revision: u32) -> Manifest {
    read_manifest(app, row(app, revision).await.manifest)
        .await
        .unwrap()
}

async fn ids(app: &App, revision: u32) -> Vec<String> {
    let contributions = manifest(app, revision).await.contributions;
    contributions.into_iter().map(|one| one.id).collect()
}

async fn files(app: &App, revision: u32, folder: Folder) -> Vec<FileRow> {
    let mut tx = app.db.read().await.unwrap();
    let files = checkpoint_files(&mut tx, "tiny", revision, folder).await;
    let mut files = files.unwrap();
    // What names revision and time; all else is a function of base and stack.
    files.retain(|file| !file.path.starts_with("cairn-manifest"));
    files
}

/// Folds a list of contributions onto the base with what is in the store, as `cairn checkpoint
/// reproduce` does.
async fn offline(app: &App, contributions: &[Contribution]) -> Vec<FileEntry> {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    for file in files(app, 0, Folder::Checkpoint).await {
        if file.path != "SHA256SUMS" {
            let path = base.join(&file.path);
            app.blobs
                .materialise(file.blob.digest, &path)
                .await
                .unwrap();
        }
    }
    let mut adapters = Vec::new();
    for one in contributions {
        let dir = folder.path().join(&one.id);
        for (name, digest) in [
            (WEIGHTS_FILE, one.adapter),
            (CONFIG_FILE, one.adapter_config),
        ] {
            app.blobs
                .materialise(digest, &dir.join(name))
                .await
                .unwrap();
        }
        adapters.push((AdapterFile::open(&dir).unwrap(), one.weight));
    }
    let terms: Vec<FoldTerm> = adapters
        .iter()
        .map(|(adapter, weight)| FoldTerm {
            adapter,
            weight: *weight,
        })
        .collect();
    let base = Checkpoint::open(&base).unwrap();
    fold(&base, &terms, &folder.path().join("out"))
        .unwrap()
        .files
}

/// Revisions 4, 5 and 6 are 1, 2 and 3 without a contribution: head, lineage, bytes and log.
async fn check_replacements(world: &World, revoked: &str) {
    let app = world.app();
    assert_eq!(head(app).await, 6);
    let mut parent = row(app, 0).await.commit;
    for (old, new) in [(1, 4), (2, 5), (3, 6)] {
        let (before, after) = (manifest(app, old).await, manifest(app, new).await);
        let mut kept = before.contributions.clone();
        kept.retain(|one| one.id != revoked);
        assert_eq!(kept.len() + 1, before.contributions.len());
        assert_eq!(
            after.contributions, kept,
            "the same weights in the same order"
        );
        assert_eq!(
            (&after.round, &after.recipe),
            (&before.round, &before.recipe)
        );
        assert_eq!(after.scores.gate_after, None, "nobody has scored it");
        assert_eq!(after.files, offline(app, &kept).await);
        assert_eq!(before.files, offline(app, &before.contributions).await);
        let row = row(app, new).await;
        assert_eq!((row.refold_of, row.parent), (Some(old), Some(parent)));
        assert_eq!(after.parent, Some(parent.to_string()));
        parent = row.commit;
        let spectra: Spectra = serde_json::from_str(&row.spectrum.unwrap()).unwrap();
        assert!(spectra.norm.unwrap() > 0.0 && spectra.effective_rank.unwrap() >= 1.0);
        assert_eq!(spectra.compressed.unwrap().rank, 2);
    }
    let entries = list_entries(app, 0, 1_000).await.unwrap();
    let published: Vec<String> = entries
        .iter()
        .filter(|entry| entry.kind == "manifest")
        .map(|entry| {
            let body: serde_json::Value = serde_json::from_str(&entry.body).unwrap();
            body["commit"].as_str().unwrap().to_owned()
        })
        .collect();
    let mut expected = Vec::new();
    for revision in 0..=6 {
        expected.push(row(app, revision).await.commit.to_string());
    }
    assert_eq!(published, expected, "one entry a checkpoint");
}

pub async fn a_revoked_contribution_is_folded_out_of_every_checkpoint(mut world: World) {
    let rounds = three_rounds(&mut world).await;
    let bad = terms(&world, rounds[0]).await[0].submission;
    let before = row(world.app(), 2).await;
    let view = revoke(&world, bad, true).await;
    let affected: Vec<u32> = view
        .refolds
        .iter()
        .map(|one| one.affected.row.revision)
        .collect();
    assert_eq!(affected, [1, 2, 3]);
    assert!(view.refolds.iter().all(|one| one.replacement.is_none()));
    world.settle().await;
    check_replacements(&world, &bad.to_string()).await;
    assert_eq!(
        row(world.app(), 2).await,
        before,
        "a revision never changes"
    );

    // Everybody can see what and why.
    let listed = list_revocations(world.app(), "tiny", None, 10)
        .await
        .unwrap();
    assert_eq!(
        (listed.len(), listed[0].revocation.reason.as_str()),
        (1, "a poisoned record")
    );
    let by: Vec<Option<u32>> = listed[0]
        .refolds
        .iter()
        .map(|one| one.replacement.as_ref().map(|new| new.row.revision))
        .collect();
    assert_eq!(by, [Some(4), Some(5), Some(6)]);
    assert!(
        list_revocations(world.app(), "other", None, 10)
            .await
            .unwrap()
            .is_empty()
    );
    let marks = list_checkpoints(world.app(), "tiny", None, 10)
        .await
        .unwrap();
    let marks: Vec<(u32, u32, Option<u32>)> = marks
        .iter()
        .map(|one| (one.row.revision, one.marks.revoked, one.marks.replaced_by))
        .collect();
    let expected = [
        (6, 0, None),
        (5, 0, None),
        (4, 0, None),
        (3, 1, Some(6)),
        (2, 1, Some(5)),
    ];
    assert_eq!(marks[..5], expected);
    let contribution = get_contribution(world.app(), bad).await.unwrap();
    assert!(contribution.submission.revoked.is_some());
    assert_eq!(contribution.checkpoints.len(), 3);

    // The next round builds on the replacement and never contains it.
    round(&mut world, 40).await;
    assert_eq!(head(world.app()).await, 7);
    let stacked = ids(world.app(), 7).await;
    assert!(stacked.len() > 6 && !stacked.contains(&bad.to_string()));
}

pub async fn a_refold_is_what_a_coordinator_without_it_publishes(mut world: World) {
    let rounds = three_rounds(&mut world).await;
    let bad = terms(&world, rounds[1]).await[1].submission;
    revoke(&world, bad, true).await;
    world.settle().await;
    assert_eq!(head(world.app()).await, 5, "revision 1 does not contain it");

    let mut other = World::on(world.fixture.stores).await;
    let mut names: BTreeMap<SubmissionId, SubmissionId> = BTreeMap::new();
    for (round, seed) in rounds.iter().zip([10, 20, 30]) {
        let there = world.view(*round).await.submissions;
        let id = other.round(3).await.id;
        for (place, quality) in (0..).zip(QUALITIES) {
            let adapter = other.adapter(seed + place, quality).name().digest;
            let theirs = there.iter().find(|one| one.adapter == adapter).unwrap().id;
            if theirs != bad {
                let ours = other.contribute(seed + place, quality).await.id;
                names.insert(theirs, ours);
            }
        }
        let mut terms = terms(&world, *round).await;
        terms.retain(|term| term.submission != bad);
        for term in &mut terms {
            term.submission = names[&term.submission];
        }
        choose(&other, id, terms).await;
        other.settle().await;
        assert_eq!(other.outcome(id).await.0, "published");
    }
    for (here, there) in [(1, 1), (4, 2), (5, 3)] {
        for folder in [Folder::Checkpoint, Folder::Stack, Folder::Compressed] {
            let ours = files(world.app(), here, folder).await;
            assert!(!ours.is_empty());
            assert_eq!(
                ours,
                files(other.app(), there, folder).await,
                "{here} {folder:?}"
            );
        }
    }
}

/// Has a round fold this, whatever came in.
async fn choose(world: &World, id: RoundId, terms: Vec<Term>) {
    let choice = Choice {
        terms,
        ..sample_choice()
    };
    let mut tx = world.app().db.begin().await.unwrap();
    let judging = Phase::Training.judge().unwrap();
    assert!(
        round_move(&mut tx, id, State::Training, &judging)
            .await
            .unwrap()
    );
    let folding = judging.choose(choice).unwrap();
    assert!(
        round_move(&mut tx, id, State::Judging, &folding)
            .await
            .unwrap()
    );
    tx.commit().await.unwrap();
}

fn sample_choice() -> Choice {
    let json = serde_json::json!({"terms": [], "lambda": 1.0, "tau": 1.0, "gate_before": 2.0,
        "gate_after": 1.0, "audit_before": null, "audit_after": null, "gain": 1.0, "gain_se": 0.1});
    serde_json::from_value(json).unwrap()
}

pub async fn undo_survives_a_kill_at_any_step(mut world: World) {
    let rounds = three_rounds(&mut world).await;
    let bad = terms(&world, rounds[0]).await[2].submission;
    revoke(&world, bad, true).await;
    world = world.restart().await;
    // Killed in the middle of a fold, at many moments; what was under way is started over.
    for step in 0..12 {
        kill_after(world.app(), Duration::from_micros(100 << step)).await;
        world = world.restart().await;
    }
    world.settle().await;
    check_replacements(&world, &bad.to_string()).await;

    // A second one, of the second round, with a restart after each fold.
    let worse = terms(&world, rounds[1]).await[0].submission;
    let view = revoke(&world, worse, true).await;
    let affected: Vec<u32> = view
        .refolds
        .iter()
        .map(|one| one.affected.row.revision)
        .collect();
    assert_eq!(affected, [2, 3, 5, 6]);
    for _ in 0..4 {
        refold::run(world.app()).await.unwrap();
        world = world.restart().await;
    }
    let listed = list_revocations(world.app(), "", None, 10).await.unwrap();
    let by = listed
        .iter()
        .find(|view| view.revocation.submission == worse)
        .unwrap();
    let by: Vec<u32> = by
        .refolds
        .iter()
        .map(|one| one.replacement.as_ref().unwrap().row.revision)
        .collect();
    assert_eq!(
        by,
        [7, 8, 7, 8],
        "one replacement for two folds of one round"
    );
    assert_eq!(head(world.app()).await, 8);
    let stacked = ids(world.app(), 8).await;
    assert!(!stacked.contains(&bad.to_string()) && !stacked.contains(&worse.to_string()));
    assert_eq!(
        row(world.app(), 7).await.parent,
        Some(row(world.app(), 4).await.commit)
    );
}

/// Runs a fold and drops it at a moment. On a runtime of its own, whose end waits for the thread that
/// computes: a killed process has none left either.
async fn kill_after(app: &App, moment: Duration) {
    let app = app.clone();
    let killed = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _ = runtime.block_on(async { tokio::time::timeout(moment, refold::run(&app)).await });
    });
    killed.await.unwrap();
}

pub async fn revoking_is_for_maintainers_and_counts_once(mut world: World) {
    let round = round(&mut world, 10).await;
    let chosen = terms(&world, round).await;
    let (bad, other) = (chosen[0].submission, chosen[1].submission);
    let ann = world.volunteer().await;
    let request = RequestId::new();
    let denied = try_revoke(&world, &ann, bad, true, request).await;
    assert_eq!(reason(denied), ErrorReason::RoleRequired);
    let empty = NewRevocation {
        id: bad,
        reason: " \n".to_owned(),
        refold: false,
        request,
    };
    let empty = revoke_contribution(world.app(), &world.maintainer, empty).await;
    assert_eq!(reason(empty), ErrorReason::InvalidArgument);
    let nobody = try_revoke(
        &world,
        &world.maintainer,
        SubmissionId::new(),
        false,
        request,
    )
    .await;
    assert_eq!(reason(nobody), ErrorReason::NotFound);

    let first = try_revoke(&world, &world.maintainer, bad, false, request)
        .await
        .unwrap();
    assert!(first.refolds.is_empty());
    world.settle().await;
    let entries = list_entries(world.app(), 0, 1_000).await.unwrap().len();
    let again = try_revoke(&world, &world.maintainer, bad, false, request)
        .await
        .unwrap();
    assert_eq!(again, first);
    let reused = try_revoke(&world, &world.maintainer, other, false, request).await;
    assert_eq!(reason(reused), ErrorReason::RequestIdReused);
    assert_eq!(head(world.app()).await, 1, "nothing was folded again");

    // Asked for later, the folds are made; asked for again, no others.
    let later = revoke(&world, bad, true).await;
    assert_eq!(
        (later.revocation, later.refolds.len()),
        (first.revocation, 1)
    );
    world.settle().await;
    revoke(&world, bad, true).await;
    world.settle().await;
    assert_eq!(head(world.app()).await, 2);
    let now = list_entries(world.app(), 0, 1_000).await.unwrap().len();
    assert_eq!(now, entries + 1, "the one new manifest");

    // All of them revoked: the base again.
    for term in &chosen[1..] {
        revoke(&world, term.submission, true).await;
        world.settle().await;
    }
    let last = head(world.app()).await;
    let mut bare = files(world.app(), 0, Folder::Checkpoint).await;
    bare.retain(|file| file.path != "SHA256SUMS");
    let mut folded = files(world.app(), last, Folder::Checkpoint).await;
    folded.retain(|file| file.path != "SHA256SUMS");
    assert_eq!(bare, folded);
    assert!(files(world.app(), last, Folder::Stack).await.is_empty());
}

pub async fn a_revoked_submission_has_a_new_receipt_in_the_log(mut world: World) {
    let round = world.round(1).await.id;
    let caller = world.volunteer().await;
    let work = world.claim(&caller).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let id = world.submit(&caller, &work, &adapter).await.unwrap().id;
    let pending = try_revoke(&world, &world.maintainer, id, true, RequestId::new()).await;
    assert_eq!(reason(pending), ErrorReason::PreconditionFailed);
    world.judge().await;
    assert_eq!(world.outcome(round).await.0, "published");
    let credit = receipt(&world, &caller).await.credit_tokens;
    revoke(&world, id, true).await;
    let statement = receipt(&world, &caller).await;
    assert_eq!(
        (statement.verdict.as_str(), statement.reason.as_str()),
        ("rejected", VerdictReason::Revoked.as_str())
    );
    assert_eq!(statement.credit_tokens, credit, "the work was done");
    let entry = list_entries(world.app(), statement.log_index, 1)
        .await
        .unwrap()
        .remove(0);
    let logged: ReceiptStatement = serde_json::from_str(&entry.body).unwrap();
    assert_eq!(logged, statement);
    let size = list_entries(world.app(), 0, 1_000).await.unwrap().len();
    seal_verdicts::run(world.app()).await.unwrap();
    assert_eq!(
        list_entries(world.app(), 0, 1_000).await.unwrap().len(),
        size
    );
}

pub async fn a_strike_is_voided_by_a_maintainer(mut world: World) {
    world.round(1).await;
    let caller = world.volunteer().await;
    let work = world.claim(&caller).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let id = world.submit(&caller, &work, &adapter).await.unwrap().id;
    let none = void_strike(world.app(), &world.maintainer, id, "no reason").await;
    assert_eq!(reason(none), ErrorReason::NotFound);
    let mut tx = world.app().db.begin().await.unwrap();
    let (word, now) = (VerdictReason::ReplayMismatch, world.now());
    strike_insert(&mut tx, id, caller.worker, word, now)
        .await
        .unwrap();
    assert_eq!(trust_of(&mut tx, caller.worker).await.unwrap().strikes, 1);
    tx.commit().await.unwrap();
    let denied = void_strike(world.app(), &caller, id, "please").await;
    assert_eq!(reason(denied), ErrorReason::RoleRequired);
    for _ in 0..2 {
        void_strike(world.app(), &world.maintainer, id, "a broken evaluator")
            .await
            .unwrap();
    }
    let mut tx = world.app().db.read().await.unwrap();
    assert_eq!(trust_of(&mut tx, caller.worker).await.unwrap().strikes, 0);
}

/// The newest receipt of a worker's only submission.
async fn receipt(world: &World, caller: &Caller) -> ReceiptStatement {
    let mut own = list_submissions(world.app(), caller, None, 9)
        .await
        .unwrap();
    serde_json::from_str(&own.remove(0).statement).unwrap()
}

pub async fn a_round_on_a_revoked_base_ends_and_one_beside_it_goes_on(mut world: World) {
    let first = round(&mut world, 10).await;
    let chosen = terms(&world, first).await;
    // Not to be folded again: the running round goes on, and leaves it out.
    let second = world.round(3).await.id;
    revoke(&world, chosen[0].submission, false).await;
    for (place, quality) in (20..).zip(QUALITIES) {
        world.contribute(place, quality).await;
    }
    world.judge().await;
    assert_eq!(world.outcome(second).await.0, "published");
    assert!(
        !ids(world.app(), 2)
            .await
            .contains(&chosen[0].submission.to_string())
    );

    // To be folded again: the running round ends, and none begins until its base is there.
    let third = world.round(3).await.id;
    world.contribute(30, [0.5, 0.5]).await;
    revoke(&world, chosen[1].submission, true).await;
    let outcome = world.outcome(third).await;
    assert_eq!(outcome, ("failed", "BASE_REVOKED".to_owned()));
    assert_eq!(
        verdicts(&world, third).await,
        [Some(VerdictReason::RoundEnded)]
    );
    let early = world.try_round(3, RequestId::new()).await;
    assert_eq!(reason(early), ErrorReason::PreconditionFailed);
    world.settle().await;
    // Revision 1 contains both, revision 2 the second one.
    assert_eq!(head(world.app()).await, 4);
    round(&mut world, 40).await;
    assert_eq!(head(world.app()).await, 5);
}

pub async fn what_was_chosen_is_chosen_again_without_a_revoked_one(mut world: World) {
    let id = world.round(3).await.id;
    for (place, quality) in (10..).zip(QUALITIES) {
        world.contribute(place, quality).await;
    }
    // Until the choice is made, and not further.
    let choice = loop {
        while judge_submissions::run(world.app()).await.unwrap()
            == cairn_coordinator::tasks::Done::Part
        {}
        advance_rounds::run(world.app()).await.unwrap();
        if let Phase::Folding { choice } = world.view(id).await.round.phase {
            break choice;
        }
        world.evaluate_one().await;
    };
    let bad = choice.terms[0].submission;
    revoke(&world, bad, true).await;
    world.judge().await;
    assert_eq!(world.outcome(id).await.0, "published");
    let stacked = ids(world.app(), 1).await;
    assert!(!stacked.is_empty() && !stacked.contains(&bad.to_string()));
}

pub async fn checkpoints_of_older_programs_are_found_by_contribution(mut world: World) {
    let round = round(&mut world, 10).await;
    let bad = terms(&world, round).await[0].submission;
    let mut tx = world.app().db.begin().await.unwrap();
    sqlx::query("delete from checkpoint_contributions")
        .execute(tx.conn())
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let world = world.restart().await;
    let found = get_contribution(world.app(), bad)
        .await
        .unwrap()
        .checkpoints;
    assert_eq!(found.len(), 1);
}

pub async fn momentum_adds_to_the_weights_of_earlier_rounds(mut world: World) {
    let first = round(&mut world, 10).await;
    let earlier = terms(&world, first).await;
    let id = world.round(3).await.id;
    let new = world.contribute(20, [0.5, 0.5]).await.id;
    let term = |submission, weight| Term { submission, weight };
    let added = vec![term(earlier[0].submission, 0.125), term(new, 0.5)];
    choose(&world, id, added).await;
    world.settle().await;
    assert_eq!(world.outcome(id).await.0, "published");
    let (before, after) = (
        manifest(world.app(), 1).await,
        manifest(world.app(), 2).await,
    );
    assert_eq!(after.contributions.len(), before.contributions.len() + 1);
    let (old, now) = (&before.contributions[0], &after.contributions[0]);
    assert_eq!((&old.id, old.weight + 0.125), (&now.id, now.weight));
    assert_eq!(
        after.files,
        offline(world.app(), &after.contributions).await
    );
    assert_eq!(after.contributions.last().unwrap().weight, 0.5);
    // A revocation takes out all of it.
    revoke(&world, earlier[0].submission, true).await;
    world.settle().await;
    assert!(
        !ids(world.app(), 4)
            .await
            .contains(&earlier[0].submission.to_string())
    );
}
