//! What became of a message, told to whoever wants to know, once it is settled.
//!
//! **Whoever replays** it: the message names the replay in a header, and a few words are published under that name to
//! the retry exchange, with a key that leads to a queue only while somebody replays. So telling needs no permission that
//! settling did not need.
//!
//! **Its producer**, if `amqp.outcomes` names an exchange: one message each, with the ids of the records in Close. The
//! routing key is `synced.created`, `skipped.trigger`, `dead.rejected`, …: the outcome and its label.
//!
//! Both are a courtesy, by channels of their own. A crash between settling and telling loses them, an alarm too (they
//! are not held, so that Close is kept in step meanwhile), and a message that is delivered twice is told of twice. Nothing depends on them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use lapin::{BasicProperties, Connection};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use crate::amqp::envelope::Envelope;
use crate::amqp::publisher::{Publisher, UNANSWERED};
use crate::amqp::topology::REPLAYED;
use crate::amqp::{BrokerError, Delay};
use crate::close::ResponseExcerpt;
use crate::consumer::Session;
use crate::consumer::connections::Publishers;
use crate::domain::decision::Decision;
use crate::outcome::Outcome;

/// How long telling may take: the next message about the same person waits for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// A channel that is closed at once is not opened for every message.
const APART: Duration = Duration::from_secs(1);
/// Milliseconds after which whoever replays has gone.
const FORGOTTEN: &str = "60000";

/// What there is to tell about a message that was settled.
pub(crate) struct OutcomeEvent<'a> {
    pub(crate) envelope: &'a Envelope,
    pub(crate) outcome: &'a Outcome,
    pub(crate) decision: Option<&'a Decision>,
    /// The id of the dead letter it became, if it became one.
    pub(crate) dead_letter: Option<Uuid>,
}

/// What whoever replays is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replayed {
    /// The replay it came from.
    pub(crate) replay: Uuid,
    /// [`Outcome::label`].
    pub(crate) outcome: String,
    /// The dead letter it became.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dead_letter: Option<Again>,
    /// The delay it waits for, in seconds, before it is tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) comes_again_s: Option<u64>,
}

/// A dead letter that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Again {
    /// Its id.
    pub id: Uuid,
    /// [`crate::outcome::DeadLetter::fingerprint`].
    pub fingerprint: String,
    /// What happened, without personal data.
    pub error: String,
    /// What Close said. Personal data, perhaps: told to whoever replays, and nobody else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub close_said: Option<ResponseExcerpt>,
}

/// What a producer is told.
#[derive(Debug, Serialize)]
struct Told<'a> {
    /// `synced`, `skipped` or `dead`.
    outcome: &'static str,
    /// What was done, or why not.
    detail: &'static str,
    /// The producer's ids of the message.
    message_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<&'a str>,
    /// Ids of the records in Close it is about.
    leads: BTreeSet<&'a str>,
    contacts: BTreeSet<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letter: Option<Again>,
    at: Timestamp,
}

impl OutcomeEvent<'_> {
    fn dead_letter(&self) -> Option<Again> {
        match self.outcome {
            Outcome::Dead(dead) => Some(Again {
                id: self.dead_letter?,
                fingerprint: dead.fingerprint(),
                error: dead.error.clone(),
                close_said: dead.said.clone(),
            }),
            Outcome::Synced(_) | Outcome::Skipped(_) | Outcome::Delayed { .. } | Outcome::Paused(_) => None,
        }
    }

    fn replayed(&self, delays: &[Delay]) -> Option<Replayed> {
        let comes_again_s = match self.outcome {
            Outcome::Delayed { level, .. } => delays.get(*level).map(|delay| delay.duration.as_secs()),
            Outcome::Synced(_) | Outcome::Skipped(_) | Outcome::Dead(_) | Outcome::Paused(_) => None,
        };
        Some(Replayed {
            replay: self.envelope.replay?,
            outcome: self.outcome.label().to_owned(),
            dead_letter: self.dead_letter(),
            comes_again_s,
        })
    }

    /// `None` when it is not over yet.
    fn told<'a>(&'a self, destination: Option<&'a str>) -> Option<Told<'a>> {
        let (outcome, detail) = match self.outcome {
            Outcome::Synced(effect) => ("synced", effect.label()),
            Outcome::Skipped(skip) => ("skipped", skip.label()),
            Outcome::Dead(dead) => ("dead", dead.reason.label()),
            Outcome::Delayed { .. } | Outcome::Paused(_) => return None,
        };
        let (leads, contacts) = self.decision.map(Decision::records).unwrap_or_default();
        Some(Told {
            outcome,
            detail,
            message_id: self.envelope.message_id(),
            correlation_id: self.envelope.correlation_id(),
            destination,
            leads,
            contacts,
            dead_letter: self.dead_letter().map(|again| Again { close_said: None, ..again }),
            at: Timestamp::now(),
        })
    }
}

impl Session {
    /// Tells everybody.
    pub(crate) async fn spread(&self, news: &OutcomeEvent<'_>, out: &Publishers) {
        // During an alarm nothing can be published.
        let is_mute = self.status.is_alarmed();
        if let Some(replayed) = news.replayed(&self.settings.delays).filter(|_| !is_mute) {
            let body = serde_json::to_vec(&replayed).unwrap_or_default();
            let exchange = self.settings.retry_exchange();
            // Where nobody replays any more, it leads nowhere.
            let properties = BasicProperties::default().with_expiration(FORGOTTEN.into());
            let _ = out.replays.publish(&exchange, REPLAYED, &body, properties).await;
        }
        let told = news.told(self.destination.as_deref());
        if let Some((exchange, told)) = self.settings.outcomes.as_ref().zip(told) {
            let routed = if is_mute { None } else { self.tell(exchange, &told, &out.outcomes).await };
            self.metrics.outcome_published(routed);
        }
    }

    /// Whether a queue has it; `None` when that is not known.
    async fn tell(&self, exchange: &str, told: &Told<'_>, voice: &LazyPublisher) -> Option<bool> {
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_type("outcome".into())
            .with_message_id(Uuid::now_v7().to_string().into());
        if let Some(id) = told.correlation_id {
            properties = properties.with_correlation_id(id.into());
        }
        let (key, body) = (format!("{}.{}", told.outcome, told.detail), serde_json::to_vec(told).ok()?);
        let told = match voice.publish(exchange, &key, &body, properties).await {
            Ok(()) => Some(true),
            Err(BrokerError::Unroutable { .. }) => Some(false),
            Err(error) => {
                if !voice.0.mute.swap(true, Ordering::Relaxed) {
                    tracing::warn!(exchange, %error, "producers are not told what becomes of their messages, for now");
                }
                return None;
            }
        };
        if voice.0.mute.swap(false, Ordering::Relaxed) {
            tracing::info!(exchange, "producers are told again what becomes of their messages");
        }
        told
    }
}

/// A channel to tell by, opened when there is something to tell, and anew when the broker has closed it.
#[derive(Clone)]
pub(crate) struct LazyPublisher(Arc<Line>);

struct Line {
    connection: Arc<Connection>,
    channel: Mutex<Option<(Publisher, Instant)>>,
    /// The last that was to be told was not.
    mute: AtomicBool,
}

impl LazyPublisher {
    pub(crate) fn new(connection: Arc<Connection>) -> Self {
        Self(Arc::new(Line { connection, channel: Mutex::default(), mute: AtomicBool::new(false) }))
    }

    async fn publish(
        &self,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<(), BrokerError> {
        let publish = async { self.channel().await?.publish(exchange, key, body, properties).await };
        tokio::time::timeout(PATIENCE, publish).await.unwrap_or(Err(UNANSWERED))
    }

    async fn channel(&self) -> Result<Publisher, BrokerError> {
        let mut channel = self.0.channel.lock().await;
        if let Some((publisher, opened)) = &*channel {
            if publisher.is_open() {
                return Ok(publisher.clone());
            }
            if opened.elapsed() < APART {
                return Err(BrokerError::Lost("the channel was closed".into()));
            }
        }
        let publisher = Publisher::new(&self.0.connection).await?;
        *channel = Some((publisher.clone(), Instant::now()));
        Ok(publisher)
    }
}
