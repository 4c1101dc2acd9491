//! A maintainer makes a model from a base checkpoint whose files are held.
use std::collections::BTreeSet;
use std::path::Path;

use cairn_proto::limits::{CHECKPOINT_FILES_MAX, NAME_BYTES_MAX};
use cairn_proto::reason::ErrorReason;
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::files::FileEntry;
use cairn_stack::lineage::Manifest;
use tokio::sync::oneshot;
use tracing::info;

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::db::Tx;
use crate::db::blobs::{blob_get, blob_publish};
use crate::db::log::{EntryKind, log_append};
use crate::db::models::{
    CheckpointRow, FileRow, Folder, checkpoint_insert, model_by_request, model_get, model_insert,
};
use crate::db::revocations::Marks;
use crate::error::Error;
use crate::ids::RequestId;
use crate::manifests::{StoredManifest, log_entry, sign_and_store};

use super::read_contributions::{Marked, mark_one};
use super::read_models::{ModelView, head};

/// What the maintainer says.
#[derive(Debug, Clone)]
pub struct NewModel {
    /// 1 to 64 of a-z, 0-9, `-`, `_`, `.`.
    pub name: String,
    /// Its folder's files; the paths are checked.
    pub files: Vec<FileRow>,
    /// The same id returns the first result.
    pub request: RequestId,
}

/// Makes a model. Its base becomes revision 0, with a manifest signed by us.
///
/// # Errors
/// BLOB_MISSING for a file that is not held; INVALID_ARGUMENT naming what is wrong with the
/// checkpoint; ALREADY_EXISTS.
pub async fn create_model(app: &App, caller: &Caller, new: NewModel) -> Result<ModelView, Error> {
    caller.require(Role::Maintainer)?;
    check_model_name("name", &new.name)?;
    check_files(&new.files)?;
    // Hashing a large base takes longer than some callers wait: it goes on without them, and their
    // next try finds the result.
    let (sender, receiver) = oneshot::channel();
    let app = app.clone();
    app.clone().lifecycle.spawn(async move {
        let _turn = app.creating.lock().await;
        // The caller may have gone.
        let _ = sender.send(create(&app, new).await);
    });
    receiver.await.map_err(|_| {
        let reason = ErrorReason::ShuttingDown;
        Error::new(reason, reason.sentence())
    })?
}

async fn create(app: &App, new: NewModel) -> Result<ModelView, Error> {
    let mut tx = app.db.read().await?;
    if let Some(first) = first_result(&mut tx, &new).await? {
        return Ok(first);
    }
    for file in &new.files {
        let held = blob_get(&mut tx, file.blob.digest).await?;
        if held.is_none_or(|held| held.name != file.blob) {
            return Err(crate::blobs::missing(file.blob.digest));
        }
    }
    drop(tx);

    let manifest = inspect(app, &new).await?;

    let now = app.clock.now_ms();
    let checkpoint = CheckpointRow {
        model: new.name.clone(),
        revision: 0,
        commit: manifest.commit,
        parent: None,
        round: None,
        contributions: 0,
        manifest: manifest.blob.digest,
        gate_loss: None,
        audit_loss: None,
        refold_of: None,
        spectrum: None,
        created: now,
    };
    let mut files = new.files.clone();
    files.extend(manifest.files);
    app.keep_blobs(files.iter().map(|file| file.blob)).await?;
    let mut tx = app.db.begin().await?;
    if let Some(first) = first_result(&mut tx, &new).await? {
        return Ok(first);
    }
    if !model_insert(&mut tx, &new.name, new.request, now).await? {
        return Err(Error::unavailable(
            "the same model is being made by another call; try again",
        ));
    }
    for file in &files {
        if !blob_publish(&mut tx, file.blob.digest).await? {
            return Err(Error::conflict(
                ErrorReason::PreconditionFailed,
                format!(
                    "{} is part of a gate or audit set and would be given away",
                    file.path
                ),
            ));
        }
    }
    if !checkpoint_insert(&mut tx, &checkpoint, &[(Folder::Checkpoint, &files)]).await? {
        return Err(Error::inconsistent("checkpoints", "revision", &new.name));
    }
    log_append(&mut tx, EntryKind::Manifest, &log_entry(&checkpoint), now).await?;
    let model = model_get(&mut tx, &new.name)
        .await?
        .ok_or_else(|| Error::inconsistent("models", "name", &new.name))?;
    tx.commit().await?;
    app.wake.all();
    info!(
        "added model {} at {} with {} files",
        new.name,
        checkpoint.commit,
        files.len()
    );
    Ok(ModelView {
        model,
        head: Marked {
            row: checkpoint,
            marks: Marks::default(),
        },
    })
}

/// Checks the name of a model or dataset: 1 to 64 of a-z, 0-9, `-`, `_`, `.`, beginning with a
/// letter or digit.
///
/// # Errors
/// INVALID_ARGUMENT naming the field.
pub fn check_model_name(field: &'static str, name: &str) -> Result<(), Error> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let good = name.len() <= NAME_BYTES_MAX
        && name.bytes().next().is_some_and(plain)
        && name
            .bytes()
            .all(|b| plain(b) || matches!(b, b'-' | b'_' | b'.'))
        && !name.contains("..")
        // Folders are named after it, on Windows too: no device's name.
        && cairn_proto::convert::relative_path(name).is_ok();
    if good {
        return Ok(());
    }
    Err(Error::invalid(
        field,
        format!(
            "1 to {NAME_BYTES_MAX} of a-z, 0-9, '-', '_', '.', beginning with a letter or digit"
        ),
    ))
}

fn check_files(files: &[FileRow]) -> Result<(), Error> {
    if files.is_empty() || files.len() > CHECKPOINT_FILES_MAX {
        return Err(Error::invalid(
            "files",
            format!("1 to {CHECKPOINT_FILES_MAX}"),
        ));
    }
    let mut seen = BTreeSet::new();
    for file in files {
        // As case-blind file systems see them.
        if !seen.insert(file.path.to_lowercase()) {
            return Err(Error::invalid(
                "files",
                format!("{} is named twice", file.path),
            ));
        }
    }
    let clash = files.iter().find(|file| {
        let mut above = Path::new(&file.path).ancestors().skip(1);
        above.any(|path| seen.contains(&path.to_string_lossy().to_lowercase()))
    });
    match clash {
        Some(file) => Err(Error::invalid(
            "files",
            format!("{} lies under a file", file.path),
        )),
        None => Ok(()),
    }
}

async fn first_result(tx: &mut Tx, new: &NewModel) -> Result<Option<ModelView>, Error> {
    if let Some(model) = model_by_request(tx, new.request).await? {
        if model.name != new.name {
            let reason = ErrorReason::RequestIdReused;
            return Err(Error::conflict(reason, reason.sentence()));
        }
        let row = head(tx, &model).await?;
        let head = mark_one(tx, row).await?;
        return Ok(Some(ModelView { model, head }));
    }
    if model_get(tx, &new.name).await?.is_some() {
        return Err(Error::conflict(
            ErrorReason::AlreadyExists,
            format!("there is a model {} already", new.name),
        ));
    }
    Ok(None)
}

/// Lays the files out, lets `stack` judge them, and signs what they are.
async fn inspect(app: &App, new: &NewModel) -> Result<StoredManifest, Error> {
    let folder = app.scratch_folder("model-")?;
    for file in &new.files {
        app.blobs
            .materialise(file.blob.digest, &folder.path().join(&file.path))
            .await?;
    }
    let claimed = new.files.clone();
    let entries = tokio::task::spawn_blocking(move || judge(folder.path(), &claimed)).await??;
    let now_ms = u64::try_from(app.clock.now_ms().0).unwrap_or(0);
    sign_and_store(app, Manifest::new(&new.name, now_ms, entries)).await
}

fn judge(folder: &Path, claimed: &[FileRow]) -> Result<Vec<FileEntry>, Error> {
    let checkpoint = Checkpoint::open(folder).map_err(|error| {
        // Its sentences name files by their whole path, which is no business of outsiders.
        let text = error
            .to_string()
            .replace(&format!("{}/", folder.display()), "");
        Error::invalid(
            "files",
            text.replace(&folder.display().to_string(), "the folder"),
        )
    })?;
    if let Some(other) = checkpoint.left_out().first() {
        return Err(Error::invalid(
            "files",
            format!("{other} is no part of a checkpoint (other weights, or an earlier manifest)"),
        ));
    }
    let mut entries = Vec::new();
    for file in claimed {
        let entry = FileEntry::of_file(folder, &file.path)?;
        if entry.sha256 != file.sha256 {
            return Err(Error::invalid(
                "files.sha256",
                format!("{} has {}", file.path, entry.sha256),
            ));
        }
        entries.push(entry);
    }
    entries.sort_by(|one, two| one.path.cmp(&two.path));
    Ok(entries)
}
