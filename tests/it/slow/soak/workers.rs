//! The two workers of a soak test, and the messages they settled according to their logs.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::Value;

use crate::support::{Bench, Proxy, Worker};

/// Two workers: one active, one on standby.
pub(super) struct Workers {
    environment: BTreeMap<String, String>,
    amqp_url: String,
    members: Vec<Member>,
    /// When each message was settled, by message id. A redelivered message can have several times.
    pub(super) settled: BTreeMap<String, Vec<Timestamp>>,
    /// The messages that were synced or skipped. A dead letter can still be lost, so it counts only after its replay.
    pub(super) done: BTreeSet<String>,
    outcomes: BTreeMap<String, usize>,
    /// The peak memory in KiB of all workers, including those that have exited.
    pub(super) peak_memory: u64,
}

/// A worker with its own proxy to the broker.
pub(super) struct Member {
    pub(super) worker: Worker,
    pub(super) proxy: Proxy,
    /// How many lines of its log have been read.
    read: usize,
}

impl Workers {
    pub(super) async fn new(bench: &Bench) -> Self {
        let mut workers = Self {
            environment: bench.environment().into_iter().collect(),
            amqp_url: bench.amqp_url.clone(),
            members: Vec::new(),
            settled: BTreeMap::new(),
            done: BTreeSet::new(),
            outcomes: BTreeMap::new(),
            peak_memory: 0,
        };
        workers.start_worker().await;
        let first = &workers.members[0].worker;
        first.until("ready", async |worker| worker.ready().await.0 == 200).await;
        workers.start_worker().await;
        workers
    }

    async fn start_worker(&mut self) {
        let proxy = Proxy::start(&self.amqp_url).await;
        // A short heartbeat, so that a silent connection is detected within the test.
        self.environment.insert("AMQP_URL".to_owned(), format!("{}?heartbeat=3", proxy.url));
        self.members.push(Member { worker: Worker::start(&self.environment, &["run"]), proxy, read: 0 });
    }

    /// The worker that is consuming, or the first if none is.
    pub(super) async fn active(&self) -> &Member {
        for member in &self.members {
            if member.worker.ready().await.1["state"] == "consuming" {
                return member;
            }
        }
        &self.members[0]
    }

    /// Ends the active worker with a signal and starts another one.
    pub(super) async fn replace_active(&mut self, signal: &str) {
        let active = self.active().await.worker.pid();
        let at = self.members.iter().position(|member| member.worker.pid() == active).unwrap();
        self.members[at].worker.signal(signal);
        self.members[at].worker.ended().await;
        self.read_logs();
        self.members.remove(at);
        self.start_worker().await;
    }

    /// Reads the new log lines and the memory use of the workers.
    pub(super) fn read_logs(&mut self) {
        for member in &mut self.members {
            self.peak_memory = self.peak_memory.max(member.worker.peak_memory().unwrap_or(0));
            let lines = member.worker.log_after(member.read);
            member.read += lines.len();
            for (at, id, outcome) in lines.iter().filter_map(|line| settlement(line)) {
                if !outcome.starts_with(DEAD) {
                    self.done.insert(id.clone());
                }
                self.settled.entry(id).or_default().push(at);
                *self.outcomes.entry(outcome).or_default() += 1;
            }
        }
    }

    pub(super) fn outcomes(&self) -> BTreeMap<String, usize> {
        self.outcomes.clone()
    }

    /// The states of the workers from `/readyz`.
    pub(super) async fn states(&self) -> String {
        let mut states = Vec::new();
        for member in &self.members {
            let readyz = member.worker.ready().await.1;
            let fields = ["state", "cause", "alarm"].iter().filter_map(|key| readyz[key].as_str());
            states.push(fields.collect::<Vec<_>>().join(" "));
        }
        states.join(", ")
    }

    pub(super) async fn is_idle(&self) -> bool {
        for member in &self.members {
            let Some((200, page)) = member.worker.page("/metrics").await else { return false };
            let idle = ["messages_in_flight 0", "messages_waiting 0"];
            if !idle.iter().all(|sample| page.lines().any(|line| line == format!("close_sync_{sample}"))) {
                return false;
            }
        }
        true
    }

    pub(super) fn log(&self) -> String {
        self.members.iter().map(|member| member.worker.log()).collect::<Vec<_>>().join("\n")
    }

    pub(super) async fn terminate(&mut self) {
        for member in &self.members {
            member.worker.terminate().await;
        }
        self.read_logs();
    }
}

const DEAD: &str = "dead: ";

/// Parses the log line of a settled message.
fn settlement(line: &str) -> Option<(Timestamp, String, String)> {
    let line: Value = serde_json::from_str(line).ok()?;
    let what = line["message"].as_str()?;
    let outcome = match what {
        "synced" => line["outcome"].as_str()?.to_owned(),
        "skipped" => what.to_owned(),
        "dead-lettered" => format!("{DEAD}{}", line["reason"].as_str()?),
        _ => return None,
    };
    let id = line["span"]["message_id"].as_str()?.to_owned();
    Some((line["timestamp"].as_str()?.parse().ok()?, id, outcome))
}
