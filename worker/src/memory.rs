//! How much memory this program may still have: the least of what the machine, a control group and the
//! process's own limits leave. A container's memory is its group's, whatever the machine has.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::device::DeviceName;

/// Who sets the limit that binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The machine's memory.
    Machine,
    /// A control group's (a container's, a service's).
    Group,
    /// The process's own (`ulimit -v`, `ulimit -d`).
    Process,
    /// A graphics card's own memory.
    Card,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Machine => "in this machine",
            Self::Group => "in this control group",
            Self::Process => "under this process's limit",
            Self::Card => "on this card",
        })
    }
}

/// Memory that is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that can be had without others being moved out or this program being stopped. Pages of
    /// files that the system drops when it needs them count as free.
    pub available: u64,
    /// Bytes this process holds now.
    pub held: u64,
    /// Who says so.
    pub limit: Limit,
}

impl Memory {
    /// What a model on this device has to fit into; `None` where nobody says.
    #[must_use]
    pub fn of(device: DeviceName) -> Option<Self> {
        let available = match device {
            DeviceName::Flex | DeviceName::Tch => return Self::now(),
            DeviceName::Cuda(index) | DeviceName::TchCuda(index) => {
                nvidia("memory.free", &index.to_string())?
            }
            DeviceName::Rocm(index) => amd(Path::new("/sys/class/drm"), index)?,
            DeviceName::Wgpu | DeviceName::Vulkan | DeviceName::Metal => return None,
        };
        Some(Self {
            available,
            held: 0,
            limit: Limit::Card,
        })
    }

    /// What the system says now; `None` where it does not.
    #[must_use]
    pub fn now() -> Option<Self> {
        Self::seen_from(Path::new("/"))
    }

    /// What it says under another root; for tests.
    fn seen_from(root: &Path) -> Option<Self> {
        let status = read(&root.join("proc/self/status"));
        let machine = kilobytes(&read(&root.join("proc/meminfo")), "MemAvailable:")?;
        let bounds = [
            (Some(machine), Limit::Machine),
            (group(root), Limit::Group),
            (process(root, &status), Limit::Process),
        ];
        let bounds = bounds.into_iter();
        let (available, limit) = bounds
            .filter_map(|(bytes, limit)| Some((bytes?, limit)))
            .min_by_key(|(bytes, _)| *bytes)?;
        Some(Self {
            available,
            held: kilobytes(&status, "VmRSS:")?,
            limit,
        })
    }

    /// The most this process can come to hold.
    #[must_use]
    pub fn reach(self) -> u64 {
        self.held.saturating_add(self.available)
    }
}

/// Where a hierarchy of control groups is mounted, and how its files are called.
struct Hierarchy {
    /// Folder of this process's own group.
    own: PathBuf,
    /// Folder above which nothing limits it.
    top: PathBuf,
    files: Files,
}

struct Files {
    limits: &'static [&'static str],
    used: &'static str,
    /// Lines of `memory.stat`: pages of files, which go when memory is needed.
    droppable: [&'static str; 2],
}

const V2: Files = Files {
    limits: &["memory.max", "memory.high"],
    used: "memory.current",
    droppable: ["inactive_file", "active_file"],
};

const V1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    droppable: ["total_inactive_file", "total_active_file"],
};

/// What this process's control groups leave: the least over the group and all above it, in both
/// versions of the interface.
fn group(root: &Path) -> Option<u64> {
    let mounts = read(&root.join("proc/self/mountinfo"));
    let groups = read(&root.join("proc/self/cgroup"));
    let left = mounts.lines().filter_map(|mount| {
        let hierarchy = hierarchy(root, mount, &groups)?;
        let levels = hierarchy.own.ancestors();
        let levels = levels.take_while(|level| level.starts_with(&hierarchy.top));
        let left = levels.filter_map(|level| left_in(level, &hierarchy.files));
        left.min()
    });
    left.min()
}

/// A line of `mountinfo` that mounts memory's control groups (proc(5)): `ID PARENT DEV ROOT POINT OPTIONS
/// [FIELDS] - TYPE SOURCE OPTIONS`.
fn hierarchy(root: &Path, mount: &str, groups: &str) -> Option<Hierarchy> {
    let (before, after) = mount.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (mounted, point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    // `0::/path` is the second version's, `9:memory:/path` the first's.
    let (files, is_ours): (Files, fn(&str) -> bool) = match kind {
        "cgroup2" => (V2, str::is_empty),
        "cgroup" if options.split(',').any(|option| option == "memory") => {
            (V1, |names| names.split(',').any(|name| name == "memory"))
        }
        _ => return None,
    };
    let own = groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (names, path) = rest.split_once(':')?;
        is_ours(names).then_some(path)
    })?;
    let top = root.join(point.trim_start_matches('/'));
    // Seen from inside a container, the group's own folder is what is mounted.
    let below = Path::new(own)
        .strip_prefix(mounted)
        .unwrap_or(Path::new(""));
    Some(Hierarchy {
        own: top.join(below.strip_prefix("/").unwrap_or(below)),
        top,
        files,
    })
}

fn left_in(folder: &Path, files: &Files) -> Option<u64> {
    let number = |name: &&str| number(&folder.join(name));
    // "max" is no number: no limit.
    let limit = files.limits.iter().filter_map(number).min()?;
    let used = number(&files.used)?;
    let stat = read(&folder.join("memory.stat"));
    let droppable: u64 = files
        .droppable
        .iter()
        .filter_map(|name| {
            let line = stat.lines().find_map(|line| line.strip_prefix(name))?;
            line.strip_prefix(' ')?.trim().parse::<u64>().ok()
        })
        .fold(0, u64::saturating_add);
    Some(limit.saturating_sub(used.saturating_sub(droppable)))
}

/// What the process's own limits on addresses and data leave: half of it, since an allocator takes them
/// in larger pieces than it fills, and gives back memory but not addresses.
fn process(root: &Path, status: &str) -> Option<u64> {
    let limits = read(&root.join("proc/self/limits"));
    let left = |name: &str, used: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(limit.saturating_sub(kilobytes(status, used)?) / 2)
    };
    let bounds = [
        left("Max address space", "VmSize:"),
        left("Max data size", "VmData:"),
    ];
    bounds.into_iter().flatten().min()
}

/// Most memory this process has held so far, in bytes; `None` where the system does not say.
#[must_use]
pub fn peak_rss_bytes() -> Option<u64> {
    kilobytes(&read(Path::new("/proc/self/status")), "VmHWM:")
}

/// All the memory of the machine, in bytes; `None` where the system does not say.
#[must_use]
pub fn machine_bytes() -> Option<u64> {
    kilobytes(&read(Path::new("/proc/meminfo")), "MemTotal:")
}

/// All the memory of a card by its PCI address (`0000:01:00.0`), in bytes: AMD's kernel driver has it in
/// a file, NVIDIA's own program says it. `None` where neither does.
#[must_use]
pub fn card_bytes(pci_address: &str) -> Option<u64> {
    let file = Path::new("/sys/bus/pci/devices").join(pci_address);
    number(&file.join(AMD_TOTAL)).or_else(|| nvidia("memory.total", pci_address))
}

/// What NVIDIA's own tool says of a card's memory, by its index or address.
fn nvidia(what: &str, card: &str) -> Option<u64> {
    let output = Command::new("nvidia-smi")
        .arg("--format=csv,noheader,nounits")
        .args([format!("--id={card}"), format!("--query-gpu={what}")])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    mebibytes(&String::from_utf8_lossy(&output.stdout))
}

fn mebibytes(line: &str) -> Option<u64> {
    line.trim().parse::<u64>().ok()?.checked_mul(1 << 20)
}

/// Where AMD's kernel driver has the memory of a card, bytes.
const AMD_TOTAL: &str = "mem_info_vram_total";

/// What the kernel's driver says is free on a card of AMD's: the cards that say so, in their order.
fn amd(folder: &Path, index: usize) -> Option<u64> {
    let mut cards: Vec<PathBuf> = fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|card| card.path().join("device"))
        .filter(|card| card.join(AMD_TOTAL).exists())
        .collect();
    cards.sort();
    let card = cards.get(index)?;
    number(&card.join(AMD_TOTAL))?.checked_sub(number(&card.join("mem_info_vram_used"))?)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A file that holds one number.
fn number(path: &Path) -> Option<u64> {
    read(path).trim().parse().ok()
}

/// The number behind a name, such as `VmRSS:     1234 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

/// Bytes as people read them: `7.4 GiB`.
#[must_use]
pub fn human(bytes: u64) -> String {
    const GIB: f64 = (1_u64 << 30) as f64;
    const MIB: f64 = (1_u64 << 20) as f64;
    let bytes = bytes as f64;
    if bytes >= GIB {
        format!("{:.1} GiB", bytes / GIB)
    } else {
        format!("{:.0} MiB", bytes / MIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up `/proc` and `/sys`.
    struct System(tempfile::TempDir);

    impl System {
        fn new(files: &[(&str, &str)]) -> Self {
            let system = Self(tempfile::tempdir().unwrap());
            system.write(
                "proc/meminfo",
                "MemTotal: 9000 kB\nMemAvailable:   8000 kB\n",
            );
            system.write(
                "proc/self/status",
                "VmSize: 700 kB\nVmRSS:\t 300 kB\nVmData: 500 kB\n",
            );
            for (path, text) in files {
                system.write(path, text);
            }
            system
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn left(&self) -> (u64, Limit) {
            let memory = Memory::seen_from(self.0.path()).unwrap();
            assert_eq!(
                (memory.held, memory.reach()),
                (300 << 10, memory.available + (300 << 10))
            );
            (memory.available, memory.limit)
        }
    }

    const UNIFIED: &str = "30 23 0:25 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";

    #[test]
    fn without_groups_and_limits_it_is_the_machines() {
        assert_eq!(System::new(&[]).left(), (8000 << 10, Limit::Machine));
        let nothing = tempfile::tempdir().unwrap();
        assert_eq!(Memory::seen_from(nothing.path()), None);
    }

    #[test]
    fn the_narrowest_group_binds_and_pages_of_files_count_as_free() {
        let system = System::new(&[
            ("proc/self/mountinfo", UNIFIED),
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.high", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "100\n"),
            ("sys/fs/cgroup/a/memory.max", "5000\n"),
            ("sys/fs/cgroup/a/memory.current", "4500\n"),
            (
                "sys/fs/cgroup/a/memory.stat",
                "anon 4200\ninactive_file 200\nactive_file 100\n",
            ),
        ]);
        assert_eq!(system.left(), (800, Limit::Group));
        system.write("sys/fs/cgroup/a/b/memory.high", "300\n");
        assert_eq!(system.left(), (200, Limit::Group));
        system.write("sys/fs/cgroup/a/memory.current", "9999\n");
        assert_eq!(system.left(), (0, Limit::Group));
    }

    #[test]
    fn inside_a_container_the_group_is_what_is_mounted() {
        let system = System::new(&[
            ("proc/self/mountinfo", UNIFIED),
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "6000\n"),
            ("sys/fs/cgroup/memory.current", "1000\n"),
        ]);
        assert_eq!(system.left(), (5000, Limit::Group));
    }

    #[test]
    fn the_first_version_of_the_interface_is_read_too() {
        let system = System::new(&[
            (
                "proc/self/mountinfo",
                "35 31 0:32 /docker/c /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                 36 31 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            ),
            ("proc/self/cgroup", "4:memory:/docker/c\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "2500\n"),
            (
                "sys/fs/cgroup/memory/memory.stat",
                "inactive_file 1\ntotal_inactive_file 400\n",
            ),
        ]);
        assert_eq!(system.left(), (900, Limit::Group));
    }

    #[test]
    fn the_process_has_limits_of_its_own() {
        let limits = "Limit                     Soft Limit  Hard Limit  Units\n\
            Max data size             unlimited   unlimited   bytes\n\
            Max address space         819200      unlimited   bytes\n";
        let system = System::new(&[("proc/self/limits", limits)]);
        assert_eq!(system.left(), (50 << 10, Limit::Process));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_system_says_something() {
        let memory = Memory::now().unwrap();
        assert!(memory.available > 1 << 20 && memory.held > 1 << 20);
        assert!(peak_rss_bytes().unwrap() > 1 << 20);
        assert!(machine_bytes().unwrap() > memory.available);
    }

    #[test]
    fn cards_say_what_is_free() {
        assert_eq!(mebibytes("24068\n"), Some(24_068 << 20));
        assert_eq!(mebibytes("[N/A]\n"), None);
        let system = System::new(&[
            ("drm/card0/device/vendor", "0x10de\n"),
            ("drm/card1/device/mem_info_vram_total", "1000\n"),
            ("drm/card1/device/mem_info_vram_used", "300\n"),
        ]);
        let folder = system.0.path().join("drm");
        assert_eq!((amd(&folder, 0), amd(&folder, 1)), (Some(700), None));
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!(human(7_945_689_497), "7.4 GiB");
        assert_eq!(human(300 << 20), "300 MiB");
    }
}
