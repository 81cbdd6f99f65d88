//! The budget of one endpoint group, as a pure state machine with the time as input.
//!
//! Close keeps two windows per endpoint group, one for the key and one for the organization. Most answers report how
//! much of the tighter one remains and when it is renewed (close-api.md §2). The two are distinguished by their limits
//! and kept as [`Bucket`]s; a call is admitted when all buckets allow it. A report is older than the local state: calls
//! in flight are not in `remaining` yet, and are subtracted here. No limit is built in.
//!
//! **A share.** close-sync uses only a share of each window; the rest is for other integrations. If they use more than that,
//! what they are likely to spend until the window ends is left to them too: what they used in the last window, less what they
//! have used in this one. Others that speed up may therefore get a 429 in the first window in which they do. One call per window
//! is always admitted, to get a report, and a few more while others seem to need the rest.
//!
//! **Pacing.** A quarter of the budget is a burst, so that a single message never waits. The rest is spread evenly over
//! most of the window: a backlog then moves steadily instead of bursting and stalling, and searches have time to be
//! batched.
//!
//! **Hidden limits.** A 429 is obeyed whatever `remaining` says (close-api.md §2). If no used-up window explains it,
//! calls are also spaced out: the spacing doubles with each such 429 and shrinks while none comes.

#[cfg(test)]
mod tests;

use std::time::Duration;

use tokio::time::Instant;

use crate::close::rate_limit::headers::{LONGEST_WAIT, RateLimit};

/// The pause before the next try while no report is available.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// The maximum number of calls in flight before the first response.
const MAX_INITIAL_CALLS: u32 = 2;
/// The part of the budget of a window that is not paced.
const BURST: f64 = 0.25;
/// The part of the window over which the rest is spread. It is below 1 so that the last call is sent in time.
const SPREAD: f64 = 0.9;
/// The safety factor for the calls that others are expected to make.
const OTHERS_MARGIN: f64 = 1.1;
/// A call is made for another report after this part of a window, although others are expected to need the rest.
const LOOK_AGAIN: f64 = 0.25;
/// The assumed length of a window before Close reports it.
const DEFAULT_LENGTH: Duration = Duration::from_secs(1);
/// A bucket expires after this time without a report while other buckets have reports. Its limit may have changed.
const EXPIRY: Duration = Duration::from_mins(2);
/// The smallest and the largest spacing of calls after an unexplained 429.
const SPACING: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(10));
/// The spacing shrinks after this time without an unexplained 429.
const EASE_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Window {
    /// The part of each window that close-sync uses, above 0 and at most 1.
    share: f64,
    /// No call is admitted before, because of a 429.
    blocked_until: Option<Instant>,
    /// The minimum interval between calls after an unexplained 429, and when it was set.
    spacing: Option<(Duration, Instant)>,
    last_admitted: Option<Instant>,
    /// The buckets of the key and of the organization, as far as Close reported them.
    buckets: Vec<Bucket>,
    in_flight: u32,
    answered: bool,
    /// Calls made before the first report.
    calls_before_report: u32,
}

/// One bucket of Close, in its current window.
///
/// A response gives the end of the window only within the duration of the call, because Close counted the call at some
/// time between request and response. Two responses are about the same window if these ranges overlap.
#[derive(Debug)]
struct Bucket {
    limit: u32,
    /// The minimum number of calls that remain.
    remaining: u32,
    /// When the call that reported `remaining` was sent.
    latest_sent: Instant,
    /// Calls of close-sync in this window.
    used: u32,
    /// The minimum number of calls that others made in this window, and the expected number from the window before.
    others: u32,
    others_before: Option<f64>,
    /// The latest possible start of the window.
    began: Instant,
    /// The earliest possible end of the window.
    earliest_end: Instant,
    /// The latest possible end of the window. `None` until a response reports it.
    latest_end: Option<Instant>,
    /// The longest reported time to a reset, in this window and in the two reported before it. Their maximum is the best
    /// estimate of the length of a window.
    resets: [Duration; 3],
    reported_at: Instant,
}

/// The rate limit of an endpoint group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateLimitStatus {
    /// Calls that Close allows per window.
    pub limit: u32,
    /// Calls that remain in this window, according to the last report.
    pub remaining: u32,
    /// Time until the window is renewed.
    pub reset: Duration,
    /// The sustained rate of calls per second.
    pub rate: f64,
    /// The estimated calls of others per window.
    pub others: f64,
}

impl Window {
    /// A group without reports yet. close-sync may use `share` of it.
    pub(crate) fn new(share: f64) -> Self {
        Self {
            share,
            blocked_until: None,
            spacing: None,
            last_admitted: None,
            buckets: Vec::new(),
            in_flight: 0,
            answered: false,
            calls_before_report: 0,
        }
    }

    /// Takes a call out of the budget, or returns when to try again.
    pub(crate) fn admit(&mut self, now: Instant) -> Result<(), Instant> {
        if let Some(until) = self.blocked_until.filter(|until| now < *until) {
            return Err(until);
        }
        self.blocked_until = None;
        if !self.answered && self.in_flight >= MAX_INITIAL_CALLS {
            return Err(now + RETRY_AFTER);
        }
        if let (Some(spacing), Some(last)) = (self.spacing(now), self.last_admitted)
            && now < last + spacing
        {
            return Err(last + spacing);
        }
        let latest = self.buckets.iter().map(|bucket| bucket.reported_at).max();
        self.buckets.retain(|bucket| latest.is_none_or(|latest| latest < bucket.reported_at + EXPIRY));
        let (share, in_flight, last) = (self.share, self.in_flight, self.last_admitted);
        self.buckets.iter_mut().for_each(|bucket| bucket.renew(now, in_flight));
        let due = self.buckets.iter().filter_map(|bucket| bucket.due(now, share, in_flight, last)).max();
        if let Some(due) = due {
            return Err(due);
        }
        for bucket in &mut self.buckets {
            bucket.remaining = bucket.remaining.saturating_sub(1);
            bucket.used += 1;
        }
        if self.buckets.is_empty() {
            self.calls_before_report += 1;
        }
        self.last_admitted = Some(now);
        self.in_flight += 1;
        Ok(())
    }

    /// Returns the budget of an admitted call that is not made.
    pub(crate) fn give_back(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
        for bucket in &mut self.buckets {
            bucket.remaining += 1;
            bucket.used = bucket.used.saturating_sub(1);
        }
    }

    /// Records the end of a call that was sent at `sent`. `answered` says whether there was a response, which may have a
    /// report about the budget.
    pub(crate) fn done(&mut self, sent: Instant, now: Instant, answered: bool, report: Option<RateLimit>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.answered |= answered;
        let Some(report) = report else { return };
        match self.buckets.iter_mut().find(|bucket| bucket.limit == report.limit) {
            Some(bucket) => bucket.update(sent, now, report, self.in_flight),
            None => self.buckets.push(Bucket {
                limit: report.limit,
                remaining: report.remaining.saturating_sub(self.in_flight),
                latest_sent: sent,
                // For a second bucket, the number of calls in its window is unknown.
                used: if self.buckets.is_empty() { self.calls_before_report } else { 0 },
                others: 0,
                others_before: None,
                began: sent,
                earliest_end: sent + report.reset,
                latest_end: Some(now + report.reset),
                resets: [report.reset; 3],
                reported_at: now,
            }),
        }
    }

    /// Records a 429 for a call that was sent at `sent`, and the wait that Close asked for. `explained` says whether a
    /// used-up window explains the 429.
    pub(crate) fn refused(&mut self, sent: Instant, now: Instant, wait: Duration, explained: bool) {
        let until = now + wait.min(LONGEST_WAIT);
        self.blocked_until = Some(self.blocked_until.map_or(until, |known| known.max(until)));
        // A call that was in flight at the last 429 gives no new information.
        let is_new = self.spacing.is_none_or(|(_, set)| sent >= set);
        if !explained && is_new {
            let (min, max) = SPACING;
            let used = self.buckets.iter().filter(|bucket| bucket.used > 0);
            let interval = used.map(|bucket| now.saturating_duration_since(bucket.began) / bucket.used).max();
            let spacing = self.spacing(now).or(interval).unwrap_or_default();
            self.spacing = Some(((spacing * 2).clamp(min, max), now));
        }
    }

    /// The status of the tightest bucket. `None` before the first report.
    pub(crate) fn status(&self, now: Instant) -> Option<RateLimitStatus> {
        let spaced = self.spacing(now).map(|spacing| 1.0 / spacing.as_secs_f64());
        let statuses = self.buckets.iter().map(|bucket| bucket.status(now, self.share));
        let tightest = statuses.min_by(|one, other| one.rate.total_cmp(&other.rate))?;
        Some(RateLimitStatus {
            rate: spaced.map_or(tightest.rate, |spaced| spaced.min(tightest.rate)),
            ..tightest
        })
    }

    /// The current minimum interval between calls. It shrinks while no unexplained 429 comes.
    fn spacing(&self, now: Instant) -> Option<Duration> {
        let (spacing, set) = self.spacing?;
        let eased = now.saturating_duration_since(set).as_secs() / EASE_AFTER.as_secs();
        let shrunk = spacing.mul_f64(0.7_f64.powi(i32::try_from(eased).unwrap_or(i32::MAX)));
        (eased == 0 || shrunk > SPACING.0).then_some(shrunk)
    }
}

impl Bucket {
    fn length(&self) -> Duration {
        self.resets.iter().max().copied().unwrap_or_default().max(DEFAULT_LENGTH)
    }

    fn end(&self) -> Instant {
        self.latest_end.unwrap_or(self.began + self.length())
    }

    /// Updates the bucket with a report.
    fn update(&mut self, sent: Instant, now: Instant, report: RateLimit, in_flight: u32) {
        let (earliest_end, latest_end) = (sent + report.reset, now + report.reset);
        self.reported_at = now;
        // A late response about an earlier window.
        if latest_end < self.earliest_end || earliest_end <= self.began {
            return;
        }
        // Close renewed the window earlier than expected. This call is in the new window, and calls in flight may be.
        if self.latest_end.is_some_and(|end| earliest_end > end) {
            self.next(sent, in_flight);
            self.used += 1;
        }
        // Responses may arrive out of order; the call that was sent last has the most recent count. It may include some
        // calls in flight, so this is the minimum that remains. The next response is more precise.
        if sent >= self.latest_sent {
            self.latest_sent = sent;
            self.remaining = report.remaining.saturating_sub(in_flight);
        }
        // Assumes that Close has counted all calls of close-sync, also those in flight. Otherwise calls of others would
        // be overestimated.
        let others = report.limit.saturating_sub(report.remaining).saturating_sub(self.used);
        self.others = self.others.max(others);
        self.earliest_end = self.earliest_end.max(earliest_end);
        self.latest_end = Some(self.latest_end.map_or(latest_end, |end| end.min(latest_end)));
        self.resets[0] = self.resets[0].max(report.reset);
    }

    /// Starts the next window if this one is over.
    fn renew(&mut self, now: Instant, in_flight: u32) {
        let over = match self.latest_end {
            Some(end) => now >= end,
            // The first response in a window reports its end, and a call in flight may bring it.
            None => in_flight == 0 && now >= self.end(),
        };
        if over {
            self.next(now, in_flight);
        }
    }

    /// Starts the next window, which has no report yet. Its whole budget remains, except for calls in flight, which Close
    /// may count in it.
    fn next(&mut self, now: Instant, in_flight: u32) {
        if self.latest_end.is_some() {
            // What others spent after the last response was not reported, so it is extrapolated.
            self.others_before = Some(self.extrapolate_others(self.reported_at, 0.75));
            self.resets = [Duration::ZERO, self.resets[0], self.resets[1]];
        }
        self.remaining = self.limit.saturating_sub(in_flight);
        self.latest_sent = now;
        self.used = in_flight;
        self.others = 0;
        (self.began, self.earliest_end, self.latest_end) = (now, now, None);
    }

    /// Extrapolates the calls that others made until `until` to the whole window. The elapsed part counts as at least
    /// `min_part`, because a shorter part says little.
    fn extrapolate_others(&self, until: Instant, min_part: f64) -> f64 {
        let whole = self.end().saturating_duration_since(self.began).as_secs_f64().max(0.001);
        let part = until.saturating_duration_since(self.began).as_secs_f64() / whole;
        f64::from(self.others) / part.clamp(min_part, 1.0)
    }

    /// The calls per window that close-sync may make.
    fn own_budget(&self, share: f64) -> f64 {
        (f64::from(self.limit) * share).floor().max(1.0)
    }

    /// When the next call may be sent, after the `last` one. `None` if it may be sent now.
    fn due(&self, now: Instant, share: f64, in_flight: u32, last: Option<Instant>) -> Option<Instant> {
        // Close has not reported on this window yet. One call is admitted to get one, even if the last limit was 0.
        if self.latest_end.is_none() && self.used == 0 && in_flight == 0 {
            return None;
        }
        let end = self.end();
        let whole = end.saturating_duration_since(self.began).max(Duration::from_millis(1));
        let elapsed = now.saturating_duration_since(self.began).as_secs_f64() / whole.as_secs_f64();
        let soon = now + Duration::from_millis(1);

        let used = f64::from(self.used);
        let reported = self.reported_at.max(self.began).min(now);
        // If they make their calls evenly.
        let left = end.saturating_duration_since(reported).as_secs_f64() / whole.as_secs_f64();
        let evenly = |others: f64| others * OTHERS_MARGIN * left.min(1.0);
        let others = f64::from(self.others);
        let expected = match self.others_before {
            // They may make them at once: then few are left.
            Some(before) if others <= before => evenly(before).min(before * OTHERS_MARGIN - others),
            Some(_) => evenly(others),
            // In the first window there is only their rate so far.
            None => evenly(self.extrapolate_others(reported, 0.25)),
        };
        let spendable = (self.own_budget(share) - used).min(f64::from(self.remaining) - expected.ceil());
        if spendable < 1.0 {
            let is_used_up = self.remaining == 0 || used >= self.own_budget(share);
            // What others need is a guess, and a burst of theirs looks like a rate. Without a call, no report would correct it.
            let looks_again = last.is_none_or(|last| now >= last + whole.mul_f64(LOOK_AGAIN));
            if !is_used_up && in_flight == 0 && looks_again {
                return None;
            }
            // Others may make fewer calls than expected, so this is checked again before the end.
            let again = if is_used_up { end } else { (now + RETRY_AFTER).min(end) };
            return Some(if again > now { again } else { now + RETRY_AFTER });
        }
        let all = used + spendable;
        let burst = (all * BURST).ceil();
        if used + 1.0 <= burst + (all - burst) * (elapsed / SPREAD) {
            return None;
        }
        let at = SPREAD * (used + 1.0 - burst) / (all - burst);
        Some((self.began + whole.mul_f64(at.clamp(0.0, 1.0))).max(soon))
    }

    fn status(&self, now: Instant, share: f64) -> RateLimitStatus {
        let end = self.latest_end.filter(|end| now < *end);
        // An old report says nothing about the present, for example in a worker that is the standby now.
        let is_recent = now < self.reported_at + EXPIRY;
        let others = if is_recent { self.others_before.unwrap_or(0.0).max(self.others.into()) } else { 0.0 };
        let allowed = self.own_budget(share).min(f64::from(self.limit) - others).max(1.0);
        RateLimitStatus {
            limit: self.limit,
            remaining: if end.is_some() { self.remaining } else { self.limit },
            reset: end.map_or(Duration::ZERO, |end| end - now),
            rate: allowed / self.length().as_secs_f64(),
            others,
        }
    }
}
