//! What goes wrong while a history is played, drawn from its seed.

use std::fmt;
use std::time::Duration;

use close_sync_simulator::{Effect, Fault, FaultBody, When};

use super::history::History;

/// How long a worker waits for an answer of Close.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(600);

/// What a history meets when it is played with real parts.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// How late a write shows in search, at most.
    pub(crate) lag: Duration,
    pub(crate) concurrency: usize,
    /// A second worker stands by all the time.
    pub(crate) standby: bool,
    /// On a broker of its own, which is killed on the way.
    pub(crate) own_broker: bool,
    /// Failed messages go through delay queues at once.
    pub(crate) delays: bool,
    /// What Close does, each once.
    pub(crate) faults: Vec<(&'static str, Fault)>,
    /// In order.
    pub(crate) steps: Vec<Step>,
}

/// Something that happens once Close has had so many requests, or sooner if nothing is left to do.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) after_requests: usize,
    pub(crate) what: What,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum What {
    /// So many events more are published.
    Publish(usize),
    /// The worker that works is killed, and another one started at once.
    Kill,
    /// A worker is started, and the old one told to end.
    Handover,
    /// The worker that works loses its connections to the broker.
    Cut,
    /// It loses one of them, by a drawn number.
    CutOne(usize),
    /// The broker is killed and started again.
    KillBroker,
}

impl What {
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

/// How many requests Close gets for an event, by and large.
const REQUESTS_PER_EVENT: usize = 4;

impl Plan {
    /// With `one_process`, no worker is replaced by one that does not know what it knew.
    pub(crate) fn generate(history: &History, own_broker: bool, one_process: bool) -> Self {
        // Another stream than that of the history.
        let mut random = fastrand::Rng::with_seed(history.seed.wrapping_add(1).wrapping_mul(0x9e37_79b9));
        let lag = [0, 0, 200, 500, 1000, 1500, 3000][random.usize(..7)];
        let requests = history.events.len() * REQUESTS_PER_EVENT;
        let mut steps = Vec::new();
        let (mut left, mut at) = (history.events.len(), 0);
        while left > 0 {
            let burst = random.usize(1..=15).min(left);
            steps.push(Step { after_requests: at, what: What::Publish(burst) });
            left -= burst;
            at += random.usize(..=burst * REQUESTS_PER_EVENT);
        }
        // Who knew the order of messages in delay queues must not be gone then.
        let delays = !own_broker && random.u8(..4) == 0;
        let disturbances = if delays { 0 } else { random.usize(..=4) };
        for _ in 0..disturbances {
            let what = match random.u8(if one_process { 6..10 } else { 0..10 }) {
                0..4 => What::Kill,
                4..6 => What::Handover,
                6..8 => What::Cut,
                _ => What::CutOne(random.usize(..8)),
            };
            steps.push(Step { after_requests: random.usize(1..requests), what });
        }
        if own_broker {
            steps.push(Step { after_requests: random.usize(1..requests / 2), what: What::KillBroker });
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

    /// How long messages wait in delay queues.
    pub(crate) fn delay_queues(&self) -> &'static [&'static str] {
        if self.delays { &["1s", "1500ms", "2s"] } else { &["1s"] }
    }
}

/// Something Close does to one request.
fn fault(random: &mut fastrand::Rng) -> (&'static str, Fault) {
    let when = if random.bool() { When::BeforeCommit } else { When::AfterCommit };
    let long = u64::try_from(TIMEOUT.as_millis()).unwrap_or_default() + 900;
    // The first requests are few of each kind, and creations are few at all.
    let (method, path, most) = [
        ("POST", "/lead/", 4),
        ("POST", "/lead/", 4),
        ("POST", "/contact/", 6),
        ("PUT", "/lead/", 6),
        ("PUT", "/contact/", 15),
        ("GET", "/lead/", 30),
        ("GET", "/contact/", 30),
        ("POST", "/data/", 20),
    ][random.usize(..8)];
    // It may take effect when its sender has given up already. Not so changes: they would undo what came
    // after them, and nobody could tell.
    let latest = if method == "PUT" { TIMEOUT.as_millis() / 2 } else { TIMEOUT.as_millis() + 400 };
    let (label, effect) = match random.u8(..12) {
        0..3 => ("time-out", Effect::Timeout { ms: long, when }),
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
        _ => ("late answer", Effect::Latency { ms: random.u64(100..u64::try_from(latest).unwrap()) }),
    };
    (label, Fault::new(effect).on(method, path).after(random.u32(..most)).times(1))
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
        for Step { after_requests, what } in steps {
            writeln!(f, "after {after_requests} requests: {what:?}")?;
        }
        Ok(())
    }
}
