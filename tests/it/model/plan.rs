//! The failures during a run with real parts, drawn from the seed of the history.

use std::fmt;
use std::time::Duration;

use close_sync_simulator::{Effect, Fault, FaultBody, When};

use super::history::History;

/// How long a worker waits for a response from Close.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(600);

/// The conditions and failures of one run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The maximum search lag.
    pub(crate) lag: Duration,
    pub(crate) concurrency: usize,
    /// A second worker is always on standby.
    pub(crate) standby: bool,
    /// The run has its own broker, which is killed during the run.
    pub(crate) own_broker: bool,
    /// Failed messages go to delay queues at once.
    pub(crate) delays: bool,
    /// Faults of Close, each applied once.
    pub(crate) faults: Vec<(&'static str, Fault)>,
    /// The steps, in order.
    pub(crate) steps: Vec<Step>,
}

/// A step of the run. It happens after this many requests to Close, or earlier if everything is settled.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) after_requests: usize,
    pub(crate) action: Action,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    /// Publishes this many more events.
    Publish(usize),
    /// Kills the active worker and starts another one at once.
    Kill,
    /// Starts a worker, then terminates the active one.
    Handover,
    /// Cuts all broker connections of the active worker.
    Cut,
    /// Cuts one of its broker connections, selected by a random number.
    CutOne(usize),
    /// Kills the broker and starts it again.
    KillBroker,
}

impl Action {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Publish(_) => "published",
            Self::Kill => "worker killed",
            Self::Handover => "worker replaced",
            Self::Cut => "broker connections cut",
            Self::CutOne(_) => "one broker connection cut",
            Self::KillBroker => "broker killed",
        }
    }
}

/// The approximate number of requests to Close per event.
const REQUESTS_PER_EVENT: usize = 4;

impl Plan {
    /// Draws a plan. With `one_process` no other worker takes over: it would not have the first one's caches.
    pub(crate) fn generate(history: &History, own_broker: bool, one_process: bool) -> Self {
        // A different random sequence than that of the history.
        let mut random = fastrand::Rng::with_seed(history.seed.wrapping_add(1).wrapping_mul(0x9e37_79b9));
        let lag = [0, 0, 200, 500, 1000, 1500, 3000][random.usize(..7)];
        let requests = history.events.len() * REQUESTS_PER_EVENT;
        let mut steps = Vec::new();
        let (mut remaining, mut at) = (history.events.len(), 0);
        while remaining > 0 {
            let burst = random.usize(1..=15).min(remaining);
            steps.push(Step { after_requests: at, action: Action::Publish(burst) });
            remaining -= burst;
            at += random.usize(..=burst * REQUESTS_PER_EVENT);
        }
        // Only the running worker knows the order of messages in delay queues, so it must not be replaced.
        let delays = !own_broker && random.u8(..4) == 0;
        let disturbances = if delays { 0 } else { random.usize(..=4) };
        for _ in 0..disturbances {
            let action = match random.u8(if one_process { 6..10 } else { 0..10 }) {
                0..4 => Action::Kill,
                4..6 => Action::Handover,
                6..8 => Action::Cut,
                _ => Action::CutOne(random.usize(..8)),
            };
            steps.push(Step { after_requests: random.usize(1..requests), action });
        }
        if own_broker {
            steps.push(Step { after_requests: random.usize(1..requests / 2), action: Action::KillBroker });
        }
        steps.sort_by_key(|step| step.after_requests);
        Self {
            lag: Duration::from_millis(lag),
            concurrency: [1, 2, 4, 16, 64][random.usize(..5)],
            standby: random.u8(..3) == 0 && !one_process,
            own_broker,
            delays,
            faults: (0..random.usize(..=8)).map(|_| fault(&mut random)).collect(),
            steps,
        }
    }

    /// The delays of the delay queues.
    pub(crate) fn delay_queues(&self) -> &'static [&'static str] {
        if self.delays { &["1s", "1500ms", "2s"] } else { &["1s"] }
    }
}

/// Draws a fault for one request to Close.
fn fault(random: &mut fastrand::Rng) -> (&'static str, Fault) {
    let when = if random.bool() { When::BeforeCommit } else { When::AfterCommit };
    let timeout = u64::try_from(TIMEOUT.as_millis()).unwrap_or_default() + 900;
    // The maximum `after` of each kind of request: there are few creations and many reads.
    let (method, path, max_after) = [
        ("POST", "/lead/", 4),
        ("POST", "/lead/", 4),
        ("POST", "/contact/", 6),
        ("PUT", "/lead/", 6),
        ("PUT", "/contact/", 15),
        ("GET", "/lead/", 30),
        ("GET", "/contact/", 30),
        ("POST", "/data/", 20),
    ][random.usize(..8)];
    // A delayed creation may take effect after its client has given up. A delayed update must not: it would
    // overwrite later updates, which neither client nor test could detect.
    let max_latency = if method == "PUT" { TIMEOUT.as_millis() / 2 } else { TIMEOUT.as_millis() + 400 };
    let (label, effect) = match random.u8(..12) {
        0..3 => ("time-out", Effect::Timeout { ms: timeout, when }),
        3..6 => ("connection dropped", Effect::DropConnection { when }),
        6..9 => {
            let code = [500, 502, 504][random.usize(..3)];
            ("5xx", Effect::Status { code, body: FaultBody::Empty, when })
        }
        9 => {
            let effect = Effect::Status { code: 503, body: FaultBody::Html, when: When::BeforeCommit };
            ("5xx", effect)
        }
        10 => ("429", Effect::RateLimited { retry_after: 0.3, with_headers: random.bool() }),
        _ => ("late answer", Effect::Latency { ms: random.u64(100..u64::try_from(max_latency).unwrap()) }),
    };
    (label, Fault::new(effect).on(method, path).after(random.u32(..max_after)).times(1))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lag, concurrency, standby, own_broker, delays, faults, steps } = self;
        writeln!(
            f,
            "search lag {lag:?}, concurrency {concurrency}, standby {standby}, own broker {own_broker}, delay queues {delays}"
        )?;
        for (_, fault) in faults {
            let Fault { method, path, after, effect, .. } = fault;
            let (method, path) = (method.as_deref().unwrap_or("*"), path.as_deref().unwrap_or("*"));
            writeln!(f, "{method} {path} after {after}: {effect:?}")?;
        }
        for Step { after_requests, action } in steps {
            writeln!(f, "after {after_requests} requests: {action:?}")?;
        }
        Ok(())
    }
}
