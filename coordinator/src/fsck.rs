//! Checks the database against the blob store: what is missing, damaged, orphaned, or contradicts
//! itself, and who can bring it back.
//!
//! Checking changes nothing and may run beside a serving coordinator: a blob that is missing, but
//! whose row has gone meanwhile, is none; bytes without a row are on their way or garbage, both
//! harmless. [`repair`](mod@repair) does what is safe, and alone.
mod log;
pub mod repair;

use std::collections::BTreeSet;
use std::fmt;

use cairn_proto::convert::BlobName;
use cairn_stack::digest::{Digest, DigestHasher};
use cairn_stack::lineage::{MANIFEST_BYTES_MAX, MANIFEST_FILE, SIGNATURE_FILE, SignedManifest};
use ed25519_dalek::SigningKey;
use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};

use crate::blobs::Blobs;
use crate::clock::Timestamp;
use crate::db::Db;
use crate::db::blobs::blob_get;
use crate::db::check::{
    Need, blob_needs, blob_page, checkpoint_names, checkpoint_stack, contradictions,
};
use crate::db::models::{Folder, checkpoint_files, checkpoint_get};
use crate::db::settings::{SERVER_KEY, setting_get};
use crate::error::Error;
use crate::folding::is_content;
use crate::limits::BLOB_UNREFERENCED;

/// Blobs listed in one query.
const PAGE: i64 = 1_000;
/// Blobs read at once: a disk or a bucket is busy with that, and memory is not.
const READS: usize = 4;

/// How closely blobs are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Every byte is read and hashed.
    Bytes,
    /// Lengths alone: finds what is missing or cut, not what has rotted.
    Lengths,
}

/// What is wrong with a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The store does not hold it.
    Missing,
    /// The store holds other bytes.
    Damaged,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing",
            Self::Damaged => "damaged",
        })
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// A blob that somebody needs cannot be read.
    Blob {
        /// Which.
        name: BlobName,
        /// What is wrong with it.
        fault: Fault,
        /// Who needs it.
        needs: Vec<Need>,
    },
    /// Rows that cannot both be true, or a log or manifest that does not fit what it signs.
    Contradiction {
        /// What is wrong.
        rule: &'static str,
        /// Where.
        what: String,
    },
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Report {
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Blobs with a row.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Rows of unreadable blobs that nobody needs: collected like any garbage.
    pub unneeded: u64,
    /// Bytes without a row, younger than garbage is: uploads whose row may still come.
    pub young: u64,
    /// Bytes without a row that are old enough to be collected.
    pub orphans: Vec<Digest>,
    /// Leaves of the log.
    pub log_size: u64,
    /// Checkpoints.
    pub checkpoints: u64,
}

impl Report {
    /// Whether nothing is wrong. Garbage is not wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// For programs, the last line.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "clean": self.is_clean(), "problems": self.problems.len(), "blobs": self.blobs,
            "bytes": self.bytes, "checkpoints": self.checkpoints, "log_size": self.log_size,
            "orphans": self.orphans.len(), "orphans_young": self.young,
            "unneeded": self.unneeded,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.problems.len() {
            0 => "clean".to_owned(),
            count => format!("{count} problems"),
        };
        write!(
            f,
            "{verdict}: {} blobs of {} bytes, {} checkpoints, {} entries in the log; \
             garbage: {} files without a row ({} more may still get one), {} rows without use",
            self.blobs,
            self.bytes,
            self.checkpoints,
            self.log_size,
            self.orphans.len(),
            self.young,
            self.unneeded
        )
    }
}

impl Problem {
    /// For programs, a line each.
    #[must_use]
    pub fn json(&self) -> Value {
        match self {
            Self::Blob { name, fault, needs } => json!({
                "problem": fault.to_string(),
                "blob": name.digest.to_string(), "size_bytes": name.size_bytes,
                "needed_by": needs.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "remedy": self.remedy(),
            }),
            Self::Contradiction { rule, what } => json!({
                "problem": "contradiction", "rule": rule, "what": what, "remedy": self.remedy(),
            }),
        }
    }

    /// Who can bring it back, and how.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Blob { needs, .. } => {
                let known: BTreeSet<String> = needs.iter().map(remedy).collect();
                known.into_iter().collect::<Vec<_>>().join("; ")
            }
            Self::Contradiction { .. } => {
                "restore a backup that fsck finds clean, and report this".to_owned()
            }
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blob { name, fault, needs } => {
                write!(
                    f,
                    "{fault}: blob {} ({} bytes)",
                    name.digest, name.size_bytes
                )?;
                for need in needs {
                    write!(f, "\n  needed by {need}")?;
                }
            }
            Self::Contradiction { rule, what } => write!(f, "contradiction: {rule}: {what}")?,
        }
        write!(f, "\n  remedy: {}", self.remedy())
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checkpoint {
                model,
                revision,
                path,
            } => write!(f, "{model} revision {revision}: {path}"),
            Self::Dataset(name) => write!(f, "dataset {name}"),
            Self::Adapter { submission, worker } => {
                write!(
                    f,
                    "the adapter of submission {submission} by worker {worker}"
                )
            }
            Self::Contribution(id) => write!(f, "the config of contribution {id}"),
            Self::Evaluation(id) => write!(f, "the scores of evaluation {id}"),
            Self::Round(id) => write!(f, "the evidence of round {id}"),
        }
    }
}

fn remedy(need: &Need) -> String {
    match need {
        Need::Checkpoint { path, .. } if path == MANIFEST_FILE => {
            "restore the manifest from a backup of the blobs".to_owned()
        }
        Need::Checkpoint {
            model, revision: 0, ..
        } => format!("a maintainer adds {model}'s base again under another name: cairn model add"),
        Need::Checkpoint { .. } | Need::Contribution(_) => {
            "fsck --repair computes it again".to_owned()
        }
        Need::Dataset(name) => {
            format!("a maintainer adds the same records again under another name than {name}")
        }
        Need::Adapter { worker, .. } => {
            format!("worker {worker} hands it in again from its receipt when it next runs")
        }
        Need::Evaluation(_) | Need::Round(_) => {
            "restore it from a backup of the blobs; without it a verdict loses its evidence"
                .to_owned()
        }
    }
}

/// Checks everything. `now` tells garbage from what may still be on its way.
///
/// # Errors
/// When the database or the store does not answer: then nothing has been found out.
pub async fn check(db: &Db, blobs: &Blobs, depth: Depth, now: Timestamp) -> Result<Report, Error> {
    let mut report = Report::default();
    let mut tx = db.read().await?;
    for (rule, what) in contradictions(&mut tx).await? {
        report.problems.push(Problem::Contradiction { rule, what });
    }
    report.log_size = log::check(&mut tx, &mut report.problems).await?;
    drop(tx);
    check_blobs(db, blobs, depth, &mut report).await?;
    check_manifests(db, blobs, &mut report).await?;
    list_orphans(db, blobs, now, &mut report).await?;
    Ok(report)
}

async fn check_blobs(
    db: &Db,
    blobs: &Blobs,
    depth: Depth,
    report: &mut Report,
) -> Result<(), Error> {
    let mut after = String::new();
    loop {
        let mut tx = db.read().await?;
        let page = blob_page(&mut tx, &after, PAGE).await?;
        drop(tx);
        let Some(last) = page.last() else {
            return Ok(());
        };
        after = last.digest.to_string();
        report.blobs += page.len() as u64;
        report.bytes += page.iter().map(|name| name.size_bytes).sum::<u64>();
        let mut looks = futures::stream::iter(page)
            .map(|name| async move { Ok::<_, Error>((name, look(blobs, name, depth).await?)) })
            .buffered(READS);
        while let Some((name, fault)) = looks.try_next().await? {
            let Some(fault) = fault else { continue };
            let mut tx = db.read().await?;
            if blob_get(&mut tx, name.digest).await?.is_none() {
                // Collected since the page was read.
                continue;
            }
            let needs = blob_needs(&mut tx, name.digest).await?;
            if needs.is_empty() {
                report.unneeded += 1;
            } else {
                report.problems.push(Problem::Blob { name, fault, needs });
            }
        }
    }
}

/// What is wrong with a blob, if anything is.
///
/// # Errors
/// When the store does not answer.
pub async fn look(blobs: &Blobs, name: BlobName, depth: Depth) -> Result<Option<Fault>, Error> {
    match blobs.size(name.digest).await? {
        None => return Ok(Some(Fault::Missing)),
        Some(size) if size != name.size_bytes => return Ok(Some(Fault::Damaged)),
        Some(_) if depth == Depth::Lengths => return Ok(None),
        Some(_) => {}
    }
    let mut stream = blobs.open_at(name.digest, 0).await?;
    let mut hasher = DigestHasher::new();
    while let Some(piece) = stream.try_next().await? {
        hasher.update(&piece);
    }
    let sound = hasher.finish() == (name.digest, name.size_bytes);
    Ok((!sound).then_some(Fault::Damaged))
}

/// Each checkpoint is what its signed manifest says. Files that cannot be read are found already.
async fn check_manifests(db: &Db, blobs: &Blobs, report: &mut Report) -> Result<(), Error> {
    let mut tx = db.read().await?;
    let key = server_key(setting_get(&mut tx, SERVER_KEY).await?.as_deref());
    let names = checkpoint_names(&mut tx).await?;
    drop(tx);
    report.checkpoints = names.len() as u64;
    for (model, revision) in names {
        if let Some(wrong) = manifest_fault(db, blobs, key.as_ref(), &model, revision).await? {
            report.problems.push(Problem::Contradiction {
                rule: "a checkpoint is not what its manifest says",
                what: format!("{model} revision {revision}: {wrong}"),
            });
        }
    }
    Ok(())
}

fn server_key(text: Option<&str>) -> Option<SigningKey> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text?, &mut bytes).ok()?;
    Some(SigningKey::from_bytes(&bytes))
}

async fn manifest_fault(
    db: &Db,
    blobs: &Blobs,
    key: Option<&SigningKey>,
    model: &str,
    revision: u32,
) -> Result<Option<String>, Error> {
    let mut tx = db.read().await?;
    let Some(row) = checkpoint_get(&mut tx, model, revision).await? else {
        return Ok(None);
    };
    let files = checkpoint_files(&mut tx, model, revision, Folder::Checkpoint).await?;
    let stack: BTreeSet<String> = checkpoint_stack(&mut tx, model, revision)
        .await?
        .into_iter()
        .collect();
    drop(tx);
    let file = |path: &str| files.iter().find(|file| file.path == path);
    let Some(signature) = file(SIGNATURE_FILE) else {
        return Ok(Some("no signature is among its files".to_owned()));
    };
    let bytes = |digest| blobs.get_bytes(digest, MANIFEST_BYTES_MAX as u64);
    let (manifest, signature) = match (
        bytes(row.manifest).await,
        bytes(signature.blob.digest).await,
    ) {
        (Ok(manifest), Ok(signature)) => (manifest, signature),
        (Err(error), _) | (_, Err(error)) if error.retry() => return Err(error),
        _ => return Ok(None),
    };
    let signed = match SignedManifest::from_parts(&manifest, &signature) {
        Ok(signed) => signed,
        Err(error) => return Ok(Some(error.to_string())),
    };
    if let Some(key) = key
        && let Err(error) = signed.expect_key(&key.verifying_key())
    {
        return Ok(Some(error.to_string()));
    }
    if signed.commit() != row.commit.to_string() {
        return Ok(Some(format!("its commit is {}", signed.commit())));
    }
    for expected in &signed.manifest().files {
        let found = file(&expected.path);
        if found.is_none_or(|found| found.blob.digest != expected.blake3) {
            return Ok(Some(format!("{} is another file", expected.path)));
        }
    }
    let content = files.iter().filter(|file| is_content(file));
    if content.count() != signed.manifest().files.len() {
        return Ok(Some("it has other files".to_owned()));
    }
    let contributions = &signed.manifest().contributions;
    let stacked: BTreeSet<String> = contributions.iter().map(|one| one.id.clone()).collect();
    Ok((stacked != stack).then(|| "it is noted with other contributions".to_owned()))
}

async fn list_orphans(
    db: &Db,
    blobs: &Blobs,
    now: Timestamp,
    report: &mut Report,
) -> Result<(), Error> {
    let before = now.minus(BLOB_UNREFERENCED);
    let mut listed = blobs.list();
    while let Some((digest, put)) = listed.try_next().await? {
        let mut tx = db.read().await?;
        if blob_get(&mut tx, digest).await?.is_some() {
            continue;
        }
        if put < before {
            report.orphans.push(digest);
        } else {
            report.young += 1;
        }
    }
    Ok(())
}
