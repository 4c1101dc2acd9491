//! Preferences into batches: both answers of one are always in the same batch.

use super::packing::append;
use super::{Batch, Example, Row, batches};

/// Puts preferences into batches of at most `2 pairs` rows of at most `length` tokens. Preference `p` is
/// examples `2 p` and `2 p + 1`. Without `packing` each answer has a row of its own; with it, each goes
/// into the first row of the batch at hand that has room, and a preference that finds none begins
/// the next batch.
///
/// The same input gives the same batches. An example longer than `length` is cut at it; preferences
/// beyond the examples, and those with an empty answer, are passed over.
#[must_use]
pub fn pair_batches(
    examples: &[Example],
    order: &[usize],
    length: usize,
    packing: bool,
    pairs: usize,
) -> Vec<Batch> {
    let rows_max = 2 * pairs.max(1);
    let mut out = Vec::new();
    let mut rows: Vec<Row> = Vec::new();
    for pair in order {
        let numbers = [2 * pair, 2 * pair + 1];
        let Some(answers) = examples.get(numbers[0]..=numbers[1]) else {
            continue;
        };
        let tokens = [answers[0].tokens.len(), answers[1].tokens.len()].map(|n| n.min(length));
        if tokens.contains(&0) {
            continue;
        }
        let mut places = places(&rows, tokens, length, packing);
        if places.iter().any(|place| *place >= rows_max) {
            out.extend(batches(std::mem::take(&mut rows), rows_max));
            places = self::places(&rows, tokens, length, packing);
        }
        for side in 0..2 {
            if places[side] == rows.len() {
                rows.push(Row::default());
            }
            append(
                &mut rows[places[side]],
                numbers[side],
                &answers[side],
                tokens[side],
            );
        }
    }
    out.extend(batches(rows, rows_max));
    out
}

/// The rows that two answers go to; the next new one where no other has room.
fn places(rows: &[Row], tokens: [usize; 2], length: usize, packing: bool) -> [usize; 2] {
    if !packing {
        return [rows.len(), rows.len() + 1];
    }
    let fits = |taken: usize, tokens: usize| taken + tokens <= length;
    let used = |row: &Row| row.tokens.len();
    let first = rows
        .iter()
        .position(|row| fits(used(row), tokens[0]))
        .unwrap_or(rows.len());
    let beside = |place: usize| if place == first { tokens[0] } else { 0 };
    let second = (0..=rows.len())
        .position(|place| {
            let taken = rows.get(place).map_or(0, used) + beside(place);
            (place < rows.len() || place == first) && fits(taken, tokens[1])
        })
        .unwrap_or(rows.len() + usize::from(first == rows.len()));
    [first, second]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example(number: usize, tokens: usize) -> Example {
        Example {
            tokens: (0..tokens).map(|t| (number * 1000 + t) as u32).collect(),
            scored: (0..tokens).map(|t| t > 0).collect(),
            cut: false,
        }
    }

    proptest! {
        #[test]
        fn no_preference_is_torn_apart_or_lost(
            lengths in prop::collection::vec(1_usize..40, 0..60),
            length in 40_usize..100,
            pairs in 1_usize..5,
            packing: bool,
            part in 1_usize..5,
        ) {
            let count = lengths.len() / 2;
            let examples: Vec<Example> =
                lengths.iter().enumerate().map(|(i, &n)| example(i, n)).collect();
            let order: Vec<usize> = (0..count).rev().collect();
            let batches = pair_batches(&examples, &order, length, packing, pairs);
            let mut seen = Vec::new();
            for batch in &batches {
                prop_assert!(batch.rows.len() <= 2 * pairs && batch.length <= length);
                let mut here: Vec<usize> =
                    batch.rows.iter().flat_map(|row| row.examples.clone()).collect();
                if !packing {
                    prop_assert!(batch.rows.iter().all(|row| row.examples.len() == 1));
                }
                here.sort_unstable();
                for pair in here.chunks(2) {
                    prop_assert_eq!((pair[0] % 2, pair[0] + 1), (0, pair[1]));
                }
                for row in &batch.rows {
                    for (place, number) in row.examples.iter().enumerate() {
                        let own: Vec<u32> = row.tokens.iter().zip(&row.segments)
                            .filter(|(_, segment)| **segment as usize == place + 1)
                            .map(|(token, _)| *token)
                            .collect();
                        prop_assert_eq!(&own, &examples[*number].tokens);
                    }
                }
                seen.extend(here);
                let mut rows = 0;
                for (first, part) in batch.parts(part, |example| example / 2) {
                    prop_assert_eq!(first, rows);
                    prop_assert_eq!(&part.rows, &batch.rows[first..][..part.rows.len()]);
                    rows += part.rows.len();
                    let mut here: Vec<usize> =
                        part.rows.iter().flat_map(|row| row.examples.clone()).collect();
                    here.sort_unstable();
                    for pair in here.chunks(2) {
                        prop_assert_eq!((pair[0] % 2, pair[0] + 1), (0, pair[1]));
                    }
                }
                prop_assert_eq!(rows, batch.rows.len());
                if !packing {
                    let most = part.max(2);
                    prop_assert!(batch.parts(part, |example| example / 2)
                        .iter().all(|(_, part)| part.rows.len() <= most));
                }
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..2 * count).collect::<Vec<_>>());
            if !packing {
                prop_assert_eq!(batches.len(), count.div_ceil(pairs));
            }
        }
    }

    #[test]
    fn packed_answers_share_rows() {
        let examples: Vec<Example> = (0..8).map(|n| example(n, 5)).collect();
        let batches = pair_batches(&examples, &[0, 1, 2, 3], 10, true, 1);
        assert_eq!(batches.len(), 2);
        assert!(
            batches
                .iter()
                .all(|batch| batch.rows.len() == 2 && batch.length == 10)
        );
        assert_eq!(batches[0].rows[0].examples, [0, 1]);
    }

    #[test]
    fn too_long_and_unknown_preferences_do_no_harm() {
        let examples = [example(0, 9), example(1, 3), example(2, 0), example(3, 2)];
        let batches = pair_batches(&examples, &[0, 7, 1], 4, false, 4);
        assert_eq!(batches.len(), 1);
        assert_eq!(batches[0].rows[0].tokens, [0, 1, 2, 3]);
        assert_eq!(batches[0].rows.len(), 2);
        assert!(pair_batches(&[], &[], 4, true, 0).is_empty());
    }
}
