//! Strict, bounded safetensors.
//!
//! Stricter than the format: exact coverage of the data section (no gap, overlap or rest), no
//! duplicate key anywhere in the header, no zero-size tensor, three dtypes, no unknown field. So a
//! file has one reading only, and a header that lies about sizes is found before any allocation.
//! Positioned reads, no memory map: a file cut short while it is read is an error, not a signal.

mod header;
mod write;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

pub use write::{TensorSpec, header_bytes, write_tensors};

/// Longest header read by [`TensorFile::open`], in bytes. The largest public checkpoints need 2 MiB.
pub const HEADER_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Most tensors in one file.
pub const TENSORS_MAX: usize = 100_000;
/// Longest tensor name, in bytes.
pub const NAME_BYTES_MAX: usize = 512;
/// Most dimensions of one tensor.
pub const DIMENSIONS_MAX: usize = 8;

/// Element types that model weights come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Decodes little-endian elements to f32; exact for all three types. `bytes` that are no whole
    /// number of elements lose the rest, so callers pass whole tensors or rows.
    pub fn decode(self, bytes: &[u8], out: &mut Vec<f32>) {
        out.clear();
        out.reserve(bytes.len() / self.bytes());
        match self {
            Self::F32 => out.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|chunk| f32::from_le_bytes(*chunk)),
            ),
            Self::F16 => out.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|chunk| f16::from_le_bytes(*chunk).to_f32()),
            ),
            Self::BF16 => out.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|chunk| bf16::from_le_bytes(*chunk).to_f32()),
            ),
        }
    }

    /// Encodes f32 to little-endian elements, rounding to nearest, ties to even.
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        out.clear();
        out.reserve(values.len() * self.bytes());
        match self {
            Self::F32 => values
                .iter()
                .for_each(|value| out.extend_from_slice(&value.to_le_bytes())),
            Self::F16 => values
                .iter()
                .for_each(|value| out.extend_from_slice(&f16::from_f32(*value).to_le_bytes())),
            Self::BF16 => values
                .iter()
                .for_each(|value| out.extend_from_slice(&bf16::from_f32(*value).to_le_bytes())),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where one tensor lies in its file. Only a checked header makes these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first; none for a scalar.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Length in bytes, never zero.
    pub bytes: u64,
}

/// A safetensors file that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", path.display())]
pub struct TensorError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub kind: TensorErrorKind,
}

/// What is wrong with a safetensors file. Texts name no path, so they may be shown to strangers.
#[derive(Debug, thiserror::Error)]
pub enum TensorErrorKind {
    /// The operating system said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The file ends before the header or the data it announces.
    #[error("the file is cut short: {what} needs {needs} bytes, the file has {has}")]
    Truncated {
        /// What does not fit.
        what: &'static str,
        /// Bytes the file must have.
        needs: u64,
        /// Bytes the file has.
        has: u64,
    },
    /// The header is longer than allowed here.
    #[error("the header has {bytes} bytes; at most {max} are allowed")]
    HeaderTooLong {
        /// Announced length.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The header is not the JSON object it must be.
    #[error("the header is malformed: {0}")]
    Header(String),
    /// One tensor of the header is not believable.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// Its name, cut to a readable length.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

impl TensorErrorKind {
    pub(crate) fn at(self, path: &Path) -> TensorError {
        TensorError {
            path: path.to_owned(),
            kind: self,
        }
    }
}

/// An open safetensors file with a header that passed every check.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    /// None: opened again for each read.
    file: Option<File>,
    bytes: u64,
    header: Vec<u8>,
    metadata: Vec<(String, String)>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl TensorFile {
    /// Opens a file and checks its header, within [`HEADER_BYTES_MAX`] and [`TENSORS_MAX`].
    ///
    /// # Errors
    /// When it cannot be read or breaks any rule of this module.
    pub fn open(path: &Path) -> Result<Self, TensorError> {
        Self::open_bounded(path, HEADER_BYTES_MAX)
    }

    /// As [`Self::open`], with a tighter bound on the header: a caller that knows which tensors must
    /// be there need not parse megabytes to learn that they are not.
    ///
    /// # Errors
    /// When it cannot be read or breaks any rule of this module.
    pub fn open_bounded(path: &Path, header_bytes_max: u64) -> Result<Self, TensorError> {
        let read = || -> Result<Self, TensorErrorKind> {
            let file = File::open(path)?;
            let meta = file.metadata()?;
            if !meta.is_file() {
                return Err(
                    io::Error::new(io::ErrorKind::InvalidInput, "not a regular file").into(),
                );
            }
            let header = read_header(&file, meta.len(), header_bytes_max.min(HEADER_BYTES_MAX))?;
            let parsed = header::parse(&header[8..], header.len() as u64, meta.len())?;
            let by_name = parsed
                .tensors
                .iter()
                .enumerate()
                .map(|(i, tensor)| (tensor.name.clone(), i))
                .collect();
            Ok(Self {
                path: path.to_owned(),
                file: Some(file),
                bytes: meta.len(),
                header,
                metadata: parsed.metadata,
                tensors: parsed.tensors,
                by_name,
            })
        };
        read().map_err(|kind| kind.at(path))
    }

    /// Closes the file; each read opens it again. For those that hold thousands at once, where the
    /// system allows a thousand open ones. The file must stay where it is and as it is.
    #[must_use]
    pub fn closed(self) -> Self {
        Self { file: None, ..self }
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length in bytes.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.bytes
    }

    /// All tensors, in the order of their bytes.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name
            .get(name)
            .and_then(|index| self.tensors.get(*index))
    }

    /// The header's `__metadata__`, in the order of the file; empty when there is none.
    #[must_use]
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// The file's first bytes as they are: length field, JSON and padding.
    #[must_use]
    pub fn raw_header(&self) -> &[u8] {
        &self.header
    }

    /// One tensor's bytes. Allocates `info.bytes`, which the file has.
    ///
    /// # Errors
    /// When the file cannot be read, or became shorter since it was opened.
    pub fn read_bytes(&self, info: &TensorInfo) -> Result<Vec<u8>, TensorError> {
        let mut bytes = Vec::new();
        let length = info.bytes.min(self.bytes);
        bytes.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
        self.read_at(info, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `out` with the tensor's bytes from `start` (counted from the tensor's first byte).
    ///
    /// # Errors
    /// When the range leaves the tensor, or the file cannot be read.
    pub fn read_at(
        &self,
        info: &TensorInfo,
        start: u64,
        out: &mut [u8],
    ) -> Result<(), TensorError> {
        let fits = start
            .checked_add(out.len() as u64)
            .is_some_and(|end| end <= info.bytes);
        let offset = info.offset.saturating_add(start);
        let result = if fits {
            match &self.file {
                Some(file) => read_exact_at(file, out, offset),
                None => self
                    .reopen()
                    .and_then(|file| read_exact_at(&file, out, offset)),
            }
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the range leaves the tensor",
            ))
        };
        result.map_err(|error| TensorErrorKind::from(error).at(&self.path))
    }

    /// Opens a closed file again; one of another length is another file.
    fn reopen(&self) -> io::Result<File> {
        let file = File::open(&self.path)?;
        if file.metadata()?.len() == self.bytes {
            return Ok(file);
        }
        let text = "the file has another length than when it was opened";
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    }

    /// One tensor's elements as f32, row-major.
    ///
    /// # Errors
    /// When the file cannot be read, or became shorter since it was opened.
    pub fn read_f32(&self, info: &TensorInfo) -> Result<Vec<f32>, TensorError> {
        let mut values = Vec::new();
        info.dtype.decode(&self.read_bytes(info)?, &mut values);
        Ok(values)
    }

    /// One tensor's elements as f32, row-major, `count` at a time and the rest: memory is bounded by
    /// the pieces, however large the tensor.
    ///
    /// # Errors
    /// When the file cannot be read, or became shorter since it was opened.
    pub fn read_pieces(
        &self,
        info: &TensorInfo,
        count: usize,
        each: &mut dyn FnMut(&[f32]),
    ) -> Result<(), TensorError> {
        let step = count.max(1) * info.dtype.bytes();
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        let mut start = 0;
        while start < info.bytes {
            let left = usize::try_from(info.bytes - start).unwrap_or(usize::MAX);
            bytes.resize(step.min(left), 0);
            self.read_at(info, start, &mut bytes)?;
            info.dtype.decode(&bytes, &mut values);
            each(&values);
            start += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Reads length field and header; believes the length only after comparing it with both limits.
fn read_header(
    file: &File,
    file_bytes: u64,
    header_bytes_max: u64,
) -> Result<Vec<u8>, TensorErrorKind> {
    if file_bytes < 8 {
        return Err(TensorErrorKind::Truncated {
            what: "the length of the header",
            needs: 8,
            has: file_bytes,
        });
    }
    let mut length = [0; 8];
    read_exact_at(file, &mut length, 0)?;
    let bytes = u64::from_le_bytes(length);
    if bytes > header_bytes_max {
        return Err(TensorErrorKind::HeaderTooLong {
            bytes,
            max: header_bytes_max,
        });
    }
    if bytes + 8 > file_bytes {
        return Err(TensorErrorKind::Truncated {
            what: "the header",
            needs: bytes + 8,
            has: file_bytes,
        });
    }
    let total = usize::try_from(bytes + 8).map_err(|_| TensorErrorKind::HeaderTooLong {
        bytes,
        max: header_bytes_max,
    })?;
    let mut header = vec![0; total];
    read_exact_at(file, &mut header, 0)?;
    Ok(header)
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                out = &mut out[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "tensors/tests.rs"]
mod tests;
