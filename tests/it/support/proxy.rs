//! A way to the broker that can be cut.

use std::sync::{Arc, Mutex};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Passes TCP connections on to a broker. Ends with all of them when dropped.
pub(crate) struct Proxy {
    /// The broker's URL, by this way.
    pub(crate) url: String,
    connections: Arc<Mutex<Vec<CancellationToken>>>,
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
        let accept = async move |stop: CancellationToken| {
            while let Ok((client, _)) = listener.accept().await {
                let cut = stop.child_token();
                open.lock().unwrap().push(cut.clone());
                tokio::spawn(pass(client, broker.clone(), cut));
            }
        };
        let until = stop.clone();
        tokio::spawn(async move { until.run_until_cancelled(accept(until.clone())).await });
        Self { url: url.to_string(), connections, _stop: stop.drop_guard() }
    }

    /// Cuts all connections.
    pub(crate) fn cut(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            connection.cancel();
        }
    }

    /// Cuts one of those that are open, by a number that was drawn.
    pub(crate) fn cut_one(&self, drawn: usize) {
        let mut connections = self.connections.lock().unwrap();
        connections.retain(|connection| !connection.is_cancelled());
        if !connections.is_empty() {
            let one = drawn % connections.len();
            connections.swap_remove(one).cancel();
        }
    }
}

/// One connection, until either end closes it or it is cut.
async fn pass(mut client: TcpStream, broker: String, cut: CancellationToken) {
    if let Ok(mut broker) = TcpStream::connect(broker).await {
        let _ = cut.run_until_cancelled(copy_bidirectional(&mut client, &mut broker)).await;
    }
    cut.cancel();
}
