//! A blob store in a folder: links, renames and fsync.
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;

use super::ByteStream;
use crate::error::Error;
use crate::failpoint::Step;
use crate::limits::READ_BYTES;

/// Free bytes for us on the disk that holds a folder.
pub fn free_bytes(folder: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Puts a finished file at its place in the store: bytes first, then the name, each durable.
pub fn place(source: &Path, target: &Path) -> io::Result<()> {
    File::open(source)?.sync_all()?;
    let folder = target.parent().ok_or(io::ErrorKind::InvalidInput)?;
    if !folder.exists() {
        fs::create_dir_all(folder)?;
        if let Some(above) = folder.parent() {
            sync_folder(above)?;
        }
    }
    // Link beside the target, then rename: an object that is there already is replaced as a whole.
    let beside = folder.join(format!(".{}.new", uuid::Uuid::new_v4()));
    let linked = fs::hard_link(source, &beside).or_else(|_| copy(source, &beside));
    Step::here("link").after();
    let placed = linked.and_then(|()| fs::rename(&beside, target));
    Step::here("rename").after();
    if placed.is_err() {
        let _ = fs::remove_file(&beside);
    }
    placed?;
    // Renaming one link of a file onto another link of it does nothing and leaves both.
    let _ = fs::remove_file(&beside);
    sync_folder(folder)
}

fn copy(source: &Path, target: &Path) -> io::Result<()> {
    fs::copy(source, target)?;
    File::open(target)?.sync_all()
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Streams a file from an offset on.
pub async fn open_at(path: PathBuf, offset: u64) -> Result<ByteStream, Error> {
    let opened = tokio::task::spawn_blocking(move || {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(offset))?;
        Ok::<_, io::Error>(file)
    })
    .await?;
    let file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::new(
            cairn_proto::reason::ErrorReason::BlobMissing,
            cairn_proto::reason::ErrorReason::BlobMissing.sentence(),
        ),
        _ => error.into(),
    })?;
    let stream = futures::stream::try_unfold(file, |file| async move {
        let (file, piece) = tokio::task::spawn_blocking(move || read_piece(file)).await??;
        Ok((!piece.is_empty()).then_some((piece, file)))
    });
    Ok(stream.boxed())
}

fn read_piece(mut file: File) -> io::Result<(File, Bytes)> {
    let mut piece = BytesMut::zeroed(READ_BYTES);
    let mut filled = 0;
    while filled < READ_BYTES {
        match file.read(&mut piece[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    piece.truncate(filled);
    Ok((file, piece.freeze()))
}
