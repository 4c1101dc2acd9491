//! How far long work is: one live line on a terminal, a plain line now and then elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::clock::Stopwatch;
use crate::train::dpo::Rewards;

/// Seconds between plain lines: a log of a night's work stays readable.
const PLAIN_SECONDS: f64 = 10.0;

/// Shows progress on standard error.
pub struct ProgressLine {
    what: &'static str,
    bar: Option<ProgressBar>,
    watch: Stopwatch,
    shown_at: Option<f64>,
    /// Shown behind the loss.
    note: String,
}

impl ProgressLine {
    /// A line for work that is counted in `what`, "step" or "example".
    #[must_use]
    pub fn new(what: &'static str) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8));
            let template = format!("{{bar:24}} {what} {{pos}}/{{len}}  {{msg}}");
            if let Ok(style) = ProgressStyle::with_template(&template) {
                bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
            }
            bar
        });
        Self {
            what,
            bar,
            watch: Stopwatch::start(),
            shown_at: None,
            note: String::new(),
        }
    }

    /// The rewards of preferences, to be shown behind the loss from now on.
    pub fn note_rewards(&mut self, rewards: Option<Rewards>) {
        if let Some(rewards) = rewards {
            let (accuracy, margin) = (rewards.accuracies, rewards.margins);
            self.note = format!("  accuracy {accuracy:.2}  margin {margin:.3}");
        }
    }

    /// Shows that `done` of `total` are done.
    pub fn show(
        &mut self,
        done: u64,
        total: u64,
        loss: f64,
        tokens_per_second: f64,
        eta_seconds: f64,
    ) {
        let eta =
            indicatif::HumanDuration(Duration::try_from_secs_f64(eta_seconds).unwrap_or_default());
        let note = &self.note;
        let text = format!("loss {loss:.4}{note}  {tokens_per_second:.0} tokens/s  {eta:#} left");
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(text);
            return;
        }
        let now = self.watch.seconds();
        if done == total
            || self
                .shown_at
                .is_none_or(|shown| now - shown >= PLAIN_SECONDS)
        {
            self.shown_at = Some(now);
            eprintln!("{} {done}/{total}  {text}", self.what);
        }
    }

    /// Takes the live line away, so that what is printed next stands alone.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
