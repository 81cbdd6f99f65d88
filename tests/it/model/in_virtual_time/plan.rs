//! What goes wrong in a history, drawn from its seed.

use std::ops::Range;
use std::time::Duration;

use close_sync_simulator::{Limits, Rate};

/// Everything about a run that is not the history.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Of a hundred calls, how many meet trouble.
    pub(super) trouble: u8,
    /// When nothing gets through.
    pub(super) outage: Option<Range<Duration>>,
    /// The longest a request, or its answer, usually travels.
    pub(super) latency: Duration,
    /// The longest search lags behind.
    pub(super) search_lag: Duration,
    pub(super) limits: Limits,
    /// What happens to the active worker, and when.
    pub(super) blows: Vec<(Duration, Blow)>,
    /// A second worker stands by.
    pub(super) standby: bool,
    /// The longest pause between two messages that are published.
    pub(super) gap: Duration,
    pub(super) concurrency: usize,
    pub(super) prefetch: usize,
}

/// What happens to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blow {
    /// The process is gone, with all it knew. Another one starts at once.
    Killed,
    /// It loses the broker, and connects again.
    CutOff,
}

impl Plan {
    pub(super) fn draw(random: &mut fastrand::Rng) -> Self {
        let seconds = Duration::from_secs;
        let millis = Duration::from_millis;
        let blows = (0..random.usize(..5)).map(|_| {
            let blow = if random.u8(..3) == 0 { Blow::CutOff } else { Blow::Killed };
            (millis(random.u64(..90_000)), blow)
        });
        let mut blows: Vec<_> = blows.collect();
        blows.sort_by_key(|(at, _)| *at);
        let outage = (random.u8(..5) == 0).then(|| {
            let from = millis(random.u64(..60_000));
            from..from + millis(random.u64(1000..40_000))
        });
        let limits = match random.u8(..3) {
            0 => Limits::unlimited(),
            1 => Limits::documented(),
            _ => Limits {
                lead: Rate::new(20, 8),
                contact: Rate::new(20, 8),
                search: Rate::new(8, 8),
                others: Rate::new(20, 8),
                organization_multiple: 3,
            },
        };
        Self {
            trouble: [0, 2, 10, 25][random.usize(..4)],
            outage,
            latency: millis([20, 100, 150][random.usize(..3)]),
            search_lag: seconds([0, 2, 10][random.usize(..3)]),
            limits,
            blows,
            standby: random.bool(),
            gap: millis([0, 100, 1500, 5000][random.usize(..4)]),
            concurrency: [1, 4, 32][random.usize(..3)],
            prefetch: [2, 20, 200][random.usize(..3)],
        }
    }
}

/// What becomes of one call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    /// How long it travels.
    pub(super) there: Duration,
    /// How long its answer travels.
    pub(super) back: Duration,
    /// It takes effect.
    pub(super) arrives: bool,
    /// It takes effect even if its sender is gone meanwhile.
    pub(super) stubborn: bool,
    pub(super) end: End,
}

/// What the sender of a call learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Answer,
    Status(u16),
    Lost,
    Unreachable,
    Silence,
}

impl Plan {
    /// `at` is the time since the start.
    pub(super) fn fate(&self, random: &mut fastrand::Rng, creates: bool, at: Duration) -> Completion {
        let latency = u64::try_from(self.latency.as_millis()).unwrap_or(u64::MAX);
        let mut travel = || Duration::from_millis(random.u64(1..=latency));
        let (mut there, back) = (travel(), travel());
        let stubborn = random.bool();
        let is_out = self.outage.as_ref().is_some_and(|outage| outage.contains(&at));
        let (arrives, end) = if is_out {
            (false, if random.bool() { End::Unreachable } else { End::Status(503) })
        } else if random.u8(..100) < self.trouble {
            match random.u8(..9) {
                0 => (false, End::Unreachable),
                1 => (false, End::Lost),
                2 | 3 => (true, End::Lost),
                4 => (false, End::Status([500, 502, 503, 504][random.usize(..4)])),
                5 => (true, End::Status([500, 502, 504][random.usize(..3)])),
                6 => (false, End::Silence),
                7 => (true, End::Silence),
                _ => (true, End::Answer),
            }
        } else {
            (true, End::Answer)
        };
        // A creation may be under way for longer than anybody waits for it. A change may not: nothing keeps
        // one that arrives that late from undoing what came after it.
        if creates && end != End::Unreachable && random.u8(..100) < self.trouble {
            there = Duration::from_millis(random.u64(1..=4500));
        }
        Completion { there, back, arrives, stubborn, end }
    }
}
