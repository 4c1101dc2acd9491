use proptest::prelude::*;

use super::*;

/// Leaves and roots of Certificate Transparency's own tests.
const LEAVES: [&str; 8] = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
];

fn leaves(count: usize) -> Vec<Hash> {
    (0..count)
        .map(|number| leaf_hash(&number.to_le_bytes()))
        .collect()
}

/// The leaves of Certificate Transparency's tests, hashed.
fn known_leaves() -> Vec<Hash> {
    LEAVES
        .iter()
        .map(|text| leaf_hash(&hex::decode(text).unwrap()))
        .collect()
}

fn known(hashes: &[&str]) -> Vec<Hash> {
    hashes
        .iter()
        .map(|text| hex::decode(text).unwrap().try_into().unwrap())
        .collect()
}

const NODE_0_1: &str = "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125";
const NODE_2_3: &str = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e";
const NODE_4_5: &str = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a";
const NODE_6_7: &str = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0";
const NODE_0_3: &str = "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7";
const NODE_4_7: &str = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4";
const LEAF_0: &str = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d";
const LEAF_1: &str = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7";
const LEAF_4: &str = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b";

#[test]
fn inclusion_proofs_are_those_of_certificate_transparency() {
    let all = known_leaves();
    let vectors: [(u64, usize, &[&str]); 5] = [
        (0, 1, &[]),
        (0, 8, &[LEAF_1, NODE_2_3, NODE_4_7]),
        (5, 8, &[LEAF_4, NODE_6_7, NODE_0_3]),
        (2, 3, &[NODE_0_1]),
        (1, 5, &[LEAF_0, NODE_2_3, LEAF_4]),
    ];
    for (index, size, proof) in vectors {
        let (leaves, proof) = (&all[..size], known(proof));
        assert_eq!(inclusion_proof(leaves, index), Some(proof.clone()));
        let leaf = &leaves[index as usize];
        let top = root(leaves);
        assert!(verify_inclusion(leaf, index, size as u64, &proof, &top));
    }
}

#[test]
fn consistency_proofs_are_those_of_certificate_transparency() {
    let all = known_leaves();
    let vectors: [(usize, usize, &[&str]); 4] = [
        (1, 1, &[]),
        (1, 8, &[LEAF_1, NODE_2_3, NODE_4_7]),
        (6, 8, &[NODE_4_5, NODE_6_7, NODE_0_3]),
        (2, 5, &[NODE_2_3, LEAF_4]),
    ];
    for (old, new, proof) in vectors {
        let proof = known(proof);
        assert_eq!(
            consistency_proof(&all[..new], old as u64),
            Some(proof.clone())
        );
        let (before, after) = (root(&all[..old]), root(&all[..new]));
        assert!(verify_consistency(
            old as u64, &before, new as u64, &after, &proof
        ));
    }
}

#[test]
fn roots_are_those_of_certificate_transparency() {
    let hashes = known_leaves();
    for (size, expected) in [
        (
            0,
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ),
        (
            1,
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        ),
        (
            2,
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        ),
        (
            3,
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        ),
        (4, NODE_0_3),
        (
            5,
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        ),
        (
            6,
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        ),
        (
            7,
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        ),
        (
            8,
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ),
    ] {
        assert_eq!(hex::encode(root(&hashes[..size])), expected, "{size}");
    }
}

#[test]
fn a_growing_tree_has_the_same_roots() {
    let all = leaves(70);
    let mut growing = Growing::default();
    for size in 0..all.len() {
        assert_eq!(
            (growing.root(), growing.size()),
            (root(&all[..size]), size as u64)
        );
        growing.push(all[size]);
    }
}

#[test]
fn every_leaf_is_proved_and_nothing_else() {
    for size in 1..=40 {
        let all = leaves(size);
        let top = root(&all);
        for (index, leaf) in all.iter().enumerate() {
            let (at, total) = (index as u64, size as u64);
            let proof = inclusion_proof(&all, at).unwrap();
            assert!(verify_inclusion(leaf, at, total, &proof, &top));
            let other = leaf_hash(b"other");
            assert!(!verify_inclusion(&other, at, total, &proof, &top));
            assert!(!verify_inclusion(leaf, at, total, &proof, &other));
            for wrong in 0..total + 2 {
                assert_eq!(
                    verify_inclusion(leaf, wrong, total, &proof, &top),
                    wrong == at
                );
            }
            for node in 0..proof.len() {
                let mut changed = proof.clone();
                changed[node][31] ^= 1;
                assert!(!verify_inclusion(leaf, at, total, &changed, &top));
            }
            let mut longer = proof.clone();
            longer.push(top);
            assert!(!verify_inclusion(leaf, at, total, &longer, &top));
            if !proof.is_empty() {
                assert!(!verify_inclusion(leaf, at, total, &proof[1..], &top));
            }
        }
        assert_eq!(inclusion_proof(&all, size as u64), None);
    }
}

#[test]
fn a_continued_tree_is_proved_and_a_rewritten_one_is_not() {
    for new in 1..=40_usize {
        let all = leaves(new);
        let new_root = root(&all);
        for old in 1..=new {
            let old_root = root(&all[..old]);
            let (before, after) = (old as u64, new as u64);
            let proof = consistency_proof(&all, before).unwrap();
            assert!(
                verify_consistency(before, &old_root, after, &new_root, &proof),
                "{old} {new}"
            );
            let mut rewritten = all[..old].to_vec();
            rewritten[old / 2][0] ^= 1;
            let bad = root(&rewritten);
            assert!(!verify_consistency(before, &bad, after, &new_root, &proof));
            assert!(!verify_consistency(before, &old_root, after, &bad, &proof));
            for node in 0..proof.len() {
                let mut changed = proof.clone();
                changed[node][0] ^= 1;
                assert!(!verify_consistency(
                    before, &old_root, after, &new_root, &changed
                ));
            }
            if old < new {
                let mut longer = proof.clone();
                longer.push(new_root);
                assert!(!verify_consistency(
                    before, &old_root, after, &new_root, &longer
                ));
            }
        }
        assert_eq!(consistency_proof(&all, 0), None);
        assert_eq!(consistency_proof(&all, new as u64 + 1), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tree_of_any_size_grows_and_proves(
        (new, old, index) in (1_usize..3_000).prop_flat_map(|new| (Just(new), 1..=new, 0..new)),
        other in 0_usize..3_000,
    ) {
        let all = leaves(new);
        let (before, after) = (root(&all[..old]), root(&all));
        let mut growing = Growing::default();
        for leaf in &all[..old] {
            growing.push(*leaf);
        }
        prop_assert_eq!(growing.root(), before);
        for leaf in &all[old..] {
            growing.push(*leaf);
        }
        prop_assert_eq!(growing.root(), after);

        let (size, at) = (new as u64, index as u64);
        let proof = inclusion_proof(&all, at).unwrap();
        prop_assert!(proof.len() <= 12, "one node a level");
        prop_assert!(verify_inclusion(&all[index], at, size, &proof, &after));
        let wrong = (other % new) as u64;
        prop_assert_eq!(verify_inclusion(&all[index], wrong, size, &proof, &after), wrong == at);

        let proof = consistency_proof(&all, old as u64).unwrap();
        prop_assert!(proof.len() <= 13);
        prop_assert!(verify_consistency(old as u64, &before, size, &after, &proof));
        // Any old leaf replaced is another history.
        let mut rewritten = all[..old].to_vec();
        rewritten[other % old][other % 32] ^= 1;
        prop_assert!(!verify_consistency(old as u64, &root(&rewritten), size, &after, &proof));
    }
}
