//! A signed manifest: a flag, the signature file, and the manifest. The parser is behind the
//! signature, so the fuzzer signs what it made up, as a coordinator gone bad would.

use cairn_stack::digest::Digest;
use cairn_stack::files::FileEntry;
use cairn_stack::lineage::{
    Contribution, DatasetRef, MANIFEST_FILE, Manifest, SIGNATURE_FILE, Scores, SignedManifest,
    sha256sums, verify_folder,
};
use cairn_stack::recipe::Recipe;
use ed25519_dalek::{Signer, SigningKey};
use serde_json::json;

use crate::input::{Input, join};
use crate::{assert_short, scratch};

/// Flag: the signature is made to fit.
const SIGNED: u8 = 1;
/// What a coordinator puts before the bytes it signs.
const CONTEXT: &[u8] = b"cairn manifest v1\0";

fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

/// The signature file of any bytes.
fn signature(manifest: &[u8]) -> Vec<u8> {
    let key = key();
    let signature = key.sign(&[CONTEXT, manifest].concat());
    json!({
        "algorithm": "ed25519",
        "key": hex(key.verifying_key().as_bytes()),
        "signature": hex(&signature.to_bytes()),
    })
    .to_string()
    .into_bytes()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One manifest has one encoding: what is read encodes, and signs, to the bytes it was read from.
/// Its folder can be verified, whatever is in it.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let signed = input.byte() & SIGNED != 0;
    let given = input.text();
    let bytes = input.0;
    let signature = if signed {
        signature(bytes)
    } else {
        given.to_vec()
    };
    let read = match SignedManifest::from_parts(bytes, &signature) {
        Ok(read) => read,
        Err(error) => return assert_short(&error.to_string()),
    };
    let manifest = read.manifest();
    assert_eq!(read.bytes(), bytes);
    assert_eq!(manifest.canonical_bytes().ok().as_deref(), Some(bytes));
    assert_eq!(manifest.commit().ok(), Some(read.commit()));
    let again =
        SignedManifest::sign(manifest.clone(), &key()).expect("what was read can be signed");
    assert_eq!(again.bytes(), bytes);
    assert_eq!(
        sha256sums(&manifest.files).lines().count(),
        manifest.files.len()
    );
    for contribution in &manifest.contributions {
        assert!(contribution.weight.is_finite());
    }

    let folder = scratch::folder("manifest");
    scratch::write(&folder.join(MANIFEST_FILE), bytes);
    scratch::write(&folder.join(SIGNATURE_FILE), &signature);
    match verify_folder(&folder, Some(&key().verifying_key())) {
        Ok(report) => {
            let files = report.intact.len() + report.changed.len() + report.missing.len();
            assert_eq!(files, manifest.files.len());
        }
        Err(error) => assert_short(&error.to_string()),
    }
}

fn entry(path: &str) -> FileEntry {
    FileEntry {
        path: path.to_owned(),
        size: 3,
        blake3: Digest::of(b"abc"),
        sha256: "0".repeat(64),
    }
}

/// A base and a later revision with everything in it, signed by the fuzzer and by themselves.
pub fn seeds() -> Vec<Vec<u8>> {
    let base = Manifest::new(
        "tiny",
        1_700_000_000_000,
        vec![entry("a.json"), entry("b/c.json")],
    );
    let contribution = |id: &str, weight: f64| Contribution {
        id: id.to_owned(),
        round: "r".to_owned(),
        worker: "w".to_owned(),
        shard: 3,
        tokens: u64::MAX,
        adapter: Digest::of(id.as_bytes()),
        adapter_config: Digest::of(b"config"),
        weight,
    };
    let recipe = "rank = 2\nalpha = 4\ntarget_modules = [\"q_proj\"]\nlearning_rate = 1e-3\n\
                  steps = 9\nbatch_size = 1\nsequence_length = 8\n";
    let later = Manifest {
        revision: 1,
        parent: Some("a".repeat(40)),
        round: Some("r".to_owned()),
        dataset: Some(DatasetRef {
            name: "gsm8k".to_owned(),
            digest: Digest::of(b"d"),
        }),
        recipe: Recipe::parse_toml(recipe).ok(),
        contributions: vec![contribution("s1", 0.1 + 0.2), contribution("s2", -1e-300)],
        scores: Scores {
            gate_before: Some(3.25),
            gate_after: Some(2.0_f64.sqrt()),
            audit_before: None,
            audit_after: Some(0.0),
        },
        ..base.clone()
    };
    let mut seeds = Vec::new();
    for manifest in [base, later] {
        let signed = SignedManifest::sign(manifest, &key()).expect("a sound manifest");
        seeds.push(join(SIGNED, &[b""], signed.bytes()));
        let signature = signed.signature_json();
        seeds.push(join(0, &[signature.as_bytes()], signed.bytes()));
    }
    seeds
}
