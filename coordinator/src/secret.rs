//! Secrets that people and machines carry: a typed prefix, 32 random bytes, a checksum that tells a
//! typing error from a wrong secret without asking the database. Only hashes are stored.
use cairn_stack::digest::Digest;

use crate::entropy;
use crate::error::Error;

const CHECKSUM_DIGITS: usize = 8;
const SECRET_DIGITS: usize = 64;

/// What a secret is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretKind {
    /// Brings one or more identities in.
    Join,
    /// Signs one identity's calls for an hour.
    Session,
}

impl SecretKind {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Join => "cairn_join_",
            Self::Session => "cairn_session_",
        }
    }

    /// A fresh secret.
    ///
    /// # Errors
    /// INTERNAL when there is no entropy.
    pub fn fresh(self) -> Result<String, Error> {
        let body = format!("{}{}", self.prefix(), hex::encode(entropy::bytes::<32>()?));
        let checksum = checksum(&body);
        Ok(body + &checksum)
    }

    /// Whether the text is a whole secret of this kind, as far as its form can tell.
    #[must_use]
    pub fn is_whole(self, text: &str) -> bool {
        let length = self.prefix().len() + SECRET_DIGITS + CHECKSUM_DIGITS;
        if text.len() != length || !text.is_ascii() || !text.starts_with(self.prefix()) {
            return false;
        }
        let (body, sum) = text.split_at(length - CHECKSUM_DIGITS);
        sum == checksum(body)
    }
}

/// What is stored of a secret. 256 random bits need no slow hash.
#[must_use]
pub fn hash(secret: &str) -> Digest {
    Digest::of(secret.as_bytes())
}

fn checksum(body: &str) -> String {
    Digest::of(body.as_bytes())
        .to_string()
        .chars()
        .take(CHECKSUM_DIGITS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_know_their_kind_and_their_end() {
        let secret = SecretKind::Join.fresh().unwrap();
        assert!(SecretKind::Join.is_whole(&secret));
        assert!(!SecretKind::Session.is_whole(&secret));
        assert!(!SecretKind::Join.is_whole(&secret[..secret.len() - 1]));
        assert!(!SecretKind::Join.is_whole(&secret.replacen("join_", "join_0", 1)));
        assert_ne!(secret, SecretKind::Join.fresh().unwrap());
    }
}
