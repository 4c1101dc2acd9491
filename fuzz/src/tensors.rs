//! A safetensors file: flags, and the file.

use std::io;

use cairn_stack::tensors::{Dtype, TensorFile, TensorSpec, write_tensors};

use crate::input::{FITTED, Input, join, split};
use crate::{assert_short, scratch};

/// Tensors cover the data exactly, every byte is readable, and the same tensors written by us read
/// the same.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.byte();
    let bytes = input.safetensors(flags);
    let path = scratch::folder("tensors").join("x.safetensors");
    scratch::write(&path, &bytes);
    let file = match TensorFile::open(&path) {
        Ok(file) => file,
        Err(error) => return assert_short(&error.kind.to_string()),
    };
    let covered: u64 = file.tensors().iter().map(|tensor| tensor.bytes).sum();
    let header = file.raw_header();
    assert_eq!(header.len() as u64 + covered, bytes.len() as u64);
    assert_eq!(file.file_bytes(), bytes.len() as u64);
    let mut specs = Vec::new();
    for tensor in file.tensors() {
        assert_eq!(file.get(&tensor.name), Some(tensor));
        let elements: usize = tensor.shape.iter().product();
        let values = file.read_f32(tensor).expect("the data is there");
        assert_eq!(values.len(), elements);
        let mut beyond = [0];
        assert!(file.read_at(tensor, tensor.bytes, &mut beyond).is_err());
        specs.push(TensorSpec {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        });
    }
    let metadata: Vec<(&str, &str)> = file
        .metadata()
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    let again = written(&metadata, &specs, |index| {
        let info = &file.tensors()[index];
        file.read_bytes(info).expect("the data is there")
    });
    let path = path.with_file_name("again.safetensors");
    scratch::write(&path, &again);
    let again = TensorFile::open(&path).expect("what we write opens");
    assert_eq!(again.metadata(), file.metadata());
    for tensor in file.tensors() {
        let copy = again.get(&tensor.name).expect("every tensor is written");
        assert_eq!((copy.dtype, &copy.shape), (tensor.dtype, &tensor.shape));
        assert_eq!(again.read_bytes(copy).ok(), file.read_bytes(tensor).ok());
    }
}

/// The bytes of a file.
pub fn written(
    metadata: &[(&str, &str)],
    specs: &[TensorSpec],
    data: impl Fn(usize) -> Vec<u8>,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_tensors::<io::Error>(&mut bytes, metadata, specs, |index| Ok(data(index)))
        .expect("memory is writable");
    bytes
}

/// Files of all dtypes, fitted and plain.
pub fn seeds() -> Vec<Vec<u8>> {
    let spec = |name: &str, dtype: Dtype, shape: &[usize]| TensorSpec {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let specs = [
        spec("a", Dtype::F32, &[2, 3]),
        spec("b.weight", Dtype::BF16, &[5]),
        spec("c", Dtype::F16, &[1, 1, 2]),
        spec("scalar", Dtype::F32, &[]),
    ];
    let file = written(&[("format", "pt")], &specs, |index| {
        vec![index as u8; specs[index].bytes() as usize]
    });
    let (header, data) = split(&file);
    vec![join(FITTED, &[header], data), join(0, &[], &file)]
}
