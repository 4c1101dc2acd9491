//! `cairn dataset`: curated data in, by chunks.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use cairn_proto::client::Client;
use cairn_proto::convert::BlobName;
use cairn_proto::limits::{EVAL_RECORDS_MAX, PAGE_SIZE_MAX};
use cairn_proto::v1::{
    self, CreateDatasetRequest, Dataset, DatasetSet, GetDatasetRequest, ListDatasetsRequest,
};
use cairn_stack::records::{Format, Record};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use crate::curation::{Entry, Gathered, GramIndex, cut_chunks, gather};
use crate::output::Output;
use crate::transfer::{self, Transfer};
use crate::{Globals, clock, pages, session};

/// Overlapping records named in the error; the rest is counted.
const OVERLAPS_SHOWN: usize = 5;

/// What `cairn dataset` can do.
#[derive(Debug, Subcommand)]
pub enum DatasetCommand {
    /// Curate files and add them as one immutable dataset
    Add(AddArgs),
    /// List the datasets
    List,
}

/// Reads JSONL (text, messages, ShareGPT, Alpaca, question/answer, prompt/completion, preference) or plain
/// text, drops exact duplicates, refuses overlap between training and held-out sets, cuts chunks.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cairn dataset add train.jsonl --name trail --license CC0-1.0\n  cairn dataset add gate.jsonl --name trail-gate --license CC0-1.0 --set gate"
)]
pub struct AddArgs {
    /// Files to read; their order does not matter
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Name of the dataset
    #[arg(long)]
    name: String,
    /// Licence as an SPDX expression, e.g. MIT, CC-BY-4.0
    #[arg(long, value_name = "SPDX", value_parser = parse_license)]
    license: String,
    /// Where the data is from [default: the file names]
    #[arg(long)]
    source: Option<String>,
    /// What the lines are [auto, text, messages, sharegpt, alpaca, question-answer, prompt-completion, preference, plain]
    #[arg(long, default_value = "auto")]
    format: Format,
    /// What the dataset is for: gate decides and audit reports, both secret; dev is public
    #[arg(long = "set", default_value = "train")]
    set: SetWord,
    /// Leave overlapping records out instead of refusing the dataset
    #[arg(long)]
    drop_overlap: bool,
}

impl AddArgs {
    /// The arguments of a plain `dataset add FILE --name --license --set`.
    pub fn plain(file: PathBuf, name: &str, license: &str, set: SetWord) -> Self {
        Self {
            files: vec![file],
            name: name.to_owned(),
            license: license.to_owned(),
            source: None,
            format: Format::Auto,
            set,
            drop_overlap: false,
        }
    }

    /// The files to read.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// What their lines are.
    pub fn format(&self) -> Format {
        self.format
    }
}

/// A set as written on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SetWord {
    /// To learn from.
    Train,
    /// Secret, decides.
    Gate,
    /// Secret, reported only.
    Audit,
    /// Public evaluation data.
    Dev,
}

impl From<SetWord> for DatasetSet {
    fn from(word: SetWord) -> Self {
        match word {
            SetWord::Train => Self::Train,
            SetWord::Gate => Self::Gate,
            SetWord::Audit => Self::Audit,
            SetWord::Dev => Self::Dev,
        }
    }
}

fn parse_license(text: &str) -> Result<String, String> {
    spdx::Expression::parse(text)
        .map(|_| text.to_owned())
        .map_err(|error| format!("not an SPDX licence expression: {}", error.reason))
}

/// Runs `cairn dataset`.
pub async fn run(globals: &Globals, command: DatasetCommand, output: Output) -> Result<()> {
    match command {
        DatasetCommand::Add(args) => {
            let gathered = gather(&args.files, args.format)?;
            let client = session::connect(globals)?;
            let report = add(&client, args, gathered).await?;
            output.result(&report.json(), || report.text())
        }
        DatasetCommand::List => list(&session::connect(globals)?, output).await,
    }
}

/// What adding a dataset did.
pub struct AddReport {
    dataset: Dataset,
    read: u64,
    duplicates: u64,
    overlapping: usize,
    chunks: usize,
}

impl AddReport {
    fn json(&self) -> serde_json::Value {
        json!({
            "dataset": self.dataset.name,
            "set": self.set(),
            "license": self.dataset.license,
            "read": self.read,
            "duplicates": self.duplicates,
            "overlapping": self.overlapping,
            "records": self.dataset.records,
            "bytes": self.dataset.bytes,
            "chunks": self.chunks,
        })
    }

    /// One line for people.
    pub fn text(&self) -> String {
        format!(
            "added {} ({}, {}): {} records read, {} duplicates and {} overlapping left out, {} kept in {} chunks, {} bytes",
            self.dataset.name,
            self.set(),
            self.dataset.license,
            self.read,
            self.duplicates,
            self.overlapping,
            self.dataset.records,
            self.chunks,
            self.dataset.bytes
        )
    }

    fn set(&self) -> &'static str {
        cairn_proto::convert::set_word(self.dataset.set())
    }
}

/// Curates and adds a dataset.
pub async fn add(client: &Client, args: AddArgs, mut gathered: Gathered) -> Result<AddReport> {
    let overlapping = decontaminate(client, &args, &mut gathered).await?;
    ensure!(
        args.set == SetWord::Train || gathered.entries.len() <= EVAL_RECORDS_MAX,
        "an evaluation set has at most {EVAL_RECORDS_MAX} records, this one {}",
        gathered.entries.len()
    );
    let source = args.source.clone().unwrap_or_else(|| {
        let names = args
            .files
            .iter()
            .filter_map(|file| file.file_name())
            .map(|name| name.to_string_lossy());
        names.collect::<Vec<_>>().join(", ")
    });
    let chunks = cut_chunks(gathered.entries.values().map(|entry| entry.line.as_str()));
    let folder = tempfile::tempdir().context("make a folder for the chunks")?;
    let mut transfers = Vec::with_capacity(chunks.len());
    let mut wire = Vec::with_capacity(chunks.len());
    for chunk in &chunks {
        let path = folder.path().join(chunk.digest.to_string());
        std::fs::write(&path, &chunk.bytes).with_context(|| format!("write {}", path.display()))?;
        let blob = BlobName {
            digest: chunk.digest,
            size_bytes: chunk.bytes.len() as u64,
        };
        wire.push(v1::Chunk {
            blob: Some(blob.into()),
            records: chunk.records,
        });
        transfers.push(Transfer { blob, path });
    }
    transfer::upload(client, &transfers).await?;
    let request = CreateDatasetRequest {
        name: args.name,
        set: DatasetSet::from(args.set).into(),
        license: args.license,
        source,
        chunks: wire,
        request_id: session::request_id(),
    };
    let answer = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.datasets.create_dataset(request).await }
        })
        .await
        .context("make the dataset")?;
    Ok(AddReport {
        dataset: answer
            .dataset
            .context("the coordinator answered without the dataset")?,
        read: gathered.read,
        duplicates: gathered.duplicates,
        overlapping,
        chunks: chunks.len(),
    })
}

/// Refuses, or drops, records that share 13 words with a set they must not meet: training data
/// with the secret sets, and gate and audit sets with everything else.
async fn decontaminate(client: &Client, args: &AddArgs, gathered: &mut Gathered) -> Result<usize> {
    let texts: Vec<String> = gathered
        .entries
        .values()
        .map(|entry| entry.record.text_for_dedup())
        .collect();
    let mut index = GramIndex::new(texts.iter().map(String::as_str));
    let others: Vec<Dataset> = datasets(client)
        .await?
        .into_iter()
        .filter(|other| must_not_meet(args.set, other.set()))
        .collect();
    for other in &others {
        pass_dataset(client, &other.name, &mut index).await?;
    }
    let hits: Vec<(&Entry, String)> = gathered
        .entries
        .values()
        .zip(&texts)
        .filter_map(|(entry, text)| Some((entry, index.overlap(text)?.to_owned())))
        .collect();
    if hits.is_empty() {
        return Ok(0);
    }
    if !args.drop_overlap {
        let shown: Vec<String> = hits
            .iter()
            .take(OVERLAPS_SHOWN)
            .map(|(entry, label)| format!("  {} shares 13 words with {label}", entry.place))
            .collect();
        let more = hits.len().saturating_sub(OVERLAPS_SHOWN);
        let more = if more > 0 {
            format!("\n  and {more} more")
        } else {
            String::new()
        };
        bail!(
            "{} of {} records overlap sets they must not meet:\n{}{more}\nnothing was added; remove them, or add --drop-overlap to leave them out",
            hits.len(),
            gathered.entries.len(),
            shown.join("\n")
        );
    }
    let dropped = hits.len();
    let places: std::collections::HashSet<String> = hits
        .into_iter()
        .map(|(entry, _)| entry.place.clone())
        .collect();
    gathered
        .entries
        .retain(|_, entry| !places.contains(&entry.place));
    ensure!(
        !gathered.entries.is_empty(),
        "every record overlaps; nothing is left to add"
    );
    Ok(dropped)
}

fn must_not_meet(new: SetWord, other: DatasetSet) -> bool {
    match other {
        DatasetSet::Gate | DatasetSet::Audit => true,
        DatasetSet::Train | DatasetSet::Dev => matches!(new, SetWord::Gate | SetWord::Audit),
        DatasetSet::Unspecified => false,
    }
}

async fn pass_dataset(client: &Client, name: &str, index: &mut GramIndex) -> Result<()> {
    let request = GetDatasetRequest {
        name: name.to_owned(),
    };
    let answer = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.datasets.get_dataset(request).await }
        })
        .await
        .with_context(|| format!("read the dataset {name}"))?;
    let folder = tempfile::tempdir().context("make a folder for the chunks")?;
    let mut number = 0_u64;
    for chunk in &answer.chunks {
        let blob = chunk
            .blob
            .as_ref()
            .context("the coordinator sent a chunk without a name")?;
        let path = folder.path().join("chunk");
        client
            .download(BlobName::try_from(blob)?, &path, &|_| ())
            .await?;
        let text = std::fs::read_to_string(&path).context("read a chunk")?;
        std::fs::remove_file(&path).context("remove a chunk")?;
        for line in text.lines() {
            number += 1;
            let record = Record::from_json_line(line)
                .with_context(|| format!("record {number} of {name}"))?;
            index.pass(&record.text_for_dedup(), || {
                format!("record {number} of {name}")
            });
        }
    }
    Ok(())
}

/// Every dataset of the coordinator.
async fn datasets(client: &Client) -> Result<Vec<Dataset>> {
    pages::all(|page_token| async {
        let request = ListDatasetsRequest {
            page_size: PAGE_SIZE_MAX as i32,
            page_token,
        };
        let page = client
            .call(|mut to| {
                let request = request.clone();
                async move { to.datasets.list_datasets(request).await }
            })
            .await
            .context("list the datasets")?;
        Ok((page.datasets, page.next_page_token))
    })
    .await
}

async fn list(client: &Client, output: Output) -> Result<()> {
    let set = |dataset: &Dataset| cairn_proto::convert::set_word(dataset.set());
    output.list(
        &datasets(client).await?,
        &["dataset", "set", "records", "bytes", "licence", "added"],
        |dataset| json!({ "dataset": dataset.name, "set": set(dataset), "license": dataset.license, "source": dataset.source, "records": dataset.records, "bytes": dataset.bytes }),
        |dataset| {
            vec![
                dataset.name.clone(),
                set(dataset).to_owned(),
                dataset.records.to_string(),
                dataset.bytes.to_string(),
                dataset.license.clone(),
                clock::date(dataset.created_ms),
            ]
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_spdx() {
        assert!(parse_license("MIT OR Apache-2.0").is_ok());
        assert!(parse_license("free for all").is_err());
    }

    #[test]
    fn training_data_meets_training_data_and_nothing_secret() {
        assert!(!must_not_meet(SetWord::Train, DatasetSet::Train));
        assert!(must_not_meet(SetWord::Train, DatasetSet::Gate));
        assert!(must_not_meet(SetWord::Gate, DatasetSet::Train));
        assert!(must_not_meet(SetWord::Gate, DatasetSet::Audit));
    }
}
