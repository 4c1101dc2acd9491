use serde_json::Value;

use super::nf4::{CODE_BOOK, scale_map};
use super::*;
use crate::product::{Matrix, Threads, product};

/// Numbers that bfloat16 has.
fn halves(count: usize, seed: u32) -> Vec<f32> {
    let number = |n: u32| ((n.wrapping_mul(2_654_435_761).wrapping_add(seed)) >> 24) as f32;
    (0..count as u32)
        .map(|n| (number(n) - 128.0) / 64.0)
        .collect()
}

/// Numbers that it has not.
fn floats(count: usize, seed: u32) -> Vec<f32> {
    let wide = halves(count, seed.wrapping_mul(77));
    halves(count, seed)
        .iter()
        .zip(wide)
        .map(|(a, b)| a + b / 1021.0)
        .collect()
}

fn stored(format: Format, values: &[f32], rows: usize, columns: usize) -> Stored {
    let mut packer = Packer::new(format, rows, columns);
    for piece in values.chunks(3 * PUSHED_MULTIPLE) {
        packer.push(piece);
    }
    match packer.finish() {
        Packed::Stored(stored) => stored,
        Packed::Floats(_) => panic!("these numbers fit"),
    }
}

fn out(stored: &Stored) -> Vec<f32> {
    let [rows, columns] = stored.shape();
    let mut out = vec![f32::NAN; rows * columns];
    stored.unfold(0..rows, &mut out);
    out
}

#[test]
fn what_fits_comes_out_as_it_went_in() {
    let values = halves(600, 1);
    let stored = stored(Format::Exact, &values, 3, 200);
    assert_eq!(out(&stored), values);
    assert_eq!((stored.shape(), stored.bytes()), ([3, 200], 1200));
    let mut row = vec![0.0; 200];
    stored.unfold(1..2, &mut row);
    assert_eq!(row, values[200..400]);
}

#[test]
fn what_does_not_fit_stays_in_32_bits_wherever_it_is_found_out() {
    for place in [0, 191, 192, 599] {
        let mut values = halves(600, 1);
        values[place] = 0.1;
        let mut packer = Packer::new(Format::Exact, 3, 200);
        values.chunks(192).for_each(|piece| packer.push(piece));
        match packer.finish() {
            Packed::Floats(floats) => assert_eq!(floats, values),
            Packed::Stored(_) => panic!("0.1 has more than eight bits"),
        }
    }
}

#[test]
fn any_rows_are_those_of_the_whole() {
    for format in [Format::Int8, Format::Nf4] {
        for (rows, columns) in [(7, 50), (5, 33), (300, 128), (1, 1), (40, 1000)] {
            let values = floats(rows * columns, 5);
            let stored = stored(format, &values, rows, columns);
            let whole = out(&stored);
            for start in [0, rows / 3, rows - 1] {
                let mut some = vec![0.0; (rows - start) * columns];
                stored.unfold(start..rows, &mut some);
                assert_eq!(some, whole[start * columns..], "{format:?} {start}");
            }
        }
    }
}

#[test]
fn what_is_lost_is_bounded() {
    let (rows, columns) = (64, 256);
    let values = floats(rows * columns, 9);
    let largest = |block: &[f32]| block.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    // Half a step of 127; half of the widest gap of the book, and what the scale's eight bits lose.
    for (format, bound) in [(Format::Int8, 0.5 / 127.0), (Format::Nf4, 0.1520 + 0.02)] {
        let found = out(&stored(format, &values, rows, columns));
        for (values, found) in values.chunks(BLOCK).zip(found.chunks(BLOCK)) {
            let bound = largest(values) * bound * 1.0001;
            let off = values.iter().zip(found).map(|(x, y)| (x - y).abs());
            assert!(off.fold(0.0, f32::max) <= bound, "{format:?}");
        }
    }
}

#[test]
fn zeros_stay_zeros_and_what_is_broken_stays_broken() {
    for format in [Format::Int8, Format::Nf4] {
        let zeros = out(&stored(format, &[0.0; 130], 1, 130));
        assert!(zeros.iter().all(|x| *x == 0.0));
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = floats(130, 3);
            values[70] = broken;
            let found = out(&stored(format, &values, 1, 130));
            assert!(found[70].is_nan(), "{format:?} {broken}");
        }
        let tiny = out(&stored(format, &[f32::from_bits(1); 64], 1, 64));
        assert!(tiny.iter().all(|x| x.abs() < 1e-30), "{format:?}");
    }
}

#[test]
fn bytes_are_known_before() {
    for format in [Format::Exact, Format::Int8, Format::Nf4] {
        for (rows, columns) in [(1, 1), (3, 50), (300, 128)] {
            let stored = stored(format, &halves(rows * columns, 4), rows, columns);
            assert_eq!(stored.bytes(), format.bytes(rows * columns), "{format:?}");
        }
    }
}

#[test]
fn four_bits_are_four_bits() {
    let stored = stored(Format::Nf4, &floats(1 << 20, 2), 1024, 1024);
    let bits = 8.0 * stored.bytes() as f64 / f64::from(1 << 20);
    // Four, an eighth for the scales, and theirs: 0.127 bits a parameter (arXiv 2305.14314).
    assert!((4.126..4.128).contains(&bits), "{bits}");
}

fn reference() -> Value {
    serde_json::from_str(include_str!("../../tests/reference/quantised.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f32> {
    let list = value.as_array().unwrap().iter();
    list.map(|number| number.as_f64().unwrap() as f32).collect()
}

fn close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let most = 2e-6 * expected.abs().max(1e-6);
        assert!(
            (found - expected).abs() <= most,
            "{what}: {found} {expected}"
        );
    }
}

#[test]
fn code_book_and_map_are_those_of_bitsandbytes() {
    let reference = reference();
    assert_eq!(CODE_BOOK.to_vec(), numbers(&reference["code_book"]));
    close(scale_map(), &numbers(&reference["scale_map"]), "map");
}

#[test]
fn four_bits_are_those_of_bitsandbytes() {
    for matrix in reference()["matrices"].as_array().unwrap() {
        let size = |key: &str| matrix[key].as_u64().unwrap() as usize;
        let (rows, columns) = (size("rows"), size("columns"));
        let stored = stored(Format::Nf4, &numbers(&matrix["values"]), rows, columns);
        let expected = &matrix["nf4"];
        close(&out(&stored), &numbers(&expected["out"]), "out");
        let Numbers::Nf4(nf4) = &stored.numbers else {
            panic!("four bits were asked for");
        };
        let (codes, scale_codes, coarse, offset) = nf4.parts();
        let bytes = |bytes: &[u8]| bytes.iter().copied().map(f32::from).collect::<Vec<_>>();
        assert_eq!(bytes(codes), numbers(&expected["codes"]));
        assert_eq!(bytes(scale_codes), numbers(&expected["scale_codes"]));
        close(coarse, &numbers(&expected["coarse"]), "scales of scales");
        close(
            &[offset],
            &[expected["offset"].as_f64().unwrap() as f32],
            "offset",
        );
    }
}

#[test]
fn scales_of_more_than_one_group_are_those_of_bitsandbytes() {
    let expected = &reference()["scales"];
    // A block whose largest magnitude is known; what else is in it does not matter.
    let largest = numbers(&expected["largest"]);
    let values: Vec<f32> = largest
        .iter()
        .flat_map(|most| (0..BLOCK).map(move |n| if n == 9 { -most } else { 0.0 }))
        .collect();
    let stored = stored(Format::Nf4, &values, 136, 128);
    let Numbers::Nf4(nf4) = &stored.numbers else {
        panic!("four bits were asked for");
    };
    let (_, codes, coarse, offset) = nf4.parts();
    let codes: Vec<f32> = codes.iter().copied().map(f32::from).collect();
    // A scale between two numbers of the map may go to either: the offset, a mean, is summed otherwise.
    let others = numbers(&expected["codes"]);
    let apart = codes.iter().zip(&others).map(|(x, y)| (x - y).abs());
    assert!(apart.clone().all(|apart| apart <= 1.0) && apart.sum::<f32>() <= 1.0);
    assert_eq!((codes.len(), coarse.len()), (others.len(), 2));
    close(coarse, &numbers(&expected["coarse"]), "scales of scales");
    close(
        &[offset],
        &[expected["offset"].as_f64().unwrap() as f32],
        "offset",
    );
}

#[test]
fn eight_bits_are_those_of_torch() {
    for matrix in reference()["matrices"].as_array().unwrap() {
        let size = |key: &str| matrix[key].as_u64().unwrap() as usize;
        let values = numbers(&matrix["values"]);
        let stored = stored(Format::Int8, &values, size("rows"), size("columns"));
        close(&out(&stored), &numbers(&matrix["int8"]["out"]), "out");
    }
}

#[test]
fn products_are_those_of_the_unfolded_matrix() {
    for format in [Format::Exact, Format::Int8, Format::Nf4] {
        // More than one block of rows, and a last one that is smaller.
        for (rows, columns, count) in [(5, 3, 4), (1100, 2048, 3)] {
            let stored = stored(format, &halves(rows * columns, 2), rows, columns);
            let (x, d) = (halves(count * columns, 3), halves(count * rows, 4));
            let weights = out(&stored);
            let weights = Matrix::new(&weights, rows, columns);
            let check = |found: &[f32], expected: &[f32]| {
                for (found, expected) in found.iter().zip(expected) {
                    assert!((found - expected).abs() <= 1e-5 * expected.abs().max(100.0));
                }
            };
            for into in [Into::Replace, Into::Add] {
                let mut found = vec![2.0; count * rows];
                let mut expected = found.clone();
                stored.times_transposed(&mut found, into, &x);
                let (a, b) = (Matrix::new(&x, count, columns), weights.transposed());
                product(&mut expected, into, a, b, 1.0, Threads::One);
                check(&found, &expected);

                let mut found = vec![2.0; count * columns];
                let mut expected = found.clone();
                stored.times(&mut found, into, &d);
                let d = Matrix::new(&d, count, rows);
                product(&mut expected, into, d, weights, 1.0, Threads::One);
                check(&found, &expected);
            }
        }
    }
}

#[test]
fn one_thread_or_many_keep_the_same_bits() {
    let values = floats(700 * 130, 6);
    let one = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    for format in [Format::Int8, Format::Nf4] {
        let many = out(&stored(format, &values, 700, 130));
        let alone = one.install(|| out(&stored(format, &values, 700, 130)));
        assert!(
            many.iter()
                .zip(alone)
                .all(|(x, y)| x.to_bits() == y.to_bits())
        );
    }
}
