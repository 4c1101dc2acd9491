//! Pages of lists: sizes are clamped, tokens are opaque.
use cairn_proto::limits::{PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX};

use crate::error::Error;

/// How many items the caller gets: 0 is the default, a larger wish than allowed is clamped.
///
/// # Errors
/// INVALID_ARGUMENT when it is negative.
pub fn page_size(wish: i32) -> Result<u32, Error> {
    match u32::try_from(wish) {
        Ok(0) => Ok(PAGE_SIZE_DEFAULT),
        Ok(wish) => Ok(wish.min(PAGE_SIZE_MAX)),
        Err(_) => Err(Error::invalid("page_size", "must not be negative")),
    }
}

/// Longest page token, bytes: two names and a number.
const TOKEN_BYTES_MAX: usize = 400;

/// What a page token says: the key after which the next page begins; empty for the first.
///
/// # Errors
/// INVALID_ARGUMENT when it is none of ours.
pub fn after(token: &str) -> Result<String, Error> {
    let bad = || Error::invalid("page_token", "not a token of this list");
    if token.len() > TOKEN_BYTES_MAX {
        return Err(bad());
    }
    String::from_utf8(hex::decode(token).map_err(|_| bad())?).map_err(|_| bad())
}

/// The token of the page after this key.
#[must_use]
pub fn token(last: &str) -> String {
    hex::encode(last)
}

/// Cuts `items`, read with one more than `size`, to a page and names the next one.
#[must_use]
pub fn cut<T>(mut items: Vec<T>, size: u32, key: impl Fn(&T) -> String) -> (Vec<T>, String) {
    let more = items.len() > size as usize;
    items.truncate(size as usize);
    let next = items.last().filter(|_| more).map(|last| token(&key(last)));
    (items, next.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_tokens() {
        assert_eq!(page_size(0).unwrap(), PAGE_SIZE_DEFAULT);
        assert_eq!(page_size(i32::MAX).unwrap(), PAGE_SIZE_MAX);
        assert!(page_size(-1).is_err());
        assert_eq!(after(&token("a name")).unwrap(), "a name");
        assert!(after("zz").is_err());
        let (page, next) = cut(vec![1, 2, 3], 2, |n| n.to_string());
        assert_eq!((page, after(&next).unwrap().as_str()), (vec![1, 2], "2"));
        assert_eq!(cut(vec![1, 2], 2, |n| n.to_string()).1, "");
    }
}
