//! Somebody watches a round: its state now, and again after each change, until it has ended.
use std::time::Duration;

use futures::Stream;

use crate::app::App;
use crate::error::Error;
use crate::ids::RoundId;
use crate::ops::read_rounds::{RoundView, get_round};

/// Shortest time between two updates: people see four a second as live.
const UPDATE_INTERVAL: Duration = Duration::from_millis(250);

/// Longest time between two updates: shows that the line is alive, and what another coordinator on
/// the same database has changed.
const UPDATE_INTERVAL_MAX: Duration = Duration::from_secs(5);

enum Step {
    First,
    Next,
    Ended,
}

/// The views of a round. Nothing is buffered: the next view is made when the last one was taken.
///
/// # Errors
/// NOT_FOUND; later errors end the stream.
pub fn watch_round(
    app: App,
    id: RoundId,
) -> impl Stream<Item = Result<RoundView, Error>> + Send + 'static {
    let changes = app.wake.changed.subscribe();
    futures::stream::unfold(
        (app, changes, Step::First),
        move |(app, mut changes, step)| async move {
            match step {
                Step::First => {}
                Step::Next => {
                    let soft = app.lifecycle.soft().clone();
                    let change = async {
                        tokio::time::sleep(UPDATE_INTERVAL).await;
                        // Either a change or the time: both are a reason to look.
                        let _ = tokio::time::timeout(UPDATE_INTERVAL_MAX, changes.changed()).await;
                    };
                    tokio::select! {
                        () = change => {}
                        // Draining: the watcher comes back to whoever is there then.
                        () = soft.cancelled() => return None,
                    }
                }
                Step::Ended => return None,
            }
            // Seen from here on; a change during the look is a reason to look again.
            changes.mark_unchanged();
            let view = get_round(&app, id).await;
            let ended = view
                .as_ref()
                .map_or(true, |view| view.round.phase.state().is_final());
            let next = if ended { Step::Ended } else { Step::Next };
            Some((view, (app, changes, next)))
        },
    )
}
