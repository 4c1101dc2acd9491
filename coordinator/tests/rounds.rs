//! The rules of rounds, on every pair of stores: SQLite or PostgreSQL, a folder or S3. PostgreSQL is
//! left out where `scripts/postgres.sh` offers none.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cases;
#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod support;
mod world;

/// A module of tests for each pair of stores, one test for each case.
macro_rules! cases {
    ($($name:ident;)+) => {
        cases! { @on sqlite_and_folder, false, false, $($name;)+ }
        cases! { @on sqlite_and_s3, false, true, $($name;)+ }
        cases! { @on postgres_and_folder, true, false, $($name;)+ }
        cases! { @on postgres_and_s3, true, true, $($name;)+ }
    };
    (@on $stores:ident, $postgres:literal, $s3:literal, $($name:ident;)+) => {
        mod $stores {
            use crate::support::Stores;
            use crate::world::World;

            const STORES: Stores = Stores { postgres: $postgres, s3: $s3 };
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $name() {
                    if STORES.are_here() {
                        crate::cases::$name(World::on(STORES).await).await;
                    }
                }
            )+
        }
    };
}

cases! {
    a_shard_is_never_handed_out_twice;
    shards_hold_every_record_and_have_their_own_seeds;
    a_restarted_worker_gets_its_work_again;
    a_lease_that_ran_out_is_fenced_once_another_has_the_work;
    late_work_counts_while_nobody_else_has_it;
    a_lost_answer_can_be_asked_for_again_and_credits_once;
    what_was_not_uploaded_or_is_too_large_is_not_taken;
    three_workers_failing_stop_the_shard_and_not_the_round;
    the_deadline_ends_training_and_what_came_in_is_judged;
    a_round_without_submissions_or_gain_publishes_nothing_and_says_why;
    a_bad_adapter_is_rejected_with_its_reason_and_its_shard_done_again;
    evaluations_are_handed_out_again_and_given_up_in_the_end;
    a_base_that_cannot_be_evaluated_fails_the_round;
    one_round_at_a_time_and_one_for_each_request;
    an_aborted_round_leaves_everything_as_it_was;
    watching_shows_changes_and_ends_with_the_round;
    a_waiting_worker_is_woken_by_new_work;
    a_round_ends_in_a_verified_checkpoint_and_the_next_one_builds_on_it;
    a_coordinator_restarted_at_every_step_comes_to_the_same_end;
    the_log_holds_every_receipt_and_checkpoint;
    a_verdict_has_a_signed_receipt_in_the_log;
    a_revoked_contribution_is_folded_out_of_every_checkpoint;
    a_refold_is_what_a_coordinator_without_it_publishes;
    undo_survives_a_kill_at_any_step;
    revoking_is_for_maintainers_and_counts_once;
    a_revoked_submission_has_a_new_receipt_in_the_log;
    a_round_on_a_revoked_base_ends_and_one_beside_it_goes_on;
    what_was_chosen_is_chosen_again_without_a_revoked_one;
    checkpoints_of_older_programs_are_found_by_contribution;
    momentum_adds_to_the_weights_of_earlier_rounds;
    audits_are_drawn_as_often_as_said;
    what_is_committed_to_is_this_training;
    a_round_that_replays_nothing_asks_for_no_commitment;
    only_the_drawn_states_open_an_audit;
    a_late_answer_is_none_unless_the_coordinator_was_away;
    a_replay_ends_the_audit;
    a_rejection_that_nobody_honest_earns_is_a_strike;
    new_workers_are_audited_and_trust_grows_and_falls;
    findings_are_exactly_what_was_asked_for;
    guards_and_probes_are_held_out_sets_that_exist;
    the_base_is_scored_on_all_that_anything_is_compared_with;
    a_lost_submission_comes_back_and_is_judged_anew;
    what_comes_back_too_late_keeps_its_credit;
    only_our_own_receipts_bring_something_back;
    a_strike_is_voided_by_a_maintainer;
    every_rule_publishes_what_improves_the_model;
    momentum_reaches_back_to_what_was_stacked_before;
    a_fedex_round_goes_on_from_the_mean_factors;
    earlier_gate_sets_are_scored_and_shown;
    a_round_that_nobody_evaluates_fails_in_the_end;
}
