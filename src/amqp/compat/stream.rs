//! The stream that lapin reads and writes: behind TLS, and between lapin and the broker.
//!
//! What the broker says of itself is overheard here (`greeting.rs`), and what lapin would not survive is altered
//! (`frames.rs`). And it can be cut: lapin writes nothing to a broker that raised an alarm, so that a connection it
//! is to close in order then stays open, with its thread (rabbitmq.md §0, 10).

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

use crate::amqp::compat::frame_sanitizer::Frames;
use crate::amqp::compat::server_properties::Heard;
use crate::amqp::connection::OpenConnection;

/// Opens a connection as [`Connection::connect_with_config`] does, and tells who answered.
pub(crate) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
    tls: OwnedTLSConfig,
) -> lapin::Result<OpenConnection> {
    let tokio = Tokio::current();
    let runtime = Runtime::new(RuntimeParts::new(tokio.clone(), Wired(tokio.clone())));
    let heard = Heard::default();
    let cut = CancellationToken::new();
    let (ear, scissors) = (heard.clone(), cut.clone());
    let open = async move |uri: AMQPUri, _| {
        let stream = uri.connect_with_config_async(tls.as_ref(), &Runtime::new(tokio.clone())).await?;
        Ok(AsyncTcpStream::Plain(Wire::new(stream, ear.clone(), scissors.clone())))
    };
    let connection = Connection::connector(uri, runtime, open, properties).await?;
    Ok(OpenConnection { connection, server: heard.broker(), abort: cut })
}

/// The stream, on its way to lapin.
struct Wire<S> {
    stream: S,
    heard: Heard,
    frames: Frames,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Wire<S> {
    fn new(stream: S, heard: Heard, cut: CancellationToken) -> Self {
        Self { stream, heard, frames: Frames::default(), cut: Box::pin(cut.cancelled_owned()) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, heard, frames, cut } = self.get_mut();
        // lapin reads as long as a connection lives, also while it writes nothing.
        if cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let read = ready!(frames.poll_read(stream, cx, buffer))?;
        heard.note(buffer.get(..read).unwrap_or_default());
        Poll::Ready(Ok(read))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
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

/// Tokio, with such streams: lapin takes the type of its stream from the runtime.
#[derive(Clone, Debug)]
struct Wired(Tokio);

impl Reactor for Wired {
    type TcpStream = Wire<AsyncTcpStream<<Tokio as Reactor>::TcpStream>>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// For sockets made by others: lapin has none.
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
            Ok(Wire::new(stream, Heard::default(), CancellationToken::new()))
        }
    }
}
