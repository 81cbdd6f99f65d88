//! The conditions and failures of a run, drawn from the seed.

use std::ops::Range;
use std::time::Duration;

use close_sync_simulator::{Behaviour, Lag, Limits, Rate};
use jiff::SignedDuration;

use super::mutant::Mutant;
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
    /// How Close behaves, except for search.
    pub(super) behaviour: Behaviour,
    pub(super) search: Search,
    /// The event log answers. Otherwise only search and the clock can prove that a creation did not happen.
    pub(super) event_log_answers: bool,
    /// How far Close's clock is ahead of that of the workers, until that is set.
    pub(super) close_ahead: SignedDuration,
    pub(super) clock_is_set: Duration,
    /// `None` if an administrator did not make one. Then search lags less than the workers assume.
    pub(super) journal: Option<JournalPlan>,
    /// What the workers lack. Only to prove that the model notices it.
    pub(super) mutant: Option<Mutant>,
    pub(super) limits: Limits,
    /// The part of the limits that the workers use.
    pub(super) share: f64,
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

/// How far search lags, for each kind of change apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Search {
    pub(super) creations: Lagging,
    pub(super) custom_fields: Lagging,
    pub(super) rest: Lagging,
    /// A change may overtake an earlier one by this much, which is less than the workers assume.
    pub(super) disorder: Duration,
}

/// When search shows a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lagging {
    /// This much later.
    By(Duration),
    /// The index stands still for a while, and then shows all.
    StandsStill { from: Duration, until: Duration },
}

impl Lagging {
    fn draw(random: &mut fastrand::Rng, longest: Duration) -> Self {
        let longest = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
        let lag = Duration::from_millis(random.u64(0..=longest));
        match random.u8(..4) {
            0 => Self::By(Duration::ZERO),
            1 => Self::By(Duration::from_millis(longest)),
            2 => Self::By(lag),
            _ => {
                let from = Duration::from_millis(random.u64(..60_000));
                Self::StandsStill { from, until: from + lag }
            }
        }
    }

    fn at(self, elapsed: Duration) -> Duration {
        match self {
            Self::By(lag) => lag,
            Self::StandsStill { from, until } if elapsed >= from => until.saturating_sub(elapsed),
            Self::StandsStill { .. } => Duration::ZERO,
        }
    }
}

impl Search {
    /// Sets how far changes lag that are made now.
    pub(super) fn apply(&self, behaviour: &mut Behaviour, elapsed: Duration) {
        let lag = |lagging: Lagging| {
            let least = lagging.at(elapsed);
            Lag::Between(least, least + self.disorder)
        };
        behaviour.search_lag = lag(self.rest);
        behaviour.creation_search_lag = Some(lag(self.creations));
        behaviour.custom_field_search_lag = Some(lag(self.custom_fields));
    }
}

/// The journal on the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct JournalPlan {
    /// The maximum latency of an entry, and of its confirm. An entry in flight may arrive after the death of its worker.
    pub(super) latency: Duration,
    /// How long entries are kept.
    pub(super) max_age: Duration,
    /// How many messages are deleted at once.
    pub(super) segment: usize,
}

/// A disruption of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disruption {
    /// The process is killed and loses its caches. Another one starts at once.
    Killed,
    /// The process loses its broker connection and reconnects.
    Disconnected,
    /// All processes lose their connections, as when a node of the broker fails.
    AllDisconnected,
    /// The broker gives the queue to the standby, and the process does not know it yet: for this long, unless the journal
    /// says so.
    Superseded(Duration),
}

impl Plan {
    /// Nothing fails.
    pub(super) fn calm() -> Self {
        let at_once = Lagging::By(Duration::ZERO);
        Self {
            failure_percent: 0,
            outage: None,
            latency: Duration::from_millis(1),
            behaviour: Behaviour::default(),
            search: Search {
                creations: at_once,
                custom_fields: at_once,
                rest: at_once,
                disorder: Duration::ZERO,
            },
            event_log_answers: true,
            close_ahead: SignedDuration::ZERO,
            clock_is_set: Duration::ZERO,
            journal: Some(JournalPlan {
                latency: Duration::ZERO,
                max_age: Duration::from_hours(48),
                segment: 20,
            }),
            mutant: None,
            limits: Limits::unlimited(),
            share: 1.0,
            person_percent: 0,
            person: Manner::Careful,
            disruptions: Vec::new(),
            standby: true,
            gap: Duration::ZERO,
            concurrency: 4,
            prefetch: 20,
        }
    }

    /// The same for workers that lack a protection: with all that the protection is for, and often.
    pub(super) fn with_mutant(self, mutant: Mutant, random: &mut fastrand::Rng) -> Self {
        let millis = Duration::from_millis;
        let long = Lagging::By(Duration::from_mins(30));
        let disruptions = (1..=20).map(|number| {
            let disruption = if random.bool() {
                Disruption::Killed
            } else {
                Disruption::Superseded(millis(random.u64(..15_000)))
            };
            (millis(number * 3000 + random.u64(..1000)), disruption)
        });
        Self {
            mutant: Some(mutant),
            search: Search { creations: long, custom_fields: long, rest: long, disorder: Duration::ZERO },
            event_log_answers: true,
            journal: Some(JournalPlan {
                latency: millis(1000),
                max_age: Duration::from_hours(48),
                segment: 20,
            }),
            person: Manner::Careful,
            disruptions: disruptions.collect(),
            standby: true,
            gap: millis(1500),
            ..self
        }
    }

    pub(super) fn draw(random: &mut fastrand::Rng) -> Self {
        let millis = Duration::from_millis;
        let has_journal = random.u8(..6) > 0;
        // Slow ones last for hours, so that caches expire, the event log hides data and the journal deletes entries.
        let is_slow = has_journal && random.u8(..16) == 0;
        let gap = if is_slow { 1_200_000 } else { [0, 100, 1500, 5000][random.usize(..4)] };
        let journal = has_journal.then(|| JournalPlan {
            latency: millis([20, 20, 200, 1000][random.usize(..4)]),
            max_age: Duration::from_hours(if is_slow { 1 } else { 48 }),
            segment: random.usize(1..20),
        });
        let during = if is_slow { 8 * 3_600_000 } else { 90_000 };
        let disruptions = (0..random.usize(..5)).map(|_| {
            let disruption = match random.u8(..8) {
                0 => Disruption::Disconnected,
                1 => Disruption::AllDisconnected,
                2 | 3 if has_journal => Disruption::Superseded(millis(random.u64(..15_000))),
                _ => Disruption::Killed,
            };
            (millis(random.u64(..during)), disruption)
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
        // Without the event log, a run can last as long as search lags.
        let event_log_answers = random.u8(..64) > 0;
        Self {
            failure_percent: [0, 2, 10, 25][random.usize(..4)],
            outage,
            latency: millis([20, 100, 150][random.usize(..3)]),
            behaviour: draw_behaviour(random),
            search: draw_search(random, has_journal),
            event_log_answers,
            journal,
            mutant: None,
            limits,
            share: 1.0,
            // Only the event log tells what a person deleted.
            person_percent: if event_log_answers { [0, 10, 60][random.usize(..3)] } else { 0 },
            person: if random.bool() { Manner::Careful } else { Manner::Free },
            disruptions,
            standby: random.bool(),
            gap: millis(gap),
            concurrency: [1, 4, 32][random.usize(..3)],
            prefetch: [2, 20, 200][random.usize(..3)],
            close_ahead: SignedDuration::from_mins([0, 0, 10, -600][random.usize(..4)]),
            clock_is_set: [millis(random.u64(..during)), Duration::MAX][random.usize(..2)],
        }
    }
}

fn draw_behaviour(random: &mut fastrand::Rng) -> Behaviour {
    let up_to = |seconds| Lag::Between(Duration::ZERO, Duration::from_secs(seconds));
    let read_lag = up_to([0, 0, 1, 3][random.usize(..4)]);
    let event_lag = up_to([0, 0, 5, 300][random.usize(..4)]);
    Behaviour { read_lag, event_lag, ..behaviour::any(random) }
}

fn draw_search(random: &mut fastrand::Rng, has_journal: bool) -> Search {
    let longest = [0, 60, 1800, LONGEST_SEARCH_LAG][random.usize(..4)];
    let longest = Duration::from_secs(if has_journal { longest } else { 0 });
    let mut lag = || Lagging::draw(random, longest);
    let (creations, custom_fields, rest) = (lag(), lag(), lag());
    let disorder = Duration::from_secs([0, 2, 10][random.usize(..3)]);
    Search { creations, custom_fields, rest, disorder }
}

/// In seconds: 24 hours after a creation was sent, with what it takes to arrive and with disorder.
const LONGEST_SEARCH_LAG: u64 = 24 * 3600 - 20;

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
