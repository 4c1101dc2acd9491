//! The allocator, and for how long it keeps pages that nobody uses.

use std::ffi::c_long;

use libmimalloc_sys::{mi_option_get, mi_option_set, mi_option_t};

pub use mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc's `mi_option_e`, which the bindings leave out.
const PURGE_DELAY: mi_option_t = 15;

/// What it is by itself, milliseconds.
const DEFAULT: c_long = 1_000;

/// How long unused pages are kept, milliseconds. The buffers of a step are those of the next, which may
/// begin seconds later; after a minute without one the rest of the machine has them back.
const KEPT: c_long = 60_000;

/// Has pages kept for the next step: giving them back and having them cleared again was a fifteenth of
/// a training. What `MIMALLOC_PURGE_DELAY` says is left as it is.
#[expect(unsafe_code, reason = "an option of a C library has no safe name")]
pub fn keep_pages() {
    // SAFETY: both take a number of an option and read or write one word of the library's own.
    unsafe {
        if mi_option_get(PURGE_DELAY) == DEFAULT {
            mi_option_set(PURGE_DELAY, KEPT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "as above")]
    fn the_option_is_the_one_that_is_meant() {
        keep_pages();
        // SAFETY: as above. Another option has another default, and would have been left alone.
        assert_eq!(unsafe { mi_option_get(PURGE_DELAY) }, KEPT);
    }
}
