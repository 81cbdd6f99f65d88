//! Connects to the broker: tries the nodes in turn, with a time-out for each.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{ConnectionProperties, ErrorKind};
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

use crate::amqp::compat::stream;
use crate::amqp::connection::{OpenConnection, disconnect};
use crate::amqp::error::BrokerError;
use crate::amqp::tls::{self, Tls};
use crate::text::{is_ambiguous, masked_urls};

/// The URLs of the broker: one node, or the nodes of a cluster. Clones share which node answered last.
#[derive(Clone, Debug)]
pub struct Nodes {
    urls: Vec<SecretString>,
    tls: Tls,
    /// The index of the node that accepted the last connection.
    last: Arc<AtomicUsize>,
}

impl Nodes {
    /// Parses `amqp://user:password@host:port/vhost`, one or several separated by commas. `None` if one of them is not
    /// a valid URL, or its parts are not certain.
    pub fn parse(urls: &str) -> Option<Self> {
        let each: Option<Vec<_>> = split(urls)
            .map(|url| {
                let fits = Url::parse(url).is_ok_and(|url| url.has_host() && !is_ambiguous(&url));
                (fits && node(url).is_ok()).then(|| SecretString::from(url))
            })
            .collect();
        Some(Self { urls: each?, tls: Tls::default(), last: Arc::default() })
    }

    /// Adds trusted certificates or a client certificate.
    #[must_use]
    pub fn with_tls(self, tls: Tls) -> Self {
        Self { tls, ..self }
    }

    /// Whether every node is reached over TLS.
    pub fn is_encrypted(&self) -> bool {
        self.urls.iter().all(|url| node(url.expose_secret()).is_ok_and(|uri| uri.scheme == AMQPScheme::AMQPS))
    }

    /// The nodes on other machines that are reached without TLS, `amqp://host:port`.
    pub fn exposed(&self) -> Vec<String> {
        let uris = self.urls.iter().filter_map(|url| node(url.expose_secret()).ok());
        let is_exposed = |uri: &AMQPUri| {
            let host = uri.authority.host.as_str();
            let is_loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
            uri.scheme == AMQPScheme::AMQP && !is_loopback
        };
        let exposed = uris.filter(is_exposed);
        exposed.map(|uri| format!("amqp://{}", address(&uri))).collect()
    }

    /// The URLs without passwords.
    pub fn masked(&self) -> String {
        let urls: Vec<_> = self.urls.iter().map(ExposeSecret::expose_secret).collect();
        masked_urls(&urls.join(","))
    }

    /// Opens a connection. RabbitMQ's management UI shows it under `name`. Tries the nodes in turn, starting with the
    /// one that answered last.
    ///
    /// # Errors
    /// [`BrokerError::Unreachable`], [`BrokerError::Tls`] or [`BrokerError::Refused`] of the node where
    /// connecting got farthest; [`BrokerError::TooOld`].
    pub async fn connect(&self, name: &str) -> Result<OpenConnection, BrokerError> {
        let first = self.last.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for index in (first..self.urls.len()).chain(0..first) {
            match self.connect_to(self.urls[index].expose_secret(), name).await {
                Ok(met) if met.server.is_too_old() => {
                    disconnect(&met.connection).await;
                    return Err(BrokerError::TooOld(met.server));
                }
                Ok(met) => {
                    self.last.store(index, Ordering::Relaxed);
                    return Ok(met);
                }
                Err(failure) => failures.push(failure),
            }
        }
        Err(Failure::summarize(failures))
    }

    async fn connect_to(&self, url: &str, name: &str) -> Result<OpenConnection, Failure> {
        // lapin's time-out does not cover the handshake with a silent peer (rabbitmq.md §2.2).
        const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
        // RabbitMQ proposes 60 s. With 10 s a disconnected worker notices after 20 s at most, one heartbeat before its
        // standby takes over (rabbitmq.md §2.2).
        const HEARTBEAT: u16 = 10;
        const NOT_AMQP: &str = "the answer is not AMQP; check the port, and use `amqps://` for a TLS port";
        let failure = |node: &str, kind, detail| Failure { node: node.to_owned(), kind, detail };
        let mut uri = node(url).map_err(|error| failure("", Kind::Unreachable, error))?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        let encrypted = uri.scheme == AMQPScheme::AMQPS;
        let node = address(&uri);
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let connect = stream::connect(uri, properties, self.tls.for_lapin());
        match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
            Ok(Ok(met)) => Ok(met),
            Ok(Err(error)) => {
                let (kind, detail) = match (encrypted.then(|| tls::explain(&error)).flatten(), error.kind()) {
                    (Some(detail), _) => (Kind::Tls, detail),
                    (None, ErrorKind::ProtocolError(amqp)) => {
                        (Kind::Refused, amqp.get_message().as_str().trim_end_matches('.').to_owned())
                    }
                    (None, ErrorKind::ParsingError(_)) => (Kind::Unreachable, NOT_AMQP.to_owned()),
                    (None, _) => (Kind::Unreachable, error.to_string()),
                };
                Err(failure(&node, kind, detail))
            }
            Err(_) => {
                let detail = format!("no answer within {} s", CONNECT_TIMEOUT.as_secs());
                Err(failure(&node, Kind::Unreachable, detail))
            }
        }
    }
}

/// Compares nodes, credentials and TLS settings.
impl PartialEq for Nodes {
    fn eq(&self, other: &Self) -> bool {
        let urls = |nodes: &Self| nodes.urls.iter().map(|url| url.expose_secret().to_owned()).collect();
        let (left, right): (Vec<_>, Vec<_>) = (urls(self), urls(other));
        left == right && self.tls == other.tls
    }
}

struct Failure {
    node: String,
    kind: Kind,
    detail: String,
}

/// How far a connection attempt came. A later failure says more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Unreachable,
    Tls,
    Refused,
}

impl Failure {
    fn summarize(failures: Vec<Self>) -> BrokerError {
        let kind = failures.iter().map(|failure| failure.kind).max();
        let detail = match failures.as_slice() {
            [Self { node, detail, .. }] => format!("{node}: {detail}"),
            several => {
                let each: Vec<_> =
                    several.iter().map(|Self { node, detail, .. }| format!("{node}: {detail}")).collect();
                format!("tried {} nodes; {}", several.len(), each.join("; "))
            }
        };
        match kind {
            Some(Kind::Refused) => BrokerError::Refused(detail),
            Some(Kind::Tls) => BrokerError::Tls(detail),
            Some(Kind::Unreachable) | None => BrokerError::Unreachable(detail),
        }
    }
}

/// Parses the URL of one node. lapin's parser alone reads an IPv6 address as no host, and so as `localhost`.
fn node(url: &str) -> Result<AMQPUri, String> {
    let mut uri: AMQPUri = url.parse()?;
    if let Ok(Some(Host::Ipv6(address))) = Url::parse(url).as_ref().map(Url::host) {
        uri.authority.host = address.to_string();
    }
    Ok(uri)
}

/// `host:port`.
fn address(uri: &AMQPUri) -> String {
    let (host, port) = (&uri.authority.host, uri.authority.port);
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn split(urls: &str) -> impl Iterator<Item = &str> {
    urls.split(',').map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_url_of_a_list_has_to_be_valid() {
        let fits = |urls: &str| Nodes::parse(urls).is_some();
        assert!(fits("amqp://u:p@a:1/%2f"));
        assert!(fits("amqp://user:pass@word@host/v"));
        assert!(fits("amqp://u:p@a:1/%2f, amqps://u:p%2cp@b/v?auth_mechanism=external"));
        for wrong in [
            "",
            "amqp://a,",
            "amqp://a,b:5672",
            "http://a",
            "amqp:///v",
            "amqp://a?heartbeat=x",
            "amqp://u:p,q@a",
            "amqp://user:123/secret@host",
            "amqp://user:123?secret@host/v",
        ] {
            assert!(!fits(wrong), "{wrong}");
        }
    }

    #[test]
    fn an_ipv6_address_is_the_host() {
        let host = |url: &str| node(url).map(|uri| (uri.authority.host, uri.authority.port));
        assert_eq!(host("amqp://u:p@[2001:db8::1]:1/v"), Ok(("2001:db8::1".into(), 1)));
        assert_eq!(host("amqp://[::1]"), Ok(("::1".into(), 5672)));
        assert_eq!(host("amqp://127.0.0.1"), Ok(("127.0.0.1".into(), 5672)));
        let exposed = Nodes::parse("amqp://[2001:db8::1]/v,amqp://[::1]").unwrap().exposed();
        assert_eq!(exposed, ["amqp://[2001:db8::1]:5672"]);
    }

    #[test]
    fn every_password_of_a_list_is_hidden() {
        let shown = "amqp://u:***@a/v,amqps://u:***@b:1/v?heartbeat=5,amqp://c";
        let urls = "amqp://u:secret@a/v, amqps://u:secret@b:1/v?heartbeat=5,amqp://c";
        let nodes = Nodes::parse(urls).unwrap();
        assert_eq!(nodes.masked(), shown);
        assert!(!format!("{nodes:?}").contains("secret"));
    }

    #[test]
    fn nodes_without_tls_on_other_machines_are_exposed() {
        let urls =
            "amqp://u:secret@rabbit/v,amqps://u:secret@tls/v,amqp://u:secret@127.0.0.9:1,amqp://localhost";
        let exposed = Nodes::parse(urls).unwrap().exposed();
        assert_eq!(exposed, ["amqp://rabbit:5672"]);
    }

    #[test]
    fn equal_nodes_are_the_same_broker() {
        let nodes = |urls: &str| Nodes::parse(urls).unwrap();
        assert_eq!(nodes("amqp://u:p@a,amqp://u:p@b"), nodes("amqp://u:p@a, amqp://u:p@b"));
        for other in ["amqp://u:p@a", "amqp://u:p@a,amqp://u:q@b"] {
            assert_ne!(nodes("amqp://u:p@a,amqp://u:p@b"), nodes(other));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_node_times_out_and_the_next_one_is_tried() {
        let silent = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let [one, other] = silent.each_ref().map(|node| node.local_addr().unwrap());
        let broker = Nodes::parse(&format!("amqp://{one},amqp://{other}")).unwrap();
        let error = broker.connect("test").await.err().unwrap();
        let detail = format!("tried 2 nodes; {one}: no answer within 10 s; {other}: no answer within 10 s");
        assert_eq!(error.to_string(), format!("cannot reach RabbitMQ: {detail}"));
    }

    #[test]
    fn the_latest_stage_of_several_failures_decides_the_error() {
        let failure =
            |kind, node: &str| Failure { node: node.into(), kind, detail: format!("{node} is bad") };
        let one = Failure::summarize(vec![failure(Kind::Unreachable, "a")]);
        assert_eq!(one.to_string(), "cannot reach RabbitMQ: a: a is bad");
        let several = vec![failure(Kind::Refused, "a:1"), failure(Kind::Unreachable, "b:1")];
        assert_eq!(
            Failure::summarize(several).to_string(),
            "RabbitMQ refused the connection: tried 2 nodes; a:1: a:1 is bad; b:1: b:1 is bad. Check user, password and \
             vhost in `amqp.url` (the vhost `/` is written `%2f`)"
        );
    }
}
