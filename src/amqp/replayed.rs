//! What became of a replayed message, told to whoever replays it.
//!
//! A message that comes from a replay names it in a header. Once it is settled, the worker publishes a few words
//! under that name to the retry exchange, with a key that leads to a queue only while somebody replays: so it needs
//! no permission that settling did not need. They are a courtesy: nothing depends on their arrival, and they may
//! come twice.

use std::time::Duration;

use lapin::BasicProperties;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::publisher::Publisher;
use super::topology::REPLAYED;
use super::{Delay, Settings};
use crate::outcome::Outcome;

/// How long it may take: the next message about the same person waits for it.
const PATIENCE: Duration = Duration::from_secs(2);

/// What became of one message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Told {
    /// The replay it came from.
    pub(super) replay: Uuid,
    /// [`Outcome::label`].
    pub(super) outcome: String,
    /// The dead letter it became.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dead_letter: Option<Again>,
    /// The delay it waits for, in seconds, before it is tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) comes_again_s: Option<u64>,
}

/// A dead letter that came back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Again {
    /// Its id.
    pub id: Uuid,
    /// [`crate::outcome::DeadLetter::fingerprint`].
    pub fingerprint: String,
    /// What happened, without personal data.
    pub error: String,
}

impl Told {
    /// About a message that was settled, as a dead letter with this id if it became one.
    pub(super) fn new(replay: Uuid, outcome: &Outcome, id: Uuid, delays: &[Delay]) -> Self {
        let (mut dead_letter, mut comes_again_s) = (None, None);
        match outcome {
            Outcome::Dead(dead) => {
                dead_letter = Some(Again { id, fingerprint: dead.fingerprint(), error: dead.error.clone() });
            }
            Outcome::Delayed { level, .. } => {
                comes_again_s = delays.get(*level).map(|delay| delay.duration.as_secs());
            }
            Outcome::Synced(_) | Outcome::Skipped(_) | Outcome::Paused(_) => {}
        }
        Self { replay, outcome: outcome.label().to_owned(), dead_letter, comes_again_s }
    }

    /// Tells it, if there is somebody who wants to know.
    pub(super) async fn send(&self, publisher: &Publisher, settings: &Settings) {
        let body = serde_json::to_vec(self).unwrap_or_default();
        let exchange = settings.retry_exchange();
        let send = publisher.publish(&exchange, REPLAYED, &body, BasicProperties::default());
        // Nobody replays any more: it leads nowhere.
        let _ = tokio::time::timeout(PATIENCE, send).await;
    }
}
