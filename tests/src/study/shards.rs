//! The records of a round, cut for its volunteers.

use super::dice::Dice;
use super::material::Material;

/// How the records are dealt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Split {
    /// At random.
    Iid,
    /// Each topic by shares drawn from Dirichlet(0.3), which a volunteer keeps over all rounds.
    Dirichlet,
}

/// Concentration of the uneven split.
const CONCENTRATION: f64 = 0.3;

impl Split {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Iid, Self::Dirichlet];

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Iid => "iid",
            Self::Dirichlet => "dirichlet",
        }
    }
}

/// The places in the pool that each round trains on: one walk after another through the pool, each
/// in another order. Every arm with this seed sees exactly these.
#[must_use]
pub fn rounds(pool: usize, rounds: usize, records: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut dice = Dice::new(seed, "order");
    let mut walk: Vec<usize> = Vec::new();
    let mut out = Vec::new();
    for _ in 0..rounds {
        while walk.len() < records {
            let mut next: Vec<usize> = (0..pool).collect();
            dice.shuffle(&mut next);
            walk.extend(next);
        }
        out.push(walk.drain(..records).collect());
    }
    out
}

/// What share of each topic each volunteer holds, `[topic][volunteer]`.
#[must_use]
pub fn shares(split: Split, topics: usize, volunteers: usize, seed: u64) -> Vec<Vec<f64>> {
    let mut dice = Dice::new(seed, "shares");
    (0..topics)
        .map(|_| match split {
            Split::Iid => vec![1.0 / volunteers as f64; volunteers],
            Split::Dirichlet => dice.dirichlet(CONCENTRATION, volunteers),
        })
        .collect()
}

/// Deals the records of a round by the shares. Whoever would have fewer than `least` gets what is
/// missing from the one who has most.
#[must_use]
pub fn deal(
    material: &Material,
    round: &[usize],
    shares: &[Vec<f64>],
    least: usize,
) -> Vec<Vec<usize>> {
    let volunteers = shares.first().map_or(1, Vec::len);
    let mut dealt = vec![Vec::new(); volunteers];
    for (topic, shares) in shares.iter().enumerate() {
        let of_topic: Vec<usize> = round
            .iter()
            .copied()
            .filter(|place| material.pool[*place].topic == topic)
            .collect();
        let mut from = 0;
        let mut sum = 0.0;
        for (volunteer, share) in shares.iter().enumerate() {
            sum += share;
            let last = volunteer + 1 == volunteers;
            let to = if last {
                of_topic.len()
            } else {
                (sum * of_topic.len() as f64).round() as usize
            };
            let to = to.clamp(from, of_topic.len());
            dealt[volunteer].extend_from_slice(&of_topic[from..to]);
            from = to;
        }
    }
    while let Some(poor) = (0..volunteers).find(|v| dealt[*v].len() < least) {
        let rich = (0..volunteers).max_by_key(|v| dealt[*v].len()).unwrap_or(0);
        if dealt[rich].len() <= least {
            break;
        }
        let record = dealt[rich].pop();
        dealt[poor].extend(record);
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_is_dealt_once_and_nobody_is_left_out() {
        let work = tempfile::tempdir().unwrap();
        let material = crate::study::material::own(work.path()).unwrap();
        for split in Split::ALL {
            for seed in 0..20 {
                let round = &rounds(material.pool.len(), 2, 300, seed)[1];
                let shares = shares(split, material.topics, 4, seed);
                let dealt = deal(&material, round, &shares, 16);
                let mut all: Vec<usize> = dealt.concat();
                all.sort_unstable();
                let mut want = round.clone();
                want.sort_unstable();
                assert_eq!(all, want);
                assert!(dealt.iter().all(|shard| shard.len() >= 16));
            }
        }
    }

    #[test]
    fn a_pool_is_walked_whole_before_it_starts_over() {
        let rounds = rounds(10, 5, 4, 3);
        let mut first: Vec<usize> = rounds.concat()[..10].to_vec();
        first.sort_unstable();
        assert_eq!(first, (0..10).collect::<Vec<_>>());
    }
}
