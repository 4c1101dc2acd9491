//! Following a round: drawn over itself on a terminal, as plain lines of what changed otherwise.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cairn_proto::client::Client;
use cairn_proto::v1::{RoundState, RoundView, WatchRoundRequest};

use super::{events, frame, get};
use crate::clock;

/// Columns when the terminal does not say.
const WIDTH_DEFAULT: usize = 100;

/// How often the live view is drawn without news, so that its clocks move.
const REDRAW: Duration = Duration::from_secs(1);

/// How long to wait for a coordinator that went away before its stream is opened again.
const REOPEN: Duration = Duration::from_secs(2);

/// How long a coordinator may stay away before watching gives up.
const AWAY_MAX: Duration = Duration::from_mins(10);

/// Follows a round until it has ended, on stderr, and returns its last view.
pub async fn watch(client: &Client, id: &str) -> Result<RoundView> {
    let live = std::io::stderr().is_terminal();
    let mut screen = Screen {
        live,
        drawn: 0,
        last: None,
    };
    follow(client, id, |view| screen.show(view)).await
}

/// Follows a round until it has ended, telling `on_view` of each change, across restarts of the
/// coordinator.
pub async fn follow(
    client: &Client,
    id: &str,
    mut on_view: impl FnMut(Option<&RoundView>),
) -> Result<RoundView> {
    // The first answer is asked for plainly, so that an unknown round fails at once.
    let mut last = get(client, id).await?;
    on_view(Some(&last));
    let patient = client.with_patience(AWAY_MAX);
    while !ended(&last) {
        let request = WatchRoundRequest { id: id.to_owned() };
        let mut stream = patient
            .call(|mut to| {
                let request = request.clone();
                async move { to.watch.watch_round(request).await }
            })
            .await
            .context("follow the round")?;
        loop {
            match tokio::time::timeout(REDRAW, stream.message()).await {
                Err(_) => on_view(None),
                Ok(Ok(Some(answer))) => {
                    let Some(view) = answer.view else {
                        bail!("the coordinator sent an empty view")
                    };
                    on_view(Some(&view));
                    last = view;
                }
                Ok(Ok(None)) => break,
                Ok(Err(status)) => {
                    let error = client.error(&status);
                    if !error.retry() {
                        return Err(error).context("follow the round");
                    }
                    tokio::time::sleep(REOPEN).await;
                    break;
                }
            }
        }
    }
    Ok(last)
}

fn ended(view: &RoundView) -> bool {
    let state = view
        .round
        .as_ref()
        .map(cairn_proto::v1::Round::state)
        .unwrap_or_default();
    matches!(
        state,
        RoundState::Published | RoundState::Failed | RoundState::Aborted
    )
}

struct Screen {
    live: bool,
    /// Lines of the block on screen now.
    drawn: usize,
    last: Option<RoundView>,
}

impl Screen {
    fn show(&mut self, view: Option<&RoundView>) {
        let mut out = String::new();
        if self.live && self.drawn > 0 {
            // Up to the block's first line, and clear from there.
            out.push_str(&format!("\x1b[{}A\x1b[J", self.drawn));
        }
        if let Some(view) = view {
            for line in events::lines(self.last.as_ref(), view) {
                out.push_str(&line);
                out.push('\n');
            }
            self.last = Some(view.clone());
        }
        if self.live
            && let Some(last) = self.last.as_ref()
        {
            let block = if ended(last) {
                Vec::new()
            } else {
                frame::lines(last, clock::now_ms(), width())
            };
            self.drawn = block.len();
            for line in &block {
                out.push_str(line);
                out.push('\n');
            }
        }
        // A closed stderr is no reason to stop a round's watcher.
        let _ = std::io::stderr().write_all(out.as_bytes());
    }
}

fn width() -> usize {
    console::Term::stderr()
        .size_checked()
        .map_or(WIDTH_DEFAULT, |(_, columns)| {
            usize::from(columns).max(20) - 1
        })
}
