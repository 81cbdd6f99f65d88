//! What operators and orchestrators ask over HTTP: `/metrics`, `/healthz`, `/readyz`.
//!
//! `/healthz` says only that the event loop turns: a worker that waits for a broker or for Close is
//! alive, and restarting it would help nobody. `/readyz` tells what it is doing and why.

use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::board::Board;

/// Serves until `shutdown`.
///
/// # Errors
/// When serving fails; binding is the caller's, so that it can tell where.
pub async fn serve(listener: TcpListener, board: Board, shutdown: CancellationToken) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(board);
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

async fn page(Shared(board): Shared<Board>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], board.page())
}

async fn ready(Shared(board): Shared<Board>) -> impl IntoResponse {
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
    let ip = if addr.ip().is_unspecified() { std::net::Ipv4Addr::LOCALHOST.into() } else { addr.ip() };
    let url = format!("http://{}/healthz", SocketAddr::new(ip, addr.port()));
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(3)).build()?;
    client.get(&url).send().await?.error_for_status()?;
    Ok(())
}
