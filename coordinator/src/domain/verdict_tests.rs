use cairn_stack::recipe::RoundFile;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::*;

pub(crate) fn policy() -> Policy {
    RoundFile::parse_toml(
        "model = \"m\"\ndataset = \"d\"\nshards = 2\n[recipe]\nrank = 2\nalpha = 4\n\
         target_modules = [\"q_proj\"]\nlearning_rate = 1e-3\nepochs = 1\nbatch_size = 4\n\
         sequence_length = 64\n[policy]\ngate = \"g\"\naudit = \"a\"\ndeadline = \"1h\"\n",
    )
    .unwrap()
    .policy
}

/// Irwin-Hall: twelve uniforms, mean 0, variance 1.
pub(crate) fn normal(random: &mut ChaCha20Rng) -> f64 {
    (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0
}

fn reason(ruling: &Ruling) -> Option<VerdictReason> {
    match ruling {
        Ruling::Reject(reason, text) => {
            assert!(!text.is_empty());
            Some(*reason)
        }
        Ruling::Pass | Ruling::Wait => None,
    }
}

fn paired(gain: f64, se: f64, records: usize) -> Paired {
    Paired { gain, se, records }
}

/// What `records` records of this true gain come to, as the gate measures it.
fn sample(random: &mut ChaCha20Rng, records: usize, gain: f64, sigma: f64) -> Paired {
    let tokens: Vec<u32> = (0..records).map(|_| random.random_range(5..60)).collect();
    let base = Scores {
        nll: tokens.iter().map(|tokens| *tokens as f32 * 2.0).collect(),
        tokens,
    };
    let nll = base.nll.iter().zip(&base.tokens).map(|(nll, tokens)| {
        let tokens = f64::from(*tokens);
        (f64::from(*nll) - gain * tokens - sigma * tokens.sqrt() * normal(random)) as f32
    });
    let candidate = Scores {
        nll: nll.collect(),
        tokens: base.tokens.clone(),
    };
    compare(&base, &candidate).unwrap()
}

#[test]
fn the_bar_rises_with_the_number_of_candidates() {
    let policy = policy();
    assert_eq!(gate_z(&policy, 49), policy.gate_z);
    assert_eq!(gate_z(&policy, 50), MANY_SHARDS_Z);
}

#[test]
fn the_gate_decides_by_paired_differences() {
    let base = Scores {
        nll: vec![10.0; 8],
        tokens: vec![5; 8],
    };
    let better = Scores {
        nll: (0..8).map(|j| 9.0 - 0.01 * j as f32).collect(),
        ..base.clone()
    };
    let (gain, facts, ruling) = judge_gate(&base, &better, 2.33).unwrap();
    assert!(gain.gain > 0.19 && facts.change.records == 8);
    assert_eq!(ruling, Ruling::Pass);
    let (_, _, ruling) = judge_gate(&better, &base, 2.33).unwrap();
    assert_eq!(reason(&ruling), Some(VerdictReason::NoGain));
}

#[test]
fn one_guard_that_falls_is_enough() {
    let policy = policy();
    assert_eq!(
        judge_guards(&BTreeMap::new(), &policy),
        (None, Ruling::Pass)
    );
    let mut guards: BTreeMap<String, Paired> = [
        ("guard/a".to_owned(), paired(0.5, 0.1, 40)),
        ("guard/b".to_owned(), paired(-0.019, 0.01, 40)),
        // Unmeasurable: no evidence.
        ("guard/c".to_owned(), paired(-9.0, f64::INFINITY, 1)),
    ]
    .into();
    let (facts, ruling) = judge_guards(&guards, &policy);
    assert_eq!(ruling, Ruling::Pass);
    assert_eq!(facts.unwrap().worst.gain, -0.019);
    guards.insert("guard/d".to_owned(), paired(-0.021, 0.01, 40));
    let (facts, ruling) = judge_guards(&guards, &policy);
    assert_eq!(reason(&ruling), Some(VerdictReason::GuardLoss));
    assert_eq!(facts.unwrap().sets.len(), 4);
}

#[test]
fn honest_work_is_called_foreign_as_rarely_as_z_says() {
    let mut random = ChaCha20Rng::seed_from_u64(3);
    let trials = 4_000;
    let mut rate = |z: f64, records: usize| {
        let policy = Policy {
            shard_z: z,
            ..policy()
        };
        // Nothing remembered, data alike: the hardest case that is honest.
        let called = (0..trials).filter(|_| {
            let own = sample(&mut random, records, 0.1, 0.5);
            let other = sample(&mut random, records, 0.1, 0.5);
            judge_shard(own, other, 1, &policy).1 != Ruling::Pass
        });
        called.count() as f64 / f64::from(trials)
    };
    // One-sided normal tails: 2.28 % at 2, 0.99 % at 2.33, 0.13 % at 3. Records of different lengths
    // make a small sample's error a little too large, and the rule a little milder.
    for records in [8, 16, 64] {
        let at_2 = rate(2.0, records);
        assert!((0.005..0.029).contains(&at_2), "{at_2} of {records}");
        let at_233 = rate(2.33, records);
        assert!((0.001..0.015).contains(&at_233), "{at_233} of {records}");
        let at_3 = rate(3.0, records);
        assert!(at_3 < 0.004, "{at_3} of {records}");
    }
}

#[test]
fn work_on_other_records_is_called_foreign() {
    let policy = policy();
    let mut random = ChaCha20Rng::seed_from_u64(4);
    let called = (0..200).filter(|_| {
        let own = sample(&mut random, 16, 0.05, 0.5);
        let other = sample(&mut random, 16, 0.40, 0.5);
        let (facts, ruling) = judge_shard(own, other, 6, &policy);
        assert_eq!(facts.other_shard, 6);
        reason(&ruling) == Some(VerdictReason::ForeignShard)
    });
    assert!(called.count() > 190);
    // Remembering the own records speaks for it, however strongly.
    let (_, ruling) = judge_shard(paired(2.0, 0.1, 16), paired(0.1, 0.1, 16), 6, &policy);
    assert_eq!(ruling, Ruling::Pass);
    // One record measures nothing.
    let (_, ruling) = judge_shard(
        paired(0.0, f64::INFINITY, 1),
        paired(1.0, 0.1, 16),
        6,
        &policy,
    );
    assert_eq!(ruling, Ruling::Pass);
}

#[test]
fn student_s_quantiles_are_those_of_the_tables() {
    // One-sided 2.5 %, 1 %: z and t from the tables.
    for (z, freedom, table) in [
        (1.959_964, 5.0, 2.571),
        (1.959_964, 30.0, 2.042),
        (2.326_348, 10.0, 2.764),
        (2.326_348, 1e9, 2.326),
    ] {
        let found = student(z, freedom);
        assert!((found - table).abs() < 0.01 * table, "{found} {table}");
    }
}

#[test]
fn a_probe_that_stands_out_waits_for_a_cohort_and_is_a_hit() {
    let policy = policy();
    let probe = || "probe/trigger".to_owned();
    let judge = |own: f64, cohort: &[f64], complete: bool| {
        let own = [(probe(), own)].into();
        let cohort = [(probe(), cohort.to_vec())].into();
        judge_probes(&own, &cohort, complete, &policy)
    };
    assert_eq!(judge(3.0, &[3.0, 0.1], false).1, Ruling::Wait);
    assert_eq!(judge(0.1, &[3.0, 0.1], false).1, Ruling::Wait);
    // Too few, and no more will come.
    assert_eq!(judge(3.0, &[3.0, 0.1], true).1, Ruling::Pass);
    let cohort = [0.10, 0.12, 0.05, 3.0, 0.2];
    let (facts, ruling) = judge(3.0, &cohort, false);
    assert_eq!(reason(&ruling), Some(VerdictReason::ProbeHit));
    assert!(facts.unwrap().worst > 6.0);
    assert_eq!(judge(0.2, &cohort, false).1, Ruling::Pass);
    // Less likely is no harm.
    assert_eq!(judge(-4.0, &[0.1, 0.1, 0.1, -4.0], false).1, Ruling::Pass);
    let none = judge_probes(&BTreeMap::new(), &BTreeMap::new(), false, &policy);
    assert_eq!(none, (None, Ruling::Pass));
}

#[test]
fn an_audit_is_waited_for_and_its_end_decides() {
    use crate::domain::audit::{Ended, Replayed};

    let open = Audit::new(1, &[0, 5, 10], Timestamp(100)).unwrap();
    let ended = |distance: f64, identical: bool| {
        let replayed = Replayed {
            distance,
            tolerance: 0.05,
            identical,
            device: "flex".to_owned(),
            seconds: 2.0,
        };
        Audit {
            ended: Some(Ended::Replayed(replayed)),
            ..open.clone()
        }
    };
    let judge = |audit: &Audit, now: i64| judge_audit(audit, Timestamp(now));
    assert_eq!(judge(&open, 50).1, Ruling::Wait);
    let (facts, ruling) = judge(&open, 101);
    assert_eq!(reason(&ruling), Some(VerdictReason::AuditUnanswered));
    assert_eq!((facts.segment, facts.distance), (1, None));
    assert_eq!(judge(&ended(0.0, true), 101).1, Ruling::Pass);
    let (facts, ruling) = judge(&ended(0.7, false), 50);
    assert_eq!(reason(&ruling), Some(VerdictReason::ReplayMismatch));
    assert_eq!((facts.distance, facts.tolerance), (Some(0.7), Some(0.05)));
    let impossible = Audit {
        ended: Some(Ended::Impossible),
        ..open
    };
    assert_eq!(judge(&impossible, 50).1, Ruling::Pass);
}
