//! See [`cairn_fuzz::tensors`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cairn_fuzz::write_seeds(&cairn_fuzz::tensors::seeds()),
    |data: &[u8]| cairn_fuzz::tensors::check(data)
);
