//! A maintainer schedules a round: everything it needs is checked, its shards are planned, and it
//! opens for training at once.
mod objective;

use std::time::Duration;

use cairn_proto::limits::{EVAL_RECORDS_MAX, ROUND_FILE_BYTES_MAX};
use cairn_proto::reason::ErrorReason;
use cairn_stack::config::ModelConfig;
use cairn_stack::recipe::{Policy, RoundFile};
use tracing::info;

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::carry::{Carry, adapter_spec, carry_from};
use crate::db::Tx;
use crate::db::blobs::blob_publish;
use crate::db::datasets::{DatasetRow, SetKind, dataset_chunks, dataset_get};
use crate::db::evaluations::evaluation_open;
use crate::db::models::{CheckpointRow, FileRow, Folder, checkpoint_files, model_hold};
use crate::db::revocations::checkpoint_marks;
use crate::db::rounds::{NewRound, Round, round_active, round_by_request, round_get, round_insert};
use crate::db::shards::shard_insert;
use crate::domain::candidate::{Candidate, Sets};
use crate::domain::plan::{Chunk, ShardPlan, plan};
use crate::domain::round::Phase;
use crate::domain::stacker::{Request, base_candidate};
use crate::error::Error;
use crate::ids::{RequestId, RoundId};
use crate::limits::CONFIG_JSON_BYTES_MAX;
use crate::ops::read_models::checkpoint_find;
use objective::{check_kinds, check_teacher};

/// Most shards of a round: each is in every view of it, and a view must fit in one message.
pub const SHARDS_PER_ROUND_MAX: u32 = 5_000;

/// The config of a model's folder.
const CONFIG_FILE: &str = "config.json";

/// Makes a round. The same request with the same file returns the first one.
///
/// # Errors
/// INVALID_ARGUMENT for a bad file; NOT_FOUND for a model or dataset that is not there;
/// PRECONDITION_FAILED when a set is of the wrong kind or the model has a round already.
pub async fn create_round(
    app: &App,
    caller: &Caller,
    text: &str,
    request: RequestId,
) -> Result<Round, Error> {
    caller.require(Role::Maintainer)?;
    if text.len() > ROUND_FILE_BYTES_MAX {
        return Err(Error::invalid(
            "round_file",
            format!(
                "it has {} bytes; at most {ROUND_FILE_BYTES_MAX} are read",
                text.len()
            ),
        ));
    }
    let file = RoundFile::parse_toml(text).map_err(|error| Error::invalid("round_file", error))?;
    if file.shards > SHARDS_PER_ROUND_MAX {
        return Err(Error::invalid(
            "shards",
            format!("at most {SHARDS_PER_ROUND_MAX}"),
        ));
    }
    let mut tx = app.db.read().await?;
    if let Some(first) = replay(&mut tx, request, &file).await? {
        return Ok(first);
    }
    let base = checkpoint_find(
        &mut tx,
        &file.model,
        file.revision.as_deref().unwrap_or_default(),
    )
    .await?;
    let base_files =
        checkpoint_files(&mut tx, &base.model, base.revision, Folder::Checkpoint).await?;
    let shards = plan_shards(&mut tx, &file).await?;
    check_sets(&mut tx, &file.policy).await?;
    drop(tx);
    let config = model_config(app, &base_files).await?;
    if file.recipe.sequence_length as usize > config.max_positions {
        return Err(Error::invalid(
            "sequence_length",
            format!("the model has {} positions", config.max_positions),
        ));
    }
    check_kinds(app, &file).await?;
    check_teacher(app, &file, &base_files).await?;
    let carry = carry_from(app, &base, &file).await?;
    app.keep_blobs(carry.iter().map(|carry| carry.weights))
        .await?;
    let shape = Shape {
        adapter_bytes_max: adapter_spec(&config, &file.recipe, carry.is_some()).file_bytes_max(),
        carry,
        shards,
    };

    let mut tx = app.db.begin().await?;
    // Whoever asks for the same waits here, and then finds it.
    model_hold(&mut tx, &file.model).await?;
    if let Some(first) = replay(&mut tx, request, &file).await? {
        return Ok(first);
    }
    let id = insert(app, &mut tx, &file, &base, &shape, request).await?;
    let round = round_get(&mut tx, id).await?;
    tx.commit().await?;
    app.wake.all();
    info!(
        round.id = %id,
        "round {id} opened: {} shards of {}{}", shape.shards.len(), file.dataset,
        if shape.carry.is_some() { ", from the mean factors of the round before" } else { "" }
    );
    round.ok_or_else(|| Error::inconsistent("rounds", "id", id))
}

/// What was worked out before the transaction.
struct Shape {
    /// Largest adapter upload, bytes.
    adapter_bytes_max: u64,
    /// The factors that training starts from.
    carry: Option<Carry>,
    /// What each volunteer trains on.
    shards: Vec<ShardPlan>,
}

async fn replay(tx: &mut Tx, request: RequestId, file: &RoundFile) -> Result<Option<Round>, Error> {
    match round_by_request(tx, request).await? {
        Some(first) if first.file == *file => Ok(Some(first)),
        Some(_) => Err(Error::conflict(
            ErrorReason::RequestIdReused,
            "the request id was used for another round file",
        )),
        None => Ok(None),
    }
}

async fn insert(
    app: &App,
    tx: &mut Tx,
    file: &RoundFile,
    base: &CheckpointRow,
    shape: &Shape,
    request: RequestId,
) -> Result<RoundId, Error> {
    if let Some(active) = round_active(tx, &file.model).await? {
        return Err(Error::conflict(
            ErrorReason::PreconditionFailed,
            format!("round {active} of model {} has not ended", file.model),
        )
        .with("round", active));
    }
    // The head may have moved since the base was read; a named revision never does.
    let now_named = checkpoint_find(
        tx,
        &file.model,
        file.revision.as_deref().unwrap_or_default(),
    );
    if now_named.await?.commit != base.commit {
        return Err(Error::unavailable(
            "the model's head has just moved; try again",
        ));
    }
    check_base(tx, base).await?;
    let now = app.clock.now_ms();
    let phase = Phase::Draft
        .open()
        .map_err(|error| Error::internal("open a round", error))?;
    let round = NewRound {
        id: RoundId::new(),
        file,
        base_revision: base.revision,
        base_commit: base.commit,
        phase,
        adapter_bytes_max: shape.adapter_bytes_max,
        carry: shape.carry.as_ref(),
        created: now,
        deadline: now.plus(Duration::from_millis(file.policy.deadline_ms)),
        request,
    };
    if let Some(carry) = &shape.carry {
        blob_publish(tx, carry.weights.digest).await?;
    }
    round_insert(tx, &round).await?;
    for (position, shard) in (0u32..).zip(&shape.shards) {
        shard_insert(tx, round.id, position, shard).await?;
    }
    let base = Request {
        candidate: base_of(&file.policy),
        purpose: "the base".to_owned(),
    };
    evaluation_open(tx, round.id, &base, now).await?;
    Ok(round.id)
}

/// No round starts on a checkpoint, or learns from one, whose place another takes, or is about to take,
/// because a contribution in it was revoked.
async fn check_base(tx: &mut Tx, base: &CheckpointRow) -> Result<(), Error> {
    let (model, revision) = (&base.model, base.revision);
    let marks = checkpoint_marks(tx, model, revision, revision).await?;
    let text = match marks.get(&revision) {
        Some(marks) if marks.pending => "it is being folded again without it; try again when \
             `cairn contribution list-revocations` names what takes its place"
            .to_owned(),
        Some(marks) if marks.replaced_by.is_some() => {
            let by = marks.replaced_by.unwrap_or_default();
            format!("start from revision {by}, which took its place")
        }
        _ => return Ok(()),
    };
    Err(Error::conflict(
        ErrorReason::PreconditionFailed,
        format!("{model} revision {revision} contains a revoked contribution: {text}"),
    ))
}

/// The sets of a full test under a policy.
pub fn sets_of(policy: &Policy) -> Sets {
    if policy.audit.is_some() {
        Sets::GATE_AND_AUDIT
    } else {
        Sets::GATE
    }
}

/// The round's base on all that anything is compared with.
pub const fn base_of(policy: &Policy) -> Candidate {
    base_candidate(policy.audit.is_some())
}

/// A checkpoint's config.
///
/// # Errors
/// PRECONDITION_FAILED when the folder has none that can be read.
pub async fn model_config(app: &App, files: &[FileRow]) -> Result<ModelConfig, Error> {
    let unusable = |text: String| Error::conflict(ErrorReason::PreconditionFailed, text);
    let file = files
        .iter()
        .find(|file| file.path == CONFIG_FILE)
        .ok_or_else(|| unusable(format!("the base checkpoint has no {CONFIG_FILE}")))?;
    let bytes = app
        .blobs
        .get_bytes(file.blob.digest, CONFIG_JSON_BYTES_MAX)
        .await?;
    ModelConfig::from_json(&bytes).map_err(|error| unusable(error.to_string()))
}

async fn plan_shards(tx: &mut Tx, file: &RoundFile) -> Result<Vec<ShardPlan>, Error> {
    set_of_kind(tx, &file.dataset, &[SetKind::Train]).await?;
    let chunks: Vec<Chunk> = dataset_chunks(tx, &file.dataset)
        .await?
        .into_iter()
        .map(|chunk| Chunk {
            digest: chunk.blob.digest,
            size_bytes: chunk.blob.size_bytes,
            records: chunk.records,
        })
        .collect();
    plan(&chunks, file.shards, file.policy.seed).map_err(|error| Error::invalid("shards", error))
}

async fn check_sets(tx: &mut Tx, policy: &Policy) -> Result<(), Error> {
    let gate = [SetKind::Gate];
    let mut records = set_of_kind(tx, &policy.gate, &gate).await?.records;
    if records < 2 {
        return Err(Error::invalid(
            "gate",
            "a set of one record measures nothing",
        ));
    }
    if let Some(audit) = &policy.audit {
        records += set_of_kind(tx, audit, &[SetKind::Audit]).await?.records;
    }
    // What anybody may train on guards nothing.
    let held_out = [SetKind::Gate, SetKind::Dev, SetKind::Audit];
    for name in policy.guards.iter().chain(&policy.probes) {
        records += set_of_kind(tx, name, &held_out).await?.records;
    }
    if records > EVAL_RECORDS_MAX as u64 {
        return Err(Error::invalid(
            "gate",
            format!(
                "gate, audit, guards and probes have {records} records together; an evaluation \
                 takes at most {EVAL_RECORDS_MAX}"
            ),
        ));
    }
    Ok(())
}

async fn set_of_kind(tx: &mut Tx, name: &str, kinds: &[SetKind]) -> Result<DatasetRow, Error> {
    let row = dataset_get(tx, name)
        .await?
        .ok_or_else(|| Error::not_found("dataset", name))?;
    if kinds.contains(&row.set) {
        return Ok(row);
    }
    let needed: Vec<&str> = kinds.iter().map(|kind| kind.as_str()).collect();
    Err(Error::conflict(
        ErrorReason::PreconditionFailed,
        format!(
            "dataset {name} is a {} set; here a {} set is needed",
            row.set.as_str(),
            needed.join(" or ")
        ),
    ))
}
