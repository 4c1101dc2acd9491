use std::fs;
use std::io::Write;

use half::bf16;

use super::*;
use crate::adapter::Pair;
use crate::tensors::{Dtype, TensorFile};
use crate::testing;

const Q: &str = "model.layers.0.self_attn.q_proj";
const DOWN: &str = "model.layers.1.mlp.down_proj";

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        testing::checkpoint(&dir.path().join("base"), 1);
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn base(&self) -> Checkpoint {
        Checkpoint::open(&self.path("base")).unwrap()
    }

    fn adapter(&self, name: &str, pairs: &[Pair]) -> AdapterFile {
        testing::adapter(&self.path(name), pairs, 2, 4.0)
    }

    /// Nothing but what the test made is there: no half folder, no temporary one.
    fn assert_only(&self, names: &[&str]) {
        let mut found: Vec<String> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        assert_eq!(found, names);
    }
}

fn pairs(seed: u64) -> Vec<Pair> {
    vec![
        testing::pair(Q, 2, [8, 8], 2.0, seed),
        testing::pair(DOWN, 3, [8, 12], 0.5, seed + 1),
    ]
}

fn same_bytes(x: &Path, y: &Path) {
    for name in crate::files::list_files(x).unwrap() {
        assert_eq!(
            fs::read(x.join(&name)).unwrap(),
            fs::read(y.join(&name)).unwrap(),
            "{name}"
        );
    }
    assert_eq!(
        crate::files::list_files(x).unwrap(),
        crate::files::list_files(y).unwrap()
    );
}

#[test]
fn adds_what_the_formula_says() {
    let world = World::new();
    let (x, y) = (
        world.adapter("x", &pairs(10)),
        world.adapter("y", &pairs(20)[..1]),
    );
    let terms = [
        Term {
            adapter: &x,
            weight: 0.7,
        },
        Term {
            adapter: &y,
            weight: -1.3,
        },
    ];
    let report = fold(&world.base(), &terms, &world.path("out")).unwrap();
    assert_eq!(
        (report.folded, report.copied + report.folded),
        (2, testing::weights(1).len())
    );
    let folded = Checkpoint::open(&world.path("out")).unwrap();
    for (spec, base) in testing::weights(1) {
        let (_, found) = folded.read_f32(&spec.name).unwrap();
        let mut expected: Vec<f64> = base.iter().map(|value| f64::from(*value)).collect();
        for (pair, weight) in pairs(10)
            .iter()
            .map(|pair| (pair, 0.7))
            .chain([(&pairs(20)[0], -1.3)])
        {
            if spec.name == format!("{}.weight", pair.module) {
                expected
                    .iter_mut()
                    .zip(testing::dense(pair))
                    .for_each(|(total, delta)| *total += weight * delta);
            }
        }
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-5,
                "{}: {found} is not {expected}",
                spec.name
            );
        }
    }
    for file in &report.files {
        assert_eq!(
            FileEntry::of_file(&world.path("out"), &file.path).unwrap(),
            *file
        );
    }
    assert_eq!(report.files.len(), 3);
}

#[test]
fn the_thread_count_changes_no_bit() {
    let world = World::new();
    let (x, y) = (
        world.adapter("x", &pairs(10)),
        world.adapter("y", &pairs(20)),
    );
    let terms = [
        Term {
            adapter: &x,
            weight: 0.7,
        },
        Term {
            adapter: &y,
            weight: 0.3,
        },
    ];
    for threads in [1, 2, 3, 7, 64] {
        let options = FoldOptions {
            threads: NonZeroUsize::new(threads),
            progress: None,
        };
        fold_with(
            &world.base(),
            &terms,
            &world.path(&format!("out{threads}")),
            options,
        )
        .unwrap();
        same_bytes(&world.path("out1"), &world.path(&format!("out{threads}")));
    }
}

/// A base no program of ours wrote: odd header, odd order, NaN payloads, CRLF in text files.
fn odd_base(dir: &Path) {
    testing::checkpoint(dir, 1);
    let tensors = testing::weights(1);
    let mut header =
        String::from("{ \"__metadata__\" : {\"format\":\"pt\", \"odd\":\"\\u0061\"},\n");
    let mut data = Vec::new();
    for (spec, values) in tensors.iter().rev() {
        let start = data.len();
        let mut bytes = Vec::new();
        Dtype::BF16.encode(values, &mut bytes);
        if spec.name.contains("norm") {
            bytes[..4].copy_from_slice(&[0x01, 0x7f, 0xab, 0xff]);
            bytes[4..8].copy_from_slice(&[0xc1, 0x7f, 0x00, 0x80]);
        }
        data.extend(bytes);
        let comma = if start == 0 { "" } else { ",\t" };
        let _ = std::fmt::Write::write_fmt(
            &mut header,
            format_args!(
                "{comma}\"{}\":{{\"data_offsets\":[{start}, {}],\"shape\":{:?},\"dtype\":\"BF16\"}}",
                spec.name,
                data.len(),
                spec.shape
            ),
        );
    }
    header.push_str("}  \n ");
    let mut file = fs::File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&data).unwrap();
}

#[test]
fn weight_zero_gives_the_base_back_byte_for_byte() {
    let world = World::new();
    odd_base(&world.path("odd"));
    let base = Checkpoint::open(&world.path("odd")).unwrap();
    let adapter = world.adapter("x", &pairs(10));
    for (name, terms) in [
        ("none", vec![]),
        (
            "zero",
            vec![Term {
                adapter: &adapter,
                weight: 0.0,
            }],
        ),
        (
            "minus",
            vec![Term {
                adapter: &adapter,
                weight: -0.0,
            }],
        ),
    ] {
        let report = fold(&base, &terms, &world.path(name)).unwrap();
        assert_eq!(report.folded, 0);
        same_bytes(&world.path("odd"), &world.path(name));
    }
}

#[test]
fn untouched_bytes_stay_and_touched_ones_are_rounded_once() {
    let world = World::new();
    odd_base(&world.path("odd"));
    let base = Checkpoint::open(&world.path("odd")).unwrap();
    let only_q = &pairs(10)[..1];
    let adapter = world.adapter("x", only_q);
    let plan = [
        Term {
            adapter: &adapter,
            weight: 0.37,
        },
        Term {
            adapter: &adapter,
            weight: 1.0e-3,
        },
    ];
    fold(&base, &plan, &world.path("out")).unwrap();
    let (before, after) = (
        base,
        TensorFile::open(&world.path("out/model.safetensors")).unwrap(),
    );
    let tensor = format!("{Q}.weight");
    for info in after.tensors() {
        let (file, old) = before.get(&info.name).unwrap();
        if info.name != tensor {
            assert_eq!(
                after.read_bytes(info).unwrap(),
                file.read_bytes(old).unwrap(),
                "{}",
                info.name
            );
        }
    }
    assert_eq!(before.weight_files()[0].1.raw_header(), after.raw_header());
    // The documented order, element by element.
    let (_, values) = before.read_f32(&tensor).unwrap();
    let pair = adapter.pair(0).unwrap();
    let found = after.read_f32(after.get(&tensor).unwrap()).unwrap();
    for row in 0..8 {
        for column in 0..8 {
            let mut delta = 0.0_f32;
            for weight in [0.37, 1.0e-3] {
                for k in 0..pair.rank {
                    let coefficient =
                        (weight * pair.scale * f64::from(pair.b[row * pair.rank + k])) as f32;
                    delta += coefficient * pair.a[k * 8 + column];
                }
            }
            let expected = bf16::from_f32(values[row * 8 + column] + delta).to_f32();
            assert_eq!(found[row * 8 + column].to_bits(), expected.to_bits());
        }
    }
}

#[test]
fn small_contributions_do_not_vanish_one_by_one() {
    let world = World::new();
    let tiny = Pair {
        a: vec![1.0; 8],
        b: vec![1.0; 8],
        scale: 1.0,
        ..testing::pair(Q, 1, [8, 8], 1.0, 1)
    };
    let adapter = world.adapter("x", &[tiny]);
    // Each is below half a unit in the last place of a weight near 1; together they are not.
    let terms: Vec<Term<'_>> = (0..1000)
        .map(|_| Term {
            adapter: &adapter,
            weight: 1e-8,
        })
        .collect();
    fold(&world.base(), &terms, &world.path("out")).unwrap();
    let tensor = format!("{Q}.weight");
    let (_, before) = world.base().read_f32(&tensor).unwrap();
    let (_, after) = Checkpoint::open(&world.path("out"))
        .unwrap()
        .read_f32(&tensor)
        .unwrap();
    for (before, after) in before.iter().zip(after) {
        assert!((f64::from(after) - f64::from(*before) - 1e-5).abs() < 1e-7);
    }
}

#[test]
fn what_does_not_fit_is_refused_before_a_byte_is_written() {
    let world = World::new();
    let base = world.base();
    let fine = world.adapter("fine", &pairs(10));
    let shape = world.adapter("shape", &[testing::pair(Q, 2, [8, 9], 2.0, 1)]);
    let cases = [
        ("unknown", "model.layers.2.self_attn.q_proj", [8, 8]),
        ("embedding", "model.embed_tokens", [11, 8]),
        ("norm", "model.norm", [8, 1]),
    ];
    for (name, module, size) in cases {
        let adapter = world.adapter(name, &[testing::pair(module, 2, size, 2.0, 1)]);
        let error = fold(
            &base,
            &[Term {
                adapter: &adapter,
                weight: 1.0,
            }],
            &world.path("out"),
        )
        .unwrap_err();
        assert!(
            matches!(error, FoldError::UnknownModule { term: 0, .. }),
            "{error}"
        );
    }
    let terms = [
        Term {
            adapter: &fine,
            weight: 1.0,
        },
        Term {
            adapter: &shape,
            weight: 1.0,
        },
    ];
    let error = fold(&base, &terms, &world.path("out")).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("term 1, module {Q}: the adapter is [8, 9], the base [8, 8]")
    );
    for weight in [f64::NAN, f64::INFINITY] {
        let error = fold(
            &base,
            &[Term {
                adapter: &fine,
                weight,
            }],
            &world.path("out"),
        )
        .unwrap_err();
        assert!(matches!(error, FoldError::Weight { .. }));
    }
    world.assert_only(&["base", "embedding", "fine", "norm", "shape", "unknown"]);
}

#[test]
fn a_failed_fold_leaves_nothing_behind() {
    let world = World::new();
    let base = world.base();
    let mut bad = pairs(10);
    bad[1].a[3] = f32::NAN;
    let adapter = world.adapter("bad", &bad);
    let error = fold(
        &base,
        &[Term {
            adapter: &adapter,
            weight: 1.0,
        }],
        &world.path("out"),
    )
    .unwrap_err();
    assert!(
        matches!(&error, FoldError::NotFinite(tensor) if tensor.starts_with(DOWN)),
        "{error}"
    );

    let adapter = world.adapter("cut", &pairs(10));
    let weights = world.path("cut").join(crate::adapter::WEIGHTS_FILE);
    let bytes = fs::metadata(&weights).unwrap().len();
    fs::OpenOptions::new()
        .write(true)
        .open(&weights)
        .unwrap()
        .set_len(bytes - 1)
        .unwrap();
    let error = fold(
        &base,
        &[Term {
            adapter: &adapter,
            weight: 1.0,
        }],
        &world.path("out"),
    )
    .unwrap_err();
    assert!(matches!(error, FoldError::Adapter(_)), "{error}");

    let fine = world.adapter("fine", &pairs(10));
    let mut calls = 0;
    let mut stop = |done: u64, total: u64| {
        calls += 1;
        assert!(done <= total);
        calls < 4
    };
    let options = FoldOptions {
        threads: None,
        progress: Some(&mut stop),
    };
    let error = fold_with(
        &base,
        &[Term {
            adapter: &fine,
            weight: 1.0,
        }],
        &world.path("out"),
        options,
    )
    .unwrap_err();
    assert!(matches!(error, FoldError::Stopped));

    fs::remove_file(world.path("base/tokenizer.json")).unwrap();
    assert!(
        fold(&base, &[], &world.path("out"))
            .unwrap_err()
            .to_string()
            .contains("tokenizer.json")
    );
    world.assert_only(&["bad", "base", "cut", "fine"]);
}

#[test]
fn existing_work_is_never_overwritten() {
    let world = World::new();
    let base = world.base();
    fs::create_dir(world.path("empty")).unwrap();
    fold(&base, &[], &world.path("empty")).unwrap();
    same_bytes(&world.path("base"), &world.path("empty"));
    for taken in ["empty", "base"] {
        assert!(
            matches!(
                fold(&base, &[], &world.path(taken)),
                Err(FoldError::Exists(_))
            ),
            "{taken}"
        );
    }
    fs::write(world.path("file"), "x").unwrap();
    assert!(matches!(
        fold(&base, &[], &world.path("file")),
        Err(FoldError::Exists(_))
    ));
    fold(&base, &[], &world.path("new/deep/out")).unwrap();
    same_bytes(&world.path("base"), &world.path("new/deep/out"));
}

#[test]
fn a_full_disk_says_so() {
    let full = io::Error::from(io::ErrorKind::StorageFull);
    let error = output::io_error(Path::new("model.safetensors"), full);
    assert_eq!(error.to_string(), "no space left for model.safetensors");
}

#[test]
fn progress_reaches_the_end() {
    let world = World::new();
    let mut last = (0, 0);
    let mut note = |done: u64, total: u64| {
        last = (done, total);
        true
    };
    let adapter = world.adapter("x", &pairs(10));
    let options = FoldOptions {
        threads: None,
        progress: Some(&mut note),
    };
    fold_with(
        &world.base(),
        &[Term {
            adapter: &adapter,
            weight: 1.0,
        }],
        &world.path("out"),
        options,
    )
    .unwrap();
    assert_eq!(last.0, last.1);
    assert_eq!(
        last.1,
        fs::metadata(world.path("out/model.safetensors"))
            .unwrap()
            .len()
    );
}
