//! The span of a message in a trace, by OpenTelemetry's conventions for messaging.
//!
//! It lasts from the start of the work on a message until it is settled, and is the child of the span its producer
//! names. Calls to Close are its children. It has the message's ids and no word of what the message says.

use tracing::Span;
use tracing::field::Empty;

use crate::amqp::envelope::TraceParent;
use crate::consumer::Session;
use crate::consumer::task::{Done, Incoming};
use crate::outcome::{DelayCause, Outcome};
use crate::telemetry::otel::{self, RemoteParent, SPANS};

/// What becomes of a delivery that is not settled.
const HANDED_BACK: &str = "handed_back";

/// Begins the span of a message.
pub(crate) fn begin(incoming: &Incoming, session: &Session) -> Span {
    let Incoming { delivery, envelope, .. } = incoming;
    let queue = &session.settings.queue;
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
        "messaging.message.body.size" = i64::try_from(delivery.data.len()).unwrap_or(i64::MAX),
        "close_sync.destination" = session.destination.as_deref(),
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

/// Tells what became of it.
pub(crate) fn conclude(span: &Span, outcome: &Outcome, done: &Done) {
    let settled = match done {
        Done::Settled { .. } => outcome,
        Done::HandedBack => return hand_back(span),
        Done::Paused(cause) => {
            otel::fail(span, cause.label(), "");
            return hand_back(span);
        }
        Done::Failed(error) => {
            otel::fail(span, error.trouble().label(), "");
            return hand_back(span);
        }
    };
    span.record("close_sync.outcome", settled.label());
    match settled {
        Outcome::Skipped(skip) => {
            span.record("close_sync.skipped_for", skip.label());
        }
        Outcome::Dead(dead) => otel::fail(span, dead.reason.label(), &dead.error),
        Outcome::Delayed { cause: DelayCause::Failed(why), .. } => otel::fail(span, "failed", why),
        Outcome::Delayed { cause: DelayCause::RateLimited(_) | DelayCause::BehindEarlier, .. }
        | Outcome::Synced(_)
        | Outcome::Paused(_) => {}
    }
}

/// It will be delivered again.
pub(crate) fn hand_back(span: &Span) {
    span.record("close_sync.outcome", HANDED_BACK);
}

/// The id of the trace it belongs to: its producer's, or one that begins with it.
pub(crate) fn trace_id(span: &Span, parent: Option<&TraceParent>) -> Option<String> {
    parent.map_or_else(|| otel::trace_id(span), |parent| Some(parent.trace_id().to_owned()))
}
