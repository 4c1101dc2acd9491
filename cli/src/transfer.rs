//! Moving many blobs with one progress bar.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use cairn_proto::client::Client;
use cairn_proto::convert::BlobName;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Drawing rate of the bar; faster only flickers.
const REDRAW_HZ: u8 = 5;

/// A blob and the file it is in, or shall be in.
#[derive(Debug, Clone)]
pub struct Transfer {
    /// Its name.
    pub blob: BlobName,
    /// The file.
    pub path: PathBuf,
}

/// What moving did.
#[derive(Debug, Default, Clone, Copy)]
pub struct Moved {
    /// Blobs moved.
    pub blobs: usize,
    /// Bytes moved.
    pub bytes: u64,
    /// Blobs the other side had already.
    pub held: usize,
}

/// Uploads what the coordinator does not hold yet.
pub async fn upload(client: &Client, files: &[Transfer]) -> Result<Moved> {
    let names: Vec<BlobName> = files.iter().map(|file| file.blob).collect();
    let missing = client
        .missing_blobs(&names)
        .await
        .context("ask which files are there already")?;
    let mut pending: Vec<&Transfer> = files
        .iter()
        .filter(|file| missing.contains(&file.blob))
        .collect();
    pending.sort_by_key(|file| file.blob.digest);
    pending.dedup_by_key(|file| file.blob.digest);
    let total = pending.iter().map(|file| file.blob.size_bytes).sum();
    let bar = bar(total, "uploading");
    let mut done = 0;
    for file in &pending {
        client
            .upload(&file.path, file.blob, "", &|bytes| {
                bar.set_position(done + bytes);
            })
            .await
            .with_context(|| format!("upload {}", file.path.display()))?;
        done += file.blob.size_bytes;
    }
    bar.finish_and_clear();
    Ok(Moved {
        blobs: pending.len(),
        bytes: total,
        held: files.len() - pending.len(),
    })
}

/// Downloads blobs to their files; those that are there already are left.
pub async fn download(client: &Client, files: &[Transfer]) -> Result<Moved> {
    let total = files.iter().map(|file| file.blob.size_bytes).sum();
    let bar = bar(total, "downloading");
    let mut done = 0;
    for file in files {
        client
            .download(file.blob, &file.path, &|bytes| {
                bar.set_position(done + bytes);
            })
            .await
            .with_context(|| format!("download {}", file.path.display()))?;
        done += file.blob.size_bytes;
    }
    bar.finish_and_clear();
    Ok(Moved {
        blobs: files.len(),
        bytes: total,
        held: 0,
    })
}

fn bar(total: u64, verb: &'static str) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr_with_hz(REDRAW_HZ)
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(total), target).with_message(verb);
    if let Ok(style) = ProgressStyle::with_template(
        "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} eta {eta}",
    ) {
        bar.set_style(style.progress_chars("= "));
    }
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}
