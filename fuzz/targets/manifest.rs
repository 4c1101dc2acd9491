//! See [`cairn_fuzz::manifest`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cairn_fuzz::write_seeds(&cairn_fuzz::manifest::seeds()),
    |data: &[u8]| cairn_fuzz::manifest::check(data)
);
