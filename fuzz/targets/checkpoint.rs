//! See [`cairn_fuzz::checkpoint`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cairn_fuzz::write_seeds(&cairn_fuzz::checkpoint::seeds()),
    |data: &[u8]| cairn_fuzz::checkpoint::check(data)
);
