use std::fs;

use super::*;
use crate::testing;

const Q: &str = "model.layers.0.self_attn.q_proj";
const UP: &str = "model.layers.0.mlp.up_proj";

#[test]
fn writes_what_it_reads_whatever_the_order() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut pairs = [
        testing::pair(Q, 2, [8, 8], 2.0, 1),
        testing::pair(UP, 3, [12, 8], 0.7, 2),
    ];
    let first = testing::adapter(&dirs[0].path().join("new/folder"), &pairs, 2, 4.0);
    assert_eq!(
        first
            .modules()
            .iter()
            .map(|info| info.module.as_str())
            .collect::<Vec<_>>(),
        [UP, Q]
    );
    assert_eq!((first.find(Q), first.find("model")), (Some(1), None));
    assert_eq!(first.pair(1).unwrap(), pairs[0]);
    let up = first.pair(0).unwrap();
    assert_eq!((&up.a, &up.b, up.rank), (&pairs[1].a, &pairs[1].b, 3));
    assert!((up.scale - 0.7).abs() < 1e-15);
    assert!(first.pair(2).is_err());
    assert_eq!(
        first.config().rank_pattern,
        [(r"model\.layers\.0\.mlp\.up_proj".to_owned(), 3)]
    );

    pairs.reverse();
    testing::adapter(dirs[1].path(), &pairs, 2, 4.0);
    for file in [CONFIG_FILE, WEIGHTS_FILE] {
        let read = |dir: &Path| fs::read(dir.join(file)).unwrap();
        assert_eq!(
            read(&dirs[0].path().join("new/folder")),
            read(dirs[1].path()),
            "{file}"
        );
    }
    let left: Vec<_> = fs::read_dir(dirs[1].path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn refuses_to_write_nonsense() {
    let dir = tempfile::tempdir().unwrap();
    let config = testing::write_config(2, 4.0);
    assert!(matches!(
        write_adapter(dir.path(), &[], &config),
        Err(AdapterError::Empty)
    ));
    let mut pair = testing::pair(Q, 2, [8, 8], 2.0, 1);
    pair.b.pop();
    assert!(matches!(
        write_adapter(dir.path(), &[pair], &config),
        Err(AdapterError::Factors { .. })
    ));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn tensors_and_config_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    testing::adapter(dir.path(), &[testing::pair(Q, 2, [8, 8], 2.0, 1)], 2, 4.0);
    let config = fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    let weights = fs::read(dir.path().join(WEIGHTS_FILE)).unwrap();
    let says = |expected: &str| {
        let error = AdapterFile::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let put = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();

    put(
        CONFIG_FILE,
        config.replace("\"r\": 2", "\"r\": 3").as_bytes(),
    );
    says("but the config says rank 3");
    put(
        CONFIG_FILE,
        config
            .replace("\"use_dora\": false", "\"use_dora\": true")
            .as_bytes(),
    );
    says("DoRA");
    put(CONFIG_FILE, b"{");
    says("malformed");
    put(CONFIG_FILE, &vec![b' '; CONFIG_BYTES_MAX + 9]);
    says("at most");
    put(CONFIG_FILE, config.as_bytes());
    let renamed = String::from_utf8_lossy(&weights).into_owned();
    assert!(renamed.contains("lora_A"));
    let swap = |from: &[u8], to: &[u8]| {
        let place = weights
            .windows(from.len())
            .position(|window| window == from)
            .unwrap();
        let mut bytes = weights.clone();
        bytes[place..place + to.len()].copy_from_slice(to);
        bytes
    };
    put(WEIGHTS_FILE, &swap(b"lora_A", b"lora_C"));
    says("is no LoRA factor");
    put(
        WEIGHTS_FILE,
        &swap(b"0.self_attn.q_proj.lora_B", b"1.self_attn.q_proj.lora_B"),
    );
    says("is missing");
    put(WEIGHTS_FILE, &swap(b"[2,8]", b"[8,2]"));
    says("config says rank 2");
    put(WEIGHTS_FILE, &weights[..weights.len() - 1]);
    says("cut short");
    fs::remove_file(dir.path().join(WEIGHTS_FILE)).unwrap();
    says(WEIGHTS_FILE);
}

#[test]
fn a_spec_lists_every_pair_and_bounds_the_file() {
    let spec = AdapterSpec::new(&testing::model(), &testing::recipe());
    assert_eq!((spec.rank, spec.scale, spec.pairs.len()), (2, 2.0, 4));
    assert_eq!(spec.pairs[1].module, "model.layers.0.mlp.down_proj");
    assert_eq!(
        (spec.pairs[1].in_features, spec.pairs[1].out_features),
        (12, 8)
    );
    let dir = tempfile::tempdir().unwrap();
    let pairs: Vec<Pair> = spec
        .pairs
        .iter()
        .map(|pair| {
            testing::pair(
                &pair.module,
                2,
                [pair.out_features, pair.in_features],
                2.0,
                3,
            )
        })
        .collect();
    testing::adapter(dir.path(), &pairs, 2, 4.0);
    let bytes = fs::metadata(dir.path().join(WEIGHTS_FILE)).unwrap().len();
    assert!(bytes <= spec.file_bytes_max() && spec.file_bytes_max() < bytes + 8192);
}

#[test]
fn a_closed_adapter_reads_the_same_and_holds_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let pairs = vec![testing::pair(
        "model.layers.0.self_attn.q_proj",
        2,
        [8, 8],
        2.0,
        3,
    )];
    let open = testing::adapter(dir.path(), &pairs, 2, 4.0);
    let closed = AdapterFile::open(dir.path()).unwrap().closed();
    assert_eq!(open.pair(0).unwrap(), closed.pair(0).unwrap());
    let many: Vec<AdapterFile> = (0..2_000)
        .map(|_| AdapterFile::open(dir.path()).unwrap().closed())
        .collect();
    assert_eq!(many.last().unwrap().pair(0).unwrap(), pairs[0]);
    // Another file in its place is found out.
    std::fs::write(dir.path().join(WEIGHTS_FILE), "short").unwrap();
    assert!(closed.pair(0).is_err() && open.pair(0).is_err());
}
