//! The new folder: written beside its place, renamed when whole, removed when anything fails.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::matrix::fold_tensor;
use super::{FoldError, FoldReport, Plan};
use crate::files::{COPY_BYTES, FileEntry, HashingWriter, copy};
use crate::tensors::{TensorFile, TensorInfo};

/// Tells the caller how far we are, and is told whether to go on.
struct Progress<'a> {
    call: Option<&'a mut dyn FnMut(u64, u64) -> bool>,
    done: u64,
    total: u64,
}

impl Progress<'_> {
    fn add(&mut self, bytes: u64) -> Result<(), FoldError> {
        self.done += bytes;
        let go_on = self
            .call
            .as_mut()
            .is_none_or(|call| call(self.done, self.total));
        if go_on {
            Ok(())
        } else {
            Err(FoldError::Stopped)
        }
    }
}

pub(super) fn write_folder(
    plan: &Plan<'_>,
    out: &Path,
    call: Option<&mut dyn FnMut(u64, u64) -> bool>,
) -> Result<FoldReport, FoldError> {
    refuse_existing(out)?;
    let parent = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(|error| io_error(parent, error))?;
    // A folder of its own inside the temporary one: the temporary one is private to this user, the
    // new one gets the permissions any new folder gets. Dropping `temporary` removes what is left.
    let temporary = tempfile::Builder::new()
        .prefix(".fold-")
        .tempdir_in(parent)
        .map_err(|error| io_error(parent, error))?;
    let folder = temporary.path().join("checkpoint");
    fs::create_dir(&folder).map_err(|error| io_error(&folder, error))?;

    let weights = plan.base.weight_files();
    let total = weights.iter().map(|(_, file)| file.file_bytes()).sum();
    let mut progress = Progress {
        call,
        done: 0,
        total,
    };
    let mut report = FoldReport {
        files: Vec::new(),
        folded: 0,
        copied: 0,
        left_out: plan.base.left_out().to_vec(),
    };
    for (name, file) in weights {
        let entry = write_file(&folder, name, |out, to_error| {
            fold_file(plan, file, out, to_error, &mut progress)
        })?;
        report.files.push(entry);
        let folded = file
            .tensors()
            .iter()
            .filter(|tensor| plan.touching.contains_key(&tensor.name))
            .count();
        report.folded += folded;
        report.copied += file.tensors().len() - folded;
    }
    for name in plan.base.other_files() {
        let from = plan.base.dir().join(name);
        let entry = write_file(&folder, name, |out, to_error| {
            let mut file = File::open(&from).map_err(|error| io_error(&from, error))?;
            copy(&mut file, out).map_err(to_error)?;
            Ok(())
        })?;
        report.files.push(entry);
    }
    report.files.sort_by(|a, b| a.path.cmp(&b.path));
    publish(&folder, out, parent)?;
    Ok(report)
}

fn refuse_existing(out: &Path) -> Result<(), FoldError> {
    match fs::read_dir(out) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(FoldError::Exists(out.to_owned())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(FoldError::Exists(out.to_owned()))
        }
        Err(error) => Err(io_error(out, error)),
    }
}

/// Renames the whole folder to its place; an empty folder there is replaced.
fn publish(folder: &Path, out: &Path, parent: &Path) -> Result<(), FoldError> {
    sync_dir(folder)?;
    match fs::remove_dir(out) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(out, error)),
        _ => {}
    }
    fs::rename(folder, out).map_err(|error| io_error(out, error))?;
    sync_dir(parent)
}

/// Creates `folder/name`, lets `write` fill it, and returns its digests once it is on the disk.
fn write_file(
    folder: &Path,
    name: &str,
    write: impl FnOnce(
        &mut HashingWriter<BufWriter<File>>,
        &dyn Fn(io::Error) -> FoldError,
    ) -> Result<(), FoldError>,
) -> Result<FileEntry, FoldError> {
    let path = folder.join(name);
    // Errors name the file, not the temporary folder that is gone by the time they are read.
    let to_error = |error: io::Error| io_error(Path::new(name), error);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(to_error)?;
    }
    let file = File::create(&path).map_err(to_error)?;
    let on_disk = file.try_clone().map_err(to_error)?;
    let mut out = HashingWriter::new(BufWriter::with_capacity(COPY_BYTES, file));
    write(&mut out, &to_error)?;
    out.flush().map_err(to_error)?;
    on_disk.sync_all().map_err(to_error)?;
    Ok(out.entry(name))
}

/// Header as it is; each tensor folded when a term touches it, otherwise copied.
fn fold_file(
    plan: &Plan<'_>,
    file: &TensorFile,
    out: &mut impl Write,
    to_error: &dyn Fn(io::Error) -> FoldError,
    progress: &mut Progress<'_>,
) -> Result<(), FoldError> {
    out.write_all(file.raw_header()).map_err(to_error)?;
    progress.add(file.raw_header().len() as u64)?;
    for info in file.tensors() {
        match plan.touching.get(&info.name) {
            Some(touching) => fold_tensor(
                plan,
                file,
                info,
                touching,
                out,
                |bytes| progress.add(bytes),
                to_error,
            )?,
            None => copy_tensor(file, info, out, to_error, progress)?,
        }
    }
    Ok(())
}

fn copy_tensor(
    file: &TensorFile,
    info: &TensorInfo,
    out: &mut impl Write,
    to_error: &dyn Fn(io::Error) -> FoldError,
    progress: &mut Progress<'_>,
) -> Result<(), FoldError> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut start = 0;
    while start < info.bytes {
        let left = usize::try_from(info.bytes - start).unwrap_or(usize::MAX);
        let part = &mut buffer[..left.min(COPY_BYTES)];
        file.read_at(info, start, part)?;
        out.write_all(part).map_err(to_error)?;
        start += part.len() as u64;
        progress.add(part.len() as u64)?;
    }
    Ok(())
}

/// A rename is durable once its folder is; only Unix can say so.
fn sync_dir(dir: &Path) -> Result<(), FoldError> {
    if cfg!(unix) {
        File::open(dir)
            .and_then(|file| file.sync_all())
            .map_err(|error| io_error(dir, error))?;
    }
    Ok(())
}

pub(super) fn io_error(path: &Path, source: io::Error) -> FoldError {
    let path: PathBuf = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FoldError::NoSpace(path),
        _ => FoldError::Io { path, source },
    }
}
