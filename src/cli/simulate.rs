//! `close-sync simulate`.

use std::net::SocketAddr;
use std::path::PathBuf;

use comfy_table::{ContentArrangement, Table, presets};
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
    /// Set a behaviour of Close, for example `--set event_lag=30s`. Repeatable. `--set help` lists all.
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
    let mut settings = Settings {
        api_key: args.api_key,
        limits: if args.unlimited { Limits::unlimited() } else { Limits::documented() },
        ..Settings::default()
    };
    if let Some(file) = &args.like {
        let name = line(&file.display().to_string());
        let wrong = |why: &str| Failure::Input(format!("--like {name}: {}", line(why)));
        let report: Report =
            serde_json::from_slice(&read(file).await?).map_err(|error| wrong(&error.to_string()))?;
        behaviour.change(report.behaviour).map_err(|why| wrong(&why))?;
        // The simulated organization has other custom fields than the one of the report.
        settings.behaviour = behaviour;
        for unknown in settings.unknown_names() {
            anstream::eprintln!(
                "--like: the simulated organization does not have `{}` of {}; ignoring it",
                line(&unknown.name),
                unknown.setting
            );
            settings.behaviour.forget(&unknown);
        }
        behaviour = settings.behaviour.clone();
    }
    if let Some(lag) = args.search_lag {
        behaviour.search_lag = lag;
    }
    if args.set.iter().any(|setting| setting == "help") {
        anstream::println!("{}", help(&behaviour));
        return Ok(());
    }
    for setting in &args.set {
        let wrong = |why: &str| Failure::Input(format!("--set {}: {}", line(setting), line(why)));
        let (key, value) = setting.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE"))?;
        behaviour.set(key.trim(), value.trim()).map_err(|why| wrong(&why))?;
    }
    settings.behaviour = behaviour;
    if let Some(unknown) = settings.unknown_names().first() {
        return Err(Failure::Input(format!("--set {}", line(&unknown.to_string()))));
    }
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

/// Every behaviour with its meaning, its values, and the one it has.
fn help(behaviour: &Behaviour) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(HELP_WIDTH);
    table.set_header(["KEY", "meaning", "values", "now"]);
    let values = behaviour.fields();
    for knob in Behaviour::knobs() {
        let value = values.get(knob.name).map_or_else(String::new, |value| {
            value.as_str().map_or_else(|| value.to_string(), str::to_owned)
        });
        table.add_row([knob.name, &knob.meaning, &knob.forms, &value]);
    }
    table
}

/// The width of the table, in characters.
const HELP_WIDTH: u16 = 100;
