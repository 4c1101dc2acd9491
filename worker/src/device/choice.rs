//! Which device work is done on: the one that was named, or the fastest that computes what it should.

use std::fmt;
use std::str::FromStr;

use super::probe::{Depth, Report, probe};
use super::{DeviceError, DeviceName, INDEX_MAX};

/// A device by name, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The fastest device of this build whose canary passes. Where the build has one device only,
    /// nothing is measured.
    #[default]
    Auto,
    /// This one.
    Named(DeviceName),
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text {
            "auto" => Ok(Self::Auto),
            name => name.parse().map(Self::Named),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Named(name) => name.fmt(f),
        }
    }
}

/// A device that can be worked on, and how its canary did.
#[derive(Debug, Clone, PartialEq)]
pub struct Settled {
    /// The device.
    pub name: DeviceName,
    /// What there is of it.
    pub report: Report,
}

impl DeviceChoice {
    /// Tries what is to choose from, and takes the fastest that is usable. A device that is alone is tried
    /// with the small canary; one with a driver as deep as is said.
    ///
    /// # Errors
    /// [`DeviceError::NotBuiltIn`] at once; [`DeviceError::Unusable`] with the reason of each device.
    pub fn settle(self, with_driver: Depth) -> Result<Settled, DeviceError> {
        self.check()?;
        let alone = match (self, DeviceName::built_in().as_slice()) {
            (Self::Named(name), _) => name,
            (Self::Auto, &[only]) => only,
            (Self::Auto, several) => {
                let all = several.iter().flat_map(|first| found(*first, Depth::Whole));
                return fastest(all.collect());
            }
        };
        let depth = if alone.is_host() {
            Depth::Small
        } else {
            with_driver
        };
        fastest(vec![(alone, probe(alone, depth))])
    }

    /// Refuses a name that this binary was built without.
    ///
    /// # Errors
    /// [`DeviceError::NotBuiltIn`].
    pub fn check(self) -> Result<(), DeviceError> {
        match self {
            Self::Named(name) if !name.is_built_in() => Err(DeviceError::NotBuiltIn {
                feature: name.feature(),
            }),
            _ => Ok(()),
        }
    }
}

/// The devices of a kind, from its first on, tried: each that opens, or the first with the reason why it
/// does not.
#[must_use]
pub fn found(first: DeviceName, depth: Depth) -> Vec<(DeviceName, Report)> {
    let mut all = Vec::new();
    let mut next = Some(first);
    while let Some(name) = next {
        let report = probe(name, depth);
        let opens = report.canary.is_some();
        if opens || name == first {
            all.push((name, report));
        }
        next = name.next().filter(|_| opens);
    }
    all
}

/// The fastest that is usable; where none was measured, the first.
///
/// # Errors
/// [`DeviceError::Unusable`].
pub fn fastest(tried: Vec<(DeviceName, Report)>) -> Result<Settled, DeviceError> {
    let speed = |report: &Report| report.tokens_per_second.unwrap_or_default();
    let mut reasons = Vec::new();
    let mut best: Option<Settled> = None;
    for (name, report) in tried {
        if !report.usable {
            let reason = report.reason.unwrap_or_default();
            reasons.push((name, reason));
        } else if best
            .as_ref()
            .is_none_or(|best| speed(&report) > speed(&best.report))
        {
            best = Some(Settled { name, report });
        }
    }
    best.ok_or_else(|| {
        let several = reasons.len() > 1;
        let reasons: Vec<String> = reasons
            .into_iter()
            .map(|(name, reason)| {
                if several {
                    format!("{name}: {reason}")
                } else {
                    reason
                }
            })
            .collect();
        DeviceError::Unusable(reasons.join("\n"))
    })
}

impl DeviceName {
    /// The next device of a kind that may be there several times.
    fn next(self) -> Option<Self> {
        let after = |index: usize| index.checked_add(1).filter(|next| *next <= INDEX_MAX);
        match self {
            Self::TchCuda(index) => after(index).map(Self::TchCuda),
            Self::Cuda(index) => after(index).map(Self::Cuda),
            Self::Rocm(index) => after(index).map(Self::Rocm),
            Self::Flex | Self::Tch | Self::Wgpu | Self::Vulkan | Self::Metal => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(usable: bool, speed: Option<f64>) -> Report {
        Report {
            device: String::new(),
            name: None,
            usable,
            reason: (!usable).then(|| "it is off".to_owned()),
            memory_bytes: None,
            tokens_per_second: speed,
            canary: None,
        }
    }

    #[test]
    fn choices_round_trip() {
        for text in ["auto", "flex", "cuda:1", "vulkan"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert!("automatic".parse::<DeviceChoice>().is_err());
        assert_eq!(DeviceChoice::default(), DeviceChoice::Auto);
    }

    #[test]
    fn the_fastest_usable_device_is_taken() {
        let (slow, fast, wrong) = (DeviceName::Flex, DeviceName::Vulkan, DeviceName::Cuda(0));
        let tried = vec![
            (slow, report(true, Some(10.0))),
            (wrong, report(false, Some(1000.0))),
            (fast, report(true, Some(100.0))),
        ];
        assert_eq!(fastest(tried).unwrap().name, fast);
        assert_eq!(
            fastest(vec![(slow, report(true, None))]).unwrap().name,
            slow
        );
    }

    #[test]
    fn where_none_is_usable_each_says_why() {
        let none = vec![
            (DeviceName::Vulkan, report(false, None)),
            (DeviceName::Cuda(0), report(false, None)),
        ];
        let error = fastest(none).unwrap_err().to_string();
        assert_eq!(error, "vulkan: it is off\ncuda:0: it is off");
        let one = vec![(DeviceName::Vulkan, report(false, None))];
        assert_eq!(fastest(one).unwrap_err().to_string(), "it is off");
    }

    #[test]
    #[cfg(all(feature = "flex", not(feature = "tch")))]
    fn the_build_with_one_device_has_nothing_to_choose() {
        assert_eq!(
            DeviceChoice::Auto.settle(Depth::Whole).unwrap().name,
            DeviceName::Flex
        );
    }

    #[test]
    fn several_of_a_kind_are_counted_on() {
        assert_eq!(DeviceName::Cuda(0).next(), Some(DeviceName::Cuda(1)));
        assert_eq!(DeviceName::Rocm(INDEX_MAX).next(), None);
        assert_eq!(DeviceName::Flex.next(), None);
    }
}
