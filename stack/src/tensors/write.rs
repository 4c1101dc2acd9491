//! Writing safetensors: header first, bodies streamed after it, the same bytes on every run.

use std::fmt::Write as _;
use std::io::{self, Write};

use super::Dtype;

/// One tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of its elements; saturates, and no such file can be written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let elements = self
            .shape
            .iter()
            .fold(1_u64, |product, d| product.saturating_mul(*d as u64));
        elements.saturating_mul(self.dtype.bytes() as u64)
    }
}

/// Length field, JSON and padding for tensors that follow each other in the given order.
///
/// Padded with spaces to a multiple of 8, as the reference implementation does, so that bodies are
/// aligned for readers that map the file.
#[must_use]
pub fn header_bytes(metadata: &[(&str, &str)], tensors: &[TensorSpec]) -> Vec<u8> {
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    let mut json = String::from("{");
    if !metadata.is_empty() {
        let entries: Vec<String> = metadata
            .iter()
            .map(|(key, value)| format!("{}:{}", quote(key), quote(value)))
            .collect();
        let _ = write!(json, "\"__metadata__\":{{{}}}", entries.join(","));
    }
    let mut offset = 0_u64;
    for tensor in tensors {
        let comma = if json.len() > 1 { "," } else { "" };
        let end = offset.saturating_add(tensor.bytes());
        let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
        let (name, dtype, shape) = (quote(&tensor.name), tensor.dtype, shape.join(","));
        let _ = write!(
            json,
            "{comma}{name}:{{\"dtype\":\"{dtype}\",\"shape\":[{shape}],\"data_offsets\":[{offset},{end}]}}"
        );
        offset = end;
    }
    json.push('}');
    while !json.len().is_multiple_of(8) {
        json.push(' ');
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes
}

/// Writes a whole file: the header for `tensors` in the given order, then `body(i)` for each.
///
/// # Errors
/// Whatever the writer or `body` answers; [`io::ErrorKind::InvalidData`] when a body has not the
/// length its tensor needs.
pub fn write_tensors<E: From<io::Error>>(
    mut out: impl Write,
    metadata: &[(&str, &str)],
    tensors: &[TensorSpec],
    mut body: impl FnMut(usize) -> Result<Vec<u8>, E>,
) -> Result<(), E> {
    out.write_all(&header_bytes(metadata, tensors))?;
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = body(index)?;
        if bytes.len() as u64 != tensor.bytes() {
            let text = format!(
                "{} needs {} bytes, got {}",
                tensor.name,
                tensor.bytes(),
                bytes.len()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text).into());
        }
        out.write_all(&bytes)?;
    }
    out.flush()?;
    Ok(())
}
