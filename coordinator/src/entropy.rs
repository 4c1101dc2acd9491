//! The one source of randomness that must not be guessed: the operating system.
use rand::TryRng;
use rand::rngs::SysRng;

use crate::error::Error;

/// Fresh random bytes.
///
/// # Errors
/// INTERNAL when the operating system gives none.
pub fn bytes<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    SysRng
        .try_fill_bytes(&mut bytes)
        .map_err(|error| Error::internal("get entropy", error))?;
    Ok(bytes)
}
