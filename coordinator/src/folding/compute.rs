//! The arithmetic of a fold, on files alone.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cairn_stack::adapter::AdapterFile;
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::compress;
use cairn_stack::files::{FileEntry, list_files};
use cairn_stack::fold::{FoldError, Term, fold};
use cairn_stack::spectral::{Spectrum, stack_spectrum, stack_work};
use serde::{Deserialize, Serialize};

use super::{Failure, Layer, Plan};
use crate::ids::SubmissionId;

/// Folder of the folded checkpoint.
pub(super) const OUT: &str = "out";
/// Folder of the round's stack.
pub(super) const STACK: &str = "stack";
/// Folder of the round's stack at the recipe's rank.
pub(super) const COMPRESSED: &str = "compressed";

/// Most multiplications that measuring a stack, or compressing a round's, may take: about half a
/// minute on one core. A checkpoint is not kept waiting for longer.
const WORK_MAX: f64 = 3e10;

/// What is recorded of a checkpoint's stack.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Spectra {
    /// Frobenius norm over all modules; none when not measured.
    pub norm: Option<f64>,
    /// Effective rank of all modules as one block-diagonal matrix.
    pub effective_rank: Option<f64>,
    /// Each module.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<ModuleSpectrum>,
    /// The round's stack at the recipe's rank; none when the round added nothing, or it was not
    /// computed.
    pub compressed: Option<Compressed>,
    /// What was not measured and why, in words; empty when all was.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unmeasured: String,
}

/// One module's part of the stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModuleSpectrum {
    /// Module path.
    pub module: String,
    /// Frobenius norm.
    pub norm: f64,
    /// How many directions carry it.
    pub effective_rank: f64,
}

/// An approximation of the round's stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Compressed {
    /// Its rank.
    pub rank: u32,
    /// `||D - D_r|| / ||D||` over all modules, Frobenius.
    pub relative_error: f64,
}

/// Where everything lies.
pub(super) struct Input {
    scratch: PathBuf,
    model: String,
    layers: Vec<(PathBuf, String, f64)>,
    /// What the round adds: a layer's place, and the factor.
    added: Vec<(usize, f64)>,
    rank: u32,
}

impl Input {
    pub(super) fn new(
        plan: &Plan,
        scratch: &Path,
        folder: impl Fn(&Path, &Layer) -> PathBuf,
    ) -> Self {
        let file = |layer: &Layer| {
            let path = folder(scratch, layer).join(cairn_stack::adapter::WEIGHTS_FILE);
            (path, layer.config.clone(), layer.contribution.weight)
        };
        let places: BTreeMap<SubmissionId, usize> = plan
            .stack
            .iter()
            .enumerate()
            .map(|(place, layer)| (layer.submission, place))
            .collect();
        let added = plan
            .added
            .iter()
            .filter_map(|term| Some((*places.get(&term.submission)?, term.weight)));
        Self {
            scratch: scratch.to_owned(),
            model: plan.model.clone(),
            layers: plan.stack.iter().map(file).collect(),
            added: added.filter(|(_, weight)| *weight != 0.0).collect(),
            rank: plan.rank,
        }
    }
}

/// What a fold made.
pub(super) struct Made {
    /// The checkpoint's files, in [`OUT`].
    pub(super) files: Vec<FileEntry>,
    /// The round's stack as one adapter, in [`STACK`].
    pub(super) stack: Vec<FileEntry>,
    /// The same at the recipe's rank, in [`COMPRESSED`].
    pub(super) compressed: Vec<FileEntry>,
    /// What was measured.
    pub(super) spectra: Spectra,
}

pub(super) fn compute(input: &Input) -> Result<Made, Failure> {
    let base = Checkpoint::open(&input.scratch.join("base"))
        .map_err(|error| Failure::Final(error.to_string()))?;
    let mut adapters = Vec::with_capacity(input.layers.len());
    for (path, config, _) in &input.layers {
        let adapter = AdapterFile::open_parts(path, config.as_bytes()).map_err(FoldError::from)?;
        // A stack may have more layers than files may be open.
        adapters.push(adapter.closed());
    }
    let terms: Vec<Term<'_>> = adapters
        .iter()
        .zip(&input.layers)
        .map(|(adapter, (_, _, weight))| Term {
            adapter,
            weight: *weight,
        })
        .collect();
    let report = fold(&base, &terms, &input.scratch.join(OUT))?;
    let added: Vec<(&AdapterFile, f64)> = input
        .added
        .iter()
        .filter_map(|(place, weight)| Some((adapters.get(*place)?, *weight)))
        .collect();
    let mut made = Made {
        files: report.files,
        stack: Vec::new(),
        compressed: Vec::new(),
        spectra: measure(&terms)?,
    };
    if !added.is_empty() {
        let folder = input.scratch.join(STACK);
        compress::concat(&added, &folder, Some(&input.model), None).map_err(FoldError::from)?;
        made.stack = entries(&folder)?;
        squeeze(input, &added, &mut made)?;
    }
    Ok(made)
}

/// Singular values of the whole stack, where that does not take too long.
fn measure(terms: &[Term<'_>]) -> Result<Spectra, Failure> {
    let terms: Vec<(&AdapterFile, f64)> = terms
        .iter()
        .filter(|term| term.weight != 0.0)
        .map(|term| (term.adapter, term.weight))
        .collect();
    if let Some(word) = too_long(&terms) {
        return Ok(Spectra {
            unmeasured: format!("spectrum of the stack: {word}"),
            ..Spectra::default()
        });
    }
    let modules = stack_spectrum(&terms).map_err(FoldError::from)?;
    let all = modules.iter().flat_map(|(_, one)| &one.singular);
    let all = Spectrum::of(all.copied().collect());
    let modules = modules.into_iter().map(|(module, one)| ModuleSpectrum {
        module,
        norm: one.norm,
        effective_rank: one.effective_rank,
    });
    Ok(Spectra {
        norm: Some(all.norm),
        effective_rank: Some(all.effective_rank),
        modules: modules.collect(),
        ..Spectra::default()
    })
}

/// Why the singular values of a stack are not computed, if they are not.
fn too_long(terms: &[(&AdapterFile, f64)]) -> Option<String> {
    match stack_work(terms) {
        Err(rank) => Some(format!(
            "not measured, a module's ranks add up to {rank}, over {}",
            cairn_stack::spectral::SPECTRUM_RANK_MAX
        )),
        Ok(work) if work > WORK_MAX => Some("not measured, it would hold up publishing".to_owned()),
        Ok(_) => None,
    }
}

/// The round's stack at the recipe's rank.
fn squeeze(input: &Input, added: &[(&AdapterFile, f64)], made: &mut Made) -> Result<(), Failure> {
    if let Some(word) = too_long(added) {
        let text = &mut made.spectra.unmeasured;
        let semicolon = if text.is_empty() { "" } else { "; " };
        *text = format!("{text}{semicolon}compression: {word}");
        return Ok(());
    }
    let folder = input.scratch.join(COMPRESSED);
    let report = cairn_stack::spectral::compress(
        added,
        input.rank as usize,
        &folder,
        Some(&input.model),
        None,
    )
    .map_err(FoldError::from)?;
    made.compressed = entries(&folder)?;
    made.spectra.compressed = Some(Compressed {
        rank: input.rank,
        relative_error: report.relative_error,
    });
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<FileEntry>, Failure> {
    let entries = list_files(folder)?
        .iter()
        .map(|path| FileEntry::of_file(folder, path))
        .collect::<Result<_, _>>()?;
    Ok(entries)
}
