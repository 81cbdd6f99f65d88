//! Exports traces with OpenTelemetry, if a collector is configured.
//!
//! The code creates spans with `tracing`, with the target [`SPANS`]. Log lines do not contain these spans, and traces do
//! not contain log lines. Without a collector, a span costs the check of a flag.
//!
//! The worker never waits for the collector. Finished spans go to a queue, and are dropped when it is full. A separate
//! thread sends them in batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{Protocol, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{BatchSpanProcessor, Sampler, SdkTracerProvider, SpanData, SpanExporter};
use percent_encoding::percent_decode_str;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use tokio::runtime::Handle;
use tracing::Span;
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::{Layer, Registry};
use url::Url;
use uuid::Uuid;

use crate::spans::SPANS;

/// The time-out for a batch, retries included: the default of the specification.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub struct Settings {
    /// The URL for spans, with the path of the signal. `None` disables traces.
    pub endpoint: Option<Url>,
    /// The headers of each request.
    pub headers: HeaderMap,
    /// The name of this service in traces.
    pub service: String,
    /// The share of new traces that is exported. A trace of a producer is exported if the producer exports it.
    pub ratio: f64,
}

/// Appends the path of traces to the base URL of a collector.
pub fn endpoint(base: &str) -> Option<Url> {
    let mut url = Url::parse(base).ok().filter(|url| matches!(url.scheme(), "http" | "https"))?;
    url.path_segments_mut().ok()?.pop_if_empty().extend(["v1", "traces"]);
    Some(url)
}

/// Parses `key=value,key=value` with percent-encoded values.
pub fn headers(list: &str) -> Option<HeaderMap> {
    let pairs = list.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let value: Vec<u8> = percent_decode_str(value.trim()).collect();
        let mut value = HeaderValue::from_bytes(&value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::try_from(name.trim()).ok()?, value))
    };
    pairs.map(header).collect()
}

#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The TLS setup failed.
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    /// The exporter rejected the settings.
    #[error(transparent)]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// The subscriber layer for spans, next to the one that writes log lines.
pub type SpanLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// The pipeline that sends spans to the collector.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Starts the pipeline; needs a Tokio runtime. `None` without a collector.
    ///
    /// # Errors
    /// If TLS or the exporter cannot be set up.
    pub fn start(settings: Settings) -> Result<Option<(Self, SpanLayer)>, TracesError> {
        let Settings { endpoint: Some(endpoint), headers, service, ratio } = settings else {
            return Ok(None);
        };
        // The process uses one TLS stack, as in `close`.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .user_agent(concat!("close-sync/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .timeout(EXPORT_TIMEOUT)
            // The headers may contain a key, which only this address may receive.
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(http)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(endpoint.as_str())
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let exporter = BackgroundExporter {
            exporter: Arc::new(exporter),
            runtime: Handle::current(),
            endpoint,
            lost: AtomicUsize::new(0),
        };
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("service.instance.id", Uuid::now_v7().to_string()))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(resource)
            .with_span_processor(BatchSpanProcessor::builder(exporter).build())
            .build();
        let layer = OpenTelemetryLayer::new(provider.tracer("close-sync"))
            // Code locations and threads say nothing about a message.
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            // The parent comes from the span, not from the active context.
            .with_context_activation(false)
            .with_filter(
                filter_fn(|metadata| metadata.is_span() && metadata.target() == SPANS)
                    .with_max_level_hint(LevelFilter::INFO),
            );
        Ok(Some((Self(provider), layer.boxed())))
    }

    /// Sends the remaining spans, for at most `within`.
    pub async fn finish(self, within: Duration) {
        // The shutdown blocks.
        let flush = tokio::task::spawn_blocking(move || self.0.shutdown_with_timeout(within));
        if let Ok(Err(error)) = flush.await {
            tracing::info!(event = "traces_lost", %error, "could not export the last traces");
        }
    }
}

/// Sends batches to the collector, and logs an outage once.
#[derive(Debug)]
struct BackgroundExporter {
    exporter: Arc<opentelemetry_otlp::SpanExporter>,
    /// HTTP needs a runtime, and the sending thread has none.
    runtime: Handle,
    endpoint: Url,
    /// The number of spans lost since the last successful batch.
    lost: AtomicUsize,
}

impl SpanExporter for BackgroundExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (exporter, spans) = (self.exporter.clone(), batch.len());
        let sent = self.runtime.spawn(async move { exporter.export(batch).await });
        let Ok(result) = sent.await else {
            // The program is exiting, and [`Traces::finish`] logs it.
            return Err(OTelSdkError::AlreadyShutdown);
        };
        match &result {
            Ok(()) => match self.lost.swap(0, Ordering::Relaxed) {
                0 => {}
                lost => tracing::info!(event = "trace_export_recovered", lost, "trace export recovered"),
            },
            Err(error) => {
                if self.lost.fetch_add(spans, Ordering::Relaxed) == 0 {
                    tracing::warn!(
                        event = "trace_export_failing",
                        endpoint = %self.endpoint,
                        %error,
                        "cannot export traces, dropping them until the collector recovers; messages are not affected"
                    );
                }
            }
        }
        result
    }

    fn set_resource(&mut self, resource: &Resource) {
        // No batch is being sent yet.
        if let Some(exporter) = Arc::get_mut(&mut self.exporter) {
            exporter.set_resource(resource);
        }
    }
}

/// A parent span in another process.
#[derive(Clone, Copy, Debug)]
pub struct RemoteParent<'a> {
    /// 32 hexadecimal digits.
    pub trace_id: &'a str,
    /// 16 hexadecimal digits.
    pub span_id: &'a str,
    /// Whether the other process exports it.
    pub sampled: bool,
}

/// Makes a new span the child of a span in another process.
pub fn continue_from(span: &Span, remote: RemoteParent<'_>) {
    let ids = TraceId::from_hex(remote.trace_id).ok().zip(SpanId::from_hex(remote.span_id).ok());
    if let Some((trace_id, span_id)) = ids {
        let flags = TraceFlags::default().with_sampled(remote.sampled);
        let context = SpanContext::new(trace_id, span_id, flags, true, TraceState::NONE);
        // Fails without a collector, which does not matter.
        let _ = span.set_parent(Context::new().with_remote_span_context(context));
    }
}

/// The trace id of a span, if it is exported.
pub fn trace_id(span: &Span) -> Option<String> {
    let context = span.context();
    let context = context.span().span_context().clone();
    context.is_sampled().then(|| context.trace_id().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_the_signal_is_appended_to_the_base() {
        for (base, full) in [
            ("http://localhost:4318", Some("http://localhost:4318/v1/traces")),
            ("http://localhost:4318/", Some("http://localhost:4318/v1/traces")),
            ("https://o.test/otlp", Some("https://o.test/otlp/v1/traces")),
            ("https://o.test/otlp/", Some("https://o.test/otlp/v1/traces")),
            ("localhost:4318", None),
            ("grpc://o.test", None),
            ("", None),
        ] {
            assert_eq!(endpoint(base).as_ref().map(Url::as_str), full, "{base}");
        }
    }

    #[test]
    fn headers_are_parsed_and_hidden_in_debug_output() {
        let read = headers(" api-key = s%20cr%3Dt , x-tenant=crm==, ").unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(read["api-key"], "s cr=t");
        assert_eq!(read["x-tenant"], "crm==");
        assert!(!format!("{read:?}").contains("crm"));
        assert!(headers("").unwrap().is_empty());
        for none in ["api-key", "a b=c", "key=%0a", "=x"] {
            assert!(headers(none).is_none(), "{none}");
        }
    }
}
