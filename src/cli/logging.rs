//! Log lines on standard error, and traces if a collector is configured.

use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::cli::failure::Failure;
use crate::config::LogFormat;
use crate::http::admin::AUDIT;
use crate::spans::SPANS;
use crate::telemetry::otel::{self, Traces};

/// Starts logging and tracing. Returns the exporter of traces, to be flushed on shutdown.
pub(super) fn init(format: LogFormat, traces: otel::Settings) -> Result<Option<Traces>, Failure> {
    let traces = Traces::start(traces)
        .map_err(|error| Failure::Configuration(format!("cannot export traces: {error:#}")))?;
    let (traces, layer) = traces.unzip();
    tracing_subscriber::registry().with(layer).with(log_layer(format)).init();
    Ok(traces)
}

fn log_layer<S: Subscriber + for<'a> LookupSpan<'a>>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync> {
    // lapin logs lost connections, which close-sync logs itself.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,lapin=off"));
    let audits = filter_fn(|metadata| metadata.target() == AUDIT).with_max_level_hint(LevelFilter::INFO);
    let not_traces = filter_fn(|metadata| metadata.target() != SPANS)
        // Without a hint of its own, this filter would remove the hint of the other one.
        .with_max_level_hint(LevelFilter::TRACE);
    let filter = filter.or(audits).and(not_traces);
    let builder = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let is_terminal = std::io::stderr().is_terminal();
    let json = match format {
        LogFormat::Auto => !is_terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    if json {
        let json = builder.json().flatten_event(true).with_current_span(true).with_span_list(false);
        json.with_filter(filter).boxed()
    } else {
        builder.with_ansi(is_terminal).with_target(false).with_filter(filter).boxed()
    }
}
