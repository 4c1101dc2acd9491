//! What a forward pass runs on: a name on the command line, a device of burn.
//!
//! - [`probe`]: what is really there, and whether it computes what it should
//! - [`choice`]: `--device`, a name or `auto`
//! - [`list`]: the command `devices`

pub mod choice;
pub mod list;
pub mod probe;
mod words;

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;

pub use choice::{DeviceChoice, Settled};
pub use probe::Depth;

/// A device by name: `flex`, `tch`, `tch-cuda:0`, `cuda:0`, `rocm:0`, `wgpu`, `vulkan`, `metal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// Pure Rust on the CPU.
    Flex,
    /// LibTorch on the CPU.
    Tch,
    /// LibTorch on an NVIDIA GPU.
    TchCuda(usize),
    /// CubeCL on an NVIDIA GPU.
    Cuda(usize),
    /// CubeCL on an AMD GPU.
    Rocm(usize),
    /// CubeCL through whatever graphics interface there is.
    Wgpu,
    /// CubeCL through Vulkan.
    Vulkan,
    /// CubeCL through Metal.
    Metal,
}

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No device has this name.
    #[error(
        "no such device: {0:?} (auto, flex, tch, tch-cuda:N, cuda:N, rocm:N, wgpu, vulkan, metal)"
    )]
    Unknown(String),
    /// This binary was built without it.
    #[error("this cairn-worker was built without `{feature}`; build it with --features {feature}")]
    NotBuiltIn {
        /// The Cargo feature.
        feature: &'static str,
    },
    /// It does not open, or computes wrong; what to do about it is said.
    #[error("{0}")]
    Unusable(String),
}

/// A place among the devices of one kind; machines have far fewer.
const INDEX_MAX: usize = 255;

impl FromStr for DeviceName {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown(text.chars().take(64).collect());
        let (kind, index) = match text.split_once(':') {
            None => (text, None),
            Some((kind, index)) => {
                let index = index.parse().ok().filter(|index| *index <= INDEX_MAX);
                (kind, Some(index.ok_or_else(unknown)?))
            }
        };
        match (kind, index) {
            ("flex" | "cpu", None) => Ok(Self::Flex),
            ("tch", None) => Ok(Self::Tch),
            ("tch-cuda", index) => Ok(Self::TchCuda(index.unwrap_or(0))),
            ("cuda", index) => Ok(Self::Cuda(index.unwrap_or(0))),
            ("rocm", index) => Ok(Self::Rocm(index.unwrap_or(0))),
            ("wgpu", None) => Ok(Self::Wgpu),
            ("vulkan", None) => Ok(Self::Vulkan),
            ("metal", None) => Ok(Self::Metal),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flex => f.write_str("flex"),
            Self::Tch => f.write_str("tch"),
            Self::TchCuda(index) => write!(f, "tch-cuda:{index}"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Rocm(index) => write!(f, "rocm:{index}"),
            Self::Wgpu => f.write_str("wgpu"),
            Self::Vulkan => f.write_str("vulkan"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl Default for DeviceName {
    /// The CPU device of this build, the better one where there are two; where there is none, the first
    /// of all.
    fn default() -> Self {
        Self::built_in().first().copied().unwrap_or(Self::Flex)
    }
}

impl DeviceName {
    /// Every device name this binary was built with; indexed kinds by their first device.
    #[must_use]
    pub fn built_in() -> Vec<Self> {
        let all = [
            (cfg!(feature = "flex"), Self::Flex),
            (cfg!(feature = "tch"), Self::Tch),
            (cfg!(feature = "tch"), Self::TchCuda(0)),
            (cfg!(feature = "cuda"), Self::Cuda(0)),
            (cfg!(feature = "rocm"), Self::Rocm(0)),
            (cfg!(feature = "wgpu"), Self::Wgpu),
            (cfg!(feature = "vulkan"), Self::Vulkan),
            (cfg!(feature = "metal"), Self::Metal),
        ];
        all.into_iter()
            .filter(|(built, _)| *built)
            .map(|(_, name)| name)
            .collect()
    }

    /// Whether this binary was built with it.
    #[must_use]
    pub fn is_built_in(self) -> bool {
        let built_in = Self::built_in();
        built_in
            .iter()
            .any(|other| other.feature() == self.feature())
    }

    /// Opens the device. Kinds with a driver open at their first use, and panic where they cannot.
    ///
    /// # Errors
    /// [`DeviceError::NotBuiltIn`] when the binary lacks its Cargo feature.
    pub fn open(self) -> Result<Device, DeviceError> {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex => Ok(Device::flex()),
            #[cfg(feature = "tch")]
            Self::Tch | Self::TchCuda(_) => Ok(libtorch(self)),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => Ok(Device::cuda(index)),
            #[cfg(feature = "rocm")]
            Self::Rocm(index) => Ok(Device::rocm(index)),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "metal")]
            Self::Metal => Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(not(all(
                feature = "flex",
                feature = "tch",
                feature = "cuda",
                feature = "rocm",
                feature = "wgpu",
                feature = "vulkan",
                feature = "metal"
            )))]
            _ => Err(DeviceError::NotBuiltIn {
                feature: self.feature(),
            }),
        }
    }

    /// Whether it is the host's own processor: its memory is the host's, and no driver lies between, which
    /// may be missing, be wrong, or take the process with it.
    #[must_use]
    pub const fn is_host(self) -> bool {
        matches!(self, Self::Flex | Self::Tch)
    }

    /// The Cargo feature that brings it.
    #[must_use]
    pub const fn feature(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::Tch | Self::TchCuda(_) => "tch",
            Self::Cuda(_) => "cuda",
            Self::Rocm(_) => "rocm",
            Self::Wgpu => "wgpu",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
        }
    }
}

#[cfg(feature = "tch")]
#[expect(
    deprecated,
    reason = "burn-tch is deprecated upstream; supported here while it lasts"
)]
fn libtorch(name: DeviceName) -> Device {
    match name {
        DeviceName::TchCuda(index) => Device::libtorch_cuda(index),
        _ => Device::libtorch(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for text in [
            "flex",
            "tch",
            "tch-cuda:1",
            "cuda:0",
            "rocm:2",
            "wgpu",
            "vulkan",
            "metal",
        ] {
            assert_eq!(text.parse::<DeviceName>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "gpu",
            "flex:0",
            "cuda:",
            "cuda:-1",
            "cuda:99999999999999999999",
            "wgpu:1",
        ] {
            assert!(text.parse::<DeviceName>().is_err(), "{text}");
        }
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_missing_feature_is_named() {
        let error = DeviceName::Cuda(0).open().unwrap_err();
        assert!(error.to_string().contains("--features cuda"), "{error}");
    }
}
