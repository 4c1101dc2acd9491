//! See [`cairn_fuzz::config`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cairn_fuzz::write_seeds(&cairn_fuzz::config::seeds()),
    |data: &[u8]| cairn_fuzz::config::check(data)
);
