//! The crates' edges, read from manifests, the lock file and sources.
//!
//! `stack <- proto <- {coordinator, worker, cli} <- tests` and `kernels <- worker`, and nothing else; a
//! tensor framework only in the worker; inside the coordinator, each outside thing in its one place. The checks are
//! functions of text, so each is also shown a planted violation that it must catch.

mod rust_text;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::rust_text::{mentions, tokens};

/// Every crate: its folder, and the crates of ours that it may name.
const CRATES: [(&str, &[&str]); 7] = [
    ("stack", &[]),
    ("kernels", &[]),
    ("proto", &["cairn-stack"]),
    ("coordinator", &["cairn-stack", "cairn-proto"]),
    ("worker", &["cairn-stack", "cairn-proto", "cairn-kernels"]),
    ("cli", &["cairn-stack", "cairn-proto"]),
    (
        "tests",
        &[
            "cairn-stack",
            "cairn-proto",
            "cairn-coordinator",
            "cairn-worker",
            "cairn-cli",
        ],
    ),
];

/// Tensor frameworks, by the start of the package's name: only the worker may reach one.
const TENSOR_FRAMEWORKS: [&str; 8] = [
    "burn",
    "candle-",
    "cubecl",
    "cudarc",
    "ndarray",
    "tch",
    "torch-sys",
    "wgpu",
];

/// What `stack` may not name: it is blocking, and knows no network and no store.
const NOT_IN_STACK: [&str; 8] = [
    "axum",
    "hyper",
    "object_store",
    "reqwest",
    "sqlx",
    "tokio",
    "tonic",
    "tower",
];

/// One thing of the outside world, and the only places of the coordinator that may name it.
struct Seam {
    path: &'static [&'static str],
    allowed: &'static [&'static str],
}

const SEAMS: [Seam; 3] = [
    Seam {
        path: &["sqlx"],
        allowed: &["db.rs", "db/"],
    },
    Seam {
        path: &["object_store"],
        allowed: &["blobs.rs", "blobs/"],
    },
    Seam {
        path: &["tonic", "Status"],
        allowed: &["rpc.rs", "rpc/"],
    },
];

/// What `coordinator/src/domain` may not name: input and output, the clock, the wire, the layers above.
/// The shared words of verdicts, `cairn_proto::reason`, are no wire.
const NOT_IN_DOMAIN: [&[&str]; 23] = [
    &["std", "env"],
    &["std", "fs"],
    &["std", "io"],
    &["std", "net"],
    &["std", "process"],
    &["std", "thread"],
    &["SystemTime"],
    &["Instant"],
    &["axum"],
    &["cairn_proto", "client"],
    &["cairn_proto", "convert"],
    &["cairn_proto", "limits"],
    &["cairn_proto", "v1"],
    &["object_store"],
    &["prost"],
    &["sqlx"],
    &["tokio"],
    &["tonic"],
    &["crate", "blobs"],
    &["crate", "db"],
    &["crate", "http"],
    &["crate", "ops"],
    &["crate", "rpc"],
];

// ---------------------------------------------------------------- checks of text

/// Every dependency a manifest names, in whatever table: (name of the package, its value).
fn dependencies(manifest: &Table) -> Vec<(String, Value)> {
    let inner = |name: &str| manifest.get(name).and_then(Value::as_table);
    let mut tables = vec![manifest];
    tables.extend(inner("workspace"));
    tables.extend(
        inner("target")
            .into_iter()
            .flat_map(|targets| targets.values().filter_map(Value::as_table)),
    );
    let mut found = Vec::new();
    for table in tables {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let named = table.get(kind).and_then(Value::as_table);
            found.extend(named.into_iter().flatten().map(|(name, value)| {
                let package = value.get("package").and_then(Value::as_str);
                (package.unwrap_or(name).to_owned(), value.clone())
            }));
        }
    }
    found
}

fn is_tensor_framework(package: &str) -> bool {
    TENSOR_FRAMEWORKS
        .iter()
        .any(|start| package.starts_with(start))
}

/// What is wrong with one crate's manifest; `folder` is a name in [`CRATES`].
fn manifest_violations(folder: &str, manifest: &str) -> Vec<String> {
    let manifest: Table = manifest.parse().expect("a manifest is TOML");
    let Some((_, allowed)) = CRATES.iter().find(|(name, _)| *name == folder) else {
        return vec![format!("{folder}: a crate without a place in the edges")];
    };
    let mut wrong = Vec::new();
    for (name, value) in dependencies(&manifest) {
        if value.get("git").is_some() {
            wrong.push(format!("{folder}: {name} comes from git"));
        }
        if name.starts_with("cairn-") && !allowed.contains(&name.as_str()) {
            wrong.push(format!("{folder}: may not know {name}"));
        }
        if folder != "worker" && is_tensor_framework(&name) {
            wrong.push(format!("{folder}: {name} is a tensor framework"));
        }
        if folder == "stack" && NOT_IN_STACK.iter().any(|no| name.starts_with(no)) {
            wrong.push(format!("stack: {name} is async, network or a store"));
        }
    }
    wrong
}

/// All packages that `root` reaches through the lock file, itself left out.
fn reached(lock: &str, root: &str) -> BTreeSet<String> {
    let lock: Table = lock.parse().expect("the lock file is TOML");
    let mut edges: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in lock["package"].as_array().expect("packages are a list") {
        let name = package["name"].as_str().expect("a package has a name");
        let to = package.get("dependencies").and_then(Value::as_array);
        // An entry is "name" or "name version"; versions are followed together, which is stricter.
        let to = to
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.as_str()?.split(' ').next());
        edges
            .entry(name.to_owned())
            .or_default()
            .extend(to.map(str::to_owned));
    }
    let mut seen = BTreeSet::new();
    let mut open = vec![root.to_owned()];
    while let Some(name) = open.pop() {
        for next in edges.get(&name).into_iter().flatten() {
            if seen.insert(next.clone()) {
                open.push(next.clone());
            }
        }
    }
    seen
}

fn lock_violations(lock: &str, root: &str) -> Vec<String> {
    reached(lock, root)
        .into_iter()
        .filter(|name| is_tensor_framework(name))
        .map(|name| format!("{root} reaches {name}, a tensor framework"))
        .collect()
}

/// What is wrong with one source of the coordinator; `file` is relative to its `src`.
fn source_violations(file: &str, source: &str) -> Vec<String> {
    let code = tokens(source);
    let is_in = |place: &&str| {
        if place.ends_with('/') {
            file.starts_with(place)
        } else {
            file == *place
        }
    };
    let mut wrong = Vec::new();
    for seam in &SEAMS {
        if !seam.allowed.iter().any(is_in) && mentions(&code, seam.path) {
            wrong.push(format!(
                "coordinator/src/{file} names {}, which belongs in {}",
                seam.path.join("::"),
                seam.allowed.join(" or ")
            ));
        }
    }
    if ["domain.rs", "domain/"].iter().any(is_in) {
        for path in NOT_IN_DOMAIN {
            if mentions(&code, path) {
                wrong.push(format!(
                    "coordinator/src/{file} is domain, and names {}",
                    path.join("::")
                ));
            }
        }
    }
    wrong
}

// ---------------------------------------------------------------- the real tree

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

/// The sources under a folder, as (path relative to it, text).
fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).expect("a folder of sources is readable") {
            let path = entry.expect("its entries too").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let name = path.strip_prefix(folder).expect("it is below the folder");
                found.push((name.to_string_lossy().into_owned(), read(&path)));
            }
        }
    }
    found
}

#[test]
fn crates_know_only_what_they_may() {
    let workspace: Table = read("Cargo.toml").parse().expect("the manifest is TOML");
    let members = workspace["workspace"]["members"].as_array();
    let members = members.into_iter().flatten().filter_map(Value::as_str);
    let wrong: Vec<String> = members
        .flat_map(|folder| manifest_violations(folder, &read(format!("{folder}/Cargo.toml"))))
        .collect();
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn no_dependency_comes_from_git() {
    let workspace: Table = read("Cargo.toml").parse().expect("the manifest is TOML");
    for (name, value) in dependencies(&workspace) {
        assert!(value.get("git").is_none(), "{name} comes from git");
    }
    assert!(workspace.get("patch").is_none(), "no patched dependencies");
    assert!(!read("Cargo.lock").contains("source = \"git+"));
}

#[test]
fn only_the_worker_reaches_a_tensor_framework() {
    let lock = read("Cargo.lock");
    for root in [
        "cairn-stack",
        "cairn-proto",
        "cairn-coordinator",
        "cairn-cli",
    ] {
        assert_eq!(lock_violations(&lock, root), Vec::<String>::new());
    }
    assert!(
        !lock_violations(&lock, "cairn-worker").is_empty(),
        "the check sees the worker's own framework"
    );
}

#[test]
fn the_coordinator_keeps_each_outside_thing_in_its_place() {
    let sources = sources(&root().join("coordinator/src"));
    assert!(sources.iter().any(|(file, _)| file == "lib.rs"));
    let wrong: Vec<String> = sources
        .iter()
        .flat_map(|(file, source)| source_violations(file, source))
        .collect();
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn both_databases_have_the_same_migrations() {
    let names = |folder: &str| -> BTreeSet<String> {
        fs::read_dir(root().join(folder))
            .expect("a folder of migrations")
            .map(|entry| entry.expect("is readable").file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .collect()
    };
    let sqlite = names("migrations/sqlite");
    assert!(!sqlite.is_empty());
    assert_eq!(sqlite, names("migrations/postgres"));
}

// ---------------------------------------------------------------- planted violations

#[test]
fn a_planted_edge_is_caught() {
    for (folder, manifest, named) in [
        ("stack", "[dependencies]\ntokio = '1'", "tokio"),
        (
            "stack",
            "[dependencies]\ncairn-proto.workspace = true",
            "cairn-proto",
        ),
        (
            "proto",
            "[dev-dependencies]\ncairn-tests.workspace = true",
            "cairn-tests",
        ),
        ("coordinator", "[dependencies]\nburn = '0.22'", "burn"),
        (
            "coordinator",
            "[dependencies]\ncairn-worker.workspace = true",
            "cairn-worker",
        ),
        (
            "worker",
            "[target.'cfg(unix)'.dependencies]\nx = { package = 'cairn-cli', path = '..' }",
            "cairn-cli",
        ),
        (
            "cli",
            "[build-dependencies]\nhttp = { git = 'https://example.org' }",
            "git",
        ),
        ("extra", "", "without a place"),
    ] {
        let wrong = manifest_violations(folder, manifest);
        assert_eq!(wrong.len(), 1, "{folder}: {manifest}");
        assert!(wrong[0].contains(named), "{wrong:?}");
    }
    let fine = "[dependencies]\ncairn-stack.workspace = true\nburn = '0.22'";
    assert_eq!(manifest_violations("worker", fine), Vec::<String>::new());
}

#[test]
fn a_planted_framework_is_caught_behind_another_package() {
    let lock = r#"
        [[package]]
        name = "cairn-cli"
        dependencies = ["innocent 1.0.0"]
        [[package]]
        name = "innocent"
        dependencies = ["burn-core"]
        [[package]]
        name = "burn-core"
    "#;
    assert_eq!(lock_violations(lock, "cairn-cli").len(), 1);
    assert_eq!(lock_violations(lock, "burn-core").len(), 0);
}

#[test]
fn a_planted_source_is_caught() {
    for (file, source) in [
        ("domain/round.rs", "use std::time::{Duration, SystemTime};"),
        (
            "domain/round.rs",
            "use std::{collections::BTreeMap, fs::File};",
        ),
        ("domain/round.rs", "fn f() { std::fs::read(p); }"),
        (
            "domain/round.rs",
            "use cairn_proto::{reason::VerdictReason, v1};",
        ),
        ("domain/round.rs", "use crate::{domain::Lease, db::Tx};"),
        ("ops/claim.rs", "fn f(e: sqlx::Error) {}"),
        ("ops/claim.rs", "use tonic::{Code, Status};"),
        ("http/hub.rs", "use tonic::*;"),
        (
            "tasks/fold.rs",
            "let c = '\"'; object_store::path::Path::from(\"x\");",
        ),
        ("dbx.rs", "use sqlx::Any;"),
    ] {
        let wrong = source_violations(file, source);
        assert_eq!(wrong.len(), 1, "{file}: {source}: {wrong:?}");
    }
    for (file, source) in [
        ("db.rs", "use sqlx::Any;"),
        ("db/rounds.rs", "sqlx::query(\"select 1\")"),
        ("rpc/status.rs", "use tonic::Status;"),
        ("blobs.rs", "use object_store::ObjectStore;"),
        (
            "app.rs",
            "use tonic::{transport::{Server, Status}, Request};",
        ),
        (
            "ops/claim.rs",
            "// sqlx stays in db\n/* tonic::Status /* too */ */ let x = r#\"a \" sqlx\"#;",
        ),
        (
            "domain/lease.rs",
            "/// No tokio.\nfn f<'a>(x: &'a str) -> &'static str { \"std::fs\" }",
        ),
    ] {
        assert_eq!(
            source_violations(file, source),
            Vec::<String>::new(),
            "{file}"
        );
    }
}
