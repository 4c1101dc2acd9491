//! See [`cairn_fuzz::adapter`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cairn_fuzz::write_seeds(&cairn_fuzz::adapter::seeds()),
    |data: &[u8]| cairn_fuzz::adapter::check(data)
);
