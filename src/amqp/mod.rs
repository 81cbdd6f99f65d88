//! Everything that speaks AMQP with RabbitMQ, above lapin.
//!
//! | file | content |
//! | --- | --- |
//! | `settings` | the broker's address, and the names of exchanges and queues |
//! | `error` | what can go wrong with the broker, and what an operator can do |
//! | [`nodes`], [`tls`] | connecting to a node, or to one of a cluster |
//! | `connection` | an open connection: closing it, and time-outs for calls |
//! | [`server_info`] | the broker's version, and what differs between versions |
//! | [`topology`] | exchanges, queues and bindings, and why each has its arguments |
//! | [`envelope`] | the headers that travel with a message |
//! | [`publisher`] | publishing with confirms |
//! | `stream` | reading a stream |
//! | `compat` | workarounds for lapin |
//!
//! A consumer needs two connections, one to consume and one to publish. When RabbitMQ blocks a publishing connection
//! (memory or disk alarm), acks on it hang too (rabbitmq.md §0, 10). lapin's own recovery stays off: it gives up after
//! a while and then hangs (rabbitmq.md §2.2). The supervisor starts a new session instead.

mod compat;
mod connection;
pub mod envelope;
mod error;
pub mod nodes;
pub mod publisher;
pub mod server_info;
mod settings;
pub(crate) mod stream;
pub mod tls;
pub mod topology;

pub(crate) use connection::ACK_FLUSH_TIME;
pub use connection::{OpenConnection, disconnect, with_timeout};
pub use error::{BrokerError, BrokerTrouble};
pub use settings::{Delay, JournalSettings, Settings, TopologyMode};
pub use topology::JournalState;
