//! What operators and orchestrators ask over HTTP: `/metrics`, `/healthz`, `/readyz`, and the operator's page
//! ([`crate::http::admin`]) where it is enabled.
//!
//! `/healthz` says only that the event loop turns: a worker that waits for a broker or for Close is
//! alive, and restarting it would help nobody. `/readyz` tells what it is doing and why.

pub mod admin;
pub mod registry;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{ConnectInfo, State as Shared};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::Listener;
use axum::{Extension, Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_http::timeout::TimeoutLayer;

use crate::http::registry::Registry;

/// The longest a request's header may take to come, and a connection may be idle.
const HEADER_TIME: Duration = Duration::from_secs(30);
/// What a request's header may take up.
const HEADER_BYTES: usize = 64 << 10;
/// The longest a request may take, its body included.
const REQUEST_TIME: Duration = Duration::from_mins(1);
/// The longest a connection may last: one that only takes up room, by reading nothing of its answer say, is not
/// kept for ever.
const CONNECTION_TIME: Duration = Duration::from_mins(10);
/// More connections at the same time are closed at once: the worker needs file descriptors of its own.
const MOST_CONNECTIONS: usize = 256;
/// The same of one peer: there is room left for whoever asks whether the worker is alive.
const MOST_OF_ONE: usize = 128;

/// Serves until `shutdown`, with the operator's page if it is given.
pub async fn serve(
    mut listener: TcpListener,
    board: Registry,
    page: Option<admin::Settings>,
    shutdown: CancellationToken,
) {
    let addr = listener.local_addr().unwrap_or_else(|_| (Ipv4Addr::LOCALHOST, 0).into());
    let jobs = TaskTracker::new();
    let pages = page
        .map(|settings| {
            tracing::info!("the operator's page is at http://{addr}{}", admin::HOME);
            admin::router(settings, board.clone(), addr.ip(), shutdown.clone(), jobs.clone())
        })
        .unwrap_or_default();
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(board)
        .merge(pages)
        .layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, REQUEST_TIME));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME).max_buf_size(HEADER_BYTES);
    let connections = GracefulShutdown::new();
    // axum's own loop has no time limits, but its listener knows how to go on after an error.
    let mut peers: HashMap<IpAddr, Arc<()>> = HashMap::new();
    while let Some((stream, peer)) = shutdown.run_until_cancelled(Listener::accept(&mut listener)).await {
        peers.retain(|_, open| Arc::strong_count(open) > 1);
        let open = Arc::clone(peers.entry(peer.ip()).or_default());
        // Counted are the one kept here and this one, too.
        if connections.count() >= MOST_CONNECTIONS || Arc::strong_count(&open) - 2 >= MOST_OF_ONE {
            continue;
        }
        let service = TowerToHyperService::new(router.clone().layer(Extension(ConnectInfo(peer))));
        let served = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            let _ = tokio::time::timeout(CONNECTION_TIME, served).await;
            drop(open);
        });
    }
    jobs.close();
    tokio::join!(connections.shutdown(), jobs.wait());
}

async fn metrics(Shared(board): Shared<Registry>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], board.metrics_page())
}

async fn ready(Shared(board): Shared<Registry>) -> impl IntoResponse {
    let answer = board.readiness();
    let code = if answer.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(answer))
}

/// Asks a running worker whether it is alive, for container health checks.
///
/// # Errors
/// What is wrong, for people.
pub async fn probe(addr: SocketAddr) -> anyhow::Result<()> {
    // A worker bound to all addresses is asked over loopback.
    let ip = if addr.ip().is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { addr.ip() };
    let url = format!("http://{}/healthz", SocketAddr::new(ip, addr.port()));
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(3)).build()?;
    client.get(&url).send().await?.error_for_status()?;
    Ok(())
}
