//! What signals do: SIGTERM and SIGINT shut down, SIGHUP reloads, or shuts down a command that works for a terminal.

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::failure::{Failure, UNAVAILABLE};

/// Cancelled by the first SIGTERM or SIGINT. A second one exits at once; RabbitMQ then redelivers the messages in
/// progress.
pub(super) fn shutdown() -> Result<CancellationToken, Failure> {
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let requested = shutdown.clone();
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if requested.is_cancelled() {
                tracing::warn!(
                    signal = name,
                    "stopping at once; RabbitMQ will redeliver the messages in progress"
                );
                std::process::exit(i32::from(UNAVAILABLE));
            }
            tracing::info!(signal = name, "shutting down; a second signal stops at once");
            requested.cancel();
        }
    });
    Ok(shutdown)
}

/// Cancelled by the first SIGTERM, SIGINT or SIGHUP, after `notify`. A second one exits at once. Other commands reload on
/// a SIGHUP; here it means that the terminal was closed.
pub(super) fn interrupt(notify: impl Fn() + Send + 'static) -> Result<CancellationToken, Failure> {
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let mut hangup = listen(SignalKind::hangup())?;
    let interrupted = CancellationToken::new();
    let requested = interrupted.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
            if requested.is_cancelled() {
                std::process::exit(i32::from(UNAVAILABLE));
            }
            notify();
            requested.cancel();
        }
    });
    Ok(interrupted)
}

/// One item for each SIGHUP.
pub(super) fn reload() -> Result<BoxStream<'static, ()>, Failure> {
    let next = |mut signal: Signal| async move { signal.recv().await.map(|()| ((), signal)) };
    Ok(stream::unfold(listen(SignalKind::hangup())?, next).boxed())
}

fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::Unavailable(format!("cannot install a signal handler: {error}")))
}
