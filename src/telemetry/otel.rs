//! Traces for OpenTelemetry, where a collector is named.
//!
//! What is a span is said where it happens: with `tracing`, under the target [`SPANS`]. Log lines know nothing of these
//! spans, and the traces nothing of log lines. Without a collector nobody listens to the target, and a span costs a look
//! at a flag.
//!
//! Nothing waits for the collector. Spans that are over go to a queue, and are lost when it is full; a thread of its own
//! sends them in batches.

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

/// The target of spans that are exported.
pub const SPANS: &str = "close_sync::span";

/// How long one batch may take, tries included: the specification's default.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where traces go, and how many.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where spans are posted to, the path of the signal included. `None`: nothing is traced.
    pub endpoint: Option<Url>,
    /// Headers of each post.
    pub headers: HeaderMap,
    /// What this program is called in traces.
    pub service: String,
    /// The share of traces that is exported, of those that begin here. Others are if their producer's is.
    pub ratio: f64,
}

/// Where traces are posted to, below the base of a collector.
pub fn endpoint(base: &str) -> Option<Url> {
    let mut url = Url::parse(base).ok().filter(|url| matches!(url.scheme(), "http" | "https"))?;
    url.path_segments_mut().ok()?.pop_if_empty().extend(["v1", "traces"]);
    Some(url)
}

/// Reads `key=value,key=value`, values with `%20` and the like.
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

/// Why there can be no traces.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// TLS cannot be set up.
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    /// The exporter does not take the settings.
    #[error(transparent)]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// What hears of the spans, beside what writes log lines.
pub type SpanLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// What sends spans to the collector.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Begins, within a runtime. `None` without a collector.
    ///
    /// # Errors
    /// The settings cannot work on this machine.
    pub fn start(settings: Settings) -> Result<Option<(Self, SpanLayer)>, TracesError> {
        let Settings { endpoint: Some(endpoint), headers, service, ratio } = settings else {
            return Ok(None);
        };
        // As in `close`: one TLS stack for the process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .user_agent(concat!("close-sync/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .timeout(PATIENCE)
            // Its headers may hold a key, which is for this address alone.
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(http)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(endpoint.as_str())
            .with_timeout(PATIENCE)
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
            // Neither where in the code nor on which thread: both are the machinery's, not the message's.
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            // Who is whose child is read off the spans.
            .with_context_activation(false)
            .with_filter(
                filter_fn(|metadata| metadata.is_span() && metadata.target() == SPANS)
                    .with_max_level_hint(LevelFilter::INFO),
            );
        Ok(Some((Self(provider), layer.boxed())))
    }

    /// Sends what is left, for as long as `within`.
    pub async fn finish(self, within: Duration) {
        // It blocks.
        let flush = tokio::task::spawn_blocking(move || self.0.shutdown_with_timeout(within));
        if let Ok(Err(error)) = flush.await {
            tracing::info!(%error, "the last traces were not sent");
        }
    }
}

/// Carries batches to the collector, and tells once when that does not work.
#[derive(Debug)]
struct BackgroundExporter {
    exporter: Arc<opentelemetry_otlp::SpanExporter>,
    /// The thread that sends has none, and HTTP needs one.
    runtime: Handle,
    endpoint: Url,
    /// Spans lost since the last batch that arrived.
    lost: AtomicUsize,
}

impl SpanExporter for BackgroundExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (exporter, spans) = (self.exporter.clone(), batch.len());
        let sent = self.runtime.spawn(async move { exporter.export(batch).await });
        let Ok(result) = sent.await else {
            // The program ends, and [`Traces::finish`] has told.
            return Err(OTelSdkError::AlreadyShutdown);
        };
        match &result {
            Ok(()) => match self.lost.swap(0, Ordering::Relaxed) {
                0 => {}
                lost => tracing::info!(lost, "the collector takes traces again"),
            },
            Err(error) => {
                if self.lost.fetch_add(spans, Ordering::Relaxed) == 0 {
                    tracing::warn!(
                        endpoint = %self.endpoint,
                        %error,
                        "traces cannot be exported and are lost until they can; messages do not depend on it"
                    );
                }
            }
        }
        result
    }

    fn set_resource(&mut self, resource: &Resource) {
        // Nothing is being sent yet.
        if let Some(exporter) = Arc::get_mut(&mut self.exporter) {
            exporter.set_resource(resource);
        }
    }
}

/// A place in a trace that began elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct RemoteParent<'a> {
    /// The id of the trace, 32 hexadecimal digits.
    pub trace_id: &'a str,
    /// The id of the span, 16 hexadecimal digits.
    pub span_id: &'a str,
    /// Whether it is exported there.
    pub sampled: bool,
}

/// Makes a new span the child of one elsewhere.
pub fn continue_from(span: &Span, remote: RemoteParent<'_>) {
    let ids = TraceId::from_hex(remote.trace_id).ok().zip(SpanId::from_hex(remote.span_id).ok());
    if let Some((trace_id, span_id)) = ids {
        let flags = TraceFlags::default().with_sampled(remote.sampled);
        let context = SpanContext::new(trace_id, span_id, flags, true, TraceState::NONE);
        // Without a collector there is nobody to tell.
        let _ = span.set_parent(Context::new().with_remote_span_context(context));
    }
}

/// The id of the trace that a span belongs to, if it is exported.
pub fn trace_id(span: &Span) -> Option<String> {
    let context = span.context();
    let context = context.span().span_context().clone();
    context.is_sampled().then(|| context.trace_id().to_string())
}

/// The span in which something happens that is done for somebody else too. None without a collector.
pub fn current() -> Span {
    let current = Span::current();
    let is_exported = current.metadata().is_some_and(|metadata| metadata.target() == SPANS);
    if is_exported { current } else { Span::none() }
}

/// What a span is about has failed: `kind` from a closed list, and more without personal data, if there is more. The
/// span needs the fields `error.type` and `otel.status_description`.
pub fn fail(span: &Span, kind: &str, more: &str) {
    span.record("error.type", kind);
    span.record("otel.status_description", more);
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
    fn headers_are_read_and_not_shown() {
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
