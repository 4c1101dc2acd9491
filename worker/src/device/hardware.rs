//! What the system says of the processor and of cards.

use std::process::{Command, Stdio};

use super::kilobytes_of;

/// The processor as it calls itself, with its threads.
pub fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"))?;
    let name = line.trim_start_matches([' ', '\t', ':']);
    let threads = std::thread::available_parallelism().ok()?;
    Some(format!("{name}, {threads} threads"))
}

/// The machine's memory, bytes; `None` where the system does not say.
pub fn total_bytes() -> Option<u64> {
    kilobytes_of("/proc/meminfo", "MemTotal:")
}

/// A card's own memory, bytes, by its PCI address (`0000:01:00.0`): AMD's kernel driver has it in a
/// file, NVIDIA's own program says it. `None` where neither does.
#[cfg_attr(
    not(any(
        feature = "cuda",
        feature = "rocm",
        feature = "wgpu",
        feature = "vulkan",
        feature = "metal"
    )),
    expect(
        dead_code,
        reason = "only cards have an address, and this build knows no cards"
    )
)]
pub fn of_card(pci_address: &str) -> Option<u64> {
    let file = format!("/sys/bus/pci/devices/{pci_address}/mem_info_vram_total");
    if let Ok(text) = std::fs::read_to_string(file) {
        return text.trim().parse().ok();
    }
    let asked = Command::new("nvidia-smi")
        .args([
            "--query-gpu=memory.total",
            "--format=csv,noheader,nounits",
            "-i",
            pci_address,
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let mebibytes: u64 = String::from_utf8(asked.stdout).ok()?.trim().parse().ok()?;
    mebibytes.checked_mul(1 << 20)
}
