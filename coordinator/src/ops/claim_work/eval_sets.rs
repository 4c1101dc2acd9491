//! Which sets a candidate is scored on, and which records those have. Whoever asks twice in a round
//! gets the same answer: what is handed out is what is expected back, and what is compared.
use cairn_proto::limits::EVAL_RECORDS_MAX;

use crate::db::Tx;
use crate::db::datasets::{ChunkRow, SetKind, dataset_chunks, dataset_get};
use crate::db::rounds::{Round, round_list};
use crate::db::shards::{shard_ranges, shard_ranges_all};
use crate::domain::candidate::{Scope, Sets};
use crate::domain::plan::{Range, sample};
use crate::domain::round::State;
use crate::error::Error;

/// Earlier gate sets that are still scored, newest first: forgetting shows in the last ones.
const HISTORY_SETS_MAX: usize = 16;

/// Earlier rounds of the model that are looked at for their gate sets.
const HISTORY_ROUNDS_MAX: u32 = 200;

/// One set to score: whole chunks, or runs of records.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalSet {
    /// Its name in an evaluation: the dataset's, or `guard/NAME`, `probe/NAME`, `shard/N`,
    /// `history/NAME`.
    pub dataset: String,
    /// What kind of dataset it is of.
    pub kind: SetKind,
    /// Its chunks, when it is a whole dataset.
    pub chunks: Vec<ChunkRow>,
    /// Its records, when it is a sample of a shard.
    pub ranges: Vec<Range>,
}

impl EvalSet {
    /// How many records it has.
    pub fn records(&self) -> u64 {
        let chunks = self.chunks.iter().map(|chunk| u64::from(chunk.records));
        let ranges = self.ranges.iter().map(|range| u64::from(range.count));
        chunks.chain(ranges).sum()
    }
}

/// The sets of an evaluation: the gate first, then the audit set where it is asked for, then those
/// of the scope.
///
/// All sets of the base together stay within what one answer can hold: samples of shards shrink
/// before anything is left out, and earlier gate sets come only as far as there is room.
///
/// # Errors
/// When a dataset of the round is gone, or the database fails.
pub async fn eval_sets(tx: &mut Tx, round: &Round, sets: Sets) -> Result<Vec<EvalSet>, Error> {
    let policy = &round.file.policy;
    let mut asked = vec![whole(tx, &policy.gate, None).await?];
    if let Some(audit) = policy.audit.as_ref().filter(|_| sets.audit) {
        asked.push(whole(tx, audit, None).await?);
    }
    if sets.scope == Scope::Plain {
        return Ok(asked);
    }
    for (prefix, names) in [("guard", &policy.guards), ("probe", &policy.probes)] {
        for name in names {
            asked.push(whole(tx, name, Some(prefix)).await?);
        }
    }
    let room = Room::of(tx, round).await?;
    match sets.scope {
        Scope::Plain => {}
        Scope::Shard { own, other } => {
            for shard in [own, other] {
                let ranges = shard_ranges(tx, round.id, shard).await?;
                asked.extend(sample_of(shard, &ranges, room.sample));
            }
        }
        Scope::Base => {
            if room.sample > 0 {
                for (shard, ranges) in shard_ranges_all(tx, round.id).await? {
                    asked.extend(sample_of(shard, &ranges, room.sample));
                }
            }
            asked.extend(history(tx, round, room.history).await?);
        }
        Scope::Final => asked.extend(history(tx, round, room.history).await?),
    }
    Ok(asked)
}

async fn whole(tx: &mut Tx, name: &str, prefix: Option<&str>) -> Result<EvalSet, Error> {
    let row = dataset_get(tx, name)
        .await?
        .ok_or_else(|| Error::not_found("dataset", name))?;
    Ok(EvalSet {
        dataset: prefix.map_or_else(|| name.to_owned(), |prefix| format!("{prefix}/{name}")),
        kind: row.set,
        chunks: dataset_chunks(tx, name).await?,
        ranges: Vec::new(),
    })
}

fn sample_of(shard: u32, ranges: &[Range], records: u64) -> Option<EvalSet> {
    let ranges = sample(ranges, records);
    (!ranges.is_empty()).then(|| EvalSet {
        dataset: format!("shard/{shard}"),
        kind: SetKind::Train,
        chunks: Vec::new(),
        ranges,
    })
}

/// What fits into the base's evaluation beside the sets that must.
struct Room {
    /// Records of each shard's sample.
    sample: u64,
    /// Records of earlier gate sets.
    history: u64,
}

impl Room {
    async fn of(tx: &mut Tx, round: &Round) -> Result<Self, Error> {
        let policy = &round.file.policy;
        let named = [&policy.gate]
            .into_iter()
            .chain(&policy.audit)
            .chain(&policy.guards)
            .chain(&policy.probes);
        let mut records = 0;
        for name in named {
            records += dataset_get(tx, name).await?.map_or(0, |row| row.records);
        }
        let left = (EVAL_RECORDS_MAX as u64).saturating_sub(records);
        let shards = u64::from(round.file.shards.max(1));
        let sample = u64::from(policy.shard_records).min(left / shards);
        Ok(Self {
            sample,
            history: left - sample * shards,
        })
    }
}

/// Gate sets of earlier published rounds of the model, each once, newest first; not the current one.
async fn history(tx: &mut Tx, round: &Round, records: u64) -> Result<Vec<EvalSet>, Error> {
    let before = Some((round.created, round.id));
    let earlier = round_list(tx, &round.model, before, HISTORY_ROUNDS_MAX).await?;
    let (mut left, mut seen) = (records, vec![&round.file.policy.gate]);
    let mut sets = Vec::new();
    for earlier in &earlier {
        let gate = &earlier.file.policy.gate;
        if earlier.phase.state() != State::Published || seen.contains(&gate) {
            continue;
        }
        seen.push(gate);
        let set = whole(tx, gate, Some("history")).await?;
        if set.records() > left || sets.len() == HISTORY_SETS_MAX {
            break;
        }
        left -= set.records();
        sets.push(set);
    }
    Ok(sets)
}
