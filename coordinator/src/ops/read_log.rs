//! Reading the log: its head, signed; its entries; its proofs. Open to every role.
use cairn_proto::signing::TreeHeadStatement;
use cairn_proto::v1;
use cairn_stack::merkle::Hash;

use crate::app::App;
use crate::db::log::{Entry, log_consistency, log_entries, log_inclusion, log_root, log_size};
use crate::error::Error;

/// Most entries of one answer.
pub const ENTRIES_MAX: u32 = 1_000;

/// The newest head, signed.
///
/// # Errors
/// UNAVAILABLE.
pub async fn get_tree_head(app: &App) -> Result<v1::TreeHead, Error> {
    let mut tx = app.db.read().await?;
    let size = log_size(&mut tx).await?;
    let root = log_root(&mut tx, size).await?;
    drop(tx);
    let statement = TreeHeadStatement {
        size,
        root: hex::encode(root),
        time_ms: app.clock.now_ms().0,
    };
    statement
        .sign(&app.key)
        .map_err(|error| Error::internal("sign a tree head", error))
}

/// Entries from `first` on.
///
/// # Errors
/// UNAVAILABLE.
pub async fn list_entries(app: &App, first: u64, limit: u32) -> Result<Vec<Entry>, Error> {
    let mut tx = app.db.read().await?;
    log_entries(&mut tx, first, limit.clamp(1, ENTRIES_MAX)).await
}

/// That an entry is in the tree of a size.
///
/// # Errors
/// INVALID_ARGUMENT when there is no such entry or size.
pub async fn get_inclusion_proof(app: &App, index: u64, size: u64) -> Result<Vec<Hash>, Error> {
    let mut tx = app.db.read().await?;
    check_size(size, log_size(&mut tx).await?)?;
    if index >= size {
        return Err(Error::invalid(
            "index",
            format!("the tree has {size} entries"),
        ));
    }
    log_inclusion(&mut tx, index, size).await
}

/// That a tree goes on from a smaller one.
///
/// # Errors
/// INVALID_ARGUMENT when there is no such size.
pub async fn get_consistency_proof(app: &App, old: u64, new: u64) -> Result<Vec<Hash>, Error> {
    let mut tx = app.db.read().await?;
    check_size(new, log_size(&mut tx).await?)?;
    if old == 0 || old > new {
        return Err(Error::invalid("old_size", format!("it is 1 to {new}")));
    }
    log_consistency(&mut tx, old, new).await
}

fn check_size(asked: u64, size: u64) -> Result<(), Error> {
    if asked <= size {
        return Ok(());
    }
    let text = format!(
        "the log has {size} entries; this coordinator may have been restored from an older backup"
    );
    Err(Error::invalid("size", text))
}
