//! `cairn round`: scheduling, watching and stopping rounds.

pub mod events;
pub mod frame;
mod watch;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use cairn_proto::client::Client;
use cairn_proto::convert::{round_state_word, verdict_word};
use cairn_proto::limits::{PAGE_SIZE_MAX, ROUND_FILE_BYTES_MAX};
use cairn_proto::v1::{
    AbortRoundRequest, Contribution, CreateRoundRequest, GetRoundRequest, ListRoundsRequest, Round,
    RoundView, SetLoss,
};
use cairn_stack::round::RoundFile;
use clap::Subcommand;
use serde_json::json;

use crate::output::{Output, table};
use crate::{Globals, clock, contribution, pages, session};
use events::{gain, loss, short};
pub use watch::{follow, watch};

/// What `cairn round` can do.
#[derive(Debug, Subcommand)]
pub enum RoundCommand {
    /// Start a round
    #[command(after_help = "Example:\n  cairn round create round.toml && cairn round watch ID")]
    Create {
        /// Round file, TOML
        file: PathBuf,
    },
    /// List rounds, newest first
    List {
        /// Only this model's
        #[arg(long)]
        model: Option<String>,
    },
    /// Show a round with its shards and contributions
    Show {
        /// Round id
        id: String,
        /// And the numbers behind each verdict
        #[arg(long)]
        evidence: bool,
    },
    /// Follow a round until it ends: a live view on a terminal, plain lines otherwise
    Watch {
        /// Round id
        id: String,
    },
    /// Stop a round; nothing is published
    Abort {
        /// Round id
        id: String,
        /// Why, for the volunteers
        #[arg(long, default_value = "stopped by a maintainer")]
        reason: String,
    },
}

/// Runs `cairn round`.
pub async fn run(globals: &Globals, command: RoundCommand, output: Output) -> Result<()> {
    match command {
        RoundCommand::Create { file } => {
            let text = read_round_file(&file)?;
            let round = create(&session::connect(globals)?, text).await?;
            output.result(&json!({ "id": round.id }), || {
                format!(
                    "{}\n  follow it with: cairn round watch {}",
                    round.id, round.id
                )
            })
        }
        RoundCommand::List { model } => list(&session::connect(globals)?, model, output).await,
        RoundCommand::Show { id, evidence } => {
            let view = get(&session::connect(globals)?, &id).await?;
            let mut json = show_json(&view);
            if evidence {
                add_evidence(&mut json, &view);
            }
            output.result(&json, || {
                let mut text = show_text(&view);
                if evidence {
                    text.push_str(&evidence_text(&view));
                }
                text
            })
        }
        RoundCommand::Watch { id } => {
            let view = watch(&session::connect(globals)?, &id).await?;
            output.result(&show_json(&view), || show_text(&view))
        }
        RoundCommand::Abort { id, reason } => {
            let round = abort(&session::connect(globals)?, id, reason).await?;
            output.result(
                &json!({ "id": round.id, "state": round_state_word(round.state()) }),
                || format!("round {} is {}", round.id, round_state_word(round.state())),
            )
        }
    }
}

/// Reads a round file and checks it here, where the error can name the file.
fn read_round_file(file: &PathBuf) -> Result<String> {
    let bytes = std::fs::metadata(file)
        .with_context(|| format!("open {}", file.display()))?
        .len();
    ensure!(
        bytes <= ROUND_FILE_BYTES_MAX as u64,
        "{} has {bytes} bytes; a round file has at most {ROUND_FILE_BYTES_MAX}",
        file.display()
    );
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    RoundFile::parse_toml(&text).with_context(|| file.display().to_string())?;
    Ok(text)
}

/// Starts a round.
pub async fn create(client: &Client, round_file: String) -> Result<Round> {
    let request = CreateRoundRequest {
        round_file,
        request_id: session::request_id(),
    };
    let answer = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.rounds.create_round(request).await }
        })
        .await
        .context("start the round")?;
    answer
        .round
        .context("the coordinator answered without the round")
}

/// One round as it is now.
pub async fn get(client: &Client, id: &str) -> Result<RoundView> {
    let request = GetRoundRequest { id: id.to_owned() };
    let answer = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.rounds.get_round(request).await }
        })
        .await?;
    answer
        .view
        .context("the coordinator answered without the round")
}

async fn abort(client: &Client, id: String, reason: String) -> Result<Round> {
    let request = AbortRoundRequest { id, reason };
    let answer = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.rounds.abort_round(request).await }
        })
        .await?;
    answer
        .round
        .context("the coordinator answered without the round")
}

async fn list(client: &Client, model: Option<String>, output: Output) -> Result<()> {
    let model = model.unwrap_or_default();
    let rounds = pages::all(|page_token| async {
        let request = ListRoundsRequest {
            page_size: PAGE_SIZE_MAX as i32,
            page_token,
            model: model.clone(),
        };
        let page = client
            .call(|mut to| {
                let request = request.clone();
                async move { to.rounds.list_rounds(request).await }
            })
            .await
            .context("list the rounds")?;
        Ok((page.rounds, page.next_page_token))
    })
    .await?;
    let header = [
        "round",
        "model",
        "dataset",
        "state",
        "gate before",
        "gate after",
        "started",
    ];
    output.list(
        &rounds,
        &header,
        |round| json!({ "id": round.id, "model": round.model, "dataset": round.dataset, "state": round_state_word(round.state()), "reason": round.reason, "created_ms": round.created_ms }),
        |round| {
            vec![
                round.id.clone(),
                round.model.clone(),
                round.dataset.clone(),
                round_state_word(round.state()).to_owned(),
                loss(round.gate_loss_before),
                loss(round.gate_loss_after),
                clock::date(round.created_ms),
            ]
        },
    )
}

/// The contract's JSON of a round.
pub fn show_json(view: &RoundView) -> serde_json::Value {
    let round = view.round.clone().unwrap_or_default();
    let contribution = |one: &Contribution| {
        json!({
            "id": one.id,
            "worker": one.worker,
            "shard": one.shard,
            "verdict": verdict_word(one.verdict()),
            "reason": one.reason,
            "weight": one.weight,
            "detail": one.detail,
            "gate_loss": one.gate_loss,
            "audit_loss": one.audit_loss,
            "gain": one.gain,
            "gain_se": one.gain_se,
            "revoked_ms": (one.revoked_ms > 0).then_some(one.revoked_ms),
        })
    };
    let published = (!round.published_commit.is_empty())
        .then(|| format!("{}@{}", round.model, round.published_revision));
    json!({
        "id": round.id,
        "state": round_state_word(round.state()),
        "reason": round.reason,
        "base": format!("{}@{}", round.model, round.base_revision),
        "published": published,
        "gate_loss_before": round.gate_loss_before,
        "gate_loss_after": round.gate_loss_after,
        "audit_loss_before": round.audit_loss_before,
        "audit_loss_after": round.audit_loss_after,
        "contributions": view.contributions.iter().map(contribution).collect::<Vec<_>>(),
        "sets": view.sets.iter().map(set_json).collect::<Vec<_>>(),
    })
}

/// Adds to the JSON of a round what each verdict was made of.
fn add_evidence(json: &mut serde_json::Value, view: &RoundView) {
    let rows = json["contributions"].as_array_mut();
    for (row, one) in rows.into_iter().flatten().zip(&view.contributions) {
        row["norm"] = json!((one.norm > 0.0).then_some(one.norm));
        row["evidence"] = contribution::evidence(&one.evidence_json);
    }
}

/// What each verdict was made of, for people.
fn evidence_text(view: &RoundView) -> String {
    let mut text = String::new();
    for one in &view.contributions {
        let (id, worker, shard) = (&one.id, &one.worker, one.shard);
        text.push_str(&format!("\n\n{id}: shard {shard} by {worker}\n"));
        match contribution::evidence_text(&one.evidence_json) {
            lines if lines.is_empty() => text.push_str("no evidence that you may see"),
            lines => text.push_str(lines.trim_end()),
        }
    }
    text
}

fn set_json(set: &SetLoss) -> serde_json::Value {
    json!({ "set": set.set, "before": set.before, "after": set.after })
}

/// A round for people: a header, its contributions, and what came of it.
pub fn show_text(view: &RoundView) -> String {
    let round = view.round.clone().unwrap_or_default();
    let mut text = format!(
        "round {}: {}{}\n{} revision {} on {}\ngate loss  {} -> {}\naudit loss {} -> {}\n",
        round.id,
        round_state_word(round.state()),
        if round.reason.is_empty() {
            String::new()
        } else {
            format!(" ({})", round.reason)
        },
        round.model,
        round.base_revision,
        round.dataset,
        loss(round.gate_loss_before),
        loss(round.gate_loss_after),
        loss(round.audit_loss_before),
        loss(round.audit_loss_after),
    );
    if !round.published_commit.is_empty() {
        text.push_str(&format!(
            "published revision {} {}\n",
            round.published_revision,
            short(&round.published_commit)
        ));
    }
    for set in &view.sets {
        text.push_str(&format!(
            "loss on {}  {} -> {}\n",
            set.set,
            loss(Some(set.before)),
            loss(set.after)
        ));
    }
    let rows: Vec<Vec<String>> = view.contributions.iter().map(contribution_row).collect();
    text.push_str(&table(&CONTRIBUTION_HEADER, &rows));
    text
}

/// Columns of [`contribution_row`].
pub const CONTRIBUTION_HEADER: [&str; 8] = [
    "shard",
    "worker",
    "verdict",
    "weight",
    "gate loss",
    "audit loss",
    "gain",
    "reason",
];

/// A contribution as a row under [`CONTRIBUTION_HEADER`].
pub fn contribution_row(one: &Contribution) -> Vec<String> {
    let reason = if one.reason.is_empty() {
        String::new()
    } else {
        format!("{}: {}", one.reason, one.detail)
    };
    vec![
        one.shard.to_string(),
        one.worker.clone(),
        verdict_word(one.verdict()).to_owned(),
        if one.weight == 0.0 {
            "-".to_owned()
        } else {
            format!("{:.3}", one.weight)
        },
        loss(one.gate_loss),
        loss(one.audit_loss),
        gain(one).unwrap_or_else(|| "-".to_owned()),
        reason,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::v1::{RoundState, Verdict};

    #[test]
    fn the_json_of_a_round_keeps_its_contract() {
        let view = RoundView {
            round: Some(Round {
                id: "r1".to_owned(),
                model: "tiny".to_owned(),
                state: RoundState::Failed.into(),
                reason: "NO_IMPROVEMENT".to_owned(),
                gate_loss_before: Some(2.5),
                ..Round::default()
            }),
            contributions: vec![Contribution {
                id: "s1".to_owned(),
                worker: "ann".to_owned(),
                shard: 3,
                verdict: Verdict::Rejected.into(),
                reason: "NO_GAIN".to_owned(),
                ..Contribution::default()
            }],
            sets: vec![SetLoss {
                set: "history/old-gate".to_owned(),
                before: 1.5,
                after: None,
            }],
            ..RoundView::default()
        };
        assert!(show_text(&view).contains("loss on history/old-gate"));
        let json = show_json(&view);
        assert_eq!(json["sets"][0]["set"], "history/old-gate");
        assert_eq!(json["sets"][0]["after"], serde_json::Value::Null);
        assert_eq!(json["state"], "failed");
        assert_eq!(json["base"], "tiny@0");
        assert_eq!(json["published"], serde_json::Value::Null);
        assert_eq!(json["gate_loss_before"], 2.5);
        assert_eq!(json["gate_loss_after"], serde_json::Value::Null);
        assert_eq!(json["contributions"][0]["verdict"], "rejected");
        assert_eq!(json["contributions"][0]["shard"], 3);
    }
}
