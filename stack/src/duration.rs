//! Spans of time as people write them: `"2h"`, `"10m"`, `"90s"`.

/// The units, largest first, with their length in milliseconds.
const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// The text is not a whole number followed by a unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a duration: write a whole number and one unit, as in \"2h\", \"10m\", \"90s\", \"500ms\" or \"7d\""
)]
pub struct DurationParseError(String);

/// Parses `"2h"` and the like to milliseconds.
///
/// # Errors
/// When the number, the unit or both are missing, or the span does not fit 64 bits.
pub fn parse_duration_ms(text: &str) -> Result<u64, DurationParseError> {
    let error = || DurationParseError(text.chars().take(40).collect());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| error())?;
    let (_, unit_ms) = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or_else(error)?;
    number.checked_mul(*unit_ms).ok_or_else(error)
}

/// The shortest spelling that [`parse_duration_ms`] reads back to the same number.
#[must_use]
pub fn format_duration_ms(ms: u64) -> String {
    let unit = UNITS
        .iter()
        .find(|(_, unit_ms)| ms > 0 && ms.is_multiple_of(*unit_ms));
    let (name, unit_ms) = unit.unwrap_or(&("s", 1_000));
    format!("{}{name}", ms / unit_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, ms) in [
            ("2h", 7_200_000),
            ("10m", 600_000),
            ("90s", 90_000),
            ("500ms", 500),
            ("7d", 604_800_000),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration_ms(text), Ok(ms), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in [
            "",
            "2",
            "h",
            "-2h",
            "1.5h",
            "2 h",
            "2H",
            "1h30m",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(parse_duration_ms(text).is_err(), "{text}");
        }
    }

    #[test]
    fn round_trips() {
        for ms in [
            0, 1, 999, 1_000, 90_000, 600_000, 7_200_000, 86_400_000, 90_061_001,
        ] {
            assert_eq!(parse_duration_ms(&format_duration_ms(ms)), Ok(ms));
        }
        assert_eq!(format_duration_ms(7_200_000), "2h");
        assert_eq!(format_duration_ms(90_000), "90s");
    }
}
