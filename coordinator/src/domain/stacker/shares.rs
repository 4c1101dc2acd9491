//! What each submission of a set weighs: the bytes that were leased to it, within two caps.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::Accepted;
use crate::ids::WorkerId;

/// What one submission would weigh without caps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is.
    pub worker: WorkerId,
    /// Whether that identity has yet to earn trust.
    pub newcomer: bool,
    /// Bytes of its shard.
    pub bytes: u64,
}

impl From<&Accepted> for Claim {
    fn from(accepted: &Accepted) -> Self {
        Self {
            worker: accepted.worker,
            newcomer: accepted.newcomer,
            bytes: accepted.shard_bytes,
        }
    }
}

/// Everything that one identity claims.
struct Identity {
    worker: WorkerId,
    newcomer: bool,
    bytes: u64,
}

/// The share of each claim, in their order: in proportion to bytes as far as the caps allow, summing
/// to 1.
///
/// No identity has more than `identity_share`, and all newcomers together no more than
/// `newcomer_share` where there are others. What is cut off goes to the rest in proportion (water
/// filling). Where both cannot hold, because there are too few identities, the newcomers' cap does,
/// and the others' level rises as little as it must.
pub fn capped_shares(claims: &[Claim], identity_share: f64, newcomer_share: f64) -> Vec<f64> {
    let mut identities: BTreeMap<WorkerId, Identity> = BTreeMap::new();
    for claim in claims {
        let known = identities.entry(claim.worker).or_insert(Identity {
            worker: claim.worker,
            newcomer: false,
            bytes: 0,
        });
        known.newcomer |= claim.newcomer;
        known.bytes = known.bytes.saturating_add(claim.bytes.max(1));
    }
    let filled = fill_classes(&identities, identity_share, newcomer_share);
    let share = |claim: &Claim| {
        let bytes = identities.get(&claim.worker).map_or(1, |one| one.bytes);
        let whole = filled.get(&claim.worker).copied().unwrap_or(0.0);
        whole * (claim.bytes.max(1) as f64 / bytes as f64)
    };
    claims.iter().map(share).collect()
}

/// The share of each identity.
fn fill_classes(
    identities: &BTreeMap<WorkerId, Identity>,
    identity_share: f64,
    newcomer_share: f64,
) -> BTreeMap<WorkerId, f64> {
    let all: Vec<&Identity> = identities.values().collect();
    let free = fill(&all, 1.0, identity_share);
    let (new, known): (Vec<&Identity>, Vec<&Identity>) = all.iter().partition(|one| one.newcomer);
    let of_new: f64 = new.iter().filter_map(|one| free.get(&one.worker)).sum();
    if known.is_empty() || of_new <= newcomer_share {
        return free;
    }
    // What the newcomers may have at most, each within its own cap.
    let of_new = newcomer_share.min(identity_share * new.len() as f64);
    let mut shares = fill(&new, of_new, identity_share);
    shares.extend(fill(&known, 1.0 - of_new, identity_share));
    shares
}

/// Distributes `total` in proportion to bytes with none above `cap`; where that is too low for all
/// of it, all get the same.
fn fill(identities: &[&Identity], total: f64, cap: f64) -> BTreeMap<WorkerId, f64> {
    let cap = cap.max(total / identities.len().max(1) as f64);
    let mut order = identities.to_vec();
    order.sort_by_key(|one| (Reverse(one.bytes), one.worker));
    let mut bytes_left: u64 = order.iter().map(|one| one.bytes).sum();
    let mut left = total;
    let mut shares = BTreeMap::new();
    // From the largest down: once one is below the cap, so are all that follow.
    for one in order {
        let wanted = left * (one.bytes as f64 / bytes_left.max(1) as f64);
        let share = wanted.min(cap);
        shares.insert(one.worker, share);
        left = (left - share).max(0.0);
        bytes_left -= one.bytes;
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claims(of: &[(usize, bool, u64)]) -> Vec<Claim> {
        let count = of.iter().map(|one| one.0).max().map_or(0, |most| most + 1);
        let workers: Vec<WorkerId> = (0..count).map(|_| WorkerId::new()).collect();
        of.iter()
            .map(|(worker, newcomer, bytes)| Claim {
                worker: workers[*worker],
                newcomer: *newcomer,
                bytes: *bytes,
            })
            .collect()
    }

    fn close(shares: &[f64], expected: &[f64]) {
        assert_eq!(shares.len(), expected.len());
        for (share, value) in shares.iter().zip(expected) {
            assert!((share - value).abs() < 1e-12, "{shares:?} {expected:?}");
        }
    }

    #[test]
    fn without_anything_to_cap_shares_are_bytes() {
        let claims = claims(&[(0, false, 100), (1, false, 300), (2, true, 400)]);
        close(&capped_shares(&claims, 0.5, 0.5), &[0.125, 0.375, 0.5]);
        close(&capped_shares(&[], 0.5, 0.5), &[]);
    }

    #[test]
    fn an_identity_with_many_shards_is_cut_and_the_rest_is_shared_out() {
        let claims = claims(&[
            (0, false, 400),
            (0, false, 200),
            (1, false, 100),
            (2, false, 300),
        ]);
        // 0.6 is cut to 0.5; what is left goes 1 : 3.
        let third = 0.5 / 3.0;
        close(
            &capped_shares(&claims, 0.5, 1.0),
            &[2.0 * third, third, 0.125, 0.375],
        );
    }

    #[test]
    fn newcomers_together_are_cut_where_there_are_others() {
        let crowd = claims(&[
            (0, false, 100),
            (1, true, 100),
            (2, true, 100),
            (3, true, 100),
        ]);
        close(
            &capped_shares(&crowd, 1.0, 0.25),
            &[0.75, 0.25 / 3.0, 0.25 / 3.0, 0.25 / 3.0],
        );
        // The only known one weighs more than its cap, because the newcomers may not.
        close(
            &capped_shares(&crowd, 0.3, 0.25),
            &[0.75, 0.25 / 3.0, 0.25 / 3.0, 0.25 / 3.0],
        );
        let alone = claims(&[(0, true, 100), (1, true, 300)]);
        close(&capped_shares(&alone, 1.0, 0.25), &[0.25, 0.75]);
        close(&capped_shares(&alone, 0.1, 0.25), &[0.5, 0.5]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn shares_sum_to_one_and_hold_the_caps_that_can_be_held(
            of in prop::collection::vec((0_usize..9, 0_u64..1_000_000), 1..40),
            new in prop::collection::vec(any::<bool>(), 9),
            identity in 0.05_f64..1.0,
            newcomer in 0.05_f64..1.0,
            turn in 0_usize..40,
        ) {
            let of: Vec<(usize, bool, u64)> = of.iter().map(|(w, b)| (*w, new[*w], *b)).collect();
            let mut claims = claims(&of);
            let shares = capped_shares(&claims, identity, newcomer);
            prop_assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            prop_assert!(shares.iter().all(|share| *share >= 0.0));
            let mut totals: BTreeMap<WorkerId, (bool, f64)> = BTreeMap::new();
            for (claim, share) in claims.iter().zip(&shares) {
                let total = totals.entry(claim.worker).or_insert((claim.newcomer, 0.0));
                total.1 += share;
            }
            let of_new: f64 = totals.values().filter(|one| one.0).map(|one| one.1).sum();
            let new = totals.values().filter(|one| one.0).count() as f64;
            let known = totals.len() as f64 - new;
            prop_assert!(known == 0.0 || of_new <= newcomer + 1e-9);
            let room = if known == 0.0 { identity * new } else { newcomer.min(identity * new) };
            if room + identity * known >= 1.0 {
                let most = totals.values().map(|one| one.1).fold(0.0, f64::max);
                prop_assert!(most <= identity + 1e-9, "{most} above {identity}");
            }
            // The same whatever the order, to the last bit.
            let turn = turn % claims.len();
            claims.rotate_left(turn);
            let mut again = capped_shares(&claims, identity, newcomer);
            again.rotate_right(turn);
            prop_assert_eq!(shares, again);
        }
    }
}
