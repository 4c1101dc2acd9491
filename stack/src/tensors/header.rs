//! The safetensors header: parsed with duplicate keys refused, then believed tensor by tensor.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use super::{DIMENSIONS_MAX, Dtype, NAME_BYTES_MAX, TENSORS_MAX, TensorErrorKind, TensorInfo};
use crate::json::{StringMap, reason};

/// Most entries of `__metadata__`; transformers writes one.
const METADATA_MAX: usize = 1_000;

/// A header that passed every check.
pub(super) struct Header {
    pub(super) metadata: Vec<(String, String)>,
    /// Ordered by offset.
    pub(super) tensors: Vec<TensorInfo>,
}

/// Parses the JSON of a header whose data section starts at `data_start` of a file of `file_bytes`.
pub(super) fn parse(
    json: &[u8],
    data_start: u64,
    file_bytes: u64,
) -> Result<Header, TensorErrorKind> {
    if json.first() != Some(&b'{') {
        return Err(TensorErrorKind::Header(
            "it does not start with '{'".to_owned(),
        ));
    }
    let raw: RawHeader =
        serde_json::from_slice(json).map_err(|error| TensorErrorKind::Header(reason(&error)))?;
    let mut tensors = raw
        .tensors
        .into_iter()
        .map(|(name, tensor)| believe(name, &tensor))
        .collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|tensor| tensor.offset);
    cover(&mut tensors, data_start, file_bytes)?;
    Ok(Header {
        metadata: raw.metadata,
        tensors,
    })
}

/// Checks one tensor by itself; its offset still counts from the start of the data section.
fn believe(name: String, raw: &RawTensor) -> Result<TensorInfo, TensorErrorKind> {
    let wrong = |reason: String| tensor_error(&name, reason);
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(wrong(format!("a name has 1 to {NAME_BYTES_MAX} bytes")));
    }
    let dtype = match raw.dtype.as_str() {
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::BF16,
        other => {
            let other: String = other.chars().take(16).collect();
            return Err(wrong(format!(
                "dtype {other:?} is not supported; F32, F16 and BF16 are"
            )));
        }
    };
    if raw.shape.len() > DIMENSIONS_MAX {
        return Err(wrong(format!(
            "{} dimensions; at most {DIMENSIONS_MAX} are allowed",
            raw.shape.len()
        )));
    }
    let elements = raw
        .shape
        .iter()
        .try_fold(1_u64, |product, dimension| product.checked_mul(*dimension));
    let bytes = elements.and_then(|elements| elements.checked_mul(dtype.bytes() as u64));
    let bytes = bytes.ok_or_else(|| wrong(format!("the shape {:?} overflows", raw.shape)))?;
    if bytes == 0 {
        return Err(wrong(format!("the shape {:?} holds no element", raw.shape)));
    }
    let [start, end] = raw.data_offsets;
    if end.checked_sub(start) != Some(bytes) {
        return Err(wrong(format!(
            "shape {:?} of {dtype} needs {bytes} bytes, its offsets are {start} to {end}",
            raw.shape
        )));
    }
    let shape = raw
        .shape
        .iter()
        .map(|dimension| usize::try_from(*dimension))
        .collect::<Result<_, _>>();
    let shape = shape.map_err(|_| wrong("a dimension does not fit this machine".to_owned()))?;
    Ok(TensorInfo {
        name,
        dtype,
        shape,
        offset: start,
        bytes,
    })
}

/// Checks that the tensors cover the data section exactly, and makes offsets count from the start of the file.
fn cover(
    tensors: &mut [TensorInfo],
    data_start: u64,
    file_bytes: u64,
) -> Result<(), TensorErrorKind> {
    let mut covered = 0_u64;
    for tensor in tensors.iter_mut() {
        if tensor.offset < covered {
            return Err(tensor_error(
                &tensor.name,
                format!("starts at {}, inside the tensor before it", tensor.offset),
            ));
        }
        if tensor.offset > covered {
            return Err(tensor_error(
                &tensor.name,
                format!(
                    "starts at {}, which leaves a gap from {covered}",
                    tensor.offset
                ),
            ));
        }
        // No overflow: the offsets of this tensor were u64, and its end is one of them.
        covered += tensor.bytes;
        tensor.offset = tensor.offset.saturating_add(data_start);
    }
    let needs = data_start.saturating_add(covered);
    if needs > file_bytes {
        return Err(TensorErrorKind::Truncated {
            what: "the data",
            needs,
            has: file_bytes,
        });
    }
    if needs < file_bytes {
        return Err(TensorErrorKind::Header(format!(
            "the file has {} bytes that belong to no tensor behind its data",
            file_bytes - needs
        )));
    }
    Ok(())
}

fn tensor_error(name: &str, reason: String) -> TensorErrorKind {
    TensorErrorKind::Tensor {
        name: name.chars().take(128).collect(),
        reason,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

struct RawHeader {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, RawTensor)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader {
                    metadata: Vec::new(),
                    tensors: Vec::new(),
                };
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "the key {key:?} is there twice"
                        )));
                    }
                    if key == "__metadata__" {
                        header.metadata = map.next_value::<StringMap<METADATA_MAX>>()?.0;
                        continue;
                    }
                    if header.tensors.len() == TENSORS_MAX {
                        return Err(A::Error::custom(format_args!(
                            "more than {TENSORS_MAX} tensors"
                        )));
                    }
                    header.tensors.push((key, map.next_value()?));
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
