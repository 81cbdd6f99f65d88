//! Ids, timestamps and the simulator's only random number generator.

use jiff::Timestamp;
use uuid::Uuid;

/// Generates ids and random numbers from a seed. The same seed gives the same sequence.
#[derive(Debug)]
pub(crate) struct Ids {
    seed: Uuid,
    counter: u64,
}

impl Ids {
    pub(crate) fn new(seed: Uuid) -> Self {
        Self { seed, counter: 0 }
    }

    /// A prefix and 43 base62 characters: the shape of most of Close's ids (close-api.md §1). Sorting by id
    /// gives a random order.
    pub(crate) fn make(&mut self, prefix: &str) -> String {
        let mut id = format!("{prefix}_");
        base62(self.next(), 22, &mut id);
        base62(self.next(), 21, &mut id);
        id
    }

    /// A random number from 0 (inclusive) to 1 (exclusive).
    pub(crate) fn fraction(&mut self) -> f64 {
        let bytes = self.next().to_be_bytes();
        f64::from(u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]))
            / (f64::from(u32::MAX) + 1.0)
    }

    fn next(&mut self) -> u128 {
        self.counter += 1;
        Uuid::new_v5(&self.seed, &self.counter.to_be_bytes()).as_u128()
    }
}

fn base62(mut number: u128, digits: usize, onto: &mut String) {
    const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    for _ in 0..digits {
        let digit = usize::try_from(number % 62).unwrap_or_default();
        onto.push(char::from(ALPHABET[digit]));
        number /= 62;
    }
}

/// Formats a timestamp as Close does: UTC as `+00:00` and six fraction digits, the last three always zero
/// (close-api.md §1).
pub(crate) fn format_timestamp(timestamp: Timestamp) -> String {
    let milliseconds = Timestamp::from_millisecond(timestamp.as_millisecond()).unwrap_or(timestamp);
    milliseconds.strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00").to_string()
}

/// Formats a timestamp without an offset, as the dates of events are.
pub(crate) fn format_naive(timestamp: Timestamp) -> String {
    format_timestamp(timestamp).trim_end_matches("+00:00").to_owned()
}

/// Parses a timestamp. Without an offset it is UTC; a date alone is midnight of that day.
pub(crate) fn parse_timestamp(text: &str) -> Option<Timestamp> {
    text.parse().ok().or_else(|| {
        let civil: jiff::civil::DateTime = text.parse().ok()?;
        jiff::tz::TimeZone::UTC.to_timestamp(civil).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_closes_shape_and_do_not_repeat() {
        let mut ids = Ids::new(Uuid::nil());
        let made: std::collections::HashSet<String> = (0..1000).map(|_| ids.make("lead")).collect();
        assert_eq!(made.len(), 1000);
        for id in made {
            let tail = id.strip_prefix("lead_").unwrap();
            assert!(tail.len() == 43 && tail.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{id}");
        }
    }

    #[test]
    fn fractions_lie_between_zero_and_one() {
        let mut ids = Ids::new(Uuid::nil());
        let fractions: Vec<f64> = (0..1000).map(|_| ids.fraction()).collect();
        assert!(fractions.iter().all(|fraction| (0.0..1.0).contains(fraction)));
        assert!(
            fractions.iter().any(|fraction| *fraction < 0.1)
                && fractions.iter().any(|fraction| *fraction > 0.9)
        );
    }

    #[test]
    fn timestamps_have_closes_format_and_parse_back() {
        let rewritten = |text: &str| parse_timestamp(text).map(format_timestamp);
        for (text, written) in [
            ("2013-02-20T05:30:24.844Z", Some("2013-02-20T05:30:24.844000+00:00")),
            ("2013-02-20T05:30:24.844999+00:00", Some("2013-02-20T05:30:24.844000+00:00")),
            ("2013-02-20T05:30:24+02:00", Some("2013-02-20T03:30:24.000000+00:00")),
            ("2013-02-20T05:30:24", Some("2013-02-20T05:30:24.000000+00:00")),
            ("2013-02-20", Some("2013-02-20T00:00:00.000000+00:00")),
            ("yesterday", None),
        ] {
            assert_eq!(rewritten(text).as_deref(), written, "{text}");
        }
    }
}
