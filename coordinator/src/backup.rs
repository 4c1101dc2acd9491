//! A copy of all that a coordinator is, made while it serves: a folder that can be served from.
//!
//! The database comes first, the blobs after it: blobs never change and are put before their rows,
//! so that whatever the copied database names is still there to be copied.
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;

use crate::blobs::Blobs;
use crate::db::Db;
use crate::db::check::{blob_needs, blob_page};
use crate::server::{make_folder, plain};

/// Blobs listed in one query.
const PAGE: i64 = 1_000;

/// What was copied.
#[derive(Debug, Default)]
pub struct Copied {
    /// Whether the database is in it; PostgreSQL's is not.
    pub database: bool,
    /// Blobs copied now.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blobs that were there already.
    pub known: u64,
    /// Needed blobs that could not be read as what they are.
    pub unreadable: Vec<Digest>,
}

impl fmt::Display for Copied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let database = if self.database {
            "copied the database and"
        } else {
            "copied, besides what pg_dump has written,"
        };
        write!(
            f,
            "{database} {} blobs of {} bytes; {} were there already",
            self.blobs, self.bytes, self.known
        )?;
        for digest in &self.unreadable {
            write!(
                f,
                "\nnot copied: blob {digest}; cairn-coordinator fsck says why"
            )?;
        }
        Ok(())
    }
}

/// Copies database (SQLite), TLS files and blobs to a folder. Blobs that are there already are not
/// copied again.
///
/// # Errors
/// When the folder cannot be written, or the database or the store does not answer.
pub async fn back_up(db: &Db, blobs: &Blobs, data: &Path, to: &Path) -> Result<Copied> {
    let to = make_folder(to)?;
    let mut copied = Copied {
        database: copy_database(db, &to).await?,
        ..Copied::default()
    };
    copy_tls(&data.join("tls"), &to.join("tls")).context("copy the TLS files")?;
    let target = Blobs::open(&to.join("store").to_string_lossy()).map_err(plain)?;
    let mut after = String::new();
    loop {
        let mut tx = db.read().await.map_err(plain)?;
        let page = blob_page(&mut tx, &after, PAGE).await.map_err(plain)?;
        drop(tx);
        let Some(last) = page.last() else {
            return Ok(copied);
        };
        after = last.digest.to_string();
        for name in page {
            copy_blob(db, blobs, &target, &to, name, &mut copied).await?;
        }
    }
}

async fn copy_database(db: &Db, to: &Path) -> Result<bool> {
    let (beside, place) = (to.join("cairn.db.new"), to.join("cairn.db"));
    let _ = fs::remove_file(&beside);
    // The server's secret key is in it: for its owner alone, wherever the folder is.
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    let copied = db.copy_to(&beside).await;
    if !copied.map_err(plain).context("copy the database")? {
        fs::remove_file(&beside)?;
        return Ok(false);
    }
    File::open(&beside)?.sync_all()?;
    // What was written beside an older copy is not of this one.
    for rest in ["cairn.db-wal", "cairn.db-shm"] {
        let _ = fs::remove_file(to.join(rest));
    }
    fs::rename(&beside, &place)?;
    File::open(to)?.sync_all()?;
    Ok(true)
}

/// Without its certificate a restored coordinator would be a stranger to everybody who joined.
fn copy_tls(from: &Path, to: &Path) -> Result<()> {
    for name in ["key.pem", "cert.pem"] {
        if from.join(name).is_file() {
            make_folder(to)?;
            // With its permissions.
            fs::copy(from.join(name), to.join(name))?;
        }
    }
    Ok(())
}

async fn copy_blob(
    db: &Db,
    blobs: &Blobs,
    target: &Blobs,
    to: &Path,
    name: BlobName,
    copied: &mut Copied,
) -> Result<()> {
    if target.size(name.digest).await.map_err(plain)? == Some(name.size_bytes) {
        copied.known += 1;
        return Ok(());
    }
    // Copied byte by byte, never linked: a copy that rots with the original is none.
    let folder = tempfile::tempdir_in(to)?;
    let file = folder.path().join("blob");
    match blobs.copy_out(name.digest, &file).await {
        Ok(_) => {}
        Err(error) if error.retry() => return Err(plain(error)),
        Err(_) => {
            let mut tx = db.read().await.map_err(plain)?;
            // Garbage may go at any time.
            if !blob_needs(&mut tx, name.digest)
                .await
                .map_err(plain)?
                .is_empty()
            {
                copied.unreadable.push(name.digest);
            }
            return Ok(());
        }
    }
    target
        .put_verified(&file, name)
        .await
        .map_err(plain)
        .context("write a blob's copy")?;
    copied.blobs += 1;
    copied.bytes += name.size_bytes;
    Ok(())
}
