//! The budget of one endpoint group, as a pure state machine with the time as input.
//!
//! Close keeps two windows per endpoint group, one for the key and one for the organization. Most answers report how
//! much of the tighter one remains and when it is renewed (close-api.md §2). The two are distinguished by their limits
//! and kept as [`Bucket`]s; a call is admitted when all buckets allow it. A report is older than our own state: calls
//! under way are not in `remaining` yet, and are subtracted here. No limit is built in.
//!
//! **A share.** Only a share of each window is ours; the rest is for other integrations. When they spend more than that,
//! what they are likely to spend until the window ends is left to them too. One call per window is always admitted, to
//! get a report.
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

/// How soon to try again before the first report.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// The most calls under way before the first answer.
const FIRST_CALLS: u32 = 2;
/// The part of a window's budget that is not paced.
const BURST: f64 = 0.25;
/// The part of the window over which the rest is spread. Below 1, so that the last call does not miss the end.
const SPREAD: f64 = 0.9;
/// How much more than before others may spend.
const CAUTION: f64 = 1.1;
/// The presumed length of a window before Close reports it.
const PRESUMED_LENGTH: Duration = Duration::from_secs(1);
/// A bucket without a report for this long, while others have reports, is forgotten: its limit may have changed.
const FORGOTTEN: Duration = Duration::from_mins(2);
/// The smallest and the largest spacing of calls after an unexplained 429.
const SPACING: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(10));
/// The spacing shrinks after this time without an unexplained 429.
const EASE_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Window {
    /// The part of each window that is ours, above 0 and at most 1.
    share: f64,
    /// Nothing goes out before: a 429 said so.
    closed_until: Option<Instant>,
    /// Distance of calls, and when it was set: a hidden limit struck.
    spacing: Option<(Duration, Instant)>,
    last_admitted: Option<Instant>,
    /// The key's and the organization's, as far as reported.
    buckets: Vec<Bucket>,
    /// Calls under way.
    in_flight: u32,
    answered: bool,
    /// Calls made before the first report.
    before_report: u32,
}

/// One of Close's buckets, in its present window.
///
/// An answer gives the end of a window only within the duration of the call, because Close counted at some time between
/// sending and answer. Two answers are about one window when these ranges overlap.
#[derive(Debug)]
struct Bucket {
    limit: u32,
    /// Calls left, at least.
    left: u32,
    /// When the call that reported it was sent.
    latest_sent: Instant,
    /// Calls of ours.
    used: u32,
    /// Calls of others, at least, and in the window before.
    others: u32,
    others_before: Option<f64>,
    /// It had begun by then.
    began: Instant,
    /// It does not end before.
    earliest_end: Instant,
    /// It has ended by then. `None` until an answer reports it.
    latest_end: Option<Instant>,
    /// The longest times to a reset that were reported in this window and in the last ones that were reported:
    /// their maximum is the length of a window, as far as known.
    resets: [Duration; 3],
    /// The time of the last report.
    reported_at: Instant,
}

/// What is known about the rate limit of an endpoint group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateLimitStatus {
    /// Calls Close allows per window.
    pub limit: u32,
    /// Calls left in this window, as far as known.
    pub remaining: u32,
    /// Time until it is renewed.
    pub reset: Duration,
    /// Calls a second that may be made for long.
    pub rate: f64,
    /// Calls others make in a window, as far as noticed.
    pub others: f64,
}

impl Window {
    /// A group nothing is known of yet, of which `share` is ours.
    pub(crate) fn new(share: f64) -> Self {
        Self {
            share,
            closed_until: None,
            spacing: None,
            last_admitted: None,
            buckets: Vec::new(),
            in_flight: 0,
            answered: false,
            before_report: 0,
        }
    }

    /// Takes a call out of the budget, or returns when to try again.
    pub(crate) fn admit(&mut self, now: Instant) -> Result<(), Instant> {
        if let Some(until) = self.closed_until.filter(|until| now < *until) {
            return Err(until);
        }
        self.closed_until = None;
        if !self.answered && self.in_flight >= FIRST_CALLS {
            return Err(now + ASK_AGAIN);
        }
        if let (Some(spacing), Some(last)) = (self.spacing(now), self.last_admitted)
            && now < last + spacing
        {
            return Err(last + spacing);
        }
        let latest = self.buckets.iter().map(|bucket| bucket.reported_at).max();
        self.buckets.retain(|bucket| latest.is_none_or(|latest| latest < bucket.reported_at + FORGOTTEN));
        let (share, in_flight) = (self.share, self.in_flight);
        self.buckets.iter_mut().for_each(|bucket| bucket.renew(now, in_flight));
        if let Some(due) = self.buckets.iter().filter_map(|bucket| bucket.due(now, share, in_flight)).max() {
            return Err(due);
        }
        for bucket in &mut self.buckets {
            bucket.left = bucket.left.saturating_sub(1);
            bucket.used += 1;
        }
        if self.buckets.is_empty() {
            self.before_report += 1;
        }
        self.last_admitted = Some(now);
        self.in_flight += 1;
        Ok(())
    }

    /// A call that was admitted is not made.
    pub(crate) fn give_back(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
        for bucket in &mut self.buckets {
            bucket.left += 1;
            bucket.used = bucket.used.saturating_sub(1);
        }
    }

    /// A call that was sent at `sent` ended, perhaps with a report about the budget. `answered`: with an answer.
    pub(crate) fn done(&mut self, sent: Instant, now: Instant, answered: bool, report: Option<RateLimit>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.answered |= answered;
        let Some(report) = report else { return };
        match self.buckets.iter_mut().find(|bucket| bucket.limit == report.limit) {
            Some(bucket) => bucket.update(sent, now, report, self.in_flight),
            None => self.buckets.push(Bucket {
                limit: report.limit,
                left: report.remaining.saturating_sub(self.in_flight),
                latest_sent: sent,
                // Of a second bucket it is not known how many fell into its window.
                used: if self.buckets.is_empty() { self.before_report } else { 0 },
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

    /// Close refused a call that was sent at `sent` with 429, and asked to wait. `explained`: by a window that
    /// is used up.
    pub(crate) fn refused(&mut self, sent: Instant, now: Instant, wait: Duration, explained: bool) {
        let until = now + wait.min(LONGEST_WAIT);
        self.closed_until = Some(self.closed_until.map_or(until, |known| known.max(until)));
        // Calls that were under way when the last refusal came carry no new information.
        let is_new = self.spacing.is_none_or(|(_, set)| sent >= set);
        if !explained && is_new {
            let (closest, widest) = SPACING;
            let paces = self.buckets.iter().filter(|bucket| bucket.used > 0);
            let pace = paces.map(|bucket| now.saturating_duration_since(bucket.began) / bucket.used).max();
            let spacing = self.spacing(now).or(pace).unwrap_or_default();
            self.spacing = Some(((spacing * 2).clamp(closest, widest), now));
        }
    }

    /// The status of the narrowest bucket, if Close reported any.
    pub(crate) fn status(&self, now: Instant) -> Option<RateLimitStatus> {
        let spaced = self.spacing(now).map(|spacing| 1.0 / spacing.as_secs_f64());
        let statuses = self.buckets.iter().map(|bucket| bucket.status(now, self.share));
        let narrowest = statuses.min_by(|one, other| one.rate.total_cmp(&other.rate))?;
        Some(RateLimitStatus {
            rate: spaced.map_or(narrowest.rate, |spaced| spaced.min(narrowest.rate)),
            ..narrowest
        })
    }

    /// The distance of calls now: they move closer while no hidden limit strikes.
    fn spacing(&self, now: Instant) -> Option<Duration> {
        let (spacing, set) = self.spacing?;
        let eased = now.saturating_duration_since(set).as_secs() / EASE_AFTER.as_secs();
        let closer = spacing.mul_f64(0.7_f64.powi(i32::try_from(eased).unwrap_or(i32::MAX)));
        (eased == 0 || closer > SPACING.0).then_some(closer)
    }
}

impl Bucket {
    fn length(&self) -> Duration {
        self.resets.iter().max().copied().unwrap_or_default().max(PRESUMED_LENGTH)
    }

    fn end(&self) -> Instant {
        self.latest_end.unwrap_or(self.began + self.length())
    }

    /// Updates the bucket from an answer.
    fn update(&mut self, sent: Instant, now: Instant, report: RateLimit, in_flight: u32) {
        let (earliest_end, latest_end) = (sent + report.reset, now + report.reset);
        self.reported_at = now;
        // A late answer about a window that is over.
        if latest_end < self.earliest_end || earliest_end <= self.began {
            return;
        }
        // Close renewed it before we thought so: this call is in it, and those under way may be.
        if self.latest_end.is_some_and(|end| earliest_end > end) {
            self.next(sent, in_flight);
            self.used += 1;
        }
        // Answers overtake each other: the call that was sent last knows most. Of those under way it may know
        // some already, so that this is the least that is left; the next answer is more precise.
        if sent >= self.latest_sent {
            self.latest_sent = sent;
            self.left = report.remaining.saturating_sub(in_flight);
        }
        // As if all of ours were counted, those still under way too: phantoms would cost budget.
        let others = report.limit.saturating_sub(report.remaining).saturating_sub(self.used);
        self.others = self.others.max(others);
        self.earliest_end = self.earliest_end.max(earliest_end);
        self.latest_end = Some(self.latest_end.map_or(latest_end, |end| end.min(latest_end)));
        self.resets[0] = self.resets[0].max(report.reset);
    }

    /// Begins the next window when this one is over.
    fn renew(&mut self, now: Instant, in_flight: u32) {
        let over = match self.latest_end {
            Some(end) => now >= end,
            // The first answer in it reports its end; a call under way may bring it.
            None => in_flight == 0 && now >= self.end(),
        };
        if over {
            self.next(now, in_flight);
        }
    }

    /// Starts the next window, without a report yet: full, but for the calls that are still under way and may
    /// land in it.
    fn next(&mut self, now: Instant, in_flight: u32) {
        if self.latest_end.is_some() {
            // What others spent after the last answer is not reported: extrapolate at the same pace.
            self.others_before = Some(self.others_at_this_pace(self.reported_at, 0.75));
            self.resets = [Duration::ZERO, self.resets[0], self.resets[1]];
        }
        self.left = self.limit.saturating_sub(in_flight);
        self.latest_sent = now;
        self.used = in_flight;
        self.others = 0;
        (self.began, self.earliest_end, self.latest_end) = (now, now, None);
    }

    /// What others spend in all of the window, if they go on as until then. What they did in less than the
    /// `least` part of it says little.
    fn others_at_this_pace(&self, until: Instant, least: f64) -> f64 {
        let whole = self.end().saturating_duration_since(self.began).as_secs_f64().max(0.001);
        let part = until.saturating_duration_since(self.began).as_secs_f64() / whole;
        f64::from(self.others) / part.clamp(least, 1.0)
    }

    /// What is ours of a window.
    fn ours(&self, share: f64) -> f64 {
        (f64::from(self.limit) * share).floor().max(1.0)
    }

    /// When the next call may go, unless it may go now.
    fn due(&self, now: Instant, share: f64, in_flight: u32) -> Option<Instant> {
        // No report for this window yet: one call is admitted to get one, even if the last report allowed none.
        if self.latest_end.is_none() && self.used == 0 && in_flight == 0 {
            return None;
        }
        let end = self.end();
        let whole = end.saturating_duration_since(self.began).max(Duration::from_millis(1));
        let gone = now.saturating_duration_since(self.began).as_secs_f64() / whole.as_secs_f64();
        let soon = now + Duration::from_millis(1);

        let used = f64::from(self.used);
        // Others have spent more since the last report.
        let looked = self.reported_at.max(self.began).min(now);
        let part = |span: Duration| (span.as_secs_f64() / whole.as_secs_f64()).min(1.0);
        let others = match self.others_before {
            Some(before) => before.max(self.others.into()),
            // The first window: all there is to go by is their pace in it.
            None => self.others_at_this_pace(looked, 0.25),
        };
        let expected = others * CAUTION * part(end.saturating_duration_since(looked));
        let spendable = (self.ours(share) - used).min(f64::from(self.left) - expected.ceil());
        if spendable < 1.0 {
            // Others may spend less than expected: looked at again before the end.
            let nothing_left = self.left == 0 || used >= self.ours(share);
            let again = if nothing_left { end } else { (now + ASK_AGAIN).min(end) };
            return Some(if again > now { again } else { now + ASK_AGAIN });
        }
        let all = used + spendable;
        let burst = (all * BURST).ceil();
        if used + 1.0 <= burst + (all - burst) * (gone / SPREAD) {
            return None;
        }
        let at = SPREAD * (used + 1.0 - burst) / (all - burst);
        Some((self.began + whole.mul_f64(at.clamp(0.0, 1.0))).max(soon))
    }

    fn status(&self, now: Instant, share: f64) -> RateLimitStatus {
        let end = self.latest_end.filter(|end| now < *end);
        // What they did when Close was asked last says nothing after a while, as of a worker that stands by now.
        let lately = now < self.reported_at + FORGOTTEN;
        let others = if lately { self.others_before.unwrap_or(0.0).max(self.others.into()) } else { 0.0 };
        let allowed = self.ours(share).min(f64::from(self.limit) - others).max(1.0);
        RateLimitStatus {
            limit: self.limit,
            remaining: if end.is_some() { self.left } else { self.limit },
            reset: end.map_or(Duration::ZERO, |end| end - now),
            rate: allowed / self.length().as_secs_f64(),
            others,
        }
    }
}
