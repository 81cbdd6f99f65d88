//! Settles a message: publishes its successor, waits for the confirm, then acks.
//!
//! Nothing is lost because of this order. A crash between confirm and ack duplicates a message.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lapin::BasicProperties;
use tokio::time::Instant;
use uuid::Uuid;

use crate::amqp::BrokerError;
use crate::amqp::envelope::{Envelope, id_from_content};
use crate::amqp::publisher::Outgoing;
use crate::consumer::context::Context;
use crate::consumer::delivery::ReceivedMessage;
use crate::consumer::quarantine::{Evidence, Treatment};
use crate::consumer::scheduler::Completion;
use crate::consumer::state::Settlement;
use crate::domain::decision::Decision;
use crate::outcome::{DeadLetter, DelayCause, Outcome, Reason, Stage};
use crate::retry::Backoff;
use crate::telemetry::metrics::QuarantineStep;

/// A confirm takes milliseconds. A message whose successor has no confirm after this long counts as held.
const HELD_AFTER: Duration = Duration::from_secs(2);

/// What work on a message resulted in.
pub(crate) struct WorkResult<'a> {
    pub(crate) outcome: &'a Outcome,
    pub(crate) decision: Option<&'a Decision>,
    /// When the work began.
    pub(crate) started: Instant,
}

/// A successor that the broker has confirmed, or why there is none.
enum Successor {
    Confirmed(Completion, Option<Uuid>),
    /// The broker does not take it, in any form.
    Refused,
    Failed(BrokerError),
    /// The session ended first.
    Stopped,
}

/// Where a successor goes.
struct Target<'a> {
    exchange: &'a str,
    /// The routing key.
    key: &'a str,
}

/// Publishes the successor, if there is one, logs the outcome, then acks. Returns how the message really ended, too, if
/// that is not the outcome.
pub(crate) async fn settle(
    context: &Context,
    message: &ReceivedMessage,
    result: &WorkResult<'_>,
) -> (Settlement, Option<Outcome>) {
    let panics = context.quarantine.panics(|| message.content_hash());
    let successor = match result.outcome {
        Outcome::Paused(cause) => {
            log(context, result);
            return (Settlement::Paused(*cause), None);
        }
        _ if panics => Successor::Refused,
        Outcome::Synced(_) | Outcome::Skipped(_) => Successor::Confirmed(Completion::Done, None),
        Outcome::Delayed { level, cause } => delay(context, message, *level, cause).await,
        Outcome::Dead(dead) => dead_letter(context, message, dead).await,
    };
    let (completion, dead_letter) = match successor {
        Successor::Confirmed(completion, dead_letter) => (completion, dead_letter),
        Successor::Refused => return reject(context, message, result).await,
        Successor::Failed(error) => return (Settlement::Failed(error), None),
        Successor::Stopped => return (Settlement::HandedBack, None),
    };
    log(context, result);
    // An ack on a connection that no longer answers may never return.
    let settlement = match context.stop.run_until_cancelled(message.receipt.ack()).await {
        Some(Ok(true)) => {
            context.quarantine.forget(|| message.content_hash());
            Settlement::Settled { by_close: result.outcome.proves_close_works(), completion, dead_letter }
        }
        // The channel of the delivery is gone. The broker delivers the message again.
        Some(Ok(false)) => {
            context.metrics.stale_ack();
            Settlement::HandedBack
        }
        Some(Err(error)) => Settlement::Failed(error),
        None => Settlement::HandedBack,
    };
    (settlement, None)
}

async fn delay(context: &Context, message: &ReceivedMessage, level: usize, cause: &DelayCause) -> Successor {
    // The configuration has one delay at least.
    let Some(delay) = context.settings.delays.get(level) else {
        return Successor::Failed(BrokerError::Missing(format!("delay queue {level} does not exist")));
    };
    let id = message.envelope.delay_id.unwrap_or_else(|| context.environment.id());
    let attempts = message.envelope.attempts.saturating_add(cause.uses_attempt().into());
    let properties = |envelope: &Envelope| envelope.for_delay(attempts, id);
    let exchange = context.settings.retry_exchange();
    let confirmed = || {
        let due = Instant::now() + delay.duration;
        Successor::Confirmed(Completion::Delayed { id, due }, None)
    };
    publish(context, message, &Target { exchange: &exchange, key: &delay.name }, properties, confirmed).await
}

async fn dead_letter(context: &Context, message: &ReceivedMessage, dead: &DeadLetter) -> Successor {
    let (id, now) = (Uuid::now_v7(), context.environment.now());
    let properties = |envelope: &Envelope| envelope.for_dead_letter(dead, id, now);
    // A fanout exchange needs no key. The producer's key is in a header, where any length fits.
    let exchange = context.settings.dead_letter_queue();
    let confirmed = || Successor::Confirmed(Completion::Done, Some(id));
    publish(context, message, &Target { exchange: &exchange, key: "" }, properties, confirmed).await
}

/// Publishes a successor. Holds the original for as long as it takes: the broker accepts nothing during an alarm, a
/// full queue refuses, and an exchange without its binding drops. A successor that may end its channel goes through
/// the quarantine.
async fn publish(
    context: &Context,
    message: &ReceivedMessage,
    target: &Target<'_>,
    properties: impl Fn(&Envelope) -> BasicProperties + Sync,
    confirmed: impl Fn() -> Successor + Sync,
) -> Successor {
    let quarantine = &context.quarantine;
    let hash = || message.content_hash();
    let in_flight = AtomicBool::new(false);
    let publishing = async {
        let mut holding = Holding::new(context, target.exchange);
        loop {
            let treatment = quarantine.treatment(hash);
            let outgoing = |envelope: &Envelope| {
                let Target { exchange, key } = *target;
                Outgoing { exchange, key, body: &message.body, properties: properties(envelope) }
            };
            let answer = match treatment {
                Treatment::Normal => {
                    in_flight.store(true, Ordering::Relaxed);
                    let publish = context.publishers.successors.publish(outgoing(&message.envelope));
                    let answer = holding.watch(publish).await;
                    in_flight.store(false, Ordering::Relaxed);
                    answer
                }
                // A wait for its turn does not mean that an alarm is raised.
                Treatment::Alone => context.publishers.quarantine.publish(outgoing(&message.envelope)).await,
                Treatment::Bare => {
                    context.publishers.quarantine.publish(outgoing(&message.envelope.bare())).await
                }
                Treatment::Reject => return Successor::Refused,
            };
            let Err(error) = answer else {
                if treatment == Treatment::Bare {
                    quarantined(context, QuarantineStep::Bare);
                }
                return confirmed();
            };
            let evidence = Evidence::of(&error);
            if let Some(evidence) = evidence {
                quarantine.suspect(hash, evidence);
            }
            let is_held = matches!(error, BrokerError::Unconfirmed(_) | BrokerError::Unroutable { .. });
            // The quarantine has connections of its own, and the session continues without them.
            let goes_on = treatment != Treatment::Normal && evidence.is_some();
            if !is_held && !goes_on {
                return Successor::Failed(error);
            }
            holding.pause(&error).await;
        }
    };
    if let Some(successor) = context.stop.run_until_cancelled(publishing).await {
        return successor;
    }
    if in_flight.into_inner()
        && let Some(evidence) = context.evidence.get()
    {
        quarantine.suspect(hash, *evidence);
    }
    Successor::Stopped
}

/// A message that is held because the broker does not confirm its successor.
struct Holding<'a> {
    context: &'a Context,
    exchange: &'a str,
    pauses: Backoff,
    /// Counted in a metric while it exists.
    held: Option<Box<dyn Send + 'a>>,
}

impl<'a> Holding<'a> {
    fn new(context: &'a Context, exchange: &'a str) -> Self {
        Self { context, exchange, pauses: Backoff::reconnect(), held: None }
    }

    /// Waits for a publish. Without a confirm for a while the message counts as held.
    async fn watch(
        &mut self,
        mut publish: impl Future<Output = Result<(), BrokerError>> + Unpin,
    ) -> Result<(), BrokerError> {
        if let Ok(published) = tokio::time::timeout(HELD_AFTER, &mut publish).await {
            return published;
        }
        self.log_once(&BrokerError::Unconfirmed("no answer so far, is an alarm raised?"));
        publish.await
    }

    /// Waits until the next try.
    async fn pause(&mut self, error: &BrokerError) {
        self.log_once(error);
        tokio::time::sleep(self.pauses.next_delay().unwrap_or_default()).await;
    }

    fn log_once(&mut self, error: &BrokerError) {
        let Self { context, exchange, .. } = *self;
        self.held.get_or_insert_with(|| {
            tracing::warn!(event = "successor_held", exchange, %error, "holding the message until RabbitMQ accepts its successor");
            Box::new(context.metrics.hold_successor())
        });
    }
}

/// Counts and logs a message that could not be settled in the usual way. The span of the log line names it.
fn quarantined(context: &Context, step: QuarantineStep) {
    context.metrics.quarantined(step);
    let step = step.label();
    tracing::warn!(event = "message_quarantined", step, "message could not be settled in the usual way");
}

/// Lets the broker dead-letter a message that cannot be settled in any other way: the queue's own dead-letter exchange
/// takes it, without the headers that give the reason.
async fn reject(
    context: &Context,
    message: &ReceivedMessage,
    result: &WorkResult<'_>,
) -> (Settlement, Option<Outcome>) {
    let settlement = match context.stop.run_until_cancelled(message.receipt.reject()).await {
        Some(Ok(true)) => {
            quarantined(context, QuarantineStep::Rejected);
            // A replay starts over.
            context.quarantine.forget(|| message.content_hash());
            let by_close = result.outcome.proves_close_works();
            let dead_letter = Some(id_from_content(message.envelope.own_id(), &message.body));
            Settlement::Settled { by_close, completion: Completion::Done, dead_letter }
        }
        Some(Ok(false)) | None => return (Settlement::HandedBack, None),
        Some(Err(error)) => return (Settlement::Failed(error), None),
    };
    let outcome = match result.outcome {
        Outcome::Dead(dead) => Outcome::Dead(dead.clone()),
        Outcome::Synced(_) | Outcome::Skipped(_) | Outcome::Delayed { .. } | Outcome::Paused(_) => {
            Outcome::Dead(unpublishable())
        }
    };
    log(context, &WorkResult { outcome: &outcome, ..*result });
    (settlement, Some(outcome))
}

fn unpublishable() -> DeadLetter {
    let error = "RabbitMQ does not take the message from close-sync again".to_owned();
    DeadLetter {
        reason: Reason::Internal,
        stage: Stage::Write,
        error,
        field: None,
        decision: None,
        response: None,
    }
}

/// Logs one line per message, once everything but the ack is done.
fn log(context: &Context, WorkResult { outcome, decision, started }: &WorkResult<'_>) {
    let decision = decision.map(Decision::summary);
    let delay = |level: usize| context.settings.delays.get(level).map(|delay| delay.name.as_str());
    let took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    match outcome {
        Outcome::Synced(effect) => tracing::info!(outcome = effect.label(), decision, took_ms, "synced"),
        Outcome::Skipped(skip) => tracing::info!(reason = skip.label(), decision, took_ms, "skipped"),
        Outcome::Delayed { level, cause: DelayCause::BehindEarlier } => {
            tracing::debug!(
                delay = delay(*level),
                "message deferred, an earlier one about the same person or company is in a delay queue"
            );
        }
        Outcome::Delayed { level, cause } => {
            let charged = cause.uses_attempt();
            tracing::warn!(
                event = "message_delayed",
                cause = cause.label(),
                error = %cause,
                delay = delay(*level),
                charged,
                took_ms,
                "message delayed, retrying from a delay queue"
            );
        }
        Outcome::Dead(dead) => tracing::warn!(
            event = "dead_lettered",
            reason = dead.reason.label(),
            stage = dead.stage.label(),
            error = dead.error,
            decision = dead.decision,
            took_ms,
            "dead-lettered"
        ),
        Outcome::Paused(cause) => tracing::debug!(cause = cause.label(), took_ms, "handed back"),
    }
}
