//! The command line: arguments, output and exit codes.
//!
//! Data goes to standard output, everything else to standard error, so that a script can pipe the data. `failure` has
//! the exit codes.

mod certify;
mod check;
mod dlq;
mod exposure;
mod failure;
mod input;
mod logging;
mod plan;
mod publish;
mod run;
mod signals;
#[cfg(feature = "simulator")]
mod simulate;
#[cfg(feature = "simulator")]
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::cli::failure::{Failure, UNAVAILABLE};
use crate::config::{self, Config, Destination, Layers, Need};
use crate::text::{block, choices};
use crate::{VERSION, http};

/// The end of the long help. `$checks` are the commands that exit with 1, `$more` further paragraphs.
macro_rules! after_help {
    ($checks:literal, $more:literal) => {
        concat!(
            "Settings come from a TOML file and the environment. `close-sync check` reports what is missing. \
             `close-sync check --print-config` prints the effective settings.\n\n",
            $more,
            "Exit codes:\n  \
               0   done\n  \
               1   a check failed (",
            $checks,
            ")\n  \
               2   wrong usage or input\n  \
               69  something required is unavailable (RabbitMQ, Close, a free port), or a second signal stopped the \
                   program\n  \
               78  configuration error"
        )
    };
}

#[cfg(feature = "simulator")]
const AFTER_HELP: &str = after_help!(
    "certify, plan --strict, test, dlq replay, dlq export",
    "To try it without a Close account, run `close-sync simulate`. It starts a simulated Close and prints how to use \
     it.\n\n"
);
#[cfg(not(feature = "simulator"))]
const AFTER_HELP: &str = after_help!("certify, plan --strict, dlq replay, dlq export", "");

/// Sync identify events from RabbitMQ to the Close CRM.
#[derive(Parser)]
#[command(name = "close-sync", version = VERSION, propagate_version = true, max_term_width = 100)]
#[command(after_long_help = AFTER_HELP)]
struct Cli {
    /// Read settings from a TOML file. It needs only the settings that differ from the defaults.
    #[arg(long, short, global = true, value_name = "FILE", env = "CLOSE_SYNC_CONFIG")]
    config: Option<PathBuf>,

    /// Select one of several configured destinations. Default: `run` and `check` use all of them.
    #[arg(long, global = true, value_name = "NAME")]
    destination: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Consume events and sync them to Close until SIGTERM or SIGINT.
    ///
    /// SIGHUP reloads the configuration. A second SIGTERM or SIGINT stops at once and loses no message.
    Run,
    Check(check::Args),
    Certify(certify::Args),
    Plan(plan::Args),
    #[cfg(feature = "simulator")]
    Test(test::Args),
    Publish(publish::Args),
    #[command(subcommand)]
    Dlq(Box<dlq::Command>),
    #[cfg(feature = "simulator")]
    Simulate(simulate::Args),
    /// Check that the worker at `http.addr` is alive, for container health checks.
    Healthcheck,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            anstream::eprintln!("error: cannot start threads: {error}");
            return ExitCode::from(UNAVAILABLE);
        }
    };
    let Err(failure) = runtime.block_on(cli.execute()) else { return ExitCode::SUCCESS };
    if let Some(message) = failure.message() {
        let red = anstyle::AnsiColor::Red.on_default().bold();
        anstream::eprintln!("{red}error:{red:#} {}", block(message));
    }
    ExitCode::from(failure.exit_code())
}

impl Cli {
    async fn execute(self) -> Result<(), Failure> {
        let Self { config, destination, command } = self;
        let layers =
            move || Layers::load(config.as_deref(), &config::environment())?.only(destination.as_deref());
        match command {
            Command::Run => {
                run::run(layers()?.read(Need::All)?, Box::new(move || layers()?.read(Need::All))).await
            }
            Command::Check(args) => {
                let config = layers().and_then(|layers| layers.read(args.need()));
                check::check(&args, config).await
            }
            Command::Certify(args) => {
                let destination = single(layers()?.read(Need::All)?)?;
                Box::pin(certify::certify(args, destination)).await
            }
            Command::Plan(args) => plan::plan(args, single(layers()?.read(Need::All)?)?).await,
            #[cfg(feature = "simulator")]
            Command::Test(args) => test::test(args, layers()?).await,
            Command::Publish(args) => {
                publish::publish(args, shared(layers()?.read(Need::Broker)?)?.amqp).await
            }
            Command::Dlq(command) => {
                let destination = single(layers()?.read(Need::Broker)?)?;
                Box::pin(dlq::dlq(*command, destination, || single(layers()?.read(Need::All)?))).await
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

/// The only destination, or any of several that all consume from the same exchange.
fn shared(mut config: Config) -> Result<Destination, Failure> {
    let is_same_exchange = config.destinations.windows(2).all(|pair| {
        let [one, other] = pair else { return true };
        one.amqp.exchange == other.amqp.exchange && one.amqp.nodes == other.amqp.nodes
    });
    if is_same_exchange {
        config.destinations.truncate(1);
    }
    single(config)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_mentions_the_simulator_only_if_it_is_built_in() {
        let help = Cli::command().render_long_help().to_string();
        let has_simulator = cfg!(feature = "simulator");
        for word in ["simulate", " test"] {
            assert_eq!(help.contains(word), has_simulator, "{word}: {help}");
        }
    }
}
