//! Where tests kill this process: before and after each step that stores something.
//!
//! A step is what is done and where in the source it is asked for: `commit ops/submit_adapter`,
//! `put folding`. [`Tx::commit`](crate::db::Tx::commit) and the blob store make their steps
//! themselves, so a new commit is a new step without anybody having to name it; a test compares
//! what a whole small life passes with what the sources ask for.
//!
//! - `CAIRN_FAILPOINT=before:commit:ops/submit_adapter` (or `after:`; `:LINE` and then `#NTH` may
//!   follow; several with commas between): SIGKILL when one is reached the nth time.
//! - `CAIRN_FAILPOINT_TRACE=FILE`: every step passed is appended, a line each.
//!
//! Only in builds with debug assertions; others look at no variable and stop nowhere.
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::panic::Location;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Something is stored here.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    what: &'static str,
    at: &'static Location<'static>,
}

impl Step {
    /// A step of the caller's.
    #[must_use]
    #[track_caller]
    pub fn here(what: &'static str) -> Self {
        Self {
            what,
            at: Location::caller(),
        }
    }

    /// It has not been done.
    pub fn before(self) {
        self.reach("before");
    }

    /// It has been done.
    pub fn after(self) {
        self.reach("after");
    }

    /// Does it.
    pub async fn around<T>(self, work: impl Future<Output = T>) -> T {
        self.before();
        let done = work.await;
        self.after();
        done
    }

    fn reach(self, moment: &'static str) {
        if cfg!(debug_assertions) {
            ARMED.reach(moment, self);
        }
    }

    /// The source file without `src/` and `.rs`.
    fn place(self) -> &'static str {
        let file = self.at.file();
        let inside = file.rsplit_once("src/").map_or(file, |(_, inside)| inside);
        inside.strip_suffix(".rs").unwrap_or(inside)
    }
}

/// What the environment asks for, read once.
static ARMED: LazyLock<Armed> = LazyLock::new(|| Armed {
    targets: std::env::var("CAIRN_FAILPOINT")
        .iter()
        .flat_map(|text| text.split(','))
        .map(Target::read)
        .collect(),
    trace: std::env::var_os("CAIRN_FAILPOINT_TRACE")
        .and_then(|path| OpenOptions::new().append(true).create(true).open(path).ok()),
});

struct Armed {
    targets: Vec<Target>,
    trace: Option<File>,
}

struct Target {
    name: String,
    /// How often it has yet to be reached.
    left: AtomicU32,
}

impl Target {
    fn read(text: &str) -> Self {
        let (name, nth) = match text.split_once('#') {
            Some((name, nth)) => (name, nth.parse().unwrap_or(1)),
            None => (text, 1),
        };
        Self {
            name: name.to_owned(),
            left: AtomicU32::new(nth),
        }
    }
}

impl Armed {
    fn reach(&self, moment: &str, step: Step) {
        if self.targets.is_empty() && self.trace.is_none() {
            return;
        }
        let name = format!("{moment}:{}:{}", step.what, step.place());
        let exact = format!("{name}:{}", step.at.line());
        if let Some(mut trace) = self.trace.as_ref() {
            // One write: lines of several threads do not mix.
            let _ = trace.write_all(format!("{exact}\n").as_bytes());
        }
        let met = |target: &&Target| target.name == name || target.name == exact;
        for target in self.targets.iter().filter(met) {
            if target.left.fetch_sub(1, Ordering::Relaxed) == 1 {
                die();
            }
        }
    }
}

/// As a power cut would have it: nothing is flushed, nothing is dropped.
fn die() {
    use rustix::process::{Signal, getpid, kill_process};
    let _ = kill_process(getpid(), Signal::KILL);
    // Not one step further, should the signal be on its way.
    std::thread::park();
}
