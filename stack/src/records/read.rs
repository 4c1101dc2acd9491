//! Lines and paragraphs in bounded memory.

use std::io::{self, BufRead};

use super::{Format, LINE_BYTES_MAX, Record, RecordError, RecordErrorKind, parse};

/// Reads records one by one. `name` is the file's name, for errors and, with [`Format::Auto`], for
/// telling `.txt` from JSON lines.
///
/// An error concerns one record; reading goes on behind it, except after an error of the reader.
pub fn read_records<R: BufRead>(reader: R, format: Format, name: &str) -> Records<R> {
    let is_text = name
        .rsplit_once('.')
        .is_some_and(|(_, end)| end.eq_ignore_ascii_case("txt"));
    let plain = format == Format::Plain || (format == Format::Auto && is_text);
    Records {
        reader,
        format,
        name: name.to_owned(),
        line: 0,
        plain,
        done: false,
        buffer: Vec::new(),
    }
}

/// Records of one file with the lines they start on; made by [`read_records`].
pub struct Records<R> {
    reader: R,
    format: Format,
    name: String,
    /// Lines read so far.
    line: u64,
    plain: bool,
    done: bool,
    buffer: Vec<u8>,
}

impl<R: BufRead> Iterator for Records<R> {
    type Item = Result<(u64, Record), RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let found = if self.plain {
            self.next_paragraph()
        } else {
            self.next_json()
        };
        found.map(|(line, result)| {
            result
                .map(|record| (line, record))
                .map_err(|kind| RecordError {
                    name: self.name.clone(),
                    line,
                    kind,
                })
        })
    }
}

type Found = Option<(u64, Result<Record, RecordErrorKind>)>;

impl<R: BufRead> Records<R> {
    fn next_json(&mut self) -> Found {
        loop {
            self.buffer.clear();
            match self.read_line() {
                Ok(false) => return None,
                Ok(true) => {}
                Err(kind) => return Some((self.line, Err(kind))),
            }
            if self.buffer.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let record = match str::from_utf8(&self.buffer) {
                Ok(line) => parse::record(line, self.format),
                Err(_) => Err(RecordErrorKind::NotUtf8),
            };
            return Some((self.line, record));
        }
    }

    /// Lines up to the next blank one, joined by line feeds.
    fn next_paragraph(&mut self) -> Found {
        let mut paragraph = Vec::new();
        let mut first = 0;
        loop {
            self.buffer.clear();
            match self.read_line() {
                Ok(false) => break,
                Ok(true) => {}
                Err(kind) => return Some((self.line, Err(kind))),
            }
            if !self.buffer.iter().all(u8::is_ascii_whitespace) {
                if first == 0 {
                    first = self.line;
                } else {
                    paragraph.push(b'\n');
                }
                if paragraph.len() + self.buffer.len() > LINE_BYTES_MAX {
                    return Some((first, Err(RecordErrorKind::TooLong)));
                }
                paragraph.extend_from_slice(&self.buffer);
            } else if first != 0 {
                break;
            }
        }
        if first == 0 {
            return None;
        }
        let record = match String::from_utf8(paragraph) {
            // White space beyond ASCII's makes no blank line, and nothing to learn.
            Ok(text) if text.trim().is_empty() => {
                Err(RecordErrorKind::Empty("the paragraph has no text"))
            }
            Ok(text) => Ok(Record::Text(text)),
            Err(_) => Err(RecordErrorKind::NotUtf8),
        };
        Some((first, record))
    }

    /// The next line into the buffer, without its end; false at the end of the file. A line over the
    /// limit is read to its end without being kept.
    fn read_line(&mut self) -> Result<bool, RecordErrorKind> {
        let mut seen = false;
        let mut too_long = false;
        loop {
            let available = match self.reader.fill_buf() {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    self.done = true;
                    self.line += 1;
                    return Err(error.into());
                }
            };
            if available.is_empty() {
                self.done = true;
                break;
            }
            seen = true;
            let end = available.iter().position(|byte| *byte == b'\n');
            let part = &available[..end.unwrap_or(available.len())];
            too_long |= self.buffer.len() + part.len() > LINE_BYTES_MAX;
            if !too_long {
                self.buffer.extend_from_slice(part);
            }
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                break;
            }
        }
        if !seen {
            return Ok(false);
        }
        self.line += 1;
        if too_long {
            return Err(RecordErrorKind::TooLong);
        }
        if self.buffer.last() == Some(&b'\r') {
            self.buffer.pop();
        }
        if self.line == 1 && self.buffer.starts_with(b"\xef\xbb\xbf") {
            self.buffer.drain(..3);
        }
        Ok(true)
    }
}
