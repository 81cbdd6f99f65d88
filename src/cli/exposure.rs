//! Where others can read or change what close-sync sends: connections without TLS, and proxies.

use std::net::IpAddr;

use hyper::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use url::{Host, Url};

use crate::config::Destination;
use crate::text::masked_urls;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Exposure {
    #[error(
        "{0} has no TLS and is on another machine; the password and all messages cross the network in clear text; \
         use `amqps://`"
    )]
    Broker(String),
    #[error(
        "{0} has no TLS and is on another machine; the API key and all records cross the network in clear text; use \
         `https://`"
    )]
    Close(String),
    #[error(
        "calls to Close go through the proxy {0}; to reach Close directly, unset HTTPS_PROXY, HTTP_PROXY and ALL_PROXY \
         (upper and lower case), or add the host of Close to NO_PROXY"
    )]
    Proxy(String),
}

impl Exposure {
    /// What the operator can change.
    pub(super) fn setting(&self) -> &'static str {
        match self {
            Self::Broker(_) => "amqp.url",
            Self::Close(_) => "close.api_url",
            Self::Proxy(_) => "proxy",
        }
    }
}

/// The exposures of one destination.
pub(super) fn exposures(config: &Destination) -> Vec<Exposure> {
    let mut exposures: Vec<_> = config.amqp.nodes.exposed().into_iter().map(Exposure::Broker).collect();
    let close = &config.close.url;
    if close.scheme() == "http" && !is_this_machine(close) {
        exposures.push(Exposure::Close(masked_urls(close.as_str())));
    }
    // reqwest asks the same matcher, which reads the environment.
    let proxy = close.as_str().parse::<Uri>().ok().and_then(|uri| Matcher::from_system().intercept(&uri));
    exposures.extend(proxy.map(|proxy| Exposure::Proxy(masked_urls(&proxy.uri().to_string()))));
    exposures
}

fn is_this_machine(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        None => false,
    }
}
