//! See [`cairn_fuzz::records`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cairn_fuzz::write_seeds(&cairn_fuzz::records::seeds()),
    |data: &[u8]| cairn_fuzz::records::check(data)
);
