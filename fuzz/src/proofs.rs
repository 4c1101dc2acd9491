//! Merkle proofs: sizes and places, and the hashes of a proof.

use cairn_stack::merkle::{
    Hash, consistency_proof, inclusion_proof, leaf_hash, root, verify_consistency, verify_inclusion,
};

use crate::input::Input;

/// Most leaves of the tree that proofs are tried on.
const LEAVES_MAX: u64 = 70;

/// No proof but the one that the tree gives is ever believed, and no number of any size upsets the
/// check.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let mut number = || u64::from_le_bytes([(); 8].map(|()| input.byte()));
    let (size, index) = (number(), number());
    let (hashes, rest) = input.0.as_chunks();
    let mut proof: Vec<Hash> = hashes.to_vec();
    // Any sizes: whatever comes out, it comes.
    let any = proof.first().copied().unwrap_or_default();
    let _ = verify_inclusion(&any, index, size, &proof, &any);
    let _ = verify_consistency(index, &any, size, &any, &proof);

    let leaves: Vec<Hash> = (0..size % (LEAVES_MAX + 1))
        .map(|leaf| leaf_hash(&leaf.to_le_bytes()))
        .collect();
    let (size, top) = (leaves.len() as u64, root(&leaves));
    let index = index % (LEAVES_MAX + 1);
    let leaf = leaf_hash(&index.to_le_bytes());
    let (within, onward) = (
        inclusion_proof(&leaves, index),
        consistency_proof(&leaves, index),
    );
    // Bytes behind the hashes choose a real proof, and which of its hashes stand in.
    if let Some((kind, places)) = rest.split_first()
        && let Some(real) = [&within, &onward][usize::from(kind % 2)]
    {
        for place in places {
            proof.extend(real.get(usize::from(*place)));
        }
    }
    let believed = verify_inclusion(&leaf, index, size, &proof, &top);
    assert_eq!(believed, within.is_some_and(|real| real == proof));
    let old = leaves.get(..index as usize).map(root).unwrap_or_default();
    let believed = verify_consistency(index, &old, size, &top, &proof);
    assert_eq!(believed, onward.is_some_and(|real| real == proof));
}

/// Real proofs of trees of several sizes.
pub fn seeds() -> Vec<Vec<u8>> {
    let seed = |size: u64, index: u64, chosen: &[u8]| {
        [&size.to_le_bytes()[..], &index.to_le_bytes(), chosen].concat()
    };
    vec![
        seed(8, 3, &[0, 0, 1, 2]),
        seed(7, 6, &[0, 0, 1]),
        seed(8, 4, &[1, 0]),
        seed(70, 33, &[1, 0, 1, 2, 3, 4, 5, 6, 7]),
        seed(u64::MAX, u64::MAX - 1, &[0; 64 * 32]),
        seed(1 << 63, (1 << 63) - 1, &[9; 32]),
    ]
}
