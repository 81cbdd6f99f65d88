//! What Close's answers say about its rate limits (close-api.md §2).

use std::time::Duration;

/// What an answer said about the budget of its endpoint group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RateLimit {
    /// Calls per window.
    pub(crate) limit: u32,
    /// Calls left in this window.
    pub(crate) remaining: u32,
    /// Time until the window is renewed.
    pub(crate) reset: Duration,
}

/// Never wait longer than this for one window, whatever a header says: the next answer tells anew.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_mins(5);

impl RateLimit {
    /// Reads the headers of an answer: the present `RateLimit: limit=…, remaining=…, reset=…` with
    /// `,` or `;`, else of the older `ratelimit-*` and `x-rate-limit-*` triples, which came together in
    /// 2022, the one of which less is left. Anything malformed counts as absent.
    pub(crate) fn read<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        if let Some(all) = header("ratelimit") {
            let item = |name: &str| {
                all.split([',', ';']).find_map(|item| {
                    let (key, value) = item.split_once('=')?;
                    key.trim().eq_ignore_ascii_case(name).then_some(value.trim())
                })
            };
            return Self::parse(item("limit")?, item("remaining")?, item("reset")?);
        }
        let triple = |prefix: &str| {
            let part = |name: &str| header(&format!("{prefix}-{name}")).map(str::trim);
            Self::parse(part("limit")?, part("remaining")?, part("reset")?)
        };
        let left = |told: &Self| f64::from(told.remaining) / f64::from(told.limit.max(1));
        let told = ["ratelimit", "x-rate-limit"].into_iter().filter_map(triple);
        told.min_by(|one, other| left(one).total_cmp(&left(other)))
    }

    fn parse(limit: &str, remaining: &str, reset: &str) -> Option<Self> {
        Some(Self { limit: limit.parse().ok()?, remaining: remaining.parse().ok()?, reset: seconds(reset)? })
    }
}

/// Reads seconds, decimals allowed, as in `reset` and `Retry-After`.
pub(crate) fn seconds(text: &str) -> Option<Duration> {
    let seconds = Duration::try_from_secs_f64(text.trim().parse().ok()?).ok()?;
    Some(seconds.min(LONGEST_WAIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(headers: &[(&str, &str)]) -> Option<RateLimit> {
        RateLimit::read(|name| headers.iter().find(|(key, _)| *key == name).map(|(_, value)| *value))
    }

    #[test]
    fn every_form_of_the_header_is_read() {
        let limit = |limit, remaining, millis| {
            Some(RateLimit { limit, remaining, reset: Duration::from_millis(millis) })
        };
        let cases: [(&[(&str, &str)], _); 10] = [
            (&[("ratelimit", "limit=100, remaining=50, reset=5")], limit(100, 50, 5000)),
            (&[("ratelimit", "reset=0.25;remaining=0;limit=16")], limit(16, 0, 250)),
            (
                &[("ratelimit-limit", "60"), ("ratelimit-remaining", "59"), ("ratelimit-reset", "1")],
                limit(60, 59, 1000),
            ),
            (
                &[
                    ("x-rate-limit-limit", "600"),
                    ("x-rate-limit-remaining", "1"),
                    ("x-rate-limit-reset", "13.5"),
                ],
                limit(600, 1, 13500),
            ),
            (
                &[
                    ("ratelimit-limit", "60"),
                    ("ratelimit-remaining", "59"),
                    ("ratelimit-reset", "1"),
                    ("x-rate-limit-limit", "240"),
                    ("x-rate-limit-remaining", "20"),
                    ("x-rate-limit-reset", "3"),
                ],
                limit(240, 20, 3000),
            ),
            (&[("ratelimit", "limit=16, remaining=x, reset=1")], None),
            (&[("ratelimit", "limit=16")], None),
            (&[("ratelimit", "limit=16, remaining=1, reset=-1")], None),
            (&[("ratelimit", "limit=16, remaining=1, reset=1e99")], None),
            (&[], None),
        ];
        for (headers, expected) in cases {
            assert_eq!(read(headers), expected, "{headers:?}");
        }
    }
}
