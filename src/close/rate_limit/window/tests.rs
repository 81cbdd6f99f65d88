use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// One bucket in Close. Its windows have equal length, and a call counts when it is sent.
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

    /// Whether the call is accepted, and the rate limit in the response.
    fn call(&mut self, now: Instant) -> (bool, RateLimit) {
        self.renew(now);
        let accepted = self.used < self.limit;
        self.used = self.limit.min(self.used + 1);
        let reset = self.began + self.length - now;
        (accepted, RateLimit { limit: self.limit, remaining: self.limit - self.used, reset })
    }
}

/// Constant demand on a window, in steps of 10 ms.
struct Demand {
    window: Window,
    delay: Duration,
    answers: VecDeque<(Instant, Instant, RateLimit)>,
    own: u32,
    refused: u32,
}

const STEP: Duration = Duration::from_millis(10);
/// Steps of a window of 8 s.
const STEPS: u32 = 800;

impl Demand {
    /// `delay` is the time until the response.
    fn new(share: f64, delay: Duration) -> Self {
        Self { window: Window::new(share), delay, answers: VecDeque::new(), own: 0, refused: 0 }
    }

    /// Handles the responses that are due, then makes every call that is admitted.
    fn step(&mut self, now: Instant, mut call: impl FnMut() -> (bool, RateLimit)) {
        while let Some((at, sent, report)) = self.answers.pop_front_if(|(at, ..)| *at <= now) {
            self.window.done(sent, at, true, Some(report));
        }
        while self.window.admit(now).is_ok() {
            let (accepted, report) = call();
            if accepted {
                self.own += 1;
            } else {
                self.refused += 1;
                self.window.refused(now, now, report.reset, report.remaining == 0);
            }
            self.answers.push_back((now + self.delay, now, report));
        }
    }
}

fn report(limit: u32, remaining: u32, reset: Duration) -> RateLimit {
    RateLimit { limit, remaining, reset }
}

/// A window of 8 s that has just started, with one of `limit` calls made.
fn fresh(limit: u32, start: Instant) -> Window {
    let mut window = Window::new(1.0);
    window.admit(start).unwrap();
    window.done(start, start, true, Some(report(limit, limit - 1, 8 * SECOND)));
    window
}

#[test]
fn a_quarter_is_a_burst_and_the_rest_is_paced() {
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
    assert_eq!(times[..4], [0, 0, 0, 0], "the burst, of which one call was made before");
    let gaps: Vec<_> = times[3..].windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.iter().all(|gap| (590..=610).contains(gap)), "{times:?}");
    assert_eq!(window.admit(at), Err(start + 8 * SECOND), "the budget is used up");
    assert_eq!(window.admit(start + 8 * SECOND), Ok(()));
}

#[test]
fn a_429_blocks_and_an_unexplained_429_spaces_calls_out() {
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
    // Ten calls per second met a hidden limit, so the rate is halved.
    let next = window.admit(start + 4 * SECOND).unwrap_err() - (start + 4 * SECOND);
    assert_eq!(next, Duration::from_millis(200));
    window.refused(start + 4 * SECOND, start + 5 * SECOND, Duration::ZERO, false);
    assert_eq!(window.spacing(start + 5 * SECOND), Some(Duration::from_millis(400)));
    assert_eq!(window.spacing(start + 90 * SECOND), None, "expired without another 429");
}

#[test]
fn the_expected_calls_of_others_are_reserved() {
    let start = Instant::now();
    let mut window = Window::new(1.0);
    window.admit(start).unwrap();
    // Half of the window is over, and others have made 40 of 100 calls.
    window.done(start, start, true, Some(report(100, 99, 8 * SECOND)));
    window.admit(start + 4 * SECOND).unwrap();
    window.done(start + 4 * SECOND, start + 4 * SECOND, true, Some(report(100, 58, 4 * SECOND)));
    assert!((window.status(start + 4 * SECOND).unwrap().others - 40.0).abs() < f64::EPSILON);
    assert!(window.status(start + 4 * SECOND + EXPIRY).unwrap().others < f64::EPSILON);
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
        "{n_calls}: 58 calls remained, and others are expected to make 40 of them"
    );
}

/// Another client makes all of its calls when a window begins.
#[test]
fn others_that_make_their_calls_at_once_leave_the_rest() {
    for (others, first, later) in
        [([12, 12], 25, 36), ([25, 25], 12, 22), ([40, 40], 4, 4), ([20, 30], 15, 15)]
    {
        let start = Instant::now();
        let mut close = FakeClose::new(start, 51, 8 * SECOND);
        let mut demand = Demand::new(1.0, STEP);
        let mut own = Vec::new();
        for window in 0..5 {
            for step in 0..STEPS {
                let now = start + STEP * (window * STEPS + step);
                if step == 0 {
                    (0..others[window as usize % 2]).for_each(|_| _ = close.call(now));
                }
                demand.step(now, || close.call(now));
            }
            own.push(std::mem::take(&mut demand.own));
        }
        assert!(own[0] >= first && own[1..].iter().all(|own| *own >= later), "{own:?} beside {others:?}");
        assert_eq!(demand.refused, 0);
    }
}

#[test]
fn a_bucket_expires_after_a_long_time_without_reports() {
    let start = Instant::now();
    let mut window = fresh(16, start);
    let mut limits = Vec::new();
    for n in 1..=16 {
        let at = start + n * 8 * SECOND;
        window.admit(at).unwrap();
        // The answers report the organization's limit.
        window.done(at, at, true, Some(report(48, 40, 8 * SECOND)));
        limits.push(window.status(at).unwrap().limit);
    }
    assert_eq!((limits[0], limits[13], limits[15]), (16, 16, 48));
    let much_later = start + 10_000 * SECOND;
    window.admit(much_later).unwrap();
    assert_eq!(window.status(much_later).unwrap().limit, 48, "without any reports nothing expires");
}

/// Two buckets in Close with different phases. Close reports the tighter one. Others use the second one.
#[test]
fn the_windows_of_key_and_organization_are_tracked_separately() {
    for (limit, others_per_window, phase) in
        [(16, 0, 3), (16, 37, 0), (16, 41, 3), (240, 550, 3), (240, 700, 5)]
    {
        let start = Instant::now();
        let mut organization = FakeClose::new(start, 3 * limit, 8 * SECOND);
        let start = start + phase * SECOND;
        let mut key = FakeClose::new(start, limit, 8 * SECOND);
        let mut demand = Demand::new(0.8, 5 * STEP);
        let (mut others, mut owed, n_windows) = (0_u32, 0.0, 40);
        for tick in 0..n_windows * STEPS {
            let now = start + STEP * tick;
            owed += f64::from(others_per_window) / f64::from(STEPS);
            while owed >= 1.0 {
                owed -= 1.0;
                others += u32::from(organization.call(now).0);
            }
            demand.step(now, || {
                let ((accepted_by_key, of_key), (accepted, of_organization)) =
                    (key.call(now), organization.call(now));
                let left = |report: &RateLimit| f64::from(report.remaining) / f64::from(report.limit);
                let report = if left(&of_key) <= left(&of_organization) { of_key } else { of_organization };
                (accepted_by_key && accepted, report)
            });
        }
        let Demand { own, refused, .. } = demand;
        let free = (3 * limit * n_windows).saturating_sub(others).min(limit * n_windows * 4 / 5);
        let name = format!("limit {limit}, others {others_per_window}, phase {phase}");
        assert!(refused * 100 <= own.max(100), "{name}: {refused} of {own} refused");
        assert!(own * 10 >= free * 7, "{name}: {own} of {free} that were free");
    }
}

#[test]
fn without_a_report_or_budget_one_call_is_still_admitted() {
    let start = Instant::now();
    let mut window = Window::new(0.8);
    window.admit(start).unwrap();
    window.admit(start).unwrap();
    assert!(window.admit(start).is_err(), "two calls suffice to get a report");
    window.done(start, start, true, None);
    for _ in 0..20 {
        window.admit(start).unwrap();
    }
    let mut window = Window::new(0.8);
    window.admit(start).unwrap();
    window.done(start, start, true, Some(report(0, 0, 2 * SECOND)));
    assert_eq!(window.admit(start + SECOND), Err(start + 2 * SECOND));
    assert_eq!(window.admit(start + 2 * SECOND), Ok(()), "the limit may have changed");
}

/// The calls of others change every few windows, from none to two thirds of the limit.
#[test]
fn changing_use_by_others_causes_few_429s_and_little_unused_budget() {
    let start = Instant::now();
    let mut close = FakeClose::new(start, 240, 8 * SECOND);
    let mut demand = Demand::new(1.0, 10 * STEP);
    let shares = [0.0, 0.3, 0.66, 0.1, 0.5, 0.0, 0.66, 0.25];
    let (mut others, mut owed) = (0_u32, 0.0);
    for (share, tick) in (0..).zip(shares).flat_map(|(number, share)| {
        // Four windows each.
        (number * 4 * STEPS..(number + 1) * 4 * STEPS).map(move |tick| (share, tick))
    }) {
        let now = start + STEP * tick;
        // Others spread their calls evenly, 240 times their share per window.
        owed += share * 240.0 / f64::from(STEPS);
        while owed >= 1.0 {
            owed -= 1.0;
            others += u32::from(close.call(now).0);
        }
        demand.step(now, || close.call(now));
    }
    let Demand { own, refused, .. } = demand;
    let all = u32::try_from(shares.len()).unwrap() * 4 * 240;
    let free = all - others;
    assert!(refused * 500 <= own, "{refused} of {own} refused");
    assert!(own * 10 >= free * 9, "{own} of {free} calls that others did not use");
}

/// Others use half of the limit, in a burst every second.
#[test]
fn bursts_of_others_cause_few_429s() {
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
        let Demand { own, refused, .. } = demand;
        assert!(refused * 1000 <= own, "{phase}: {refused} of {own} refused");
        assert!(own * 100 >= 120 * n_windows * 85, "{phase}: {own} of {}", 120 * n_windows);
    }
}

proptest! {
    /// For any timing of calls and responses, close-sync uses at most its share of a window, and no call gets a 429.
    #[test]
    fn no_call_is_sent_in_a_used_up_window(
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
        let (mut known, mut own, mut began) = (false, 0, start);
        for (gap, delay) in gaps {
            now += Duration::from_millis(gap);
            answers.sort_by_key(|(at, ..)| *at);
            while answers.first().is_some_and(|(at, ..)| *at <= now) {
                let (at, sent, report) = answers.remove(0);
                window.done(sent, at, true, Some(report));
                known = true;
            }
            // Before the first response two calls are possible even if the limit is one.
            if !known && !answers.is_empty() {
                continue;
            }
            if window.admit(now).is_ok() {
                let (accepted, report) = close.call(now);
                prop_assert!(accepted, "more than {limit} calls");
                if close.began != began {
                    (began, own) = (close.began, 0);
                }
                own += 1;
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small count")]
                let allowed = ((f64::from(limit) * share).floor() as u32).max(1);
                prop_assert!(own <= allowed, "{own} calls, but {allowed} are allowed");
                answers.push((now + Duration::from_millis(delay), now, report));
            }
        }
    }

    /// Under constant demand close-sync uses its whole share of every complete window.
    #[test]
    fn constant_demand_uses_the_whole_share(
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
                let (at, sent, report) = answers.remove(0);
                window.done(sent, at, true, Some(report));
            }
            let next_answer = answers.first().map(|(at, ..)| *at);
            match window.admit(now) {
                Ok(()) => {
                    let (accepted, report) = close.call(now);
                    prop_assert!(accepted || spent.len() < 2);
                    // Responses arrive out of order.
                    n_calls += 1;
                    let took = Duration::from_millis(n_calls * 7919 % (delay + 1));
                    answers.push((now + took, now, report));
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
        // The end of a window is known only within the time that a response takes.
        let a_while = u64::from(allowed) * delay / (2000 * u64::from(length));
        let late = u32::from(delay > 0) * (1 + (allowed / 20).max(u32::try_from(a_while).unwrap()).max(1));
        for (number, spent) in spent.iter().enumerate().take(5).skip(1) {
            prop_assert!(*spent + late >= allowed && *spent <= allowed, "{spent} of {allowed} in {number}");
        }
    }

    /// A response never causes a panic or a wait above the maximum.
    #[test]
    fn any_response_is_handled(
        events in proptest::collection::vec(
            (0u64..5000, any::<bool>(), proptest::option::of((any::<u32>(), any::<u32>(), 0u64..400_000)), any::<bool>()),
            1..60,
        ),
    ) {
        let mut now = Instant::now();
        let mut window = Window::new(0.8);
        let mut in_flight = Vec::new();
        for (gap, end, limit, refused) in events {
            now += Duration::from_millis(gap);
            match window.admit(now) {
                Ok(()) => in_flight.push(now),
                Err(at) => prop_assert!(at > now && at <= now + 2 * LONGEST_WAIT, "{:?}", at - now),
            }
            if let (true, Some(sent)) = (end, in_flight.pop()) {
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
