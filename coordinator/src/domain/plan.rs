//! Cutting a dataset into shards: every record in exactly one of them.

use cairn_stack::digest::Digest;
use cairn_stack::recipe::{Aggregation, Recipe, RoundFile};
use serde::{Deserialize, Serialize};

/// Separates these hashes from all others.
const ORDER_CONTEXT: &[u8] = b"cairn shard order";
/// Separates these hashes from all others.
const SEED_CONTEXT: &[u8] = b"cairn shard seed";

/// One stored chunk of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Its bytes' digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// How many records it holds.
    pub records: u32,
}

/// Records `[first, first + count)` of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// The chunk's digest.
    pub chunk: Digest,
    /// The chunk's length in bytes.
    pub size_bytes: u64,
    /// How many records the whole chunk holds.
    pub records: u32,
    /// The first record of the range, from 0.
    pub first: u32,
    /// How many records it has.
    pub count: u32,
}

/// One shard as planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Its records, in the order to be trained on before the worker's own shuffle.
    pub ranges: Vec<Range>,
    /// How many records that is.
    pub records: u64,
    /// How many bytes that is, chunks prorated by records: the weight of an adapter comes from it.
    pub bytes: u64,
}

/// Why a dataset cannot be cut as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Zero shards.
    #[error("a round has at least one shard")]
    NoShards,
    /// A shard without a record trains nothing.
    #[error("{records} records cannot be cut into {shards} shards")]
    TooManyShards {
        /// Records of the dataset.
        records: u64,
        /// Shards asked for.
        shards: u32,
    },
}

/// Plans the shards: chunks in an order permuted by `seed`, laid end to end and cut into runs whose
/// record counts differ by at most one.
///
/// The permutation sorts by a keyed hash, so it depends on no generator's version.
///
/// # Errors
/// When there are no shards, or more than records.
pub fn plan(chunks: &[Chunk], shards: u32, seed: u64) -> Result<Vec<ShardPlan>, PlanError> {
    let records: u64 = chunks.iter().map(|chunk| u64::from(chunk.records)).sum();
    if shards == 0 {
        return Err(PlanError::NoShards);
    }
    if u64::from(shards) > records {
        return Err(PlanError::TooManyShards { records, shards });
    }
    let mut cutter = Cutter {
        chunks: permuted(chunks, seed),
        next: 0,
        used: 0,
    };
    let shards = u64::from(shards);
    let (share, extra) = (records / shards, records % shards);
    Ok((0..shards)
        .map(|index| cutter.cut(share + u64::from(index < extra)))
        .collect())
}

fn permuted(chunks: &[Chunk], seed: u64) -> Vec<Chunk> {
    let mut keyed: Vec<([u8; 32], Chunk)> = chunks
        .iter()
        .enumerate()
        .filter(|(_, chunk)| chunk.records > 0)
        .map(|(position, chunk)| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(ORDER_CONTEXT);
            hasher.update(&seed.to_le_bytes());
            hasher.update(&(position as u64).to_le_bytes());
            hasher.update(chunk.digest.as_bytes());
            (*hasher.finalize().as_bytes(), *chunk)
        })
        .collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, chunk)| chunk).collect()
}

struct Cutter {
    chunks: Vec<Chunk>,
    next: usize,
    /// Records already taken of the next chunk.
    used: u32,
}

impl Cutter {
    fn cut(&mut self, records: u64) -> ShardPlan {
        let mut shard = ShardPlan {
            ranges: Vec::new(),
            records: 0,
            bytes: 0,
        };
        while shard.records < records
            && let Some(chunk) = self.chunks.get(self.next)
        {
            let wanted = records - shard.records;
            let count = wanted.min(u64::from(chunk.records - self.used)) as u32;
            // Prorated by the cut points and not by the count, so that shards sum to the chunk.
            let until = |record: u32| {
                u128::from(chunk.size_bytes) * u128::from(record) / u128::from(chunk.records)
            };
            shard.bytes += (until(self.used + count) - until(self.used)) as u64;
            shard.records += u64::from(count);
            shard.ranges.push(Range {
                chunk: chunk.digest,
                size_bytes: chunk.size_bytes,
                records: chunk.records,
                first: self.used,
                count,
            });
            self.used += count;
            if self.used == chunk.records {
                (self.next, self.used) = (self.next + 1, 0);
            }
        }
        shard
    }
}

/// The first `records` records of a shard: what stands for it where all of it would be too much.
pub fn sample(ranges: &[Range], records: u64) -> Vec<Range> {
    let mut left = records;
    let mut taken = Vec::new();
    for range in ranges {
        let count = u32::try_from(left.min(u64::from(range.count))).unwrap_or(range.count);
        if count == 0 {
            break;
        }
        left -= u64::from(count);
        taken.push(Range { count, ..*range });
    }
    taken
}

/// The seed of one shard's training, so that no two shards start from the same factors, and none
/// from those of a round before: `base` is the content of the checkpoint that is trained on. The
/// same training anywhere has the same seed. It has 32 bits: small enough for every TOML and JSON
/// reader.
pub fn shard_seed(recipe_seed: u64, base: Digest, shard: u32) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(SEED_CONTEXT);
    hasher.update(&recipe_seed.to_le_bytes());
    hasher.update(base.as_bytes());
    hasher.update(&shard.to_le_bytes());
    let bytes = hasher.finalize();
    let bytes = bytes.as_bytes();
    u64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// The recipe of one shard's training: the round's, with a seed of the shard's own. Where factors are
/// averaged (`fedex`) all shards of a round have the same seed, for the mean of factors that began
/// apart is close to none; their records differ anyway.
pub fn shard_recipe(file: &RoundFile, base: Digest, shard: u32) -> Recipe {
    let seed_of = match file.policy.aggregation {
        Aggregation::FedEx => 0,
        Aggregation::Stack
        | Aggregation::MultiKrum
        | Aggregation::GeometricMedian
        | Aggregation::Learned => shard,
    };
    let mut recipe = file.recipe.clone();
    recipe.seed = shard_seed(recipe.seed, base, seed_of);
    recipe
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn chunk(name: usize, records: u32, size_bytes: u64) -> Chunk {
        Chunk {
            digest: Digest::of(&name.to_le_bytes()),
            size_bytes,
            records,
        }
    }

    #[test]
    fn refuses_what_cannot_be_cut() {
        assert_eq!(plan(&[chunk(0, 3, 30)], 0, 1), Err(PlanError::NoShards));
        let error = PlanError::TooManyShards {
            records: 3,
            shards: 4,
        };
        assert_eq!(plan(&[chunk(0, 3, 30)], 4, 1), Err(error));
        assert!(plan(&[], 1, 1).is_err());
    }

    #[test]
    fn the_seed_decides_the_order() {
        let chunks: Vec<Chunk> = (0..20).map(|i| chunk(i, 10, 100)).collect();
        assert_eq!(plan(&chunks, 4, 1), plan(&chunks, 4, 1));
        assert_ne!(plan(&chunks, 4, 1), plan(&chunks, 4, 2));
        let (base, next) = (Digest::of(b"base"), Digest::of(b"next"));
        assert_ne!(shard_seed(1, base, 0), shard_seed(1, base, 1));
        assert_ne!(shard_seed(1, base, 0), shard_seed(1, next, 0));
        assert_ne!(shard_seed(1, base, 0), shard_seed(2, base, 0));
    }

    #[test]
    fn a_sample_is_the_start_of_the_shard() {
        let chunks: Vec<Chunk> = (0..3).map(|i| chunk(i, 4, 40)).collect();
        let ranges = &plan(&chunks, 1, 1).unwrap()[0].ranges;
        let counts = |records| -> Vec<u32> {
            let taken = sample(ranges, records);
            taken.iter().map(|range| range.count).collect()
        };
        assert!(counts(0).is_empty());
        assert_eq!(counts(3), [3]);
        assert_eq!(counts(4), [4]);
        assert_eq!(counts(9), [4, 4, 1]);
        assert_eq!(counts(99), [4, 4, 4]);
        assert_eq!(sample(ranges, 9)[2].chunk, ranges[2].chunk);
    }

    proptest! {
        #[test]
        fn each_record_is_in_exactly_one_shard(
            sizes in prop::collection::vec((0u32..40, 1u64..5_000), 1..12),
            shards in 1u32..20,
            seed in any::<u64>(),
        ) {
            let chunks: Vec<Chunk> = sizes.iter().enumerate()
                .map(|(i, (records, bytes))| chunk(i, *records, *bytes)).collect();
            let total: u64 = chunks.iter().map(|c| u64::from(c.records)).sum();
            prop_assume!(u64::from(shards) <= total);
            let plans = plan(&chunks, shards, seed).unwrap();
            prop_assert_eq!(plans.len(), shards as usize);
            let mut seen: BTreeMap<Digest, Vec<u32>> = BTreeMap::new();
            for shard in &plans {
                let in_ranges: u64 = shard.ranges.iter().map(|r| u64::from(r.count)).sum();
                prop_assert_eq!(in_ranges, shard.records);
                for range in &shard.ranges {
                    prop_assert!(range.count > 0);
                    seen.entry(range.chunk).or_default()
                        .extend(range.first..range.first + range.count);
                }
            }
            for chunk in chunks.iter().filter(|chunk| chunk.records > 0) {
                let records = seen.get_mut(&chunk.digest).unwrap();
                records.sort_unstable();
                prop_assert_eq!(&*records, &(0..chunk.records).collect::<Vec<_>>());
            }
            let most = plans.iter().map(|s| s.records).max().unwrap();
            let least = plans.iter().map(|s| s.records).min().unwrap();
            prop_assert!(most - least <= 1);
            let bytes: u64 = plans.iter().map(|s| s.bytes).sum();
            let all: u64 = chunks.iter().filter(|c| c.records > 0).map(|c| c.size_bytes).sum();
            prop_assert_eq!(bytes, all);
        }
    }
}
