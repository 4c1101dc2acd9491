//! Whether a round's data and teacher fit what it minimises.
use cairn_proto::limits::DATASET_CHUNK_BYTES_MAX;
use cairn_proto::reason::ErrorReason;
use cairn_stack::checkpoint::TOKENIZER_FILE;
use cairn_stack::recipe::RoundFile;
use cairn_stack::records::Record;

use super::{check_base, model_config};
use crate::app::App;
use crate::db::datasets::dataset_chunks;
use crate::db::models::FileRow;
use crate::error::Error;
use crate::ops::claim_work::teacher_of;

/// Checks that training set, gate and audit set are of the kind that the objective learns from. Guards
/// and probes may be of either: they are compared with themselves.
///
/// # Errors
/// PRECONDITION_FAILED naming the set that is not.
pub async fn check_kinds(app: &App, file: &RoundFile) -> Result<(), Error> {
    let wanted = file.recipe.objective.is_of_preferences();
    let (objective, policy) = (file.recipe.objective.as_str(), &file.policy);
    let sets = [&file.dataset, &policy.gate];
    for name in sets.into_iter().chain(&policy.audit) {
        if holds_preferences(app, name).await? == wanted {
            continue;
        }
        let text = if wanted {
            format!(
                "dataset {name} holds texts; with objective = {objective:?} dataset, gate and audit \
                 hold preferences, {{\"prompt\",\"chosen\",\"rejected\"}}"
            )
        } else {
            format!(
                "dataset {name} holds preferences; with objective = {objective:?} dataset, gate and \
                 audit hold texts; set objective = \"dpo\" to learn from preferences"
            )
        };
        return Err(Error::conflict(ErrorReason::PreconditionFailed, text));
    }
    Ok(())
}

/// Whether a dataset's first record is a preference; curation keeps them apart from texts.
async fn holds_preferences(app: &App, name: &str) -> Result<bool, Error> {
    let mut tx = app.db.read().await?;
    let first = dataset_chunks(&mut tx, name).await?.first().copied();
    drop(tx);
    let Some(chunk) = first else { return Ok(false) };
    let bytes = app
        .blobs
        .get_bytes(chunk.blob.digest, DATASET_CHUNK_BYTES_MAX)
        .await?;
    let line = bytes.split(|byte| *byte == b'\n').next();
    let line = line.and_then(|line| str::from_utf8(line).ok());
    let record = line.and_then(|line| Record::from_json_line(line).ok());
    Ok(record.is_some_and(|record| record.is_preference()))
}

/// Checks that a teacher, where the recipe names one, is a published checkpoint that speaks of the same
/// tokens as the base, can read sequences of the recipe's length, and holds nothing that was revoked.
///
/// # Errors
/// NOT_FOUND when there is no such checkpoint; PRECONDITION_FAILED when it cannot teach this base;
/// INVALID_ARGUMENT for sequences that are too long for it.
pub async fn check_teacher(app: &App, file: &RoundFile, base: &[FileRow]) -> Result<(), Error> {
    let Some(named) = file.recipe.objective.teacher() else {
        return Ok(());
    };
    let mut tx = app.db.read().await?;
    let Some(teacher) = teacher_of(&mut tx, &file.recipe).await? else {
        return Ok(());
    };
    check_base(&mut tx, &teacher.checkpoint).await?;
    drop(tx);
    let tokenizer = |files: &[FileRow]| {
        let file = files.iter().find(|file| file.path == TOKENIZER_FILE);
        file.map(|file| file.blob.digest)
    };
    let (own, other) = (tokenizer(base), tokenizer(&teacher.files));
    if own.is_none() || own != other {
        return Err(Error::conflict(
            ErrorReason::PreconditionFailed,
            format!(
                "the teacher {named} and the base have not the same {TOKENIZER_FILE}: their tokens \
                 cannot be compared; name a teacher with the base's tokenizer"
            ),
        ));
    }
    let positions = model_config(app, &teacher.files).await?.max_positions;
    if file.recipe.sequence_length as usize > positions {
        let text = format!("the teacher {named} has {positions} positions");
        return Err(Error::invalid("sequence_length", text));
    }
    Ok(())
}
