//! The open connections, and which one makes room for a new one.
//!
//! A new connection is always accepted, so that idle or slow clients cannot keep out health checks and metrics. If there
//! is no room, another one is closed: of the address with the most connections, the one that has waited longest for a
//! request, else the oldest.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

/// The limit of connections. It leaves file descriptors for the worker.
const MAX_CONNECTIONS: usize = 256;
/// The limit of connections of one address.
const MAX_PER_ADDRESS: usize = 128;
/// A client sends its request at once. A connection that has waited longer is idle.
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// An open connection.
#[derive(Clone)]
pub(super) struct Connection {
    id: u64,
    from: IpAddr,
    /// Since when it waits for a request. `None` during one.
    waiting: Arc<Mutex<Option<Instant>>>,
    /// Cancelled when it has to make room.
    pub(super) closed: CancellationToken,
}

impl Connection {
    /// A request begins.
    pub(super) fn begin(&self) {
        self.set(None);
    }

    /// A request has ended.
    pub(super) fn end(&self, now: Instant) {
        self.set(Some(now));
    }

    fn set(&self, waiting: Option<Instant>) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = waiting;
    }

    fn is_idle(&self, now: Instant) -> bool {
        let waiting = *self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.is_some_and(|since| now.duration_since(since) > IDLE_AFTER)
    }
}

/// All open connections, oldest first.
#[derive(Default)]
pub(super) struct Connections {
    open: BTreeMap<u64, Connection>,
    next: u64,
}

impl Connections {
    /// Adds a connection from this address, and closes another one if there is no room.
    pub(super) fn add(&mut self, from: IpAddr, now: Instant) -> Connection {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        for connection in self.open.values() {
            *counts.entry(connection.from).or_default() += 1;
        }
        let crowded = if counts.get(&from).is_some_and(|count| *count >= MAX_PER_ADDRESS) {
            Some(from)
        } else if self.open.len() >= MAX_CONNECTIONS {
            counts.into_iter().max_by_key(|(_, count)| *count).map(|(address, _)| address)
        } else {
            None
        };
        if let Some(address) = crowded {
            let mut of_address = self.open.values().filter(|connection| connection.from == address);
            let oldest = of_address.clone().next();
            let victim = of_address.find(|connection| connection.is_idle(now)).or(oldest);
            if let Some(victim) = victim.map(|victim| victim.id).and_then(|id| self.open.remove(&id)) {
                victim.closed.cancel();
            }
        }
        let id = self.next;
        self.next += 1;
        let waiting = Arc::new(Mutex::new(Some(now)));
        let connection = Connection { id, from, waiting, closed: CancellationToken::new() };
        self.open.insert(id, connection.clone());
        connection
    }

    /// Removes a connection that has ended.
    pub(super) fn remove(&mut self, connection: &Connection) {
        self.open.remove(&connection.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: usize) -> IpAddr {
        std::net::Ipv4Addr::from(u32::try_from(n).unwrap()).into()
    }

    fn closed(connections: &[Connection]) -> Vec<u64> {
        connections.iter().filter(|one| one.closed.is_cancelled()).map(|one| one.id).collect()
    }

    #[test]
    fn a_crowded_address_loses_its_longest_idle_connection() {
        let (mut all, now) = (Connections::default(), Instant::now());
        let crowd: Vec<_> = (0..MAX_PER_ADDRESS).map(|_| all.add(ip(1), now)).collect();
        crowd[0].begin();
        let later = now + IDLE_AFTER * 2;
        let new = all.add(ip(1), later);
        assert_eq!((closed(&crowd), new.closed.is_cancelled()), (vec![1], false));
        let other = all.add(ip(2), later);
        assert_eq!((closed(&crowd), other.closed.is_cancelled()), (vec![1], false));
        // A connection that ended leaves room.
        all.remove(&crowd[5]);
        all.add(ip(1), later);
        assert_eq!(closed(&crowd), [1]);
    }

    #[test]
    fn slow_requests_make_room_too() {
        let (mut all, now) = (Connections::default(), Instant::now());
        let crowd: Vec<_> = (0..MAX_PER_ADDRESS).map(|_| all.add(ip(1), now)).collect();
        crowd.iter().for_each(Connection::begin);
        let new = all.add(ip(1), now + IDLE_AFTER * 2);
        assert_eq!((closed(&crowd), new.closed.is_cancelled()), (vec![0], false));
    }

    #[test]
    fn many_addresses_do_not_keep_out_another_one() {
        let (mut all, now) = (Connections::default(), Instant::now());
        let pair = [all.add(ip(1), now), all.add(ip(1), now)];
        let crowd: Vec<_> = (0..5000).map(|n| all.add(ip(100 + n), now)).collect();
        assert!(!closed(&pair).is_empty() && !closed(&crowd).is_empty());
        assert_eq!(all.open.len(), MAX_CONNECTIONS);
        let probe = all.add(ip(2), now + IDLE_AFTER * 2);
        assert!(!probe.closed.is_cancelled() && all.open.len() == MAX_CONNECTIONS);
    }
}
