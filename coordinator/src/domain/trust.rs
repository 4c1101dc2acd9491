//! How much a volunteer is trusted, and so how often its work is done again. After BOINC: everybody
//! starts at "always", honest work lowers the share, one strike starts it anew.

use cairn_stack::recipe::Policy;

/// What is known of an identity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trust {
    /// Submissions accepted since the last strike that counts.
    pub clean: u32,
    /// Strikes that count.
    pub strikes: u32,
}

impl Trust {
    /// Whether it has yet to earn trust: a new identity, or one that starts anew after a strike.
    pub const fn is_newcomer(self, policy: &Policy) -> bool {
        self.clean < policy.audit_first
    }
}

/// How likely the next submission is audited: 1 for the first `audit_first`, then `audit_share`,
/// falling with the number of clean ones, `audit_share_min` at least.
pub fn audit_share(trust: &Trust, policy: &Policy) -> f64 {
    if trust.is_newcomer(policy) {
        return 1.0;
    }
    let first = f64::from(policy.audit_first.max(1));
    let falling = policy.audit_share * first / f64::from(trust.clean.max(1));
    falling.max(policy.audit_share_min).min(1.0)
}

#[cfg(test)]
pub(crate) mod tests {
    use cairn_stack::recipe::RoundFile;

    use super::*;

    /// A policy of defaults.
    pub(crate) fn policy() -> Policy {
        RoundFile::parse_toml(
            "model = \"m\"\ndataset = \"d\"\nshards = 2\n[recipe]\nrank = 2\nalpha = 4\n\
             target_modules = [\"q_proj\"]\nlearning_rate = 1e-3\nepochs = 1\nbatch_size = 4\n\
             sequence_length = 64\n[policy]\ngate = \"g\"\ndeadline = \"1h\"\n",
        )
        .unwrap()
        .policy
    }

    fn share(clean: u32) -> f64 {
        audit_share(&Trust { clean, strikes: 0 }, &policy())
    }

    #[test]
    fn trust_grows_with_clean_work_and_never_without_end() {
        assert_eq!([share(0), share(2)], [1.0, 1.0]);
        assert!((share(3) - 0.2).abs() < 1e-12);
        assert!((share(6) - 0.1).abs() < 1e-12);
        assert!((share(12) - 0.05).abs() < 1e-12);
        assert_eq!(share(u32::MAX).to_bits(), 0.05_f64.to_bits());
    }

    #[test]
    fn a_policy_without_a_first_phase_divides_by_nothing() {
        let policy = Policy {
            audit_first: 0,
            ..policy()
        };
        let trust = Trust::default();
        assert!(!trust.is_newcomer(&policy));
        assert!((audit_share(&trust, &policy) - 0.2).abs() < 1e-12);
    }
}
