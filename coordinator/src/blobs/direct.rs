//! A remote store, as its operator and those who are sent to it directly see it.
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cairn_stack::digest::Digest;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::signer::{Method, Signer};
use object_store::{ObjectStoreExt, PutPayload};

use super::{BlobKey, Blobs};
use crate::error::Error;
use crate::limits;

const PROBE: &str = "probe";

/// What others need to reach a remote store themselves.
#[derive(Debug, Clone)]
pub(super) struct Direct {
    /// Signs URLs.
    pub(super) signer: Arc<dyn Signer>,
    /// Headers that a presigned put needs.
    pub(super) put_headers: &'static [(&'static str, &'static str)],
    /// What the names of its environment variables begin with.
    pub(super) vendor: &'static str,
}

impl Direct {
    /// What an operator should look at when the store refuses its first requests.
    fn advice(&self, error: &object_store::Error) -> String {
        let vendor = self.vendor;
        match error {
            object_store::Error::NotFound { .. } => {
                "there is no such bucket: make it first, or correct --blobs".to_owned()
            }
            object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. } => format!(
                "it refuses these credentials: check the {vendor}_ variables, and that they may \
                 get, put, list and delete under the URL"
            ),
            _ => format!(
                "it does not answer: check the {vendor}_ variables ({vendor}_ENDPOINT; \
                 {vendor}_ALLOW_HTTP=true for an http:// one)"
            ),
        }
    }
}

/// An HTTP request to the store that its bearer may make for a while. The URL is a secret.
#[derive(Clone)]
pub struct SignedRequest {
    /// Where to.
    pub url: String,
    /// Headers to send with it.
    pub headers: &'static [(&'static str, &'static str)],
    /// How long it is valid.
    pub valid: Duration,
}

impl Blobs {
    /// Whether others could reach the store themselves.
    #[must_use]
    pub const fn is_remote(&self) -> bool {
        self.direct.is_some()
    }

    /// Tries a remote store out: puts, lists, gets and deletes a small object.
    ///
    /// # Errors
    /// With what its operator should look at.
    pub async fn probe(&self) -> Result<(), Error> {
        let Some(direct) = &self.direct else {
            return Ok(());
        };
        let key = Path::from(format!("{PROBE}/{}", uuid::Uuid::new_v4()));
        let bytes = Bytes::from(key.to_string());
        let tried = async {
            let payload = PutPayload::from_bytes(bytes.clone());
            self.store.put(&key, payload).await?;
            let folder = Path::from(PROBE);
            let _: Vec<_> = self.store.list(Some(&folder)).try_collect().await?;
            let read = self.store.get(&key).await?.bytes().await?;
            self.store.delete(&key).await?;
            Ok::<_, object_store::Error>(read == bytes)
        };
        match tokio::time::timeout(limits::STORE_PROBE, tried).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(Error::unavailable(
                "the blob store gives back other bytes than were put",
            )),
            Ok(Err(error)) => {
                let advice = direct.advice(&error);
                Err(Error::unavailable(format!("the blob store: {advice}")).with_source(error))
            }
            Err(_) => Err(Error::unavailable(format!(
                "the blob store has not answered for {} s: check its endpoint and credentials",
                limits::STORE_PROBE.as_secs()
            ))),
        }
    }

    /// A request that reads a blob; none where the store cannot be reached directly. The caller
    /// has checked who may.
    ///
    /// # Errors
    /// UNAVAILABLE when nothing can be signed now.
    pub async fn sign_read(
        &self,
        digest: Digest,
        valid: Duration,
    ) -> Result<Option<SignedRequest>, Error> {
        let object = BlobKey::Content(digest).object();
        self.sign(Method::GET, &object, valid).await
    }

    pub(super) async fn sign(
        &self,
        method: Method,
        object: &Path,
        valid: Duration,
    ) -> Result<Option<SignedRequest>, Error> {
        let Some(direct) = &self.direct else {
            return Ok(None);
        };
        let headers = match method {
            Method::PUT => direct.put_headers,
            _ => &[],
        };
        match direct.signer.signed_url(method, object, valid).await {
            Ok(url) => Ok(Some(SignedRequest {
                url: url.into(),
                headers,
                valid,
            })),
            // Credentials of a kind that signs no URLs: through the coordinator, then.
            Err(
                object_store::Error::NotSupported { .. }
                | object_store::Error::NotImplemented { .. },
            ) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
