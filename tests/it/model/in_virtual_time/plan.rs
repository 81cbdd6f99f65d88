//! The conditions and failures of a run, drawn from the seed.

use std::ops::Range;
use std::time::Duration;

use close_sync_simulator::{Behaviour, Lag, Limits, Rate};

use super::person::Manner;
use crate::support::behaviour;

/// The parameters of a run, apart from the history.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The percentage of calls to Close that fail or are delayed.
    pub(super) failure_percent: u8,
    /// When Close is unreachable.
    pub(super) outage: Option<Range<Duration>>,
    /// The usual maximum latency of a request, and of a response.
    pub(super) latency: Duration,
    /// How Close behaves. Search lags up to 10 seconds, less than the workers assume.
    pub(super) behaviour: Behaviour,
    pub(super) limits: Limits,
    /// The percentage of calls after which a person changes a record.
    pub(super) person_percent: u8,
    pub(super) person: Manner,
    /// When the active worker is disrupted, and how.
    pub(super) disruptions: Vec<(Duration, Disruption)>,
    /// A second worker is on standby.
    pub(super) standby: bool,
    /// The maximum pause between two published messages.
    pub(super) gap: Duration,
    pub(super) concurrency: usize,
    pub(super) prefetch: usize,
}

/// A disruption of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disruption {
    /// The process is killed and loses its caches. Another one starts at once.
    Killed,
    /// The process loses its broker connection and reconnects.
    Disconnected,
}

impl Plan {
    pub(super) fn draw(random: &mut fastrand::Rng) -> Self {
        let millis = Duration::from_millis;
        let disruptions = (0..random.usize(..5)).map(|_| {
            let disruption = if random.u8(..3) == 0 { Disruption::Disconnected } else { Disruption::Killed };
            (millis(random.u64(..90_000)), disruption)
        });
        let mut disruptions: Vec<_> = disruptions.collect();
        disruptions.sort_by_key(|(at, _)| *at);
        let outage = (random.u8(..5) == 0).then(|| {
            let from = millis(random.u64(..60_000));
            from..from + millis(random.u64(1000..40_000))
        });
        let limits = match random.u8(..3) {
            0 => Limits::unlimited(),
            1 => Limits::documented(),
            _ => Limits {
                lead: Rate::new(20, 8),
                // With the smaller one, a write waits for seconds after its read.
                contact: Rate::new([20, 4][random.usize(..2)], 8),
                search: Rate::new(8, 8),
                others: Rate::new(20, 8),
                organization_multiple: 3,
            },
        };
        Self {
            failure_percent: [0, 2, 10, 25][random.usize(..4)],
            outage,
            latency: millis([20, 100, 150][random.usize(..3)]),
            behaviour: draw_behaviour(random),
            limits,
            person_percent: [0, 10, 60][random.usize(..3)],
            person: if random.bool() { Manner::Careful } else { Manner::Free },
            disruptions,
            standby: random.bool(),
            gap: millis([0, 100, 1500, 5000][random.usize(..4)]),
            concurrency: [1, 4, 32][random.usize(..3)],
            prefetch: [2, 20, 200][random.usize(..3)],
        }
    }
}

fn draw_behaviour(random: &mut fastrand::Rng) -> Behaviour {
    let up_to = |seconds| Lag::Between(Duration::ZERO, Duration::from_secs(seconds));
    let search_lag = [0, 2, 10][random.usize(..3)];
    let mut lag = || random.bool().then(|| up_to(random.u64(..=search_lag)));
    let (creation_search_lag, custom_field_search_lag) = (lag(), lag());
    let read_lag = up_to([0, 0, 1, 3][random.usize(..4)]);
    let search_lag = up_to(search_lag);
    Behaviour { search_lag, creation_search_lag, custom_field_search_lag, read_lag, ..behaviour::any(random) }
}

/// The outcome of one call to Close.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallOutcome {
    /// The latency of the request.
    pub(super) request_latency: Duration,
    /// The latency of the response.
    pub(super) response_latency: Duration,
    /// The request takes effect.
    pub(super) takes_effect: bool,
    /// The request takes effect even if its client has given up.
    pub(super) survives_client: bool,
    pub(super) result: CallResult,
}

/// What the client of a call gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallResult {
    Answer,
    Status(u16),
    Lost,
    Unreachable,
    NoResponse,
}

impl Plan {
    /// Draws the outcome of a call `at` this time since the start.
    pub(super) fn draw_call(&self, random: &mut fastrand::Rng, creates: bool, at: Duration) -> CallOutcome {
        let latency = u64::try_from(self.latency.as_millis()).unwrap_or(u64::MAX);
        let mut travel = || Duration::from_millis(random.u64(1..=latency));
        let (mut request_latency, response_latency) = (travel(), travel());
        let survives_client = random.bool();
        let in_outage = self.outage.as_ref().is_some_and(|outage| outage.contains(&at));
        let (takes_effect, result) = if in_outage {
            (false, if random.bool() { CallResult::Unreachable } else { CallResult::Status(503) })
        } else if random.u8(..100) < self.failure_percent {
            match random.u8(..12) {
                0 => (false, CallResult::Unreachable),
                1 => (false, CallResult::Lost),
                2 | 3 => (true, CallResult::Lost),
                4 => (false, CallResult::Status([500, 502, 503, 504][random.usize(..4)])),
                5 => (true, CallResult::Status([500, 502, 504][random.usize(..3)])),
                6 => (false, CallResult::NoResponse),
                7 => (true, CallResult::NoResponse),
                8 => (false, CallResult::Status([408, 409, 421, 423, 425, 499][random.usize(..6)])),
                9 => (true, CallResult::Status([408, 499][random.usize(..2)])),
                // The answer of a proxy, not of Close.
                10 => (false, CallResult::Status([401, 402, 403, 404][random.usize(..4)])),
                _ => (true, CallResult::Answer),
            }
        } else {
            (true, CallResult::Answer)
        };
        // A creation may take longer than its client waits. An update must not: if it arrived that late, it would
        // overwrite later updates, and close-sync cannot prevent that.
        if creates && result != CallResult::Unreachable && random.u8(..100) < self.failure_percent {
            request_latency = Duration::from_millis(random.u64(1..=4500));
        }
        CallOutcome { request_latency, response_latency, takes_effect, survives_client, result }
    }
}
