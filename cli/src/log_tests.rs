use cairn_stack::digest::Digest;
use ed25519_dalek::SigningKey;

use super::*;

struct World {
    key: SigningKey,
    folder: tempfile::TempDir,
    lines: Vec<Line>,
    tree: Growing,
}

impl World {
    fn new(entries: u64) -> Self {
        let mut world = Self {
            key: SigningKey::from_bytes(&[3; 32]),
            folder: tempfile::tempdir().unwrap(),
            lines: Vec::new(),
            tree: Growing::default(),
        };
        world.lines.push(Line::Start {
            server: "here".into(),
            key: hex::encode(world.key.verifying_key().as_bytes()),
        });
        for index in 0..entries {
            world.receipt(index);
        }
        world.head();
        world
    }

    /// Adds a receipt to the log and keeps it as a worker does.
    fn receipt(&mut self, index: u64) {
        let statement = ReceiptStatement {
            submission: format!("s{index}"),
            lease: "l".into(),
            worker: "w".into(),
            round: "r".into(),
            shard: 1,
            adapter: Digest::of(&index.to_le_bytes()),
            adapter_bytes: 9,
            received_ms: 1,
            verdict: "pending".into(),
            reason: String::new(),
            credit_tokens: 0,
            log_index: index,
        };
        let receipt = statement.sign(&self.key).unwrap();
        let body = String::from_utf8(receipt.statement).unwrap();
        let kept = json!({"statement": body, "signature": hex::encode(&receipt.signature), "verdict": null});
        let folder = self.folder.path().join("receipts");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("s{index}.json")), kept.to_string()).unwrap();
        self.tree.push(leaf_hash(body.as_bytes()));
        let kind = "receipt".to_owned();
        self.lines.push(Line::Entry { index, kind, body });
    }

    fn head(&mut self) {
        let statement = TreeHeadStatement {
            size: self.tree.size(),
            root: hex::encode(self.tree.root()),
            time_ms: 5,
        };
        let head = statement.sign(&self.key).unwrap();
        self.lines.push(Line::Head {
            head: String::from_utf8(head.statement).unwrap(),
            signature: hex::encode(&head.signature),
        });
    }

    fn write(&self) -> PathBuf {
        let file = self.folder.path().join("log.jsonl");
        append(&file, 0, &self.lines).unwrap();
        file
    }

    /// The lines as a stranger reads them from the file.
    fn write_read(&self) -> Vec<Line> {
        let text = fs::read_to_string(self.write()).unwrap();
        let lines = text.lines().map(serde_json::from_str);
        lines.map(Result::unwrap).collect()
    }

    fn verify(&self) -> Result<()> {
        verify_file(self.write(), Some(self.folder.path().join("receipts")))
    }
}

fn verify_file(file: PathBuf, receipts: Option<PathBuf>) -> Result<()> {
    let args = VerifyArgs {
        file,
        receipts,
        key: None,
    };
    verify(&args, Output::Json)
}

#[test]
fn a_sound_log_with_all_receipts_passes() {
    World::new(7).verify().unwrap();
    let mut grown = World::new(3);
    grown.receipt(3);
    grown.head();
    grown.verify().unwrap();
}

#[test]
fn any_changed_byte_of_any_line_is_caught() {
    let world = World::new(3);
    let sound = fs::read(world.write()).unwrap();
    let file = world.folder.path().join("bent.jsonl");
    let mut caught = 0;
    for at in 0..sound.len() {
        let mut bent = sound.clone();
        bent[at] ^= 1;
        fs::write(&file, &bent).unwrap();
        let receipts = world.folder.path().join("receipts");
        let name = sound[..at].ends_with(b"\"server\":\"") || {
            // The server's name is a remark: nothing rests on it.
            let line = sound.iter().position(|byte| *byte == b'\n').unwrap();
            at < line
                && String::from_utf8_lossy(&sound[..=at]).contains("\"server\":\"")
                && !String::from_utf8_lossy(&sound[..=at]).contains("\"key\"")
        };
        let result = verify_file(file.clone(), Some(receipts));
        assert!(result.is_err() || name, "byte {at} of {}", sound.len());
        caught += usize::from(result.is_err());
    }
    assert!(caught > sound.len() - 20);
}

/// The error of a log that was changed; its receipts are those of the log as it was.
fn said(world: &World, change: impl FnOnce(&mut Vec<Line>)) -> String {
    let mut lines = world.write_read();
    change(&mut lines);
    let file = world.folder.path().join("changed.jsonl");
    append(&file, 0, &lines).unwrap();
    let receipts = world.folder.path().join("receipts");
    let with = verify_file(file.clone(), Some(receipts)).unwrap_err();
    // A stranger has no receipts; what is told must not rest on them.
    let without = verify_file(file, None).unwrap_err();
    format!("{with:#}\n{without:#}")
}

/// What a stranger does: a log of several heads is sound, and each way to change it is caught.
#[test]
fn a_stranger_catches_every_change_under_several_heads() {
    let mut world = World::new(4);
    world.receipt(4);
    world.head();
    for index in 5..9 {
        world.receipt(index);
    }
    world.head();
    world.verify().unwrap();
    let copy = read(&world.write(), None, &mut |_, _| Ok(())).unwrap();
    assert_eq!((copy.heads, copy.receipts, copy.is_closed()), (3, 9, true));

    // One byte of an entry, with all that the entry says of itself left in order.
    let text = said(&world, |lines| {
        let Line::Entry { body, .. } = &mut lines[3] else {
            panic!("line 4 is an entry");
        };
        *body = body.replace("\"worker\":\"w\"", "\"worker\":\"x\"");
    });
    assert!(text.contains("an entry was changed"), "{text}");
    assert!(text.contains("line 6 of"), "the first head above: {text}");

    // An entry taken out, and the rest numbered anew so that nothing else shows.
    let text = said(&world, |lines| {
        lines.remove(3);
        let mut next = 0;
        for line in lines {
            if let Line::Entry { index, body, .. } = line {
                *body = body.replace(
                    &format!("\"log_index\":{index}"),
                    &format!("\"log_index\":{next}"),
                );
                (*index, next) = (next, next + 1);
            }
        }
    });
    assert!(
        text.contains("the head is over 4 entries, the copy has 3"),
        "{text}"
    );
    // An entry taken out and nothing more.
    let text = said(&world, |lines| drop(lines.remove(3)));
    assert!(text.contains("entry 3 stands where 2 belongs"), "{text}");

    // Two entries swapped, as they are and with their places put right.
    let text = said(&world, |lines| lines.swap(2, 3));
    assert!(text.contains("entry 2 stands where 1 belongs"), "{text}");
    let text = said(&world, |lines| {
        lines.swap(2, 3);
        for (line, place) in lines[2..4].iter_mut().zip(1..) {
            if let Line::Entry { index, .. } = line {
                *index = place;
            }
        }
    });
    assert!(
        text.contains("the receipt in entry 1 says it is entry 2"),
        "{text}"
    );

    // A head over other entries, signed by whoever changed them.
    let forger = World {
        key: SigningKey::from_bytes(&[4; 32]),
        ..World::new(3)
    };
    let text = said(&world, |lines| {
        let mut forger = forger;
        forger.head();
        let head = forger.lines.pop().unwrap();
        lines[5] = head;
    });
    assert!(
        text.contains("the signature does not fit the key"),
        "{text}"
    );
    // The coordinator's own head, over fewer entries than stand before it.
    let text = said(&world, |lines| lines.swap(5, 7));
    assert!(text.contains("over 5 entries, the copy has 4"), "{text}");
    // A head that is left out hides nothing: the next one covers the same entries.
    let mut lines = world.write_read();
    lines.remove(5);
    let file = world.folder.path().join("fewer.jsonl");
    append(&file, 0, &lines).unwrap();
    verify_file(file, None).unwrap();
}

#[test]
fn another_key_is_another_log() {
    let world = World::new(2);
    let args = |key: &str| VerifyArgs {
        file: world.write(),
        receipts: None,
        key: Some(key.to_owned()),
    };
    let own = hex::encode(world.key.verifying_key().as_bytes());
    verify(&args(&own), Output::Json).unwrap();
    let error = format!(
        "{:#}",
        verify(&args(&"0".repeat(64)), Output::Json).unwrap_err()
    );
    assert!(error.contains("not 000"), "{error}");
}

#[test]
fn what_is_wrong_is_said() {
    let mut world = World::new(4);
    world.lines.remove(2);
    let error = format!("{:#}", world.verify().unwrap_err());
    assert!(error.contains("entry 2 stands where 1 belongs"), "{error}");

    let world = World::new(4);
    let extra = world.folder.path().join("receipts/s3.json");
    let kept = fs::read_to_string(&extra).unwrap();
    fs::write(
        &extra,
        kept.replace("\\\"log_index\\\":3", "\\\"log_index\\\":9"),
    )
    .unwrap();
    let error = format!("{:#}", world.verify().unwrap_err());
    assert!(error.contains("older backup"), "{error}");

    let world = World::new(2);
    let file = world.write();
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, &text[..text.len() - 10]).unwrap();
    let error = format!("{:#}", verify_file(file, None).unwrap_err());
    assert!(error.contains("without a signed head"), "{error}");

    let mut signed_by_another = World::new(2);
    signed_by_another.key = SigningKey::from_bytes(&[4; 32]);
    signed_by_another.lines.pop();
    signed_by_another.head();
    assert!(signed_by_another.verify().is_err());
}
