//! Merkle trees as in RFC 6962 (and RFC 9162, section 2.1): SHA-256, leaves hashed behind a 0x00
//! byte, nodes behind 0x01, so that no node passes for a leaf.
//!
//! The coordinator's log and a worker's commitment to its training states are such trees. A proof is
//! some thirty hashes for a billion leaves; checking one needs nothing but this file.

use sha2::{Digest as _, Sha256};

/// A SHA-256.
pub type Hash = [u8; 32];

/// Longest proof: one node a level, and sizes are 64-bit numbers.
pub const PROOF_NODES_MAX: usize = 64;

/// Hash of a leaf's bytes.
#[must_use]
pub fn leaf_hash(bytes: &[u8]) -> Hash {
    Sha256::new()
        .chain_update([0])
        .chain_update(bytes)
        .finalize()
        .into()
}

/// Hash of two subtrees.
#[must_use]
pub fn node_hash(left: &Hash, right: &Hash) -> Hash {
    Sha256::new()
        .chain_update([1])
        .chain_update(left)
        .chain_update(right)
        .finalize()
        .into()
}

/// Root of the tree over hashed leaves; of nothing, the SHA-256 of nothing.
#[must_use]
pub fn root(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => Sha256::new().finalize().into(),
        [leaf] => *leaf,
        _ => {
            let (left, right) = leaves.split_at(left_size(leaves.len()));
            node_hash(&root(left), &root(right))
        }
    }
}

/// The largest power of two below `size`, which is 2 or more.
fn left_size(size: usize) -> usize {
    let half = size.next_power_of_two() / 2;
    half.max(1)
}

/// The root of a tree that grows leaf by leaf, in memory of its height.
#[derive(Debug, Clone, Default)]
pub struct Growing {
    size: u64,
    /// Roots of the complete subtrees, largest first.
    peaks: Vec<Hash>,
}

impl Growing {
    /// Adds a hashed leaf.
    pub fn push(&mut self, leaf: Hash) {
        let mut hash = leaf;
        // One subtree of each size that is a set bit of the count.
        for _ in 0..self.size.trailing_ones() {
            if let Some(left) = self.peaks.pop() {
                hash = node_hash(&left, &hash);
            }
        }
        self.peaks.push(hash);
        self.size += 1;
    }

    /// How many leaves there are.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// As [`root`] of all of them.
    #[must_use]
    pub fn root(&self) -> Hash {
        let mut peaks = self.peaks.iter().rev().copied();
        let Some(last) = peaks.next() else {
            return root(&[]);
        };
        peaks.fold(last, |right, left| node_hash(&left, &right))
    }
}

/// The siblings on the way from a leaf to the root, leaf upwards; nothing when there is no such leaf.
#[must_use]
pub fn inclusion_proof(leaves: &[Hash], index: u64) -> Option<Vec<Hash>> {
    let mut index = usize::try_from(index).ok().filter(|i| *i < leaves.len())?;
    let (mut leaves, mut proof) = (leaves, Vec::new());
    while leaves.len() > 1 {
        let (left, right) = leaves.split_at(left_size(leaves.len()));
        if index < left.len() {
            proof.push(root(right));
            leaves = left;
        } else {
            proof.push(root(left));
            index -= left.len();
            leaves = right;
        }
    }
    proof.reverse();
    Some(proof)
}

/// Whether `proof` shows `leaf` at `index` in the tree of this size and root (RFC 9162, 2.1.3.2).
#[must_use]
pub fn verify_inclusion(leaf: &Hash, index: u64, size: u64, proof: &[Hash], root: &Hash) -> bool {
    if index >= size || proof.len() > PROOF_NODES_MAX {
        return false;
    }
    let (mut node, mut last, mut hash) = (index, size - 1, *leaf);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            hash = node_hash(sibling, &hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && hash == *root
}

/// What shows that the tree over all `leaves` goes on from that over the first `old`; nothing when
/// `old` is 0 or too many.
#[must_use]
pub fn consistency_proof(leaves: &[Hash], old: u64) -> Option<Vec<Hash>> {
    let mut old = usize::try_from(old)
        .ok()
        .filter(|old| (1..=leaves.len()).contains(old))?;
    let (mut leaves, mut proof, mut whole) = (leaves, Vec::new(), true);
    while old < leaves.len() {
        let (left, right) = leaves.split_at(left_size(leaves.len()));
        if old <= left.len() {
            proof.push(root(right));
            leaves = left;
        } else {
            proof.push(root(left));
            old -= left.len();
            leaves = right;
            whole = false;
        }
    }
    if !whole {
        proof.push(root(leaves));
    }
    proof.reverse();
    Some(proof)
}

/// Whether `proof` shows that the newer tree starts with all of the older (RFC 9162, 2.1.4.2).
#[must_use]
pub fn verify_consistency(
    old_size: u64,
    old_root: &Hash,
    new_size: u64,
    new_root: &Hash,
    proof: &[Hash],
) -> bool {
    if old_size == 0 || old_size > new_size || proof.len() > PROOF_NODES_MAX {
        return false;
    }
    if old_size == new_size {
        return proof.is_empty() && old_root == new_root;
    }
    // A whole subtree is its own first node; RFC 9162 leaves it out of the proof.
    let first = old_size.is_power_of_two().then_some(old_root);
    let mut nodes = first.into_iter().chain(proof);
    let Some(first) = nodes.next() else {
        return false;
    };
    let (mut node, mut last) = (old_size - 1, new_size - 1);
    while node & 1 == 1 {
        node >>= 1;
        last >>= 1;
    }
    let (mut old_hash, mut new_hash) = (*first, *first);
    for sibling in nodes {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            old_hash = node_hash(sibling, &old_hash);
            new_hash = node_hash(sibling, &new_hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            new_hash = node_hash(&new_hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && old_hash == *old_root && new_hash == *new_root
}

#[cfg(test)]
#[path = "merkle_tests.rs"]
mod tests;
