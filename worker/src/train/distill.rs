//! Distillation from a teacher: [`cairn_stack::recipe::Distill`] has the formula.

use std::io;
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;

use cairn_kernels::distill::Blend;
use cairn_stack::checkpoint::TOKENIZER_FILE;
use cairn_stack::digest::Digest;
use cairn_stack::recipe::{Distill, Recipe};

use super::frozen::Frozen;
use super::objective::{Measured, Micro};
use crate::data::{Batch, Example};
use crate::model::distill::Likeliest;
use crate::model::lora::Gradient;
use crate::model::loss::{distillation_and_gradient, likeliest_tokens};
use crate::model::{Input, Llama};

/// Most bytes of a teacher's answers that are kept in memory between epochs; beyond it the teacher is
/// asked in every epoch anew. Two million scored tokens at 32 tokens each.
const KEPT_BYTES_MAX: usize = 512 << 20;

/// Why a model cannot teach another.
#[derive(Debug, thiserror::Error)]
pub enum TeacherError {
    /// A tokenizer cannot be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The two do not speak of the same tokens.
    #[error(
        "the teacher {} has another tokenizer than the model: their tokens cannot be compared; take a teacher with the same {TOKENIZER_FILE}", .0.display()
    )]
    OtherVocabulary(PathBuf),
}

/// Checks that two model folders have the same tokenizer, byte for byte.
///
/// # Errors
/// [`TeacherError`].
pub fn same_vocabulary(model: &Path, teacher: &Path) -> Result<(), TeacherError> {
    let digest = |folder: &Path| {
        let path = folder.join(TOKENIZER_FILE);
        let read = Digest::of_file(&path);
        read.map(|(digest, _)| digest)
            .map_err(|source| TeacherError::Read { path, source })
    };
    if digest(model)? == digest(teacher)? {
        Ok(())
    } else {
        Err(TeacherError::OtherVocabulary(teacher.to_owned()))
    }
}

/// The divergence from a teacher.
pub struct Distillation<'m> {
    teacher: &'m Llama,
    top_k: usize,
    blend: Blend,
    /// What the teacher said of every example; `None` where that is too much to keep.
    kept: Option<Frozen<Likeliest>>,
}

impl<'m> Distillation<'m> {
    /// For a run over these examples.
    #[must_use]
    pub fn new(
        examples: &[Example],
        recipe: &Recipe,
        distill: &Distill,
        teacher: &'m Llama,
    ) -> Self {
        Self::keeping(KEPT_BYTES_MAX, examples, recipe, distill, teacher)
    }

    /// The same, keeping at most so many bytes of what the teacher says.
    fn keeping(
        bytes_max: usize,
        examples: &[Example],
        recipe: &Recipe,
        distill: &Distill,
        teacher: &'m Llama,
    ) -> Self {
        let top_k = distill.top_k as usize;
        let places: usize = examples.iter().map(Example::scored_tokens).sum();
        let fits = places.saturating_mul(Likeliest::bytes_a_place(top_k)) <= bytes_max;
        Self {
            teacher,
            top_k,
            blend: Blend {
                temperature: distill.temperature,
                weight: distill.weight,
            },
            kept: fits.then(|| Frozen::new(examples, recipe)),
        }
    }

    /// The summed loss of a micro-batch, and `scale` times its gradient by every pair.
    pub fn gradients(&mut self, micro: &Micro<'_>, scale: f64) -> (Measured, Vec<Gradient>) {
        let Micro {
            model,
            input,
            batch,
            ..
        } = *micro;
        let said = self.said(batch, &input.owners, model.config.vocab_size);
        let (blend, targets) = (self.blend, &input.targets);
        let of = |normed: &Tensor<2>| {
            let (losses, gradient) =
                distillation_and_gradient(model, normed, targets, &said, blend, scale);
            let loss: f64 = losses.into_iter().map(f64::from).sum();
            let rewards = None;
            (Measured { loss, rewards }, gradient)
        };
        model.gradients_of(micro.keep, micro.adapter, input, micro.wanted, of)
    }

    /// What the teacher says of every scored token of a batch, in order.
    fn said(&mut self, batch: &Batch, owners: &[usize], vocabulary: usize) -> Likeliest {
        let (teacher, top_k) = (self.teacher, self.top_k);
        let temperature = self.blend.temperature;
        let ask = |batch: &Batch| asked(teacher, batch, vocabulary, top_k, temperature);
        let Some(kept) = &mut self.kept else {
            return ask(batch).0;
        };
        kept.learn(owners, |batch| {
            let (said, owners) = ask(batch);
            let runs = runs(&owners);
            runs.map(|(example, places)| (example, said.rows(places)))
                .collect()
        });
        let width = top_k.min(vocabulary).min(teacher.config.vocab_size);
        let mut said = Likeliest::none(width);
        for (example, _) in runs(owners) {
            if let Some(more) = kept.of(example) {
                said.extend(more);
            }
        }
        said
    }
}

/// Asks the teacher; beside what it says, the example each place belongs to.
fn asked(
    teacher: &Llama,
    batch: &Batch,
    vocabulary: usize,
    top_k: usize,
    temperature: f64,
) -> (Likeliest, Vec<usize>) {
    let input = Input::new(&teacher.config, batch, &teacher.device);
    if input.targets.is_empty() {
        return (Likeliest::none(top_k), Vec::new());
    }
    let normed = teacher.normed(None, &input); // [S, D]
    // A vocabulary may be padded to a round number; tokens beyond the student's are none.
    let among = vocabulary.min(teacher.config.vocab_size);
    let said = likeliest_tokens(teacher, &normed, among, top_k, temperature);
    (said, input.owners)
}

/// Runs of places that belong to one example. An example's tokens lie side by side.
fn runs(owners: &[usize]) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let mut place = 0;
    owners.chunk_by(|a, b| a == b).map(move |run| {
        let start = place;
        place += run.len();
        (run[0], start..place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vocabularies_are_compared_by_their_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str, text: &str| {
            let dir = folder.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join(TOKENIZER_FILE), text).unwrap();
            dir
        };
        let (a, b, c) = (make("a", "{}"), make("b", "{}"), make("c", "{ }"));
        assert!(same_vocabulary(&a, &b).is_ok());
        assert!(matches!(
            same_vocabulary(&a, &c),
            Err(TeacherError::OtherVocabulary(path)) if path == c
        ));
        assert!(matches!(
            same_vocabulary(&a, folder.path()),
            Err(TeacherError::Read { .. })
        ));
    }

    #[cfg(feature = "flex")]
    #[test]
    fn what_is_too_much_to_keep_is_asked_for_anew() {
        use cairn_stack::recipe::Objective;

        use crate::device::DeviceName;
        use crate::model::LoadedModel;
        use crate::train::order::epoch;

        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/models/qwen2-tied");
        let teacher = LoadedModel::load(&folder, DeviceName::default()).unwrap();
        let recipe = Recipe::parse_toml(
            "rank = 1\nalpha = 1\ntarget_modules = [\"q_proj\"]\nlearning_rate = 1.0\nepochs = 2\n\
             batch_size = 3\nsequence_length = 16\npacking = true\nobjective = \"distill\"\n\
             distill_top_k = 4",
        )
        .unwrap();
        let Objective::Distill(distill) = &recipe.objective else {
            panic!("{recipe:?}");
        };
        let examples: Vec<Example> = (0..9_u32)
            .map(|n| Example {
                tokens: (0..5 + n % 3).map(|t| (n * 7 + t) % 64).collect(),
                scored: (0..5 + n % 3).map(|t| t > 1).collect(),
                cut: false,
            })
            .collect();
        let made = |bytes_max| {
            Distillation::keeping(bytes_max, &examples, &recipe, distill, &teacher.llama)
        };
        let (mut kept, mut asked_anew) = (made(usize::MAX), made(0));
        assert!(kept.kept.is_some() && asked_anew.kept.is_none());
        for batch in epoch(&examples, &recipe, 0) {
            let owners = Input::new(&teacher.llama.config, &batch, &teacher.device).owners;
            let said = kept.said(&batch, &owners, 64);
            assert_eq!(said.rest.len(), owners.len());
            assert_eq!(said, asked_anew.said(&batch, &owners, 64));
        }
        for batch in epoch(&examples, &recipe, 1) {
            let owners = Input::new(&teacher.llama.config, &batch, &teacher.device).owners;
            let (said, anew) = (
                kept.said(&batch, &owners, 64),
                asked_anew.said(&batch, &owners, 64),
            );
            assert_eq!(said.tokens, anew.tokens);
            let pairs = said.chances.iter().zip(&anew.chances);
            assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }

    #[test]
    fn places_are_cut_by_example() {
        let found: Vec<_> = runs(&[4, 4, 1, 7, 7, 7]).collect();
        assert_eq!(found, [(4, 0..2), (1, 2..3), (7, 3..6)]);
    }
}
