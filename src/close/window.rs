//! The budget of one endpoint group, as a pure state machine with the time as input.
//!
//! Close keeps a window per endpoint group, per key and per organization, and tells with most answers how
//! much of the tighter one is left and when it is renewed (close-api.md §2). What it tells is older than
//! what we know: calls under way are not in `remaining` yet, and are counted against it here. No limit is
//! built in.
//!
//! **A share.** Of each window only a share is ours to spend; the rest is for other integrations. When
//! they spend more than that, what they are likely to spend until the window ends is left to them too.
//!
//! **Pacing.** A quarter of what may be spent goes out as it is asked for, so that a message that comes
//! alone never waits. The rest is spread evenly over most of the window: a backlog then moves steadily instead of
//! bursting and stalling, and searches that wait have time to be joined.
//!
//! **Hidden limits.** A 429 is obeyed whatever `remaining` says (close-api.md §2). When it is not explained
//! by a window that is used up, calls are also spaced out, twice as far at each such refusal and closer
//! again while none comes.

use std::time::{Duration, Instant};

use super::limit::{LONGEST_WAIT, RateLimit};

/// How soon to ask again while nothing is told yet.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// Calls under way before anything was answered: one tells as much as many.
const FIRST_CALLS: u32 = 2;
/// This part of a window's budget is not paced.
const BURST: f64 = 0.25;
/// The rest is spread over this part of the window: its last call must not miss the end.
const SPREAD: f64 = 0.9;
/// A window nobody told the length of.
const PRESUMED_LENGTH: Duration = Duration::from_secs(1);
/// After so many windows that told only of larger limits, the smaller one is taken for gone. Before that
/// it may be the organization's that was told, while the key's is as it was.
const WINDOWS_TO_RAISE: u32 = 3;
/// The closest and the widest spacing of calls after hidden limits struck.
const SPACING: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(10));
/// How long no refusal comes before calls move closer.
const EASE_AFTER: Duration = Duration::from_secs(5);

/// What is known of the budget of one endpoint group.
#[derive(Debug)]
pub(super) struct Window {
    /// The part of each window that is ours, above 0 and at most 1.
    share: f64,
    /// Nothing goes out before: a 429 said so.
    closed_until: Option<Instant>,
    /// Distance of calls, and when it was changed: a hidden limit struck.
    spacing: Option<(Duration, Instant)>,
    last_admitted: Option<Instant>,
    budget: Option<Budget>,
    /// The longest time to a reset that was told: the length of a window, as far as known.
    length: Duration,
    /// What others spent in the last window.
    others_before: u32,
    /// Calls under way.
    in_flight: u32,
    answered: bool,
    /// Calls made before anything was told.
    untold: u32,
}

/// What is known of one window of Close's.
///
/// An answer tells its end only within the time the call took: Close counted somewhere between the
/// sending and the answer. Two answers speak of one window when these spans overlap.
#[derive(Debug)]
struct Budget {
    limit: u32,
    /// Calls left, at least.
    left: u32,
    /// Calls of ours.
    used: u32,
    /// Calls of others, at least.
    others: u32,
    /// The smallest limit told in it.
    told: Option<u32>,
    /// Windows before it that told only of larger limits.
    larger: u32,
    /// It had begun by then.
    began: Instant,
    /// It does not end before.
    earliest_end: Instant,
    /// It has ended by then. `None` until an answer tells.
    latest_end: Option<Instant>,
}

/// What is left of a budget, for whoever wants to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// Calls Close allows per window.
    pub limit: u32,
    /// Calls left in this window, as far as known.
    pub remaining: u32,
    /// Time until it is renewed.
    pub reset: Duration,
    /// Calls a second that may be made for long.
    pub rate: f64,
}

impl Window {
    /// A group nothing is known of yet, of which `share` is ours.
    pub(super) fn new(share: f64) -> Self {
        Self {
            share,
            closed_until: None,
            spacing: None,
            last_admitted: None,
            budget: None,
            length: Duration::ZERO,
            others_before: 0,
            in_flight: 0,
            answered: false,
            untold: 0,
        }
    }

    /// Takes a call out of the budget, or tells when to ask again.
    pub(super) fn admit(&mut self, now: Instant) -> Result<(), Instant> {
        if let Some(until) = self.closed_until.filter(|until| now < *until) {
            return Err(until);
        }
        self.closed_until = None;
        if !self.answered && self.in_flight >= FIRST_CALLS {
            return Err(now + ASK_AGAIN);
        }
        self.ease(now);
        if let (Some((spacing, _)), Some(last)) = (self.spacing, self.last_admitted)
            && now < last + spacing
        {
            return Err(last + spacing);
        }
        self.renew(now);
        if let Some(due) = self.due(now) {
            return Err(due);
        }
        match &mut self.budget {
            Some(budget) => {
                budget.left = budget.left.saturating_sub(1);
                budget.used += 1;
            }
            None => self.untold += 1,
        }
        self.last_admitted = Some(now);
        self.in_flight += 1;
        Ok(())
    }

    /// A call that was sent at `sent` ended, perhaps with news about the budget. `answered`: with an answer.
    pub(super) fn done(&mut self, sent: Instant, now: Instant, answered: bool, told: Option<RateLimit>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.answered |= answered;
        let Some(RateLimit { limit, remaining, reset }) = told else { return };
        self.length = self.length.max(reset);
        let left = remaining.saturating_sub(self.in_flight);
        let (earliest_end, latest_end) = (sent + reset, now + reset);
        let news = |known: Budget| Budget {
            limit: known.limit.min(limit),
            left: left.min(known.left),
            // As if all of ours were counted, those still under way too: phantoms would cost budget.
            others: known.others.max(limit.saturating_sub(remaining).saturating_sub(known.used)),
            told: Some(known.told.map_or(limit, |told| told.min(limit))),
            earliest_end: known.earliest_end.max(earliest_end),
            latest_end: Some(known.latest_end.map_or(latest_end, |end| end.min(latest_end))),
            ..known
        };
        self.budget = Some(match self.budget.take() {
            // Late news of a window that is over.
            Some(known) if latest_end < known.earliest_end || earliest_end <= known.began => known,
            // Answers overtake each other: within one window the budget only shrinks.
            Some(known) if known.latest_end.is_none_or(|end| earliest_end <= end) => news(known),
            // Close renewed it before we thought so: this call is in it, and those under way may be.
            Some(known) => {
                let next = self.next(&known, sent);
                news(Budget { used: next.used + 1, ..next })
            }
            None => Budget {
                limit,
                left,
                used: self.untold,
                others: 0,
                told: Some(limit),
                larger: 0,
                began: sent,
                earliest_end,
                latest_end: Some(latest_end),
            },
        });
    }

    /// Close refused a call with 429 and asked to wait. `explained`: by a window that is used up.
    pub(super) fn refused(&mut self, now: Instant, wait: Duration, explained: bool) {
        let until = now + wait.min(LONGEST_WAIT);
        self.closed_until = Some(self.closed_until.map_or(until, |known| known.max(until)));
        if !explained {
            let (closest, widest) = SPACING;
            let pace = self
                .budget
                .as_ref()
                .filter(|budget| budget.used > 0)
                .map(|budget| now.saturating_duration_since(budget.began) / budget.used);
            let spacing = self.spacing.map(|(spacing, _)| spacing).or(pace).unwrap_or_default();
            self.spacing = Some(((spacing * 2).clamp(closest, widest), now));
        }
    }

    /// What is left, if anything was told.
    pub(super) fn standing(&self, now: Instant) -> Option<Standing> {
        let budget = self.budget.as_ref()?;
        let end = budget.latest_end.filter(|end| now < *end);
        let length = self.length.max(PRESUMED_LENGTH).as_secs_f64();
        let others = f64::from(budget.others.max(self.others_before));
        let allowed = (f64::from(budget.limit) * self.share).min(f64::from(budget.limit) - others).max(1.0);
        let spaced = self.spacing.map(|(spacing, _)| 1.0 / spacing.as_secs_f64());
        Some(Standing {
            limit: budget.limit,
            remaining: if end.is_some() { budget.left } else { budget.limit },
            reset: end.map_or(Duration::ZERO, |end| end - now),
            rate: spaced.map_or(allowed / length, |spaced| spaced.min(allowed / length)),
        })
    }

    /// Calls move closer again while no hidden limit strikes.
    fn ease(&mut self, now: Instant) {
        while let Some((spacing, changed)) = self.spacing
            && now >= changed + EASE_AFTER
        {
            let closer = spacing.mul_f64(0.7);
            self.spacing = (closer > SPACING.0).then_some((closer, changed + EASE_AFTER));
        }
    }

    /// Begins the next window when this one is over.
    fn renew(&mut self, now: Instant) {
        let Some(budget) = self.budget.take() else { return };
        let over = match budget.latest_end {
            Some(end) => now >= end,
            // Its first answer tells when it ends. Where no call is under way, none will.
            None => self.in_flight == 0,
        };
        self.budget = Some(if over {
            // A window that told nothing says nothing about others either.
            if budget.told.is_some() {
                self.others_before = budget.others;
            }
            self.next(&budget, now)
        } else {
            budget
        });
    }

    /// The window after this one, of which nothing is told yet: full, but for the calls that are still under
    /// way and may land in it.
    fn next(&self, budget: &Budget, now: Instant) -> Budget {
        let larger = match budget.told {
            Some(told) if told > budget.limit => budget.larger + 1,
            Some(_) => 0,
            None => budget.larger,
        };
        let (limit, larger) = match budget.told {
            Some(told) if larger >= WINDOWS_TO_RAISE => (told, 0),
            Some(_) | None => (budget.limit, larger),
        };
        // One call must be left to ask with, also where Close told of none.
        let least = u32::from(self.in_flight == 0);
        Budget {
            limit,
            left: limit.saturating_sub(self.in_flight).max(least),
            used: self.in_flight,
            others: 0,
            told: None,
            larger,
            began: now,
            earliest_end: now,
            latest_end: None,
        }
    }

    /// When the next call may go, unless it may go now.
    fn due(&self, now: Instant) -> Option<Instant> {
        let budget = self.budget.as_ref()?;
        let end = budget.latest_end.unwrap_or(budget.began + self.length.max(PRESUMED_LENGTH));
        let whole = end.saturating_duration_since(budget.began).max(Duration::from_millis(1));
        let gone = now.saturating_duration_since(budget.began).as_secs_f64() / whole.as_secs_f64();

        let ours = ((f64::from(budget.limit) * self.share).floor()).max(1.0);
        let expected = f64::from(budget.others.max(self.others_before)) * (1.0 - gone).clamp(0.0, 1.0);
        let spendable = (ours - f64::from(budget.used)).min(f64::from(budget.left) - expected.ceil());
        if spendable < 1.0 {
            // Others may spend less than expected: looked at again before the end.
            let nothing_left = budget.left == 0 || f64::from(budget.used) >= ours;
            let again = if nothing_left { end } else { (now + ASK_AGAIN).min(end) };
            return Some(again.max(now + Duration::from_millis(1)));
        }
        let used = f64::from(budget.used);
        let all = used + spendable;
        let burst = (all * BURST).ceil();
        if used + 1.0 <= burst + (all - burst) * (gone / SPREAD) {
            return None;
        }
        let at = SPREAD * (used + 1.0 - burst) / (all - burst);
        Some((budget.began + whole.mul_f64(at.clamp(0.0, 1.0))).max(now + Duration::from_millis(1)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Close's side of one bucket: windows of equal length, calls counted when they are sent.
    struct Close {
        limit: u32,
        length: Duration,
        began: Instant,
        used: u32,
    }

    impl Close {
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
        window.refused(start + SECOND, 3 * SECOND, false);
        assert_eq!(window.admit(start + 2 * SECOND), Err(start + 4 * SECOND));
        assert_eq!(window.admit(start + 4 * SECOND), Ok(()));
        // Ten calls in a second met a limit: five a second it is.
        let next = window.admit(start + 4 * SECOND).unwrap_err() - (start + 4 * SECOND);
        assert_eq!(next, Duration::from_millis(200));
        window.refused(start + 5 * SECOND, Duration::ZERO, false);
        assert_eq!(window.spacing.unwrap().0, Duration::from_millis(400));
        assert_eq!(window.admit(start + 90 * SECOND), Ok(()));
        assert_eq!(window.spacing, None, "forgotten when none came for long");
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
        assert!((38..=58).contains(&n_calls), "{n_calls}: 58 were left, some 20 of them for others at first");
    }

    #[test]
    fn the_smaller_of_two_limits_is_kept_until_it_is_gone() {
        let start = Instant::now();
        let mut window = fresh(16, start);
        let mut limits = Vec::new();
        for n in 1..=5 {
            let at = start + n * 8 * SECOND;
            window.admit(at).unwrap();
            // The organization's limit is told.
            window.done(at, at, true, Some(told(48, 40, 8 * SECOND)));
            limits.push(window.standing(at).unwrap().limit);
        }
        assert_eq!(limits, [16, 16, 16, 48, 48]);
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
            let mut close = Close::new(start, limit, SECOND * u32::try_from(length).unwrap());
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
            let mut close = Close::new(start, limit, SECOND * length);
            let mut window = Window::new(share);
            let mut spent: Vec<u32> = Vec::new();
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
                        answers.push((now + Duration::from_millis(delay), now, told));
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
            let late = u32::from(delay > 0) * (1 + allowed / 8);
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
                        window.refused(now, Duration::from_millis(gap), false);
                    }
                }
                let _ = window.standing(now);
            }
        }
    }
}
