//! What is really there: a device is opened, named, measured, and its canary compared.
//!
//! burn panics where a device cannot be opened, and a broken driver may take the whole process with it.
//! So whatever has a driver is tried in a process of its own, this very program started as
//! `cairn-worker probe NAME`; devices without one (the CPU's) are tried here.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::{DeviceName, words};
use crate::canary::{self, Case, Outcome};
use crate::memory;

/// Longest a device may take to be tried: hundreds of kernels are compiled at their first use, for some
/// drivers by a slow compiler.
const PROBE_MAX: Duration = Duration::from_mins(5);

/// Longest answer of a probe read, bytes; real ones have some hundred.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// Most of what a driver says that goes into a reason, characters.
const CAUSE_CHARS_MAX: usize = 240;

/// What there is of one device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its name on the command line.
    pub device: String,
    /// What it is, as it calls itself.
    pub name: Option<String>,
    /// It opens, and computes what it should.
    pub usable: bool,
    /// Why not, and what to do about it.
    pub reason: Option<String>,
    /// Its memory, bytes; the machine's for a CPU.
    pub memory_bytes: Option<u64>,
    /// Tokens a second in a LoRA step on two layers, 512 wide; where it was measured.
    pub tokens_per_second: Option<f64>,
    /// How its canary did; `None` when it does not open.
    pub canary: Option<Canary>,
}

/// How a canary did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Canary {
    /// Whether `worst` is no more than `allowed`.
    pub passed: bool,
    /// The largest relative difference from what must come out.
    pub worst: f64,
    /// Of what that is.
    pub at: String,
    /// The largest that a device of this kind may show.
    pub allowed: f64,
    /// Seconds it took, kernels compiled on the way included.
    pub seconds: f64,
}

impl fmt::Display for Canary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.passed { "passed" } else { "failed" };
        write!(f, "canary {word}: {}", self.distance())
    }
}

impl Canary {
    fn distance(&self) -> String {
        let (worst, allowed) = (two_digits(self.worst), two_digits(self.allowed));
        format!("{worst} off where {allowed} is allowed")
    }
}

/// A positive number in two digits, small ones by powers of ten.
fn two_digits(number: f64) -> String {
    if number < 1e-3 {
        return format!("{number:.1e}");
    }
    let decimals = (1.0 - number.log10().floor()).clamp(0.0, 4.0) as usize;
    let text = format!("{number:.decimals$}");
    if text.contains('.') {
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    text
}

/// How much is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// The small canary alone.
    Small,
    /// The wide one too, for which other kernels are chosen, and for its speed.
    Whole,
}

/// Tries a device.
#[must_use]
pub fn probe(name: DeviceName, depth: Depth) -> Report {
    if name.is_host() {
        return here(name, depth);
    }
    let answer = std::env::current_exe()
        .map_err(|error| format!("this program cannot start itself: {error}"))
        .and_then(|program| {
            let mut command = Command::new(program);
            command.args(["probe", &name.to_string()]);
            if depth == Depth::Whole {
                command.arg("--whole");
            }
            ask(&mut command, PROBE_MAX)
        });
    answer.unwrap_or_else(|cause| unusable(name, &cause, words::instead(name)))
}

/// Tries a device in this process.
#[must_use]
pub fn here(name: DeviceName, depth: Depth) -> Report {
    let tried = catch_unwind(AssertUnwindSafe(|| {
        let device = name.open().map_err(|error| error.to_string())?;
        Ok(measured(name, &device, depth))
    }));
    let cause = match tried {
        Ok(Ok(report)) => return report,
        Ok(Err(cause)) => cause,
        Err(panic) => FIRST_PANIC
            .get()
            .cloned()
            .unwrap_or_else(|| words_of(&*panic)),
    };
    unusable(name, &cause, words::to_open(name))
}

/// Keeps what the first panic said, on whatever thread: those that follow from it say less. For the
/// process that is started to probe.
pub fn remember_first_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let _ = FIRST_PANIC.set(words_of(panic.payload()));
    }));
}

static FIRST_PANIC: OnceLock<String> = OnceLock::new();

fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it failed without a word").to_owned()
}

fn measured(name: DeviceName, device: &Device, depth: Depth) -> Report {
    let (called, memory_bytes) = describe(name, device);
    let mut outcomes = vec![canary::run(Case::Odd, device)];
    if depth == Depth::Whole {
        outcomes.push(canary::run(Case::Wide, device));
    }
    let tokens_per_second = outcomes.get(1).map(|wide| wide.tokens_per_second);
    let canary = judged(name, outcomes);
    Report {
        device: name.to_string(),
        name: called,
        usable: canary.passed,
        reason: (!canary.passed).then(|| wrong(name, &canary)),
        memory_bytes,
        tokens_per_second,
        canary: Some(canary),
    }
}

/// The worse of some outcomes, held against what the kind of device may show.
fn judged(name: DeviceName, outcomes: Vec<Outcome>) -> Canary {
    let allowed = canary::allowed(name);
    let seconds = outcomes.iter().map(|outcome| outcome.seconds).sum();
    let worst = outcomes
        .into_iter()
        .max_by(|a, b| a.worst.total_cmp(&b.worst));
    let (worst, at) = worst
        .map(|outcome| (outcome.worst, outcome.at))
        .unwrap_or_default();
    Canary {
        passed: worst <= allowed,
        worst,
        at,
        allowed,
        seconds,
    }
}

/// The processor as it calls itself, with its threads.
fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"))?;
    let name = line.trim_start_matches([' ', '\t', ':']);
    let threads = std::thread::available_parallelism().ok()?;
    Some(format!("{name}, {threads} threads"))
}

fn describe(name: DeviceName, device: &Device) -> (Option<String>, Option<u64>) {
    if name.is_host() {
        return (cpu_name(), memory::machine_bytes());
    }
    #[cfg(any(
        feature = "cuda",
        feature = "rocm",
        feature = "wgpu",
        feature = "vulkan",
        feature = "metal"
    ))]
    if let Some(identity) = device.identity() {
        let address = identity.physical.and_then(|card| card.pci_address);
        let bytes = address.and_then(|address| memory::card_bytes(&address.to_string()));
        return (Some(identity.name), bytes);
    }
    let _ = device;
    (None, None)
}

fn wrong(name: DeviceName, canary: &Canary) -> String {
    format!(
        "this device computes {} wrong: {}; {}",
        canary.at,
        canary.distance(),
        words::instead(name),
    )
}

fn unusable(name: DeviceName, cause: &str, advice: &str) -> Report {
    Report {
        device: name.to_string(),
        name: None,
        usable: false,
        reason: Some(format!("{}; {advice}", short(cause))),
        memory_bytes: None,
        tokens_per_second: None,
        canary: None,
    }
}

/// Cause in one line.
fn short(cause: &str) -> String {
    let words: Vec<&str> = cause.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(CAUSE_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

/// Starts a program that answers with one [`Report`] on standard output.
///
/// # Errors
/// How it ended, when it ended without an answer or not in time.
fn ask(command: &mut Command, limit: Duration) -> Result<Report, String> {
    let said = tempfile::tempfile().map_err(|error| format!("no temporary file: {error}"))?;
    let heard = said
        .try_clone()
        .map_err(|error| format!("no temporary file: {error}"))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(heard)
        .spawn()
        .map_err(|error| format!("a process to try it in does not start: {error}"))?;
    let answer = answer_of(&mut child, limit);
    if answer.is_none() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    let Some(answer) = answer else {
        return Err(format!("no answer within {} s", limit.as_secs()));
    };
    serde_json::from_slice(&answer).map_err(|_| ended(status, said))
}

/// All that a child writes until it closes its output; `None` when that takes too long.
fn answer_of(child: &mut Child, limit: Duration) -> Option<Vec<u8>> {
    let output = child.stdout.take()?;
    let (to_us, from_reader) = sync_channel(1);
    thread::spawn(move || {
        let mut answer = Vec::new();
        let read = output.take(ANSWER_BYTES_MAX).read_to_end(&mut answer);
        let _ = to_us.send(read.map(|_| answer).unwrap_or_default());
    });
    match from_reader.recv_timeout(limit) {
        Ok(answer) => Some(answer),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => Some(Vec::new()),
    }
}

/// How a child ended that gave no answer, with the last thing it said.
fn ended(status: ExitStatus, mut said: File) -> String {
    let mut text = String::new();
    let read = said
        .seek(SeekFrom::Start(0))
        .and_then(|_| said.take(ANSWER_BYTES_MAX).read_to_string(&mut text));
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    match (read, last) {
        (Ok(_), Some(last)) => {
            format!("its driver ended the program ({status}); its last words: {last}")
        }
        _ => format!("its driver ended the program ({status})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Result<Report, String> {
        ask(Command::new("/bin/sh").args(["-c", script]), limit)
    }

    #[test]
    #[cfg(unix)]
    fn whatever_a_driver_does_becomes_a_reason() {
        let long = Duration::from_mins(1);
        let aborted = shell("echo 'driver: no memory' >&2; kill -ABRT $$", long).unwrap_err();
        assert!(
            aborted.contains("ended the program") && aborted.contains("driver: no memory"),
            "{aborted}"
        );
        let silent = shell("exit 3", long).unwrap_err();
        assert!(silent.contains("exit status: 3"), "{silent}");
        let mumbled = shell("echo hello", long).unwrap_err();
        assert!(mumbled.contains("ended the program"), "{mumbled}");
        let hung = shell("exec sleep 1000", Duration::from_millis(50)).unwrap_err();
        assert!(hung.contains("no answer within"), "{hung}");
        assert!(ask(&mut Command::new("/no/such/program"), long).is_err());
    }

    #[test]
    #[cfg(unix)]
    fn an_answer_comes_through() {
        let report = unusable(
            DeviceName::Vulkan,
            "a\nb  c",
            words::to_open(DeviceName::Vulkan),
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), serde_json::to_vec(&report).unwrap()).unwrap();
        let script = format!("cat '{}'", file.path().display());
        assert_eq!(shell(&script, Duration::from_mins(1)), Ok(report.clone()));
        let reason = report.reason.unwrap();
        assert!(
            reason.starts_with("a b c; ") && reason.contains("driver"),
            "{reason}"
        );
    }

    #[test]
    fn a_panic_becomes_a_reason() {
        let name = DeviceName::default();
        let panic = catch_unwind(|| panic!("no card {}", 7)).unwrap_err();
        assert_eq!(words_of(&*panic), "no card 7");
        let report = unusable(name, &"x".repeat(10_000), words::instead(name));
        assert!(report.reason.unwrap().len() < 1_000);
    }

    #[test]
    fn differences_are_short() {
        let numbers = [6.04e-6, 1e-3, 5e-3, 0.3141, 1.66, 27.4, 1e6];
        let words = numbers.map(two_digits);
        assert_eq!(
            words,
            ["6.0e-6", "0.001", "0.005", "0.31", "1.7", "27", "1000000"]
        );
    }

    #[test]
    fn the_cpu_is_there_and_computes_what_it_should() {
        let report = here(DeviceName::default(), Depth::Whole);
        assert!(report.usable, "{report:?}");
        assert!(report.tokens_per_second.unwrap() > 1.0);
        assert_eq!(report.reason, None);
    }
}
