//! Executes one history with real parts.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lapin::BasicProperties;
use serde_json::Value;

use super::history::History;
use super::plan::{Action, Plan, Step};
use crate::support::{Bench, Node, Proxy, Worker};

/// The time limit of a run. It suffices even with many runs at once.
const TIME_LIMIT: Duration = Duration::from_secs(100);

/// A worker process with its own proxy to the broker.
struct Running {
    worker: Worker,
    proxy: Proxy,
    alive: bool,
    /// How many lines of its log have been read.
    read: usize,
}

/// The result of a run.
pub(crate) struct RunResult {
    pub(crate) leads: Vec<Value>,
    /// Message numbers in the order in which the messages were settled.
    pub(crate) settled: Vec<usize>,
    /// Problems apart from the records in Close.
    pub(crate) problems: String,
    /// How often each kind of failure happened.
    pub(crate) faults: BTreeMap<&'static str, usize>,
    timeline: String,
    log: String,
}

impl RunResult {
    /// Adds everything needed for debugging to a failure text.
    pub(crate) fn report(&self, wrong: &str) -> String {
        let path =
            std::env::temp_dir().join(format!("close-sync-model-{}.log", uuid::Uuid::now_v7().simple()));
        let written = std::fs::write(&path, &self.log);
        let place = written.map_or_else(|error| error.to_string(), |()| path.display().to_string());
        format!("{}settled: {:?}\n{wrong}logs and requests: {place}\n", self.timeline, self.settled)
    }
}

pub(crate) struct Runner<'a> {
    bench: &'a Bench,
    node: Option<&'a Node>,
    history: &'a History,
    plan: &'a Plan,
    base: Timestamp,
    start: Instant,
    began: Timestamp,
    workers: Vec<Running>,
    published: usize,
    /// Timestamp, message number, and outcome of each settlement.
    settled: Vec<(Timestamp, usize, String)>,
    problems: String,
    faults: BTreeMap<&'static str, usize>,
    timeline: String,
}

impl<'a> Runner<'a> {
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
            problems: String::new(),
            faults: BTreeMap::new(),
            timeline: String::new(),
        }
    }

    pub(crate) fn add_problem(&mut self, problem: &str) {
        self.problems.push_str(problem);
    }

    pub(crate) async fn execute(&mut self) {
        for (_, fault) in &self.plan.faults {
            self.bench.simulator.fault(fault.clone());
        }
        // The queue must exist before anything is published.
        self.start_worker().await;
        self.wait_until_ready().await;
        if self.plan.standby {
            self.start_worker().await;
        }
        for Step { after_requests, action } in &self.plan.steps {
            self.wait_until(async |run| {
                run.bench.simulator.requests().len() >= *after_requests || run.all_settled()
            })
            .await;
            self.step(*action).await;
        }
        self.drain().await;
        let dead = self.bench.depth(".dead").await;
        if dead > 0 {
            if !self.plan.delays {
                let _ = writeln!(self.problems, "{dead} dead letters, although no fault justifies one");
            }
            self.start_worker().await;
            self.bench.output(&["dlq", "replay", "--all", "--no-wait"]).await;
            self.drain().await;
        }
        let dead = self.bench.depth(".dead").await;
        if dead > 0 {
            let _ = writeln!(self.problems, "{dead} dead letters remain after a replay");
        }
        let counts = self.settlements();
        let missing: Vec<_> =
            self.history.published().filter(|event| !counts.contains_key(&event.number)).collect();
        for event in missing {
            let _ = writeln!(self.problems, "never settled: {event}");
        }
        let disturbed = self.plan.steps.iter().any(|step| !matches!(step.action, Action::Publish(_)));
        let published = self.history.published().count();
        if !disturbed && !self.plan.delays && self.settled.len() != published {
            let _ = writeln!(self.problems, "{published} published, {} settled", self.settled.len());
        }
    }

    async fn step(&mut self, action: Action) {
        let _ = writeln!(self.timeline, "{:>6} ms: {action:?}", self.start.elapsed().as_millis());
        match action {
            Action::Publish(events) => {
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
            Action::Kill => {
                let active = self.active().await;
                self.workers[active].alive = false;
                self.workers[active].worker.kill().await;
                self.start_worker().await;
            }
            Action::Handover => {
                let active = self.active().await;
                self.start_worker().await;
                self.wait_until_ready().await;
                self.workers[active].alive = false;
                self.workers[active].worker.terminate().await;
            }
            Action::Cut => {
                let active = self.active().await;
                self.workers[active].proxy.cut();
            }
            Action::CutOne(number) => {
                let active = self.active().await;
                self.workers[active].proxy.cut_one(number);
            }
            Action::KillBroker => {
                let node = self.node.unwrap();
                node.kill().await;
                node.start_again().await;
            }
        }
        *self.faults.entry(action.label()).or_default() += 1;
    }

    async fn start_worker(&mut self) {
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

    /// Waits until the newest worker is ready.
    async fn wait_until_ready(&mut self) {
        self.wait_until(async |run| run.workers.last().unwrap().worker.ready().await.0 == 200).await;
    }

    /// The worker that is consuming or, if none is, the first that is alive.
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

    /// Waits until everything is settled, the queues are empty and no worker has a message in flight. Then
    /// terminates the workers.
    async fn drain(&mut self) {
        loop {
            self.wait_until(async |run| run.all_settled() && run.is_idle().await).await;
            for at in 0..self.workers.len() {
                if self.workers[at].alive {
                    self.workers[at].alive = false;
                    self.workers[at].worker.terminate().await;
                }
            }
            self.read_logs();
            // A message that was redelivered at the last moment is in the queue again.
            if self.is_idle().await {
                return;
            }
            self.start_worker().await;
        }
    }

    async fn is_idle(&self) -> bool {
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

    /// Reads the new log lines of the workers.
    fn read_logs(&mut self) {
        for running in &mut self.workers {
            let lines = running.worker.log_after(running.read);
            running.read += lines.len();
            self.settled.extend(lines.iter().filter_map(|line| settlement(line)));
        }
        self.settled.sort();
    }

    async fn wait_until(&mut self, mut condition: impl AsyncFnMut(&Self) -> bool) {
        loop {
            self.read_logs();
            if condition(self).await {
                return;
            }
            assert!(
                self.start.elapsed() < TIME_LIMIT,
                "time limit exceeded; settled: {:?}",
                self.settlements()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Collects the result of the run and deletes everything from the broker.
    pub(crate) async fn finish(mut self) -> RunResult {
        self.read_logs();
        let mut remaining = self.bench.remaining_faults().await;
        for (label, fault) in &self.plan.faults {
            match remaining.iter().position(|remaining| remaining == fault) {
                Some(at) => drop(remaining.swap_remove(at)),
                None => *self.faults.entry(label).or_default() += 1,
            }
        }
        let mut log = String::new();
        for (at, running) in self.workers.iter().enumerate() {
            let _ = writeln!(log, "worker {at}\n{}", running.worker.log());
            // A worker that has not become idle.
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
                    self.timeline,
                    "{at:>6} ms: {} {}: {:?}",
                    request.method, request.path, request.status
                );
            }
        }
        self.bench.clean_up(self.plan.delay_queues()).await;
        RunResult {
            leads: self.bench.simulator.leads(),
            settled: self.settled.into_iter().map(|(_, number, _)| number).collect(),
            problems: self.problems,
            faults: self.faults,
            timeline: self.timeline,
            log,
        }
    }
}

/// Parses the log line of a settled message.
fn settlement(line: &str) -> Option<(Timestamp, usize, String)> {
    let line: Value = serde_json::from_str(line).ok()?;
    let outcome = line["message"]
        .as_str()
        .filter(|outcome| matches!(*outcome, "synced" | "skipped" | "dead-lettered"))?;
    let number = line["span"]["message_id"].as_str()?.parse().ok()?;
    Some((line["timestamp"].as_str()?.parse().ok()?, number, outcome.to_owned()))
}
