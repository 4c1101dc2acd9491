//! Compiles `cairn/v1/*.proto` without protoc.
use std::error::Error;

const FILES: [&str; 9] = [
    "cairn/v1/blob.proto",
    "cairn/v1/contribution.proto",
    "cairn/v1/dataset.proto",
    "cairn/v1/enrollment.proto",
    "cairn/v1/log.proto",
    "cairn/v1/model.proto",
    "cairn/v1/round.proto",
    "cairn/v1/volunteer.proto",
    "cairn/v1/work.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=cairn");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(
        out.join("cairn_v1.bin"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
