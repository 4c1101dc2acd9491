use std::io::Cursor;

use proptest::prelude::*;

use super::*;

fn read(text: &str, format: Format, name: &str) -> Vec<Result<(u64, Record), RecordError>> {
    read_records(Cursor::new(text.to_owned()), format, name).collect()
}

fn one(line: &str) -> Result<Record, RecordErrorKind> {
    Record::from_json_line(line)
}

fn pair(prompt: &str, completion: &str) -> Record {
    Record::Pair {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
    }
}

fn message(role: Role, content: &str) -> Message {
    Message {
        role,
        content: content.to_owned(),
    }
}

#[test]
fn reads_every_kind() {
    assert_eq!(
        one(r#"{"text":"abc","id":7}"#).unwrap(),
        Record::Text("abc".to_owned())
    );
    assert_eq!(
        one(r#"{"question":"1+1?","answer":"2"}"#).unwrap(),
        pair("1+1?", "2")
    );
    assert_eq!(
        one(r#"{"prompt":"a","completion":"b"}"#).unwrap(),
        pair("a", "b")
    );
    assert_eq!(
        one(r#"{"instruction":"do","input":"this","output":"done"}"#).unwrap(),
        pair("do\nthis", "done")
    );
    assert_eq!(
        one(r#"{"instruction":"do","input":"","output":"done"}"#).unwrap(),
        pair("do", "done")
    );
    assert_eq!(
        one(r#"{"instruction":"do","input":null,"output":"done","text":null}"#).unwrap(),
        pair("do", "done")
    );
    let turns = Record::Messages(vec![
        message(Role::System, "s"),
        message(Role::User, "u"),
        message(Role::Assistant, "a"),
    ]);
    let plain = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"},{"role":"assistant","content":"a"}]}"#;
    let share = r#"{"id":"1","conversations":[{"from":"system","value":"s"},{"from":"human","value":"u"},{"from":"gpt","value":"a"}]}"#;
    assert_eq!(one(plain).unwrap(), turns);
    assert_eq!(one(share).unwrap(), turns);
}

#[test]
fn bad_lines_name_file_line_and_reason() {
    for (line, says) in [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("hello", "not a JSON object"),
        (r#"{"text":"a","text":"b"}"#, "twice"),
        (
            r#"{"txt":"a"}"#,
            "no known kind of record; its keys are \"txt\"",
        ),
        ("{}", "its keys are none"),
        (
            r#"{"text":"a","messages":[]}"#,
            "fit both messages and text",
        ),
        (r#"{"text":3}"#, "`text` is not a string"),
        (r#"{"text":" \n"}"#, "empty record"),
        (r#"{"prompt":"a"}"#, "`completion` is missing"),
        (r#"{"prompt":"","completion":"b"}"#, "empty record"),
        (r#"{"question":"a","answer":" "}"#, "empty record"),
        (r#"{"instruction":"a","output":""}"#, "empty record"),
        (r#"{"messages":[]}"#, "no assistant turn"),
        (
            r#"{"messages":[{"role":"user","content":"u"}]}"#,
            "no assistant turn",
        ),
        (
            r#"{"messages":[{"role":"wizard","content":"u"}]}"#,
            "`messages[0].role` is \"wizard\"",
        ),
        (
            r#"{"messages":[{"role":"user","content":["x"]}]}"#,
            "`messages[0].content` is not a string",
        ),
        (
            r#"{"messages":[{"role":"assistant","content":"a","tool_calls":[1]}]}"#,
            "`tool_calls` is not supported",
        ),
        (
            r#"{"conversations":[7]}"#,
            "`conversations[0]` is not an object",
        ),
        (r#"{"messages":{}}"#, "`messages` is not a list"),
    ] {
        let text = format!("{{\"text\":\"fine\"}}\n\n{line}\n");
        let found = read(&text, Format::Auto, "data.jsonl");
        assert_eq!(found.len(), 2, "{line}");
        let error = found[1].as_ref().unwrap_err().to_string();
        assert!(
            error.starts_with("data.jsonl:3: ") && error.contains(says),
            "{line}: {error}"
        );
    }
}

#[test]
fn a_named_format_settles_what_is_ambiguous() {
    let line = r#"{"instruction":"i","input":"","output":"o","text":"all of it"}"#;
    assert_eq!(
        read(line, Format::Alpaca, "x")[0].as_ref().unwrap().1,
        pair("i", "o")
    );
    assert_eq!(
        read(line, Format::Text, "x")[0].as_ref().unwrap().1,
        Record::Text("all of it".to_owned())
    );
    assert!(read(line, Format::Messages, "x")[0].is_err());
    for format in Format::ALL {
        assert_eq!(format.as_str().parse(), Ok(format));
    }
    assert!("csv".parse::<Format>().is_err());
}

#[test]
fn byte_order_mark_crlf_and_mixed_kinds_are_fine() {
    let text = "\u{feff}{\"text\":\"a\"}\r\n\r\n{\"prompt\":\"p\",\"completion\":\"c\"}";
    let found: Vec<_> = read(text, Format::Auto, "x.jsonl")
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert_eq!(
        found,
        [(1, Record::Text("a".to_owned())), (3, pair("p", "c"))]
    );
    assert!(read("", Format::Auto, "x.jsonl").is_empty());
    assert!(read("\n \r\n", Format::Auto, "x.txt").is_empty());
}

#[test]
fn plain_text_is_cut_at_blank_lines() {
    let text = "\u{feff}one\r\ntwo\r\n\r\n \r\nthree\n\n";
    let found: Vec<_> = read(text, Format::Auto, "book.TXT")
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert_eq!(
        found,
        [
            (1, Record::Text("one\ntwo".to_owned())),
            (5, Record::Text("three".to_owned()))
        ]
    );
    assert_eq!(
        read("{}", Format::Plain, "x")[0].as_ref().unwrap().1,
        Record::Text("{}".to_owned())
    );
    // A paragraph of white space that ASCII has not holds nothing to learn, as in a JSON line.
    let found = read("\u{2028}\u{a0}\n\none\n", Format::Plain, "x");
    let error = found[0].as_ref().unwrap_err().to_string();
    assert!(error.contains("x:1: empty record"), "{error}");
    assert_eq!(
        found[1].as_ref().unwrap(),
        &(3, Record::Text("one".to_owned()))
    );
}

#[test]
fn long_lines_and_other_bytes_are_errors_and_reading_goes_on() {
    let long = format!(
        "{{\"text\":\"{}\"}}\n{{\"text\":\"b\"}}\n",
        "a".repeat(LINE_BYTES_MAX)
    );
    let found = read(&long, Format::Auto, "x.jsonl");
    assert!(
        found[0]
            .as_ref()
            .unwrap_err()
            .to_string()
            .contains("longer than")
    );
    assert_eq!(found[1].as_ref().unwrap().0, 2);
    let bytes = b"{\"text\":\"\xff\"}\n{\"text\":\"b\"}".to_vec();
    let found: Vec<_> = read_records(Cursor::new(bytes), Format::Auto, "x.jsonl").collect();
    assert_eq!(
        found[0].as_ref().unwrap_err().to_string(),
        "x.jsonl:1: not UTF-8"
    );
    assert!(found[1].is_ok());
    let paragraph = "line\n".repeat(LINE_BYTES_MAX / 4);
    assert!(read(&paragraph, Format::Plain, "x.txt")[0].is_err());
}

#[test]
fn deep_nesting_is_an_error() {
    let line = format!("{{\"text\":{}", "[".repeat(100_000));
    assert!(one(&line).is_err());
}

#[test]
fn dedup_text_is_what_is_said() {
    assert_eq!(pair("a", "b").text_for_dedup(), "a\nb");
    let turns = Record::Messages(vec![
        message(Role::User, "a"),
        message(Role::Assistant, "b"),
    ]);
    assert_eq!(turns.text_for_dedup(), "a\nb");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn canonical_lines_read_back(prompt in "\\PC{1,20}x", completion in "\\PC{0,20}y") {
        for record in [
            Record::Text(prompt.clone()),
            pair(&prompt, &completion),
            Record::Messages(vec![message(Role::User, &prompt), message(Role::Assistant, &completion)]),
        ] {
            let line = record.to_json_line();
            prop_assert!(!line.contains('\n'));
            prop_assert_eq!(one(&line).unwrap(), record);
        }
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for format in Format::ALL {
            let _ = read_records(Cursor::new(bytes.clone()), format, "noise").count();
        }
    }
}
