//! What happens in the demo, in order, told as it happens.

use std::io::IsTerminal;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use cairn_proto::client::Client;
use cairn_proto::v1::{Contribution, Role, Round, RoundState, RoundView, ShardState, Verdict};

use super::cluster::Cluster;
use super::files;
use crate::checkpoint;
use crate::curation::gather;
use crate::dataset::{self, AddArgs, SetWord};
use crate::output::table;
use crate::round::events::{self, loss};
use crate::{clock, model, round};

/// The honest volunteers; the first of them is killed in the middle of its work.
const VOLUNTEERS: [&str; 3] = ["ada", "ben", "cleo"];

/// Prints lines behind the time since the demo began.
struct Teller {
    begun: Instant,
    colour: bool,
}

impl Teller {
    fn say(&self, line: &str) {
        let seconds = self.begun.elapsed().as_secs();
        let stamp = format!("[{:>2}:{:02}]", seconds / 60, seconds % 60);
        if self.colour {
            let tint = match line {
                _ if line.contains("rejected") || line.contains("SIGKILL") => "31",
                _ if line.contains("published") => "32",
                _ => "0",
            };
            println!("\x1b[2m{stamp}\x1b[0m \x1b[{tint}m{line}\x1b[0m");
        } else {
            println!("{stamp} {line}");
        }
    }
}

/// Plays the whole demo.
pub async fn tell(cluster: &mut Cluster, rounds: u32) -> Result<()> {
    let teller = Teller {
        begun: clock::start(),
        colour: std::io::stdout().is_terminal(),
    };
    teller.say(&format!("everything is kept in {}", cluster.dir.display()));
    let client = cluster.start_coordinator().await?;
    teller.say("coordinator: started with SQLite, local files and TLS on loopback");
    add_inputs(cluster, &client, &teller).await?;
    cluster.join_worker(&client, "eve", Role::Evaluator).await?;
    for name in VOLUNTEERS {
        cluster.join_worker(&client, name, Role::Volunteer).await?;
    }
    teller.say(&format!(
        "eve joined as evaluator; {} as volunteers",
        VOLUNTEERS.join(", ")
    ));
    let mut views = Vec::new();
    for number in 1..=rounds {
        teller.say(&format!("--- round {number} of {rounds} ---"));
        let mut mischief = Mischief {
            enabled: number == 1,
            killed_shard: None,
        };
        views.push(play(cluster, &client, &teller, number, &mut mischief).await?);
        if let Some(shard) = mischief.killed_shard {
            check_finished_by_another(&views, shard, &teller)?;
            cluster.start_worker(VOLUNTEERS[0])?;
            teller.say(&format!("{} is back", VOLUNTEERS[0]));
        }
    }
    let folder = cluster.dir.join("checkpoint");
    let commit = checkpoint::pull(
        &client,
        files::MODEL,
        "",
        &folder,
        checkpoint::Extras::default(),
    )
    .await?;
    println!("\n{}\n", summary(&views));
    println!("gate loss {}", fall(&views)?);
    println!(
        "checkpoint {} verified and kept in {}",
        events::short(&commit),
        folder.display()
    );
    println!("evaluate it yourself:");
    println!(
        "  cairn-worker evaluate --model {} --data {}",
        folder.display(),
        cluster.dir.join("audit.jsonl").display()
    );
    Ok(())
}

async fn add_inputs(cluster: &Cluster, client: &Client, teller: &Teller) -> Result<()> {
    let inputs = files::write(&cluster.dir)?;
    let checked = model::check(&inputs.base)?;
    let head = model::add(client, &checked, files::MODEL)
        .await?
        .head
        .unwrap_or_default();
    teller.say(&format!(
        "model {}: base {} added",
        files::MODEL,
        events::short(&head.commit)
    ));
    let datasets = [
        (inputs.train, files::TRAIN, SetWord::Train),
        (inputs.gate, files::GATE, SetWord::Gate),
        (inputs.audit, files::AUDIT, SetWord::Audit),
    ];
    for (file, name, set) in datasets {
        let args = AddArgs::plain(file, name, files::LICENSE, set);
        let gathered = gather(args.files(), args.format())?;
        teller.say(&format!(
            "dataset: {}",
            dataset::add(client, args, gathered).await?.text()
        ));
    }
    Ok(())
}

/// What goes wrong on purpose.
struct Mischief {
    enabled: bool,
    /// The shard whose volunteer was killed.
    killed_shard: Option<u32>,
}

async fn play(
    cluster: &mut Cluster,
    client: &Client,
    teller: &Teller,
    number: u32,
    mischief: &mut Mischief,
) -> Result<RoundView> {
    let round = round::create(client, files::round_file(number)?).await?;
    let mut cheat = None;
    if mischief.enabled {
        cheat = Some(cluster.start_cheat(client).await?);
        teller.say("mallory joined as volunteer, with a poisoned adapter in her pocket");
    }
    let (sender, mut views) = tokio::sync::mpsc::channel(1);
    let following = round::follow(client, &round.id, |view| {
        // A view that nobody has taken yet is superseded by the next one.
        if let Some(view) = view {
            let _ = sender.try_send(view.clone());
        }
    });
    tokio::pin!(following);
    let mut last: Option<RoundView> = None;
    let end = loop {
        tokio::select! {
            end = &mut following => break end?,
            view = views.recv() => {
                let Some(view) = view else { continue };
                for line in events::lines(last.as_ref(), &view) {
                    teller.say(&line);
                }
                if mischief.enabled && mischief.killed_shard.is_none() {
                    mischief.killed_shard = kill_at_work(cluster, teller, &view).await?;
                }
                cluster.check_alive()?;
                last = Some(view);
            }
        }
    };
    for line in events::lines(last.as_ref(), &end) {
        teller.say(&line);
    }
    if let Some(mut cheat) = cheat {
        ensure!(
            cheat.wait().await?.success(),
            "the cheat did not get to its verdict; {}",
            cheat.log_tail()
        );
        check_cheat_rejected(&end)?;
    }
    let state = end.round.as_ref().map(Round::state).unwrap_or_default();
    if state != RoundState::Published {
        bail!("round {number} published nothing");
    }
    Ok(end)
}

/// Kills the first volunteer once it has a shard. Its first word of progress is not waited for: on a
/// fast machine the shard is trained by then.
async fn kill_at_work(
    cluster: &mut Cluster,
    teller: &Teller,
    view: &RoundView,
) -> Result<Option<u32>> {
    let victim = VOLUNTEERS[0];
    let at_work = view
        .shards
        .iter()
        .find(|shard| shard.state() == ShardState::Leased && shard.worker == victim);
    let Some(shard) = at_work else {
        return Ok(None);
    };
    cluster.kill(victim).await?;
    teller.say(&format!(
        "{victim} is killed (SIGKILL) at work on shard {}; the lease will run out",
        shard.index
    ));
    Ok(Some(shard.index))
}

fn check_finished_by_another(views: &[RoundView], shard: u32, teller: &Teller) -> Result<()> {
    let finished = views
        .iter()
        .flat_map(|view| &view.contributions)
        .find(|one| one.shard == shard && one.verdict() == Verdict::Accepted);
    let by = finished.with_context(|| format!("nobody finished shard {shard}"))?;
    ensure!(
        by.worker != VOLUNTEERS[0],
        "shard {shard} was finished by the killed volunteer"
    );
    teller.say(&format!(
        "shard {shard}, left behind by {}, was finished by {}",
        VOLUNTEERS[0], by.worker
    ));
    Ok(())
}

fn check_cheat_rejected(view: &RoundView) -> Result<()> {
    let mut cheated = view
        .contributions
        .iter()
        .filter(|one| one.worker == "mallory")
        .peekable();
    ensure!(cheated.peek().is_some(), "the cheat handed nothing in");
    ensure!(
        cheated.all(|one: &Contribution| one.verdict() == Verdict::Rejected),
        "the poisoned adapter was not rejected"
    );
    Ok(())
}

fn summary(views: &[RoundView]) -> String {
    let mut rows = Vec::new();
    if let Some(base) = views.first().and_then(|view| view.round.as_ref()) {
        rows.push(row(
            "base",
            loss(base.gate_loss_before),
            loss(base.audit_loss_before),
            "",
        ));
    }
    for (number, view) in views.iter().enumerate() {
        for one in &view.contributions {
            let what = format!("  shard {} by {}", one.shard, one.worker);
            let outcome = match one.verdict() {
                Verdict::Accepted if one.weight != 0.0 => {
                    format!("stacked, weight {:.3}", one.weight)
                }
                Verdict::Accepted => "accepted, not stacked".to_owned(),
                Verdict::Rejected => format!("rejected: {}: {}", one.reason, one.detail),
                Verdict::Pending | Verdict::Unspecified => "not judged".to_owned(),
            };
            rows.push(row(
                &what,
                loss(one.gate_loss),
                loss(one.audit_loss),
                &outcome,
            ));
        }
        if let Some(round) = &view.round {
            let what = format!("round {}", number + 1);
            let outcome = format!("published revision {}", round.published_revision);
            rows.push(row(
                &what,
                loss(round.gate_loss_after),
                loss(round.audit_loss_after),
                &outcome,
            ));
        }
    }
    table(&["", "gate loss", "audit loss", ""], &rows)
}

fn row(what: &str, gate: String, audit: String, outcome: &str) -> Vec<String> {
    vec![what.to_owned(), gate, audit, outcome.to_owned()]
}

/// `2.5 -> 1.5, 40 % less`.
fn fall(views: &[RoundView]) -> Result<String> {
    let first = views
        .first()
        .and_then(|view| view.round.as_ref())
        .and_then(|round| round.gate_loss_before);
    let last = views
        .last()
        .and_then(|view| view.round.as_ref())
        .and_then(|round| round.gate_loss_after);
    let (first, last) = (
        first.context("no gate loss of the base")?,
        last.context("no gate loss at the end")?,
    );
    Ok(format!(
        "{first:.4} -> {last:.4}, {:.1} % less",
        100.0 * (first - last) / first
    ))
}
