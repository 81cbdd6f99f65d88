//! One history on its way through real parts.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lapin::BasicProperties;
use serde_json::Value;

use super::history::History;
use super::plan::{Plan, Step, What};
use crate::support::{Bench, Node, Proxy, Worker};

/// No history takes longer, even with many at once.
const PATIENCE: Duration = Duration::from_secs(100);

/// A worker with its own way to the broker.
struct Running {
    worker: Worker,
    proxy: Proxy,
    alive: bool,
    /// Lines of its log that were read.
    read: usize,
}

/// The end of a history.
pub(crate) struct Played {
    pub(crate) leads: Vec<Value>,
    /// Numbers of the messages in the order in which they were settled.
    pub(crate) settled: Vec<usize>,
    /// What was wrong besides what Close holds.
    pub(crate) trouble: String,
    /// What happened how often.
    pub(crate) faults: BTreeMap<&'static str, usize>,
    journal: String,
    log: String,
}

impl Played {
    /// What was wrong, with everything needed to find out why.
    pub(crate) fn told(&self, wrong: &str) -> String {
        let path =
            std::env::temp_dir().join(format!("close-sync-model-{}.log", uuid::Uuid::now_v7().simple()));
        let kept = std::fs::write(&path, &self.log);
        let place = kept.map_or_else(|error| error.to_string(), |()| path.display().to_string());
        format!("{}settled: {:?}\n{wrong}logs and requests: {place}\n", self.journal, self.settled)
    }
}

pub(crate) struct Play<'a> {
    bench: &'a Bench,
    node: Option<&'a Node>,
    history: &'a History,
    plan: &'a Plan,
    base: Timestamp,
    start: Instant,
    began: Timestamp,
    workers: Vec<Running>,
    published: usize,
    /// When, which message, and as what.
    settled: Vec<(Timestamp, usize, String)>,
    trouble: String,
    faults: BTreeMap<&'static str, usize>,
    journal: String,
}

impl<'a> Play<'a> {
    pub(crate) fn new(
        bench: &'a Bench,
        node: Option<&'a Node>,
        history: &'a History,
        plan: &'a Plan,
        base: Timestamp,
    ) -> Self {
        Self {
            bench,
            node,
            history,
            plan,
            base,
            start: Instant::now(),
            began: Timestamp::now(),
            workers: Vec::new(),
            published: 0,
            settled: Vec::new(),
            trouble: String::new(),
            faults: BTreeMap::new(),
            journal: String::new(),
        }
    }

    /// Something that is wrong.
    pub(crate) fn trouble(&mut self, what: &str) {
        self.trouble.push_str(what);
    }

    pub(crate) async fn perform(&mut self) {
        for (_, fault) in &self.plan.faults {
            self.bench.simulator.fault(fault.clone());
        }
        // The queue has to be there before something is published.
        self.hire().await;
        self.ready().await;
        if self.plan.standby {
            self.hire().await;
        }
        for Step { after_requests, what } in &self.plan.steps {
            self.until(async |play| {
                play.bench.simulator.requests().len() >= *after_requests || play.all_settled()
            })
            .await;
            self.step(*what).await;
        }
        self.come_to_rest().await;
        let dead = self.bench.depth(".dead").await;
        if dead > 0 {
            if !self.plan.delays {
                let _ = writeln!(self.trouble, "{dead} dead letters, and no fault deserved one");
            }
            self.hire().await;
            self.bench.output(&["dlq", "replay", "--all", "--no-wait"]).await;
            self.come_to_rest().await;
        }
        let dead = self.bench.depth(".dead").await;
        if dead > 0 {
            let _ = writeln!(self.trouble, "{dead} dead letters again after a replay");
        }
        let counts = self.settlements();
        let missing: Vec<_> =
            self.history.published().filter(|event| !counts.contains_key(&event.number)).collect();
        for event in missing {
            let _ = writeln!(self.trouble, "never settled: {event}");
        }
        let disturbed = self.plan.steps.iter().any(|step| !matches!(step.what, What::Publish(_)));
        let published = self.history.published().count();
        if !disturbed && !self.plan.delays && self.settled.len() != published {
            let _ = writeln!(self.trouble, "{published} published, {} settled", self.settled.len());
        }
    }

    async fn step(&mut self, what: What) {
        let _ = writeln!(self.journal, "{:>6} ms: {what:?}", self.start.elapsed().as_millis());
        match what {
            What::Publish(events) => {
                let (from, to) = (self.published, self.published + events);
                let messages = self.history.events[from..to].iter();
                for event in
                    messages.flat_map(|event| std::iter::repeat_n(event, 1 + usize::from(event.twice)))
                {
                    let body = event.message(self.base).to_string();
                    let properties =
                        BasicProperties::default().with_message_id(event.number.to_string().into());
                    self.bench.publish_bytes(body.as_bytes(), properties).await;
                }
                self.published = to;
                return;
            }
            What::Kill => {
                let active = self.active().await;
                self.workers[active].alive = false;
                self.workers[active].worker.kill().await;
                self.hire().await;
            }
            What::Handover => {
                let active = self.active().await;
                self.hire().await;
                self.ready().await;
                self.workers[active].alive = false;
                self.workers[active].worker.terminate().await;
            }
            What::Cut => {
                let active = self.active().await;
                self.workers[active].proxy.cut();
            }
            What::CutOne(drawn) => {
                let active = self.active().await;
                self.workers[active].proxy.cut_one(drawn);
            }
            What::KillBroker => {
                let node = self.node.unwrap();
                node.kill().await;
                node.start_again().await;
            }
        }
        *self.faults.entry(what.label()).or_default() += 1;
    }

    /// Starts a worker.
    async fn hire(&mut self) {
        let proxy = Proxy::start(&self.bench.amqp_url).await;
        let mut environment: BTreeMap<_, _> = self.bench.environment().into_iter().collect();
        environment.insert("AMQP_URL".to_owned(), proxy.url.clone());
        self.workers.push(Running {
            worker: Worker::start(&environment, &["run"]),
            proxy,
            alive: true,
            read: 0,
        });
    }

    /// Waits until the worker that came last is ready.
    async fn ready(&mut self) {
        self.until(async |play| play.workers.last().unwrap().worker.ready().await.0 == 200).await;
    }

    /// The one that works, as far as can be told.
    async fn active(&self) -> usize {
        let mut alive = self.workers.iter().enumerate().filter(|(_, running)| running.alive);
        let first = alive.next().unwrap().0;
        for (at, running) in self.workers.iter().enumerate().filter(|(_, running)| running.alive) {
            if running.worker.ready().await.1["state"] == "consuming" {
                return at;
            }
        }
        first
    }

    /// Waits until everything is settled, the queues are empty, and nobody has anything in hand.
    async fn come_to_rest(&mut self) {
        loop {
            self.until(async |play| play.all_settled() && play.nothing_waits().await).await;
            for at in 0..self.workers.len() {
                if self.workers[at].alive {
                    self.workers[at].alive = false;
                    self.workers[at].worker.terminate().await;
                }
            }
            self.listen();
            // What came again at the last moment was handed back.
            if self.nothing_waits().await {
                return;
            }
            self.hire().await;
        }
    }

    async fn nothing_waits(&self) -> bool {
        for running in self.workers.iter().filter(|running| running.alive) {
            let Some((200, page)) = running.worker.page("/metrics").await else { return false };
            let idle = ["messages_in_flight 0", "messages_waiting 0"];
            if !idle.iter().all(|sample| page.lines().any(|line| line == format!("close_sync_{sample}"))) {
                return false;
            }
        }
        for delay in self.plan.delay_queues() {
            if self.bench.depth(&format!(".retry.{delay}")).await > 0 {
                return false;
            }
        }
        self.bench.depth("").await == 0
    }

    /// Whether everything published so far is settled.
    fn all_settled(&self) -> bool {
        let counts = self.settlements();
        let mut published = self.history.events[..self.published].iter();
        published
            .all(|event| counts.get(&event.number).copied().unwrap_or_default() > usize::from(event.twice))
    }

    fn settlements(&self) -> BTreeMap<usize, usize> {
        self.settled.iter().fold(BTreeMap::new(), |mut counts, (_, number, _)| {
            *counts.entry(*number).or_default() += 1;
            counts
        })
    }

    /// Reads what the workers have logged since.
    fn listen(&mut self) {
        for running in &mut self.workers {
            let lines = running.worker.log_after(running.read);
            running.read += lines.len();
            self.settled.extend(lines.iter().filter_map(|line| settlement(line)));
        }
        self.settled.sort();
    }

    async fn until(&mut self, mut condition: impl AsyncFnMut(&Self) -> bool) {
        loop {
            self.listen();
            if condition(self).await {
                return;
            }
            assert!(self.start.elapsed() < PATIENCE, "no rest; settled: {:?}", self.settlements());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How it went, faults of Close after the rest. Leaves nothing on the broker.
    pub(crate) async fn story(mut self) -> Played {
        self.listen();
        let mut left = self.bench.faults_left().await;
        for (label, fault) in &self.plan.faults {
            match left.iter().position(|left| left == fault) {
                Some(at) => drop(left.swap_remove(at)),
                None => *self.faults.entry(label).or_default() += 1,
            }
        }
        let mut log = String::new();
        for (at, running) in self.workers.iter().enumerate() {
            let _ = writeln!(log, "worker {at}\n{}", running.worker.log());
            // One that does not come to rest.
            if running.alive {
                for page in ["/readyz", "/metrics"] {
                    let _ = writeln!(log, "{page}: {:?}", running.worker.page(page).await);
                }
            }
        }
        for request in self.bench.simulator.requests() {
            let _ = writeln!(log, "{request:?}");
            if request.status != Some(200) {
                let at = request.at.duration_since(self.began).as_millis();
                let _ = writeln!(
                    self.journal,
                    "{at:>6} ms: {} {}: {:?}",
                    request.method, request.path, request.status
                );
            }
        }
        self.bench.clean_up(self.plan.delay_queues()).await;
        Played {
            leads: self.bench.simulator.leads(),
            settled: self.settled.into_iter().map(|(_, number, _)| number).collect(),
            trouble: self.trouble,
            faults: self.faults,
            journal: self.journal,
            log,
        }
    }
}

/// What a log line says of a message that was settled for good.
fn settlement(line: &str) -> Option<(Timestamp, usize, String)> {
    let line: Value = serde_json::from_str(line).ok()?;
    let what =
        line["message"].as_str().filter(|what| matches!(*what, "synced" | "skipped" | "dead-lettered"))?;
    let number = line["span"]["message_id"].as_str()?.parse().ok()?;
    Some((line["timestamp"].as_str()?.parse().ok()?, number, what.to_owned()))
}
