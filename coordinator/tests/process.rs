//! The built program from outside: TLS with a pin, a large upload in little memory, a polite end.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use cairn_proto::client::{Client, Options, join};
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use support::s3::S3;

const UPLOAD_BYTES: usize = 200 * 1024 * 1024;
const PEAK_KIB_MAX: u64 = 100 * 1024;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_cairn-coordinator"))
}

/// Ends the process with the test, however it ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(data: &Path, s3: Option<&S3>) -> Server {
    let mut program = program();
    if let Some(location) = s3.map(S3::location) {
        program
            .envs(location.variables)
            .env("CAIRN_BLOBS", location.url);
    }
    let mut child = program
        .args([
            "serve",
            "--grpc",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
            "--data",
        ])
        .arg(data)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("serving gRPC") {
        line.clear();
        assert!(
            log.read_line(&mut line).unwrap() > 0,
            "the server ended early"
        );
    }
    // Drained on a thread: a full pipe would stop the server.
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    Server(child)
}

fn maintainer_url(data: &Path) -> String {
    let made = program()
        .args(["token", "create", "--role", "maintainer", "--data"])
        .arg(data)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let url = String::from_utf8(made.stdout).unwrap();
    assert_eq!(url.lines().count(), 1);
    url.trim().to_owned()
}

fn peak_kib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn large_file(path: &Path) -> BlobName {
    let mut file = std::fs::File::create(path).unwrap();
    let block: Vec<u8> = (0..1024 * 1024u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for i in 0..UPLOAD_BYTES / block.len() {
        file.write_all(&(i as u64).to_le_bytes()).unwrap();
        file.write_all(&block[8..]).unwrap();
    }
    let (digest, size_bytes) = Digest::of_file(path).unwrap();
    BlobName { digest, size_bytes }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_upload_takes_little_memory() {
    large_upload(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_upload_straight_to_the_store_takes_little_memory() {
    let s3 = S3::start().await;
    large_upload(Some(&s3)).await;
    assert_eq!(
        s3.direct_puts().len(),
        UPLOAD_BYTES.div_ceil(8 * 1024 * 1024)
    );
    assert_eq!(s3.unfinished(), 0);
}

async fn large_upload(s3: Option<&S3>) {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let mut server = serve(&data, s3);
    let url = maintainer_url(&data).parse().ok().unwrap();
    let options = Options::default();
    let identity = join(&url, "ada", &folder.path().join("identity"), &options)
        .await
        .unwrap();
    let client = Client::new(identity, options).unwrap();

    let path = folder.path().join("large");
    let blob = large_file(&path);
    client.upload(&path, blob, "", &|_| {}).await.unwrap();
    let back = folder.path().join("back");
    client.download(blob, &back, &|_| {}).await.unwrap();
    assert_eq!(Digest::of_file(&back).unwrap().0, blob.digest);
    let peak = peak_kib(server.0.id());
    println!("peak resident memory: {} MiB", peak / 1024);
    assert!(peak < PEAK_KIB_MAX, "{peak} KiB");

    // Ready, measured, and a polite end on SIGTERM.
    let asked = Command::new("kill")
        .arg(server.0.id().to_string())
        .status()
        .unwrap();
    assert!(asked.success());
    drop(client);
    assert!(server.0.wait().unwrap().success());
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let fails = |arguments: &[&str], says: &str| {
        let mut child = program()
            .arg("serve")
            .args(arguments)
            // Nobody listens there.
            .envs([
                ("AWS_ENDPOINT", "http://127.0.0.1:9"),
                ("AWS_ALLOW_HTTP", "true"),
                ("AWS_ACCESS_KEY_ID", "x"),
                ("AWS_SECRET_ACCESS_KEY", "x"),
            ])
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut text = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(text.contains(says), "{arguments:?} said: {text}");
    };
    let data_text = data.to_str().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    fails(&["--data", data_text, "--grpc", &address], "in use");
    fails(&["--data", "/proc/nowhere"], "cannot be made");
    fails(
        &["--data", data_text, "--insecure", "--grpc", "0.0.0.0:0"],
        "loopback",
    );
    fails(
        &[
            "--data",
            data_text,
            "--tls-cert",
            "/nowhere",
            "--tls-key",
            "/nowhere",
        ],
        "/nowhere",
    );
    let free = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    for (blobs, says) in [
        ("ftp://host/x", "no store we know"),
        ("s3://bucket", "check the AWS_ variables"),
    ] {
        fails(
            &[&["--data", data_text, "--blobs", blobs], &free[..]].concat(),
            says,
        );
    }
    let _first = serve(&data, None);
    fails(
        &[&["--data", data_text], &free[..]].concat(),
        "another coordinator",
    );
}
