//! The built coordinator is killed before and after every step that stores something, in whole small
//! lives that are driven on to their end: some points in each life, every point once.
//!
//! The steps come from the sources: a commit or a put that nobody thought of here fails the test
//! until the life passes it, or [`ELSEWHERE`] says why it does not.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod keeper;
mod life;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use keeper::{Keeper, Store};
use tokio::time::Instant;

/// Lives at once: they mostly wait.
const LIVES: usize = 6;
/// Deaths in one life, at most: enough that all of them take a minute or two.
const DEATHS: usize = 16;
/// How often a point may be missed before that is a failure: which of two tasks is first may differ.
const TRIES: u32 = 4;

/// Steps that the life does not pass: what is asked for, where, how often there, and why not.
const ELSEWHERE: [(&str, &str, usize, &str); 13] = [
    ("put", "backup", 1, "run by hand, and again when killed"),
    ("put", "carry", 1, "rounds that go on from mean factors"),
    (
        "put",
        "fsck/repair",
        1,
        "run by hand, and again when killed",
    ),
    ("delete", "fsck/repair", 1, "the same"),
    ("commit", "manifests", 1, "checkpoints of older programs"),
    (
        "commit",
        "tasks/advance_rounds",
        1,
        "rounds with learnt weights",
    ),
    (
        "commit",
        "tasks/fold_round",
        2,
        "a head that moved, a revocation during the fold",
    ),
    (
        "commit",
        "tasks/refold",
        2,
        "a replacement that is there, a fold that is refused",
    ),
    (
        "commit",
        "ops/complete_upload",
        1,
        "wrong bytes, straight to a bucket: forgotten now or at the next try",
    ),
    ("delete", "ops/complete_upload", 1, "the same"),
    (
        "commit",
        "server",
        1,
        "one certificate for several coordinators: the first keeps its own",
    ),
    (
        "commit",
        "tasks/share",
        2,
        "several coordinators, who are killed at random elsewhere",
    ),
    (
        "delete",
        "tasks/collect_blobs",
        1,
        "parts without a row: a coordinator killed between the two",
    ),
];

/// One place in the sources that stores something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Site {
    what: String,
    place: String,
    line: usize,
}

/// Every place in the coordinator's sources that stores something.
fn sites() -> BTreeSet<Site> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../coordinator/src");
    let mut found = BTreeSet::new();
    for path in sources(&root) {
        let place = path.strip_prefix(&root).unwrap().with_extension("");
        let place = place.to_str().unwrap().to_owned();
        // These make the steps of those who call them.
        let is_maker = ["failpoint", "db", "blobs", "blobs/parts"].contains(&place.as_str());
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let before = index.checked_sub(1).map_or("", |above| lines[above]);
            for what in asked_for(line, before).filter(|_| !is_maker) {
                found.insert(Site {
                    what,
                    place: place.clone(),
                    line: index + 1,
                });
            }
        }
    }
    found
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// What a line of code stores.
fn asked_for<'a>(line: &'a str, above: &'a str) -> impl Iterator<Item = String> + use<'a> {
    let line = line.trim();
    let calls = [
        ("tx.commit()", "commit"),
        (".put_bytes(", "put"),
        (".put_file(", "put"),
        (".put_verified(", "put"),
        ("blobs.compose(", "put"),
        ("blobs.delete_parts(", "delete"),
    ];
    let named = calls
        .into_iter()
        .filter(move |(call, _)| !line.starts_with("//") && line.contains(call))
        .map(|(_, what)| what.to_owned());
    let deletes = line.contains("blobs.delete(")
        || (line.starts_with(".delete(") && above.trim().ends_with("blobs"));
    let by_hand = line
        .split_once("Step::here(\"")
        .and_then(|(_, rest)| rest.split_once('"'))
        .map(|(what, _)| what.to_owned());
    named
        .chain(deletes.then(|| "delete".to_owned()))
        .chain(by_hand)
}

/// Points in the order in which the first life passes them; each `MOMENT:WHAT:PLACE:LINE`.
fn points(trace: &[String]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let fresh = trace.iter().filter(|point| seen.insert(point.as_str()));
    fresh.cloned().collect()
}

fn site_of(point: &str) -> Option<Site> {
    let mut parts = point.split(':').skip(1);
    Some(Site {
        what: parts.next()?.to_owned(),
        place: parts.next()?.to_owned(),
        line: parts.next()?.parse().ok()?,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn a_life_survives_a_kill_at_every_step() {
    let folder = one_life(Store::Folder).await;
    let bucket = one_life(Store::Bucket).await;
    check_sites(&[folder.as_slice(), &bucket].concat());
    die_at(Store::Folder, folder.clone()).await;
    // What the first walk has been killed at does not know which store it is on.
    let known: BTreeSet<String> = folder.into_iter().collect();
    let puts = |point: &String| point.contains(":put:") || !known.contains(point);
    die_at(Store::Bucket, bucket.into_iter().filter(puts).collect()).await;
}

/// The points that a life without a death passes.
async fn one_life(store: Store) -> Vec<String> {
    let began = Instant::now();
    let mut keeper = Keeper::start(store, &[]).unwrap();
    life::live(&mut keeper).await.unwrap();
    assert_eq!(keeper.deaths(), [""; 0]);
    let points = points(&keeper.trace().unwrap());
    let took = began.elapsed();
    println!(
        "one life on a {store:?}: {took:.1?}, {} points",
        points.len()
    );
    points
}

/// Lives that are killed at each of these points.
async fn die_at(store: Store, points: Vec<String>) {
    let began = Instant::now();
    let total = points.len();
    let (mut left, mut lived) = (points, 0);
    for tries in 0..TRIES {
        // Neighbours in different lives: before and after one commit are two moments.
        let lives = left.len().div_ceil(DEATHS >> tries);
        let deal = |life: usize| left.iter().skip(life).step_by(lives).cloned().collect();
        let dealt: Vec<Vec<String>> = (0..lives).map(deal).collect();
        lived += lives;
        left = live_all(store, dealt).await;
        println!(
            "{lived} lives, {:.1?}: {} points left",
            began.elapsed(),
            left.len()
        );
        if left.is_empty() {
            println!("killed at {total} points on a {store:?}, all of it survived");
            return;
        }
    }
    panic!("never reached: {left:#?}");
}

/// Lives all of them, some at once; returns the points that no life came to.
async fn live_all(store: Store, dealt: Vec<Vec<String>>) -> Vec<String> {
    let dealt = Arc::new(Mutex::new(VecDeque::from(dealt)));
    let hands = (0..LIVES).map(|_| {
        let dealt = dealt.clone();
        tokio::spawn(async move {
            let mut missed = Vec::new();
            loop {
                let Some(points) = dealt.lock().unwrap().pop_front() else {
                    return missed;
                };
                let mut keeper = Keeper::start(store, &points).unwrap();
                if let Err(error) = life::live(&mut keeper).await {
                    panic!("{error:#}; died at {:#?}", keeper.deaths());
                }
                missed.extend(keeper.missed());
            }
        })
    });
    let mut missed = Vec::new();
    for hand in hands.collect::<Vec<_>>() {
        missed.extend(hand.await.unwrap());
    }
    missed
}

/// Nothing that stores something is left out.
fn check_sites(points: &[String]) {
    let passed: BTreeSet<Site> = points.iter().filter_map(|point| site_of(point)).collect();
    let mut missing: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    for site in sites().difference(&passed) {
        let key = (site.what.clone(), site.place.clone());
        missing.entry(key).or_default().push(site.line);
    }
    for (what, place, count, _) in ELSEWHERE {
        let key = (what.to_owned(), place.to_owned());
        let lines = missing.remove(&key).unwrap_or_default();
        assert_eq!(lines.len(), count, "{what} {place} in ELSEWHERE: {lines:?}");
    }
    assert!(missing.is_empty(), "not passed by the life: {missing:#?}");
    let sites = sites();
    let unknown: Vec<&Site> = passed.difference(&sites).collect();
    assert!(unknown.is_empty(), "not found in the sources: {unknown:#?}");
}
