//! Preferences: a prompt with an answer that is wanted and one that is not.
//!
//! As TRL has them: three strings, or three lists of messages; in lists the prompt may be left out, and
//! is then what both conversations begin with.

use serde::Serialize;
use serde_json::{Map, Value};

use super::parse::{invalid, is_learnable, messages, string};
use super::{Message, RecordErrorKind};

/// A prompt and two answers to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Choice<T> {
    /// Given.
    pub prompt: T,
    /// Wanted.
    pub chosen: T,
    /// Not wanted.
    pub rejected: T,
}

/// A preference.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum Preference {
    /// Of plain texts.
    Texts(Choice<String>),
    /// Of conversations: the prompt's turns, and what follows them either way.
    Messages(Choice<Vec<Message>>),
}

/// Reads `{"prompt","chosen","rejected"}`.
pub(super) fn preference(object: &Map<String, Value>) -> Result<Preference, RecordErrorKind> {
    match object.get("chosen") {
        Some(Value::Array(_)) => of_messages(object).map(Preference::Messages),
        _ => of_texts(object).map(Preference::Texts),
    }
}

fn of_texts(object: &Map<String, Value>) -> Result<Choice<String>, RecordErrorKind> {
    let choice = Choice {
        prompt: string(object, "prompt")?.to_owned(),
        chosen: string(object, "chosen")?.to_owned(),
        rejected: string(object, "rejected")?.to_owned(),
    };
    if choice.prompt.trim().is_empty() {
        return Err(RecordErrorKind::Empty("the prompt has no text"));
    }
    if choice.chosen.trim().is_empty() || choice.rejected.trim().is_empty() {
        return Err(RecordErrorKind::Empty("an answer has no text"));
    }
    differ(choice)
}

fn of_messages(object: &Map<String, Value>) -> Result<Choice<Vec<Message>>, RecordErrorKind> {
    let list = |key: &'static str| messages(object, key, "role", "content");
    let (mut chosen, mut rejected) = (list("chosen")?, list("rejected")?);
    let prompt = match object.get("prompt") {
        None | Some(Value::Null) => {
            let pairs = chosen.iter().zip(&rejected);
            let common = pairs.take_while(|(a, b)| a == b).count();
            rejected.drain(..common);
            chosen.drain(..common).collect()
        }
        Some(Value::Array(_)) => list("prompt")?,
        Some(_) => {
            let reason = "is no list of messages, as `chosen` is; leave it out where `chosen` and \
                          `rejected` begin with it";
            return Err(invalid("prompt".to_owned(), reason));
        }
    };
    if prompt.is_empty() {
        return Err(RecordErrorKind::Empty(
            "there is no prompt before the answers",
        ));
    }
    if !chosen.iter().any(is_learnable) || !rejected.iter().any(is_learnable) {
        return Err(RecordErrorKind::Empty(
            "an answer has no assistant turn with text",
        ));
    }
    differ(Choice {
        prompt,
        chosen,
        rejected,
    })
}

fn differ<T: PartialEq>(choice: Choice<T>) -> Result<Choice<T>, RecordErrorKind> {
    if choice.chosen == choice.rejected {
        let reason = "is the same as `chosen`: there is nothing to prefer";
        return Err(invalid("rejected".to_owned(), reason));
    }
    Ok(choice)
}

#[cfg(test)]
mod tests {
    use super::super::{Format, Record};
    use super::*;

    fn read(line: &str) -> Result<Record, RecordErrorKind> {
        Record::from_json_line(line)
    }

    #[test]
    fn strings_and_conversations_are_read_and_written_back() {
        let texts = r#"{"prompt":"2+2?","chosen":"4","rejected":"5"}"#;
        let record = read(texts).unwrap();
        assert!(record.is_preference());
        assert_eq!(record.to_json_line(), texts);
        assert_eq!(record.text_for_dedup(), "2+2?\n4\n5");

        let talk = r#"{"prompt":[{"role":"user","content":"2+2?"}],"chosen":[{"role":"assistant","content":"4"}],"rejected":[{"role":"assistant","content":"5"}]}"#;
        let record = read(talk).unwrap();
        assert_eq!(record.to_json_line(), talk);
        // Without the prompt, it is what both begin with; other keys of the same data do no harm.
        let implicit = r#"{"score":1,"messages":[],"chosen":[{"role":"user","content":"2+2?"},{"role":"assistant","content":"4"}],"rejected":[{"role":"user","content":"2+2?"},{"role":"assistant","content":"5"}]}"#;
        assert_eq!(read(implicit).unwrap(), record);
        assert_eq!(record.text_for_dedup(), "2+2?\n4\n5");
    }

    #[test]
    fn what_prefers_nothing_is_an_error() {
        let user = r#"[{"role":"user","content":"q"}]"#;
        let answer = |text: &str| format!(r#"[{{"role":"assistant","content":"{text}"}}]"#);
        let (a, b) = (answer("a"), answer("b"));
        let lists =
            |p: &str, c: &str, r: &str| format!(r#"{{"prompt":{p},"chosen":{c},"rejected":{r}}}"#);
        for (line, named) in [
            (
                r#"{"prompt":"p","chosen":"a","rejected":"a"}"#.to_owned(),
                "nothing to prefer",
            ),
            (
                r#"{"prompt":"p","chosen":"a"}"#.to_owned(),
                "`rejected` is missing",
            ),
            (
                r#"{"chosen":"a","rejected":"b"}"#.to_owned(),
                "`prompt` is missing",
            ),
            (
                r#"{"prompt":" ","chosen":"a","rejected":"b"}"#.to_owned(),
                "prompt has no text",
            ),
            (
                r#"{"prompt":"p","chosen":"a","rejected":" "}"#.to_owned(),
                "answer has no text",
            ),
            (
                r#"{"prompt":"p","chosen":"a","rejected":"b","text":"t"}"#.to_owned(),
                "fit both",
            ),
            (lists(user, &a, &a), "nothing to prefer"),
            (lists("[]", &a, &b), "no prompt"),
            (lists("null", &a, &b), "no prompt"),
            (lists(user, user, &b), "no assistant turn"),
            (lists("\"q\"", &a, &b), "`prompt` is no list"),
            (lists(user, &a, "\"b\""), "`rejected` is not a list"),
        ] {
            let error = read(&line).unwrap_err().to_string();
            assert!(error.contains(named), "{line}: {error}");
        }
        assert_eq!("preference".parse(), Ok(Format::Preference));
    }
}
