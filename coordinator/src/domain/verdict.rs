//! Whether one submission is accepted: the norm against its cohort, then the gate.

use cairn_stack::algebra::robust_log_z;
use cairn_stack::recipe::Policy;

use super::statistics::{NotPaired, Paired, Scores, compare};

/// Rounds with this many shards or more test that many candidates, so each must clear a higher bar.
pub const MANY_SHARDS: u32 = 50;
/// That bar, in standard errors.
pub const MANY_SHARDS_Z: f64 = 3.0;

/// What the norm says, with its robust z-score: how far the log norm lies from the cohort's median,
/// in either direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormVerdict {
    /// Nothing odd, or too few to say.
    Pass(f64),
    /// Odd: wait for the rest of the round before deciding.
    Hold(f64),
    /// Far too odd.
    Outlier(f64),
}

/// Judges a norm against `cohort`: the norms of all structurally sound submissions of the round that
/// have not been rejected, its own among them. `complete` says that no more will come, so that there
/// is nothing to wait for.
pub fn judge_norm(norm: f64, cohort: &[f64], complete: bool, policy: &Policy) -> NormVerdict {
    if cohort.len() < policy.min_cohort as usize {
        return NormVerdict::Pass(0.0);
    }
    let z = robust_log_z(norm, cohort).unwrap_or(0.0);
    if z.abs() > policy.norm_mad_reject {
        NormVerdict::Outlier(z)
    } else if z.abs() > policy.norm_mad_hold && !complete {
        NormVerdict::Hold(z)
    } else {
        NormVerdict::Pass(z)
    }
}

/// What the gate says of a candidate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GateVerdict {
    /// The improvement over the base stands out.
    Accept(Paired),
    /// It does not.
    NoGain(Paired),
}

/// How many standard errors an improvement must exceed in a round of so many shards.
pub fn gate_z(policy: &Policy, shards: u32) -> f64 {
    if shards >= MANY_SHARDS {
        policy.gate_z.max(MANY_SHARDS_Z)
    } else {
        policy.gate_z
    }
}

/// Compares a candidate with the base on the gate set.
///
/// # Errors
/// When the scores are not of the same records.
pub fn judge_gate(base: &Scores, candidate: &Scores, z: f64) -> Result<GateVerdict, NotPaired> {
    let paired = compare(base, candidate)?;
    Ok(if paired.exceeds(z) {
        GateVerdict::Accept(paired)
    } else {
        GateVerdict::NoGain(paired)
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use cairn_stack::recipe::RoundFile;

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

    #[test]
    fn norms_are_judged_from_a_cohort_on() {
        let policy = policy();
        let few = [1.0, 50.0];
        assert!(matches!(
            judge_norm(50.0, &few, false, &policy),
            NormVerdict::Pass(_)
        ));
        let cohort = [1.0, 1.1, 0.9, 1.05, 50.0];
        assert!(matches!(
            judge_norm(50.0, &cohort, false, &policy),
            NormVerdict::Outlier(_)
        ));
        assert!(matches!(
            judge_norm(0.01, &cohort, false, &policy),
            NormVerdict::Outlier(_)
        ));
        assert!(matches!(
            judge_norm(1.1, &cohort, false, &policy),
            NormVerdict::Pass(_)
        ));
    }

    #[test]
    fn an_odd_norm_waits_only_while_more_may_come() {
        let policy = policy();
        let cohort = [1.0, 1.0, 1.0, 1.0, 1.0, 1.6];
        assert!(matches!(
            judge_norm(1.6, &cohort, false, &policy),
            NormVerdict::Hold(_)
        ));
        assert!(matches!(
            judge_norm(1.6, &cohort, true, &policy),
            NormVerdict::Pass(_)
        ));
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
        let verdict = judge_gate(&base, &better, 2.33).unwrap();
        assert!(matches!(verdict, GateVerdict::Accept(paired) if paired.gain > 0.19));
        let worse = judge_gate(&better, &base, 2.33).unwrap();
        assert!(matches!(worse, GateVerdict::NoGain(_)));
    }
}
