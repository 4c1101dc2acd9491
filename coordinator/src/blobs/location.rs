//! Where blobs lie: a folder, or a bucket of S3, Google Cloud Storage or Azure.
use std::path::PathBuf;
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::signer::Signer;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use rustls::crypto::ring;

use super::direct::Direct;
use crate::error::Error;
use crate::limits;

/// A store's URL, and the variables with its credentials and endpoint.
#[derive(Clone)]
pub struct Location {
    /// A folder, `file://`, `s3://BUCKET/PREFIX`, `gs://...`, `az://...` or `abfss://...`.
    pub url: String,
    /// What the environment says: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT` and so on.
    pub variables: Vec<(String, String)>,
}

impl Location {
    /// The store at a URL, with the credentials of this process's environment.
    #[must_use]
    pub fn from_env(url: impl Into<String>) -> Self {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self {
            url: url.into(),
            variables,
        }
    }

    pub(super) fn parse(&self) -> Result<Place, Error> {
        let (scheme, rest) = match self.url.split_once("://") {
            None => return Ok(Place::Folder(PathBuf::from(&self.url))),
            Some(("file", path)) => return Ok(Place::Folder(PathBuf::from(path))),
            Some(parts) => parts,
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() || rest.contains(['?', '#']) {
            return Err(Error::invalid(
                "blobs",
                format!("{scheme}:// goes on as BUCKET or BUCKET/PREFIX, nothing else"),
            ));
        }
        let prefix = Path::parse(prefix).map_err(|error| Error::invalid("blobs", error))?;
        self.bucket(scheme, prefix).map(Place::Bucket)
    }

    fn bucket(&self, scheme: &str, prefix: Path) -> Result<Bucket, Error> {
        // reqwest takes the process's TLS provider; where main has installed one, it stays.
        let _ = ring::default_provider().install_default();
        let configured = match scheme {
            "s3" | "s3a" => AmazonS3Builder::new()
                .with_client_options(client())
                .with_retry(retry())
                .with_url(&self.url)
                .set(&self.variables)
                .build()
                .map(|store| Bucket::new("AWS", prefix, store)),
            "gs" => GoogleCloudStorageBuilder::new()
                .with_client_options(client())
                .with_retry(retry())
                .with_url(&self.url)
                .set(&self.variables)
                .build()
                .map(|store| Bucket::new("GOOGLE", prefix, store)),
            "az" | "azure" | "abfs" | "abfss" => MicrosoftAzureBuilder::new()
                .with_client_options(client())
                .with_retry(retry())
                .with_url(&self.url)
                .set(&self.variables)
                .build()
                .map(|store| {
                    let mut bucket = Bucket::new("AZURE", prefix, store);
                    // Azure asks what kind of blob a put makes.
                    bucket.direct.put_headers = &[("x-ms-blob-type", "BlockBlob")];
                    bucket
                }),
            _ => {
                return Err(Error::invalid(
                    "blobs",
                    format!(
                        "{scheme}:// is no store we know; name a folder, or an s3://, gs://, \
                         az:// or abfss:// URL"
                    ),
                ));
            }
        };
        configured.map_err(|error| {
            let text = "the store's settings in the URL and the environment do not fit together";
            Error::invalid("blobs", text).with_source(error)
        })
    }
}

/// What a location names.
pub(super) enum Place {
    Folder(PathBuf),
    Bucket(Bucket),
}

/// A place in a bucket.
pub(super) struct Bucket {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) direct: Direct,
}

impl Bucket {
    fn new(vendor: &'static str, prefix: Path, store: impl ObjectStore + Signer) -> Self {
        let store = Arc::new(PrefixStore::new(store, prefix));
        let direct = Direct {
            signer: store.clone(),
            put_headers: &[],
            vendor,
        };
        Self { store, direct }
    }
}

fn client() -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(limits::STORE_CONNECT)
        // A whole download may take as long as its reader does; a silent store may not.
        .with_timeout_disabled()
        .with_read_timeout(limits::STORE_SILENCE)
}

fn retry() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: limits::STORE_RETRIES,
        retry_timeout: limits::STORE_RETRY,
    }
}

/// Takes the settings out of the environment, as object_store's `from_env` does.
trait Settings: Sized {
    fn set(self, variables: &[(String, String)]) -> Self;
}

macro_rules! settings {
    ($builder:ty, $key:ty, $begin:literal) => {
        impl Settings for $builder {
            fn set(mut self, variables: &[(String, String)]) -> Self {
                for (name, value) in variables {
                    if name.starts_with($begin)
                        && let Ok(key) = name.to_ascii_lowercase().parse::<$key>()
                    {
                        self = self.with_config(key, value);
                    }
                }
                self
            }
        }
    };
}

settings!(AmazonS3Builder, AmazonS3ConfigKey, "AWS_");
settings!(GoogleCloudStorageBuilder, GoogleConfigKey, "GOOGLE_");
settings!(MicrosoftAzureBuilder, AzureConfigKey, "AZURE_");

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str, variables: &[(&str, &str)]) -> Result<Place, Error> {
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let url = url.to_owned();
        Location { url, variables }.parse()
    }

    #[test]
    fn folders_and_buckets() {
        for folder in ["store", "/srv/store", "file:///srv/store"] {
            assert!(matches!(parse(folder, &[]), Ok(Place::Folder(_))));
        }
        let azure = [
            ("AZURE_STORAGE_ACCOUNT_NAME", "a"),
            ("AZURE_STORAGE_ACCOUNT_KEY", "a2V5"),
        ];
        for (url, variables) in [
            ("s3://bucket", &[][..]),
            ("s3://bucket/a/b/", &[("AWS_REGION", "eu-central-1")]),
            ("gs://bucket/a", &[]),
            ("az://container/a", &azure),
            ("abfss://container@account.dfs.core.windows.net/a", &azure),
        ] {
            assert!(
                matches!(parse(url, variables), Ok(Place::Bucket(_))),
                "{url}"
            );
        }
    }

    #[test]
    fn wrong_urls_say_so() {
        for (url, says) in [
            ("ftp://host/x", "no store we know"),
            ("s3://", "BUCKET"),
            ("s3:///prefix", "BUCKET"),
            ("s3://bucket/x?y=z", "BUCKET"),
            ("s3://bucket/../x", "blobs"),
            ("az://container", "do not fit"),
        ] {
            let error = parse(url, &[]).err().unwrap();
            assert!(error.to_string().contains(says), "{url}: {error}");
        }
    }
}
