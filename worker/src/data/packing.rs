//! Examples into rows, rows into batches.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::Example;

/// Documents side by side, each attending only to itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    /// Token ids; 0 in the padding.
    pub tokens: Vec<u32>,
    /// Position of each token in its document, from 0.
    pub positions: Vec<u32>,
    /// Document of each token, from 1; 0 in the padding.
    pub segments: Vec<u32>,
    /// Which tokens count in the loss. A document's first token never does.
    pub scored: Vec<bool>,
    /// Which example each document is: document `s` is `examples[s - 1]`.
    pub examples: Vec<usize>,
}

/// Rows of one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The rows, each padded to `length`.
    pub rows: Vec<Row>,
    /// Tokens in each row.
    pub length: usize,
}

impl Batch {
    /// Its rows in parts of at most `rows`, each as long as the whole, with the place of their first.
    /// Examples that `together` gives one name stay in one part, which then may have more.
    #[must_use]
    pub fn parts(
        &self,
        rows: usize,
        together: impl Fn(usize) -> usize,
    ) -> Vec<(usize, Cow<'_, Batch>)> {
        if self.rows.len() <= rows {
            return vec![(0, Cow::Borrowed(self))];
        }
        // The last row that has anything of each name.
        let mut last: BTreeMap<usize, usize> = BTreeMap::new();
        for (place, row) in self.rows.iter().enumerate() {
            for example in &row.examples {
                last.insert(together(*example), place);
            }
        }
        let (mut ends, mut begin, mut whole, mut reach) = (Vec::new(), 0, 0, 0);
        for (place, row) in self.rows.iter().enumerate() {
            let lasts = row.examples.iter().map(|example| last[&together(*example)]);
            reach = lasts.fold(reach.max(place), usize::max);
            if reach > place {
                continue;
            }
            // What could not be cut and ends here goes with what is before it while there is room.
            if place + 1 - begin > rows && whole > begin {
                ends.push(whole);
                begin = whole;
            }
            whole = place + 1;
        }
        ends.push(self.rows.len());
        let mut begin = 0;
        let part = |end: usize| {
            let first = std::mem::replace(&mut begin, end);
            let rows = self.rows[first..end].to_vec();
            let length = self.length;
            (first, Cow::Owned(Batch { rows, length }))
        };
        ends.into_iter().map(part).collect()
    }
}

/// Puts the examples named by `order` into rows of at most `length` tokens: each, in that order, into the
/// first row with room for it. Without `packing` each has a row of its own.
///
/// The same input gives the same rows. An example longer than `length` is cut at it; numbers in `order`
/// beyond the examples are passed over, as are empty examples.
#[must_use]
pub fn pack(examples: &[Example], order: &[usize], length: usize, packing: bool) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut room = Room::new(if packing { order.len() } else { 0 }, length);
    for &number in order {
        let Some(example) = examples.get(number) else {
            continue;
        };
        let tokens = example.tokens.len().min(length);
        if tokens == 0 {
            continue;
        }
        let row = if packing {
            room.take_first(tokens)
        } else {
            rows.len()
        };
        if row >= rows.len() {
            rows.push(Row::default());
        }
        if let Some(row) = rows.get_mut(row) {
            append(row, number, example, tokens);
        }
    }
    rows
}

/// Cuts rows, in their order, into batches of `batch_size` (at least one), each padded only to its longest row.
#[must_use]
pub fn batches(rows: Vec<Row>, batch_size: usize) -> Vec<Batch> {
    let mut out = Vec::with_capacity(rows.len().div_ceil(batch_size.max(1)));
    let mut rows = rows.into_iter().peekable();
    while rows.peek().is_some() {
        let mut batch: Vec<Row> = rows.by_ref().take(batch_size.max(1)).collect();
        let length = batch.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        for row in &mut batch {
            row.tokens.resize(length, 0);
            row.positions.resize(length, 0);
            row.segments.resize(length, 0);
            row.scored.resize(length, false);
        }
        out.push(Batch {
            rows: batch,
            length,
        });
    }
    out
}

pub(super) fn append(row: &mut Row, number: usize, example: &Example, tokens: usize) {
    row.examples.push(number);
    let segment = row.segments.last().copied().unwrap_or(0) + 1;
    let start = row.tokens.len();
    row.tokens.extend(&example.tokens[..tokens]);
    row.positions.extend((0..).take(tokens));
    row.segments.resize(start + tokens, segment);
    row.scored.extend(example.scored.iter().take(tokens));
    row.scored.resize(start + tokens, false);
    row.scored[start] = false;
}

/// Free tokens of each row, as a tree of maxima: finding the first row with room takes as many steps as the
/// number of rows has digits, where trying all rows would take quadratic time over a data set.
struct Room {
    /// Node `i` has children `2 i` and `2 i + 1`; the second half are the rows, opened or not.
    free: Vec<usize>,
}

impl Room {
    fn new(rows_max: usize, length: usize) -> Self {
        Self {
            free: vec![length; 2 * rows_max.next_power_of_two()],
        }
    }

    /// Takes `tokens` (at most a row's length) from the first row that has them.
    fn take_first(&mut self, tokens: usize) -> usize {
        let leaves = self.free.len() / 2;
        let mut node = 1;
        while node < leaves {
            node *= 2;
            if self.free[node] < tokens {
                node += 1;
            }
        }
        let row = node - leaves;
        self.free[node] -= tokens;
        while node > 1 {
            node /= 2;
            self.free[node] = self.free[2 * node].max(self.free[2 * node + 1]);
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example(number: usize, tokens: usize) -> Example {
        let tokens: Vec<u32> = (0..tokens).map(|t| (number * 1000 + t) as u32).collect();
        let scored = (0..tokens.len()).map(|t| t > 0 && t % 3 != 1).collect();
        Example {
            tokens,
            scored,
            cut: false,
        }
    }

    /// The rule of the documentation, word for word.
    fn first_fit(examples: &[Example], order: &[usize], length: usize) -> Vec<Vec<usize>> {
        let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
        for &number in order {
            let tokens = examples[number].tokens.len();
            match rows.iter_mut().find(|(used, _)| used + tokens <= length) {
                Some((used, row)) => {
                    *used += tokens;
                    row.push(number);
                }
                None => rows.push((tokens, vec![number])),
            }
        }
        rows.into_iter().map(|(_, row)| row).collect()
    }

    /// Each document of a row, read back by its segment number.
    fn documents(row: &Row) -> Vec<(usize, Vec<usize>)> {
        let find = |segment: u32| {
            (0..row.tokens.len())
                .filter(|&t| row.segments[t] == segment)
                .collect::<Vec<_>>()
        };
        (1..)
            .zip(&row.examples)
            .map(|(segment, &number)| (number, find(segment)))
            .collect()
    }

    proptest! {
        #[test]
        fn every_token_is_in_one_place(
            lengths in prop::collection::vec(1_usize..40, 0..60),
            length in 40_usize..100,
            batch_size in 1_usize..5,
            packing: bool,
            reversed: bool,
        ) {
            let examples: Vec<Example> = lengths.iter().enumerate().map(|(i, &n)| example(i, n)).collect();
            let mut order: Vec<usize> = (0..examples.len()).collect();
            if reversed {
                order.reverse();
            }
            let rows = pack(&examples, &order, length, packing);
            let names: Vec<Vec<usize>> = rows.iter().map(|row| row.examples.clone()).collect();
            if packing {
                prop_assert_eq!(names, first_fit(&examples, &order, length));
            } else {
                prop_assert_eq!(names, order.iter().map(|&i| vec![i]).collect::<Vec<_>>());
            }
            let mut seen = vec![0; examples.len()];
            for batch in batches(rows, batch_size) {
                prop_assert!(batch.length <= length && batch.rows.len() <= batch_size);
                for row in &batch.rows {
                    prop_assert_eq!(row.tokens.len(), batch.length);
                    prop_assert_eq!(row.scored.len(), batch.length);
                    prop_assert_eq!(row.positions.len(), batch.length);
                    let mut covered = 0;
                    for (number, places) in documents(row) {
                        seen[number] += 1;
                        prop_assert_eq!(places[0], covered);
                        covered += places.len();
                        prop_assert_eq!(covered, places[places.len() - 1] + 1);
                        for (position, &t) in places.iter().enumerate() {
                            prop_assert_eq!(row.positions[t] as usize, position);
                            prop_assert_eq!(row.tokens[t], examples[number].tokens[position]);
                            prop_assert_eq!(row.scored[t], examples[number].scored[position]);
                        }
                        prop_assert_eq!(places.len(), examples[number].tokens.len());
                    }
                    prop_assert!(row.segments[covered..].iter().all(|&segment| segment == 0));
                    prop_assert!(row.scored[covered..].iter().all(|&scored| !scored));
                }
                prop_assert!(batch.rows.iter().any(|row| row.segments[batch.length - 1] != 0));
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
        }
    }

    #[test]
    fn too_long_and_unknown_examples_do_no_harm() {
        let examples = [
            example(0, 9),
            example(1, 0),
            Example {
                scored: vec![true; 3],
                ..example(2, 3)
            },
        ];
        let rows = pack(&examples, &[0, 7, 1, 2], 4, true);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].tokens, [0, 1, 2, 3]);
        assert_eq!(rows[1].scored, [false, true, true]);
        assert!(pack(&examples, &[0], 0, true).is_empty());
        assert!(batches(Vec::new(), 0).is_empty());
    }
}
