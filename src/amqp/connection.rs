//! An open connection: closing it in order, aborting it, and time-outs for calls on it.

use std::time::Duration;

use lapin::Connection;
use lapin::types::ShortString;
use tokio_util::sync::CancellationToken;

use crate::amqp::error::BrokerError;
use crate::amqp::server_info::ServerInfo;

/// The wait between the last ack and the close of a channel. Acks sent just before the close get lost
/// on quorum queues, up to 347 of 2000; after 20 ms none were (rabbitmq.md §0, 5). This is ten times that.
/// There is no event to wait for instead.
pub(crate) const ACK_FLUSH_TIME: Duration = Duration::from_millis(200);

/// The time-out for a call to the broker that is not a publish.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection and the broker behind it.
pub struct OpenConnection {
    pub connection: Connection,
    pub server: ServerInfo,
    /// Ends the connection without an answer from the broker. Dropping the token has no effect.
    pub(crate) abort: CancellationToken,
}

/// Bounds a call to the broker. The broker can be alive while one of its queues does not answer (no majority of its
/// nodes).
///
/// # Errors
/// Those of the call; [`BrokerError::Lost`] after a time-out.
pub async fn with_timeout<T>(call: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
    let no_answer = |_| Err(BrokerError::Lost(format!("no answer within {} s", CALL_TIMEOUT.as_secs())));
    tokio::time::timeout(CALL_TIMEOUT, call).await.unwrap_or_else(no_answer)
}

/// Closes a connection in order; does nothing if it is closed already. A blocked connection only closes when the alarm
/// ends, so this gives up on it after a few seconds.
pub async fn disconnect(connection: &Connection) {
    let close = connection.close(200, ShortString::from("bye"));
    let _ = tokio::time::timeout(Duration::from_secs(5), close).await;
}
