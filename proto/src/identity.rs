//! The key a machine keeps, the coordinator it belongs to, and where both lie.
//!
//! Everything a program keeps is under one folder, `CAIRN_HOME`. The identity file holds a secret:
//! only its owner may read it, and it is replaced as a whole or not at all.
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use cairn_stack::digest::Digest;
use ed25519_dalek::{SigningKey, VerifyingKey};
use rand::TryRng;
use serde::{Deserialize, Serialize};

use crate::convert::{parse_role, role_word};
use crate::signing::parse_public_key;
use crate::url::{JoinUrl, Server};
use crate::v1;

/// File of a worker's identity under the home folder.
pub const WORKER_FILE: &str = "worker.json";
/// File of a maintainer's identity under the home folder.
pub const MAINTAINER_FILE: &str = "maintainer.json";

/// Largest identity file, bytes: a few hundred are used.
const IDENTITY_BYTES_MAX: u64 = 64 * 1024;

/// An identity that cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No home folder is known.
    #[error("no home folder: set CAIRN_HOME")]
    NoHome,
    /// The file is not there.
    #[error("this machine has not joined yet: no identity at {path}")]
    NotJoined {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Reading or writing failed.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is there but is not an identity.
    #[error("{path} is not an identity file: {detail}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The system gives no random bytes.
    #[error("the system gives no random bytes for a key: {0}")]
    Random(String),
}

/// The folder programs keep their things in: `chosen` if set (`--home`, `CAIRN_HOME`), otherwise
/// the platform's data folder.
///
/// # Errors
/// [`IdentityError::NoHome`] when neither is known.
pub fn home(chosen: Option<&Path>) -> Result<PathBuf, IdentityError> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(path) = chosen {
        return Ok(path.to_owned());
    }
    if let Some(path) = variable("CAIRN_HOME") {
        return Ok(path.into());
    }
    let data = if cfg!(windows) {
        variable("LOCALAPPDATA").map(PathBuf::from)
    } else {
        variable("XDG_DATA_HOME")
            .map(PathBuf::from)
            .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".local/share")))
    };
    data.map(|data| data.join("cairn"))
        .ok_or(IdentityError::NoHome)
}

/// Makes a new key from the system's random bytes.
///
/// # Errors
/// [`IdentityError::Random`] when there are none.
pub fn new_key() -> Result<SigningKey, IdentityError> {
    let mut seed = [0; 32];
    rand::rngs::SysRng
        .try_fill_bytes(&mut seed)
        .map_err(|error| IdentityError::Random(error.to_string()))?;
    Ok(SigningKey::from_bytes(&seed))
}

/// Who this machine is to one coordinator. Has no `Debug`: it holds the secret key.
#[derive(Clone)]
pub struct Identity {
    /// The coordinator.
    pub server: Server,
    /// The id it gave.
    pub worker_id: String,
    /// What we may do there.
    pub role: v1::Role,
    /// The name shown to others.
    pub display_name: String,
    /// The coordinator's key for receipts and manifests.
    pub server_key: VerifyingKey,
    /// Our secret key.
    pub key: SigningKey,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentityFile {
    server: Server,
    worker_id: String,
    role: String,
    display_name: String,
    server_public_key: String,
    secret_key: String,
}

impl Identity {
    /// Reads an identity.
    ///
    /// # Errors
    /// When it is absent, unreadable or malformed.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let bytes = read_bounded(path)?;
        let file: IdentityFile = serde_json::from_slice(&bytes).map_err(|e| malformed(path, &e))?;
        let role = parse_role(&file.role).map_err(|e| malformed(path, &e))?;
        let server_key = hex::decode(&file.server_public_key)
            .ok()
            .and_then(|bytes| parse_public_key(&bytes).ok())
            .ok_or_else(|| malformed(path, &"server_public_key is not a key"))?;
        Ok(Self {
            server: file.server,
            worker_id: file.worker_id,
            role,
            display_name: file.display_name,
            server_key,
            key: decode_key(path, &file.secret_key)?,
        })
    }

    /// Writes it, readable by its owner only, in one step.
    ///
    /// # Errors
    /// When writing fails.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        let file = IdentityFile {
            server: self.server.clone(),
            worker_id: self.worker_id.clone(),
            role: role_word(self.role).to_owned(),
            display_name: self.display_name.clone(),
            server_public_key: hex::encode(self.server_key.to_bytes()),
            secret_key: hex::encode(self.key.to_bytes()),
        };
        write_json(path, &file)
    }

    /// The public key, as kept by the coordinator.
    #[must_use]
    pub fn public_key(&self) -> VerifyingKey {
        self.key.verifying_key()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JoiningFile {
    join: Digest,
    secret_key: String,
}

fn joining_path(path: &Path) -> PathBuf {
    path.with_extension("joining.json")
}

/// The key to enrol with: the one kept from an earlier try with this same URL, whose answer may
/// have got lost, or a new one, kept before it is used.
///
/// # Errors
/// When it can be neither read nor kept.
pub fn joining_key(path: &Path, url: &JoinUrl) -> Result<SigningKey, IdentityError> {
    let joining = joining_path(path);
    let join = Digest::of(url.secret_text().as_bytes());
    if let Ok(bytes) = read_bounded(&joining)
        && let Ok(file) = serde_json::from_slice::<JoiningFile>(&bytes)
        && file.join == join
    {
        return decode_key(&joining, &file.secret_key);
    }
    let key = new_key()?;
    write_json(
        &joining,
        &JoiningFile {
            join,
            secret_key: hex::encode(key.to_bytes()),
        },
    )?;
    Ok(key)
}

/// Forgets the key kept by [`joining_key`], once the identity is saved.
///
/// # Errors
/// When the file is there and cannot be removed.
pub fn joining_done(path: &Path) -> Result<(), IdentityError> {
    let joining = joining_path(path);
    match fs::remove_file(&joining) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(IdentityError::Io {
            action: "remove",
            path: joining,
            source,
        }),
        _ => Ok(()),
    }
}

fn malformed(path: &Path, detail: &dyn std::fmt::Display) -> IdentityError {
    IdentityError::Malformed {
        path: path.to_owned(),
        detail: detail.to_string(),
    }
}

fn decode_key(path: &Path, text: &str) -> Result<SigningKey, IdentityError> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes)
        .map_err(|_| malformed(path, &"secret_key is not a key"))?;
    Ok(SigningKey::from_bytes(&bytes))
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, IdentityError> {
    let io = |source| IdentityError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(IdentityError::NotJoined {
                path: path.to_owned(),
            });
        }
        Err(error) => return Err(io(error)),
    };
    let mut bytes = Vec::new();
    file.take(IDENTITY_BYTES_MAX)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    Ok(bytes)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), IdentityError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| malformed(path, &e))?;
    bytes.push(b'\n');
    write_private(path, &bytes).map_err(|source| IdentityError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

/// Replaces a file in one step, readable by its owner only; makes its folder if need be.
///
/// # Errors
/// When the system refuses any step.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(folder)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", uuid::Uuid::new_v4().simple()));
    let temporary = folder.join(name);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&temporary, path));
    if renamed.is_err() {
        let _ = fs::remove_file(&temporary);
        return renamed;
    }
    // The rename itself must survive a power cut; not every platform can open a folder.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            server: "cairn+insecure://127.0.0.1:7600/#".parse().unwrap(),
            worker_id: "w1".into(),
            role: v1::Role::Volunteer,
            display_name: "ada".into(),
            server_key: new_key().unwrap().verifying_key(),
            key: new_key().unwrap(),
        }
    }

    #[test]
    fn identity_is_kept_privately() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/worker.json");
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::NotJoined { .. })
        ));
        let identity = identity();
        identity.save(&path).unwrap();
        let back = Identity::load(&path).ok().unwrap();
        assert_eq!(back.key.to_bytes(), identity.key.to_bytes());
        assert_eq!((back.server, back.role), (identity.server, identity.role));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        fs::write(&path, b"{").unwrap();
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::Malformed { .. })
        ));
    }

    #[test]
    fn a_repeated_join_uses_the_same_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.json");
        let url: JoinUrl = "cairn+insecure://127.0.0.1:1/#a".parse().ok().unwrap();
        let other: JoinUrl = "cairn+insecure://127.0.0.1:1/#b".parse().ok().unwrap();
        let first = joining_key(&path, &url).unwrap();
        assert_eq!(
            joining_key(&path, &url).unwrap().to_bytes(),
            first.to_bytes()
        );
        assert_ne!(
            joining_key(&path, &other).unwrap().to_bytes(),
            first.to_bytes()
        );
        joining_done(&path).unwrap();
        joining_done(&path).unwrap();
    }
}
