//! `close-sync run`.

use std::time::Duration;

use crate::VERSION;
use crate::cli::failure::Failure;
use crate::cli::{logging, signals};
use crate::config::{Config, Problems};
use crate::supervisor::{self, Control};
use crate::telemetry::panic_hook;

/// How long the export of the last traces may take.
const TRACE_EXPORT_TIMEOUT: Duration = Duration::from_secs(3);

pub(super) async fn run(
    config: Config,
    load: Box<dyn Fn() -> Result<Config, Problems> + Send + Sync>,
) -> Result<(), Failure> {
    let traces = logging::init(config.log_format, config.traces.clone())?;
    panic_hook::install_hook();
    tracing::info!(event = "process_started", version = VERSION, "starting close-sync");
    let control = Control { shutdown: signals::shutdown()?, reload: signals::reload()?, load };
    let grace = config.destinations.iter().map(|destination| destination.grace).max().unwrap_or_default();
    let result = supervisor::run(config, control).await;
    if let Some(traces) = traces {
        traces.finish(TRACE_EXPORT_TIMEOUT.min(grace)).await;
    }
    let stats = result?;
    tracing::info!(
        event = "process_stopped",
        settled = stats.settled,
        handed_back = stats.handed_back,
        "stopped close-sync"
    );
    Ok(())
}
