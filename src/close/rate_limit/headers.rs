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
    /// Without it, or when it cannot be read, the headers `ratelimit-*` and `x-rate-limit-*` are read (close-api.md §15,
    /// 12). In 2022 Close sent both of these; the one with the smaller remaining part counts. Malformed headers count as
    /// absent.
    pub(crate) fn read<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let joint = || {
            let all = header("ratelimit")?;
            let item = |name: &str| {
                all.split([',', ';']).find_map(|item| {
                    let (key, value) = item.split_once('=')?;
                    key.trim().eq_ignore_ascii_case(name).then_some(value.trim())
                })
            };
            Self::parse(item("limit")?, item("remaining")?, item("reset")?)
        };
        let triple = |prefix: &str| {
            let part = |name: &str| header(&format!("{prefix}-{name}")).map(str::trim);
            Self::parse(part("limit")?, part("remaining")?, part("reset")?)
        };
        let remaining = |limit: &Self| f64::from(limit.remaining) / f64::from(limit.limit.max(1));
        let triples = || {
            let limits = ["ratelimit", "x-rate-limit"].into_iter().filter_map(triple);
            limits.min_by(|one, other| remaining(one).total_cmp(&remaining(other)))
        };
        joint().or_else(triples)
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

/// The wait that `Retry-After` asks for: seconds, or a date. A date is compared with that of the answer, because clocks
/// differ.
pub(crate) fn retry_after<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Duration> {
    let text = header("retry-after")?;
    let date = |text: &str| {
        let parsed = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text.trim());
        parsed.ok()
    };
    let until = || {
        let now = header("date").and_then(date).unwrap_or_else(jiff::Timestamp::now);
        let wait = Duration::try_from(date(text)?.duration_since(now)).unwrap_or_default();
        Some(wait.min(LONGEST_WAIT))
    };
    seconds(text).or_else(until)
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
        let cases: [(&[(&str, &str)], _); 13] = [
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
            // As recorded in 2026: the joint header counts, not the triple of another remaining.
            (
                &[
                    ("ratelimit", "limit=100; remaining=100; reset=1"),
                    ("ratelimit-limit", "100"),
                    ("ratelimit-remaining", "99"),
                    ("ratelimit-reset", "1"),
                ],
                limit(100, 100, 1000),
            ),
            (
                &[
                    ("ratelimit", "\"default\";r=50;t=30"),
                    ("ratelimit-limit", "100"),
                    ("ratelimit-remaining", "99"),
                    ("ratelimit-reset", "1"),
                ],
                limit(100, 99, 1000),
            ),
            (
                &[
                    ("ratelimit", "limit=16, remaining=x, reset=1"),
                    ("x-rate-limit-limit", "16"),
                    ("x-rate-limit-remaining", "3"),
                    ("x-rate-limit-reset", "0.5"),
                ],
                limit(16, 3, 500),
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

    #[test]
    fn retry_after_is_a_number_of_seconds_or_a_date() {
        let wait = |text, date| {
            let header = |name: &str| match name {
                "retry-after" => Some(text),
                "date" => date,
                _ => None,
            };
            retry_after(header)
        };
        let now = Some("Sun, 29 Nov 2026 15:00:00 GMT");
        let cases = [
            ("3", now, Some(3)),
            ("0", now, Some(0)),
            ("86400", now, Some(LONGEST_WAIT.as_secs())),
            ("Sun, 29 Nov 2026 15:00:07 GMT", now, Some(7)),
            ("Sun, 29 Nov 2026 14:59:00 GMT", now, Some(0)),
            ("Mon, 30 Nov 2026 15:00:00 GMT", now, Some(LONGEST_WAIT.as_secs())),
            ("Thu, 01 Jan 1970 00:00:00 GMT", None, Some(0)),
            ("soon", now, None),
            ("-1", now, None),
        ];
        for (text, date, expected) in cases {
            assert_eq!(wait(text, date), expected.map(Duration::from_secs), "{text}");
        }
    }
}
