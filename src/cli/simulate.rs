//! `close-sync simulate`.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::cli::failure::Failure;
use crate::cli::input::read;
use crate::cli::signals;
use crate::text::line;
use close_sync_simulator::{Behaviour, Lag, Limits, Settings, Simulator};

/// Start a simulated Close, for first steps and tests.
///
/// It keeps Leads and Contacts in memory, enforces Close's rate limits, and lets search lag behind writes as Close
/// does. Its output at the start shows how to inject faults over HTTP. SIGINT or SIGTERM stops it and discards the
/// records.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Listen on this address. Port 0 selects a free port.
    #[arg(long, default_value = "127.0.0.1:8484")]
    addr: SocketAddr,
    /// Set how long search lags behind writes: `2s`, or `1s..10s` for a range. Default: 2s.
    #[arg(long)]
    search_lag: Option<Lag>,
    /// Set a behaviour of Close, for example `--set event_lag=30s`. Repeatable. `--set help` lists all with their values.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Behave like the organization of this report of `certify --json`. `--set` can change it.
    #[arg(long, value_name = "FILE")]
    like: Option<PathBuf>,
    /// Disable rate limits. By default, Close's documented limits apply.
    #[arg(long)]
    unlimited: bool,
    /// Accept this API key.
    #[arg(long, default_value = "api_simulator.key")]
    api_key: String,
}

/// The part of a report of `certify` that describes the organization.
#[derive(Deserialize)]
struct Report {
    behaviour: Map<String, Value>,
}

pub(super) async fn simulate(args: Args) -> Result<(), Failure> {
    let mut behaviour = Behaviour::default();
    if let Some(file) = &args.like {
        let name = line(&file.display().to_string());
        let wrong = |why: &str| Failure::Input(format!("--like {name}: {}", line(why)));
        let report: Report =
            serde_json::from_slice(&read(file).await?).map_err(|error| wrong(&error.to_string()))?;
        behaviour.change(report.behaviour).map_err(|why| wrong(&why))?;
    }
    if let Some(lag) = args.search_lag {
        behaviour.search_lag = lag;
    }
    if args.set.iter().any(|setting| setting == "help") {
        for (key, value) in behaviour.fields() {
            anstream::println!("{key}={value}");
        }
        return Ok(());
    }
    for setting in &args.set {
        let wrong = |why: &str| Failure::Input(format!("--set {}: {}", line(setting), line(why)));
        let (key, value) = setting.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE"))?;
        behaviour.set(key.trim(), value.trim()).map_err(|why| wrong(&why))?;
    }
    let settings = Settings {
        api_key: args.api_key,
        limits: if args.unlimited { Limits::unlimited() } else { Limits::documented() },
        behaviour,
        ..Settings::default()
    };
    let simulator = Simulator::start(settings, args.addr).await.map_err(|error| {
        Failure::Unavailable(format!(
            "cannot listen on {}: {error}\nhint: choose another address with --addr",
            args.addr
        ))
    })?;
    anstream::println!("{}", simulator.usage());
    signals::shutdown()?.cancelled().await;
    simulator.stop().await;
    Ok(())
}
