use std::fs;

use super::*;
use crate::tensors::{Dtype, TensorSpec};
use crate::testing;

/// The checkpoint of `testing`, its weights split over two files with an index.
fn sharded(dir: &Path) {
    testing::checkpoint(dir, 1);
    fs::remove_file(dir.join(WEIGHTS_FILE)).unwrap();
    let tensors = testing::weights(1);
    let (first, second) = tensors.split_at(7);
    let mut map = Vec::new();
    for (name, part) in [
        ("model-00001-of-00002.safetensors", first),
        ("model-00002-of-00002.safetensors", second),
    ] {
        testing::write_weights(&dir.join(name), part);
        map.extend(
            part.iter()
                .map(|(spec, _)| format!("\"{}\":\"{name}\"", spec.name)),
        );
    }
    let index = format!(
        "{{\"metadata\":{{\"total_size\":1}},\"weight_map\":{{{}}}}}",
        map.join(",")
    );
    fs::write(dir.join(INDEX_FILE), index).unwrap();
}

fn says(dir: &Path, expected: &str) {
    let error = Checkpoint::open(dir).unwrap_err().to_string();
    assert!(error.contains(expected), "{error} does not say {expected}");
}

#[test]
fn opens_one_file_and_many() {
    let dir = tempfile::tempdir().unwrap();
    for (name, make) in [
        ("one", (|dir| testing::checkpoint(dir, 1)) as fn(&Path)),
        ("many", sharded),
    ] {
        let folder = dir.path().join(name);
        make(&folder);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        for (spec, values) in testing::weights(1) {
            assert_eq!(
                checkpoint.read_f32(&spec.name).unwrap(),
                (spec.shape, values),
                "{}",
                spec.name
            );
        }
        assert!(checkpoint.get("model.norm.bias").is_none());
        assert!(checkpoint.read_f32("model.norm.bias").is_err());
        assert!(
            checkpoint
                .other_files()
                .contains(&"tokenizer.json".to_owned())
        );
        assert_eq!(
            checkpoint.weight_files().len(),
            if name == "one" { 1 } else { 2 }
        );
        assert!(checkpoint.files().is_sorted());
    }
}

#[test]
fn what_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    says(dir.path(), "config.json");
    sharded(dir.path());
    fs::rename(
        dir.path().join("model-00002-of-00002.safetensors"),
        dir.path().join("elsewhere"),
    )
    .unwrap();
    says(dir.path(), "model-00002-of-00002.safetensors is missing");
    fs::rename(
        dir.path().join("elsewhere"),
        dir.path().join("model-00002-of-00002.safetensors"),
    )
    .unwrap();
    Checkpoint::open(dir.path()).unwrap();
    fs::remove_file(dir.path().join(INDEX_FILE)).unwrap();
    says(dir.path(), "has neither model.safetensors nor");
}

#[test]
fn an_index_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    sharded(dir.path());
    let index = fs::read_to_string(dir.path().join(INDEX_FILE)).unwrap();
    let norm = "\"model.norm.weight\":\"model-00002-of-00002.safetensors\"";
    assert!(index.contains(norm));
    for (changed, expected) in [
        ("{".to_owned(), "EOF"),
        ("{}".to_owned(), "weight_map"),
        (
            index.replace(norm, "\"model.norm.weight\":7"),
            "is not in a .safetensors file",
        ),
        (
            index.replace(norm, "\"model.norm.weight\":\"../x.safetensors\""),
            "is not in a .safetensors file",
        ),
        (
            index.replace(norm, "\"model.norm.weight\":\"/x.safetensors\""),
            "is not in a .safetensors file",
        ),
        (
            index.replace(norm, "\"model.norm.weight\":\"config.json\""),
            "is not in a .safetensors file",
        ),
        (
            index.replace(
                norm,
                "\"model.norm.weight\":\"model-00001-of-00002.safetensors\"",
            ),
            "does not say",
        ),
        (
            index.replace(
                norm,
                &format!("{norm},\"extra.weight\":\"model-00002-of-00002.safetensors\""),
            ),
            "in no weight file",
        ),
        (index.replace(norm, &format!("{norm},{norm}")), "twice"),
        (
            index.replace("weight_map\":{", "weight_map\":{},\"other\":{"),
            "0 weight files",
        ),
    ] {
        fs::write(dir.path().join(INDEX_FILE), changed).unwrap();
        says(dir.path(), expected);
    }
}

#[test]
fn weights_are_exactly_the_configs() {
    let dir = tempfile::tempdir().unwrap();
    testing::checkpoint(dir.path(), 1);
    let path = dir.path().join(WEIGHTS_FILE);
    let tensors = testing::weights(1);

    let mut lacking = tensors.clone();
    let (lost, _) = lacking.pop().unwrap();
    testing::write_weights(&path, &lacking);
    says(dir.path(), &format!("tensor {:?} is missing", lost.name));

    let mut extra = tensors.clone();
    extra.push((
        TensorSpec {
            name: "extra".to_owned(),
            dtype: Dtype::F32,
            shape: vec![1],
        },
        vec![0.0],
    ));
    testing::write_weights(&path, &extra);
    says(dir.path(), "tensor \"extra\" is no part of a llama model");

    let mut reshaped = tensors.clone();
    reshaped[0].0.shape.reverse();
    testing::write_weights(&path, &reshaped);
    says(dir.path(), "the config says [11, 8]");

    testing::write_weights(&path, &tensors);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    says(dir.path(), "cut short");
    fs::write(&path, whole).unwrap();
    fs::write(dir.path().join(INDEX_FILE), "{}").unwrap();
    says(dir.path(), "has both");
}

#[test]
fn other_weights_and_old_manifests_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    testing::checkpoint(dir.path(), 1);
    for name in [
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.safetensors",
        MANIFEST_FILE,
        CHECKSUMS_FILE,
        ".gitattributes",
        "chat_template.jinja",
    ] {
        fs::write(dir.path().join(name), "x").unwrap();
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(
        checkpoint.files(),
        [
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "tokenizer.json"
        ]
    );
    assert_eq!(checkpoint.left_out().len(), 5);
}
