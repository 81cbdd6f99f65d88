//! The broker's address, and the names of the exchanges and queues of one destination.

use std::time::Duration;

use lapin::Connection;

use crate::amqp::connection::OpenConnection;
use crate::amqp::error::BrokerError;
use crate::amqp::nodes::Nodes;

/// The broker and the names of the objects on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub nodes: Nodes,
    /// The exchange producers publish to.
    pub exchange: String,
    /// The work queue. The names of all other queues derive from it.
    pub queue: String,
    /// The limit of unacked deliveries.
    pub prefetch: u16,
    /// The delay queues, shortest first.
    pub delays: Vec<Delay>,
    /// The routing keys that bind the work queue to the exchange.
    pub binding_keys: Vec<String>,
    pub topology: TopologyMode,
    /// The exchange for outcome events to producers.
    pub outcomes: Option<String>,
    pub journal: JournalSettings,
}

/// The journal: a stream, which keeps what was published for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalSettings {
    /// Whether there is one.
    pub enabled: bool,
    /// How long entries are kept.
    pub max_age: Duration,
    /// How many bytes of entries are kept.
    pub max_bytes: u64,
}

/// A delay queue: `<queue>.retry.<name>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delay {
    /// As configured, `30s`.
    pub name: String,
    /// How long a message stays in the queue.
    pub duration: Duration,
}

/// Who creates the exchanges, queues and bindings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopologyMode {
    /// The worker declares them at the start of each session.
    Declare,
    /// An administrator creates them. The worker declares nothing, which needs no configure permission. A session starts
    /// once everything exists, and reports objects that disappear.
    Check,
}

impl Settings {
    /// The exchange in front of the delay queues. With the key [`crate::amqp::topology::NOW`] it routes to the work
    /// queue.
    pub fn retry_exchange(&self) -> String {
        format!("{}.retry", self.queue)
    }

    pub fn delay_queue(&self, delay: &Delay) -> String {
        format!("{}.retry.{}", self.queue, delay.name)
    }

    /// The dead-letter queue. Its exchange has the same name.
    pub fn dead_letter_queue(&self) -> String {
        format!("{}.dead", self.queue)
    }

    /// The stream of the journal. Its exchange has the same name.
    pub fn journal_queue(&self) -> String {
        format!("{}.journal", self.queue)
    }

    /// An exclusive queue that serves as a lock: only one process scans the dead letters at a time. RabbitMQ deletes it
    /// with the connection.
    pub(crate) fn scan_lock_queue(&self) -> String {
        format!("{}.desk", self.queue)
    }

    /// An exclusive queue in which a replay receives the outcomes of its messages. It also locks out a second replay.
    pub(crate) fn replay_queue(&self) -> String {
        format!("{}.replay", self.queue)
    }

    /// Whether both name the same objects on the same broker.
    pub fn is_same(&self, other: &Self) -> bool {
        Self { prefetch: other.prefetch, ..self.clone() } == *other
    }

    /// Whether the names of one could collide with those of the other.
    pub fn overlaps(&self, other: &Self) -> bool {
        let within = |a: &str, b: &str| a == b || a.strip_prefix(b).is_some_and(|rest| rest.starts_with('.'));
        self.nodes == other.nodes && (within(&self.queue, &other.queue) || within(&other.queue, &self.queue))
    }

    /// Opens a connection. RabbitMQ's management UI shows it under `name`.
    ///
    /// # Errors
    /// Those of [`Nodes::connect`].
    pub async fn connect(&self, name: &str) -> Result<Connection, BrokerError> {
        Ok(self.open(name).await?.connection)
    }

    /// Opens a connection and returns what the broker said about itself, too.
    pub async fn open(&self, name: &str) -> Result<OpenConnection, BrokerError> {
        self.nodes.connect(name).await
    }
}
