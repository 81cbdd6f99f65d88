//! The budget of one endpoint group, as a pure state machine with the time as input.
//!
//! Close keeps a window per endpoint group, one for the key and one for the organization, and tells with most
//! answers how much of the tighter one is left and when it is renewed (close-api.md §2). They are told apart
//! by their limits and kept as [`Bucket`]s of their own; a call goes when all of them agree. What Close tells
//! is older than what we know: calls under way are not in `remaining` yet, and are counted against it here. No
//! limit is built in.
//!
//! **A share.** Of each window only a share is ours to spend; the rest is for other integrations. When
//! they spend more than that, what they are likely to spend until the window ends is left to them too. One call
//! a window goes whatever is expected of others: to ask.
//!
//! **Pacing.** A quarter of what may be spent goes out as it is asked for, so that a message that comes
//! alone never waits. The rest is spread evenly over most of the window: a backlog then moves steadily instead
//! of bursting and stalling, and searches that wait have time to be joined.
//!
//! **Hidden limits.** A 429 is obeyed whatever `remaining` says (close-api.md §2). When it is not explained
//! by a window that is used up, calls are also spaced out, twice as far at each such refusal and closer
//! again while none comes.

use std::time::Duration;

use tokio::time::Instant;

use crate::close::rate_limit::headers::{LONGEST_WAIT, RateLimit};

/// How soon to ask again while nothing is told yet.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// Calls under way before anything was answered: one tells as much as many.
const FIRST_CALLS: u32 = 2;
/// This part of a window's budget is not paced.
const BURST: f64 = 0.25;
/// The rest is spread over this part of the window: its last call must not miss the end.
const SPREAD: f64 = 0.9;
/// Others may spend a little more than before.
const CAUTION: f64 = 1.1;
/// A window nobody told the length of.
const PRESUMED_LENGTH: Duration = Duration::from_secs(1);
/// A bucket Close has not told of for this long while it told of others may be gone, or have another limit.
const FORGOTTEN: Duration = Duration::from_mins(2);
/// The closest and the widest spacing of calls after hidden limits struck.
const SPACING: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(10));
/// How long no refusal comes before calls move closer.
const EASE_AFTER: Duration = Duration::from_secs(5);

/// What is known of the budget of one endpoint group.
#[derive(Debug)]
pub(crate) struct Window {
    /// The part of each window that is ours, above 0 and at most 1.
    share: f64,
    /// Nothing goes out before: a 429 said so.
    closed_until: Option<Instant>,
    /// Distance of calls, and when it was set: a hidden limit struck.
    spacing: Option<(Duration, Instant)>,
    last_admitted: Option<Instant>,
    /// The key's and the organization's, as far as told.
    buckets: Vec<Bucket>,
    /// Calls under way.
    in_flight: u32,
    answered: bool,
    /// Calls made before anything was told.
    untold: u32,
}

/// One of Close's buckets, in its present window.
///
/// An answer tells the end of a window only within the time the call took: Close counted somewhere between the
/// sending and the answer. Two answers speak of one window when these spans overlap.
#[derive(Debug)]
struct Bucket {
    limit: u32,
    /// Calls left, at least.
    left: u32,
    /// When the call was sent that told so.
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
    /// It has ended by then. `None` until an answer tells.
    latest_end: Option<Instant>,
    /// The longest times to a reset that were told in this window and in the last ones that were told of:
    /// their maximum is the length of a window, as far as known.
    resets: [Duration; 3],
    /// When it was told of last.
    told: Instant,
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
            untold: 0,
        }
    }

    /// Takes a call out of the budget, or tells when to ask again.
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
        let latest = self.buckets.iter().map(|bucket| bucket.told).max();
        self.buckets.retain(|bucket| latest.is_none_or(|latest| latest < bucket.told + FORGOTTEN));
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
            self.untold += 1;
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
    pub(crate) fn done(&mut self, sent: Instant, now: Instant, answered: bool, told: Option<RateLimit>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.answered |= answered;
        let Some(told) = told else { return };
        match self.buckets.iter_mut().find(|bucket| bucket.limit == told.limit) {
            Some(bucket) => bucket.update(sent, now, told, self.in_flight),
            None => self.buckets.push(Bucket {
                limit: told.limit,
                left: told.remaining.saturating_sub(self.in_flight),
                latest_sent: sent,
                // Of a second bucket it is not known how many fell into its window.
                used: if self.buckets.is_empty() { self.untold } else { 0 },
                others: 0,
                others_before: None,
                began: sent,
                earliest_end: sent + told.reset,
                latest_end: Some(now + told.reset),
                resets: [told.reset; 3],
                told: now,
            }),
        }
    }

    /// Close refused a call that was sent at `sent` with 429, and asked to wait. `explained`: by a window that
    /// is used up.
    pub(crate) fn refused(&mut self, sent: Instant, now: Instant, wait: Duration, explained: bool) {
        let until = now + wait.min(LONGEST_WAIT);
        self.closed_until = Some(self.closed_until.map_or(until, |known| known.max(until)));
        // Calls that were under way when the last refusal came tell nothing new.
        let is_new = self.spacing.is_none_or(|(_, set)| sent >= set);
        if !explained && is_new {
            let (closest, widest) = SPACING;
            let paces = self.buckets.iter().filter(|bucket| bucket.used > 0);
            let pace = paces.map(|bucket| now.saturating_duration_since(bucket.began) / bucket.used).max();
            let spacing = self.spacing(now).or(pace).unwrap_or_default();
            self.spacing = Some(((spacing * 2).clamp(closest, widest), now));
        }
    }

    /// What is left of the narrowest bucket, if anything was told.
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
    fn update(&mut self, sent: Instant, now: Instant, told: RateLimit, in_flight: u32) {
        let (earliest_end, latest_end) = (sent + told.reset, now + told.reset);
        self.told = now;
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
        // some already, so that this is the least that is left; the next answer tells better.
        if sent >= self.latest_sent {
            self.latest_sent = sent;
            self.left = told.remaining.saturating_sub(in_flight);
        }
        // As if all of ours were counted, those still under way too: phantoms would cost budget.
        let others = told.limit.saturating_sub(told.remaining).saturating_sub(self.used);
        self.others = self.others.max(others);
        self.earliest_end = self.earliest_end.max(earliest_end);
        self.latest_end = Some(self.latest_end.map_or(latest_end, |end| end.min(latest_end)));
        self.resets[0] = self.resets[0].max(told.reset);
    }

    /// Begins the next window when this one is over.
    fn renew(&mut self, now: Instant, in_flight: u32) {
        let over = match self.latest_end {
            Some(end) => now >= end,
            // Its first answer tells when it ends; it may be that of a call under way.
            None => in_flight == 0 && now >= self.end(),
        };
        if over {
            self.next(now, in_flight);
        }
    }

    /// The next window, of which nothing is told yet: full, but for the calls that are still under way and may
    /// land in it.
    fn next(&mut self, now: Instant, in_flight: u32) {
        if self.latest_end.is_some() {
            // What they spent after the last answer is not told: a little more, at the same pace.
            self.others_before = Some(self.others_at_this_pace(self.told, 0.75));
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
        // Nothing is told of this window: one call goes to ask, also where Close told of none to spend.
        if self.latest_end.is_none() && self.used == 0 && in_flight == 0 {
            return None;
        }
        let end = self.end();
        let whole = end.saturating_duration_since(self.began).max(Duration::from_millis(1));
        let gone = now.saturating_duration_since(self.began).as_secs_f64() / whole.as_secs_f64();
        let soon = now + Duration::from_millis(1);

        let used = f64::from(self.used);
        // Since it was told what is left, they have spent more already.
        let looked = self.told.max(self.began).min(now);
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
        let lately = now < self.told + FORGOTTEN;
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Close's side of one bucket: windows of equal length, calls counted when they are sent.
    struct FakeClose {
        limit: u32,
        length: Duration,
        began: Instant,
        used: u32,
    }

    impl FakeClose {
        fn new(start: Instant, limit: u32, length: Duration) -> Self {
            Self { limit, length, began: start, used: 0 }
        }

        fn renew(&mut self, now: Instant) {
            while now >= self.began + self.length {
                self.began += self.length;
                self.used = 0;
            }
        }

        /// Whether the call is let in, and what the answer says.
        fn call(&mut self, now: Instant) -> (bool, RateLimit) {
            self.renew(now);
            let good = self.used < self.limit;
            self.used = self.limit.min(self.used + 1);
            let reset = self.began + self.length - now;
            (good, RateLimit { limit: self.limit, remaining: self.limit - self.used, reset })
        }
    }

    /// Endless demand on a window, in steps of 10 ms.
    struct Demand {
        window: Window,
        delay: Duration,
        answers: VecDeque<(Instant, Instant, RateLimit)>,
        ours: u32,
        refused: u32,
    }

    const STEP: Duration = Duration::from_millis(10);
    /// Steps of a window of 8 s.
    const STEPS: u32 = 800;

    impl Demand {
        /// `delay`: how long an answer takes.
        fn new(share: f64, delay: Duration) -> Self {
            Self { window: Window::new(share), delay, answers: VecDeque::new(), ours: 0, refused: 0 }
        }

        /// Takes the answers that are due and makes every call that may be made.
        fn step(&mut self, now: Instant, mut call: impl FnMut() -> (bool, RateLimit)) {
            while let Some((at, sent, told)) = self.answers.pop_front_if(|(at, ..)| *at <= now) {
                self.window.done(sent, at, true, Some(told));
            }
            while self.window.admit(now).is_ok() {
                let (good, told) = call();
                if good {
                    self.ours += 1;
                } else {
                    self.refused += 1;
                    self.window.refused(now, now, told.reset, told.remaining == 0);
                }
                self.answers.push_back((now + self.delay, now, told));
            }
        }
    }

    fn told(limit: u32, remaining: u32, reset: Duration) -> RateLimit {
        RateLimit { limit, remaining, reset }
    }

    /// A window that knows it is in the first moment of 8 s with `limit` calls, one of them made.
    fn fresh(limit: u32, start: Instant) -> Window {
        let mut window = Window::new(1.0);
        window.admit(start).unwrap();
        window.done(start, start, true, Some(told(limit, limit - 1, 8 * SECOND)));
        window
    }

    #[test]
    fn a_quarter_goes_at_once_and_the_rest_evenly() {
        let start = Instant::now();
        let mut window = fresh(17, start);
        let mut at = start;
        let mut times = Vec::new();
        for _ in 0..16 {
            while let Err(later) = window.admit(at) {
                at = later;
            }
            window.done(at, at, true, None);
            times.push((at - start).as_millis());
        }
        assert_eq!(times[..4], [0, 0, 0, 0], "the burst, of which one is made already");
        let gaps: Vec<_> = times[3..].windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| (590..=610).contains(gap)), "{times:?}");
        assert_eq!(window.admit(at), Err(start + 8 * SECOND), "all are made");
        assert_eq!(window.admit(start + 8 * SECOND), Ok(()));
    }

    #[test]
    fn a_429_is_obeyed_and_an_unexplained_one_spaces_calls_out_for_a_while() {
        let start = Instant::now();
        let mut window = fresh(1000, start);
        for _ in 0..9 {
            window.admit(start).unwrap();
            window.done(start, start, true, None);
        }
        window.refused(start, start + SECOND, 3 * SECOND, false);
        window.refused(start, start + SECOND, 3 * SECOND, false);
        assert_eq!(window.admit(start + 2 * SECOND), Err(start + 4 * SECOND));
        assert_eq!(window.admit(start + 4 * SECOND), Ok(()));
        // Ten calls in a second met a limit: five a second it is.
        let next = window.admit(start + 4 * SECOND).unwrap_err() - (start + 4 * SECOND);
        assert_eq!(next, Duration::from_millis(200));
        window.refused(start + 4 * SECOND, start + 5 * SECOND, Duration::ZERO, false);
        assert_eq!(window.spacing(start + 5 * SECOND), Some(Duration::from_millis(400)));
        assert_eq!(window.spacing(start + 90 * SECOND), None, "forgotten when none came for long");
    }

    #[test]
    fn what_others_are_likely_to_spend_is_left_to_them() {
        let start = Instant::now();
        let mut window = Window::new(1.0);
        window.admit(start).unwrap();
        // Half a window is over, and others have spent 40 of 100.
        window.done(start, start, true, Some(told(100, 99, 8 * SECOND)));
        window.admit(start + 4 * SECOND).unwrap();
        window.done(start + 4 * SECOND, start + 4 * SECOND, true, Some(told(100, 58, 4 * SECOND)));
        assert!((window.status(start + 4 * SECOND).unwrap().others - 40.0).abs() < f64::EPSILON);
        assert!(window.status(start + 4 * SECOND + FORGOTTEN).unwrap().others < f64::EPSILON);
        let mut at = start + 4 * SECOND;
        let mut n_calls = 0;
        loop {
            match window.admit(at) {
                Ok(()) => n_calls += 1,
                Err(later) if later >= start + 8 * SECOND => break,
                Err(later) => at = later,
            }
            window.done(at, at, true, None);
        }
        assert!(
            (10..=20).contains(&n_calls),
            "{n_calls}: 58 were left, and others are likely to want 40 of them"
        );
    }

    #[test]
    fn a_bucket_is_kept_until_it_is_not_told_of_for_long() {
        let start = Instant::now();
        let mut window = fresh(16, start);
        let mut limits = Vec::new();
        for n in 1..=16 {
            let at = start + n * 8 * SECOND;
            window.admit(at).unwrap();
            // The organization's limit is told.
            window.done(at, at, true, Some(told(48, 40, 8 * SECOND)));
            limits.push(window.status(at).unwrap().limit);
        }
        assert_eq!((limits[0], limits[13], limits[15]), (16, 16, 48));
        let much_later = start + 10_000 * SECOND;
        window.admit(much_later).unwrap();
        assert_eq!(window.status(much_later).unwrap().limit, 48, "silence forgets nothing");
    }

    /// Close's two buckets, of different phase, of which it tells the one that is closer to its end; others
    /// spend from the second.
    #[test]
    fn the_keys_and_the_organizations_window_are_kept_apart() {
        for (limit, theirs_per_window, phase) in
            [(16, 0, 3), (16, 37, 0), (16, 41, 3), (240, 550, 3), (240, 700, 5)]
        {
            let start = Instant::now();
            let mut organization = FakeClose::new(start, 3 * limit, 8 * SECOND);
            let start = start + phase * SECOND;
            let mut key = FakeClose::new(start, limit, 8 * SECOND);
            let mut demand = Demand::new(0.8, 5 * STEP);
            let (mut theirs, mut owed, n_windows) = (0_u32, 0.0, 40);
            for tick in 0..n_windows * STEPS {
                let now = start + STEP * tick;
                owed += f64::from(theirs_per_window) / f64::from(STEPS);
                while owed >= 1.0 {
                    owed -= 1.0;
                    theirs += u32::from(organization.call(now).0);
                }
                demand.step(now, || {
                    let ((good_key, of_key), (good, of_organization)) =
                        (key.call(now), organization.call(now));
                    let left = |told: &RateLimit| f64::from(told.remaining) / f64::from(told.limit);
                    let told = if left(&of_key) <= left(&of_organization) { of_key } else { of_organization };
                    (good_key && good, told)
                });
            }
            let Demand { ours, refused, .. } = demand;
            let free = (3 * limit * n_windows).saturating_sub(theirs).min(limit * n_windows * 4 / 5);
            let name = format!("limit {limit}, others {theirs_per_window}, phase {phase}");
            assert!(refused * 100 <= ours.max(100), "{name}: {refused} of {ours} refused");
            assert!(ours * 10 >= free * 7, "{name}: {ours} of {free} that were free");
        }
    }

    #[test]
    fn nothing_told_and_nothing_allowed_still_lets_a_call_ask() {
        let start = Instant::now();
        let mut window = Window::new(0.8);
        window.admit(start).unwrap();
        window.admit(start).unwrap();
        assert!(window.admit(start).is_err(), "two will tell");
        window.done(start, start, true, None);
        for _ in 0..20 {
            window.admit(start).unwrap();
        }
        let mut window = Window::new(0.8);
        window.admit(start).unwrap();
        window.done(start, start, true, Some(told(0, 0, 2 * SECOND)));
        assert_eq!(window.admit(start + SECOND), Err(start + 2 * SECOND));
        assert_eq!(window.admit(start + 2 * SECOND), Ok(()), "the limit may be another by now");
    }

    /// Somebody else spends a share that changes every few windows, from nothing to two thirds.
    #[test]
    fn others_who_come_and_go_cost_hardly_a_refusal_and_are_made_up_for() {
        let start = Instant::now();
        let mut close = FakeClose::new(start, 240, 8 * SECOND);
        let mut demand = Demand::new(1.0, 10 * STEP);
        let shares = [0.0, 0.3, 0.66, 0.1, 0.5, 0.0, 0.66, 0.25];
        let (mut theirs, mut owed) = (0_u32, 0.0);
        for (share, tick) in (0..).zip(shares).flat_map(|(number, share)| {
            // Four windows each.
            (number * 4 * STEPS..(number + 1) * 4 * STEPS).map(move |tick| (share, tick))
        }) {
            let now = start + STEP * tick;
            // They spread their calls evenly, 240 times their share in a window.
            owed += share * 240.0 / f64::from(STEPS);
            while owed >= 1.0 {
                owed -= 1.0;
                theirs += u32::from(close.call(now).0);
            }
            demand.step(now, || close.call(now));
        }
        let Demand { ours, refused, .. } = demand;
        let all = u32::try_from(shares.len()).unwrap() * 4 * 240;
        let free = all - theirs;
        assert!(refused * 500 <= ours, "{refused} of {ours} refused");
        assert!(ours * 10 >= free * 9, "{ours} of {free} that others left");
    }

    /// Somebody else takes half of it, in a burst every second.
    #[test]
    fn bursts_of_others_cost_hardly_a_refusal() {
        for phase in [0, 150, 470, 730, 990] {
            let start = Instant::now();
            let mut close = FakeClose::new(start, 240, 8 * SECOND);
            let (mut demand, n_windows) = (Demand::new(0.8, 2 * STEP), 40);
            for tick in 0..n_windows * STEPS {
                let now = start + STEP * tick;
                if (tick * 10) % 1000 == phase {
                    (0..15).for_each(|_| _ = close.call(now));
                }
                demand.step(now, || close.call(now));
            }
            let Demand { ours, refused, .. } = demand;
            assert!(refused * 1000 <= ours, "{phase}: {refused} of {ours} refused");
            assert!(ours * 100 >= 120 * n_windows * 85, "{phase}: {ours} of {}", 120 * n_windows);
        }
    }

    proptest! {
        /// However calls are timed and however late the answers come, no more than our share of a window is
        /// spent, and no call is sent that would be refused.
        #[test]
        fn no_call_is_sent_into_a_spent_window(
            limit in 1u32..20,
            percent in 1u32..=100,
            length in 1u64..9,
            gaps in proptest::collection::vec((0u64..900, 0u64..2000), 1..200),
        ) {
            let start = Instant::now();
            let share = f64::from(percent) / 100.0;
            let mut close = FakeClose::new(start, limit, SECOND * u32::try_from(length).unwrap());
            let mut window = Window::new(share);
            let mut now = start;
            let mut answers: Vec<(Instant, Instant, RateLimit)> = Vec::new();
            let (mut known, mut ours, mut began) = (false, 0, start);
            for (gap, delay) in gaps {
                now += Duration::from_millis(gap);
                answers.sort_by_key(|(at, ..)| *at);
                while answers.first().is_some_and(|(at, ..)| *at <= now) {
                    let (at, sent, told) = answers.remove(0);
                    window.done(sent, at, true, Some(told));
                    known = true;
                }
                // Nothing is known before the first answer; there it may be two calls for a limit of one.
                if !known && !answers.is_empty() {
                    continue;
                }
                if window.admit(now).is_ok() {
                    let (good, told) = close.call(now);
                    prop_assert!(good, "a call more than {limit}");
                    if close.began != began {
                        (began, ours) = (close.began, 0);
                    }
                    ours += 1;
                    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small count")]
                    let allowed = ((f64::from(limit) * share).floor() as u32).max(1);
                    prop_assert!(ours <= allowed, "{ours} calls, of which {allowed} are ours");
                    answers.push((now + Duration::from_millis(delay), now, told));
                }
            }
        }

        /// Under steady demand every whole window is spent to the last call that is ours.
        #[test]
        fn under_demand_all_that_is_ours_is_spent(
            limit in 1u32..300, percent in 10u32..=100, length in 1u32..9, delay in 0u64..150,
        ) {
            let start = Instant::now();
            let share = f64::from(percent) / 100.0;
            let mut close = FakeClose::new(start, limit, SECOND * length);
            let mut window = Window::new(share);
            let (mut spent, mut n_calls): (Vec<u32>, u64) = (Vec::new(), 0);
            let mut now = start;
            let mut answers: Vec<(Instant, Instant, RateLimit)> = Vec::new();
            while close.began < start + 5 * SECOND * length {
                while answers.first().is_some_and(|(at, ..)| *at <= now) {
                    let (at, sent, told) = answers.remove(0);
                    window.done(sent, at, true, Some(told));
                }
                let next_answer = answers.first().map(|(at, ..)| *at);
                match window.admit(now) {
                    Ok(()) => {
                        let (good, told) = close.call(now);
                        prop_assert!(good || spent.len() < 2);
                        // Answers overtake one another.
                        n_calls += 1;
                        let took = Duration::from_millis(n_calls * 7919 % (delay + 1));
                        answers.push((now + took, now, told));
                        answers.sort_by_key(|(at, ..)| *at);
                        let number = usize::try_from((close.began - start).as_secs() / u64::from(length)).unwrap();
                        spent.resize(spent.len().max(number + 1), 0);
                        spent[number] += 1;
                    }
                    Err(at) => now = next_answer.map_or(at, |answer| answer.min(at)),
                }
                close.renew(now);
            }
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small count")]
            let allowed = ((f64::from(limit) * share).floor() as u32).max(1);
            // The end of a window is known as late as an answer takes.
            let a_while = u64::from(allowed) * delay / (2000 * u64::from(length));
            let late = u32::from(delay > 0) * (1 + (allowed / 20).max(u32::try_from(a_while).unwrap()).max(1));
            for (number, spent) in spent.iter().enumerate().take(5).skip(1) {
                prop_assert!(*spent + late >= allowed && *spent <= allowed, "{spent} of {allowed} in {number}");
            }
        }

        /// Whatever an answer says, there is no panic, and no wait is longer than the longest.
        #[test]
        fn any_answer_is_survived(
            events in proptest::collection::vec(
                (0u64..5000, any::<bool>(), proptest::option::of((any::<u32>(), any::<u32>(), 0u64..400_000)), any::<bool>()),
                1..60,
            ),
        ) {
            let mut now = Instant::now();
            let mut window = Window::new(0.8);
            let mut under_way = Vec::new();
            for (gap, end, limit, refused) in events {
                now += Duration::from_millis(gap);
                match window.admit(now) {
                    Ok(()) => under_way.push(now),
                    Err(at) => prop_assert!(at > now && at <= now + 2 * LONGEST_WAIT, "{:?}", at - now),
                }
                if let (true, Some(sent)) = (end, under_way.pop()) {
                    let limit = limit.map(|(limit, remaining, reset)| RateLimit {
                        limit, remaining, reset: Duration::from_millis(reset).min(LONGEST_WAIT),
                    });
                    window.done(sent, now, true, limit);
                    if refused {
                        window.refused(now, now, Duration::from_millis(gap), false);
                    }
                }
                let _ = window.status(now);
            }
        }
    }
}
