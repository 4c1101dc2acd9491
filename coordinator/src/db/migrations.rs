//! The schema's steps, built into the program.
use std::borrow::Cow;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{AnyPool, SqlSafeStr};

use super::Dialect;
use crate::error::Error;

macro_rules! steps {
    ($dialect:literal) => {
        &[
            (
                1,
                "foundation",
                include_str!(concat!(
                    "../../../migrations/",
                    $dialect,
                    "/0001_foundation.sql"
                )),
            ),
            (
                2,
                "contribution_files",
                include_str!(concat!(
                    "../../../migrations/",
                    $dialect,
                    "/0002_contribution_files.sql"
                )),
            ),
            (
                3,
                "verification",
                include_str!(concat!(
                    "../../../migrations/",
                    $dialect,
                    "/0003_verification.sql"
                )),
            ),
            (
                5,
                "replicas",
                include_str!(concat!(
                    "../../../migrations/",
                    $dialect,
                    "/0005_replicas.sql"
                )),
            ),
        ]
    };
}

type Step = (i64, &'static str, &'static str);

const SQLITE: &[Step] = steps!("sqlite");
const POSTGRES: &[Step] = steps!("postgres");

/// Brings a database's schema up to date. Two programs may try at once: the loser looks again.
///
/// # Errors
/// When a step fails, or the database has steps that this program does not know.
pub(super) async fn run(dialect: Dialect, pool: &AnyPool) -> Result<(), Error> {
    let steps = match dialect {
        Dialect::Sqlite => SQLITE,
        Dialect::Postgres => POSTGRES,
    };
    let migrations = steps.iter().map(|(version, name, sql)| {
        Migration::new(
            *version,
            Cow::Borrowed(*name),
            MigrationType::Simple,
            (*sql).into_sql_str(),
            false,
        )
    });
    let migrator = Migrator::with_migrations(migrations.collect());
    if migrator.run(pool).await.is_ok() {
        return Ok(());
    }
    migrator
        .run(pool)
        .await
        .map_err(|error| Error::internal("bring the database's schema up to date", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_built_in_for_both_dialects() {
        for (dialect, steps) in [("sqlite", SQLITE), ("postgres", POSTGRES)] {
            let folder = format!("{}/../migrations/{dialect}", env!("CARGO_MANIFEST_DIR"));
            let mut files: Vec<String> = std::fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            files.sort();
            let built_in: Vec<String> = steps
                .iter()
                .map(|(version, name, _)| format!("{version:04}_{name}.sql"))
                .collect();
            assert_eq!(built_in, files, "{dialect}");
        }
    }
}
