//! The few Python functions that chat templates call: `json.dumps` and `datetime.strftime`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use time::OffsetDateTime;

/// Deepest value `tojson` writes; real messages nest four or five deep.
const JSON_DEPTH_MAX: usize = 64;
/// Widest indentation; wider ones only serve to fill memory.
const JSON_INDENT_MAX: usize = 16;
/// Longest `strftime_now` format, in bytes.
const FORMAT_BYTES_MAX: usize = 256;

/// `json.dumps` as transformers gives it to templates: no HTML escapes, letters beyond ASCII as they are,
/// Python's separators. Takes `ensure_ascii`, `indent`, `separators` and `sort_keys`.
pub(super) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        Some(indent) if !indent.is_none() => {
            let indent = indent
                .as_usize()
                .filter(|&indent| indent <= JSON_INDENT_MAX);
            Some(indent.ok_or_else(|| invalid("tojson: indent is not a small number"))?)
        }
        _ => None,
    };
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.clone(), colon.clone()),
        Some(_) => return Err(invalid("tojson: separators are not a pair")),
        None => (
            (if indent.is_some() { "," } else { ", " }).to_owned(),
            ": ".to_owned(),
        ),
    };
    let mut writer = Json {
        out: String::new(),
        indent,
        comma,
        colon,
        ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    writer.value(state, value, 0)?;
    Ok(writer.out)
}

struct Json {
    out: String,
    indent: Option<usize>,
    comma: String,
    colon: String,
    ascii: bool,
    sorted: bool,
}

impl Json {
    fn value(&mut self, state: &State, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > JSON_DEPTH_MAX {
            return Err(invalid("tojson: nested too deep"));
        }
        // Custom filters pay for their own work: without this a small value printed often is free.
        state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let _ = write!(self.out, "{value}");
            }
            ValueKind::String => self.string(state, value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.block(state, ['[', ']'], items.len(), depth, |json, i| {
                    json.value(state, &items[i], depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.block(state, ['{', '}'], keys.len(), depth, |json, i| {
                    json.string(state, &keys[i].to_string())?;
                    json.out.push_str(&json.colon);
                    json.value(state, &value.get_item(&keys[i])?, depth + 1)
                })?;
            }
            _ => return Err(invalid("tojson: not a JSON value")),
        }
        Ok(())
    }

    fn block(
        &mut self,
        state: &State,
        [open, close]: [char; 2],
        count: usize,
        depth: usize,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..count {
            if i > 0 {
                self.out.push_str(&self.comma);
            }
            self.line(state, depth + 1)?;
            item(self, i)?;
        }
        if count > 0 {
            self.line(state, depth)?;
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, state: &State, depth: usize) -> Result<(), Error> {
        if let Some(indent) = self.indent {
            state.consume_fuel((indent * depth / 64) as u64)?;
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
        Ok(())
    }

    fn string(&mut self, state: &State, text: &str) -> Result<(), Error> {
        state.consume_fuel(text.len() as u64 / 64)?;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
        Ok(())
    }
}

/// `now.strftime(format)` with C's English names. Unknown directives are an error, not silent text.
pub(super) fn strftime(now: OffsetDateTime, format: &str) -> Result<String, Error> {
    if format.len() > FORMAT_BYTES_MAX {
        return Err(invalid("strftime_now: format too long"));
    }
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = match rest.next() {
            // `%-d` drops the padding.
            Some('-') => {
                let padded = directive(now, rest.next())?;
                let bare = padded.trim_start_matches(['0', ' ']);
                if bare.is_empty() {
                    "0".to_owned()
                } else {
                    bare.to_owned()
                }
            }
            other => directive(now, other)?,
        };
        out.push_str(&directive);
    }
    Ok(out)
}

fn directive(now: OffsetDateTime, directive: Option<char>) -> Result<String, Error> {
    let month = now.month().to_string();
    let weekday = now.weekday().to_string();
    let hour12 = (now.hour() + 11) % 12 + 1;
    Ok(match directive {
        Some('Y') => now.year().to_string(),
        Some('y') => format!("{:02}", now.year().rem_euclid(100)),
        Some('m') => format!("{:02}", u8::from(now.month())),
        Some('d') => format!("{:02}", now.day()),
        Some('e') => format!("{:2}", now.day()),
        Some('j') => format!("{:03}", now.ordinal()),
        Some('B') => month,
        Some('b' | 'h') => month.chars().take(3).collect(),
        Some('A') => weekday,
        Some('a') => weekday.chars().take(3).collect(),
        Some('H') => format!("{:02}", now.hour()),
        Some('I') => format!("{hour12:02}"),
        Some('M') => format!("{:02}", now.minute()),
        Some('S') => format!("{:02}", now.second()),
        Some('p') => (if now.hour() < 12 { "AM" } else { "PM" }).to_owned(),
        Some('F') => strftime(now, "%Y-%m-%d")?,
        Some('T') => strftime(now, "%H:%M:%S")?,
        Some('D') => strftime(now, "%m/%d/%y")?,
        // A naive datetime prints no zone.
        Some('Z' | 'z') => String::new(),
        Some('n') => "\n".to_owned(),
        Some('t') => "\t".to_owned(),
        Some('%') => "%".to_owned(),
        Some(other) => return Err(invalid(format!("strftime_now: unknown directive %{other}"))),
        None => return Err(invalid("strftime_now: the format ends in %")),
    })
}

fn invalid(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}
