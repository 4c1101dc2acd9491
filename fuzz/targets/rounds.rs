//! See [`cairn_fuzz::rounds`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cairn_fuzz::write_seeds(&cairn_fuzz::rounds::seeds()),
    |data: &[u8]| cairn_fuzz::rounds::check(data)
);
