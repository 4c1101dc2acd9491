//! The schema's two ways: a fresh database, and one that has lived through every step with rows in
//! it. Both end with the same schema, on both databases, and the two databases have the same tables,
//! columns, keys and indexes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod support;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use cairn_coordinator::db::{Db, sqlite_url};
use sqlx::any::AnyPoolOptions;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{AnyPool, AssertSqlSafe, Row, SqlSafeStr};

/// Everything in a schema, a line each, such as `column blobs.digest text not null`.
type Schema = BTreeSet<String>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Dialect {
    Sqlite,
    Postgres,
}

/// One step: version, name, SQL.
fn steps(dialect: Dialect) -> Vec<Migration> {
    let folder = match dialect {
        Dialect::Sqlite => "sqlite",
        Dialect::Postgres => "postgres",
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../migrations")
        .join(folder);
    let mut steps: Vec<Migration> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap();
            let (version, name) = stem.split_once('_').unwrap();
            let sql = std::fs::read_to_string(&path).unwrap();
            Migration::new(
                version.parse().unwrap(),
                Cow::Owned(name.to_owned()),
                MigrationType::Simple,
                AssertSqlSafe(sql).into_sql_str(),
                false,
            )
        })
        .collect();
    steps.sort_by_key(|step| step.version);
    steps
}

async fn pool(url: &str) -> AnyPool {
    sqlx::any::install_default_drivers();
    AnyPoolOptions::new()
        .max_connections(1)
        .connect(url)
        .await
        .unwrap()
}

async fn lines(pool: &AnyPool, sql: &str) -> Vec<String> {
    let rows = sqlx::query(AssertSqlSafe(sql.to_owned()))
        .fetch_all(pool)
        .await
        .unwrap();
    rows.iter()
        .map(|row| row.get::<String, _>("line"))
        .collect()
}

async fn tables(pool: &AnyPool, dialect: Dialect) -> Vec<String> {
    let sql = match dialect {
        Dialect::Sqlite => {
            "select name as line from sqlite_master where type = 'table' \
             and name not like 'sqlite_%' and name not like '\\_sqlx%' escape '\\' order by name"
        }
        Dialect::Postgres => {
            "select cast(table_name as text) as line from information_schema.tables \
             where table_schema = 'public' and table_name not like '\\_sqlx%' order by table_name"
        }
    };
    lines(pool, sql).await
}

/// Columns, keys and indexes in words that both databases share.
async fn schema(pool: &AnyPool, dialect: Dialect) -> Schema {
    let mut found = Schema::new();
    for table in tables(pool, dialect).await {
        found.insert(format!("table {table}"));
        let queries = match dialect {
            Dialect::Sqlite => sqlite_queries(&table),
            Dialect::Postgres => postgres_queries(&table),
        };
        for sql in queries {
            found.extend(lines(pool, &sql).await);
        }
    }
    found
}

fn sqlite_queries(table: &str) -> Vec<String> {
    // A primary key is not null, whether it says so or not.
    vec![
        format!(
            "select 'column {table}.' || name || ' ' || lower(type) || \
             case when \"notnull\" = 1 or pk > 0 then ' not null' else '' end || \
             case when dflt_value is null then '' else ' default ' || dflt_value end as line \
             from pragma_table_info('{table}')"
        ),
        format!(
            "select 'primary key {table} ' || group_concat(name, ',') as line from \
             (select name from pragma_table_info('{table}') where pk > 0 order by pk) \
             having count(*) > 0"
        ),
        format!(
            "select case when \"unique\" = 1 then 'unique ' else 'index ' end || '{table} ' || \
             (select group_concat(name, ',') from \
              (select name from pragma_index_info(l.name) order by seqno)) || \
             case when partial = 1 then ' partial' else '' end as line \
             from pragma_index_list('{table}') l where origin <> 'pk'"
        ),
        format!(
            "select 'foreign key {table} ' || \"from\" || ' -> ' || \"table\" || '.' || \"to\" \
             as line from pragma_foreign_key_list('{table}')"
        ),
    ]
}

fn postgres_queries(table: &str) -> Vec<String> {
    let columns = |keys: &str, of: &str| {
        format!(
            "(select string_agg(cast(a.attname as text), ',' order by k.n) \
             from unnest({keys}) with ordinality as k(attnum, n) \
             join pg_attribute a on a.attrelid = {of} and a.attnum = k.attnum)"
        )
    };
    let key = columns("i.indkey", "i.indrelid");
    vec![
        format!(
            "select 'column {table}.' || column_name || ' ' || \
             case data_type when 'bytea' then 'blob' else data_type end || \
             case when is_nullable = 'NO' then ' not null' else '' end || \
             case when column_default is null then '' else ' default ' || \
             replace(replace(column_default, '::text', ''), '::bigint', '') end as line \
             from information_schema.columns \
             where table_schema = 'public' and table_name = '{table}'"
        ),
        format!(
            "select case when i.indisprimary then 'primary key ' when i.indisunique \
             then 'unique ' else 'index ' end || '{table} ' || {key} || \
             case when i.indpred is null then '' else ' partial' end as line \
             from pg_index i where i.indrelid = 'public.{table}'::regclass"
        ),
        format!(
            "select 'foreign key {table} ' || cast(a.attname as text) || ' -> ' || \
             cast(c.confrelid::regclass as text) || '.' || cast(b.attname as text) as line \
             from pg_constraint c, unnest(c.conkey, c.confkey) as k(one, other), \
             pg_attribute a, pg_attribute b \
             where c.contype = 'f' and c.conrelid = 'public.{table}'::regclass \
             and a.attrelid = c.conrelid and a.attnum = k.one \
             and b.attrelid = c.confrelid and b.attnum = k.other"
        ),
    ]
}

/// The database's own words for all of it, checks included: equal for databases of one kind.
async fn dump(pool: &AnyPool, dialect: Dialect) -> Vec<String> {
    let sql = match dialect {
        Dialect::Sqlite => {
            "select coalesce(sql, name) as line from sqlite_master \
             where name not like '\\_sqlx%' escape '\\' order by type, name"
        }
        Dialect::Postgres => {
            "select cast(conrelid::regclass as text) || ' ' || cast(conname as text) || ' ' || \
             pg_get_constraintdef(oid) as line from pg_constraint \
             where connamespace = 'public'::regnamespace \
             and cast(conrelid::regclass as text) not like '\\_sqlx%' \
             union all select indexdef from pg_indexes where schemaname = 'public' \
             and tablename not like '\\_sqlx%' order by line"
        }
    };
    lines(pool, sql).await
}

/// A row in every table of the first step, each naming the others.
const ROWS: [&str; 16] = [
    "insert into settings values ('server_key', '00')",
    "insert into workers values ('w', $1, 'ada', 'maintainer', 1, null)",
    "insert into join_tokens values ('t', 'volunteer', 1, 1, 2)",
    "insert into enrolments values ('t', 'w')",
    "insert into challenges values ('c', $1, 2)",
    "insert into sessions values ('s', 'w', 2)",
    "insert into blobs values ('d', 3, 'members', 'w', 1)",
    "insert into models values ('m', 1, 1, 'r1')",
    "insert into checkpoints values ('m', 1, 'c', null, null, 0, 'd', 1.5, null, 1)",
    "insert into checkpoint_files values ('m', 1, 'checkpoint', 'config.json', 'd', 3, 'sha')",
    "insert into datasets values ('n', 'train', 'CC0-1.0', 'here', 1, 3, 1, 'r2')",
    "insert into dataset_chunks values ('n', 0, 'd', 3, 1)",
    "insert into rounds (id, model, base_revision, base_commit, dataset, round_file, \
     adapter_bytes_max, state, created_ms, deadline_ms, request_id) \
     values ('r', 'm', 0, 'b', 'n', 'file', 9, 'training', 1, 2, 'r3')",
    "insert into shards values ('r', 0, '[]', 1, 3, 'leased', 1)",
    "insert into leases (id, kind, round_id, shard, worker_id, generation, nonce, state, \
     created_ms, expires_ms) values ('l', 'train', 'r', 0, 'w', 1, $1, 'done', 1, 2)",
    "insert into submissions (id, lease_id, request_id, round_id, shard, worker_id, adapter, \
     adapter_bytes, adapter_config, numbers, signature, receipt_statement, receipt_signature, \
     state, created_ms) values ('s', 'l', 'q', 'r', 0, 'w', 'd', 3, '{}', '{}', $1, 'said', $1, \
     'accepted', 1)",
];

async fn fill(pool: &AnyPool) {
    for sql in ROWS {
        let query = sqlx::query(sql);
        let query = if sql.contains("$1") {
            query.bind(vec![7_u8; 32])
        } else {
            query
        };
        query.execute(pool).await.unwrap();
    }
}

async fn counts(pool: &AnyPool, tables: &[String]) -> Vec<(String, i64)> {
    let mut counts = Vec::new();
    for table in tables {
        let sql = AssertSqlSafe(format!("select count(*) as n from {table}"));
        let row = sqlx::query(sql).fetch_one(pool).await.unwrap();
        counts.push((table.clone(), row.get("n")));
    }
    counts
}

/// Upgrades a database with rows step by step and compares it with a fresh one.
async fn both_ways(dialect: Dialect, fresh: &str, upgraded: &str) -> Schema {
    Db::open(fresh).await.unwrap().close().await;
    let old = pool(upgraded).await;
    let steps = steps(dialect);
    let up_to = |count: usize| Migrator::with_migrations(steps[..count].to_vec());
    up_to(1).run(&old).await.unwrap();
    fill(&old).await;
    let first = tables(&old, dialect).await;
    let before = counts(&old, &first).await;
    for count in 2..=steps.len() {
        up_to(count).run(&old).await.unwrap();
        assert_eq!(
            counts(&old, &first).await,
            before,
            "step {count} loses rows"
        );
    }
    // What the program makes of it: nothing, it is up to date.
    let program = Db::open(upgraded).await.unwrap();
    program.close().await;
    assert_eq!(counts(&old, &first).await, before);
    let fresh = pool(fresh).await;
    let expected = schema(&fresh, dialect).await;
    assert_eq!(schema(&old, dialect).await, expected);
    assert_eq!(dump(&old, dialect).await, dump(&fresh, dialect).await);
    expected
}

async fn sqlite() -> Schema {
    let folder = tempfile::tempdir().unwrap();
    let url = |name: &str| sqlite_url(&folder.path().join(name));
    both_ways(Dialect::Sqlite, &url("fresh"), &url("upgraded")).await
}

#[tokio::test]
async fn sqlite_is_the_same_fresh_and_upgraded() {
    let schema = sqlite().await;
    // The questions find something at all.
    for line in [
        "table submissions",
        "column blobs.digest text not null",
        "column workers.public_key blob not null",
        "primary key checkpoint_files model,revision,folder,path",
        "unique submissions lease_id",
        "index leases state,expires_ms",
        "foreign key submissions lease_id -> leases.id",
    ] {
        assert!(schema.contains(line), "{line}: {schema:#?}");
    }
}

#[tokio::test]
async fn postgres_is_the_same_fresh_and_upgraded_and_as_sqlite() {
    let (Some(fresh), Some(upgraded)) = (support::postgres().await, support::postgres().await)
    else {
        eprintln!("left out: CAIRN_TEST_POSTGRES names no server");
        return;
    };
    let postgres = both_ways(Dialect::Postgres, &fresh, &upgraded).await;
    let sqlite = sqlite().await;
    let only =
        |one: &Schema, other: &Schema| -> Vec<String> { one.difference(other).cloned().collect() };
    let (here, there) = (only(&sqlite, &postgres), only(&postgres, &sqlite));
    assert!(
        here.is_empty() && there.is_empty(),
        "only SQLite: {here:#?}\nonly PostgreSQL: {there:#?}"
    );
}
