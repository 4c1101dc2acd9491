//! Files of a folder: listed within bounds, hashed once while they are read or written.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::digest::{Digest, DigestHasher};

/// Most files of one folder, its sub-folders included.
pub const FILES_MAX: usize = 10_000;
/// Deepest sub-folder that is looked into.
const DEPTH_MAX: usize = 4;
/// Bytes read and written at once.
pub(crate) const COPY_BYTES: usize = 1024 * 1024;

/// One file of a published folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Path inside the folder, with `/`.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
    /// BLAKE3 of the bytes.
    pub blake3: Digest,
    /// SHA-256 of the bytes, 64 lowercase hex digits; what Hugging Face clients name large files by.
    pub sha256: String,
}

impl FileEntry {
    /// Hashes `dir/path`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn of_file(dir: &Path, path: &str) -> io::Result<Self> {
        let mut hasher = HashingWriter::new(io::sink());
        copy(&mut File::open(dir.join(path))?, &mut hasher)?;
        Ok(hasher.entry(path))
    }
}

/// Passes bytes on and hashes them.
pub(crate) struct HashingWriter<W> {
    inner: W,
    blake3: DigestHasher,
    sha256: Sha256,
}

impl<W: Write> HashingWriter<W> {
    pub(crate) fn new(inner: W) -> Self {
        Self {
            inner,
            blake3: DigestHasher::new(),
            sha256: Sha256::new(),
        }
    }

    pub(crate) fn entry(&self, path: &str) -> FileEntry {
        let (blake3, size) = self.blake3.finish();
        let sha256 = hex::encode(self.sha256.clone().finalize());
        FileEntry {
            path: path.to_owned(),
            size,
            blake3,
            sha256,
        }
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        let written = bytes.get(..count).unwrap_or(bytes);
        self.blake3.update(written);
        self.sha256.update(written);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Copies to the end through a bounded buffer.
pub(crate) fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut total = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                total += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Paths of all files in a folder, with `/`, in byte order. Links to files count as files (the
/// Hugging Face cache is made of them); links to folders and names that start with a dot are left
/// out.
///
/// # Errors
/// When the folder cannot be read, is too large or too deep, or has a name that is not UTF-8.
pub fn list_files(dir: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    walk(dir, "", 0, &mut found)?;
    found.sort();
    Ok(found)
}

fn walk(dir: &Path, prefix: &str, depth: usize, found: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let refuse = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let name = entry.file_name();
        let name = name
            .to_str()
            .ok_or_else(|| refuse(format!("the name {} is not UTF-8", name.display())))?;
        if name.starts_with('.') {
            continue;
        }
        let path = format!("{prefix}{name}");
        if entry.file_type()?.is_dir() {
            if depth == DEPTH_MAX {
                return Err(refuse(format!(
                    "{path} is more than {DEPTH_MAX} folders deep"
                )));
            }
            walk(&entry.path(), &format!("{path}/"), depth + 1, found)?;
        } else if fs::metadata(entry.path())?.is_file() {
            if found.len() == FILES_MAX {
                return Err(refuse(format!("more than {FILES_MAX} files")));
            }
            found.push(path);
        }
    }
    Ok(())
}

/// Whether a path from a stranger stays inside the folder it is joined to, on every system.
#[must_use]
pub fn is_safe_path(path: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    !path.is_empty()
        && path.len() <= 1024
        && !path.contains(['\\', ':', '\0'])
        && !path.chars().any(char::is_control)
        && path
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.'))
        && Path::new(path).components().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_strangers() {
        for path in [
            "config.json",
            "a/b.json",
            "model-00001-of-00002.safetensors",
        ] {
            assert!(is_safe_path(path), "{path}");
        }
        for path in [
            "",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a//b",
            "./a",
            "a/",
            "c:\\x",
            "C:x",
            "a\0b",
            ".git/config",
            "a\nb",
        ] {
            assert!(!is_safe_path(path), "{path:?}");
        }
    }

    #[test]
    fn lists_in_order_and_hashes() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("sub")).unwrap();
        for (path, text) in [("b.txt", "b"), ("sub/a.txt", "abc"), (".hidden", "x")] {
            fs::write(dir.path().join(path), text).unwrap();
        }
        assert_eq!(list_files(dir.path()).unwrap(), ["b.txt", "sub/a.txt"]);
        let entry = FileEntry::of_file(dir.path(), "sub/a.txt").unwrap();
        assert_eq!(entry.size, 3);
        assert_eq!(entry.blake3, Digest::of(b"abc"));
        assert_eq!(
            entry.sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
