//! The time of day at Close. Its records and its event log say when something was created, and what is compared with that
//! must not depend on the clock of this machine.
//!
//! The date of a record that Close has just created tells the time. The header `Date` does not: a proxy may have set it. The
//! machine's clock may be set at any moment, so it counts only until the first creation. From then on the monotonic clock
//! measures the time, together with the time for which the machine was suspended, and each creation corrects it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

/// A greater difference is a mistake in the set-up of the machine.
const LARGE: SignedDuration = SignedDuration::from_secs(30);

/// Tells the time. Clones share it.
#[derive(Clone)]
pub struct Clock {
    own: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    suspended: fn() -> SignedDuration,
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// When the first record was created: by the monotonic clock, and by the machine's less [`suspended`].
    since: Option<(Instant, Timestamp)>,
    /// How far Close's clock is ahead of these.
    ahead: SignedDuration,
    /// The difference that was last logged.
    logged: SignedDuration,
}

impl Clock {
    /// The clock of the system.
    pub fn system() -> Self {
        Self { suspended, ..Self::new(Timestamp::now) }
    }

    /// Another clock in place of that of the system, on a machine that is never suspended.
    pub fn new(own: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self { own: Arc::new(own), suspended: || SignedDuration::ZERO, state: Arc::default() }
    }

    fn with<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The time at Close, as far as new records have shown it.
    pub fn now(&self) -> Timestamp {
        let state = self.with(|state| *state);
        self.own_time(state).saturating_add(state.ahead).unwrap_or(Timestamp::MAX)
    }

    fn own_time(&self, state: State) -> Timestamp {
        let Some((began, time)) = state.since else { return (self.own)() };
        let elapsed = SignedDuration::try_from(began.elapsed()).unwrap_or(SignedDuration::MAX);
        time.saturating_add(elapsed.saturating_add((self.suspended)())).unwrap_or(Timestamp::MAX)
    }

    /// Close created a record at this time, perhaps in whole seconds. The answer has just arrived, this long after the call
    /// was sent.
    pub fn synchronize(&self, created: Timestamp, took: Duration) {
        let took = SignedDuration::try_from(took).unwrap_or(SignedDuration::MAX);
        let machine = (self.own)();
        let differs = self.with(|state| {
            let own = self.own_time(*state);
            state.since.get_or_insert_with(|| {
                (Instant::now(), own.saturating_sub((self.suspended)()).unwrap_or(Timestamp::MIN))
            });
            let least = created.duration_since(own);
            let most = least.saturating_add(took).saturating_add(SignedDuration::from_secs(1));
            state.narrow(least, most, own.duration_since(machine))
        });
        if let Some(ahead) = differs {
            tracing::warn!(
                event = "clock_differs",
                seconds = ahead.as_secs(),
                "the clock of this machine differs from that of Close, using Close's"
            );
        }
    }
}

/// How long this machine has been suspended, from some moment on, give or take microseconds. The monotonic clock does not count
/// that. The pause of a virtual machine that does not know of it is counted by neither clock.
#[cfg(target_os = "linux")]
fn suspended() -> SignedDuration {
    use rustix::time::{ClockId, clock_gettime};

    let [all, awake] = [ClockId::Boottime, ClockId::Monotonic].map(|clock| {
        let time = clock_gettime(clock);
        let nanoseconds = i32::try_from(time.tv_nsec).unwrap_or_default();
        SignedDuration::new(time.tv_sec, nanoseconds)
    });
    all.saturating_sub(awake)
}

/// Not known here. After a suspension the clock is late until the next creation.
#[cfg(not(target_os = "linux"))]
fn suspended() -> SignedDuration {
    SignedDuration::ZERO
}

impl State {
    /// Close's clock is ahead of the monotonic one by a time between these, and that is ahead of the machine's by `drift`.
    /// Returns a large difference between Close's and the machine's, unless it was logged.
    fn narrow(
        &mut self,
        least: SignedDuration,
        most: SignedDuration,
        drift: SignedDuration,
    ) -> Option<SignedDuration> {
        self.ahead = self.ahead.clamp(least, most);
        let ahead = self.ahead.saturating_add(drift);
        let is_logged = ahead.saturating_sub(self.logged).abs() < LARGE;
        let differs = ahead.abs() >= LARGE && !is_logged;
        if differs || ahead.abs() < LARGE {
            self.logged = if differs { ahead } else { SignedDuration::ZERO };
        }
        differs.then_some(ahead)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicI64;
    use std::sync::atomic::Ordering::Relaxed;

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use reqwest::Method;
    use reqwest::header::HeaderValue;
    use serde_json::{Value, json};

    use super::*;
    use crate::close::{Api, Client, CloseError, Response, Transport};
    use crate::domain::plan::{ContactValues, Step};
    use crate::domain::record::{ContactId, LeadId};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_is_that_of_new_records() {
        let clock = Clock::new(move || at(1000));
        let shared = clock.clone();
        for (shown, took, now) in [
            (1000, 0, 1000),
            (999, 0, 1000), // the second may be over
            (998, 0, 999),
            (1003, 0, 1003),
            // A late answer says what the time was.
            (990, 15, 1003),
            (985, 15, 1001),
            (1000, 0, 1001),
        ] {
            clock.synchronize(at(shown), Duration::from_secs(took));
            assert_eq!(shared.now(), at(now), "{shown}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_machine_whose_clock_is_set_tells_the_same_time() {
        let own = Arc::new(AtomicI64::new(1000));
        let clock = {
            let own = Arc::clone(&own);
            Clock::new(move || at(own.load(Relaxed)))
        };
        own.store(2000, Relaxed);
        assert_eq!(clock.now(), at(2000), "no answer yet");
        clock.synchronize(at(2003), Duration::ZERO);
        own.store(90_000, Relaxed);
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(clock.now(), at(2010));
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_goes_on_while_the_machine_is_suspended() {
        static SUSPENDED: AtomicI64 = AtomicI64::new(70);
        let clock = Clock {
            suspended: || SignedDuration::from_secs(SUSPENDED.load(Relaxed)),
            ..Clock::new(|| at(1000))
        };
        clock.synchronize(at(1003), Duration::ZERO);
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(clock.now(), at(1010));
        SUSPENDED.store(100, Relaxed);
        assert_eq!(clock.now(), at(1040));
    }

    #[tokio::test(start_paused = true)]
    async fn no_time_is_too_far_away() {
        let clock = Clock::new(move || at(100_000));
        clock.synchronize(Timestamp::MAX, Duration::MAX);
        assert!(clock.now() >= at(100_000));
        clock.synchronize(Timestamp::MIN, Duration::ZERO);
        assert!(clock.now() <= at(100_000));
        clock.synchronize(at(100_000), Duration::ZERO);
        assert!((at(100_000)..=at(100_001)).contains(&clock.now()));
    }

    /// The answer to a creation.
    struct Created;

    impl Transport for Created {
        fn send<'a>(
            &'a self,
            _: Method,
            _: &'a str,
            _: Option<&'a Value>,
            _: usize,
        ) -> BoxFuture<'a, Result<Response, CloseError>> {
            let contact = json!({"id": "cont_1", "lead_id": "lead_1", "emails": [],
                "date_created": "2100-01-01T00:00:00.5Z", "date_updated": "2100-01-01T00:00:00.5Z"});
            let mut response = Response::with_status(200, contact);
            response.headers.insert("date", HeaderValue::from_static("Fri, 01 Jan 2500 00:00:00 GMT"));
            std::future::ready(Ok(response)).boxed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_record_tells_the_time_and_a_changed_one_does_not() {
        let create = Step::CreateContact { lead: LeadId::new("lead_1"), contact: ContactValues::default() };
        let update = Step::UpdateContact { id: ContactId::new("cont_1"), changes: ContactValues::default() };
        for (step, told) in [(create, "2100-01-01T00:00:00.5Z"), (update, "1970-01-01T00:00:00Z")] {
            let clock = Clock::new(|| Timestamp::UNIX_EPOCH);
            let client = Client::with_transport(Created, Duration::from_secs(9), 1.0, |_| {});
            let client = client.with_clock(clock.clone());
            let permit = client.acquire(&step).await;
            client.write(&step, permit).await.unwrap();
            assert_eq!(clock.now().to_string(), told);
        }
    }

    #[test]
    fn a_difference_is_logged_once() {
        let seconds = SignedDuration::from_secs;
        let mut state = State::default();
        let mut narrow = |ahead| {
            state.narrow(seconds(ahead), seconds(ahead), SignedDuration::ZERO).map(|ahead| ahead.as_secs())
        };
        let differences = [20, 60, 65, 60, 95, 100, 10, 60].map(&mut narrow);
        assert_eq!(differences, [None, Some(60), None, None, Some(95), None, None, Some(60)]);
    }
}
