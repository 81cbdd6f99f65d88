//! The broker's product and version, and what differs between versions of RabbitMQ. Pure.
//!
//! The worker uses the same objects and calls on every supported version. It logs the version, with notes on how this
//! version behaves, for the operator.

use std::fmt;

/// The product whose version numbers are compared.
const RABBITMQ: &str = "RabbitMQ";

/// "No limit" that every version understands: -1 drops on the first requeue on 3.10, and the default
/// of 4.x drops messages after 20 lost connections, whatever caused them (rabbitmq.md §0, 2 and 3).
pub(crate) const DELIVERY_LIMIT: i64 = 1_000_000;

/// The oldest supported version. Earlier quorum queues have no time-to-live, so delay queues cannot work
/// (rabbitmq.md §3.1).
pub(crate) const OLDEST: Version = Version(3, 10);

/// Major and minor version. The notes do not depend on the patch version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u16, u16);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Each entry: a version, the note for earlier versions, the note for this version and later ones.
const VERSION_NOTES: [(Version, Option<&str>, &str); 4] = [
    // rabbitmq.md §3.2.
    (Version(4, 0), None, "overrides its default delivery limit of 20"),
    // rabbitmq.md §3.5.
    (
        Version(4, 3),
        Some("closes the channel when a message is held too long"),
        "cancels the consumer when a message is held too long",
    ),
    // In a cluster, observed with three nodes. Earlier versions requeue the messages at once.
    (
        Version(4, 3),
        None,
        "requeues the messages of a lost worker node after `consumer_disconnected_timeout`, 60 s by default",
    ),
    // rabbitmq.md §3.4.
    (Version(4, 3), None, "does not use its delayed retry"),
];

/// What the broker says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerInfo {
    /// `RabbitMQ`, or empty if unknown.
    pub product: String,
    /// `4.3.6`, or empty if unknown.
    pub version: String,
}

impl ServerInfo {
    /// Whether it is a RabbitMQ that is known to be too old. An unknown version may work.
    pub fn is_too_old(&self) -> bool {
        self.parsed_version().is_some_and(|version| version < OLDEST)
    }

    /// What close-sync uses of the broker, and how this version behaves.
    pub fn describe(&self) -> String {
        let always =
            format!("quorum queues with a delivery limit of {DELIVERY_LIMIT}, a queue for each delay");
        let notes = VERSION_NOTES.iter().filter_map(|(since, before, after)| {
            if self.parsed_version()? < *since { *before } else { Some(*after) }
        });
        std::iter::once(always.as_str()).chain(notes).collect::<Vec<_>>().join("; ")
    }

    fn parsed_version(&self) -> Option<Version> {
        let mut numbers = self.version.split(|character: char| !character.is_ascii_digit());
        let mut next = || numbers.next()?.parse().ok();
        Some(Version(next()?, next()?)).filter(|_| self.product == RABBITMQ)
    }
}

impl fmt::Display for ServerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { product, version } = self;
        match (product.as_str(), version.as_str()) {
            ("", _) => f.write_str("a broker of an unknown product"),
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
        assert!(!broker("LavinMQ", "2.4.1").is_too_old(), "another product has its own version numbers");
    }

    #[test]
    fn notes_depend_on_the_version() {
        let notes = |version: &str| broker("RabbitMQ", version).describe();
        let always = "quorum queues with a delivery limit of 1000000, a queue for each delay";
        assert_eq!(notes("3.10.8"), format!("{always}; closes the channel when a message is held too long"));
        assert_eq!(
            notes("4.2.9"),
            format!(
                "{always}; overrides its default delivery limit of 20; closes the channel when a message is held too long"
            )
        );
        assert_eq!(
            notes("4.3.6"),
            format!(
                "{always}; overrides its default delivery limit of 20; cancels the consumer when a message is held too long; \
                 requeues the messages of a lost worker node after `consumer_disconnected_timeout`, 60 s by default; \
                 does not use its delayed retry"
            )
        );
        assert_eq!(notes("5.0.0"), notes("4.3.6"));
        assert_eq!((notes(""), broker("LavinMQ", "2.4.1").describe()), (always.into(), always.into()));
    }

    #[test]
    fn unknown_parts_of_the_name_are_reported_as_unknown() {
        let names = [("RabbitMQ", "4.3.6"), ("RabbitMQ", ""), ("", "")];
        assert_eq!(
            names.map(|(product, version)| broker(product, version).to_string()),
            ["RabbitMQ 4.3.6", "RabbitMQ of an unknown version", "a broker of an unknown product"]
        );
    }
}
