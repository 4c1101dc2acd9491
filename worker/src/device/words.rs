//! What to do about a device, by its kind.

use super::DeviceName;

/// About one that does not open.
pub fn to_open(name: DeviceName) -> &'static str {
    match name {
        DeviceName::Flex | DeviceName::Tch => {
            "this build of cairn-worker does not run on this machine"
        }
        DeviceName::TchCuda(_) => {
            "it needs NVIDIA's driver (nvidia-smi shows the card) and a LibTorch 2.9.0 with CUDA; set LIBTORCH and \
             LD_LIBRARY_PATH to it, or choose another --device"
        }
        DeviceName::Cuda(_) => {
            "it needs NVIDIA's driver and the CUDA toolkit's NVRTC (nvidia-smi shows the card); install them, or \
             choose another --device"
        }
        DeviceName::Rocm(_) => {
            "it needs AMD's driver and ROCm (rocminfo shows the card); install them, or choose another --device"
        }
        DeviceName::Wgpu | DeviceName::Vulkan => {
            "it needs the graphics card's Vulkan driver (vulkaninfo --summary shows it; on Debian \
             mesa-vulkan-drivers for AMD and Intel, nvidia-driver for NVIDIA); install it, or choose another --device"
        }
        DeviceName::Metal => "it needs a Mac; choose another --device",
    }
}

/// About one that computes wrong, or whose driver breaks down.
pub fn instead(name: DeviceName) -> &'static str {
    match (name, cfg!(feature = "flex")) {
        (DeviceName::Flex | DeviceName::Tch, _) => {
            "test this machine's memory, and tell us of it with the output of cairn-worker devices --json"
        }
        (_, true) => "update its driver, or use --device flex",
        (_, false) => "update its driver, or use a cairn-worker with the default device, flex",
    }
}

/// The kinds this binary was built without, in a line; `None` when it has all.
#[must_use]
pub fn not_built_in() -> Option<String> {
    let missing: Vec<&str> = [
        (cfg!(feature = "flex"), "flex"),
        (cfg!(feature = "tch"), "tch"),
        (cfg!(feature = "cuda"), "cuda"),
        (cfg!(feature = "rocm"), "rocm"),
        (cfg!(feature = "wgpu"), "wgpu"),
        (cfg!(feature = "vulkan"), "vulkan"),
        (cfg!(feature = "metal"), "metal"),
    ]
    .into_iter()
    .filter_map(|(built, feature)| (!built).then_some(feature))
    .collect();
    let features = missing.join(", ");
    (!missing.is_empty()).then(|| {
        format!("not built in: {features}; build with cargo build -p cairn-worker --features NAME (tch brings tch-cuda too)")
    })
}
