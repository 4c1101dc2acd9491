//! The server's certificate: the operator's, or one made once. Clients pin its public key.
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use cairn_proto::url::SpkiPin;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::TlsAcceptor;

use crate::failpoint::Step;

/// What a TLS server shows.
#[derive(Clone)]
pub struct TlsIdentity {
    certified: Arc<CertifiedKey>,
    /// SHA-256 of its public key; goes into join URLs.
    pub pin: SpkiPin,
}

impl TlsIdentity {
    /// Reads a PEM certificate chain and its key.
    ///
    /// # Errors
    /// When a file cannot be read, has none in it, or the two do not fit.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self> {
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(certificate)
            .and_then(Iterator::collect)
            .with_context(|| format!("read the TLS certificate {}", certificate.display()))?;
        if chain.is_empty() {
            bail!("{} has no PEM certificate in it", certificate.display());
        }
        let private = PrivateKeyDer::from_pem_file(key)
            .with_context(|| format!("read the TLS key {}", key.display()))?;
        let certified = CertifiedKey::from_der(chain, private, &ring::default_provider())
            .with_context(|| {
                format!(
                    "{} is not the key of {}",
                    key.display(),
                    certificate.display()
                )
            })?;
        let spki = certified
            .key
            .public_key()
            .ok_or_else(|| anyhow!("{} is a key of an unsupported kind", key.display()))?;
        let pin = SpkiPin::of_spki(&spki);
        Ok(Self {
            certified: Arc::new(certified),
            pin,
        })
    }

    /// Reads the certificate kept in a folder, and makes one there when there is none.
    ///
    /// # Errors
    /// When the folder cannot be written or what is in it is damaged.
    pub fn load_or_make(folder: &Path) -> Result<Self> {
        let (certificate, key) = (folder.join("cert.pem"), folder.join("key.pem"));
        if !certificate.exists() || !key.exists() {
            make(folder, &certificate, &key)
                .with_context(|| format!("make a TLS certificate in {}", folder.display()))?;
        }
        Self::load(&certificate, &key)
    }

    /// Ready to shake hands: TLS 1.3 and 1.2, HTTP/2.
    ///
    /// # Errors
    /// Never with the built-in provider.
    pub fn acceptor(&self) -> Result<TlsAcceptor> {
        let resolver = SingleCertAndKey::from(Arc::clone(&self.certified));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

fn make(folder: &Path, certificate: &Path, key: &Path) -> Result<()> {
    let made = rcgen::generate_simple_self_signed(vec!["cairn-coordinator".to_owned()])?;
    fs::create_dir_all(folder)?;
    // The key first: a certificate alone would be taken for a whole pair.
    write_new(key, made.signing_key.serialize_pem().as_bytes())?;
    write_new(certificate, made.cert.pem().as_bytes())
}

/// Writes a file that only its owner may read: beside its place, then renamed.
fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_extension("new");
    let _ = fs::remove_file(&beside);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Step::here("rename").before();
    fs::rename(&beside, path)?;
    Step::here("rename").after();
    Ok(())
}
