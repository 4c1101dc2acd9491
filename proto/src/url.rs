//! Join URLs: where a coordinator is, which key it must show, and the one-time token.
//!
//! ```text
//! cairn://host:port/#TOKEN~spki-sha256:HEX      TLS, the server's public key pinned
//! cairn+insecure://host:port/#TOKEN             plain text
//! ```
//! The token stands behind `#` so that no program sends it along by accident. A [`Server`] is
//! written the same way with an empty token.
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits::{JOIN_TOKEN_BYTES_MAX, JOIN_URL_BYTES_MAX};

const TLS_SCHEME: &str = "cairn://";
const INSECURE_SCHEME: &str = "cairn+insecure://";
const PIN_MARK: &str = "spki-sha256:";

/// A join URL that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Longer than any join URL.
    #[error("the join URL is longer than {JOIN_URL_BYTES_MAX} bytes")]
    TooLong,
    /// Neither of our schemes.
    #[error("a join URL begins with cairn:// or cairn+insecure://")]
    Scheme,
    /// No usable host and port.
    #[error("the join URL has no valid host:port")]
    Address,
    /// Something other than `/#` between address and token.
    #[error("the join URL has a path; expected host:port/#TOKEN")]
    Path,
    /// No token, or characters no token has.
    #[error("the join URL has no valid token behind the #; in a shell, put it in quotes")]
    Token,
    /// TLS without a pin, or a malformed one.
    #[error("the join URL has no valid ~spki-sha256: pin of 64 hex digits; was it cut off?")]
    Pin,
    /// Plain text with a pin: somebody has edited the scheme.
    #[error("cairn+insecure:// cannot carry a key pin; the URL was changed")]
    PinOnInsecure,
}

/// SHA-256 of the server certificate's `SubjectPublicKeyInfo`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpkiPin([u8; 32]);

impl SpkiPin {
    /// Takes the digest's bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest's bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The pin of a DER-encoded `SubjectPublicKeyInfo`.
    #[must_use]
    pub fn of_spki(der: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(der).into())
    }
}

impl fmt::Display for SpkiPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for SpkiPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SpkiPin {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| UrlError::Pin)?;
        Ok(Self(bytes))
    }
}

/// How bytes travel to the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TLS; the server must hold the key with this pin.
    Tls(SpkiPin),
    /// Plain text.
    Insecure,
}

/// Where a coordinator is and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Server {
    /// DNS name or IP address, IPv6 without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// TLS with a pin, or plain text.
    pub transport: Transport,
}

impl Server {
    /// `host:port`, IPv6 in brackets.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.parse::<Ipv6Addr>().is_ok() {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// Whether the address can only be this machine.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost"
            || self
                .host
                .parse::<IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    }

    fn write(&self, token: &str) -> String {
        let authority = self.authority();
        match self.transport {
            Transport::Tls(pin) => format!("{TLS_SCHEME}{authority}/#{token}~{PIN_MARK}{pin}"),
            Transport::Insecure => format!("{INSECURE_SCHEME}{authority}/#{token}"),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.write(""))
    }
}

impl FromStr for Server {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (server, token) = parse(text)?;
        if token.is_empty() {
            Ok(server)
        } else {
            Err(UrlError::Token)
        }
    }
}

impl Serialize for Server {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Server {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The secret part of a join URL. Has no `Debug` and no `Display`: it is never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken(String);

impl JoinToken {
    /// Takes a token of letters, digits, `_` and `-`.
    ///
    /// # Errors
    /// [`UrlError::Token`] for anything else.
    pub fn new(text: impl Into<String>) -> Result<Self, UrlError> {
        let text = text.into();
        if text.is_empty() || !is_token(&text) {
            Err(UrlError::Token)
        } else {
            Ok(Self(text))
        }
    }

    /// The token's text, to be sent and not shown.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.0
    }
}

fn is_token(text: &str) -> bool {
    text.len() <= JOIN_TOKEN_BYTES_MAX
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

/// A whole join URL.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinUrl {
    /// Where to go.
    pub server: Server,
    /// What to show there.
    pub token: JoinToken,
}

impl JoinUrl {
    /// The URL as handed to a volunteer, token included.
    #[must_use]
    pub fn secret_text(&self) -> String {
        self.server.write(self.token.secret())
    }
}

impl FromStr for JoinUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (server, token) = parse(text)?;
        Ok(Self {
            server,
            token: JoinToken::new(token)?,
        })
    }
}

fn parse(text: &str) -> Result<(Server, &str), UrlError> {
    if text.len() > JOIN_URL_BYTES_MAX {
        return Err(UrlError::TooLong);
    }
    let text = text.trim();
    let (tls, rest) = if let Some(rest) = text.strip_prefix(TLS_SCHEME) {
        (true, rest)
    } else if let Some(rest) = text.strip_prefix(INSECURE_SCHEME) {
        (false, rest)
    } else {
        return Err(UrlError::Scheme);
    };
    let (address, fragment) = rest.split_once('#').ok_or(UrlError::Token)?;
    let address = address.strip_suffix('/').unwrap_or(address);
    if address.contains('/') {
        return Err(UrlError::Path);
    }
    let (host, port) = parse_address(address)?;
    let (token, pin) = match fragment.split_once('~') {
        None => (fragment, None),
        Some((token, pin)) => (
            token,
            Some(
                pin.strip_prefix(PIN_MARK)
                    .ok_or(UrlError::Pin)?
                    .parse::<SpkiPin>()?,
            ),
        ),
    };
    if !is_token(token) {
        return Err(UrlError::Token);
    }
    let transport = match (tls, pin) {
        (true, Some(pin)) => Transport::Tls(pin),
        (true, None) => return Err(UrlError::Pin),
        (false, None) => Transport::Insecure,
        (false, Some(_)) => return Err(UrlError::PinOnInsecure),
    };
    Ok((
        Server {
            host,
            port,
            transport,
        },
        token,
    ))
}

fn parse_address(address: &str) -> Result<(String, u16), UrlError> {
    let (host, port) = address.rsplit_once(':').ok_or(UrlError::Address)?;
    let port = port.parse::<u16>().map_err(|_| UrlError::Address)?;
    if let Some(inner) = host.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or(UrlError::Address)?;
        let address: Ipv6Addr = inner.parse().map_err(|_| UrlError::Address)?;
        return Ok((address.to_string(), port));
    }
    let plain = !host.is_empty()
        && host.len() <= 253
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if plain && port != 0 {
        Ok((host.to_ascii_lowercase(), port))
    } else {
        Err(UrlError::Address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_urls_round_trip() {
        let pin = "ab".repeat(32);
        for text in [
            format!("cairn://host.example:7600/#cairn_jt_abc~spki-sha256:{pin}"),
            format!("cairn://[::1]:7600/#t~spki-sha256:{pin}"),
            "cairn+insecure://127.0.0.1:7600/#t".to_owned(),
        ] {
            let url: JoinUrl = text.parse().ok().unwrap();
            assert_eq!(url.secret_text(), text);
            let server: Server = url.server.to_string().parse().unwrap();
            assert_eq!(server, url.server);
        }
    }

    #[test]
    fn bad_urls_say_what_is_wrong() {
        let pin = "ab".repeat(32);
        let error = |text: &str| text.parse::<JoinUrl>().err();
        assert_eq!(error("https://host:1/#t"), Some(UrlError::Scheme));
        assert_eq!(error("cairn://host:1/"), Some(UrlError::Token));
        assert_eq!(error("cairn://host:1/#t"), Some(UrlError::Pin));
        assert_eq!(
            error("cairn://host:1/#t~spki-sha256:abcd"),
            Some(UrlError::Pin)
        );
        assert_eq!(
            error(&format!("cairn://host/#t~spki-sha256:{pin}")),
            Some(UrlError::Address)
        );
        assert_eq!(
            error("cairn+insecure://ho st:1/#t"),
            Some(UrlError::Address)
        );
        assert_eq!(error("cairn+insecure://host:1/x/#t"), Some(UrlError::Path));
        assert_eq!(error("cairn+insecure://host:1/#a b"), Some(UrlError::Token));
        assert_eq!(
            error(&format!("cairn+insecure://host:1/#t~spki-sha256:{pin}")),
            Some(UrlError::PinOnInsecure)
        );
        assert_eq!(error(&"x".repeat(2000)), Some(UrlError::TooLong));
    }

    #[test]
    fn loopback() {
        let server = |text: &str| text.parse::<Server>().unwrap();
        assert!(server("cairn+insecure://127.0.0.1:1/#").is_loopback());
        assert!(server("cairn+insecure://[::1]:1/#").is_loopback());
        assert!(server("cairn+insecure://localhost:1/#").is_loopback());
        assert!(!server("cairn+insecure://localhost.example:1/#").is_loopback());
    }
}
