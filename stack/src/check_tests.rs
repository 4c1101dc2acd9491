use std::fs;

use super::*;
use crate::adapter::{AdapterWriteConfig, CONFIG_FILE, Pair, WEIGHTS_FILE, write_adapter};
use crate::testing;

struct Submission {
    dir: tempfile::TempDir,
    spec: AdapterSpec,
}

fn honest_pairs(spec: &AdapterSpec) -> Vec<Pair> {
    let pairs = spec.pairs.iter().enumerate();
    let pair = |(seed, pair): (usize, &crate::adapter::PairSpec)| {
        testing::pair(
            &pair.module,
            spec.rank,
            [pair.out_features, pair.in_features],
            spec.scale,
            seed as u64,
        )
    };
    pairs.map(pair).collect()
}

fn submit(change: impl FnOnce(&mut Vec<Pair>)) -> Submission {
    let recipe = testing::recipe();
    let spec = AdapterSpec::new(&testing::model(), &recipe);
    let dir = tempfile::tempdir().unwrap();
    let mut pairs = honest_pairs(&spec);
    change(&mut pairs);
    write_adapter(
        dir.path(),
        &pairs,
        &AdapterWriteConfig::of_recipe(&recipe, Some("tiny"), None),
    )
    .unwrap();
    Submission { dir, spec }
}

impl Submission {
    fn config(&self) -> String {
        fs::read_to_string(self.dir.path().join(CONFIG_FILE)).unwrap()
    }

    fn check_with(&self, config: &str) -> Result<Checked<AdapterFile>, AdapterReject> {
        check_adapter(
            &self.dir.path().join(WEIGHTS_FILE),
            config.as_bytes(),
            &self.spec,
        )
    }

    fn code(&self) -> RejectCode {
        let reject = self.check_with(&self.config()).unwrap_err();
        assert!(
            !reject.text.contains(self.dir.path().to_str().unwrap()),
            "names a path: {}",
            reject.text
        );
        reject.code
    }

    fn change_bytes(&self, from: &[u8], to: &[u8]) {
        let path = self.dir.path().join(WEIGHTS_FILE);
        let mut bytes = fs::read(&path).unwrap();
        let place = bytes
            .windows(from.len())
            .position(|window| window == from)
            .unwrap();
        bytes[place..place + to.len()].copy_from_slice(to);
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn an_honest_adapter_passes() {
    let submission = submit(|_| {});
    let checked = submission.check_with(&submission.config()).unwrap();
    assert_eq!(checked.modules().len(), 4);
    assert_eq!(
        checked.into_inner().config().base_model.as_deref(),
        Some("tiny")
    );
}

#[test]
fn tensors_must_be_exactly_the_recipes() {
    assert_eq!(
        submit(|pairs| drop(pairs.pop())).code(),
        RejectCode::WrongTensors
    );
    let extra = submit(|pairs| pairs.push(testing::pair("lm_head", 2, [11, 8], 2.0, 9)));
    assert_eq!(extra.code(), RejectCode::WrongTensors);
    let shape = submit(|pairs| pairs[0] = testing::pair(&pairs[0].module, 2, [8, 9], 2.0, 9));
    assert_eq!(shape.code(), RejectCode::WrongShape);
    let rank = submit(|pairs| pairs[0] = testing::pair(&pairs[0].module, 3, [8, 8], 2.0, 9));
    assert_eq!(rank.code(), RejectCode::WrongShape);
    // Half the width, half the length: believable, but not what was asked for.
    let dtype = submit(|_| {});
    let header = r#"{"x":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}"#;
    let bytes = [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        &[0, 0],
    ]
    .concat();
    fs::write(dtype.dir.path().join(WEIGHTS_FILE), bytes).unwrap();
    assert_eq!(dtype.code(), RejectCode::WrongTensors);
}

#[test]
fn other_dtypes_are_refused() {
    use crate::tensors::{TensorFile, TensorSpec, write_tensors};
    let submission = submit(|_| {});
    let path = submission.dir.path().join(WEIGHTS_FILE);
    let file = TensorFile::open(&path).unwrap();
    let spec = |tensor: &crate::tensors::TensorInfo| TensorSpec {
        name: tensor.name.clone(),
        dtype: Dtype::BF16,
        shape: tensor.shape.clone(),
    };
    let specs: Vec<TensorSpec> = file.tensors().iter().map(spec).collect();
    let mut bytes = Vec::new();
    write_tensors::<std::io::Error>(&mut bytes, &[], &specs, |i| {
        Ok(vec![1; specs[i].bytes() as usize])
    })
    .unwrap();
    fs::write(&path, bytes).unwrap();
    assert_eq!(submission.code(), RejectCode::WrongDtype);
}

#[test]
fn headers_must_be_believable() {
    let cut = submit(|_| {});
    let path = cut.dir.path().join(WEIGHTS_FILE);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(cut.code(), RejectCode::BadHeader);
    // A header that would be fine for a large model is not for this adapter.
    let long = submit(|_| {});
    fs::write(
        long.dir.path().join(WEIGHTS_FILE),
        [&(1_u64 << 20).to_le_bytes()[..], &vec![b' '; 1 << 20]].concat(),
    )
    .unwrap();
    assert_eq!(long.code(), RejectCode::BadHeader);
    let gap = submit(|_| {});
    gap.change_bytes(b"\"data_offsets\":[0,", b"\"data_offsets\":[1,");
    assert_eq!(gap.code(), RejectCode::BadHeader);
    let gone = submit(|_| {});
    fs::remove_file(gone.dir.path().join(WEIGHTS_FILE)).unwrap();
    assert_eq!(gone.code(), RejectCode::StorageFault);
    assert!(RejectCode::StorageFault.is_fault() && !RejectCode::BadHeader.is_fault());
}

#[test]
fn the_config_must_equal_the_recipe() {
    let submission = submit(|_| {});
    let config = submission.config();
    for (old, new, code) in [
        (
            "\"lora_alpha\": 4",
            "\"lora_alpha\": 400",
            RejectCode::ConfigMismatch,
        ),
        ("\"r\": 2", "\"r\": 1", RejectCode::ConfigMismatch),
        (
            "\"use_rslora\": false",
            "\"use_rslora\": true",
            RejectCode::ConfigMismatch,
        ),
        (
            "\"rank_pattern\": {}",
            "\"rank_pattern\": {\"q_proj\": 2}",
            RejectCode::ConfigMismatch,
        ),
        (
            "\"alpha_pattern\": {}",
            "\"alpha_pattern\": {\"q_proj\": 400}",
            RejectCode::ConfigMismatch,
        ),
        ("\"q_proj\"", "\"k_proj\"", RejectCode::ConfigMismatch),
        (
            "\"revision\": null",
            "\"layers_to_transform\": [0]",
            RejectCode::ConfigMismatch,
        ),
        (
            "\"use_dora\": false",
            "\"use_dora\": true",
            RejectCode::BadConfig,
        ),
        (
            "\"bias\": \"none\"",
            "\"bias\": \"all\"",
            RejectCode::BadConfig,
        ),
        ("{", "", RejectCode::BadConfig),
    ] {
        assert!(config.contains(old), "{old} is not in {config}");
        let reject = submission
            .check_with(&config.replacen(old, new, 1))
            .unwrap_err();
        assert_eq!(reject.code, code, "{new}: {reject}");
    }
}

#[test]
fn numbers_must_be_finite_and_add_something() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(
            submit(|pairs| pairs[3].a[5] = value).code(),
            RejectCode::NotFinite
        );
        assert_eq!(
            submit(|pairs| *pairs[0].b.last_mut().unwrap() = value).code(),
            RejectCode::NotFinite
        );
    }
    let zero_b = submit(|pairs| pairs.iter_mut().for_each(|pair| pair.b.fill(0.0)));
    assert_eq!(zero_b.code(), RejectCode::ZeroDelta);
    // Factors that are not zero, but whose product is.
    let cancelled = submit(|pairs| {
        for pair in pairs {
            let columns = pair.in_features;
            let (first, second) = pair.a.split_at_mut(columns);
            second.copy_from_slice(first);
            pair.b.chunks_exact_mut(2).for_each(|row| row[1] = -row[0]);
        }
    });
    assert_eq!(cancelled.code(), RejectCode::ZeroDelta);
    let tiny = submit(|pairs| {
        for pair in pairs {
            pair.b.iter_mut().for_each(|b| *b *= 1e-12);
        }
    });
    assert_eq!(tiny.code(), RejectCode::ZeroDelta);
}

#[test]
fn codes_are_stable() {
    let codes = [
        (RejectCode::BadHeader, "BAD_HEADER"),
        (RejectCode::WrongTensors, "WRONG_TENSORS"),
        (RejectCode::WrongShape, "WRONG_SHAPE"),
        (RejectCode::WrongDtype, "WRONG_DTYPE"),
        (RejectCode::BadConfig, "BAD_CONFIG"),
        (RejectCode::ConfigMismatch, "CONFIG_MISMATCH"),
        (RejectCode::NotFinite, "NOT_FINITE"),
        (RejectCode::ZeroDelta, "ZERO_DELTA"),
        (RejectCode::StorageFault, "STORAGE_FAULT"),
    ];
    for (code, word) in codes {
        assert_eq!(code.to_string(), word);
    }
}
