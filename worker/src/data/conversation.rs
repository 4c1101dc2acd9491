//! Which part of a rendered conversation is scored.

use std::ops::Range;

use cairn_stack::records::{Message, Role};
use minijinja::value::Value;

use super::{ChatTemplate, RecordFault};

/// Most messages in one record. Each assistant turn renders the conversation up to it, so the work grows
/// with the square.
const MESSAGES_MAX: usize = 1024;

/// A conversation as the model sees it.
#[derive(Debug, PartialEq, Eq)]
pub struct Rendering {
    /// The whole text.
    pub text: String,
    /// Of each assistant turn, the bytes that are scored; in order, not overlapping.
    pub scored: Vec<Range<usize>>,
}

/// Renders a conversation and finds, of each assistant turn, everything the template renders after its
/// generation prompt: from the end of `render(messages before, add_generation_prompt)` to the end of
/// `render(messages up to and with it)`.
///
/// Templates that render a turn otherwise once more turns follow (as those that take earlier reasoning
/// out) are met half way:
/// - Where the conversation leaves its generation prompt early, the turn starts where the two part, which
///   must be behind the messages before it.
/// - Where the turn has lost its head, it ends where the longest tail of its own rendering, put at its
///   start, ends; what it says must be in that tail.
///
/// # Errors
/// The template's refusal, too many messages, and [`RecordFault::TurnNotFound`] where neither rule holds.
pub fn render_scored(
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<Rendering, RecordFault> {
    if messages.len() > MESSAGES_MAX {
        let (messages, messages_max) = (messages.len(), MESSAGES_MAX);
        return Err(RecordFault::TooManyMessages {
            messages,
            messages_max,
        });
    }
    let values: Vec<Value> = messages.iter().map(message_value).collect();
    let text = template.render(&values, false)?;
    let mut scored: Vec<Range<usize>> = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        if message.role != Role::Assistant {
            continue;
        }
        let prompt = template.render(&values[..i], true)?;
        let turn = if i + 1 == values.len() {
            text.clone()
        } else {
            template.render(&values[..=i], false)?
        };
        let before = || template.render(&values[..i], false);
        let span = turn_start(&text, &prompt, before)?
            .and_then(|start| {
                Some(start..turn_end(&text, start, &prompt, &turn, &message.content)?)
            })
            .filter(|span| scored.last().is_none_or(|last| last.end <= span.start))
            .ok_or(RecordFault::TurnNotFound { message: i + 1 })?;
        scored.push(span);
    }
    Ok(Rendering { text, scored })
}

fn turn_start<E>(
    text: &str,
    prompt: &str,
    before: impl FnOnce() -> Result<String, E>,
) -> Result<Option<usize>, E> {
    let common = common_prefix(text, prompt);
    if common == prompt.len() {
        return Ok(Some(common));
    }
    let before = before()?;
    Ok((text.starts_with(&before) && common >= before.len()).then_some(common))
}

fn turn_end(text: &str, start: usize, prompt: &str, turn: &str, content: &str) -> Option<usize> {
    if turn.len() >= start && text.starts_with(turn) {
        return Some(turn.len());
    }
    let tail = &turn[common_prefix(turn, prompt)..];
    let length = overlap(tail.as_bytes(), &text.as_bytes()[start..]);
    // Reasoning may be gone, what was said after it may not.
    let said = content.rsplit("</think>").next().unwrap_or(content).trim();
    let kept = text.get(start..start + length)?;
    (length > 0 && kept.contains(said)).then_some(start + length)
}

/// Bytes that two texts have in common at their start, whole characters only.
fn common_prefix(a: &str, b: &str) -> usize {
    let pairs = a.chars().zip(b.chars());
    pairs
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum()
}

/// Length of the longest suffix of `tail` that `text` begins with (Knuth, Morris and Pratt: linear time).
fn overlap(tail: &[u8], text: &[u8]) -> usize {
    let pattern = &text[..text.len().min(tail.len())];
    let mut borders = vec![0; pattern.len()];
    let step = |borders: &[usize], mut matched: usize, byte: u8| {
        while matched > 0 && (matched == pattern.len() || pattern[matched] != byte) {
            matched = borders[matched - 1];
        }
        if pattern.get(matched) == Some(&byte) {
            matched + 1
        } else {
            matched
        }
    };
    for i in 1..pattern.len() {
        borders[i] = step(&borders, borders[i - 1], pattern[i]);
    }
    tail.iter()
        .fold(0, |matched, &byte| step(&borders, matched, byte))
}

fn message_value(message: &Message) -> Value {
    Value::from_pairs([
        ("role", message.role.as_str()),
        ("content", message.content.as_str()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use time::OffsetDateTime;

    fn scored(source: &str, turns: &[(Role, &str)]) -> Result<Vec<String>, RecordFault> {
        let template = ChatTemplate::new(source, Vec::new(), OffsetDateTime::UNIX_EPOCH).unwrap();
        let message = |&(role, content): &(Role, &str)| Message {
            role,
            content: content.to_owned(),
        };
        let messages: Vec<Message> = turns.iter().map(message).collect();
        let rendering = render_scored(&template, &messages)?;
        Ok(rendering
            .scored
            .into_iter()
            .map(|span| rendering.text[span].to_owned())
            .collect())
    }

    const TURNS: [(Role, &str); 4] = [
        (Role::User, "q"),
        (Role::Assistant, "a"),
        (Role::User, "r"),
        (Role::Assistant, "b"),
    ];

    #[test]
    fn each_assistant_turn_is_scored_to_its_end() {
        let plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}\
            {% if add_generation_prompt %}<assistant>{% endif %}";
        assert_eq!(scored(plain, &TURNS).unwrap(), ["a|", "b|"]);
    }

    #[test]
    fn a_lost_head_is_not_scored() {
        let heads = "{% for m in messages %}<{{ m.role }}>{% if loop.last %}[think]{% endif %}\
            {{ m.content }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let last_only = heads.replace("loop.last", "loop.last and m.role == 'assistant'");
        assert_eq!(scored(&last_only, &TURNS).unwrap(), ["a|", "[think]b|"]);
    }

    #[test]
    fn a_template_that_moves_earlier_turns_is_refused() {
        let moved = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}";
        assert!(matches!(
            scored(moved, &TURNS),
            Err(RecordFault::TurnNotFound { message: 2 })
        ));
        let forgetful =
            "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}";
        assert!(matches!(
            scored(forgetful, &TURNS),
            Err(RecordFault::TurnNotFound { message: 2 })
        ));
    }

    proptest! {
        #[test]
        fn overlap_is_the_longest(tail in "[ab]{0,12}", text in "[ab]{0,12}") {
            let found = overlap(tail.as_bytes(), text.as_bytes());
            let longest = (0..=tail.len().min(text.len()))
                .rfind(|&n| tail.ends_with(&text[..n]))
                .unwrap_or(0);
            prop_assert_eq!(found, longest);
        }
    }
}
