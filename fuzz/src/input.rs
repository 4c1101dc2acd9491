//! Inputs of several parts. Texts end in a byte that UTF-8 has not, so that a mutation which makes
//! a text longer or shorter leaves the others alone.

use std::collections::BTreeMap;

use serde_json::Value;

/// Ends a text; never part of UTF-8.
const END: u8 = 0xff;
/// Flag: header length and data length are made to fit the header's text.
pub const FITTED: u8 = 1;
/// Most bytes of data that are made to fit.
const DATA_BYTES_MAX: u64 = 1 << 16;

/// What is left of an input.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next byte; 0 at the end.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    /// The next text.
    pub fn text(&mut self) -> &'a [u8] {
        let end = self.0.iter().position(|byte| *byte == END);
        let (text, rest) = self.0.split_at(end.unwrap_or(self.0.len()));
        self.0 = rest.get(1..).unwrap_or_default();
        text
    }

    /// A safetensors file: the rest as it is, or, when fitted, a header and the data it announces.
    pub fn safetensors(mut self, flags: u8) -> Vec<u8> {
        if flags & FITTED == 0 {
            return self.0.to_vec();
        }
        let header = self.text();
        fitted(header, self.0)
    }
}

/// A file with this header, its length before it, and as many bytes of data as it announces.
pub fn fitted(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    let start = file.len();
    file.extend_from_slice(data);
    if let Some(bytes) = announced(header).filter(|bytes| *bytes <= DATA_BYTES_MAX) {
        file.resize(start + bytes as usize, 0);
    }
    file
}

/// The largest end of any tensor.
fn announced(header: &[u8]) -> Option<u64> {
    let tensors: BTreeMap<String, Value> = serde_json::from_slice(header).ok()?;
    let end = |tensor: &Value| tensor.get("data_offsets")?.get(1)?.as_u64();
    tensors.values().filter_map(end).max()
}

/// A seed: flags, texts, and what follows.
pub fn join(flags: u8, texts: &[&[u8]], rest: &[u8]) -> Vec<u8> {
    let mut seed = vec![flags];
    for text in texts {
        seed.extend_from_slice(text);
        seed.push(END);
    }
    seed.extend_from_slice(rest);
    seed
}

/// A safetensors file's header without its length, and its data.
pub fn split(file: &[u8]) -> (&[u8], &[u8]) {
    let (length, rest) = file.split_first_chunk().expect("it has a header");
    rest.split_at(u64::from_le_bytes(*length) as usize)
}
