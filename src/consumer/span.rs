//! The span of a message in a trace, by OpenTelemetry's conventions for messaging.
//!
//! It lasts from the start of the work on a message until it is settled, and is the child of the producer's span.
//! Calls to Close are its children. It has the message's ids and nothing of its content.

use tracing::Span;
use tracing::field::Empty;

use crate::amqp::envelope::{Envelope, TraceParent};
use crate::consumer::context::Context;
use crate::consumer::delivery::ReceivedMessage;
use crate::consumer::state::Settlement;
use crate::outcome::{DelayCause, Outcome};
use crate::spans::{self, SPANS};
use crate::telemetry::otel::{self, RemoteParent};

/// The outcome of a delivery that is not settled.
const HANDED_BACK: &str = "handed_back";

/// The span of a message, from the start of the work on it.
pub(crate) fn of(message: &ReceivedMessage) -> Span {
    message.span.clone().unwrap_or_else(Span::none)
}

/// Begins the span of a message. One that was split goes on in its span.
pub(crate) fn begin(message: &mut ReceivedMessage, context: &Context) {
    if message.span.is_none() {
        message.span = Some(new(message, context));
    }
}

/// The fields that all log lines about a message have.
pub(crate) fn log_span(message: &ReceivedMessage, context: &Context) -> Span {
    let Envelope { attempts, trace, .. } = &message.envelope;
    tracing::info_span!(
        "message",
        destination = context.destination.as_deref(),
        message_id = message.envelope.message_id(),
        correlation_id = message.envelope.correlation_id(),
        trace_id = trace_id(&of(message), trace.as_ref()),
        parent_span_id = trace.as_ref().map(TraceParent::span_id),
        attempt = attempts.saturating_add(1),
    )
}

fn new(message: &ReceivedMessage, context: &Context) -> Span {
    let ReceivedMessage { body, envelope, .. } = message;
    let queue = &context.settings.queue;
    let span = tracing::info_span!(
        target: SPANS,
        parent: None,
        "message",
        "otel.name" = format!("process {}", if envelope.exchange.is_empty() { queue } else { &envelope.exchange }),
        "otel.kind" = "consumer",
        "messaging.system" = "rabbitmq",
        "messaging.operation.name" = "process",
        "messaging.operation.type" = "process",
        "messaging.destination.name" = envelope.exchange,
        "messaging.destination.subscription.name" = queue,
        "messaging.rabbitmq.destination.routing_key" = envelope.routing_key,
        "messaging.message.id" = envelope.own_id(),
        "messaging.message.conversation_id" = envelope.correlation_id(),
        "messaging.message.body.size" = i64::try_from(body.len()).unwrap_or(i64::MAX),
        "close_sync.destination" = context.destination.as_deref(),
        "close_sync.attempt" = i64::from(envelope.attempts) + 1,
        "close_sync.outcome" = Empty,
        "close_sync.skipped_for" = Empty,
        "error.type" = Empty,
        "otel.status_description" = Empty,
    );
    if let Some(parent) = &envelope.trace {
        let (trace_id, span_id) = (parent.trace_id(), parent.span_id());
        otel::continue_from(&span, RemoteParent { trace_id, span_id, sampled: parent.is_sampled() });
    }
    span
}

/// Records the outcome of a message.
pub(crate) fn conclude(span: &Span, outcome: &Outcome, settlement: &Settlement) {
    let settled = match settlement {
        Settlement::Settled { .. } => outcome,
        Settlement::HandedBack => return hand_back(span),
        Settlement::Paused(cause) => {
            spans::fail(span, cause.label(), "");
            return hand_back(span);
        }
        Settlement::Failed(error) => {
            spans::fail(span, error.trouble().label(), "");
            return hand_back(span);
        }
    };
    span.record("close_sync.outcome", settled.label());
    match settled {
        Outcome::Skipped(skip) => {
            span.record("close_sync.skipped_for", skip.label());
        }
        Outcome::Dead(dead) => spans::fail(span, dead.reason.label(), &dead.error),
        Outcome::Delayed { cause: cause @ (DelayCause::Failed(why) | DelayCause::NotClose(why)), .. } => {
            spans::fail(span, cause.label(), why);
        }
        Outcome::Delayed { cause: DelayCause::Held(_) | DelayCause::BehindEarlier, .. }
        | Outcome::Synced(_)
        | Outcome::Paused(_) => {}
    }
}

/// It will be delivered again.
pub(crate) fn hand_back(span: &Span) {
    span.record("close_sync.outcome", HANDED_BACK);
}

/// The id of its trace: that of the producer, or a new one.
fn trace_id(span: &Span, parent: Option<&TraceParent>) -> Option<String> {
    parent.map_or_else(|| otel::trace_id(span), |parent| Some(parent.trace_id().to_owned()))
}
