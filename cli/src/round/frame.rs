//! The live picture of a round: a block of lines that is drawn over itself.

use cairn_proto::convert::round_state_word;
use cairn_proto::v1::{RoundState, RoundView, Shard, ShardState, Verdict};

use super::events::{gain, loss};

/// Columns of the progress bar.
const BAR_WIDTH: usize = 20;

/// Most shard lines shown; the rest is summed up, so that the block fits a terminal.
const SHARD_LINES_MAX: usize = 24;

/// The block of lines for `view` at `now_ms`, each at most `width` columns.
pub fn lines(view: &RoundView, now_ms: i64, width: usize) -> Vec<String> {
    let round = view.round.clone().unwrap_or_default();
    let mut lines = vec![format!(
        "round {}  {} revision {}  {}  {}",
        round.id,
        round.model,
        round.base_revision,
        round_state_word(round.state()),
        time_left(&round.state(), round.deadline_ms - now_ms)
    )];
    lines.push(format!(
        "gate loss {} -> {}   audit loss {} -> {}",
        loss(round.gate_loss_before),
        loss(round.gate_loss_after),
        loss(round.audit_loss_before),
        loss(round.audit_loss_after)
    ));
    for shard in view.shards.iter().take(SHARD_LINES_MAX) {
        lines.push(shard_line(view, shard, now_ms));
    }
    if view.shards.len() > SHARD_LINES_MAX {
        let done = view
            .shards
            .iter()
            .filter(|shard| shard.state() == ShardState::Done)
            .count();
        lines.push(format!(
            "  ... {} shards in all, {done} done",
            view.shards.len()
        ));
    }
    if let Some(evaluations) = &view.evaluations {
        let current = if evaluations.current.is_empty() {
            ""
        } else {
            "  now: "
        };
        lines.push(format!(
            "evaluations: {} done, {} open{current}{}",
            evaluations.done, evaluations.open, evaluations.current
        ));
    }
    lines
        .into_iter()
        .map(|line| line.chars().take(width).collect())
        .collect()
}

fn shard_line(view: &RoundView, shard: &Shard, now_ms: i64) -> String {
    let mut line = format!(
        "  shard {:>3}  {:<9}",
        shard.index,
        shard_name(shard.state())
    );
    match shard.state() {
        ShardState::Leased => {
            let left = ((shard.lease_expires_ms - now_ms) / 1000).max(0);
            line.push_str(&format!(
                "  {} {}  {}/{} steps, lease {left} s",
                bar(shard.step, shard.steps),
                shard.worker,
                shard.step,
                shard.steps
            ));
        }
        ShardState::Submitted | ShardState::Done => line.push_str(&format!("  {}", shard.worker)),
        ShardState::Stopped => {
            line.push_str(&format!("  {} different workers failed", shard.failures));
        }
        ShardState::Open | ShardState::Unspecified => {}
    }
    for one in view
        .contributions
        .iter()
        .filter(|one| one.shard == shard.index)
    {
        match one.verdict() {
            Verdict::Rejected => line.push_str(&format!("  [{}: {}]", one.worker, one.reason)),
            Verdict::Accepted => {
                line.push_str(&format!(
                    "  [{}: accepted {}]",
                    one.worker,
                    gain(one).unwrap_or_default()
                ));
            }
            Verdict::Pending | Verdict::Unspecified => {
                line.push_str(&format!("  [{}: judging]", one.worker));
            }
        }
    }
    line
}

fn bar(step: u32, steps: u32) -> String {
    let full = (BAR_WIDTH as u64 * u64::from(step.min(steps)) / u64::from(steps.max(1))) as usize;
    format!("[{}{}]", "=".repeat(full), " ".repeat(BAR_WIDTH - full))
}

fn time_left(state: &RoundState, left_ms: i64) -> String {
    match state {
        RoundState::Published | RoundState::Failed | RoundState::Aborted => String::new(),
        _ if left_ms <= 0 => "deadline passed".to_owned(),
        _ => format!("{} left", span(left_ms)),
    }
}

/// A span of time in its two largest units.
pub fn span(ms: i64) -> String {
    let seconds = ms.max(0) / 1000;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

fn shard_name(state: ShardState) -> &'static str {
    match state {
        ShardState::Unspecified => "unknown",
        ShardState::Open => "open",
        ShardState::Leased => "training",
        ShardState::Submitted => "judging",
        ShardState::Done => "done",
        ShardState::Stopped => "stopped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_fill_and_never_overflow() {
        assert_eq!(bar(0, 0), format!("[{}]", " ".repeat(20)));
        assert_eq!(
            bar(5, 10),
            format!("[{}{}]", "=".repeat(10), " ".repeat(10))
        );
        assert_eq!(bar(99, 10), format!("[{}]", "=".repeat(20)));
    }

    #[test]
    fn spans_read_well() {
        assert_eq!(span(-5), "0 s");
        assert_eq!(span(61_000), "1 min 1 s");
        assert_eq!(span(7_260_000), "2 h 1 min");
    }
}
