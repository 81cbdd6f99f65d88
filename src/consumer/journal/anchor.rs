//! How far back the journal reaches, for commands that run beside the worker.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::timeout;

use crate::amqp::stream::{self, Offset};
use crate::amqp::{BrokerError, Settings, disconnect};
use crate::consumer::journal::takeover::further_back;
use crate::domain::journal::{Anchor, Batch};

/// A stream that holds messages sends the first within milliseconds. An empty one sends nothing, not even an end.
const EMPTY_AFTER: Duration = Duration::from_secs(5);

/// What one of the newest messages of the journal says. `None` without a journal, or if no worker has used it.
///
/// # Errors
/// When the journal cannot be read.
pub(crate) async fn anchor(settings: &Settings) -> Result<Option<Anchor>, BrokerError> {
    if !settings.journal.enabled {
        return Ok(None);
    }
    let connection = Arc::new(settings.connect("close-sync journal").await?);
    let found = find(&connection, &settings.journal_queue()).await;
    disconnect(&connection).await;
    found
}

async fn find(connection: &Arc<lapin::Connection>, queue: &str) -> Result<Option<Anchor>, BrokerError> {
    let (mut offset, mut asked) = (Offset::Last, u64::MAX);
    for steps in 0.. {
        let mut messages = std::pin::pin!(stream::read(Arc::clone(connection), queue.to_owned(), offset));
        let Ok(Some(message)) = timeout(EMPTY_AFTER, messages.next()).await else {
            return Ok(None);
        };
        let message = match message {
            Err(BrokerError::Missing(_)) => return Ok(None),
            message => message?,
        };
        if let Some(anchor) = Batch::decode(&message.body).ok().and_then(|batch| batch.anchor) {
            return Ok(Some(anchor));
        }
        if message.position == 0 || message.position > asked {
            break;
        }
        asked = further_back(message.position, steps);
        offset = Offset::Position(asked);
    }
    Ok(None)
}
