//! Table `settings`: what a server keeps about itself.
use sqlx::Row;

use super::Tx;
use crate::error::Error;

/// The address and pin that join URLs carry, as `cairn_proto::url::Server` text.
pub const ENDPOINT: &str = "endpoint";
/// The server's Ed25519 secret key, hex; signs receipts and manifests.
pub const SERVER_KEY: &str = "server_key";

/// What audits are drawn with, hex. Never shown: who knows it knows which segment will be looked at.
pub const AUDIT_SECRET: &str = "audit_secret";

/// TLS certificate and key of coordinators that share the database and were given none, PEM.
pub const TLS_IDENTITY: &str = "tls_identity";

/// A setting's value.
///
/// # Errors
/// When the query fails.
pub async fn setting_get(tx: &mut Tx, name: &str) -> Result<Option<String>, Error> {
    let row = sqlx::query("select value from settings where name = $1")
        .bind(name)
        .fetch_optional(tx.conn())
        .await?;
    Ok(row.map(|row| row.try_get("value")).transpose()?)
}

/// Sets a setting.
///
/// # Errors
/// When the query fails.
pub async fn setting_put(tx: &mut Tx, name: &str, value: &str) -> Result<(), Error> {
    sqlx::query(
        "insert into settings (name, value) values ($1, $2) \
         on conflict (name) do update set value = excluded.value",
    )
    .bind(name)
    .bind(value)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// A setting's value, which is the given one if it has none yet: two servers that start at once
/// agree.
///
/// # Errors
/// When the query fails.
pub async fn setting_first(tx: &mut Tx, name: &str, value: &str) -> Result<String, Error> {
    let row = sqlx::query(
        "insert into settings (name, value) values ($1, $2) \
         on conflict (name) do update set value = settings.value returning value",
    )
    .bind(name)
    .bind(value)
    .fetch_one(tx.conn())
    .await?;
    Ok(row.try_get("value")?)
}
