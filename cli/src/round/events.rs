//! What changed between two views of a round, as lines a person can read.

use std::collections::HashMap;

use cairn_proto::convert::round_state_word;
use cairn_proto::v1::{Contribution, Round, RoundState, RoundView, Shard, ShardState, Verdict};

/// Lines for everything that is new in `now`; the first view tells the round itself.
pub fn lines(before: Option<&RoundView>, now: &RoundView) -> Vec<String> {
    let mut lines = Vec::new();
    let empty = RoundView::default();
    let before_view = before.unwrap_or(&empty);
    if let Some(round) = &now.round {
        round_lines(before_view.round.as_ref(), round, now, &mut lines);
    }
    let shards: HashMap<u32, &Shard> = before_view
        .shards
        .iter()
        .map(|shard| (shard.index, shard))
        .collect();
    for shard in &now.shards {
        lines.extend(shard_line(shards.get(&shard.index).copied(), shard));
    }
    let known: HashMap<&str, &Contribution> = before_view
        .contributions
        .iter()
        .map(|one| (one.id.as_str(), one))
        .collect();
    for contribution in &now.contributions {
        lines.extend(contribution_line(
            known.get(contribution.id.as_str()).copied(),
            contribution,
        ));
    }
    lines.extend(evaluation_line(before_view, now));
    lines
}

fn round_lines(before: Option<&Round>, round: &Round, view: &RoundView, lines: &mut Vec<String>) {
    if before.is_none() {
        lines.push(format!(
            "round {} on {} revision {}: {} shards of {}",
            round.id,
            round.model,
            round.base_revision,
            view.shards.len(),
            round.dataset
        ));
    }
    let old = before.cloned().unwrap_or_default();
    if old.gate_loss_before.is_none()
        && let Some(loss) = round.gate_loss_before
    {
        let audit = round
            .audit_loss_before
            .map(|loss| format!(", audit loss {loss:.4}"))
            .unwrap_or_default();
        lines.push(format!("base: gate loss {loss:.4}{audit}"));
    }
    if old.state == round.state {
        return;
    }
    lines.push(match round.state() {
        RoundState::Published => format!(
            "published revision {} ({}): gate loss {} -> {}, audit loss {} -> {}",
            round.published_revision,
            short(&round.published_commit),
            loss(round.gate_loss_before),
            loss(round.gate_loss_after),
            loss(round.audit_loss_before),
            loss(round.audit_loss_after),
        ),
        RoundState::Failed | RoundState::Aborted => {
            format!(
                "{}: {}; nothing was published",
                round_state_word(round.state()),
                round.reason
            )
        }
        state => round_state_word(state).to_owned(),
    });
}

fn shard_line(before: Option<&Shard>, shard: &Shard) -> Option<String> {
    let changed = before.is_none_or(|old| old.state != shard.state || old.worker != shard.worker);
    if !changed {
        return None;
    }
    let name = shard.index;
    match (shard.state(), before.map(Shard::state)) {
        (ShardState::Leased, _) => Some(format!(
            "shard {name}: leased to {} ({} records)",
            shard.worker, shard.records
        )),
        (ShardState::Open, Some(ShardState::Leased)) => Some(format!(
            "shard {name}: lease lost or given back, open again"
        )),
        (ShardState::Open, Some(ShardState::Submitted)) => {
            Some(format!("shard {name}: open again"))
        }
        (ShardState::Stopped, _) => Some(format!(
            "shard {name}: stopped after {} different workers failed on it",
            shard.failures
        )),
        _ => None,
    }
}

fn contribution_line(before: Option<&Contribution>, now: &Contribution) -> Option<String> {
    let (shard, worker) = (now.shard, &now.worker);
    if before
        .is_some_and(|old| old.verdict == now.verdict && (old.weight == 0.0) == (now.weight == 0.0))
    {
        return None;
    }
    Some(match now.verdict() {
        Verdict::Rejected => format!(
            "shard {shard}: {worker} rejected: {}: {}",
            now.reason, now.detail
        ),
        Verdict::Accepted if now.weight != 0.0 => {
            format!(
                "shard {shard}: {worker} stacked with weight {:.3}",
                now.weight
            )
        }
        Verdict::Accepted => {
            format!(
                "shard {shard}: {worker} accepted{}",
                gain(now)
                    .map(|gain| format!(", gain {gain}"))
                    .unwrap_or_default()
            )
        }
        Verdict::Pending | Verdict::Unspecified => {
            format!("shard {shard}: {worker} submitted, being judged")
        }
    })
}

fn evaluation_line(before: &RoundView, now: &RoundView) -> Option<String> {
    let current = now
        .evaluations
        .as_ref()
        .map(|progress| progress.current.as_str())
        .unwrap_or_default();
    let old = before
        .evaluations
        .as_ref()
        .map(|progress| progress.current.as_str())
        .unwrap_or_default();
    (!current.is_empty() && current != old).then(|| format!("evaluating {current}"))
}

/// `0.1234 ± 0.0056` nats per token, where known.
pub fn gain(contribution: &Contribution) -> Option<String> {
    Some(format!(
        "{:+.4} ± {:.4}",
        contribution.gain?, contribution.gain_se?
    ))
}

/// Four decimals, or a dash.
pub fn loss(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"))
}

/// The first ten digits of a commit, as people quote them.
pub fn short(commit: &str) -> &str {
    commit.get(..10).unwrap_or(commit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(state: RoundState, shard: ShardState, worker: &str) -> RoundView {
        RoundView {
            round: Some(Round {
                id: "r1".to_owned(),
                model: "tiny".to_owned(),
                dataset: "trail".to_owned(),
                state: state.into(),
                ..Round::default()
            }),
            shards: vec![Shard {
                index: 0,
                state: shard.into(),
                records: 10,
                worker: worker.to_owned(),
                ..Shard::default()
            }],
            ..RoundView::default()
        }
    }

    #[test]
    fn the_first_view_introduces_the_round_and_the_same_view_says_nothing() {
        let first = view(RoundState::Training, ShardState::Open, "");
        assert_eq!(
            lines(None, &first),
            ["round r1 on tiny revision 0: 1 shards of trail", "training"]
        );
        assert_eq!(lines(Some(&first), &first), Vec::<String>::new());
    }

    #[test]
    fn a_lost_lease_and_a_rejection_are_told() {
        let leased = view(RoundState::Training, ShardState::Leased, "ann");
        let mut lost = view(RoundState::Training, ShardState::Open, "");
        lost.contributions.push(Contribution {
            id: "s1".to_owned(),
            worker: "bob".to_owned(),
            verdict: Verdict::Rejected.into(),
            reason: "NOT_FINITE".to_owned(),
            detail: "lora_A of q_proj has a NaN".to_owned(),
            ..Contribution::default()
        });
        assert_eq!(
            lines(Some(&leased), &lost),
            [
                "shard 0: lease lost or given back, open again",
                "shard 0: bob rejected: NOT_FINITE: lora_A of q_proj has a NaN"
            ]
        );
    }
}
