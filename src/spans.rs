//! Spans for traces, which [`crate::telemetry::otel`] exports.

use tracing::Span;

/// The target of exported spans.
pub const SPANS: &str = "close_sync::span";

/// The current span, as the parent for work that several messages share. None without a collector.
pub fn current() -> Span {
    let current = Span::current();
    let is_exported = current.metadata().is_some_and(|metadata| metadata.target() == SPANS);
    if is_exported { current } else { Span::none() }
}

/// Marks a span as failed: with a `kind` from a closed list and a description without personal data. The span needs
/// the fields `error.type` and `otel.status_description`.
pub fn fail(span: &Span, kind: &str, description: &str) {
    span.record("error.type", kind);
    span.record("otel.status_description", description);
}
