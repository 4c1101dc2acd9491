//! The contract between the coordinator and everybody who talks to it.
//!
//! In reading order:
//! - [`v1`]: code generated from `cairn/v1/*.proto`, whose comments are the specification
//! - [`limits`]: how large things on the wire may be
//! - [`reason`]: the stable words that errors and verdicts carry
//! - [`signing`]: what is signed, byte for byte
//! - [`convert`]: wire types to checked types and back
//! - [`url`]: join URLs
//! - [`identity`]: the key a machine keeps, and where
//! - [`client`]: the connection both programs share: pinned TLS, sessions, retries, blobs
//!
//! It knows nothing of rounds' rules, databases or tensors.

pub mod client;
pub mod convert;
pub mod identity;
pub mod limits;
pub mod reason;
pub mod signing;
pub mod url;

/// Messages, clients and servers of `cairn.v1`.
#[expect(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes,
    reason = "generated; the .proto files are the documentation"
)]
pub mod v1 {
    tonic::include_proto!("cairn.v1");
}

/// The compiled descriptors, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cairn_v1.bin"));
