//! Adapters: honest ones, and everything a saboteur may send instead.
use std::io;

use cairn_proto::convert::BlobName;
use cairn_proto::reason::VerdictReason;
use cairn_stack::adapter::{AdapterWriteConfig, Pair, write_adapter};
use cairn_stack::digest::Digest;
use cairn_stack::peft::{Factor, tensor_name};
use cairn_stack::tensors::{Dtype, TensorSpec, write_tensors};
use serde_json::{Map, Value, json};

use crate::puzzle::hidden_pairs;
use crate::tiny::{numbers, recipe};

/// The two files of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adapter {
    /// `adapter_model.safetensors`.
    pub weights: Vec<u8>,
    /// `adapter_config.json`.
    pub config: Vec<u8>,
}

impl Adapter {
    /// The weight file's name as a blob.
    #[must_use]
    pub fn name(&self) -> BlobName {
        BlobName {
            digest: Digest::of(&self.weights),
            size_bytes: self.weights.len() as u64,
        }
    }

    /// Writes pairs as PEFT does, by the recipe of the tiny round.
    #[must_use]
    pub fn of_pairs(pairs: &[Pair]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = AdapterWriteConfig::of_recipe(&recipe(), None, None);
        write_adapter(folder.path(), pairs, &config).expect("sound pairs are written");
        let read = |name: &str| std::fs::read(folder.path().join(name)).expect("it was written");
        Self {
            weights: read(cairn_stack::adapter::WEIGHTS_FILE),
            config: read(cairn_stack::adapter::CONFIG_FILE),
        }
    }
}

/// How far an honest worker gets towards the hidden delta by itself.
const HONEST_STRENGTH: f32 = 0.6;
/// How much of its own an honest worker adds to every entry of B.
const HONEST_NOISE: f32 = 0.06;

/// The pairs of an honest worker; another one for another seed.
#[must_use]
pub fn honest_pairs(seed: u64) -> Vec<Pair> {
    let mut pairs = hidden_pairs();
    for (index, pair) in (0..).zip(&mut pairs) {
        let noise = numbers(pair.b.len(), seed * 100 + index);
        let moved = pair
            .b
            .iter()
            .zip(noise)
            .map(|(b, n)| HONEST_STRENGTH * b + HONEST_NOISE * n);
        pair.b = moved.collect();
    }
    pairs
}

/// An adapter that goes most of the way to the better weights.
#[must_use]
pub fn honest(seed: u64) -> Adapter {
    Adapter::of_pairs(&honest_pairs(seed))
}

/// An honest adapter of one layer: it adds nothing to the others.
#[must_use]
pub fn honest_on(layer: usize, seed: u64) -> Adapter {
    let mut pairs = honest_pairs(seed);
    let here = format!("model.layers.{layer}.");
    let others = pairs
        .iter_mut()
        .filter(|pair| !pair.module.starts_with(&here));
    others.for_each(|pair| pair.b.fill(0.0));
    Adapter::of_pairs(&pairs)
}

/// An honest adapter with every entry of B times `factor`: the delta times `factor`.
#[must_use]
pub fn scaled(seed: u64, factor: f32) -> Adapter {
    let mut pairs = honest_pairs(seed);
    pairs
        .iter_mut()
        .flat_map(|pair| &mut pair.b)
        .for_each(|b| *b *= factor);
    Adapter::of_pairs(&pairs)
}

/// The same delta from other factors: A times `factor`, B divided by it.
#[must_use]
pub fn regauged(seed: u64, factor: f32) -> Adapter {
    let mut pairs = honest_pairs(seed);
    for pair in &mut pairs {
        pair.a.iter_mut().for_each(|a| *a *= factor);
        pair.b.iter_mut().for_each(|b| *b /= factor);
    }
    Adapter::of_pairs(&pairs)
}

/// The same delta from factors mixed by random invertible matrices, one a module: `B M^-1` and `M A`.
#[must_use]
pub fn remixed(seed: u64, mixing: u64) -> Adapter {
    let mut pairs = honest_pairs(seed);
    for (index, pair) in (0..).zip(&mut pairs) {
        assert_eq!(pair.rank, 2, "the tiny recipe's rank");
        let drawn = numbers(4, mixing * 1_000 + index);
        // Far from singular: the diagonal is larger than what is beside it.
        let [a, b, c, d] = [drawn[0] + 2.0, drawn[1], drawn[2], drawn[3] - 2.0];
        let determinant = a * d - b * c;
        let (first, second) = pair.a.split_at_mut(pair.in_features);
        for (x, y) in first.iter_mut().zip(second) {
            (*x, *y) = (a * *x + b * *y, c * *x + d * *y);
        }
        for row in pair.b.chunks_exact_mut(2) {
            let (x, y) = (row[0], row[1]);
            row[0] = (d * x - c * y) / determinant;
            row[1] = (a * y - b * x) / determinant;
        }
    }
    Adapter::of_pairs(&pairs)
}

/// Another's adapter with a little noise over it, so that no byte is the same.
#[must_use]
pub fn perturbed(seed: u64, noise: u64) -> Adapter {
    let mut pairs = honest_pairs(seed);
    for (index, pair) in (0..).zip(&mut pairs) {
        let drawn = numbers(pair.b.len(), noise * 1_000 + index);
        for (b, n) in pair.b.iter_mut().zip(drawn) {
            *b += 0.01 * n;
        }
    }
    Adapter::of_pairs(&pairs)
}

/// What a saboteur sends. Each alone is to be rejected for exactly its reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names and `adapter` say it")]
pub enum Sabotage {
    Empty,
    NotSafetensors,
    CutShort,
    BytesBehindTheEnd,
    HeaderBeyondTheEnd,
    HeaderOfGigabytes,
    ShapeOverflow,
    Overlap,
    DuplicateKey,
    TensorMissing,
    TensorTooMany,
    TensorRenamed,
    Transposed,
    HalfPrecision,
    HugeAlpha,
    RankPattern,
    Dora,
    OtherTargets,
    ConfigIsNoJson,
    Nan,
    Infinity,
    Zero,
    TinyDelta,
    SignFlipped,
    RandomDelta,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::Empty,
        Self::NotSafetensors,
        Self::CutShort,
        Self::BytesBehindTheEnd,
        Self::HeaderBeyondTheEnd,
        Self::HeaderOfGigabytes,
        Self::ShapeOverflow,
        Self::Overlap,
        Self::DuplicateKey,
        Self::TensorMissing,
        Self::TensorTooMany,
        Self::TensorRenamed,
        Self::Transposed,
        Self::HalfPrecision,
        Self::HugeAlpha,
        Self::RankPattern,
        Self::Dora,
        Self::OtherTargets,
        Self::ConfigIsNoJson,
        Self::Nan,
        Self::Infinity,
        Self::Zero,
        Self::TinyDelta,
        Self::SignFlipped,
        Self::RandomDelta,
    ];

    /// What it must be rejected for.
    #[must_use]
    pub const fn reason(self) -> VerdictReason {
        match self {
            Self::Empty
            | Self::NotSafetensors
            | Self::CutShort
            | Self::BytesBehindTheEnd
            | Self::HeaderBeyondTheEnd
            | Self::HeaderOfGigabytes
            | Self::ShapeOverflow
            | Self::Overlap
            | Self::DuplicateKey => VerdictReason::BadHeader,
            Self::TensorMissing | Self::TensorTooMany | Self::TensorRenamed => {
                VerdictReason::WrongTensors
            }
            Self::Transposed => VerdictReason::WrongShape,
            Self::HalfPrecision => VerdictReason::WrongDtype,
            Self::HugeAlpha
            | Self::RankPattern
            | Self::Dora
            | Self::OtherTargets
            | Self::ConfigIsNoJson => VerdictReason::ConfigMismatch,
            Self::Nan | Self::Infinity => VerdictReason::NotFinite,
            Self::Zero | Self::TinyDelta => VerdictReason::ZeroDelta,
            Self::SignFlipped | Self::RandomDelta => VerdictReason::NoGain,
        }
    }

    /// The weight file broken in this way; of use for those that break the file alone.
    #[must_use]
    pub fn broken(self, weights: &[u8]) -> Vec<u8> {
        match self {
            Self::Empty => Vec::new(),
            Self::NotSafetensors => b"\x80\x04\x95 a pickle, say".repeat(20),
            Self::CutShort => weights[..weights.len().saturating_sub(10)].to_vec(),
            Self::BytesBehindTheEnd => [weights, &[0; 8]].concat(),
            Self::HeaderBeyondTheEnd => with_header_length(weights, 1 << 20),
            Self::HeaderOfGigabytes => with_header_length(weights, u64::MAX / 2),
            other => other.edit_header(weights),
        }
    }

    /// The adapter; `seed` keeps two saboteurs from sending the very same bytes.
    #[must_use]
    pub fn adapter(self, seed: u64) -> Adapter {
        let sound = honest(seed);
        let with_weights = |weights: Vec<u8>| Adapter {
            weights,
            ..sound.clone()
        };
        let with_config = |key: &str, value: Value| Adapter {
            config: edit_config(&sound.config, key, value),
            ..sound.clone()
        };
        match self {
            Self::Empty
            | Self::NotSafetensors
            | Self::CutShort
            | Self::BytesBehindTheEnd
            | Self::HeaderBeyondTheEnd
            | Self::HeaderOfGigabytes
            | Self::ShapeOverflow
            | Self::Overlap
            | Self::DuplicateKey
            | Self::TensorMissing
            | Self::TensorTooMany
            | Self::TensorRenamed
            | Self::Transposed => with_weights(self.broken(&sound.weights)),
            Self::HalfPrecision => with_weights(weights_of(&honest_pairs(seed), Dtype::F16)),
            Self::HugeAlpha => with_config("lora_alpha", json!(4000)),
            Self::RankPattern => with_config("rank_pattern", json!({"q_proj": 2})),
            Self::Dora => with_config("use_dora", json!(true)),
            Self::OtherTargets => with_config("target_modules", json!(["q_proj", "o_proj"])),
            Self::ConfigIsNoJson => Adapter {
                config: b"{".to_vec(),
                ..sound
            },
            Self::Nan => changed(seed, |pair| pair.a[0] = f32::NAN),
            Self::Infinity => changed(seed, |pair| pair.b[3] = f32::INFINITY),
            Self::Zero => changed(seed, |pair| pair.b.fill(0.0)),
            Self::TinyDelta => changed(seed, |pair| pair.b.iter_mut().for_each(|b| *b *= 1e-12)),
            Self::SignFlipped => changed(seed, |pair| pair.b.iter_mut().for_each(|b| *b = -*b)),
            Self::RandomDelta => changed(seed, |pair| {
                pair.a = numbers(pair.a.len(), seed + 9_000);
                pair.b = numbers(pair.b.len(), seed + 9_100)
                    .iter()
                    .map(|b| 0.12 * b)
                    .collect();
            }),
        }
    }

    fn edit_header(self, weights: &[u8]) -> Vec<u8> {
        let (mut header, mut body) = parse(weights);
        let first = header
            .keys()
            .find(|key| *key != "__metadata__")
            .expect("a tensor")
            .clone();
        match self {
            Self::ShapeOverflow => header[&first]["shape"] = json!([1_u64 << 32, 1_u64 << 32]),
            Self::Overlap => {
                let second = header.keys().filter(|key| *key != "__metadata__").nth(1);
                let second = second.expect("a second tensor").clone();
                header[&second]["data_offsets"] = header[&first]["data_offsets"].clone();
            }
            Self::DuplicateKey => {
                let again = format!("{{{}:{},", json!(first), header[&first]);
                let text = Value::Object(header).to_string().replacen('{', &again, 1);
                return assemble(&text, &body);
            }
            Self::TensorMissing => {
                let last = header.keys().next_back().expect("a tensor").clone();
                let start = header[&last]["data_offsets"][0]
                    .as_u64()
                    .expect("an offset");
                header.shift_remove(&last);
                body.truncate(start as usize);
            }
            Self::TensorTooMany => {
                let end = body.len();
                let offsets = json!([end, end + 4]);
                let extra = json!({"dtype": "F32", "shape": [1], "data_offsets": offsets});
                header.insert("lm_head.weight".to_owned(), extra);
                body.extend_from_slice(&[0; 4]);
            }
            Self::TensorRenamed => {
                let text = Value::Object(header)
                    .to_string()
                    .replacen("lora_A", "lora_C", 1);
                return assemble(&text, &body);
            }
            Self::Transposed => {
                let shape = header[&first]["shape"].as_array().expect("a shape").clone();
                header[&first]["shape"] = shape.into_iter().rev().collect();
            }
            other => unreachable!("{other:?} does not edit the header"),
        }
        assemble(&Value::Object(header).to_string(), &body)
    }
}

fn changed(seed: u64, change: impl Fn(&mut Pair)) -> Adapter {
    let mut pairs = honest_pairs(seed);
    pairs.iter_mut().for_each(change);
    Adapter::of_pairs(&pairs)
}

/// A weight file in another data type than F32.
fn weights_of(pairs: &[Pair], dtype: Dtype) -> Vec<u8> {
    let mut tensors: Vec<(TensorSpec, &[f32])> = Vec::new();
    for pair in pairs {
        let sides = [
            (Factor::A, vec![pair.rank, pair.in_features], &pair.a),
            (Factor::B, vec![pair.out_features, pair.rank], &pair.b),
        ];
        for (factor, shape, values) in sides {
            let name = tensor_name(&pair.module, factor);
            tensors.push((TensorSpec { name, dtype, shape }, values));
        }
    }
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut bytes = Vec::new();
    write_tensors::<io::Error>(&mut bytes, &[], &specs, |index| {
        let mut body = Vec::new();
        dtype.encode(tensors[index].1, &mut body);
        Ok(body)
    })
    .expect("a vector takes all bytes");
    bytes
}

/// Header and body of a sound file.
fn parse(weights: &[u8]) -> (Map<String, Value>, Vec<u8>) {
    let (length, rest) = weights.split_first_chunk::<8>().expect("a whole file");
    let (header, body) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header = serde_json::from_slice(header).expect("a sound header");
    (header, body.to_vec())
}

fn assemble(header: &str, body: &[u8]) -> Vec<u8> {
    let width = header.len().next_multiple_of(8);
    let header = format!("{header:width$}");
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        body,
    ]
    .concat()
}

fn with_header_length(weights: &[u8], length: u64) -> Vec<u8> {
    [&length.to_le_bytes()[..], &weights[8..]].concat()
}

fn edit_config(config: &[u8], key: &str, value: Value) -> Vec<u8> {
    let mut config: Value = serde_json::from_slice(config).expect("a sound config");
    config[key] = value;
    config.to_string().into_bytes()
}
