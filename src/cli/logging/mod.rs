//! Log lines on standard error, and traces if a collector is configured.

mod json_stderr;
mod library_levels;
mod text_fields;

use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::cli::failure::Failure;
use crate::cli::logging::json_stderr::JsonStderr;
use crate::cli::logging::library_levels::{library_levels, limited};
use crate::cli::logging::text_fields::TextFields;
use crate::config::{self, LogFormat};
use crate::http::admin::AUDIT;
use crate::spans::SPANS;
use crate::telemetry::otel::{self, Traces};

/// Starts logging and tracing. Returns the exporter of traces, to be flushed on shutdown.
pub(super) fn init(format: LogFormat, traces: otel::Settings) -> Result<Option<Traces>, Failure> {
    let traces = Traces::start(traces)
        .map_err(|error| Failure::Configuration(format!("cannot export traces: {error:#}")))?;
    let (traces, layer) = traces.unzip();
    tracing_subscriber::registry().with(layer).with(log_layer(format)).init();
    let filter = config::environment().remove(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let limited = limited(&filter);
    if !limited.is_empty() {
        tracing::info!(
            event = "log_level_limited",
            directives = limited.join(","),
            "RUST_LOG asks for more than libraries may log, because their log lines may contain passwords and message \
             bodies; close-sync itself logs what was asked for"
        );
    }
    Ok(traces)
}

fn log_layer<S: Subscriber + for<'a> LookupSpan<'a>>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync> {
    // lapin logs lost connections, which close-sync logs itself.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,lapin=off"));
    let audits = filter_fn(|metadata| metadata.target() == AUDIT).with_max_level_hint(LevelFilter::INFO);
    let not_traces = filter_fn(|metadata| metadata.target() != SPANS)
        // Without a hint of its own, this filter would remove the hint of the other one.
        .with_max_level_hint(LevelFilter::TRACE);
    let filter = filter.or(audits).and(not_traces).and(library_levels());
    let builder = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let is_terminal = std::io::stderr().is_terminal();
    let json = match format {
        LogFormat::Auto => !is_terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    if json {
        let json = builder
            .with_writer(JsonStderr)
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false);
        json.with_filter(filter).boxed()
    } else {
        let text = builder.with_ansi(is_terminal).with_target(false).fmt_fields(TextFields);
        text.with_filter(filter).boxed()
    }
}
