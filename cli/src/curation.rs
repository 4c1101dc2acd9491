//! Curation of a dataset before it leaves the maintainer's machine: exact duplicates out, overlap
//! with held-out sets found, records ordered and cut into chunks.
//!
//! Everything here is a pure function of the records, so the same files in any order give the
//! same chunks with the same digests.

mod chunks;
mod overlap;

pub use chunks::cut_chunks;
pub use overlap::GramIndex;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cairn_stack::digest::Digest;
use cairn_stack::records::{Format, Record, read_records};

/// Most bytes one dataset may hold once read: it is curated in memory, on a laptop.
pub const DATASET_BYTES_MAX: u64 = 1 << 30;

/// One distinct record and where it was first seen.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The record itself.
    pub record: Record,
    /// Canonical JSON, without the newline.
    pub line: String,
    /// `file:line` of its first appearance.
    pub place: String,
}

/// What reading the files gave: distinct records keyed, and thereby ordered, by their BLAKE3.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Distinct records in the order of their digests.
    pub entries: BTreeMap<Digest, Entry>,
    /// Records read, duplicates included.
    pub read: u64,
    /// Exact duplicates left out.
    pub duplicates: u64,
    /// Bytes of the distinct records' canonical lines, newlines included.
    pub bytes: u64,
}

/// Reads every file and drops exact duplicates.
///
/// # Errors
/// A file that cannot be read or parsed (named with its line), nothing to read at all, preferences
/// beside other records, or more than [`DATASET_BYTES_MAX`].
pub fn gather(files: &[PathBuf], format: Format) -> Result<Gathered> {
    let mut gathered = Gathered::default();
    for path in files {
        gather_file(path, format, &mut gathered)?;
    }
    ensure!(
        !gathered.entries.is_empty(),
        "the dataset is empty: no records in {}",
        names(files)
    );
    check_kinds(&gathered)?;
    Ok(gathered)
}

/// A dataset is of preferences or of texts: a round learns from the one or from the other.
fn check_kinds(gathered: &Gathered) -> Result<()> {
    let of_kind = |preference: bool| {
        let mut entries = gathered.entries.values();
        entries.find(|entry| entry.record.is_preference() == preference)
    };
    if let (Some(preference), Some(other)) = (of_kind(true), of_kind(false)) {
        bail!(
            "{} is a preference and {} is none; add them as two datasets",
            preference.place,
            other.place
        );
    }
    Ok(())
}

fn gather_file(path: &Path, format: Format, into: &mut Gathered) -> Result<()> {
    let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let name = path.display().to_string();
    for item in read_records(std::io::BufReader::new(file), format, &name) {
        let (line_number, record) = item?;
        let line = record.to_json_line();
        let digest = Digest::of(line.as_bytes());
        into.read += 1;
        if into.entries.contains_key(&digest) {
            into.duplicates += 1;
            continue;
        }
        into.bytes += line.len() as u64 + 1;
        if into.bytes > DATASET_BYTES_MAX {
            bail!(
                "{name}:{line_number}: the dataset is larger than {DATASET_BYTES_MAX} bytes; split it into several"
            );
        }
        let place = format!("{name}:{line_number}");
        into.entries.insert(
            digest,
            Entry {
                record,
                line,
                place,
            },
        );
    }
    Ok(())
}

fn names(files: &[PathBuf]) -> String {
    files
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
