//! JSON that refuses duplicate keys. `serde_json` silently keeps the last of two equal keys, so two
//! readers of one file could believe two different things.

use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Longest line of [`reason`], in characters.
const REASON_LINE_MAX: usize = 320;
/// Most lines of [`reason`]; TOML shows the place in four.
const REASON_LINES_MAX: usize = 8;

/// What a parser says is wrong. Parsers repeat the input, keys and lines of any length: each line
/// keeps its start and its end, where the place is named.
pub(crate) fn reason(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    let lines = text.trim_end().lines().take(REASON_LINES_MAX);
    let lines: Vec<String> = lines.map(cut).collect();
    lines.join("\n")
}

fn cut(line: &str) -> String {
    let count = line.chars().count();
    if count <= REASON_LINE_MAX {
        return line.to_owned();
    }
    let half = REASON_LINE_MAX / 2;
    let start: String = line.chars().take(half).collect();
    let end: String = line.chars().skip(count - half).collect();
    format!("{start} ... {end}")
}

/// Parses one JSON document; two equal keys in any object are an error.
pub(crate) fn parse_strict(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Strict.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("a number must be finite"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(Strict)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Strict)?;
            if values.contains_key(&key) {
                return Err(A::Error::custom(format_args!(
                    "the key {key:?} is there twice"
                )));
            }
            values.insert(key, value);
        }
        Ok(Value::Object(values))
    }
}

/// An object of strings only, in the order of the file, keys unique, at most `N` of them.
pub(crate) struct StringMap<const N: usize>(pub(crate) Vec<(String, String)>);

impl<'de, const N: usize> Deserialize<'de> for StringMap<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings<const N: usize>;
        impl<'de, const N: usize> Visitor<'de> for Strings<N> {
            type Value = StringMap<N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "the key {key:?} is there twice"
                        )));
                    }
                    if entries.len() == N {
                        return Err(A::Error::custom(format_args!("more than {N} keys")));
                    }
                    entries.push((key, value));
                }
                Ok(StringMap(entries))
            }
        }
        deserializer.deserialize_map(Strings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_serde_json_on_honest_input() {
        for text in [
            r#"{"a":[1,-2,2.5,"x",null,true,{"b":{}}]}"#,
            "[]",
            "17",
            "\"\"",
        ] {
            assert_eq!(
                parse_strict(text.as_bytes()).unwrap(),
                serde_json::from_str::<Value>(text).unwrap()
            );
        }
    }

    #[test]
    fn refuses_duplicates_anywhere_and_trailing_text() {
        for text in [
            r#"{"a":1,"a":1}"#,
            r#"[{"b":{"a":1,"\u0061":2}}]"#,
            "{} {}",
            "{",
            "nan",
            "1e999",
        ] {
            assert!(parse_strict(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_reason_repeats_no_more_than_a_line() {
        let long = format!("{{\"{0}\":1,\"{0}\":1}}", "k".repeat(100_000));
        let error = parse_strict(long.as_bytes()).unwrap_err();
        let text = reason(&error);
        assert!(
            text.len() < 400 && text.starts_with("the key \"kkk"),
            "{text}"
        );
        assert!(text.ends_with(" at line 1 column 200011"), "{text}");
        assert_eq!(reason(&"short\nand plain\n"), "short\nand plain");
    }

    #[test]
    fn depth_is_bounded() {
        let deep = "[".repeat(100_000);
        assert!(parse_strict(deep.as_bytes()).is_err());
    }
}
