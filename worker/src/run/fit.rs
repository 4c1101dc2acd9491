//! Whether a unit fits this machine, before its checkpoint is downloaded.

use cairn_proto::convert;
use cairn_proto::v1;
use cairn_proto::v1::lease::Work;
use cairn_stack::config::ModelConfig;
use cairn_stack::quantize::Quantize;
use cairn_stack::recipe::Recipe;

use super::context::{Ctx, Patient};
use super::fetch::Stop;
use super::unit::Unit;
use crate::memory::Memory;
use crate::preflight::estimate::{Frozen, Numbers};
use crate::preflight::{is_weights, plan, plan_evaluation};

/// Looks at a unit's config, its recipe and the sizes of its files, and says how it will be done; or
/// why it does not fit.
///
/// # Errors
/// [`Stop`] when the config cannot be fetched.
pub async fn check(context: &Ctx, unit: &Unit) -> Result<Result<(), String>, Stop> {
    let (files, train) = match &unit.work {
        Work::Train(work) => (&work.base_files, Some(work)),
        Work::Guide(v1::GuideWork { train, .. }) | Work::Replay(v1::ReplayWork { train, .. }) => {
            let Some(train) = train else {
                return Ok(Ok(()));
            };
            (&train.base_files, Some(train))
        }
        Work::Evaluate(work) => (&work.base_files, None),
        Work::Learn(v1::LearnWork { evaluate, .. }) => match evaluate {
            Some(work) => (&work.base_files, None),
            None => return Ok(Ok(())),
        },
    };
    // What is missing or broken is said, with more words, by those that read it.
    let Some((config, numbers)) = model_of(context, files).await? else {
        return Ok(Ok(()));
    };
    let device = context.device();
    let mut frozen = Frozen::new(&config, numbers, device);
    let memory = Memory::of(device);
    let Some(train) = train else {
        return Ok(plan_evaluation(frozen, Quantize::None, &[], memory)
            .map(|_| ())
            .map_err(|error| error.to_string()));
    };
    let Ok(recipe) = Recipe::parse_toml(&train.recipe) else {
        return Ok(Ok(()));
    };
    // A base that teaches itself is held once, unless it is held in fewer bits.
    let teacher = train
        .teacher
        .as_ref()
        .filter(|teacher| teacher.commit != train.base_commit || recipe.quantize != Quantize::None);
    if let Some(teacher) = teacher
        && let Some((config, numbers)) = model_of(context, &teacher.files).await?
    {
        frozen = frozen.beside(Frozen::new(&config, numbers, device));
    }
    Ok(match plan(frozen, &recipe, memory) {
        Ok(plan) => {
            eprintln!("{}: {plan}", unit.name());
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    })
}

/// What a plan must know of a checkpoint: its shape, and how its numbers will be kept.
async fn model_of(
    context: &Ctx,
    files: &[v1::File],
) -> Result<Option<(ModelConfig, Numbers)>, Stop> {
    let Some(json) = config_of(context, files).await? else {
        return Ok(None);
    };
    let Ok(config) = ModelConfig::from_json(&json) else {
        return Ok(None);
    };
    let weights = files.iter().filter(|file| is_weights(&file.path));
    let blobs = weights.filter_map(|file| file.blob.as_ref());
    let bytes = blobs
        .map(|blob| blob.size_bytes)
        .fold(0, u64::saturating_add);
    let numbers = Numbers::of_files(&config, &json, bytes, context.device());
    Ok(Some((config, numbers)))
}

/// The bytes of `config.json`, fetched if it is not here.
async fn config_of(context: &Ctx, files: &[v1::File]) -> Result<Option<Vec<u8>>, Stop> {
    let Some(file) = files.iter().find(|file| file.path == "config.json") else {
        return Ok(None);
    };
    let blob = convert::blob("blob", file.blob.as_ref())?;
    if blob.size_bytes > cairn_stack::config::CONFIG_BYTES_MAX {
        return Ok(None);
    }
    let fetched = context
        .patiently(&context.state.soft, || async {
            context.cache.fetch(&context.client, blob, &|_| ()).await
        })
        .await?;
    match fetched {
        Patient::Answer(_) => Ok(std::fs::read(context.cache.path(blob)).ok()),
        Patient::Stopped => Err(Stop::Stopping),
    }
}
