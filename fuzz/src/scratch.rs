//! A folder for the files of one process. scripts/fuzz.sh removes it; a fuzzer never ends cleanly.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// A sub-folder, made when it is not there.
pub fn folder(name: &str) -> PathBuf {
    let folder = FOLDER.path().join(name);
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Writes a file.
pub fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("the folder is writable");
}
