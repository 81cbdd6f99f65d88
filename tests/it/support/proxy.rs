//! A TCP proxy to the broker that can cut connections or stop forwarding.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A trap for bytes that clients send.
enum Trap {
    Off,
    Set(Vec<u8>),
    /// The bytes came. They are held, with everything their connection sends after them.
    Sprung,
}

/// Forwards TCP connections to a broker. Closes all of them when dropped.
pub(crate) struct Proxy {
    /// The URL of the broker through this proxy.
    pub(crate) url: String,
    connections: Arc<Mutex<Vec<CancellationToken>>>,
    mute: watch::Sender<bool>,
    trap: watch::Sender<Trap>,
    _stop: DropGuard,
}

impl Proxy {
    pub(crate) async fn start(amqp_url: &str) -> Self {
        let mut url = url::Url::parse(amqp_url).unwrap();
        let broker = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5672));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = listener.local_addr().unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(here.port())).unwrap();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let stop = CancellationToken::new();
        let open = Arc::clone(&connections);
        let mute = watch::Sender::new(false);
        let muted = mute.subscribe();
        let trap = watch::Sender::new(Trap::Off);
        let traps = trap.clone();
        let accept = async move |stop: CancellationToken| {
            while let Ok((client, _)) = listener.accept().await {
                let cut = stop.child_token();
                open.lock().unwrap().push(cut.clone());
                tokio::spawn(pass(client, broker.clone(), muted.clone(), traps.clone(), cut));
            }
        };
        let until = stop.clone();
        tokio::spawn(async move { until.run_until_cancelled(accept(until.clone())).await });
        Self { url: url.to_string(), connections, mute, trap, _stop: stop.drop_guard() }
    }

    /// Stops or resumes forwarding. Connections stay open, and no data is lost.
    pub(crate) fn mute(&self, mute: bool) {
        self.mute.send_replace(mute);
    }

    /// Holds these bytes the next time a client sends them.
    pub(crate) fn set_trap(&self, bytes: &[u8]) {
        self.trap.send_replace(Trap::Set(bytes.to_vec()));
    }

    /// Waits until the bytes of the trap came.
    pub(crate) async fn sprung(&self) {
        let mut trap = self.trap.subscribe();
        let sprung = trap.wait_for(|trap| matches!(trap, Trap::Sprung));
        assert!(
            tokio::time::timeout(super::TIMEOUT, sprung).await.is_ok(),
            "the bytes of the trap never came"
        );
    }

    /// Forwards the held bytes.
    pub(crate) fn release(&self) {
        self.trap.send_replace(Trap::Off);
    }

    /// Cuts the newest connection.
    pub(crate) fn cut_last(&self) {
        self.connections.lock().unwrap().pop().unwrap().cancel();
    }

    /// Cuts all connections.
    pub(crate) fn cut(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            connection.cancel();
        }
    }

    /// Cuts one of the open connections, selected by a random number.
    pub(crate) fn cut_one(&self, number: usize) {
        let mut connections = self.connections.lock().unwrap();
        connections.retain(|connection| !connection.is_cancelled());
        if !connections.is_empty() {
            let one = number % connections.len();
            connections.swap_remove(one).cancel();
        }
    }
}

/// Forwards one connection until either side closes it or it is cut.
async fn pass(
    client: TcpStream,
    broker: String,
    muted: watch::Receiver<bool>,
    trap: watch::Sender<Trap>,
    cut: CancellationToken,
) {
    if let Ok(broker) = TcpStream::connect(broker).await {
        let ((from_client, to_client), (from_broker, to_broker)) = (client.into_split(), broker.into_split());
        let both = async {
            tokio::select! {
                () = copy(from_client, to_broker, muted.clone(), Some(trap)) => {}
                () = copy(from_broker, to_client, muted, None) => {}
            }
        };
        let _ = cut.run_until_cancelled(both).await;
    }
    cut.cancel();
}

/// Copies bytes in one direction, and waits while the proxy is muted.
async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut muted: watch::Receiver<bool>,
    trap: Option<watch::Sender<Trap>>,
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if let Some(trap) = &trap {
            hold(&buffer[..read], trap).await;
        }
        if muted.wait_for(|mute| !mute).await.is_err() || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

/// Waits while the bytes are held by the trap.
async fn hold(bytes: &[u8], trap: &watch::Sender<Trap>) {
    let springs = trap.send_if_modified(|trap| {
        let springs =
            matches!(&*trap, Trap::Set(wanted) if bytes.windows(wanted.len()).any(|part| part == wanted));
        if springs {
            *trap = Trap::Sprung;
        }
        springs
    });
    if springs {
        let _ = trap.subscribe().wait_for(|trap| !matches!(trap, Trap::Sprung)).await;
    }
}
