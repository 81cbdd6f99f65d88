//! Settles a message: publishes its successor, waits for the confirm, then acks.
//!
//! Nothing is lost because of this order. A crash between confirm and ack duplicates a message.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::amqp::BrokerError;
use crate::amqp::envelope::id_from_content;
use crate::amqp::publisher::Outgoing;
use crate::consumer::context::Context;
use crate::consumer::delivery::ReceivedMessage;
use crate::consumer::scheduler::Completion;
use crate::consumer::state::Settlement;
use crate::domain::decision::Decision;
use crate::outcome::{DeadLetter, DelayCause, Outcome};
use crate::retry::Backoff;

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
    /// The broker accepts no message of this size any more.
    TooLarge,
    Failed(BrokerError),
    /// The session ended first.
    Stopped,
}

/// Publishes the successor, if there is one, logs the outcome, then acks.
pub(crate) async fn settle(
    context: &Context,
    message: &ReceivedMessage,
    result: &WorkResult<'_>,
) -> Settlement {
    let successor = match result.outcome {
        Outcome::Synced(_) | Outcome::Skipped(_) => Successor::Confirmed(Completion::Done, None),
        Outcome::Delayed { level, cause } => delay(context, message, *level, cause).await,
        Outcome::Dead(dead) => dead_letter(context, message, dead).await,
        Outcome::Paused(cause) => {
            log(context, result);
            return Settlement::Paused(*cause);
        }
    };
    let (completion, dead_letter) = match successor {
        Successor::Confirmed(completion, dead_letter) => (completion, dead_letter),
        Successor::TooLarge => {
            log(context, result);
            return reject(context, message, result.outcome).await;
        }
        Successor::Failed(error) => return Settlement::Failed(error),
        Successor::Stopped => return Settlement::HandedBack,
    };
    log(context, result);
    // An ack on a connection that no longer answers may never return.
    match context.stop.run_until_cancelled(message.receipt.ack()).await {
        Some(Ok(true)) => {
            Settlement::Settled { by_close: result.outcome.proves_close_works(), completion, dead_letter }
        }
        // The channel of the delivery is gone. The broker delivers the message again.
        Some(Ok(false)) => {
            context.metrics.stale_ack();
            Settlement::HandedBack
        }
        Some(Err(error)) => Settlement::Failed(error),
        None => Settlement::HandedBack,
    }
}

async fn delay(context: &Context, message: &ReceivedMessage, level: usize, cause: &DelayCause) -> Successor {
    // The configuration has one delay at least.
    let Some(delay) = context.settings.delays.get(level) else {
        return Successor::Failed(BrokerError::Missing(format!("delay queue {level} does not exist")));
    };
    let id = message.envelope.delay_id.unwrap_or_else(|| context.environment.id());
    let attempts = message.envelope.attempts.saturating_add(cause.uses_attempt().into());
    let properties = message.envelope.for_delay(attempts, id);
    let exchange = context.settings.retry_exchange();
    let successor = Outgoing { exchange: &exchange, key: &delay.name, body: &message.body, properties };
    match publish(context, successor).await {
        Some(Ok(())) => {
            let due = Instant::now() + delay.duration;
            Successor::Confirmed(Completion::Delayed { id, due }, None)
        }
        Some(Err(error)) => Successor::Failed(error),
        None => Successor::Stopped,
    }
}

async fn dead_letter(context: &Context, message: &ReceivedMessage, dead: &DeadLetter) -> Successor {
    let id = Uuid::now_v7();
    let properties = message.envelope.for_dead_letter(dead, id, context.environment.now());
    // A fanout exchange needs no key. The producer's key is in a header, where any length fits.
    let exchange = context.settings.dead_letter_queue();
    let successor = Outgoing { exchange: &exchange, key: "", body: &message.body, properties };
    match publish(context, successor).await {
        Some(Ok(())) => Successor::Confirmed(Completion::Done, Some(id)),
        Some(Err(BrokerError::TooLarge(_))) => Successor::TooLarge,
        Some(Err(error)) => Successor::Failed(error),
        None => Successor::Stopped,
    }
}

/// Publishes a successor. Holds the original for as long as it takes: the broker accepts nothing during an alarm, a
/// full queue refuses, and an exchange without its binding drops. `None` when the session ends meanwhile.
async fn publish(context: &Context, successor: Outgoing<'_>) -> Option<Result<(), BrokerError>> {
    let exchange = successor.exchange;
    let mut pauses = Backoff::reconnect();
    let publishing = async {
        let mut held = None;
        let mut log_once = |error: &BrokerError| {
            held.get_or_insert_with(|| {
                tracing::warn!(event = "successor_held", exchange, %error, "holding the message until RabbitMQ accepts its successor");
                context.metrics.hold_successor()
            });
        };
        loop {
            let mut sent = context.publishers.successors.publish(successor.clone());
            let in_time = tokio::time::timeout(HELD_AFTER, &mut sent).await;
            if in_time.is_err() {
                log_once(&BrokerError::Unconfirmed("no answer so far, is an alarm raised?"));
            }
            let confirmed = if let Ok(confirmed) = in_time { confirmed } else { sent.await };
            match confirmed {
                Err(error @ (BrokerError::Unconfirmed(_) | BrokerError::Unroutable { .. })) => {
                    log_once(&error);
                    tokio::time::sleep(pauses.next_delay().unwrap_or_default()).await;
                }
                confirmed => return confirmed,
            }
        }
    };
    context.stop.run_until_cancelled(publishing).await
}

/// Lets the broker dead-letter a message that it would not accept from us again (its limit was lowered, or is lower
/// since 4.0): the queue's own dead-letter exchange takes it, without the headers that give the reason. Otherwise it
/// would be delivered again for ever, and end every session. This session ends at the next publish, whose channel is
/// gone.
async fn reject(context: &Context, message: &ReceivedMessage, outcome: &Outcome) -> Settlement {
    tracing::warn!(
        event = "message_too_large",
        bytes = message.body.len(),
        "message too large to publish again, RabbitMQ dead-letters it without headers"
    );
    match context.stop.run_until_cancelled(message.receipt.reject()).await {
        Some(Ok(true)) => {
            let dead_letter = Some(id_from_content(message.envelope.own_id(), &message.body));
            let by_close = outcome.proves_close_works();
            Settlement::Settled { by_close, completion: Completion::Done, dead_letter }
        }
        Some(Ok(false)) | None => Settlement::HandedBack,
        Some(Err(error)) => Settlement::Failed(error),
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
                delay = delay(*level),
                charged,
                %cause,
                took_ms,
                "message failed, retrying from a delay queue"
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
