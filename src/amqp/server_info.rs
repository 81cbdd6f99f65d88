//! Which broker it is, and what differs between its versions. Pure.
//!
//! The same objects and the same calls serve every version that is not too old, so nothing else depends on it: it
//! is told, for an operator to know which of the broker's habits to expect.

use std::fmt;

/// The product whose versions are known here.
const RABBITMQ: &str = "RabbitMQ";

/// "No limit" that every version understands: -1 drops on the first requeue on 3.10, and the default
/// of 4.x drops messages after 20 lost connections, innocent ones included (rabbitmq.md §0, 2 and 3).
pub(crate) const DELIVERY_LIMIT: i64 = 1_000_000;

/// Quorum queues have no time-to-live before, so there are no delay queues (rabbitmq.md §3.1).
pub(crate) const OLDEST: Version = Version(3, 10);

/// Major and minor: within these, RabbitMQ changes nothing that is told here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u16, u16);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// How a habit is told from one version on, and how before.
const HABITS: [(Version, Option<&str>, &str); 4] = [
    // rabbitmq.md §3.2.
    (Version(4, 0), None, "its own delivery limit of 20 overruled"),
    // rabbitmq.md §3.5.
    (
        Version(4, 3),
        Some("a message held for too long ends the channel"),
        "a message held for too long ends the consumer",
    ),
    // Of a cluster; seen with three nodes. Before, they go to the next consumer at once.
    (
        Version(4, 3),
        None,
        "when the worker's node dies its messages wait for `consumer_disconnected_timeout`, 60 s by default",
    ),
    // rabbitmq.md §3.4.
    (Version(4, 3), None, "its delayed retry not used"),
];

/// The broker, as it presents itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerInfo {
    /// `RabbitMQ`; empty when it did not say.
    pub product: String,
    /// `4.3.6`; empty when it did not say.
    pub version: String,
}

impl ServerInfo {
    /// Whether it cannot have what is needed. Who is not known is given a try.
    pub fn is_too_old(&self) -> bool {
        self.known().is_some_and(|version| version < OLDEST)
    }

    /// What of it will be used, and which of its habits matter.
    pub fn describe(&self) -> String {
        let always =
            format!("quorum queues with a delivery limit of {DELIVERY_LIMIT}, a queue for each delay");
        let habits = HABITS.iter().filter_map(
            |(since, before, after)| {
                if self.known()? < *since { *before } else { Some(*after) }
            },
        );
        std::iter::once(always.as_str()).chain(habits).collect::<Vec<_>>().join("; ")
    }

    fn known(&self) -> Option<Version> {
        let mut numbers = self.version.split(|character: char| !character.is_ascii_digit());
        let mut next = || numbers.next()?.parse().ok();
        Some(Version(next()?, next()?)).filter(|_| self.product == RABBITMQ)
    }
}

impl fmt::Display for ServerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { product, version } = self;
        match (product.as_str(), version.as_str()) {
            ("", _) => f.write_str("a broker that does not say which"),
            (_, "") => write!(f, "{product} of an unknown version"),
            _ => write!(f, "{product} {version}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broker(product: &str, version: &str) -> ServerInfo {
        ServerInfo { product: product.into(), version: version.into() }
    }

    #[test]
    fn only_a_version_known_to_be_older_is_too_old() {
        for (version, too_old) in [
            ("3.9.29", true),
            ("2.8.7", true),
            ("3.10.0-rc.1", false),
            ("3.10.8", false),
            ("3.13.7+1.g2ab3", false),
            ("4.0.5", false),
            ("10.0", false),
            ("", false),
            ("next", false),
            ("3", false),
        ] {
            assert_eq!(broker("RabbitMQ", version).is_too_old(), too_old, "{version:?}");
        }
        assert!(!broker("LavinMQ", "2.4.1").is_too_old(), "its numbers are its own");
    }

    #[test]
    fn habits_are_told_by_version() {
        let told = |version: &str| broker("RabbitMQ", version).describe();
        let always = "quorum queues with a delivery limit of 1000000, a queue for each delay";
        assert_eq!(told("3.10.8"), format!("{always}; a message held for too long ends the channel"));
        assert_eq!(
            told("4.2.9"),
            format!(
                "{always}; its own delivery limit of 20 overruled; a message held for too long ends the channel"
            )
        );
        assert_eq!(
            told("4.3.6"),
            format!(
                "{always}; its own delivery limit of 20 overruled; a message held for too long ends the consumer; \
                 when the worker's node dies its messages wait for `consumer_disconnected_timeout`, 60 s by default; \
                 its delayed retry not used"
            )
        );
        assert_eq!(told("5.0.0"), told("4.3.6"));
        assert_eq!((told(""), broker("LavinMQ", "2.4.1").describe()), (always.into(), always.into()));
    }

    #[test]
    fn it_is_named_as_far_as_it_named_itself() {
        let names = [("RabbitMQ", "4.3.6"), ("RabbitMQ", ""), ("", "")];
        assert_eq!(
            names.map(|(product, version)| broker(product, version).to_string()),
            ["RabbitMQ 4.3.6", "RabbitMQ of an unknown version", "a broker that does not say which"]
        );
    }
}
