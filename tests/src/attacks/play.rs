//! Rounds with saboteurs in them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use cairn_proto::client::ClientError;
use cairn_proto::signing::sign_submission;
use cairn_proto::v1;

use super::hall::{Hall, LOOK, pause, recipe};
use super::kinds::{Kind, Knowledge, Sent, Under, make};
use super::training::{Log, Trained, Trainer};
use crate::member::{Member, training};

/// How long a verdict may take.
const PATIENCE: Duration = Duration::from_mins(10);

/// Makes a round file of a model, a number of shards and a recipe's seed.
pub type WriteRound = dyn Fn(&str, usize, u64) -> String;

/// Looks without anything happening before it is believed that nothing will.
const IDLE_LOOKS: u32 = 5;

/// What is the same in every round.
pub struct Stage {
    /// The base of every round.
    pub base: PathBuf,
    /// The checkpoint before it.
    pub before: PathBuf,
    /// The round file, but for model, shards and recipe seed.
    pub round: Box<WriteRound>,
    /// Honest volunteers, who stay and earn trust.
    pub crew: Vec<Member>,
}

/// One round to play.
#[derive(Debug, Clone, Copy)]
pub struct Scene {
    /// What the saboteurs do; nobody does where there is none.
    pub kind: Option<Kind>,
    /// Its number: names differ by it.
    pub number: u64,
    /// The recipe's seed: which set of honest trainings it uses.
    pub seed: u64,
    /// Shards.
    pub shards: usize,
    /// Honest volunteers that begin.
    pub honest: usize,
    /// Saboteurs at a time: new identities, or those of the crew that are not among the honest.
    pub saboteurs: usize,
    /// Saboteurs in all, as long as their shards open again.
    pub trials: usize,
}

/// How a submission ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It is part of the round.
    Accepted,
    /// Rejected by a check, with its reason.
    Rejected(String),
    /// Refused before there was a submission, with the error's reason.
    Refused(String),
}

impl End {
    /// The word for the table.
    #[must_use]
    pub fn word(&self) -> &str {
        match self {
            Self::Accepted => "ACCEPTED",
            Self::Rejected(reason) | Self::Refused(reason) => reason,
        }
    }
}

/// What one round with saboteurs came to.
#[derive(Debug, Default)]
pub struct Played {
    /// How each sabotage ended.
    pub attacks: Vec<End>,
    /// How many of them came from somebody whose work is not always audited.
    pub trusted: usize,
    /// How each honest submission ended.
    pub honest: Vec<End>,
    /// Processor time of the trainings that the honest submissions stand for, seconds.
    pub honest_training_seconds: f64,
    /// Audit loss of what was published, or of the base when nothing was.
    pub audit_loss: Option<f64>,
    /// Honest adapters of all shards, by shard.
    pub adapters: BTreeMap<u32, Rc<Trained>>,
    /// What the first wave of saboteurs handed in, by shard.
    pub sabotage: BTreeMap<u32, Sent>,
    /// Ids of sabotage that was accepted.
    pub accepted: Vec<String>,
    /// The round's id and its model.
    pub round: String,
    /// See `round`.
    pub model: String,
}

/// A lease, and the honest adapter of its shard.
struct Seat {
    lease: v1::Lease,
    records: Vec<String>,
    own: Rc<Trained>,
}

/// Something handed in that waits for its verdict.
struct Waiting<'a> {
    member: Whose<'a>,
    log: Log,
    lease: String,
    id: String,
    honest: bool,
}

/// A volunteer of the crew, or a stranger.
enum Whose<'a> {
    Crew(&'a Member),
    Stranger(Box<Member>),
}

impl Whose<'_> {
    fn member(&self) -> &Member {
        match self {
            Self::Crew(member) => member,
            Self::Stranger(member) => member,
        }
    }
}

/// Plays one round.
///
/// # Errors
/// When a program fails, or a verdict does not come.
pub async fn play(
    hall: &mut Hall,
    trainer: &mut Trainer,
    stage: &Stage,
    scene: &Scene,
) -> Result<Played> {
    let model = format!(
        "{}-{}",
        scene.kind.map_or("clean", Kind::name),
        scene.number
    );
    hall.maintainer.add_model(&model, &stage.base).await?;
    let file = (stage.round)(&model, scene.shards, scene.seed);
    let round = hall.maintainer.open_round(&file).await?;
    let mut played = Played {
        round: round.clone(),
        model,
        ..Played::default()
    };
    let mut waiting = Vec::new();
    // All claim before anybody hands in: the saboteurs sit among the others.
    let mut strangers = Vec::new();
    if scene.kind.is_some() {
        for seat in 0..scene.saboteurs {
            strangers.push(stranger(hall, trainer, stage, scene, seat).await?);
        }
    }
    let mut seats = Vec::new();
    for member in stage.crew.iter().take(scene.honest) {
        seats.push((member, sit(hall, trainer, stage, member).await?));
    }
    let all: Vec<Rc<Trained>> = seats.iter().map(|(_, seat)| Rc::clone(&seat.own)).collect();
    for (member, seat) in seats {
        if let Some(one) = honestly(member, &seat, &mut played).await? {
            waiting.push(one);
        }
    }
    for (_, seat) in &strangers {
        let shard = training(&seat.lease).shard;
        played.adapters.insert(shard, Rc::clone(&seat.own));
    }
    let mut trial = 0;
    let spent = waiting.first().map(|one: &Waiting<'_>| one.lease.clone());
    while let (Some(kind), false) = (scene.kind, strangers.is_empty()) {
        let live: Vec<String> = strangers.iter().map(|(_, s)| s.lease.id.clone()).collect();
        for (place, (whose, seat)) in strangers.drain(..).enumerate() {
            let member = whose.member();
            // The next saboteur's lease, which is alive; alone, one that has been handed in.
            let lender = match live.as_slice() {
                [_] => spent.as_ref(),
                some => some.get((place + 1) % some.len()),
            };
            let sent = make(
                kind,
                &Knowledge {
                    recipe: &recipe(training(&seat.lease))?,
                    base: &stage.base,
                    before: &stage.before,
                    records: &seat.records,
                    own: Rc::clone(&seat.own),
                    others: &all,
                    trial: scene.number as usize * 1_000 + trial,
                },
                trainer,
            )?;
            trial += 1;
            if kind.trusted() && member.standing().await?.audit_share < 1.0 {
                played.trusted += 1;
            }
            let shard = training(&seat.lease).shard;
            played.sabotage.entry(shard).or_insert_with(|| sent.clone());
            match hand_in(member, &seat, lender, &sent).await? {
                Ok(id) => waiting.push(Waiting {
                    member: whose,
                    log: sent.log,
                    lease: seat.lease.id,
                    id,
                    honest: false,
                }),
                Err(reason) => {
                    played.attacks.push(End::Refused(reason));
                    member.release(&seat.lease, false).await?;
                }
            }
        }
        settle(hall, &round, &mut waiting, &mut played).await?;
        let open = open_shards(hall, &round).await?;
        let again = open
            .min(scene.saboteurs)
            .min(scene.trials.saturating_sub(trial));
        for seat in 0..again {
            strangers.push(stranger(hall, trainer, stage, scene, trial + seat).await?);
        }
    }
    settle(hall, &round, &mut waiting, &mut played).await?;
    // What is open still is honest work.
    for turn in 0..2 * scene.shards {
        if open_shards(hall, &round).await? == 0 {
            break;
        }
        // Whoever has failed on a shard does not get it again.
        for at in 0..stage.crew.len() {
            let member = &stage.crew[(scene.honest + turn + at) % stage.crew.len()];
            if let Some(lease) = member.claim().await? {
                let seat = seated(hall, trainer, stage, member, lease).await?;
                waiting.extend(honestly(member, &seat, &mut played).await?);
                break;
            }
        }
        settle(hall, &round, &mut waiting, &mut played).await?;
    }
    played.audit_loss = ended(hall, &round).await?;
    settle(hall, &round, &mut waiting, &mut played).await?;
    if let Some(one) = waiting.first() {
        bail!("no verdict for {}\n{}", one.id, hall.log());
    }
    Ok(played)
}

/// A saboteur with a lease.
async fn stranger<'a>(
    hall: &mut Hall,
    trainer: &mut Trainer,
    stage: &'a Stage,
    scene: &Scene,
    seat: usize,
) -> Result<(Whose<'a>, Seat)> {
    let whose = if scene.kind.is_some_and(Kind::trusted) {
        let sleepers = &stage.crew[scene.honest..];
        Whose::Crew(&sleepers[seat % sleepers.len()])
    } else {
        let name = format!("stranger {}.{seat}", scene.number);
        Whose::Stranger(Box::new(hall.volunteer(&name).await?))
    };
    let seat = sit(hall, trainer, stage, whose.member()).await?;
    Ok((whose, seat))
}

async fn sit(
    hall: &mut Hall,
    trainer: &mut Trainer,
    stage: &Stage,
    member: &Member,
) -> Result<Seat> {
    let Some(lease) = member.claim_within(20_000).await? else {
        bail!("no work for {}\n{}", member.id(), hall.log());
    };
    seated(hall, trainer, stage, member, lease).await
}

/// What goes with a lease.
async fn seated(
    hall: &mut Hall,
    trainer: &mut Trainer,
    stage: &Stage,
    member: &Member,
    lease: v1::Lease,
) -> Result<Seat> {
    let work = training(&lease).clone();
    let records = hall.records(member, &work).await?;
    let own = trainer.train(&stage.base, &recipe(&work)?, &records)?;
    Ok(Seat {
        lease,
        records,
        own,
    })
}

/// Hands in what honest training gives.
async fn honestly<'a>(
    member: &'a Member,
    seat: &Seat,
    played: &mut Played,
) -> Result<Option<Waiting<'a>>> {
    let sent = Sent {
        adapter: seat.own.adapter.clone(),
        log: seat.own.log.clone(),
        lease: Under::Own,
    };
    played.honest_training_seconds += seat.own.cpu_seconds;
    played
        .adapters
        .insert(training(&seat.lease).shard, Rc::clone(&seat.own));
    match hand_in(member, seat, None, &sent).await? {
        Ok(id) => Ok(Some(Waiting {
            member: Whose::Crew(member),
            log: sent.log,
            lease: seat.lease.id.clone(),
            id,
            honest: true,
        })),
        Err(reason) => {
            played.honest.push(End::Refused(reason));
            Ok(None)
        }
    }
}

/// Uploads and submits. The inner error is the refusal's reason.
async fn hand_in(
    member: &Member,
    seat: &Seat,
    others: Option<&String>,
    sent: &Sent,
) -> Result<std::result::Result<String, String>> {
    let lease = &seat.lease;
    if let Err(error) = member.upload(&sent.adapter.weights, &lease.id).await {
        return refused(error).map(Err);
    }
    let mut request = member.submission(lease, &sent.adapter);
    request.commitment = Some(sent.log.commitment());
    match sent.lease {
        Under::Own => {}
        Under::Others => request.lease_id = others.cloned().unwrap_or_else(|| lease.id.clone()),
        Under::OldGeneration => request.generation = lease.generation.wrapping_sub(1),
    }
    sign_submission(&member.client.identity().key, &lease.nonce, &mut request)?;
    match member.submit(&request).await {
        Ok(answer) => Ok(Ok(answer.submission_id)),
        Err(error) => refused(error).map(Err),
    }
}

fn refused(error: ClientError) -> Result<String> {
    match error.reason() {
        Some(reason) => Ok(reason.as_str().to_owned()),
        None => Err(error.into()),
    }
}

/// Waits until all have their verdicts, opening what audits ask for; or until nothing happens any
/// more: what is odd is held until the rest of its cohort has come.
async fn settle(
    hall: &Hall,
    round: &str,
    waiting: &mut Vec<Waiting<'_>>,
    played: &mut Played,
) -> Result<()> {
    let mut looks = PATIENCE.as_millis() / LOOK.as_millis();
    let mut idle = 0;
    while !waiting.is_empty() && idle < IDLE_LOOKS {
        let before = waiting.len();
        let mut left = Vec::new();
        for one in waiting.drain(..) {
            match look(&one).await? {
                None => left.push(one),
                Some(end) if one.honest => played.honest.push(end),
                Some(end) => {
                    if end == End::Accepted {
                        played.accepted.push(one.id);
                    }
                    played.attacks.push(end);
                }
            }
        }
        *waiting = left;
        if waiting.is_empty() {
            break;
        }
        let view = hall.maintainer.round(round).await?;
        let working = view.evaluations.is_some_and(|work| work.open > 0);
        idle = if working || waiting.len() < before {
            0
        } else {
            idle + 1
        };
        looks = looks.saturating_sub(1);
        if looks == 0 {
            let ids: Vec<&str> = waiting.iter().map(|one| one.id.as_str()).collect();
            bail!("no verdict for {}\n{}", ids.join(", "), hall.log());
        }
        pause().await;
    }
    Ok(())
}

async fn look(one: &Waiting<'_>) -> Result<Option<End>> {
    let request = v1::ListSubmissionsRequest::default();
    let answer = one
        .member
        .member()
        .client
        .call(|mut to| {
            let request = request.clone();
            async move { to.volunteer.list_submissions(request).await }
        })
        .await?;
    let own = answer
        .submissions
        .into_iter()
        .find(|own| own.contribution.as_ref().is_some_and(|c| c.id == one.id))
        .context("a submission that is not listed")?;
    if let Some(audit) = own.audit {
        open(one, audit.segment).await?;
    }
    let contribution = own.contribution.unwrap_or_default();
    Ok(match contribution.verdict() {
        v1::Verdict::Accepted => Some(End::Accepted),
        v1::Verdict::Rejected => Some(End::Rejected(contribution.reason)),
        _ => None,
    })
}

/// Opens a segment. A forger opens what it has; that the coordinator refuses it is an answer too.
async fn open(one: &Waiting<'_>, segment: u32) -> Result<()> {
    let first = segment as usize;
    let (Some(start), Some(end)) = (one.log.revealed(first), one.log.revealed(first + 1)) else {
        return Ok(());
    };
    let mut files = vec![Rc::clone(&one.log.0[first + 1].factors)];
    if first > 0 {
        files.push(Rc::clone(&one.log.0[first].factors));
        files.push(Rc::clone(&one.log.0[first].moments));
    }
    for file in files {
        match one.member.member().upload(&file, &one.lease).await {
            Ok(_) => {}
            Err(error) => return refused(error).map(drop),
        }
    }
    let request = v1::RevealAuditRequest {
        submission_id: one.id.clone(),
        start: Some(start),
        end: Some(end),
    };
    let answer = one
        .member
        .member()
        .client
        .call(|mut to| {
            let request = request.clone();
            async move { to.work.reveal_audit(request).await }
        })
        .await;
    match answer {
        Ok(_) => Ok(()),
        Err(error) => refused(error).map(drop),
    }
}

async fn open_shards(hall: &Hall, round: &str) -> Result<usize> {
    let view = hall.maintainer.round(round).await?;
    let open = |shard: &&v1::Shard| shard.state() == v1::ShardState::Open;
    Ok(view.shards.iter().filter(open).count())
}

/// Waits for the round's end; the audit loss of what came of it.
async fn ended(hall: &Hall, round: &str) -> Result<Option<f64>> {
    for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
        let view = hall.maintainer.round(round).await?;
        let round = view.round.context("a view without a round")?;
        match round.state() {
            v1::RoundState::Published => return Ok(round.audit_loss_after),
            v1::RoundState::Failed | v1::RoundState::Aborted => return Ok(round.audit_loss_before),
            _ => pause().await,
        }
    }
    bail!("the round does not end\n{}", hall.log())
}
