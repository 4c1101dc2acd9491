//! The Merkle log: every leaf is there and hashes to its node, and every node to the one above.
use cairn_stack::merkle::{Hash, leaf_hash, node_hash};

use super::Problem;
use crate::db::Tx;
use crate::db::check::log_nodes;
use crate::db::log::{log_entries, log_size};
use crate::error::Error;

/// Rows read in one query.
const PAGE: u32 = 1_000;
/// What is wrong is listed up to here: behind the first wrong leaf, all is.
const FOUND_MAX: usize = 20;

/// Checks the log as long as it was when this began; returns its length. Memory: 32 bytes an entry.
pub(super) async fn check(tx: &mut Tx, problems: &mut Vec<Problem>) -> Result<u64, Error> {
    let size = log_size(tx).await?;
    let mut found = Vec::new();
    let mut below = leaves(tx, size, &mut found).await?;
    compare(tx, 0, &below, &mut found).await?;
    let mut level = 0;
    while below.len() > 1 && found.len() < FOUND_MAX {
        level += 1;
        let pairs = below.chunks_exact(2);
        below = pairs.map(|pair| node_hash(&pair[0], &pair[1])).collect();
        compare(tx, level, &below, &mut found).await?;
    }
    found.truncate(FOUND_MAX);
    problems.extend(found.into_iter().map(|what| Problem::Contradiction {
        rule: "the log is not the tree that its heads sign",
        what,
    }));
    Ok(size)
}

/// The hashes of the leaves, computed from their bodies.
async fn leaves(tx: &mut Tx, size: u64, found: &mut Vec<String>) -> Result<Vec<Hash>, Error> {
    let mut hashes = Vec::new();
    while (hashes.len() as u64) < size {
        let next = hashes.len() as u64;
        let page = log_entries(tx, next, PAGE).await?;
        for (index, entry) in (next..size).zip(&page) {
            if entry.index != index {
                found.push(format!("entry {index} of {size} is not there"));
                return Ok(hashes);
            }
            hashes.push(leaf_hash(entry.body.as_bytes()));
        }
        if page.is_empty() {
            found.push(format!("entry {next} of {size} is not there"));
            return Ok(hashes);
        }
    }
    Ok(hashes)
}

/// Compares the nodes of one level with what they must be.
async fn compare(
    tx: &mut Tx,
    level: u32,
    expected: &[Hash],
    found: &mut Vec<String>,
) -> Result<(), Error> {
    let mut next = 0;
    while next < expected.len() && found.len() < FOUND_MAX {
        let page = log_nodes(tx, level, next as u64, PAGE).await?;
        let count = page.len();
        for ((position, hash), expected) in page.into_iter().zip(&expected[next..]) {
            if position != next as u64 || hash != Some(*expected) {
                found.push(format!("node {next} of level {level} is wrong"));
                return Ok(());
            }
            next += 1;
        }
        if count == 0 {
            found.push(format!("node {next} of level {level} is not there"));
            return Ok(());
        }
    }
    Ok(())
}
