//! Contamination by n-grams: a record overlaps another set when they share a run of 13 words
//! (the size used for GPT-3's test sets, Brown et al. 2020, appendix C).
//!
//! Words are maximal runs of letters and digits, lowercased. A record shorter than 13 words is
//! compared whole, against whole records only, so that common short phrases do not condemn long ones.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Words in a gram.
pub const GRAM_WORDS: usize = 13;

/// Finds which of some texts share a gram with others that stream by.
///
/// Grams are kept as 64-bit hashes: a false hit among 10^8 comparisons with 10^6 grams has a chance
/// of about 5 in a million.
pub struct GramIndex {
    /// Each gram of the indexed texts, and the first passer-by seen to share it.
    grams: HashMap<u64, Option<usize>>,
    passers: Vec<String>,
}

impl GramIndex {
    /// Indexes the grams of `texts`.
    pub fn new<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let grams = texts.flat_map(grams_of).map(|gram| (gram, None)).collect();
        Self {
            grams,
            passers: Vec::new(),
        }
    }

    /// Lets another text pass by; `label` is kept if it shares a gram not shared before.
    pub fn pass(&mut self, text: &str, label: impl FnOnce() -> String) {
        let position = self.passers.len();
        let mut shared = false;
        for gram in grams_of(text) {
            if let Some(passer @ None) = self.grams.get_mut(&gram) {
                *passer = Some(position);
                shared = true;
            }
        }
        if shared {
            self.passers.push(label());
        }
    }

    /// Label of a text that passed by and shares a gram with `text`, one of those indexed.
    pub fn overlap(&self, text: &str) -> Option<&str> {
        let position = grams_of(text)
            .into_iter()
            .find_map(|gram| *self.grams.get(&gram)?)?;
        self.passers.get(position).map(String::as_str)
    }
}

fn grams_of(text: &str) -> Vec<u64> {
    let words: Vec<u64> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(|word| hash(&word.to_lowercase()))
        .collect();
    if words.is_empty() {
        return Vec::new();
    }
    if words.len() < GRAM_WORDS {
        return vec![hash(&("whole", &words))];
    }
    words
        .windows(GRAM_WORDS)
        .map(|window| hash(&window))
        .collect()
}

// DefaultHasher::new() has fixed keys: the same within a process, which is all that is asked.
fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: &str =
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen";

    fn overlap(indexed: &str, passing: &str) -> bool {
        let mut index = GramIndex::new(["something else", indexed].into_iter());
        index.pass(passing, || "gate record 1".to_owned());
        assert_eq!(index.overlap("something else"), None);
        index.overlap(indexed) == Some("gate record 1")
    }

    #[test]
    fn thirteen_shared_words_overlap_whatever_the_case_and_punctuation() {
        assert!(overlap(
            LONG,
            "So: TWO, three four; five six seven (eight) nine ten eleven twelve thirteen. Fourteen!"
        ));
    }

    #[test]
    fn twelve_shared_words_do_not() {
        assert!(!overlap(
            LONG,
            "one two three four five six seven eight nine ten eleven twelve 13 and more words"
        ));
    }

    #[test]
    fn short_records_compare_whole() {
        assert!(overlap("How many eggs?", "how many EGGS"));
        assert!(!overlap(
            "How many eggs?",
            "how many eggs are left in the basket"
        ));
    }

    #[test]
    fn text_without_words_overlaps_nothing() {
        assert!(!overlap("?!", "--"));
    }

    #[test]
    fn every_record_that_shares_the_gram_is_found() {
        let twice = [format!("{LONG} first"), format!("{LONG} second")];
        let mut index = GramIndex::new(twice.iter().map(String::as_str));
        index.pass(LONG, || "gate".to_owned());
        assert!(twice.iter().all(|text| index.overlap(text) == Some("gate")));
    }
}
