//! Outcome events: published once a message is settled, to the replay it came from and to its producer.
//!
//! **Replays.** The message names its replay in a header. A short event with that name goes to the retry exchange, with
//! a key that leads to a queue only while a replay runs. So it needs no permissions beyond those for settling.
//!
//! **Producers.** If `amqp.outcomes` names an exchange, one event per message, with the ids of the records in Close. The
//! routing key is the outcome and its label: `synced.created`, `skipped.trigger`, `dead.rejected`.
//!
//! Both are best effort, on channels of their own. A crash after settling loses an event. So does an alarm: events are
//! not held, so that Close stays in sync meanwhile. A message that is delivered twice has two events. Nothing depends
//! on them.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use jiff::Timestamp;
use lapin::BasicProperties;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::amqp::envelope::Envelope;
use crate::amqp::publisher::Outgoing;
use crate::amqp::topology::REPLAYED;
use crate::amqp::{BrokerError, Delay};
use crate::close::ResponseExcerpt;
use crate::consumer::context::Context;
use crate::domain::decision::Decision;
use crate::outcome::Outcome;

/// Milliseconds after which a replay that has not read an event no longer runs.
const REPLAY_EVENT_TTL: &str = "60000";

/// A message that was settled.
pub(crate) struct OutcomeEvent<'a> {
    pub(crate) envelope: &'a Envelope,
    pub(crate) outcome: &'a Outcome,
    pub(crate) decision: Option<&'a Decision>,
    /// The id of the dead letter it became, if it became one.
    pub(crate) dead_letter: Option<Uuid>,
}

/// The event for a replay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReplayEvent {
    /// The replay it came from.
    pub(crate) replay: Uuid,
    /// [`Outcome::label`].
    pub(crate) outcome: String,
    /// The dead letter it became.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dead_letter: Option<DeadLetterSummary>,
    /// Seconds until it is retried from a delay queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) comes_again_s: Option<u64>,
}

/// The dead letter that a message became again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterSummary {
    /// Its id.
    pub id: Uuid,
    /// [`crate::outcome::DeadLetter::fingerprint`].
    pub fingerprint: String,
    /// What happened, without personal data.
    pub error: String,
    /// What Close said. It may hold personal data, and goes only to the replay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub close_said: Option<ResponseExcerpt>,
}

/// The event for a producer.
#[derive(Debug, Serialize)]
struct ProducerEvent<'a> {
    /// `synced`, `skipped` or `dead`.
    outcome: &'static str,
    /// What was done, or the reason.
    detail: &'static str,
    /// The producer's ids of the message.
    message_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<&'a str>,
    /// Ids of the records in Close that it is about.
    leads: BTreeSet<&'a str>,
    contacts: BTreeSet<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letter: Option<DeadLetterSummary>,
    at: Timestamp,
}

impl OutcomeEvent<'_> {
    fn dead_letter(&self) -> Option<DeadLetterSummary> {
        match self.outcome {
            Outcome::Dead(dead) => Some(DeadLetterSummary {
                id: self.dead_letter?,
                fingerprint: dead.fingerprint(),
                error: dead.error.clone(),
                close_said: dead.response.clone(),
            }),
            Outcome::Synced(_) | Outcome::Skipped(_) | Outcome::Delayed { .. } | Outcome::Paused(_) => None,
        }
    }

    fn for_replay(&self, delays: &[Delay]) -> Option<ReplayEvent> {
        let comes_again_s = match self.outcome {
            Outcome::Delayed { level, .. } => delays.get(*level).map(|delay| delay.duration.as_secs()),
            Outcome::Synced(_) | Outcome::Skipped(_) | Outcome::Dead(_) | Outcome::Paused(_) => None,
        };
        Some(ReplayEvent {
            replay: self.envelope.replay?,
            outcome: self.outcome.label().to_owned(),
            dead_letter: self.dead_letter(),
            comes_again_s,
        })
    }

    /// `None` while the message is to be retried.
    fn for_producer<'a>(&'a self, destination: Option<&'a str>, now: Timestamp) -> Option<ProducerEvent<'a>> {
        let (outcome, detail) = match self.outcome {
            Outcome::Synced(effect) => ("synced", effect.label()),
            Outcome::Skipped(skip) => ("skipped", skip.label()),
            Outcome::Dead(dead) => ("dead", dead.reason.label()),
            Outcome::Delayed { .. } | Outcome::Paused(_) => return None,
        };
        let (leads, contacts) = self.decision.map(Decision::records).unwrap_or_default();
        Some(ProducerEvent {
            outcome,
            detail,
            message_id: self.envelope.message_id(),
            correlation_id: self.envelope.correlation_id(),
            destination,
            leads,
            contacts,
            dead_letter: self.dead_letter().map(|again| DeadLetterSummary { close_said: None, ..again }),
            at: now,
        })
    }
}

/// Publishes the outcome events of a message.
pub(crate) async fn notify(context: &Context, event: &OutcomeEvent<'_>) {
    // During an alarm nothing can be published.
    let is_blocked = context.status.is_alarmed();
    if let Some(replayed) = event.for_replay(&context.settings.delays).filter(|_| !is_blocked) {
        let body = serde_json::to_vec(&replayed).unwrap_or_default();
        let exchange = context.settings.retry_exchange();
        // Once the replay has ended, the key leads nowhere.
        let properties = BasicProperties::default().with_expiration(REPLAY_EVENT_TTL.into());
        let message = Outgoing { exchange: &exchange, key: REPLAYED, body: &body, properties };
        let _ = context.publishers.replays.publish(message).await;
    }
    let event = event.for_producer(context.destination.as_deref(), context.environment.now());
    if let Some((exchange, event)) = context.settings.outcomes.as_ref().zip(event) {
        let routed = if is_blocked { None } else { notify_producer(context, exchange, &event).await };
        context.metrics.outcome_published(routed);
    }
}

/// Returns whether the event reached a queue, or `None` when that is not known.
async fn notify_producer(context: &Context, exchange: &str, event: &ProducerEvent<'_>) -> Option<bool> {
    let mut properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_type("outcome".into())
        .with_message_id(Uuid::now_v7().to_string().into());
    if let Some(id) = event.correlation_id {
        properties = properties.with_correlation_id(id.into());
    }
    let (key, body) = (format!("{}.{}", event.outcome, event.detail), serde_json::to_vec(event).ok()?);
    let message = Outgoing { exchange, key: &key, body: &body, properties };
    let routed = match context.publishers.producers.publish(message).await {
        Ok(()) => true,
        Err(BrokerError::Unroutable { .. }) => false,
        Err(error) => {
            if !context.outcome_events_fail.swap(true, Ordering::Relaxed) {
                tracing::warn!(event = "outcome_events_failing", exchange, %error, "cannot publish outcome events, losing them until publishing works again");
            }
            return None;
        }
    };
    if context.outcome_events_fail.swap(false, Ordering::Relaxed) {
        tracing::info!(event = "outcome_events_recovered", exchange, "publishing outcome events again");
    }
    Some(routed)
}
