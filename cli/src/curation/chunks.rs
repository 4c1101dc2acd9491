//! Cutting ordered records into content-addressed chunks.

use cairn_stack::digest::Digest;

/// Most records in a chunk: small enough that a worker fetches little more than its shard.
pub const CHUNK_RECORDS_MAX: usize = 256;

/// Most bytes in a chunk, unless a single record is longer: one chunk fits one message.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

/// A run of canonical records, one a line.
#[derive(Debug, PartialEq, Eq)]
pub struct CutChunk {
    /// The lines, each ended by a newline.
    pub bytes: Vec<u8>,
    /// How many there are.
    pub records: u32,
    /// BLAKE3 of `bytes`.
    pub digest: Digest,
}

/// Cuts lines into chunks of at most [`CHUNK_RECORDS_MAX`] records and [`CHUNK_BYTES_MAX`] bytes.
pub fn cut_chunks<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<CutChunk> {
    let mut chunks = Vec::new();
    let mut bytes = Vec::new();
    let mut records = 0;
    for line in lines {
        let full =
            records as usize == CHUNK_RECORDS_MAX || bytes.len() + line.len() + 1 > CHUNK_BYTES_MAX;
        if full && records > 0 {
            chunks.push(finish(std::mem::take(&mut bytes), records));
            records = 0;
        }
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
        records += 1;
    }
    if records > 0 {
        chunks.push(finish(bytes, records));
    }
    chunks
}

fn finish(bytes: Vec<u8>, records: u32) -> CutChunk {
    let digest = Digest::of(&bytes);
    CutChunk {
        bytes,
        records,
        digest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_lands_in_one_chunk_in_order() {
        let lines: Vec<String> = (0..1000).map(|n| format!("{{\"text\":\"{n}\"}}")).collect();
        let chunks = cut_chunks(lines.iter().map(String::as_str));
        let joined: Vec<u8> = chunks
            .iter()
            .flat_map(|chunk| chunk.bytes.clone())
            .collect();
        assert_eq!(String::from_utf8(joined).unwrap(), lines.join("\n") + "\n");
        assert_eq!(
            chunks.iter().map(|chunk| chunk.records).collect::<Vec<_>>(),
            [256, 256, 256, 232]
        );
    }

    #[test]
    fn long_records_cut_by_bytes_and_a_giant_stands_alone() {
        let long = "x".repeat(CHUNK_BYTES_MAX / 2);
        let giant = "y".repeat(CHUNK_BYTES_MAX * 2);
        let chunks = cut_chunks([long.as_str(), &long, &giant, "z"].into_iter());
        assert_eq!(
            chunks.iter().map(|chunk| chunk.records).collect::<Vec<_>>(),
            [1, 1, 1, 1]
        );
    }

    #[test]
    fn no_lines_no_chunks() {
        assert_eq!(cut_chunks(std::iter::empty()), Vec::new());
    }
}
