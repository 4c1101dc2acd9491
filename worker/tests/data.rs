//! The data pipeline against transformers (values from `reference/generate_data.py`), and the rules that
//! transformers does not know.

#![expect(clippy::unwrap_used, reason = "a test stops at its first surprise")]

use std::fs;
use std::path::{Path, PathBuf};

use cairn_stack::records::{Message, Record, Role};
use cairn_worker::data::{
    DataError, Encoder, Example, RecordFault, batches, encode_numbered, encode_preferences,
    encode_records, pack,
};
use minijinja::Value as TemplateValue;
use serde_json::{Value, json};
use tempfile::TempDir;
use time::macros::datetime;

/// A sequence length that cuts nothing.
const LONG: usize = 1 << 20;

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("reference/data")
        .join(name)
}

fn cases() -> Value {
    serde_json::from_slice(&fs::read(reference("cases.json")).unwrap()).unwrap()
}

/// A model folder with one of the reference tokenizers.
fn folder(tokenizer: &str, config: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(
        reference(&format!("{tokenizer}.json")),
        folder.path().join("tokenizer.json"),
    )
    .unwrap();
    fs::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    folder
}

fn config() -> Value {
    json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "special": true}})
}

fn with_template(template: &Value) -> Value {
    let mut config = config();
    config["chat_template"] = template.clone();
    config
}

fn messages(value: &Value) -> Vec<Message> {
    let role = |name: &str| match name {
        "system" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        _ => Role::Tool,
    };
    let message = |value: &Value| Message {
        role: role(value["role"].as_str().unwrap()),
        content: value["content"].as_str().unwrap().to_owned(),
    };
    value.as_array().unwrap().iter().map(message).collect()
}

fn template_values(messages: &[Message]) -> Vec<TemplateValue> {
    let value = |message: &Message| {
        TemplateValue::from_pairs([
            ("role", message.role.as_str()),
            ("content", message.content.as_str()),
        ])
    };
    messages.iter().map(value).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
        .collect()
}

fn bits(scored: &[bool]) -> String {
    scored
        .iter()
        .map(|&scored| if scored { '1' } else { '0' })
        .collect()
}

fn pair(prompt: &str, completion: &str) -> Record {
    Record::Pair {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
    }
}

fn text(text: &str) -> Record {
    Record::Text(text.to_owned())
}

#[test]
fn conversations_render_and_score_as_in_transformers() {
    let mut compared = 0;
    for case in cases()["templates"].as_array().unwrap() {
        let name = format!("{} on {}", case["name"], case["tokenizer"]);
        let tokenizer = case["tokenizer"].as_str().unwrap();
        let folder = folder(tokenizer, &with_template(&case["template"]));
        let encoder = Encoder::load_at(folder.path(), datetime!(2025-03-04 05:06:07 UTC)).unwrap();
        let template = encoder.template().unwrap().unwrap();
        for case in case["conversations"].as_array().unwrap() {
            let messages = messages(&case["messages"]);
            let values = template_values(&messages);
            assert_eq!(
                template.render(&values, false).unwrap(),
                case["rendered"],
                "{name}"
            );
            assert_eq!(
                template.render(&values, true).unwrap(),
                case["prompted"],
                "{name}"
            );
            let example = encoder
                .encode(&Record::Messages(messages), LONG)
                .unwrap_or_else(|fault| panic!("{name}: {fault}"));
            assert_eq!(example.tokens, ids(&case["ids"]), "{name}");
            assert_eq!(
                bits(&example.scored),
                case["scored"].as_str().unwrap(),
                "{name}"
            );
            compared += 1;
        }
    }
    assert!(compared > 20, "only {compared} conversations");
}

#[test]
fn text_and_pairs_encode_as_in_transformers() {
    for (tokenizer, case) in cases()["plain"].as_object().unwrap() {
        let encoder = Encoder::load(folder(tokenizer, &config()).path()).unwrap();
        for case in case["texts"].as_array().unwrap() {
            let example = encoder
                .encode(&text(case["text"].as_str().unwrap()), LONG)
                .unwrap();
            assert_eq!(example.tokens, ids(&case["ids"]));
            assert_eq!(
                bits(&example.scored),
                "0".to_owned() + &"1".repeat(example.tokens.len() - 1)
            );
        }
        for case in case["pairs"].as_array().unwrap() {
            let record = pair(
                case["prompt"].as_str().unwrap(),
                case["completion"].as_str().unwrap(),
            );
            let example = encoder.encode(&record, LONG).unwrap();
            assert_eq!(example.tokens, ids(&case["ids"]), "{case}");
            assert_eq!(
                bits(&example.scored),
                case["scored"].as_str().unwrap(),
                "{case}"
            );
        }
    }
}

#[test]
fn a_pair_takes_the_template_where_there_is_one() {
    let template = json!(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}\
         {% if add_generation_prompt %}assistant:{% endif %}"
    );
    let encoder = Encoder::load(folder("plain", &with_template(&template)).path()).unwrap();
    let turns =
        json!([{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]);
    let example = encoder.encode(&pair("how?", "so"), LONG).unwrap();
    assert_eq!(
        example,
        encoder
            .encode(&Record::Messages(messages(&turns)), LONG)
            .unwrap()
    );
    assert_eq!(example.tokens.last(), Some(&1));
    assert_eq!(example.scored.last(), Some(&true));
}

#[test]
fn a_preference_is_its_prompt_with_either_answer() {
    let record = |value: Value| Record::from_json_line(&value.to_string()).unwrap();
    let template = json!(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}\
         {% if add_generation_prompt %}assistant:{% endif %}"
    );
    let with = Encoder::load(folder("plain", &with_template(&template)).path()).unwrap();
    let without = Encoder::load(folder("plain", &config()).path()).unwrap();
    let texts = record(json!({"prompt": "how?", "chosen": "so", "rejected": "not so"}));
    for encoder in [&with, &without] {
        let [chosen, rejected] = encoder.encode_preference(&texts, LONG).unwrap();
        assert_eq!(chosen, encoder.encode(&pair("how?", "so"), LONG).unwrap());
        assert_eq!(
            rejected,
            encoder.encode(&pair("how?", "not so"), LONG).unwrap()
        );
    }
    // Of a conversation, what follows the prompt is scored, and no earlier answer.
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let before = [
        turn("user", "a?"),
        turn("assistant", "b"),
        turn("user", "c?"),
    ];
    let talk = record(json!({
        "prompt": before, "chosen": [turn("assistant", "d")], "rejected": [turn("assistant", "e")],
    }));
    let [chosen, rejected] = with.encode_preference(&talk, LONG).unwrap();
    let all = [&before[..], &[turn("assistant", "d")]].concat();
    let whole = Record::Messages(messages(&Value::Array(all)));
    let whole = with.encode(&whole, LONG).unwrap();
    assert_eq!(chosen.tokens, whole.tokens);
    let last = whole.scored.iter().rposition(|scored| !scored).unwrap();
    assert!(whole.scored_tokens() > chosen.scored_tokens() && chosen.scored_tokens() > 0);
    assert_eq!(chosen.scored[last..], whole.scored[last..]);
    assert!(chosen.scored[..last].iter().all(|scored| !scored));
    assert_eq!(chosen.scored, rejected.scored);

    let cut = with.encode_preference(&talk, 6).unwrap();
    assert!(cut.iter().all(|side| side.cut && side.tokens.len() == 6));
    let (examples, report) = encode_preferences(
        &with,
        [(1, talk.clone()), (2, texts.clone())].into_iter(),
        40,
    )
    .unwrap();
    assert_eq!(
        (report.records, examples.len()),
        (2, 2 * (2 - report.dropped as usize))
    );
    let error = with.encode(&texts, LONG).unwrap_err().to_string();
    assert!(error.contains("objective = \"dpo\""), "{error}");
    let error = with
        .encode_preference(&pair("a", "b"), LONG)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no preference"), "{error}");
}

#[test]
fn the_template_file_wins_and_of_a_list_the_default() {
    let named = json!([
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "from the list"},
    ]);
    let folder = folder("plain", &with_template(&named));
    let rendered = || {
        let encoder = Encoder::load(folder.path()).unwrap();
        encoder
            .template()
            .unwrap()
            .unwrap()
            .render(&[], true)
            .unwrap()
    };
    assert_eq!(rendered(), "from the list");
    let source = "{{ strftime_now('%d %b %Y') }}\r\nfile\n";
    fs::write(folder.path().join("chat_template.jinja"), source).unwrap();
    assert_eq!(rendered(), "26 Jul 2024\nfile");
}

#[test]
fn special_tokens_follow_the_configuration() {
    let mut explicit = config();
    explicit["add_bos_token"] = json!(false);
    explicit["add_eos_token"] = json!(true);
    let encoder = Encoder::load(folder("plain", &explicit).path()).unwrap();
    let example = encoder.encode(&text("stones"), LONG).unwrap();
    assert_ne!(example.tokens[0], 0);
    assert_eq!(example.tokens.last(), Some(&1));
    // The end-of-text token is already there and is not put twice.
    let example = encoder.encode(&pair("stones", "stones"), LONG).unwrap();
    assert_eq!(example.tokens.iter().filter(|&&id| id == 1).count(), 1);
    assert_eq!(example.scored.last(), Some(&true));
}

#[test]
fn end_of_text_falls_back_to_the_model_configuration() {
    let folder = folder("plain", &json!({}));
    let encoder = Encoder::load(folder.path()).unwrap();
    assert!(matches!(
        encoder.encode(&pair("a", "b"), LONG),
        Err(RecordFault::NoEndOfText)
    ));
    let file = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    file("generation_config.json", r#"{"eos_token_id": [6, 1]}"#);
    assert_eq!(
        Encoder::load(folder.path())
            .unwrap()
            .vocabulary()
            .end_of_text(),
        Some(6)
    );
    file("special_tokens_map.json", r#"{"eos_token": "</s>"}"#);
    assert_eq!(
        Encoder::load(folder.path())
            .unwrap()
            .vocabulary()
            .end_of_text(),
        Some(1)
    );
}

#[test]
fn long_records_are_cut_and_counted() {
    let encoder = Encoder::load(folder("plain", &config()).path()).unwrap();
    let long = "stones ".repeat(50);
    let records = vec![
        text(&long),
        text("the"),
        pair(&long, "never reached"),
        text(""),
        pair("a", "b"),
    ];
    let numbered = (1..).zip(records.clone());
    let (examples, report) = encode_numbered(&encoder, numbered, 12).unwrap();
    assert_eq!((report.records, report.cut, report.dropped), (5, 2, 2));
    let cut: Vec<bool> = examples.iter().map(|example| example.cut).collect();
    assert_eq!(cut, [true, false, false]);
    assert_eq!(examples[0].tokens.len(), 12);
    let tokens = |example: &Example| example.tokens.len() as u64;
    assert_eq!(report.tokens, examples.iter().map(tokens).sum::<u64>());
    let scored = |example: &Example| example.scored.iter().filter(|&&scored| scored).count() as u64;
    assert_eq!(
        report.scored_tokens,
        examples.iter().map(scored).sum::<u64>()
    );
    assert_eq!(
        encode_records(&encoder, records.into_iter(), 12).unwrap(),
        examples
    );
}

#[test]
fn many_records_keep_their_order_and_pack_tightly() {
    let encoder = Encoder::load(folder("plain", &config()).path()).unwrap();
    let records: Vec<Record> = (0..3000)
        .map(|i| text(&format!("{i} stones and {}", i * 7)))
        .collect();
    let examples = encode_records(&encoder, records.iter().cloned(), 64).unwrap();
    assert_eq!(examples.len(), records.len());
    for (example, record) in examples.iter().zip(&records) {
        assert_eq!(example, &encoder.encode(record, 64).unwrap());
    }
    let order: Vec<usize> = (0..examples.len()).collect();
    let rows = pack(&examples, &order, 256, true);
    let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
    assert_eq!(
        tokens,
        examples
            .iter()
            .map(|example| example.tokens.len())
            .sum::<usize>()
    );
    assert!(
        tokens * 10 > rows.len() * 256 * 9,
        "{tokens} tokens in {} rows",
        rows.len()
    );
    let count = rows.len();
    assert_eq!(batches(rows, 8).len(), count.div_ceil(8));
}

#[test]
fn a_bad_record_is_named_by_its_number_and_reason() {
    let template = json!(
        "{% for m in messages %}{% if m.content == 'bad' %}\
         {{ raise_exception('only good words') }}{% endif %}{{ m.content }}{% endfor %}"
    );
    let encoder = Encoder::load(folder("plain", &with_template(&template)).path()).unwrap();
    let records = (0..2000).map(|i| pair("q", if i >= 1500 { "bad" } else { "good" }));
    let error = encode_records(&encoder, records, 64)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("record 1501: ") && error.contains("only good words"),
        "{error}"
    );

    let plain = Encoder::load(folder("plain", &config()).path()).unwrap();
    let turns = Record::Messages(vec![Message {
        role: Role::User,
        content: "hi".to_owned(),
    }]);
    let error = encode_numbered(&plain, std::iter::once((41, turns)), 64).unwrap_err();
    assert!(matches!(
        error,
        DataError::Record {
            number: 41,
            fault: RecordFault::NoTemplate
        }
    ));
}

#[test]
fn a_broken_template_only_stops_records_that_need_it() {
    let encoder =
        Encoder::load(folder("plain", &with_template(&json!("{% if %}"))).path()).unwrap();
    assert!(encoder.encode(&text("stones"), LONG).is_ok());
    assert!(matches!(
        encoder.encode(&pair("a", "b"), LONG),
        Err(RecordFault::BadTemplate(_))
    ));
}

#[test]
fn tokens_the_model_does_not_have_are_refused() {
    let folder = folder("plain", &config());
    fs::write(folder.path().join("config.json"), r#"{"vocab_size": 300}"#).unwrap();
    let encoder = Encoder::load(folder.path()).unwrap();
    assert_eq!(encoder.vocabulary().size(), 412);
    let fault = encoder
        .encode(&text("the assistant counts stones"), LONG)
        .unwrap_err();
    assert!(
        matches!(
            fault,
            RecordFault::OutsideVocabulary {
                vocabulary: 300,
                ..
            }
        ),
        "{fault}"
    );
}

#[test]
fn bad_tokenizer_files_are_named() {
    let empty = tempfile::tempdir().unwrap();
    let error = Encoder::load(empty.path()).unwrap_err();
    assert!(matches!(error, DataError::Missing { .. }), "{error}");
    fs::write(empty.path().join("tokenizer.json"), "{\"version\": 1").unwrap();
    let error = Encoder::load(empty.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");

    let no_default = json!({"chat_template": [{"name": "rag", "template": ""}]});
    for config in [json!({"chat_template": 7}), no_default] {
        let error = Encoder::load(folder("plain", &config).path())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("tokenizer_config.json: chat_template"),
            "{error}"
        );
    }
}

#[test]
fn an_oversized_file_is_refused() {
    let folder = folder("plain", &config());
    let file = fs::File::create(folder.path().join("config.json")).unwrap();
    file.set_len(1 << 40).unwrap();
    let error = Encoder::load(folder.path()).unwrap_err();
    assert!(matches!(error, DataError::TooLarge { .. }), "{error}");
}
