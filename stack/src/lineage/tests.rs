use super::*;
use crate::digest::Digest;
use crate::files::FileEntry;
use crate::testing;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn entry(path: &str) -> FileEntry {
    FileEntry {
        path: path.to_owned(),
        size: 3,
        blake3: Digest::of(b"abc"),
        sha256: "0".repeat(64),
    }
}

fn manifest() -> Manifest {
    let contribution = |id: &str, weight: f64| Contribution {
        id: id.to_owned(),
        round: "r1".to_owned(),
        worker: "w".to_owned(),
        shard: 3,
        tokens: u64::MAX,
        adapter: Digest::of(id.as_bytes()),
        adapter_config: Digest::of(b"config"),
        weight,
    };
    Manifest {
        revision: 1,
        parent: Some("a".repeat(40)),
        round: Some("r1".to_owned()),
        dataset: Some(DatasetRef {
            name: "gsm8k".to_owned(),
            digest: Digest::of(b"d"),
        }),
        recipe: Some(testing::recipe()),
        // The last digits matter: each of these is one bit away from its neighbour.
        contributions: vec![
            contribution("s1", 0.1 + 0.2),
            contribution("s2", 0.083_712_367_123_612_37),
            contribution("s3", -1e-300),
        ],
        scores: Scores {
            gate_before: Some(3.25),
            gate_after: Some(2.0_f64.sqrt()),
            audit_before: None,
            audit_after: None,
        },
        ..Manifest::new(
            "tiny",
            1_700_000_000_000,
            vec![entry("config.json"), entry("sub/x.json")],
        )
    }
}

#[test]
fn canonical_bytes_read_back_to_the_same_bits() {
    let signed = SignedManifest::sign(manifest(), &key(1)).unwrap();
    let read =
        SignedManifest::from_parts(signed.bytes(), signed.signature_json().as_bytes()).unwrap();
    assert_eq!(read, signed);
    for (found, expected) in read
        .manifest()
        .contributions
        .iter()
        .zip(manifest().contributions)
    {
        assert_eq!(found.weight.to_bits(), expected.weight.to_bits());
    }
    assert_eq!(
        signed.commit(),
        Digest::of(signed.bytes()).to_string()[..40]
    );
    assert_eq!(signed.commit(), manifest().commit().unwrap());
    let text = String::from_utf8(signed.bytes().to_vec()).unwrap();
    assert!(text.starts_with("{\"base\":[{\"blake3\":\""), "{text}");
    assert!(text.contains("\"weight\":\"0.30000000000000004\"") && text.contains("rank = 2\\n"));
    assert!(!text.contains(": ") && !text.contains('\n'));
}

#[test]
fn any_changed_byte_breaks_the_signature() {
    let signed = SignedManifest::sign(manifest(), &key(1)).unwrap();
    let signature = signed.signature_json();
    for place in (0..signed.bytes().len()).step_by(97) {
        let mut bytes = signed.bytes().to_vec();
        bytes[place] ^= 1;
        assert!(matches!(
            SignedManifest::from_parts(&bytes, signature.as_bytes()),
            Err(LineageError::WrongSignature)
        ));
    }
    let other = SignedManifest::sign(manifest(), &key(2)).unwrap();
    let swapped = signature.replace(&signed.key_hex(), &other.key_hex());
    assert!(matches!(
        SignedManifest::from_parts(signed.bytes(), swapped.as_bytes()),
        Err(LineageError::WrongSignature)
    ));
    // The same bytes, signed without the context.
    let bare = hex::encode(key(1).sign(signed.bytes()).to_bytes());
    let bare = format!(
        "{{\"algorithm\":\"ed25519\",\"key\":\"{}\",\"signature\":\"{bare}\"}}",
        signed.key_hex()
    );
    assert!(matches!(
        SignedManifest::from_parts(signed.bytes(), bare.as_bytes()),
        Err(LineageError::WrongSignature)
    ));
    signed.expect_key(&key(1).verifying_key()).unwrap();
    assert!(matches!(
        signed.expect_key(&key(2).verifying_key()),
        Err(LineageError::WrongKey { .. })
    ));
    for malformed in [
        "",
        "{}",
        "[]",
        &signature.replace("ed25519", "rsa"),
        &signature.replace("\"key\"", "\"kee\""),
        &" ".repeat(5000),
    ] {
        assert!(
            SignedManifest::from_parts(signed.bytes(), malformed.as_bytes()).is_err(),
            "{malformed}"
        );
    }
}

#[test]
fn only_the_canonical_encoding_is_read() {
    let sign = |bytes: &[u8]| {
        let signature = hex::encode(key(1).sign(&message(bytes)).to_bytes());
        let file = format!(
            "{{\"algorithm\":\"ed25519\",\"key\":\"{}\",\"signature\":\"{signature}\"}}",
            hex::encode(key(1).verifying_key().as_bytes())
        );
        SignedManifest::from_parts(bytes, file.as_bytes())
    };
    let text = String::from_utf8(manifest().canonical_bytes().unwrap()).unwrap();
    assert!(sign(text.as_bytes()).is_ok());
    for (from, to) in [
        ("{\"base\"", "{ \"base\""),
        ("\"0.30000000000000004\"", "\"0.300000000000000040\""),
        ("}", "}\n"),
        ("\"revision\":1", "\"revision\":1,\"extra\":1"),
        ("\"revision\":1", "\"revision\":1,\"revision\":1"),
    ] {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text);
        assert!(sign(changed.as_bytes()).is_err(), "{to}");
    }
}

#[test]
fn nonsense_is_neither_signed_nor_read() {
    let refused = |field: &str, change: fn(&mut Manifest)| {
        let mut changed = manifest();
        change(&mut changed);
        match SignedManifest::sign(changed, &key(1)) {
            Err(LineageError::Invalid { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    };
    refused("schema", |m| m.schema = 2);
    refused("model", |m| m.model.clear());
    refused("parent", |m| m.parent = Some("A".repeat(40)));
    refused("revision", |m| m.revision = 0);
    refused("revision", |m| m.parent = None);
    refused("contribution weight", |m| {
        m.contributions[0].weight = f64::NAN;
    });
    refused("contribution worker", |m| {
        m.contributions[0].worker = "a\nb".to_owned();
    });
    refused("scores", |m| m.scores.gate_after = Some(f64::INFINITY));
    refused("files", |m| m.files[0].path = "../../etc/passwd".to_owned());
    refused("files", |m| m.files[0].path = MANIFEST_FILE.to_owned());
    refused("files", |m| m.files[1].path = "Config.json".to_owned());
    refused("files", |m| m.files.reverse());
    refused("base", |m| m.base[0].sha256 = "F".repeat(64));
}

#[test]
fn a_folder_is_what_its_manifest_says_or_not() {
    let dir = tempfile::tempdir().unwrap();
    testing::checkpoint(dir.path(), 1);
    let names = crate::checkpoint::Checkpoint::open(dir.path())
        .unwrap()
        .files();
    let files: Vec<FileEntry> = names
        .iter()
        .map(|name| FileEntry::of_file(dir.path(), name).unwrap())
        .collect();
    let signed = SignedManifest::sign(Manifest::new("tiny", 5, files.clone()), &key(1)).unwrap();
    signed.write(dir.path()).unwrap();
    let trusted = key(1).verifying_key();
    let report = verify_folder(dir.path(), Some(&trusted)).unwrap();
    assert!(report.is_intact() && report.unexpected.is_empty());
    assert_eq!((report.intact, report.signed), (names, signed));
    let sums = fs::read_to_string(dir.path().join(CHECKSUMS_FILE)).unwrap();
    assert_eq!(sums, sha256sums(&files));
    assert!(sums.contains("  model.safetensors\n"));

    fs::write(dir.path().join("note.txt"), "mine").unwrap();
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let report = verify_folder(dir.path(), None).unwrap();
    assert!(!report.is_intact());
    assert_eq!(report.changed, ["model.safetensors"]);
    assert_eq!(report.missing, ["tokenizer.json"]);
    assert_eq!(report.unexpected, ["note.txt"]);
    assert!(matches!(
        verify_folder(dir.path(), Some(&key(2).verifying_key())),
        Err(LineageError::WrongKey { .. })
    ));
    fs::remove_file(dir.path().join(SIGNATURE_FILE)).unwrap();
    assert!(
        verify_folder(dir.path(), None)
            .unwrap_err()
            .to_string()
            .contains(SIGNATURE_FILE)
    );
}
