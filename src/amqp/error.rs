//! What can go wrong between the worker and RabbitMQ, and what an operator can do about it.

use std::time::Duration;

use lapin::ErrorKind;
use strum::{IntoStaticStr, VariantNames};

use crate::amqp::server_info::{OLDEST, ServerInfo};

/// An error of a connection, a channel or a publish.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BrokerError {
    #[error("cannot reach RabbitMQ: {0}")]
    Unreachable(String),
    /// One side does not trust the other.
    #[error("TLS with RabbitMQ failed: {0}")]
    Tls(String),
    /// Wrong user, password or vhost.
    #[error(
        "RabbitMQ refused the connection: {0}. Check user, password and vhost in `amqp.url` (the vhost `/` is \
         written `%2f`)"
    )]
    Refused(String),
    #[error("{0} is too old; close-sync needs {OLDEST} or later, for quorum queues with a time-to-live")]
    TooOld(ServerInfo),
    #[error(
        "{object} exists in RabbitMQ with different properties: {detail}. Delete it once it is empty, or configure \
         another name (`amqp.exchange`, `amqp.queue`)"
    )]
    Conflict {
        /// For example "queue `close-sync`".
        object: String,
        /// The broker's message, which names both values.
        detail: String,
    },
    /// An exchange or queue does not exist.
    #[error("RabbitMQ answered: {0}")]
    Missing(String),
    /// Exchanges or queues do not exist, and close-sync may not declare them.
    #[error(
        "missing in RabbitMQ: {}. Have an administrator create this (import deploy/rabbitmq/definitions.json), \
         or let close-sync declare it: `amqp.topology = \"declare\"`",
        .0.join("; ")
    )]
    Incomplete(Vec<String>),
    /// Another process holds an exclusive lock.
    #[error("{0}")]
    Busy(&'static str),
    #[error(
        "permission denied by RabbitMQ: {0}. deploy/operating.md, \"Broker permissions\", lists what each user needs"
    )]
    Forbidden(String),
    #[error(
        "RabbitMQ denies the permission to declare exchanges or queues: {0}. Give the user the permissions of `setup` \
         (deploy/operating.md, \"Broker permissions\"), or have an administrator import deploy/rabbitmq/definitions.json and set \
         `amqp.topology = \"check\"`"
    )]
    MayNotDeclare(String),
    /// A connection or a channel ended.
    #[error("lost the connection to RabbitMQ: {0}")]
    Lost(String),
    /// The process was suspended, and RabbitMQ may have given the queue to another worker.
    #[error("the process stood still for {} s; another worker may have taken over", .0.as_secs())]
    StoodStill(Duration),
    #[error(
        "RabbitMQ cancelled the consumer: its queue was deleted, or a message was held longer than `consumer_timeout`"
    )]
    Cancelled,
    #[error("another worker has taken over the queue")]
    TakenOver,
    /// A message is too large, or has properties that RabbitMQ does not accept.
    #[error("RabbitMQ refused what was sent, and closed the channel or the connection: {0}")]
    Rejected(String),
    #[error("no queue is bound to exchange `{exchange}` with key `{key}`; the message was not published")]
    Unroutable { exchange: String, key: String },
    #[error("RabbitMQ did not confirm the message: {0}")]
    Unconfirmed(&'static str),
}

impl BrokerError {
    /// The cause in metrics and in `/readyz`.
    pub fn trouble(&self) -> BrokerTrouble {
        match self {
            Self::Unreachable(_) | Self::Tls(_) => BrokerTrouble::Unreachable,
            Self::Refused(_) => BrokerTrouble::Refused,
            Self::Conflict { .. } | Self::TooOld(_) => BrokerTrouble::Conflict,
            Self::Missing(_) | Self::Incomplete(_) | Self::Unroutable { .. } => BrokerTrouble::Missing,
            Self::Forbidden(_) | Self::MayNotDeclare(_) => BrokerTrouble::Forbidden,
            Self::Lost(_) | Self::Rejected(_) | Self::Unconfirmed(_) | Self::Busy(_) => BrokerTrouble::Lost,
            Self::StoodStill(_) => BrokerTrouble::StoodStill,
            Self::Cancelled | Self::TakenOver => BrokerTrouble::Cancelled,
        }
    }

    /// Whether the error is about one exchange or queue, and the connection can still be used.
    pub(crate) fn is_about_object(&self) -> bool {
        matches!(self, Self::Missing(_) | Self::Forbidden(_) | Self::MayNotDeclare(_) | Self::Conflict { .. })
    }

    /// Whether the error persists until somebody changes the configuration or the broker.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Conflict { .. } | Self::TooOld(_))
    }

    /// Classifies lapin's error. `object` is the object being declared or checked, or empty.
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
            // Content too large, no consumers, precondition failed, frame error, syntax error, command invalid, not
            // implemented. An internal error may be the broker's own.
            311 | 313 | 406 | 501..=503 | 540 => Self::Rejected(detail),
            _ => Self::Lost(detail),
        }
    }

    /// Marks a denied permission as one to declare, which an administrator can do instead.
    pub(crate) fn while_declaring(self) -> Self {
        if let Self::Forbidden(detail) = self { Self::MayNotDeclare(detail) } else { self }
    }
}

impl From<lapin::Error> for BrokerError {
    fn from(error: lapin::Error) -> Self {
        Self::from_lapin(&error, "")
    }
}

/// Why there is no usable connection to the broker. The labels appear in metrics and in `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum BrokerTrouble {
    Unreachable,
    /// Wrong user, password or vhost, or access that was revoked.
    Refused,
    /// The user lacks a permission on an exchange or queue.
    Forbidden,
    /// An exchange or queue does not exist.
    Missing,
    /// An exchange or queue has different properties.
    Conflict,
    /// RabbitMQ cancelled the consumer.
    Cancelled,
    /// A connection or a channel ended.
    Lost,
    /// The process was suspended.
    StoodStill,
}

impl BrokerTrouble {
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// What an operator can do.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Unreachable => "check that RabbitMQ is running and that `amqp.url` is its address",
            Self::Refused => "check user, password and vhost in `amqp.url`",
            Self::Forbidden => {
                "give the user the permissions of `deploy/operating.md`, \"Broker permissions\""
            }
            Self::Missing => {
                "run `close-sync check` to see what is missing; an administrator has to create it"
            }
            Self::Conflict => {
                "delete the exchange or queue once it is empty, or configure another name for it"
            }
            Self::Cancelled | Self::Lost | Self::StoodStill => "nothing: close-sync reconnects by itself",
        }
    }
}
