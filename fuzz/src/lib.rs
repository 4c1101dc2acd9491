//! What the fuzzer asks of the parsers of files that strangers may have written.
//!
//! Each module is one target: `check` takes any bytes and panics when a parser breaks a promise,
//! `seeds` are valid inputs made with the writers of `cairn-stack`, so that the fuzzer starts deep.
//! Promises beyond "no panic": what was accepted reads back, says what it must, and is written
//! again to the same; what is refused is refused with a short text.
//!
//! - [`adapter`]: a submitted adapter, checked against a recipe, and any PEFT adapter
//! - [`tensors`]: a safetensors file
//! - [`checkpoint`]: a Hugging Face folder in one weight file or two
//! - [`config`]: `config.json` and `adapter_config.json`
//! - [`manifest`]: a signed manifest
//! - [`rounds`]: recipe and round files
//! - [`records`]: training data
//! - [`proofs`]: Merkle proofs
#![forbid(unsafe_code)]

pub mod adapter;
pub mod checkpoint;
pub mod config;
mod input;
pub mod manifest;
pub mod proofs;
pub mod records;
pub mod rounds;
mod scratch;
pub mod tensors;

use std::fs;
use std::path::Path;

/// Longest text that a refusal may have, in bytes: it is shown to people and stored.
const REFUSAL_BYTES_MAX: usize = 4_096;

/// Writes a target's seeds into the folder that `CAIRN_FUZZ_SEEDS` names, if it names one.
pub fn write_seeds(seeds: &[Vec<u8>]) {
    let Some(folder) = std::env::var_os("CAIRN_FUZZ_SEEDS") else {
        return;
    };
    for (number, seed) in seeds.iter().enumerate() {
        let file = Path::new(&folder).join(format!("seed-{number}"));
        fs::write(file, seed).expect("the folder of seeds is writable");
    }
}

/// Panics on a text that is too long to be shown.
fn assert_short(text: &str) {
    let bytes = text.len();
    assert!(bytes <= REFUSAL_BYTES_MAX, "a refusal of {bytes} bytes");
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_seed_passes() {
        for (seeds, check) in [
            (super::adapter::seeds(), super::adapter::check as fn(&[u8])),
            (super::checkpoint::seeds(), super::checkpoint::check),
            (super::config::seeds(), super::config::check),
            (super::manifest::seeds(), super::manifest::check),
            (super::proofs::seeds(), super::proofs::check),
            (super::records::seeds(), super::records::check),
            (super::rounds::seeds(), super::rounds::check),
            (super::tensors::seeds(), super::tensors::check),
        ] {
            assert!(!seeds.is_empty());
            for seed in seeds {
                check(&seed);
            }
        }
    }
}
