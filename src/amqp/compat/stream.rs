//! The stream between lapin and the broker, inside TLS.
//!
//! It records the server properties (`server_properties.rs`), sanitizes frames that lapin cannot parse
//! (`frame_sanitizer`), and can be aborted. lapin writes nothing while the broker has an alarm, so a connection that
//! is being closed stays open, with its thread (rabbitmq.md §0, 10).
//!
//! Delete this file together with the other two, once lapin can also abort a connection that is blocked.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::Stream;
use futures_util::io::{AsyncRead, AsyncWrite};
use lapin::tcp::{AMQPUriTcpExt, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{AsyncTcpStream, Connection, ConnectionProperties};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::amqp::compat::frame_sanitizer::FrameSanitizer;
use crate::amqp::compat::server_properties::FirstFrame;
use crate::amqp::connection::OpenConnection;

/// Opens a connection as [`Connection::connect_with_config`] does, and returns the server properties with it.
pub(crate) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
    tls: OwnedTLSConfig,
) -> lapin::Result<OpenConnection> {
    let tokio = Tokio::current();
    let runtime = Runtime::new(RuntimeParts::new(tokio.clone(), SanitizingReactor(tokio.clone())));
    let first_frame = FirstFrame::default();
    let abort = CancellationToken::new();
    let (recorder, aborted) = (first_frame.clone(), abort.clone());
    let open = async move |uri: AMQPUri, _| {
        let frame_max = uri.query.frame_max.unwrap_or_default();
        let stream = uri.connect_with_config_async(tls.as_ref(), &Runtime::new(tokio.clone())).await?;
        Ok(AsyncTcpStream::Plain(SanitizingStream::new(stream, frame_max, recorder.clone(), aborted.clone())))
    };
    let connection = Connection::connector(uri, runtime, open, properties).await?;
    Ok(OpenConnection { connection, server: first_frame.server(), abort })
}

struct SanitizingStream<S> {
    stream: S,
    first_frame: FirstFrame,
    sanitizer: FrameSanitizer,
    aborted: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> SanitizingStream<S> {
    fn new(stream: S, frame_max: u32, first_frame: FirstFrame, abort: CancellationToken) -> Self {
        let aborted = Box::pin(abort.cancelled_owned());
        Self { stream, first_frame, sanitizer: FrameSanitizer::new(frame_max), aborted }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for SanitizingStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, first_frame, sanitizer, aborted } = self.get_mut();
        // lapin keeps reading while it writes nothing, so the abort takes effect here.
        if aborted.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let read = ready!(sanitizer.poll_read(stream, cx, buffer))?;
        first_frame.record(buffer.get(..read).unwrap_or_default());
        Poll::Ready(Ok(read))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for SanitizingStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

/// Tokio with [`SanitizingStream`]: lapin takes the type of its stream from the runtime.
#[derive(Clone, Debug)]
struct SanitizingReactor(Tokio);

impl Reactor for SanitizingReactor {
    type TcpStream = SanitizingStream<AsyncTcpStream<<Tokio as Reactor>::TcpStream>>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// Only for sockets created elsewhere, which lapin does not have.
    fn register<H: Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Self::TcpStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async {
            let stream = AsyncTcpStream::Plain(connecting.await?);
            Ok(SanitizingStream::new(stream, 0, FirstFrame::default(), CancellationToken::new()))
        }
    }
}
