//! A format, and a file of training data.

use cairn_stack::records::{Format, Record, read_records};

use crate::assert_short;
use crate::input::{Input, join};

/// Every record has something to learn: it is written to a line that reads the same. Line numbers
/// rise, and reading ends.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let format = Format::ALL[usize::from(input.byte()) % Format::ALL.len()];
    let mut last = 0;
    for record in read_records(input.0, format, "data") {
        match record {
            Ok((line, record)) => {
                assert!(line > last, "line {line} after {last}");
                last = line;
                let written = record.to_json_line();
                assert!(!written.contains('\n'));
                let again = Record::from_json_line(&written).expect("what we write is read");
                assert_eq!(again, record);
                assert!(!record.text_for_dedup().is_empty());
            }
            Err(error) => {
                assert!(error.line > last, "line {} after {last}", error.line);
                last = error.line;
                assert_short(&error.to_string());
            }
        }
    }
}

/// A file of every format.
pub fn seeds() -> Vec<Vec<u8>> {
    let lines = [
        "{\"text\":\"one two\"}\n\n{\"text\":\"three\"}\r\n",
        "{\"text\":\"one \\ud83d\\ude00\",\"source\":\"x\"}\n",
        r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#,
        r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"},{"from":"tool","value":""}]}"#,
        r#"{"instruction":"i","input":"","output":"o"}"#,
        r#"{"question":"q","answer":"a","tools":[]}"#,
        r#"{"prompt":"p","completion":"c","images":null}"#,
        "\u{feff}One paragraph\nof two lines.\n\n\nAnother.",
    ];
    let file = |(format, text): (usize, &&str)| join(format as u8, &[], text.as_bytes());
    let all = join(0, &[], lines[2..7].join("\n").as_bytes());
    lines.iter().enumerate().map(file).chain([all]).collect()
}
