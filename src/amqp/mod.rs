//! The only place that knows lapin.
//!
//! In reading order: [`nodes`] and [`tls`] are how to get to the broker, `compat` is what lapin reads and writes there,
//! `frames` what of it lapin would not survive; `greeting` and [`server_info`] are who answers;
//! [`topology`] is what exists on the broker and why each flag; [`envelope`] what travels with a message;
//! [`publisher`] publishes and waits for the confirm; `link` holds the connections of a [`crate::consumer`], which
//! consumes until something ends it; [`crate::dead_letters`] is the operator's side.
//!
//! Two connections, one consumes and one publishes: when the broker blocks a publishing connection
//! (memory or disk alarm), acks on it would hang too (rabbitmq.md §0, 10). lapin's own recovery stays
//! off, it gives up after a while and then hangs (rabbitmq.md §2.2); [`crate::supervisor`] starts a new
//! session instead.

mod compat;
pub mod envelope;
pub mod nodes;
pub mod publisher;
pub mod server_info;
pub mod tls;
pub mod topology;

use std::time::Duration;

use lapin::types::ShortString;
use lapin::{Connection, ErrorKind};

use crate::telemetry::status::BrokerTrouble;
pub use compat::stream::OpenConnection;
use nodes::Nodes;
use server_info::ServerInfo;

/// The broker, and the names of what is ours on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Where it is.
    pub nodes: Nodes,
    /// The exchange producers publish to.
    pub exchange: String,
    /// The work queue; the other names follow from it.
    pub queue: String,
    /// Unacked deliveries held at most.
    pub prefetch: u16,
    /// The delay queues, shortest first.
    pub delays: Vec<Delay>,
    /// The routing keys with which the work queue is bound to the exchange.
    pub binding_keys: Vec<String>,
    /// Who makes what has to exist.
    pub topology: topology::Mode,
    /// The exchange where it is told what became of each message.
    pub outcomes: Option<String>,
}

/// A delay queue: `<queue>.retry.<name>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delay {
    /// As configured, `30s`.
    pub name: String,
    /// The time a message stays in it.
    pub duration: Duration,
}

impl Settings {
    /// The exchange in front of the delay queues and, with the key [`topology::NOW`], of the work
    /// queue.
    pub fn retry_exchange(&self) -> String {
        format!("{}.retry", self.queue)
    }

    /// The name of a delay queue.
    pub fn delay_queue(&self, delay: &Delay) -> String {
        format!("{}.retry.{}", self.queue, delay.name)
    }

    /// Whether both mean the same objects on the same broker.
    pub fn is_same(&self, other: &Self) -> bool {
        Self { prefetch: other.prefetch, ..self.clone() } == *other
    }

    /// Whether the objects of one cannot be told from those of the other.
    pub fn overlaps(&self, other: &Self) -> bool {
        let within = |a: &str, b: &str| a == b || a.strip_prefix(b).is_some_and(|rest| rest.starts_with('.'));
        self.nodes == other.nodes && (within(&self.queue, &other.queue) || within(&other.queue, &self.queue))
    }

    /// Whoever has this queue, looks at the dead letters; exclusive, and gone with its connection.
    pub(crate) fn scan_lock_queue(&self) -> String {
        format!("{}.desk", self.queue)
    }

    /// Whoever has this queue, replays, and hears in it what becomes of the messages; exclusive as well.
    pub(crate) fn replay_queue(&self) -> String {
        format!("{}.replay", self.queue)
    }

    /// The name of the dead-letter exchange and of its queue.
    pub fn dead_letter_queue(&self) -> String {
        format!("{}.dead", self.queue)
    }

    /// Opens a connection, visible in RabbitMQ's management under `name`.
    ///
    /// # Errors
    /// Those of [`Nodes::connect`].
    pub async fn connect(&self, name: &str) -> Result<Connection, BrokerError> {
        Ok(self.open(name).await?.connection)
    }

    /// The same, and tells who answered.
    pub async fn open(&self, name: &str) -> Result<OpenConnection, BrokerError> {
        self.nodes.connect(name).await
    }
}

/// What went wrong between us and the broker.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BrokerError {
    /// No connection.
    #[error("RabbitMQ cannot be reached: {0}")]
    Unreachable(String),
    /// No agreement on TLS: we do not trust the broker, or it does not trust us.
    #[error("TLS with RabbitMQ fails: {0}")]
    Tls(String),
    /// The broker does not let us in: wrong user, password or vhost.
    #[error(
        "RabbitMQ refuses the connection: {0}. Check user, password and vhost in `amqp.url` (the vhost `/` is \
         written `%2f`)"
    )]
    Refused(String),
    /// It cannot have the queues that are needed.
    #[error("{0} is too old: quorum queues with a time-to-live are there from {oldest} on", oldest = server_info::OLDEST)]
    TooOld(ServerInfo),
    /// Something of ours exists with other properties.
    #[error(
        "RabbitMQ has {object} with other properties: {detail}. Delete it once it is empty, or give close-sync \
         another name for it (`amqp.exchange`, `amqp.queue`)"
    )]
    Conflict {
        /// The object, `queue 'close-sync'`.
        object: String,
        /// The broker's words, which name both values.
        detail: String,
    },
    /// An exchange or queue does not exist.
    #[error("RabbitMQ says: {0}")]
    Missing(String),
    /// Exchanges or queues do not exist, and others are to make them.
    #[error(
        "RabbitMQ lacks {}. Have an administrator make this (deploy/rabbitmq/definitions.json holds it for import), \
         or let close-sync do it: `amqp.topology = \"declare\"`",
        .0.join("; ")
    )]
    Incomplete(Vec<String>),
    /// Somebody else does what only one can do at a time.
    #[error("{0}")]
    Busy(&'static str),
    /// The user lacks a permission.
    #[error(
        "RabbitMQ does not permit this: {0}. What each user needs is in deploy/operating.md, \"Broker permissions\""
    )]
    Forbidden(String),
    /// The user lacks the permission to declare.
    #[error(
        "RabbitMQ does not let us declare what we need: {0}. Give the user the permissions of `setup` \
         (deploy/operating.md, \"Broker permissions\"), or have an administrator import deploy/rabbitmq/definitions.json and set \
         `amqp.topology = \"check\"`"
    )]
    MayNotDeclare(String),
    /// The connection or a channel ended.
    #[error("the connection to RabbitMQ was lost: {0}")]
    Lost(String),
    /// This process was frozen: the queue may be another worker's by now.
    #[error("the process stood still for {} s: another worker may have taken over", .0.as_secs())]
    StoodStill(Duration),
    /// The consumer was cancelled: its queue was deleted, or the broker gave up on it.
    #[error(
        "RabbitMQ cancelled the consumer: its queue was deleted, or a message was held beyond `consumer_timeout`"
    )]
    Cancelled,
    /// The message is larger than the broker takes, which may be less than when it was published.
    #[error("RabbitMQ takes no message so large: {0}")]
    TooLarge(String),
    /// No queue takes the message.
    #[error("no queue is bound to exchange `{exchange}` for key `{key}`: the message was not published")]
    Unroutable {
        /// The exchange.
        exchange: String,
        /// The routing key.
        key: String,
    },
    /// The broker did not take the message.
    #[error("RabbitMQ did not confirm the message: {0}")]
    Unconfirmed(&'static str),
}

impl BrokerError {
    /// What it is as a reason to have no session.
    pub fn trouble(&self) -> BrokerTrouble {
        match self {
            Self::Unreachable(_) | Self::Tls(_) => BrokerTrouble::Unreachable,
            Self::Refused(_) => BrokerTrouble::Refused,
            Self::Conflict { .. } | Self::TooOld(_) => BrokerTrouble::Conflict,
            Self::Missing(_) | Self::Incomplete(_) | Self::Unroutable { .. } => BrokerTrouble::Missing,
            Self::Forbidden(_) | Self::MayNotDeclare(_) => BrokerTrouble::Forbidden,
            Self::Lost(_) | Self::TooLarge(_) | Self::Unconfirmed(_) | Self::Busy(_) => BrokerTrouble::Lost,
            Self::StoodStill(_) => BrokerTrouble::StoodStill,
            Self::Cancelled => BrokerTrouble::Cancelled,
        }
    }

    /// Whether it stays like that until somebody changes the configuration or the broker.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Conflict { .. } | Self::TooOld(_))
    }

    /// Reads lapin's error; `object` is what was being declared or checked, if anything.
    pub(crate) fn from_lapin(error: &lapin::Error, object: &str) -> Self {
        let ErrorKind::ProtocolError(amqp) = error.kind() else {
            return Self::Lost(error.to_string());
        };
        let detail = amqp.get_message().to_string();
        // Reply codes of AMQP 0-9-1: 403 access refused, 404 not found, 406 precondition failed.
        match amqp.get_id() {
            404 => Self::Missing(detail),
            403 => Self::Forbidden(detail),
            406 if !object.is_empty() => Self::Conflict { object: object.to_owned(), detail },
            _ => Self::Lost(detail),
        }
    }

    /// The same, said of a declaration: others can do it for us.
    fn while_declaring(self) -> Self {
        if let Self::Forbidden(detail) = self { Self::MayNotDeclare(detail) } else { self }
    }
}

impl From<lapin::Error> for BrokerError {
    fn from(error: lapin::Error) -> Self {
        Self::from_lapin(&error, "")
    }
}

/// The wait between the last ack and the close of a channel. Acks sent just before the close get lost
/// on quorum queues, up to 347 of 2000; after 20 ms none were (rabbitmq.md §0, 5). Ten times that;
/// there is no event to wait for instead.
pub(crate) const ACK_FLUSH_TIME: Duration = Duration::from_millis(200);

/// How long the broker may take to make, or to look at, what a session begins with.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the broker answers, if it does: it may be alive, and a queue of it not (no majority of its nodes).
///
/// # Errors
/// Those of what is asked; [`BrokerError::Lost`] where there is no answer.
pub async fn with_timeout<T>(asked: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
    let no_answer = |_| Err(BrokerError::Lost(format!("no answer within {} s", PATIENCE.as_secs())));
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(no_answer)
}

/// Closes a connection in order; a connection that is gone already is fine. One that is blocked closes only when the
/// alarm ends, and is not waited for.
pub async fn disconnect(connection: &Connection) {
    let close = connection.close(200, ShortString::from("bye"));
    let _ = tokio::time::timeout(Duration::from_secs(5), close).await;
}
