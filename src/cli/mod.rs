//! The command line: what each command is called, what it prints, how it exits.
//!
//! Data goes to standard output, everything else to standard error, so that a script can pipe the
//! first. Exit codes: 0 done, 1 what was checked does not hold, 2 wrong usage or input, 69 something
//! needed is not there, 78 the configuration cannot work.

mod check;
mod dlq;
mod plan;
mod publish;
#[cfg(feature = "simulator")]
mod simulate;
#[cfg(feature = "simulator")]
mod test;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;
use tracing::Subscriber;
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::amqp::BrokerError;
use crate::config::{self, Config, Destination, Layers, LogFormat, Need, Problems};
use crate::http::admin::AUDIT;
use crate::supervisor::{self, Control, RunError};
use crate::telemetry::otel::{self, Traces};
use crate::telemetry::panic_hook;
use crate::text::choices;
use crate::{VERSION, http};

/// Keeps the Close CRM in step with identify events from RabbitMQ.
#[derive(Parser)]
#[command(name = "close-sync", version = VERSION, propagate_version = true, max_term_width = 100)]
#[command(after_long_help = "Settings come from a TOML file and the environment; `close-sync check` tells \
    what is missing, `close-sync check --print-config` what is in force.\n\n\
    Try it without a Close account: `close-sync simulate` starts a fake Close and prints how to use it.\n\n\
    Exit codes: 0 done, 1 what was checked does not hold (plan --strict, test, dlq replay), 2 wrong usage or input, 69 something needed is not there (RabbitMQ, Close, a free \
    port) or stopped by a second signal, 78 the configuration cannot work.")]
struct Cli {
    /// A TOML file with settings that differ from the defaults.
    #[arg(long, short, global = true, value_name = "FILE", env = "CLOSE_SYNC_CONFIG")]
    config: Option<PathBuf>,

    /// Which destination, where several are configured; `run` and `check` take all of them without it.
    #[arg(long, global = true, value_name = "NAME")]
    destination: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Consume events and keep Close in step, until SIGTERM or SIGINT. SIGHUP reads the configuration again.
    Run,
    Check(check::Args),
    Plan(plan::Args),
    #[cfg(feature = "simulator")]
    Test(test::Args),
    Publish(publish::Args),
    #[command(subcommand)]
    Dlq(Box<dlq::Command>),
    #[cfg(feature = "simulator")]
    Simulate(simulate::Args),
    /// Ask the worker at `http.addr` whether it is alive, for container health checks.
    Healthcheck,
}

/// The bytes of a file, or of standard input if it is called `-`.
async fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    let unreadable = |error| Failure::Input(format!("{} cannot be read: {error}", file.display()));
    if file.as_os_str() != "-" {
        return tokio::fs::read(file).await.map_err(unreadable);
    }
    let mut bytes = Vec::new();
    tokio::io::stdin().read_to_end(&mut bytes).await.map_err(unreadable)?;
    Ok(bytes)
}

/// Why a command did not do what it was asked for.
#[derive(Debug)]
enum Failure {
    /// The input or the arguments are wrong.
    Input(String),
    /// Something needed is not there.
    Unavailable(String),
    /// The configuration cannot work.
    Configuration(String),
    /// Told already; only the exit code is left.
    Told(u8),
}

/// What was checked does not hold.
const UNFIT: u8 = 1;
/// `EX_USAGE` by convention of the shell.
const INPUT: u8 = 2;
/// `EX_UNAVAILABLE` of sysexits.
const UNAVAILABLE: u8 = 69;
/// `EX_CONFIG` of sysexits.
const CONFIGURATION: u8 = 78;

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        if let Some((_, message)) = problems.lines().find(|(key, _)| key == "--destination") {
            return Self::Input(message.to_owned());
        }
        Self::Configuration(format!(
            "{problems}\nhint: deploy/docs/settings.md lists every setting; `close-sync check` tests a change"
        ))
    }
}

impl From<BrokerError> for Failure {
    fn from(error: BrokerError) -> Self {
        match error {
            BrokerError::Conflict { .. }
            | BrokerError::TooOld(_)
            | BrokerError::Incomplete(_)
            | BrokerError::MayNotDeclare(_) => Self::Configuration(error.to_string()),
            BrokerError::Unreachable(_) => Self::Unavailable(format!(
                "{error}
hint: start it, or set `amqp.url` (AMQP_URL) to another"
            )),
            BrokerError::Refused(_)
            | BrokerError::Tls(_)
            | BrokerError::Missing(_)
            | BrokerError::Forbidden(_)
            | BrokerError::Lost(_)
            | BrokerError::StoodStill(_)
            | BrokerError::Cancelled
            | BrokerError::TooLarge(_)
            | BrokerError::Busy(_)
            | BrokerError::Unroutable { .. }
            | BrokerError::Unconfirmed(_) => Self::Unavailable(error.to_string()),
        }
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Configuration(message) => Self::Configuration(message),
            RunError::Unavailable(error) => Self::Unavailable(format!("{error:#}")),
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            anstream::eprintln!("error: no threads can be started: {error}");
            return ExitCode::from(UNAVAILABLE);
        }
    };
    let (message, code) = match runtime.block_on(cli.run()) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Told(code)) => return ExitCode::from(code),
        Err(Failure::Input(message)) => (message, INPUT),
        Err(Failure::Unavailable(message)) => (message, UNAVAILABLE),
        Err(Failure::Configuration(message)) => (message, CONFIGURATION),
    };
    let red = anstyle::AnsiColor::Red.on_default().bold();
    anstream::eprintln!("{red}error:{red:#} {message}");
    ExitCode::from(code)
}

impl Cli {
    async fn run(self) -> Result<(), Failure> {
        let Self { config, destination, command } = self;
        let layers =
            move || Layers::load(config.as_deref(), &config::environment())?.only(destination.as_deref());
        match command {
            Command::Run => {
                run(layers()?.read(Need::All)?, Box::new(move || layers()?.read(Need::All))).await
            }
            Command::Check(args) => {
                let config = layers().and_then(|layers| layers.read(args.need()));
                check::check(&args, config).await
            }
            Command::Plan(args) => plan::plan(args, single(layers()?.read(Need::All)?)?).await,
            #[cfg(feature = "simulator")]
            Command::Test(args) => test::test(args, layers()?).await,
            Command::Publish(args) => {
                publish::publish(args, shared(layers()?.read(Need::Broker)?)?.amqp).await
            }
            Command::Dlq(command) => {
                let destination = single(layers()?.read(Need::Broker)?)?;
                dlq::dlq(*command, destination, || layers()?.read(Need::All)).await
            }
            #[cfg(feature = "simulator")]
            Command::Simulate(args) => simulate::simulate(args).await,
            Command::Healthcheck => {
                let addr = layers()?.read(Need::Broker)?.http_addr;
                http::probe(addr).await.map_err(|error| {
                    Failure::Unavailable(format!("no worker answers at {addr} (`http.addr`): {error:#}"))
                })
            }
        }
    }
}

fn single(config: Config) -> Result<Destination, Failure> {
    config.single().map_err(|names| {
        Failure::Input(format!(
            "several destinations are configured; select one with `--destination`{}",
            choices("configured", &names)
        ))
    })
}

/// The only destination, or one of several for which events are published alike.
fn shared(mut config: Config) -> Result<Destination, Failure> {
    let alike = config.destinations.windows(2).all(|pair| {
        let [one, other] = pair else { return true };
        one.amqp.exchange == other.amqp.exchange && one.amqp.nodes == other.amqp.nodes
    });
    if alike {
        config.destinations.truncate(1);
    }
    single(config)
}

/// How long the last traces may take.
const LAST_TRACES: Duration = Duration::from_secs(3);

/// The worker, from the first log line to the last.
async fn run(
    config: Config,
    load: Box<dyn Fn() -> Result<Config, Problems> + Send + Sync>,
) -> Result<(), Failure> {
    let traces = listen(config.log_format, config.traces.clone())?;
    panic_hook::install_hook();
    tracing::info!(version = VERSION, "close-sync starts");
    let orders = Control { shutdown: shutdown_signal()?, reload: reload_signal()?, load };
    let grace = config.destinations.iter().map(|destination| destination.grace).max().unwrap_or_default();
    let ended = supervisor::run(config, orders).await;
    if let Some(traces) = traces {
        traces.finish(LAST_TRACES.min(grace)).await;
    }
    let report = ended?;
    tracing::info!(settled = report.settled, handed_back = report.handed_back, "close-sync ends");
    Ok(())
}

/// Starts logging, and tracing if that is wanted.
fn listen(format: LogFormat, traces: otel::Settings) -> Result<Option<Traces>, Failure> {
    let traces =
        Traces::start(traces).map_err(|error| Failure::Configuration(format!("no traces: {error:#}")))?;
    let (traces, layer) = traces.unzip();
    tracing_subscriber::registry().with(layer).with(log(format)).init();
    Ok(traces)
}

/// What writes log lines.
fn log<S: Subscriber + for<'a> LookupSpan<'a>>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync> {
    // lapin reports losses we report ourselves, once.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,lapin=off"));
    let audits = filter_fn(|metadata| metadata.target() == AUDIT).with_max_level_hint(LevelFilter::INFO);
    let not_traces = filter_fn(|metadata| metadata.target() != otel::SPANS)
        // It has none of its own, and would take that of the other filter away.
        .with_max_level_hint(LevelFilter::TRACE);
    let filter = filter.or(audits).and(not_traces);
    let builder = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let terminal = std::io::stderr().is_terminal();
    let json = match format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    if json {
        let json = builder.json().flatten_event(true).with_current_span(true).with_span_list(false);
        json.with_filter(filter).boxed()
    } else {
        builder.with_ansi(terminal).with_target(false).with_filter(filter).boxed()
    }
}

/// Every SIGHUP asks for the configuration to be read again.
fn reload_signal() -> Result<BoxStream<'static, ()>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let signal = signal(SignalKind::hangup())
        .map_err(|error| Failure::Unavailable(format!("no signal handler: {error}")))?;
    let next =
        |mut signal: tokio::signal::unix::Signal| async move { signal.recv().await.map(|()| ((), signal)) };
    Ok(stream::unfold(signal, next).boxed())
}

/// The first SIGTERM or SIGINT asks for a graceful stop, a second one ends the process at once: what
/// is in hand then comes again.
fn shutdown_signal() -> Result<CancellationToken, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen =
        |kind| signal(kind).map_err(|error| Failure::Unavailable(format!("no signal handler: {error}")));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let asked = shutdown.clone();
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if asked.is_cancelled() {
                tracing::warn!(signal = name, "stopping at once; messages in hand will be delivered again");
                std::process::exit(i32::from(UNAVAILABLE));
            }
            tracing::info!(signal = name, "asked to stop; a second signal stops at once");
            asked.cancel();
        }
    });
    Ok(shutdown)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
