//! A small reader of Rust sources: enough to say whether code names a path.

/// The words and marks of a source; comments, strings and characters left out, `::` one mark.
pub fn tokens(source: &str) -> Vec<String> {
    let text: Vec<char> = source.chars().collect();
    let mut found = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let next = rest.get(1).copied();
        match rest[0] {
            c if is_word(c) => {
                let word: String = rest.iter().take_while(|c| is_word(**c)).collect();
                at += word.chars().count();
                let raw = matches!(word.as_str(), "r" | "br" | "cr");
                match raw.then(|| raw_string_length(&text[at..])).flatten() {
                    Some(length) => at += length,
                    None => found.push(word),
                }
            }
            '/' if next == Some('/') => at += rest.iter().take_while(|c| **c != '\n').count(),
            '/' if next == Some('*') => at += block_comment_length(rest),
            '"' => at += quoted_length(rest, '"'),
            // A character has its closing quote within reach; a lifetime has none.
            '\'' if next == Some('\\') || rest.get(2) == Some(&'\'') => {
                at += quoted_length(rest, '\'');
            }
            ':' if next == Some(':') => {
                found.push("::".to_owned());
                at += 2;
            }
            c => {
                if !c.is_whitespace() {
                    found.push(c.to_string());
                }
                at += 1;
            }
        }
    }
    found
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The length of a quoted text with its quotes.
fn quoted_length(text: &[char], quote: char) -> usize {
    let mut at = 1;
    while at < text.len() && text[at] != quote {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The length of a block comment, the ones inside it counted.
fn block_comment_length(text: &[char]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        match (text[at], text.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The length of `#"..."#` (any number of marks), where that is what stands here.
fn raw_string_length(text: &[char]) -> Option<usize> {
    let marks = text.iter().take_while(|c| **c == '#').count();
    if text.get(marks) != Some(&'"') {
        return None;
    }
    let mut at = marks + 1;
    while at < text.len() {
        let end = &text[at + 1..];
        if text[at] == '"' && end.iter().take_while(|c| **c == '#').count() >= marks {
            return Some(at + 1 + marks);
        }
        at += 1;
    }
    Some(at)
}

/// Whether the code names this path, written out or through a `use` with braces.
/// A `*` where the path would go on counts as naming it.
pub fn mentions(code: &[String], path: &[&str]) -> bool {
    let Some((first, rest)) = path.split_first() else {
        return false;
    };
    (0..code.len()).any(|at| code[at] == *first && continues(code, at + 1, rest))
}

fn continues(code: &[String], at: usize, rest: &[&str]) -> bool {
    let Some((first, after)) = rest.split_first() else {
        return true;
    };
    if code.get(at).map(String::as_str) != Some("::") {
        return false;
    }
    match code.get(at + 1).map(String::as_str) {
        Some("*") => true,
        Some("{") => branches(code, at + 1)
            .into_iter()
            .any(|branch| code[branch] == *first && continues(code, branch + 1, after)),
        Some(word) => word == *first && continues(code, at + 2, after),
        None => false,
    }
}

/// Where each branch of the brace group that opens at `open` starts.
fn branches(code: &[String], open: usize) -> Vec<usize> {
    let mut found = Vec::new();
    let mut depth = 0;
    for (at, token) in code.iter().enumerate().skip(open) {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ if depth == 1 && matches!(code[at - 1].as_str(), "{" | ",") => found.push(at),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    found
}
