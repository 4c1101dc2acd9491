//! See [`cairn_fuzz::proofs`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cairn_fuzz::write_seeds(&cairn_fuzz::proofs::seeds()),
    |data: &[u8]| cairn_fuzz::proofs::check(data)
);
