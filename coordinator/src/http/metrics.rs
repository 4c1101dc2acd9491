//! `/metrics` in Prometheus' text format. Labels are states, never ids.
use std::fmt::Write as _;

use crate::app::App;
use crate::db::counts;
use crate::error::Error;

/// Everything, read from the database in one view.
///
/// # Errors
/// UNAVAILABLE when the database does not answer.
pub async fn text(app: &App) -> Result<String, Error> {
    let mut tx = app.db.read().await?;
    let mut text = String::with_capacity(4_096);
    for (name, help, table) in [
        ("cairn_rounds", "Rounds by state.", counts::Table::Rounds),
        ("cairn_shards", "Shards by state.", counts::Table::Shards),
        ("cairn_leases", "Leases by state.", counts::Table::Leases),
        (
            "cairn_submissions",
            "Submissions by state.",
            counts::Table::Submissions,
        ),
        (
            "cairn_evaluations",
            "Evaluations by state.",
            counts::Table::Evaluations,
        ),
    ] {
        head(&mut text, name, help);
        for (state, count) in counts::by_state(&mut tx, table).await? {
            let _ = writeln!(text, "{name}{{state=\"{state}\"}} {count}");
        }
    }
    let blobs = counts::blobs(&mut tx).await?;
    drop(tx);
    gauge(&mut text, "cairn_blobs", "Blobs held.", blobs.count);
    gauge(
        &mut text,
        "cairn_blobs_bytes",
        "Bytes of the blobs held.",
        blobs.bytes,
    );
    if let Some(free) = app.blobs.free_bytes() {
        let help = "Free bytes on the blob store's disk.";
        gauge(
            &mut text,
            "cairn_disk_free_bytes",
            help,
            i64::try_from(free).unwrap_or(i64::MAX),
        );
    }
    let draining = i64::from(app.lifecycle.is_draining());
    gauge(
        &mut text,
        "cairn_draining",
        "1 while no new work is taken.",
        draining,
    );
    head(&mut text, "cairn_build_info", "The program's version.");
    let _ = writeln!(
        text,
        "cairn_build_info{{version=\"{}\"}} 1",
        env!("CARGO_PKG_VERSION")
    );
    Ok(text)
}

fn head(text: &mut String, name: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
}

fn gauge(text: &mut String, name: &str, help: &str, value: i64) {
    head(text, name, help);
    let _ = writeln!(text, "{name} {value}");
}
