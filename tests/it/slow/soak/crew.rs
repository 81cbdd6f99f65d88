//! The two workers, and what they said they settled.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::Value;

use crate::support::{Bench, Proxy, Worker};

/// Two workers, one active and one standing by.
pub(super) struct Crew {
    environment: BTreeMap<String, String>,
    amqp_url: String,
    members: Vec<Member>,
    /// When each message was settled for good, by its id; more than once if it came again.
    pub(super) settled: BTreeMap<String, Vec<Timestamp>>,
    /// Those that Close has, or need not have. A dead letter may yet be lost: it is not among them until it was replayed.
    pub(super) done: BTreeSet<String>,
    outcomes: BTreeMap<String, usize>,
    /// Of all, those that are gone included; KiB.
    pub(super) peak_memory: u64,
}

/// A worker with its own way to the broker.
pub(super) struct Member {
    pub(super) worker: Worker,
    pub(super) proxy: Proxy,
    /// Lines of its log that were read.
    read: usize,
}

impl Crew {
    pub(super) async fn new(bench: &Bench) -> Self {
        let mut crew = Self {
            environment: bench.environment().into_iter().collect(),
            amqp_url: bench.amqp_url.clone(),
            members: Vec::new(),
            settled: BTreeMap::new(),
            done: BTreeSet::new(),
            outcomes: BTreeMap::new(),
            peak_memory: 0,
        };
        crew.hire().await;
        let first = &crew.members[0].worker;
        first.until("ready", async |worker| worker.ready().await.0 == 200).await;
        crew.hire().await;
        crew
    }

    async fn hire(&mut self) {
        let proxy = Proxy::start(&self.amqp_url).await;
        // Short, so that silence is noticed in a test's time.
        self.environment.insert("AMQP_URL".to_owned(), format!("{}?heartbeat=3", proxy.url));
        self.members.push(Member { worker: Worker::start(&self.environment, &["run"]), proxy, read: 0 });
    }

    /// The one that works, as far as can be told.
    pub(super) async fn active(&self) -> &Member {
        for member in &self.members {
            if member.worker.ready().await.1["state"] == "consuming" {
                return member;
            }
        }
        &self.members[0]
    }

    /// Another one takes the place of the active one, which ends by `signal`.
    pub(super) async fn replace_active(&mut self, signal: &str) {
        let active = self.active().await.worker.pid();
        let at = self.members.iter().position(|member| member.worker.pid() == active).unwrap();
        self.members[at].worker.signal(signal);
        self.members[at].worker.ended().await;
        self.look();
        self.members.remove(at);
        self.hire().await;
    }

    /// Reads what the workers have logged since, and how much memory they took.
    pub(super) fn look(&mut self) {
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

    /// What the workers say they are doing.
    pub(super) async fn states(&self) -> String {
        let mut states = Vec::new();
        for member in &self.members {
            let told = member.worker.ready().await.1;
            let words = ["state", "cause", "alarm"].iter().filter_map(|key| told[key].as_str());
            states.push(words.collect::<Vec<_>>().join(" "));
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

    pub(super) async fn dismiss(&mut self) {
        for member in &self.members {
            member.worker.terminate().await;
        }
        self.look();
    }
}

const DEAD: &str = "dead: ";

/// What a log line says of a message that was settled for good.
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
