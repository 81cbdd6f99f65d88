//! The HTTP server: `/metrics`, `/healthz`, `/readyz`, and the operator's page ([`crate::http::admin`]) if enabled.
//!
//! `/healthz` only says that the event loop runs. A worker that waits for the broker or for Close is alive, and a restart
//! would not help. `/readyz` says what each destination is doing and why.

pub mod admin;
mod connections;
pub mod registry;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{ConnectInfo, Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
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

use crate::http::connections::{Connection, Connections};
use crate::http::registry::Registry;

/// The time-out for the header of a request, and for idle connections.
const HEADER_TIME: Duration = Duration::from_secs(30);
/// The size limit for the header of a request.
const HEADER_BYTES: usize = 64 << 10;
/// The time-out for a request, its body included.
const REQUEST_TIME: Duration = Duration::from_mins(1);
/// The time-out for a connection, such as one whose client never reads the response.
const CONNECTION_TIME: Duration = Duration::from_mins(10);

/// Serves until `shutdown`, with the operator's page if it is configured.
pub async fn serve(
    mut listener: TcpListener,
    registry: Registry,
    page: Option<admin::Settings>,
    shutdown: CancellationToken,
) {
    let addr = listener.local_addr().unwrap_or_else(|_| (Ipv4Addr::LOCALHOST, 0).into());
    let jobs = TaskTracker::new();
    let pages = page
        .map(|settings| {
            tracing::info!("operator's page enabled at http://{addr}{}", admin::HOME);
            admin::router(settings, registry.clone(), addr.ip(), shutdown.clone(), jobs.clone())
        })
        .unwrap_or_default();
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(registry)
        .merge(pages)
        .layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, REQUEST_TIME));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME).max_buf_size(HEADER_BYTES);
    let graceful = GracefulShutdown::new();
    let connections: Arc<Mutex<Connections>> = Arc::default();
    // axum's own loop has no time-outs, but its listener recovers after an error.
    while let Some((stream, peer)) = shutdown.run_until_cancelled(Listener::accept(&mut listener)).await {
        let connection = lock(&connections).add(admin::network(peer.ip()), Instant::now());
        let router = router
            .clone()
            .layer(Extension(ConnectInfo(peer)))
            .layer(axum::middleware::from_fn_with_state(connection.clone(), track));
        let served =
            graceful.watch(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
        let connections = Arc::clone(&connections);
        tokio::spawn(async move {
            let in_time = tokio::time::timeout(CONNECTION_TIME, served);
            let _ = connection.closed.run_until_cancelled(in_time).await;
            lock(&connections).remove(&connection);
        });
    }
    jobs.close();
    tokio::join!(graceful.shutdown(), jobs.wait());
}

fn lock(connections: &Mutex<Connections>) -> MutexGuard<'_, Connections> {
    connections.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes whether the connection has a request under way.
async fn track(Shared(connection): Shared<Connection>, request: Request, next: Next) -> Response {
    connection.begin();
    let response = next.run(request).await;
    connection.end(Instant::now());
    response
}

async fn metrics(Shared(registry): Shared<Registry>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], registry.metrics_page())
}

async fn ready(Shared(registry): Shared<Registry>) -> impl IntoResponse {
    let answer = registry.readiness();
    let code = if answer.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(answer))
}

/// Checks that a running worker is alive, for container health checks.
///
/// # Errors
/// What is wrong, for the operator.
pub async fn probe(addr: SocketAddr) -> anyhow::Result<()> {
    // A worker bound to all addresses is reachable over loopback.
    let ip = if addr.ip().is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { addr.ip() };
    let url = format!("http://{}/healthz", SocketAddr::new(ip, addr.port()));
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(3)).build()?;
    client.get(&url).send().await?.error_for_status()?;
    Ok(())
}
