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

#[test]
fn roots_are_those_of_certificate_transparency() {
    let hashes: Vec<Hash> = LEAVES
        .iter()
        .map(|text| leaf_hash(&hex::decode(text).unwrap()))
        .collect();
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
