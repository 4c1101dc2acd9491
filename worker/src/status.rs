//! `cairn-worker status`: who this machine is, what it has in hand, and what became of its work.

use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use cairn_proto::client::{Client, ClientError, Options};
use cairn_proto::convert::{role_word, verdict_word};
use cairn_proto::identity::Identity;
use cairn_proto::v1;

use crate::cache::Cache;
use crate::error::WorkerError;
use crate::home::Home;
use crate::run::DeviceNote;
use crate::{receipts, run};

/// Show identity, unfinished work, cache, verdicts and credit
///
/// Without the coordinator, what is known on this machine is shown.
#[derive(Args)]
#[command(after_help = "Examples:\n  cairn-worker status\n  cairn-worker status --json")]
pub struct StatusArgs {
    /// Where identity, cache and unfinished work are kept
    #[arg(long, env = "CAIRN_HOME", value_name = "DIR")]
    pub home: Option<PathBuf>,
    /// How many submissions are shown
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub last: u16,
    /// Allow cairn+insecure:// to another machine
    #[arg(long)]
    pub force_insecure: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

struct Remote {
    standing: v1::GetStandingResponse,
    submissions: Vec<v1::OwnSubmission>,
}

/// Runs the command.
///
/// # Errors
/// When this machine has not joined or its home cannot be read.
pub async fn run(args: StatusArgs) -> Result<(), WorkerError> {
    let home = Home::new(args.home.as_deref())?;
    let identity = home.identity()?;
    let options = Options {
        force_insecure: args.force_insecure,
        patience: std::time::Duration::ZERO,
        ..Options::default()
    };
    let remote = ask(Client::new(identity.clone(), options)?, args.last).await;
    let status = gather(&home, &identity, &remote)?;
    let text = if args.json {
        format!("{status}\n")
    } else {
        words(&status)
    };
    stdout()
        .write_all(text.as_bytes())
        .map_err(WorkerError::home("write", &home.path))
}

async fn ask(client: Client, last: u16) -> Result<Remote, ClientError> {
    let standing = client
        .call(|mut to| async move {
            to.volunteer
                .get_standing(v1::GetStandingRequest::default())
                .await
        })
        .await?;
    let page = client
        .call(move |mut to| async move {
            let page_size = i32::from(last.max(1));
            let request = v1::ListSubmissionsRequest {
                page_size,
                ..Default::default()
            };
            to.volunteer.list_submissions(request).await
        })
        .await?;
    Ok(Remote {
        standing,
        submissions: page.submissions,
    })
}

fn gather(
    home: &Home,
    identity: &Identity,
    remote: &Result<Remote, ClientError>,
) -> Result<Value, WorkerError> {
    let cache = Cache::open(&home.folder("cache")?, u64::MAX)?;
    let receipts_folder = home.folder("receipts")?;
    let (receipts, newest) = receipts::newest(&receipts_folder);
    let broken = newest
        .iter()
        .filter(|(_, stored)| !receipts::holds(stored, &identity.server_key))
        .count();
    let mut status = json!({
        "worker_id": identity.worker_id,
        "name": identity.display_name,
        "role": role_word(identity.role),
        "server": identity.server.authority(),
        "home": home.path.display().to_string(),
        "cache_bytes": cache.bytes(),
        "unfinished": run::unfinished(&home.folder("work")?, &identity.worker_id),
        "unsettled": run::unsettled(&home.folder("submitted")?, &identity.worker_id),
        "receipts": { "kept": receipts, "checked": newest.len(), "broken": broken },
        "device": run::device_note(home),
    });
    match remote {
        Ok(remote) => {
            let standing = &remote.standing;
            status["standing"] = json!({
                "accepted": standing.accepted,
                "rejected": standing.rejected,
                "pending": standing.pending,
                "credit_tokens": standing.credit_tokens,
                "strikes": standing.strikes,
                "audit_share": standing.audit_share,
            });
            status["submissions"] = remote.submissions.iter().filter_map(submission).collect();
        }
        Err(error) => status["coordinator_error"] = json!(error.to_string()),
    }
    Ok(status)
}

fn submission(own: &v1::OwnSubmission) -> Option<Value> {
    let contribution = own.contribution.as_ref()?;
    let audit = own.audit.as_ref();
    let audit = audit.map(|audit| json!({"segment": audit.segment, "until_ms": audit.until_ms}));
    Some(json!({
        "id": contribution.id,
        "round": own.round_id,
        "shard": contribution.shard,
        "verdict": verdict_word(contribution.verdict()),
        "reason": contribution.reason,
        "detail": contribution.detail,
        "weight": contribution.weight,
        "audit": audit,
    }))
}

/// The same for people.
fn words(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut lines = vec![
        format!(
            "{} {} ({}) at {}",
            text(&status["role"]),
            text(&status["name"]),
            text(&status["worker_id"]),
            text(&status["server"])
        ),
        format!("home      {}", text(&status["home"])),
        format!(
            "cache     {}",
            indicatif::HumanBytes(status["cache_bytes"].as_u64().unwrap_or_default())
        ),
    ];
    if let Ok(note) = serde_json::from_value::<DeviceNote>(status["device"].clone()) {
        lines.push(format!("device    {note}"));
    }
    let receipts = &status["receipts"];
    let broken = receipts["broken"].as_u64().unwrap_or_default();
    lines.push(match broken {
        0 => format!("receipts  {}, signatures good", receipts["kept"]),
        broken => format!(
            "receipts  {}, {broken} with a bad signature",
            receipts["kept"]
        ),
    });
    for unit in status["unfinished"].as_array().into_iter().flatten() {
        let state = if unit["trained"] == json!(true) {
            "trained, not handed in"
        } else {
            "in training"
        };
        lines.push(format!("unfinished: {}, {state}", text(&unit["what"])));
    }
    if let Some(error) = status["coordinator_error"].as_str() {
        lines.push(format!("the coordinator does not answer: {error}"));
        return lines.join("\n") + "\n";
    }
    let standing = &status["standing"];
    lines.push(format!(
        "credit    {} tokens; {} accepted, {} rejected, {} pending",
        standing["credit_tokens"], standing["accepted"], standing["rejected"], standing["pending"]
    ));
    if status["role"] == json!(role_word(v1::Role::Volunteer)) {
        lines.push(trust_words(standing));
    }
    for own in status["submissions"].as_array().into_iter().flatten() {
        lines.push(submission_words(status, own));
    }
    lines.join("\n") + "\n"
}

fn trust_words(standing: &Value) -> String {
    let strikes = match standing["strikes"].as_u64().unwrap_or_default() {
        0 => "no strikes".to_owned(),
        1 => "1 strike".to_owned(),
        more => format!("{more} strikes"),
    };
    let share = 100.0 * standing["audit_share"].as_f64().unwrap_or_default();
    format!("trust     {strikes}; {share:.0} % of the next trainings are audited")
}

/// A submission in a line, with the audit that waits for it.
fn submission_words(status: &Value, own: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let weight = own["weight"].as_f64().unwrap_or_default();
    let why = match (text(&own["reason"]), text(&own["detail"])) {
        (reason, _) if reason.is_empty() && weight != 0.0 => format!(", weight {weight:.3}"),
        (reason, _) if reason.is_empty() => String::new(),
        (reason, detail) if detail.is_empty() => format!(": {reason}"),
        (reason, detail) => format!(": {reason} ({detail})"),
    };
    let audit = match own["audit"]["segment"].as_u64() {
        Some(segment) => audit_words(status, own, segment),
        None => String::new(),
    };
    format!(
        "  round {} shard {}: {}{why}{audit}",
        text(&own["round"]),
        own["shard"],
        text(&own["verdict"])
    )
}

fn audit_words(status: &Value, own: &Value, segment: u64) -> String {
    let mut unsettled = status["unsettled"].as_array().into_iter().flatten();
    let kept = unsettled.find(|kept| kept["id"] == own["id"]);
    let segments = kept.and_then(|kept| kept["segments"].as_u64());
    let which = match segments {
        Some(segments) => format!("segment {} of {segments}", segment + 1),
        None => format!("segment {}", segment + 1),
    };
    let until_ms = own["audit"]["until_ms"].as_i64().unwrap_or_default();
    let until = time::OffsetDateTime::from_unix_timestamp(until_ms / 1000);
    let until = until.map(|at| {
        let (date, hour, minute) = (at.date(), at.hour(), at.minute());
        format!(" until {date} {hour:02}:{minute:02} UTC")
    });
    let until = until.unwrap_or_default();
    match segments {
        Some(_) => {
            format!("; audited: {which} waits to be opened{until}; cairn-worker run opens it")
        }
        None => format!("; audited: {which} is asked for{until}, but its states are not here"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_and_a_waiting_audit_are_said_in_words() {
        let status = json!({
            "role": "volunteer", "name": "ada", "worker_id": "w", "server": "s", "home": "/h",
            "cache_bytes": 0, "unfinished": [], "receipts": {"kept": 1, "checked": 1, "broken": 0},
            "device": {"checked_ms": 1, "device": null, "canary": null, "paused": "it computes wrong"},
            "unsettled": [{"id": "s1", "what": "shard 2 of round r", "segments": 10}],
            "standing": {"accepted": 1, "rejected": 1, "pending": 1, "credit_tokens": 9,
                "strikes": 1, "audit_share": 0.2},
            "submissions": [
                {"id": "s1", "round": "r", "shard": 2, "verdict": "pending", "reason": "",
                    "detail": "", "weight": 0.0,
                    "audit": {"segment": 2, "until_ms": 1_790_000_000_000_i64}},
                {"id": "s0", "round": "r", "shard": 1, "verdict": "pending", "reason": "",
                    "detail": "", "weight": 0.0, "audit": {"segment": 0, "until_ms": 0}},
            ],
        });
        let words = words(&status);
        assert!(
            words.contains("trust     1 strike; 20 % of the next trainings are audited"),
            "{words}"
        );
        assert!(
            words.contains("device    paused: it computes wrong"),
            "{words}"
        );
        let waiting = "shard 2: pending; audited: segment 3 of 10 waits to be opened until 2026-09-21 14:13 UTC";
        assert!(words.contains(waiting), "{words}");
        assert!(
            words.contains("segment 1 is asked for") && words.contains("not here"),
            "{words}"
        );
    }
}
