//! The rate limits in the headers of a response (close-api.md §2).

use std::time::Duration;

/// The rate limit of an endpoint group, as reported by one response.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RateLimit {
    /// Calls per window.
    pub(crate) limit: u32,
    /// Calls that remain in this window.
    pub(crate) remaining: u32,
    /// Time until the window is renewed.
    pub(crate) reset: Duration,
}

/// The longest wait for one window, whatever a header says. The next response reports the window again.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_mins(5);

impl RateLimit {
    /// Reads the headers of a response. The current form is `RateLimit: limit=…, remaining=…, reset=…` with `,` or `;`.
    /// Without it, the older headers `ratelimit-*` and `x-rate-limit-*` are read. In 2022 Close sent both of these; the one
    /// with the smaller remaining part counts. Malformed headers count as absent.
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
        let remaining = |limit: &Self| f64::from(limit.remaining) / f64::from(limit.limit.max(1));
        let limits = ["ratelimit", "x-rate-limit"].into_iter().filter_map(triple);
        limits.min_by(|one, other| remaining(one).total_cmp(&remaining(other)))
    }

    fn parse(limit: &str, remaining: &str, reset: &str) -> Option<Self> {
        Some(Self { limit: limit.parse().ok()?, remaining: remaining.parse().ok()?, reset: seconds(reset)? })
    }
}

/// Parses the seconds in `reset` and `Retry-After`, which may have decimals.
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
    fn all_forms_of_the_headers_are_parsed() {
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
