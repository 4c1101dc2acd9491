//! One JSON line to one record.

use serde_json::{Map, Value};

use super::preference::preference;
use super::{Format, MESSAGES_MAX, Message, Record, RecordErrorKind, Role};
use crate::json::{parse_strict, reason};

/// Keys that mark a kind, most telling first.
const MARKS: [(&str, Format); 8] = [
    ("chosen", Format::Preference),
    ("messages", Format::Messages),
    ("conversations", Format::ShareGpt),
    ("instruction", Format::Alpaca),
    ("question", Format::QuestionAnswer),
    ("prompt", Format::PromptCompletion),
    ("completion", Format::PromptCompletion),
    ("text", Format::Text),
];

/// Keys whose loss would change what is learnt.
const REFUSED: [&str; 5] = ["tools", "tool_calls", "function_call", "images", "audio"];

pub(super) fn record(line: &str, format: Format) -> Result<Record, RecordErrorKind> {
    let value =
        parse_strict(line.as_bytes()).map_err(|error| RecordErrorKind::Json(reason(&error)))?;
    let Value::Object(object) = value else {
        return Err(RecordErrorKind::Json(
            "it is another kind of value".to_owned(),
        ));
    };
    refuse_lossy(&object)?;
    match format {
        Format::Auto => by_format(sniff(&object)?, &object),
        format => by_format(format, &object),
    }
}

fn sniff(object: &Map<String, Value>) -> Result<Format, RecordErrorKind> {
    let mut found = None;
    for (key, format) in MARKS {
        // Null is how tables spell "not there".
        let there = object.get(key).is_some_and(|value| !value.is_null());
        match found {
            None if there => found = Some(format),
            // A preference has a prompt, and may have the chosen conversation once more.
            Some(Format::Preference) if matches!(key, "prompt" | "messages") => {}
            Some(first) if there && first != format => {
                return Err(RecordErrorKind::Ambiguous(first, format));
            }
            _ => {}
        }
    }
    found.ok_or_else(|| {
        let keys: Vec<String> = object
            .keys()
            .take(8)
            .map(|key| format!("{:?}", short(key)))
            .collect();
        RecordErrorKind::UnknownKind(if keys.is_empty() {
            "none".to_owned()
        } else {
            keys.join(", ")
        })
    })
}

fn by_format(format: Format, object: &Map<String, Value>) -> Result<Record, RecordErrorKind> {
    match format {
        Format::Auto | Format::Plain | Format::Text => {
            let text = string(object, "text")?;
            if text.trim().is_empty() {
                return Err(RecordErrorKind::Empty("`text` has no text"));
            }
            Ok(Record::Text(text.to_owned()))
        }
        Format::Messages => conversation(object, "messages", "role", "content"),
        Format::ShareGpt => conversation(object, "conversations", "from", "value"),
        Format::Preference => preference(object).map(Record::Preference),
        Format::Alpaca => {
            let instruction = string(object, "instruction")?;
            let input = match object.get("input") {
                None | Some(Value::Null) => "",
                Some(_) => string(object, "input")?,
            };
            let prompt = if input.is_empty() {
                instruction.to_owned()
            } else {
                format!("{instruction}\n{input}")
            };
            pair(prompt, string(object, "output")?)
        }
        Format::QuestionAnswer => pair(
            string(object, "question")?.to_owned(),
            string(object, "answer")?,
        ),
        Format::PromptCompletion => pair(
            string(object, "prompt")?.to_owned(),
            string(object, "completion")?,
        ),
    }
}

fn pair(prompt: String, completion: &str) -> Result<Record, RecordErrorKind> {
    if prompt.trim().is_empty() {
        return Err(RecordErrorKind::Empty("the prompt has no text"));
    }
    if completion.trim().is_empty() {
        return Err(RecordErrorKind::Empty("the answer has no text"));
    }
    Ok(Record::Pair {
        prompt,
        completion: completion.to_owned(),
    })
}

fn conversation(
    object: &Map<String, Value>,
    list: &'static str,
    speaker: &'static str,
    said: &'static str,
) -> Result<Record, RecordErrorKind> {
    let messages = messages(object, list, speaker, said)?;
    if !messages.iter().any(is_learnable) {
        return Err(RecordErrorKind::Empty("no assistant turn has text"));
    }
    Ok(Record::Messages(messages))
}

/// Whether it is a turn of the model that says something.
pub(super) fn is_learnable(message: &Message) -> bool {
    message.role == Role::Assistant && !message.content.trim().is_empty()
}

pub(super) fn messages(
    object: &Map<String, Value>,
    list: &'static str,
    speaker: &'static str,
    said: &'static str,
) -> Result<Vec<Message>, RecordErrorKind> {
    let turns = match object.get(list) {
        None | Some(Value::Null) => return Err(RecordErrorKind::Missing(list)),
        Some(Value::Array(turns)) => turns,
        Some(_) => return Err(invalid(list.to_owned(), "is not a list")),
    };
    if turns.len() > MESSAGES_MAX {
        return Err(invalid(
            list.to_owned(),
            &format!("has {} turns; at most {MESSAGES_MAX} are read", turns.len()),
        ));
    }
    let mut messages = Vec::with_capacity(turns.len());
    for (index, turn) in turns.iter().enumerate() {
        let place = |key: &str| format!("{list}[{index}].{key}");
        let Value::Object(turn) = turn else {
            return Err(invalid(format!("{list}[{index}]"), "is not an object"));
        };
        refuse_lossy(turn)?;
        let word = |key: &str| match turn.get(key) {
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(_) => Err(invalid(place(key), "is not a string")),
            None => Err(invalid(place(key), "is missing")),
        };
        let name = word(speaker)?;
        let role = role(name).ok_or_else(|| {
            invalid(
                place(speaker),
                &format!("is {:?}, no role we know", short(name)),
            )
        })?;
        messages.push(Message {
            role,
            content: word(said)?.to_owned(),
        });
    }
    Ok(messages)
}

/// The role words of `messages` and of ShareGPT in one table; files mix them.
fn role(word: &str) -> Option<Role> {
    match word {
        "system" | "developer" => Some(Role::System),
        "user" | "human" => Some(Role::User),
        "assistant" | "gpt" | "model" | "chatgpt" | "bing" | "bard" => Some(Role::Assistant),
        "tool" | "observation" => Some(Role::Tool),
        _ => None,
    }
}

fn refuse_lossy(object: &Map<String, Value>) -> Result<(), RecordErrorKind> {
    let filled = |value: &Value| match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    };
    match REFUSED
        .iter()
        .find(|key| object.get(**key).is_some_and(filled))
    {
        Some(key) => Err(invalid(
            (*key).to_owned(),
            "is not supported, and leaving it out would change the record",
        )),
        None => Ok(()),
    }
}

pub(super) fn string<'a>(
    object: &'a Map<String, Value>,
    key: &'static str,
) -> Result<&'a str, RecordErrorKind> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        None | Some(Value::Null) => Err(RecordErrorKind::Missing(key)),
        Some(_) => Err(invalid(key.to_owned(), "is not a string")),
    }
}

pub(super) fn invalid(key: String, reason: &str) -> RecordErrorKind {
    RecordErrorKind::Invalid {
        key,
        reason: reason.to_owned(),
    }
}

fn short(text: &str) -> String {
    text.chars().take(32).collect()
}
