use std::io::Write as _;

use proptest::prelude::*;

use super::*;

fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn raw(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn open(bytes: &[u8]) -> Result<TensorFile, TensorError> {
    TensorFile::open(file_of(bytes).path())
}

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    }
}

#[test]
fn writes_what_it_reads() {
    let specs = [
        spec("b", Dtype::F32, &[2, 3]),
        spec("a\"é", Dtype::BF16, &[4]),
        spec("s", Dtype::F16, &[]),
    ];
    let bodies: [Vec<f32>; 3] = [
        vec![1.0, -2.0, 3.5, 0.0, f32::MAX, 1e-40],
        vec![1.0, 2.0, -3.0, 0.5],
        vec![0.25],
    ];
    let write = || {
        let mut out = Vec::new();
        write_tensors::<io::Error>(&mut out, &[("format", "pt")], &specs, |index| {
            let mut bytes = Vec::new();
            specs[index].dtype.encode(&bodies[index], &mut bytes);
            Ok(bytes)
        })
        .unwrap();
        out
    };
    let bytes = write();
    assert_eq!(bytes, write());
    let file = open(&bytes).unwrap();
    assert_eq!(file.metadata(), [("format".to_owned(), "pt".to_owned())]);
    assert_eq!(file.raw_header().len() % 8, 0);
    let names: Vec<&str> = file
        .tensors()
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    assert_eq!(names, ["b", "a\"é", "s"]);
    for (spec, body) in specs.iter().zip(&bodies) {
        let info = file.get(&spec.name).unwrap();
        assert_eq!((&info.shape, info.dtype), (&spec.shape, spec.dtype));
        assert_eq!(&file.read_f32(info).unwrap(), body);
    }
    assert!(file.get("c").is_none());
    let info = file.get("b").unwrap();
    assert!(file.read_at(info, info.bytes - 3, &mut [0; 4]).is_err());
    assert!(file.read_at(info, u64::MAX, &mut [0; 4]).is_err());
}

#[test]
fn a_body_of_the_wrong_length_is_refused() {
    let result =
        write_tensors::<io::Error>(Vec::new(), &[], &[spec("a", Dtype::F32, &[2])], |_| {
            Ok(vec![0; 7])
        });
    assert!(
        result
            .unwrap_err()
            .to_string()
            .contains("needs 8 bytes, got 7")
    );
}

#[test]
fn rounds_to_nearest_even() {
    let mut bytes = Vec::new();
    // Halfway between two bf16 neighbours: to the even one, down and up.
    Dtype::BF16.encode(
        &[f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000)],
        &mut bytes,
    );
    assert_eq!(bytes, [0x80, 0x3f, 0x82, 0x3f]);
    Dtype::F16.encode(&[1.0 + 0.5 / 1024.0, 1.0 + 1.5 / 1024.0], &mut bytes);
    assert_eq!(bytes, [0x00, 0x3c, 0x02, 0x3c]);
}

/// Headers that lie, each with the word its error must say.
#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn hostile_headers_are_refused() {
    let tensor = |rest: &str| format!("{{\"a\":{{{rest}}}}}");
    let good = r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#;
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":{first}}},"b":{{"dtype":"F32","shape":[1],"data_offsets":{second}}}}}"#
        )
    };
    let long_name = format!("{{\"{}\":{{{good}}}}}", "n".repeat(NAME_BYTES_MAX + 1));
    let cases: Vec<(&str, String, usize, &str)> = vec![
        ("not json", "{nope}".into(), 8, "malformed"),
        ("not an object", "[]".into(), 0, "start with '{'"),
        (
            "space first",
            format!(" {}", tensor(good)),
            8,
            "start with '{'",
        ),
        (
            "two documents",
            format!("{}{{}}", tensor(good)),
            8,
            "malformed",
        ),
        (
            "duplicate tensor",
            format!("{{\"a\":{{{good}}},\"a\":{{{good}}}}}"),
            8,
            "twice",
        ),
        (
            "escaped duplicate",
            format!("{{\"a\":{{{good}}},\"\\u0061\":{{{good}}}}}"),
            8,
            "twice",
        ),
        (
            "duplicate metadata",
            format!(r#"{{"__metadata__":{{"x":"1","x":"2"}},"a":{{{good}}}}}"#),
            8,
            "twice",
        ),
        (
            "metadata twice",
            format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},"a":{{{good}}}}}"#),
            8,
            "twice",
        ),
        (
            "metadata of numbers",
            format!(r#"{{"__metadata__":{{"x":1}},"a":{{{good}}}}}"#),
            8,
            "malformed",
        ),
        (
            "duplicate field",
            tensor(&format!("{good},\"dtype\":\"F32\"")),
            8,
            "duplicate field",
        ),
        (
            "unknown field",
            tensor(&format!("{good},\"offset\":0")),
            8,
            "unknown field",
        ),
        (
            "missing field",
            tensor(r#""dtype":"F32","shape":[2]"#),
            8,
            "missing field",
        ),
        (
            "unknown dtype",
            tensor(r#""dtype":"I64","shape":[1],"data_offsets":[0,8]"#),
            8,
            "dtype \"I64\"",
        ),
        (
            "negative dimension",
            tensor(r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#),
            8,
            "malformed",
        ),
        (
            "fractional dimension",
            tensor(r#""dtype":"F32","shape":[2.0],"data_offsets":[0,8]"#),
            8,
            "malformed",
        ),
        (
            "huge dimension",
            tensor(r#""dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]"#),
            8,
            "malformed",
        ),
        (
            "wraps to zero",
            tensor(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]"#),
            0,
            "overflows",
        ),
        (
            "wraps in bytes",
            tensor(r#""dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]"#),
            0,
            "overflows",
        ),
        (
            "zero hides overflow",
            tensor(r#""dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]"#),
            0,
            "overflows",
        ),
        (
            "zero size",
            tensor(r#""dtype":"F32","shape":[0],"data_offsets":[0,0]"#),
            0,
            "no element",
        ),
        (
            "nine dimensions",
            tensor(r#""dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]"#),
            4,
            "9 dimensions",
        ),
        (
            "offsets too short",
            tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#),
            4,
            "needs 8 bytes",
        ),
        (
            "offsets backwards",
            tensor(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#),
            8,
            "needs 8 bytes",
        ),
        (
            "offsets at the end of time",
            tensor(
                r#""dtype":"F32","shape":[2],"data_offsets":[18446744073709551607,18446744073709551615]"#,
            ),
            8,
            "gap",
        ),
        (
            "three offsets",
            tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0,8,8]"#),
            8,
            "malformed",
        ),
        (
            "gap at the start",
            tensor(r#""dtype":"F32","shape":[1],"data_offsets":[4,8]"#),
            8,
            "gap",
        ),
        ("gap between", two("[0,4]", "[8,12]"), 12, "gap"),
        (
            "overlap",
            two("[0,4]", "[2,6]"),
            6,
            "inside the tensor before",
        ),
        (
            "same bytes",
            two("[0,4]", "[0,4]"),
            4,
            "inside the tensor before",
        ),
        ("data behind", tensor(good), 9, "belong to no tensor"),
        ("data missing", tensor(good), 7, "cut short"),
        ("long name", long_name, 8, "512 bytes"),
        ("empty name", format!("{{\"\":{{{good}}}}}"), 8, "512 bytes"),
        (
            "deep",
            format!("{{\"a\":{}", "[".repeat(100_000)),
            0,
            "malformed",
        ),
    ];
    for (what, header, data_bytes, says) in cases {
        let error = open(&raw(&header, data_bytes)).unwrap_err();
        assert!(error.kind.to_string().contains(says), "{what}: {error}");
    }
}

#[test]
fn lengths_are_not_believed() {
    let long = |length: u64| [length.to_le_bytes().to_vec(), vec![b'{'; 32]].concat();
    for (bytes, says) in [
        (vec![], "cut short"),
        (vec![1, 2, 3], "cut short"),
        (long(33), "cut short"),
        (long(HEADER_BYTES_MAX), "cut short"),
        (long(HEADER_BYTES_MAX + 1), "at most"),
        (long(u64::MAX), "at most"),
        (long(u64::MAX - 7), "at most"),
    ] {
        let error = open(&bytes).unwrap_err();
        assert!(error.kind.to_string().contains(says), "{error}");
    }
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let file = file_of(&raw(header, 8));
    let error = TensorFile::open_bounded(file.path(), 10).unwrap_err();
    assert!(matches!(
        error.kind,
        TensorErrorKind::HeaderTooLong { max: 10, .. }
    ));
    assert!(
        TensorFile::open(Path::new("/nowhere/at/all"))
            .unwrap_err()
            .to_string()
            .contains("/nowhere/at/all")
    );
    assert!(TensorFile::open(&std::env::temp_dir()).is_err());
}

#[test]
fn too_many_tensors_are_refused() {
    let mut header = String::from("{");
    for index in 0..=TENSORS_MAX {
        let comma = if index == 0 { "" } else { "," };
        let (start, end) = (index * 2, index * 2 + 2);
        let _ = std::fmt::Write::write_fmt(
            &mut header,
            format_args!(
                "{comma}\"{index}\":{{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[{start},{end}]}}"
            ),
        );
    }
    header.push('}');
    let error = open(&raw(&header, (TENSORS_MAX + 1) * 2)).unwrap_err();
    assert!(
        error.kind.to_string().contains("more than 100000 tensors"),
        "{error}"
    );
}

#[test]
fn a_file_cut_after_opening_is_an_error() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let temp = file_of(&raw(header, 8));
    let file = TensorFile::open(temp.path()).unwrap();
    temp.as_file().set_len(file.file_bytes() - 1).unwrap();
    assert!(file.read_f32(&file.tensors()[0]).is_err());
}

#[test]
fn trailing_padding_is_read_and_order_is_by_offset() {
    let header = r#"{"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}     "#;
    let file = open(&raw(header, 8)).unwrap();
    let names: Vec<&str> = file
        .tensors()
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    assert_eq!(names, ["a", "b"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_changed_byte_never_panics(place in 0_usize..300, value in any::<u8>(), cut in 0_usize..300) {
        let specs = [spec("first", Dtype::F32, &[3, 2]), spec("second", Dtype::BF16, &[5])];
        let mut bytes = Vec::new();
        write_tensors::<io::Error>(&mut bytes, &[("format", "pt")], &specs, |i| Ok(vec![0; [24, 10][i]])).unwrap();
        let place = place % bytes.len();
        bytes[place] = value;
        bytes.truncate(bytes.len() - cut % 2 * (cut % bytes.len()));
        if let Ok(file) = open(&bytes) {
            for tensor in file.tensors() {
                prop_assert!(file.read_f32(tensor).is_ok());
            }
        }
    }
}
