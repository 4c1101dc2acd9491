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
