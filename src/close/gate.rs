//! The rate gate: calls wait for budget instead of running into 429.
//!
//! Close keeps a budget per endpoint group and tells, with most answers, how much of it is left and
//! when it is renewed (close-api.md §2). [`Window`] remembers that for one group; it is a pure state
//! machine with the time as input. [`Gate`] is the thin wait around it.
//!
//! What Close tells is older than what we know: calls under way are not in `remaining` yet. They are
//! counted against it here, so that many calls at once cannot overdraw the budget together. No limit
//! is built in; before the first answer of a group calls go out freely (close-api.md §12, 1).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What an answer said about the budget of its endpoint group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateLimit {
    /// Calls per window.
    pub limit: u32,
    /// Calls left in this window.
    pub remaining: u32,
    /// Time until the window is renewed.
    pub reset: Duration,
}

/// Never wait longer than this for one window, whatever a header says: the next answer tells anew.
const LONGEST_WAIT: Duration = Duration::from_mins(5);
/// Wait this long after a 429 that does not say how long (close-api.md §2, Close's own client).
pub const DEFAULT_WAIT: Duration = Duration::from_secs(2);
/// How soon to ask again while nothing is told of a new window.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// Wait at least this long after a 429.
pub const SHORTEST_WAIT: Duration = Duration::from_millis(250);

impl RateLimit {
    /// Reads the headers of an answer: the present `RateLimit: limit=…, remaining=…, reset=…` with
    /// `,` or `;`, else the older `ratelimit-*` and `x-rate-limit-*` triples. Anything malformed
    /// counts as absent.
    pub fn read<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        if let Some(all) = header("ratelimit") {
            let item = |name: &str| {
                all.split([',', ';']).find_map(|item| {
                    let (key, value) = item.split_once('=')?;
                    key.trim().eq_ignore_ascii_case(name).then_some(value.trim())
                })
            };
            return Self::parse(item("limit")?, item("remaining")?, item("reset")?);
        }
        ["ratelimit", "x-rate-limit"].iter().find_map(|prefix| {
            let part = |name: &str| header(&format!("{prefix}-{name}")).map(str::trim);
            Self::parse(part("limit")?, part("remaining")?, part("reset")?)
        })
    }

    fn parse(limit: &str, remaining: &str, reset: &str) -> Option<Self> {
        Some(Self { limit: limit.parse().ok()?, remaining: remaining.parse().ok()?, reset: seconds(reset)? })
    }
}

/// Reads seconds, decimals allowed, as in `reset` and `Retry-After`.
pub fn seconds(text: &str) -> Option<Duration> {
    let seconds = Duration::try_from_secs_f64(text.trim().parse().ok()?).ok()?;
    Some(seconds.min(LONGEST_WAIT))
}

/// The budget of one endpoint group as far as it is known.
#[derive(Debug, Default)]
pub struct Window {
    /// Nothing goes out before: a 429 said so.
    closed_until: Option<Instant>,
    /// Calls left and when they are renewed.
    budget: Option<Budget>,
    /// Calls under way.
    in_flight: u32,
}

/// What is known of one window of Close's.
///
/// An answer tells its end only within the time the call took: Close counted somewhere between the
/// sending and the answer. Two answers speak of one window when these spans overlap.
#[derive(Debug)]
struct Budget {
    limit: u32,
    left: u32,
    /// It had begun by then.
    began: Instant,
    /// It does not end before.
    earliest_end: Instant,
    /// It has ended by then. `None` until an answer tells.
    latest_end: Option<Instant>,
}

impl Budget {
    /// The next window, of which nothing is told yet: full, but for the calls that are still under way and
    /// may land in it.
    fn next(&self, now: Instant, in_flight: u32) -> Self {
        let left = self.limit.saturating_sub(in_flight);
        Self { limit: self.limit, left, began: now, earliest_end: now, latest_end: None }
    }
}

impl Window {
    /// Takes a call out of the budget, or tells when to ask again.
    pub fn admit(&mut self, now: Instant) -> Result<(), Instant> {
        if let Some(until) = self.closed_until {
            if now < until {
                return Err(until);
            }
            self.closed_until = None;
        }
        if let Some(budget) = &mut self.budget {
            let over = match budget.latest_end {
                Some(end) => now >= end,
                // Its first answer tells when it ends. Where no call is under way, none will.
                None => self.in_flight == 0,
            };
            if over {
                *budget = budget.next(now, self.in_flight);
            }
            if budget.left == 0 {
                return Err(budget.latest_end.unwrap_or(now + ASK_AGAIN));
            }
            budget.left -= 1;
        }
        self.in_flight += 1;
        Ok(())
    }

    /// A call that was sent at `sent` ended, perhaps with news about the budget.
    pub fn done(&mut self, sent: Instant, now: Instant, told: Option<RateLimit>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let Some(RateLimit { limit, remaining, reset }) = told else { return };
        let left = remaining.saturating_sub(self.in_flight);
        let (earliest_end, latest_end) = (sent + reset, now + reset);
        self.budget = Some(match self.budget.take() {
            // Late news of a window that is over.
            Some(known) if latest_end < known.earliest_end || earliest_end <= known.began => known,
            // Answers overtake each other: within one window the budget only shrinks.
            Some(known) if known.latest_end.is_none_or(|end| earliest_end <= end) => Budget {
                limit,
                left: left.min(known.left),
                began: known.began,
                earliest_end: known.earliest_end.max(earliest_end),
                latest_end: Some(known.latest_end.map_or(latest_end, |end| end.min(latest_end))),
            },
            Some(_) | None => Budget { limit, left, began: sent, earliest_end, latest_end: Some(latest_end) },
        });
    }

    /// Close refused a call with 429. `remaining` may well be above zero: hidden limits exist
    /// (close-api.md §2), so the refusal itself is obeyed.
    pub fn refused(&mut self, now: Instant, wait: Duration) {
        let until = now + wait.min(LONGEST_WAIT);
        self.closed_until = Some(self.closed_until.map_or(until, |known| known.max(until)));
    }
}

/// The wait in front of the calls of one endpoint group.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<Mutex<Window>>);

impl Gate {
    /// Waits until the budget allows one more call. Tells how long it took, for the metrics.
    pub async fn enter(&self) -> (Permit, Duration) {
        let start = Instant::now();
        loop {
            let admitted = self.window(|window| window.admit(Instant::now()));
            match admitted {
                Ok(()) => {
                    let permit = Permit { gate: self.clone(), sent: Instant::now(), told: None };
                    return (permit, start.elapsed());
                }
                Err(at) => tokio::time::sleep_until(at.into()).await,
            }
        }
    }

    fn window<T>(&self, with: impl FnOnce(&mut Window) -> T) -> T {
        // A panic while the lock is held leaves numbers, not half-written structures.
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One call taken out of the budget. Dropping it ends the call.
#[derive(Debug)]
pub struct Permit {
    gate: Gate,
    sent: Instant,
    told: Option<RateLimit>,
}

impl Permit {
    /// Notes what the answer said about the budget.
    pub fn told(&mut self, limit: Option<RateLimit>) {
        self.told = limit;
    }

    /// Closes the gate: Close answered 429.
    pub fn refused(&self, wait: Duration) {
        self.gate.window(|window| window.refused(Instant::now(), wait));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.window(|window| window.done(self.sent, Instant::now(), self.told));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(headers: &[(&str, &str)]) -> Option<RateLimit> {
        RateLimit::read(|name| headers.iter().find(|(key, _)| *key == name).map(|(_, value)| *value))
    }

    #[test]
    fn every_form_of_the_header_is_read() {
        let limit = |limit, remaining, millis| {
            Some(RateLimit { limit, remaining, reset: Duration::from_millis(millis) })
        };
        let cases: [(&[(&str, &str)], _); 9] = [
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
    fn a_spent_window_waits_for_its_reset_and_a_429_for_its_own() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut window = Window::default();
        window.admit(start).unwrap();
        window.done(start, start, Some(RateLimit { limit: 2, remaining: 1, reset: 8 * second }));
        assert_eq!(window.admit(start), Ok(()));
        assert_eq!(window.admit(start + second), Err(start + 8 * second));
        window.done(start, start + second, None);
        assert_eq!(window.admit(start + 8 * second), Ok(()));
        window.refused(start + 8 * second, 3 * second);
        assert_eq!(window.admit(start + 9 * second), Err(start + 11 * second));
        assert_eq!(window.admit(start + 11 * second), Ok(()));
    }

    #[test]
    fn calls_under_way_count_against_what_is_left() {
        let start = Instant::now();
        let told = RateLimit { limit: 10, remaining: 2, reset: Duration::from_secs(8) };
        let mut window = Window::default();
        for _ in 0..3 {
            window.admit(start).unwrap();
        }
        window.done(start, start, Some(told));
        assert!(window.admit(start).is_err(), "two are left and two are under way");
    }

    proptest! {
        /// Close's window, simulated: `limit` calls per window, told with every answer. However calls
        /// are timed and however late the answers come, none is sent that would be refused.
        #[test]
        fn no_call_is_sent_into_a_spent_window(
            limit in 1u32..6,
            gaps in proptest::collection::vec((0u64..900, 0u64..300), 1..120),
        ) {
            let start = Instant::now();
            let length = Duration::from_secs(2);
            let mut window = Window::default();
            let (mut now, mut window_start, mut used) = (start, start, 0);
            let mut answers: Vec<(Instant, Instant, RateLimit)> = Vec::new();
            let mut known = false;
            for (gap, delay) in gaps {
                now += Duration::from_millis(gap);
                answers.sort_by_key(|(at, ..)| *at);
                while answers.first().is_some_and(|(at, ..)| *at <= now) {
                    let (at, sent, told) = answers.remove(0);
                    window.done(sent, at, Some(told));
                    known = true;
                }
                // Nothing is known before the first answer: only one call at a time until then.
                if !known && !answers.is_empty() {
                    continue;
                }
                if window.admit(now).is_ok() {
                    while now >= window_start + length {
                        window_start += length;
                        used = 0;
                    }
                    used += 1;
                    prop_assert!(used <= limit, "call {used} of {limit}");
                    let reset = window_start + length - now;
                    let told = RateLimit { limit, remaining: limit - used, reset };
                    answers.push((now + Duration::from_millis(delay), now, told));
                }
            }
        }
    }
}
