//! The coordinator's log of receipts and published manifests: a copy of it, and what it proves.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cairn_proto::signing::{ReceiptStatement, TreeHeadStatement};
use cairn_proto::v1;
use cairn_stack::merkle::{Growing, leaf_hash};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::Globals;
use crate::output::Output;
use crate::session;

/// Longest line of a copy, bytes: receipts and manifest entries stay below two thousand.
const LINE_BYTES_MAX: usize = 64 * 1024;
/// Largest receipt file of a worker, bytes.
const RECEIPT_BYTES_MAX: u64 = 64 * 1024;
/// Entries asked for at once; the coordinator gives no more.
const PAGE: i32 = 1_000;

#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// Download the log, or what is new since the last time, and check that it goes on from there
    #[command(after_help = "Example:\n  cairn log pull cairn-log.jsonl")]
    Pull(PullArgs),
    /// Check a copy offline: the root, every signature, and a worker's receipts
    #[command(
        after_help = "Examples:\n  cairn log verify cairn-log.jsonl\n  cairn log verify cairn-log.jsonl --receipts ~/.local/share/cairn/receipts"
    )]
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
pub struct PullArgs {
    /// The copy, JSON lines; made or continued
    file: PathBuf,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The copy
    file: PathBuf,
    /// A worker's folder of receipts: each must be in the log, byte for byte
    #[arg(long, value_name = "DIR")]
    receipts: Option<PathBuf>,
    /// The coordinator's public key, 64 hex digits [default: the one the copy names]
    #[arg(long, value_name = "HEX")]
    key: Option<String>,
}

/// One line of a copy.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Line {
    /// The first line: whose log it is.
    Start { server: String, key: String },
    /// An entry.
    Entry {
        index: u64,
        kind: String,
        body: String,
    },
    /// A signed head over all entries above it.
    Head { head: String, signature: String },
}

pub async fn run(globals: &Globals, command: LogCommand, output: Output) -> Result<()> {
    match command {
        LogCommand::Pull(args) => pull(globals, &args, output).await,
        LogCommand::Verify(args) => verify(&args, output),
    }
}

/// What reading a copy came to.
struct Copy {
    tree: Growing,
    key: String,
    /// Entries by kind.
    receipts: u64,
    manifests: u64,
    heads: u64,
    /// Tree and length of the file up to and with its last head.
    closed: Growing,
    closed_bytes: u64,
}

impl Copy {
    /// Whether the last line is a head.
    fn is_closed(&self) -> bool {
        self.heads > 0 && self.closed.size() == self.tree.size()
    }
}

/// Reads a copy line by line and checks everything that it says of itself. `seen` gets each entry.
fn read(
    file: &Path,
    expected_key: Option<&str>,
    seen: &mut dyn FnMut(u64, &str) -> Result<()>,
) -> Result<Copy> {
    let reader = File::open(file).with_context(|| format!("open {}", file.display()))?;
    let mut reader = BufReader::new(reader);
    let mut copy = Copy {
        tree: Growing::default(),
        key: String::new(),
        receipts: 0,
        manifests: 0,
        heads: 0,
        closed: Growing::default(),
        closed_bytes: 0,
    };
    let (mut line, mut number, mut bytes) = (String::new(), 0_u64, 0_u64);
    loop {
        line.clear();
        number += 1;
        let at = || format!("line {number} of {}", file.display());
        let mut bounded = std::io::Read::take(&mut reader, LINE_BYTES_MAX as u64);
        if bounded.read_line(&mut line).with_context(at)? == 0 {
            break;
        }
        ensure!(line.len() < LINE_BYTES_MAX, "{} is too long", at());
        if !line.ends_with('\n') {
            // A pull was interrupted here; only what a head closes counts.
            break;
        }
        bytes += line.len() as u64;
        let parsed: Line =
            serde_json::from_str(&line).map_err(|_| anyhow!("{} is not a log's", at()))?;
        let heads = copy.heads;
        take(&mut copy, parsed, number, expected_key, seen).with_context(at)?;
        if copy.heads > heads {
            (copy.closed, copy.closed_bytes) = (copy.tree.clone(), bytes);
        }
    }
    ensure!(!copy.key.is_empty(), "{} is empty", file.display());
    Ok(copy)
}

fn take(
    copy: &mut Copy,
    line: Line,
    number: u64,
    expected_key: Option<&str>,
    seen: &mut dyn FnMut(u64, &str) -> Result<()>,
) -> Result<()> {
    match line {
        Line::Start { key, .. } => {
            ensure!(number == 1, "a log starts in its first line only");
            if let Some(expected) = expected_key {
                ensure!(key == expected, "the log is of key {key}, not {expected}");
            }
            copy.key = key;
        }
        Line::Entry { index, kind, body } => {
            let next = copy.tree.size();
            ensure!(index == next, "entry {index} stands where {next} belongs");
            match kind.as_str() {
                "receipt" => {
                    let statement: ReceiptStatement = serde_json::from_str(&body)
                        .map_err(|_| anyhow!("entry {index} is no receipt"))?;
                    ensure!(
                        statement.log_index == index,
                        "the receipt in entry {index} says it is entry {}",
                        statement.log_index
                    );
                    copy.receipts += 1;
                }
                "manifest" => copy.manifests += 1,
                other => bail!("entry {index} is of an unknown kind {other:?}"),
            }
            seen(index, &body)?;
            copy.tree.push(leaf_hash(body.as_bytes()));
        }
        Line::Head { head, signature } => {
            let head = check_head(&copy.key, &head, &signature)?;
            check_root(&head, &copy.tree)?;
            copy.heads += 1;
        }
    }
    Ok(())
}

fn check_head(key: &str, head: &str, signature: &str) -> Result<TreeHeadStatement> {
    let head = v1::TreeHead {
        statement: head.as_bytes().to_vec(),
        signature: hex::decode(signature).context("the head's signature is not hex")?,
    };
    let key = hex::decode(key).context("the key is not hex")?;
    TreeHeadStatement::verify(&head, &key).context("the head")
}

/// A signed head must be that of the entries before it.
fn check_root(head: &TreeHeadStatement, tree: &Growing) -> Result<()> {
    ensure!(
        head.size == tree.size(),
        "the head is over {} entries, the copy has {} before it",
        head.size,
        tree.size()
    );
    let root = hex::encode(tree.root());
    ensure!(
        head.root == root,
        "the entries have the root {root}, the coordinator signed {}: an entry was changed",
        head.root
    );
    Ok(())
}

async fn pull(globals: &Globals, args: &PullArgs, output: Output) -> Result<()> {
    let client = session::connect(globals)?;
    let key = hex::encode(client.identity().server_key.as_bytes());
    let (mut tree, mut kept) = (Growing::default(), 0);
    if args.file.exists() {
        let copy = read(&args.file, Some(&key), &mut |_, _| Ok(()))?;
        (tree, kept) = (copy.closed, copy.closed_bytes);
    }
    let first = tree.size();
    let answer = client
        .call(|mut to| async move { to.log.get_tree_head(v1::GetTreeHeadRequest {}).await })
        .await?;
    let signed = answer.head.context("the coordinator sent no head")?;
    let head = TreeHeadStatement::verify(&signed, client.identity().server_key.as_bytes())
        .context("the coordinator's head")?;
    if head.size < first {
        bail!(
            "the log has shrunk from {first} to {} entries: the coordinator was restored from an older backup, or entries were taken out; {} is the proof",
            head.size,
            args.file.display()
        );
    }
    let mut lines = Vec::new();
    while tree.size() < head.size {
        let request = v1::ListEntriesRequest {
            first: tree.size(),
            page_size: PAGE,
        };
        let page = client
            .call(|mut to| async move { to.log.list_entries(request).await })
            .await?;
        ensure!(
            !page.entries.is_empty(),
            "the log ends before its head says"
        );
        for entry in page.entries {
            if tree.size() == head.size {
                break;
            }
            let body = String::from_utf8(entry.body).context("an entry is not text")?;
            ensure!(entry.index == tree.size(), "the log has a gap");
            tree.push(leaf_hash(body.as_bytes()));
            lines.push(Line::Entry {
                index: entry.index,
                kind: entry.kind,
                body,
            });
        }
    }
    check_root(&head, &tree).context("the log was rewritten")?;
    lines.push(Line::Head {
        head: String::from_utf8(signed.statement).context("the head is not text")?,
        signature: hex::encode(&signed.signature),
    });
    if kept == 0 {
        let server = client.identity().server.authority();
        lines.insert(0, Line::Start { server, key });
    }
    append(&args.file, kept, &lines)?;
    let new = head.size - first;
    output.result(
        &json!({"file": args.file, "size": head.size, "new": new, "root": head.root}),
        || format!("{} entries, {new} new; root {}", head.size, head.root),
    )
}

/// Puts lines behind the first `kept` bytes of the file; what an interrupted pull left goes.
fn append(file: &Path, kept: u64, lines: &[Line]) -> Result<()> {
    let at = || format!("write {}", file.display());
    let opened = OpenOptions::new().create(true).append(true).open(file);
    let opened = opened.with_context(at)?;
    opened.set_len(kept).with_context(at)?;
    let mut writer = BufWriter::new(opened);
    for line in lines {
        serde_json::to_writer(&mut writer, line).with_context(at)?;
        writer.write_all(b"\n").with_context(at)?;
    }
    let file = writer.into_inner().map_err(|error| error.into_error());
    let file = file.with_context(at)?;
    file.sync_all().with_context(at)
}

/// A worker's receipt file; see `cairn-worker`.
#[derive(Debug, Deserialize)]
struct Kept {
    statement: String,
    signature: String,
    sealed: Option<Sealed>,
}

#[derive(Debug, Deserialize)]
struct Sealed {
    statement: String,
    signature: String,
}

/// A receipt that must be in the log.
struct Wanted {
    file: PathBuf,
    statement: String,
    signature: String,
}

fn wanted(folder: &Path) -> Result<BTreeMap<u64, Wanted>> {
    let mut all = BTreeMap::new();
    let entries = fs::read_dir(folder).with_context(|| format!("open {}", folder.display()))?;
    for entry in entries {
        let file = entry?.path();
        if file.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let at = || format!("receipt {}", file.display());
        ensure!(
            fs::metadata(&file)?.len() <= RECEIPT_BYTES_MAX,
            "{} is too large",
            at()
        );
        let kept: Kept = serde_json::from_slice(&fs::read(&file)?).with_context(at)?;
        let sealed = kept.sealed.map(|s| (s.statement, s.signature));
        for (statement, signature) in [(kept.statement, kept.signature)].into_iter().chain(sealed) {
            let parsed: ReceiptStatement = serde_json::from_str(&statement).with_context(at)?;
            let receipt = Wanted {
                file: file.clone(),
                statement,
                signature,
            };
            if let Some(other) = all.insert(parsed.log_index, receipt) {
                bail!(
                    "two receipts claim log entry {}: {} and {}; the coordinator signed both",
                    parsed.log_index,
                    other.file.display(),
                    file.display()
                );
            }
        }
    }
    Ok(all)
}

fn verify(args: &VerifyArgs, output: Output) -> Result<()> {
    let mut wanted = match &args.receipts {
        Some(folder) => wanted(folder)?,
        None => BTreeMap::new(),
    };
    let receipts = wanted.len();
    let mut checked = Vec::new();
    let copy = read(&args.file, args.key.as_deref(), &mut |index, body| {
        if let Some(receipt) = wanted.remove(&index) {
            ensure!(
                receipt.statement == body,
                "entry {index} is not what {} has a signature for: the log was changed after the receipt was given",
                receipt.file.display()
            );
            checked.push(receipt);
        }
        Ok(())
    })?;
    ensure!(
        copy.is_closed(),
        "{} ends without a signed head",
        args.file.display()
    );
    if let Some((index, receipt)) = wanted.first_key_value() {
        bail!(
            "{} of {receipts} receipts are not in the log: {} is entry {index}, the log ends before {}; the copy is older than the receipt, or the coordinator was restored from an older backup",
            wanted.len(),
            receipt.file.display(),
            copy.tree.size()
        );
    }
    let key = hex::decode(&copy.key).context("the key is not hex")?;
    for receipt in &checked {
        let signed = v1::Receipt {
            statement: receipt.statement.clone().into_bytes(),
            signature: hex::decode(&receipt.signature).unwrap_or_default(),
        };
        ReceiptStatement::verify(&signed, &key)
            .with_context(|| format!("receipt {}", receipt.file.display()))?;
    }
    let root = hex::encode(copy.tree.root());
    let (size, heads) = (copy.tree.size(), copy.heads);
    let value = json!({"size": size, "root": root, "receipts": copy.receipts,
        "manifests": copy.manifests, "heads": heads, "own_receipts": receipts, "key": copy.key});
    output.result(&value, || {
        let own = if args.receipts.is_some() {
            format!("; your {receipts} receipts are in it, byte for byte")
        } else {
            String::new()
        };
        format!(
            "sound: {size} entries ({} receipts, {} manifests) under {heads} signed heads{own}",
            copy.receipts, copy.manifests
        )
    })
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
