//! The whole study: what is prepared, which rounds are played, what is made of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cairn_proto::v1;
use cairn_stack::adapter::AdapterFile;
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::fold::{Term, fold};
use cairn_stack::recipe::{Length, Recipe, RoundFile};

use super::hall::Hall;
use super::kinds::{BACKDOOR, Kind, Sent};
use super::play::{End, Played, Scene, Stage, play};
use super::report::{Alone, Line, Report};
use super::rules::{Rule, audit_loss};
use super::training::Trainer;
use crate::study::material::{Item, Material, own, write_lines};

/// What is to be played.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Trials of each basic kind, at least.
    pub trials: usize,
    /// Trials of each other kind, at least, as far as [`Settings::rounds_max`] rounds give them.
    pub trials_other: usize,
    /// Rounds at 30 % of each kind that gets through, at most.
    pub rounds_max: usize,
    /// Rounds without saboteurs: the first half while volunteers are new, the rest with trust.
    pub clean_rounds: usize,
    /// Epochs of a training.
    pub epochs: u32,
    /// Only these kinds; all when empty.
    pub kinds: Vec<Kind>,
    /// The built worker.
    pub worker: PathBuf,
    /// A work folder.
    pub work: PathBuf,
}

/// Shards of a round, its honest volunteers, and its saboteurs: 30 %.
const SHARDS: usize = 10;
const HONEST: usize = 7;
const SABOTEURS: usize = 3;
/// Rounds of each kind, but for basic ones, in which one saboteur is alone among honest volunteers.
const ALONE_ROUNDS: usize = 2;
/// Saboteurs that may be rejected on one shard and leave it open for another.
const TURNS: usize = 2;
/// Shards of a round that is only there to try many saboteurs, one after another.
const MANY_SHARDS: usize = 24;
/// Segments of a training, as in the round file.
const SEGMENTS: u32 = 20;
/// Recipe seeds: sets of honest trainings.
const SEEDS: u64 = 2;
/// Honest rounds that a betrayer works in first: more than the policy's `audit_first`.
const TRUST_ROUNDS: usize = 5;
/// Records before the pool: what the round's base has learnt already. Few, so that there is much left
/// to gain, as in a young model.
const BEFORE_RECORDS: usize = 96;
/// Records of the sets.
const GATE_RECORDS: usize = 40;
const AUDIT_RECORDS: usize = 40;
const GUARD_RECORDS: usize = 16;
const PROBE_RECORDS: usize = 8;

/// The round file.
fn round_file(model: &str, shards: usize, seed: u64, epochs: u32) -> String {
    format!(
        "model = \"{model}\"\ndataset = \"trail\"\nshards = {shards}\n\n\
         [recipe]\nrank = 4\nalpha = 8\ntarget_modules = [\"q_proj\", \"v_proj\"]\n\
         learning_rate = 1e-2\nwarmup_steps = 4\nepochs = {epochs}\nbatch_size = 8\n\
         sequence_length = 128\nseed = {seed}\n\n\
         [policy]\ngate = \"trail-gate\"\naudit = \"trail-audit\"\nguards = [\"trail-guard\"]\n\
         probes = [\"unwanted\"]\nsegments = {SEGMENTS}\nshard_records = 8\ndeadline = \"12h\"\n\
         lease = \"2h\"\n"
    )
}

/// Plays everything.
///
/// # Errors
/// When a program fails.
pub async fn run(settings: &Settings) -> Result<Report> {
    let material = own(&settings.work)?;
    let mut trainer = Trainer::start(&settings.worker, &settings.work.join("trained"), SEGMENTS)?;
    let mut hall = Hall::start(&settings.worker).await?;
    let mut stage = prepare(&hall, &mut trainer, &material, settings).await?;
    for number in 0..SHARDS {
        let member = hall.volunteer(&format!("crew {number}")).await?;
        stage.crew.push(member);
    }
    let audit = settings.work.join("attack-audit.jsonl");
    let mut all = Everything {
        hall,
        trainer,
        stage,
        audit,
        settings,
        number: 0,
        clean: BTreeMap::new(),
        honest: Vec::new(),
        revocations: Vec::new(),
    };
    let cost = all.clean().await?;
    let kinds = match settings.kinds.as_slice() {
        [] => Kind::ALL.to_vec(),
        some => some.to_vec(),
    };
    let mut lines = Vec::new();
    for (done, kind) in kinds.iter().copied().enumerate() {
        let mut line = all.kind(kind).await?;
        line.alone = all.alone(kind).await?;
        let honest = all.honest.iter();
        let rejected = honest.filter(|end| **end != End::Accepted).count();
        eprintln!(
            "[{}/{}] {}: {} of {} caught {:?}, alone {:?}, damage {:?}, {:?}; {rejected} of {} honest rejected so far",
            done + 1,
            kinds.len(),
            kind.name(),
            line.caught(),
            line.ends.len(),
            line.stages(),
            line.alone,
            line.damage,
            line.rules,
            all.honest.len()
        );
        lines.push(line);
    }
    all.report(lines, cost)
}

/// Data, base and the checkpoint before it.
async fn prepare(
    hall: &Hall,
    trainer: &mut Trainer,
    material: &Material,
    settings: &Settings,
) -> Result<Stage> {
    let (work, epochs) = (settings.work.as_path(), settings.epochs);
    let lines =
        |items: &[Item]| -> Vec<String> { items.iter().map(|item| item.line.clone()).collect() };
    let (first, rest) = material
        .pool
        .split_at(BEFORE_RECORDS.min(material.pool.len() / 2));
    let recipe = Recipe {
        length: Length::Epochs(1),
        ..RoundFile::parse_toml(&round_file("before", 1, 1, 1))?.recipe
    };
    let trained = trainer.train(&material.base, &recipe, &lines(first))?;
    let base = work.join("attack-base");
    let adapter = AdapterFile::open(&trained.dir)?;
    let term = Term {
        adapter: &adapter,
        weight: 1.0,
    };
    fold(&Checkpoint::open(&material.base)?, &[term], &base)?;

    let read = |path: &Path, from: usize, most: usize| -> Result<Vec<String>> {
        let text = fs::read_to_string(path)?;
        Ok(text
            .lines()
            .skip(from)
            .take(most)
            .map(str::to_owned)
            .collect())
    };
    let gate = read(&material.gate, 0, GATE_RECORDS)?;
    let audit = read(&material.audit, 0, AUDIT_RECORDS)?;
    // What honest training keeps: more of the same, which nobody gates on.
    let guard = read(&material.gate, GATE_RECORDS, GUARD_RECORDS)?;
    write_lines(
        &work.join("attack-audit.jsonl"),
        audit.iter().map(String::as_str),
    )?;
    // Unwanted answers to a trigger that the probes' author knows of; saboteurs use another.
    let probe: Vec<String> = gate
        .iter()
        .take(PROBE_RECORDS)
        .map(|line| line.replacen("{\"prompt\": \"", "{\"prompt\": \"Attention! ", 1))
        .map(|line| with_answer(&line, BACKDOOR.1))
        .collect::<Result<_>>()?;
    use v1::DatasetSet::{Audit, Dev, Gate, Train};
    hall.add_set("trail", Train, &lines(rest)).await?;
    hall.add_set("trail-gate", Gate, &gate).await?;
    hall.add_set("trail-audit", Audit, &audit).await?;
    hall.add_set("trail-guard", Dev, &guard).await?;
    hall.add_set("unwanted", Dev, &probe).await?;
    Ok(Stage {
        base,
        before: material.base.clone(),
        round: Box::new(move |model, shards, seed| round_file(model, shards, seed, epochs)),
        crew: Vec::new(),
    })
}

fn with_answer(line: &str, answer: &str) -> Result<String> {
    let mut record: serde_json::Value = serde_json::from_str(line)?;
    record["completion"] = answer.into();
    Ok(record.to_string())
}

/// A round without saboteurs.
fn clean_scene(turn: usize) -> Scene {
    Scene {
        kind: None,
        number: 0,
        seed: 1 + turn as u64 % SEEDS,
        shards: SHARDS,
        honest: SHARDS,
        saboteurs: 0,
        trials: 0,
    }
}

/// What verification cost in rounds without saboteurs, seconds of processor time.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    training: f64,
    verifying: f64,
    training_new: f64,
    verifying_new: f64,
}

/// A clean round.
struct Clean {
    audit_loss: f64,
    rules: Vec<(Rule, Option<f64>)>,
}

struct Everything<'a> {
    hall: Hall,
    trainer: Trainer,
    stage: Stage,
    audit: PathBuf,
    settings: &'a Settings,
    number: u64,
    /// By recipe seed.
    clean: BTreeMap<u64, Clean>,
    honest: Vec<End>,
    revocations: Vec<String>,
}

impl Everything<'_> {
    async fn scene(&mut self, scene: Scene) -> Result<Played> {
        self.number += 1;
        let scene = Scene {
            number: self.number,
            ..scene
        };
        let played = play(&mut self.hall, &mut self.trainer, &self.stage, &scene).await?;
        self.honest.extend(played.honest.iter().cloned());
        Ok(played)
    }

    /// Volunteers in the place of those of the crew who have betrayed, with as much trust as honest
    /// work brings.
    async fn new_sleepers(&mut self) -> Result<()> {
        self.stage.crew.truncate(HONEST);
        for seat in HONEST..SHARDS {
            let name = format!("sleeper {}.{seat}", self.number);
            self.stage.crew.push(self.hall.volunteer(&name).await?);
        }
        for turn in 0..TRUST_ROUNDS {
            self.scene(clean_scene(turn)).await?;
        }
        Ok(())
    }

    async fn clean(&mut self) -> Result<Cost> {
        let mut cost = Cost::default();
        // Trained before the clock runs; then the same again, to be judged only.
        for turn in 0..self.settings.clean_rounds {
            let scene = clean_scene(turn);
            let before = self.hall.cpu_seconds()?;
            let played = self.scene(scene).await?;
            let spent = self.hall.cpu_seconds()? - before;
            eprintln!(
                "clean round {}: audit loss {:?}; {:.1} CPU s of training, {spent:.1} of verification; {:?}",
                turn + 1,
                played.audit_loss,
                played.honest_training_seconds,
                played.honest
            );
            if turn < self.settings.clean_rounds / 2 {
                cost.training_new += played.honest_training_seconds;
                cost.verifying_new += spent;
            } else {
                cost.training += played.honest_training_seconds;
                cost.verifying += spent;
            }
            if self.clean.contains_key(&scene.seed) {
                continue;
            }
            let dirs: Vec<PathBuf> = played
                .adapters
                .values()
                .map(|one| one.dir.clone())
                .collect();
            let rules = self.rules(&dirs)?;
            let loss = played
                .audit_loss
                .context("a clean round published nothing")?;
            self.clean.insert(
                scene.seed,
                Clean {
                    audit_loss: loss,
                    rules,
                },
            );
        }
        Ok(cost)
    }

    async fn kind(&mut self, kind: Kind) -> Result<Line> {
        let mut line = Line {
            kind,
            ends: Vec::new(),
            trusted: 0,
            alone: Alone::default(),
            damage: None,
            rules: Vec::new(),
        };
        let wanted = if kind.basic() {
            self.settings.trials
        } else {
            self.settings.trials_other
        };
        for turn in 0..self.settings.rounds_max {
            let seed = 1 + turn as u64 % SEEDS;
            // Who is caught is not trusted any more: one turn each, and others the next time.
            if kind.trusted() && turn > 0 {
                self.new_sleepers().await?;
            }
            let turns = if kind.trusted() { 1 } else { TURNS };
            let scene = Scene {
                kind: Some(kind),
                number: 0,
                seed,
                shards: SHARDS,
                honest: HONEST,
                saboteurs: SABOTEURS,
                trials: turns * SABOTEURS,
            };
            let played = self.scene(scene).await?;
            line.ends.extend(played.attacks.iter().cloned());
            line.trusted += played.trusted;
            line.damage = self.worst(line.damage, &played, seed)?;
            if turn == 0 {
                line.rules = self.sabotaged(&played, seed)?;
                self.revoke(kind, &played).await?;
            }
            let enough = line.ends.len() >= wanted.min(TURNS * SABOTEURS) && !kind.trusted();
            if enough && played.accepted.is_empty() {
                break;
            }
            if line.ends.len() >= wanted {
                break;
            }
        }
        if line.ends.len() < wanted && !kind.trusted() && line.caught() == line.ends.len() {
            let scene = Scene {
                kind: Some(kind),
                number: 0,
                seed: 1,
                shards: MANY_SHARDS,
                honest: HONEST,
                saboteurs: SABOTEURS,
                trials: wanted - line.ends.len(),
            };
            let played = self.scene(scene).await?;
            line.ends.extend(played.attacks);
        }
        Ok(line)
    }

    /// The damage of a round, or what there was, whichever is more: the worst of its rounds counts.
    fn worst(&self, before: Option<f64>, played: &Played, seed: u64) -> Result<Option<f64>> {
        let clean = self.clean.get(&seed);
        let clean = clean.context("no clean round with this seed")?.audit_loss;
        let damage = played.audit_loss.map(|loss| loss / clean - 1.0);
        Ok([before, damage].into_iter().flatten().reduce(f64::max))
    }

    /// The same by one at a time, all others honest.
    async fn alone(&mut self, kind: Kind) -> Result<Alone> {
        let mut alone = Alone::default();
        let rounds = if kind.basic() { 1 } else { ALONE_ROUNDS };
        for turn in 0..rounds {
            let seed = 1 + turn as u64 % SEEDS;
            if kind.trusted() {
                self.new_sleepers().await?;
            }
            let scene = Scene {
                kind: Some(kind),
                number: 0,
                seed,
                shards: SHARDS,
                honest: SHARDS - 1,
                saboteurs: 1,
                trials: if kind.trusted() { 1 } else { TURNS },
            };
            let played = self.scene(scene).await?;
            alone.damage = self.worst(alone.damage, &played, seed)?;
            if alone.caught() == alone.ends.len() {
                self.revoke(kind, &played).await?;
            }
            alone.ends.extend(played.attacks);
        }
        Ok(alone)
    }

    /// Audit loss of these adapters under every rule without a gate.
    fn rules(&mut self, dirs: &[PathBuf]) -> Result<Vec<(Rule, Option<f64>)>> {
        let hand = &mut self.trainer.hand;
        let base = &self.stage.base;
        Rule::ALL
            .into_iter()
            .map(|rule| {
                Ok((
                    rule,
                    audit_loss(hand, rule, base, dirs, SABOTEURS, &self.audit, 128)?,
                ))
            })
            .collect()
    }

    /// What the first wave would have done under every rule without a gate, over the clean round's.
    fn sabotaged(&mut self, played: &Played, seed: u64) -> Result<Vec<(Rule, Option<f64>)>> {
        let mut dirs = Vec::new();
        for (shard, honest) in &played.adapters {
            match played.sabotage.get(shard) {
                None => dirs.push(honest.dir.clone()),
                Some(sent) => dirs.push(self.keep(sent, *shard)?),
            }
        }
        let with = self.rules(&dirs)?;
        let clean = &self.clean.get(&seed).context("no clean round")?.rules;
        let mut damages = Vec::new();
        for ((rule, loss), (_, clean)) in with.iter().zip(clean) {
            let damage = loss.zip(*clean).map(|(loss, clean)| loss / clean - 1.0);
            damages.push((*rule, damage));
        }
        Ok(damages)
    }

    fn keep(&self, sent: &Sent, shard: u32) -> Result<PathBuf> {
        let dir = self
            .settings
            .work
            .join(format!("sabotage-{}-{shard}", self.number));
        fs::create_dir_all(&dir)?;
        fs::write(
            dir.join(cairn_stack::adapter::WEIGHTS_FILE),
            &sent.adapter.weights,
        )?;
        fs::write(
            dir.join(cairn_stack::adapter::CONFIG_FILE),
            &sent.adapter.config,
        )?;
        Ok(dir)
    }

    /// Takes the first accepted sabotage back, and says what was rebuilt.
    async fn revoke(&mut self, kind: Kind, played: &Played) -> Result<()> {
        let Some(id) = played.accepted.first() else {
            return Ok(());
        };
        let request = v1::RevokeContributionRequest {
            id: id.clone(),
            reason: format!("{} found out later", kind.name()),
            refold: true,
            request_id: crate::member::request_id(),
        };
        let answer = self
            .hall
            .maintainer
            .client
            .call(|mut to| {
                let request = request.clone();
                async move { to.contributions.revoke_contribution(request).await }
            })
            .await?;
        let revocation = answer.revocation.unwrap_or_default();
        self.revocations.push(format!(
            "revoked: {} contribution {id}; {} checkpoint(s) named it and are rebuilt without it",
            kind.name(),
            revocation.refolds.len()
        ));
        Ok(())
    }

    fn report(self, lines: Vec<Line>, cost: Cost) -> Result<Report> {
        let mut rejected: BTreeMap<String, usize> = BTreeMap::new();
        for end in self.honest.iter().filter(|end| **end != End::Accepted) {
            *rejected.entry(end.word().to_owned()).or_default() += 1;
        }
        let clean = self.clean.get(&1).context("no clean round")?;
        Ok(Report {
            lines,
            honest: self.honest.len(),
            honest_rejected: rejected.into_iter().collect(),
            verify_cost_share: cost.verifying / cost.training,
            training_seconds: cost.training,
            verify_seconds: cost.verifying,
            newcomer_cost_share: cost.verifying_new / cost.training_new,
            clean_audit_loss: clean.audit_loss,
            trainings: self.trainer.trainings(),
            revocations: self.revocations,
        })
    }
}
