//! `close-sync simulate`: a fake Close to try things with.

use std::net::SocketAddr;

use crate::cli::Failure;
use close_sync_simulator::{Lag, Limits, Settings, Simulator};

/// Serve a fake Close, for first steps and tests.
///
/// It keeps leads and contacts in memory, obeys Close's rate limits, and lets search lag behind writes
/// as Close does. Faults are scripted over HTTP; what it prints after the start shows how. It ends on
/// SIGINT or SIGTERM, and what it held is gone.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8484")]
    addr: SocketAddr,
    /// How long a write stays invisible to search: `2s`, or `1s..10s` for a range.
    #[arg(long, default_value = "2s")]
    search_lag: Lag,
    /// Grant every request, whatever Close's rate limits are.
    #[arg(long)]
    unlimited: bool,
    /// The API key that is let in.
    #[arg(long, default_value = "api_simulator.key")]
    api_key: String,
}

pub(super) async fn simulate(args: Args) -> Result<(), Failure> {
    let settings = Settings {
        api_key: args.api_key,
        search_lag: args.search_lag,
        limits: if args.unlimited { Limits::unlimited() } else { Limits::documented() },
        ..Settings::default()
    };
    let simulator = Simulator::start(settings, args.addr).await.map_err(|error| {
        Failure::Unavailable(format!(
            "cannot listen on {}: {error}\nhint: choose another with --addr",
            args.addr
        ))
    })?;
    anstream::println!("{}", simulator.usage());
    crate::cli::shutdown_signal()?.cancelled().await;
    simulator.stop().await;
    Ok(())
}
