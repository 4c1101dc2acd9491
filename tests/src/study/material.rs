//! What the arms learn from: a base model, training records with topics, and eval sets.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use cairn_stack::records::Record;

/// Records of the gate set, which Cairn's rule looks at.
const GATE_RECORDS: usize = 80;
/// Records of the audit set, which nothing looks at before the report.
const AUDIT_RECORDS: usize = 320;
/// Records of the set that shows what is forgotten.
const OLD_RECORDS: usize = 60;

/// One training record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its JSON line, without a line end.
    pub line: String,
    /// What it is about; uneven shards differ in their topics.
    pub topic: usize,
}

/// Base model and data, as files in a work folder.
#[derive(Debug, Clone)]
pub struct Material {
    /// For the report.
    pub name: String,
    /// Hugging Face folder.
    pub base: PathBuf,
    /// Training records.
    pub pool: Vec<Item>,
    /// How many topics.
    pub topics: usize,
    /// Gate set.
    pub gate: PathBuf,
    /// Audit set.
    pub audit: PathBuf,
    /// Text of the kind the base was trained on: what the rounds must not destroy.
    pub old: PathBuf,
    /// Tokens after which a record is cut.
    pub sequence_length: u32,
}

/// Our own data: the demo's base and trail notes, and village text that the base has not seen.
///
/// # Errors
/// When a file is missing or broken.
pub fn own(work: &Path) -> Result<Material> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR"));
    let demo = ours.join("../cli/demo");
    let read = |name: &str| lines(&demo.join(name));
    Ok(Material {
        name: "trail notes".to_owned(),
        base: demo.join("base"),
        sequence_length: 128,
        ..assemble(
            work,
            read("train.jsonl")?,
            &read("gate.jsonl")?,
            &read("audit.jsonl")?,
            &lines(&ours.join("data/village.jsonl"))?,
        )?
    })
}

/// GSM8K from a folder with `gsm8k-train.jsonl`, `gsm8k-test.jsonl` and `gsm8k-base`. The base has
/// read the questions of the first half of the training file; the rounds learn from the second.
///
/// # Errors
/// When a file is missing or broken.
pub fn gsm8k(work: &Path, data: &Path) -> Result<Material> {
    let train = lines(&data.join("gsm8k-train.jsonl"))?;
    let test = lines(&data.join("gsm8k-test.jsonl"))?;
    ensure!(
        test.len() >= GATE_RECORDS + AUDIT_RECORDS,
        "gsm8k-test.jsonl has too few records"
    );
    let (first, second) = train.split_at(train.len() / 2);
    let questions: Vec<String> = first
        .iter()
        .map(|line| match Record::from_json_line(line)? {
            Record::Pair { prompt, .. } => Ok(Record::Text(prompt).to_json_line()),
            other => Ok(other.to_json_line()),
        })
        .collect::<Result<_>>()?;
    Ok(Material {
        name: "GSM8K".to_owned(),
        base: data.join("gsm8k-base"),
        sequence_length: 320,
        ..assemble(
            work,
            second.to_vec(),
            &test[..GATE_RECORDS],
            &test[GATE_RECORDS..],
            &questions,
        )?
    })
}

fn assemble(
    work: &Path,
    train: Vec<String>,
    gate: &[String],
    audit: &[String],
    old: &[String],
) -> Result<Material> {
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    let topics: Vec<String> = train
        .iter()
        .map(|line| topic(line))
        .collect::<Result<_>>()?;
    for name in &topics {
        let next = names.len();
        names.entry(name.clone()).or_insert(next);
    }
    let pool = train
        .into_iter()
        .zip(&topics)
        .map(|(line, name)| Item {
            line,
            topic: names[name],
        })
        .collect();
    let write = |name: &str, records: &[String], most: usize| -> Result<PathBuf> {
        let path = work.join(name);
        write_lines(&path, records.iter().take(most).map(String::as_str))?;
        Ok(path)
    };
    fs::create_dir_all(work)?;
    Ok(Material {
        name: String::new(),
        base: PathBuf::new(),
        topics: names.len(),
        pool,
        gate: write("gate.jsonl", gate, GATE_RECORDS)?,
        audit: write("audit.jsonl", audit, AUDIT_RECORDS)?,
        old: write("old.jsonl", old, OLD_RECORDS)?,
        sequence_length: 0,
    })
}

/// What a record is about: the number of steps of a worked solution that ends in `#### n`, otherwise
/// the first words of the answer, which tell our questions apart (`Above`, `Drink at`, ...).
fn topic(line: &str) -> Result<String> {
    let record = Record::from_json_line(line)?;
    let Record::Pair { completion, .. } = &record else {
        return Ok(String::new());
    };
    if completion.contains("####") {
        return Ok(format!("{} steps", completion.lines().count().min(8)));
    }
    let words: Vec<&str> = completion.split_whitespace().take(3).collect();
    Ok(match words.first() {
        Some(&"The") => words.join(" "),
        Some(first) => (*first).to_owned(),
        None => String::new(),
    })
}

/// The lines of a file that are not blank.
fn lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let lines: Vec<String> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(str::to_owned)
        .collect();
    ensure!(!lines.is_empty(), "{} holds no record", path.display());
    Ok(lines)
}

/// Writes records, one a line.
///
/// # Errors
/// When the file cannot be written.
pub fn write_lines<'a>(path: &Path, records: impl Iterator<Item = &'a str>) -> Result<()> {
    let text: String = records.flat_map(|line| [line, "\n"]).collect();
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_records_have_six_topics() {
        let work = tempfile::tempdir().unwrap();
        let material = own(work.path()).unwrap();
        assert_eq!(material.topics, 6);
        assert!(material.pool.len() > 2_000);
        assert_eq!(lines(&material.gate).unwrap().len(), GATE_RECORDS);
    }

    #[test]
    fn a_worked_solution_goes_by_its_steps() {
        let line = r#"{"question":"q","answer":"a\nb\n#### 3"}"#;
        assert_eq!(topic(line).unwrap(), "3 steps");
    }
}
