//! Limits guesses of the token, and the log lines about them.
//!
//! An address may guess wrong a few times, as people do. Each further wrong guess blocks it for twice as long as the one
//! before. A blocked guess is refused without comparing it, so it tells nothing and costs nothing. Someone with many
//! addresses meets the limit of all addresses together, from which only this machine is exempt: an operator can always
//! sign in through a tunnel to it. Sessions are not affected.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// The wrong guesses of an address before it is blocked.
const FREE_GUESSES: u32 = 5;
/// The first block of an address.
const FIRST_BLOCK: Duration = Duration::from_secs(1);
/// The longest block of an address.
const LONGEST_BLOCK: Duration = Duration::from_mins(5);
/// After this time without a wrong guess, an address starts afresh.
const FORGIVEN_AFTER: Duration = Duration::from_hours(1);
/// The limit of wrong guesses of all addresses together.
const GUESSES_PER_MINUTE: u32 = 60;
const MINUTE: Duration = Duration::from_mins(1);
/// The limit of addresses with a log line of their own in a minute.
const MAX_LOGGED: usize = 60;

/// The part of an address that one client has to itself: of IPv6, its network of 64 bits.
pub(in crate::http) fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) if !ip.is_loopback() => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    }
}

struct Guesses {
    wrong: u32,
    last: Instant,
    blocked_until: Instant,
}

/// The wrong guesses. Its size is bounded by the limit of all addresses together.
pub(super) struct Throttle {
    networks: HashMap<IpAddr, Guesses>,
    minute: Instant,
    wrong_in_minute: u32,
}

impl Throttle {
    pub(super) fn new(now: Instant) -> Self {
        Self { networks: HashMap::new(), minute: now, wrong_in_minute: 0 }
    }

    /// Whether an address may guess.
    ///
    /// # Errors
    /// How long it has to wait.
    pub(super) fn admit(&mut self, from: IpAddr, now: Instant) -> Result<(), Duration> {
        if now.duration_since(self.minute) >= MINUTE {
            (self.minute, self.wrong_in_minute) = (now, 0);
        }
        let is_local = from.to_canonical().is_loopback();
        let own = self.networks.get(&network(from)).map(|guesses| guesses.blocked_until.duration_since(now));
        let all = (self.wrong_in_minute >= GUESSES_PER_MINUTE && !is_local)
            .then(|| (self.minute + MINUTE).duration_since(now));
        match own.unwrap_or_default().max(all.unwrap_or_default()) {
            Duration::ZERO => Ok(()),
            wait => Err(wait),
        }
    }

    /// Records a wrong guess.
    pub(super) fn guessed_wrong(&mut self, from: IpAddr, now: Instant) {
        if !from.to_canonical().is_loopback() {
            self.wrong_in_minute += 1;
        }
        self.networks.retain(|_, guesses| now.duration_since(guesses.last) < FORGIVEN_AFTER);
        let fresh = Guesses { wrong: 0, last: now, blocked_until: now };
        let guesses = self.networks.entry(network(from)).or_insert(fresh);
        guesses.wrong = guesses.wrong.saturating_add(1);
        guesses.last = now;
        if let Some(doublings) = guesses.wrong.checked_sub(FREE_GUESSES) {
            let factor = 2_u32.saturating_pow(doublings);
            guesses.blocked_until = now + FIRST_BLOCK.saturating_mul(factor).min(LONGEST_BLOCK);
        }
    }
}

/// Counts refused guesses, so that each address gets one log line a minute.
#[derive(Default)]
pub(super) struct RefusalLog {
    /// The guesses since the last line.
    networks: HashMap<IpAddr, u64>,
    others: u64,
}

impl RefusalLog {
    /// Counts a refused guess. Returns whether to log it now.
    pub(super) fn add(&mut self, from: IpAddr) -> bool {
        let known = self.networks.len();
        match self.networks.get_mut(&network(from)) {
            Some(count) => *count += 1,
            None if known < MAX_LOGGED => {
                self.networks.insert(network(from), 0);
                return true;
            }
            None => self.others += 1,
        }
        false
    }

    /// The guesses that have no line yet, by address. Without an address, those of all further addresses.
    pub(super) fn drain(&mut self) -> Vec<(Option<IpAddr>, u64)> {
        let others = std::mem::take(&mut self.others);
        // An address that had a line now gets the next one in a minute.
        self.networks.retain(|_, count| *count > 0);
        let each = self.networks.iter_mut().map(|(from, count)| (Some(*from), std::mem::take(count)));
        each.chain((others > 0).then_some((None, others))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Guesses wrong until the address is blocked, and returns the times that it may guess again after.
    fn attack(throttle: &mut Throttle, from: IpAddr, mut now: Instant, guesses: u32) -> Vec<u64> {
        (0..guesses)
            .map(|_| {
                throttle.guessed_wrong(from, now);
                let wait = throttle.admit(from, now).err().unwrap_or_default();
                now += wait;
                wait.as_secs()
            })
            .collect()
    }

    #[test]
    fn each_further_wrong_guess_blocks_an_address_for_twice_as_long() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        let waits = attack(&mut throttle, ip("192.0.2.1"), now, 15);
        assert_eq!(waits, [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(throttle.admit(ip("192.0.2.2"), now), Ok(()), "another address");
        let later = now + Duration::from_hours(3);
        throttle.guessed_wrong(ip("192.0.2.1"), later);
        assert_eq!(throttle.admit(ip("192.0.2.1"), later), Ok(()), "forgiven");
    }

    #[test]
    fn a_network_of_ipv6_is_one_address() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        for host in 1..=FREE_GUESSES {
            throttle.guessed_wrong(ip(&format!("2001:db8:0:1::{host}")), now);
        }
        assert!(throttle.admit(ip("2001:db8:0:1:ffff::1"), now).is_err());
        assert_eq!(throttle.admit(ip("2001:db8:0:2::1"), now), Ok(()));
        assert_eq!(network(ip("::ffff:192.0.2.1")), ip("192.0.2.1"));
        assert_eq!(network(ip("::1")), ip("::1"));
    }

    #[test]
    fn many_addresses_share_a_limit_from_which_this_machine_is_exempt() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        let guess = |throttle: &mut Throttle, from: IpAddr, now| {
            let admitted = throttle.admit(from, now).is_ok();
            if admitted {
                throttle.guessed_wrong(from, now);
            }
            admitted
        };
        let admitted =
            (0..5000_u16).filter(|n| guess(&mut throttle, ip(&format!("2001:db8:0:{n:x}::1")), now)).count();
        assert_eq!(admitted, 60);
        assert_eq!(throttle.networks.len(), 60);
        assert_eq!(throttle.admit(ip("192.0.2.1"), now), Err(MINUTE));
        assert_eq!(throttle.admit(ip("127.0.0.1"), now), Ok(()));
        assert_eq!(throttle.admit(ip("192.0.2.1"), now + MINUTE), Ok(()));
    }

    #[test]
    fn an_address_has_one_line_a_minute_with_the_count() {
        let mut log = RefusalLog::default();
        let (one, other) = (ip("192.0.2.1"), ip("192.0.2.2"));
        assert_eq!([log.add(one), log.add(one), log.add(one), log.add(other)], [true, false, false, true]);
        assert_eq!(log.drain(), [(Some(one), 2)]);
        assert!(!log.add(one), "its line of this minute is written");
        assert!(log.add(other));
        assert_eq!(log.drain(), [(Some(one), 1)]);
        assert_eq!(log.drain(), []);
        let now = (0..1000_u16).filter(|n| log.add(ip(&format!("2001:db8:0:{n:x}::1")))).count();
        assert_eq!((now, log.drain()), (MAX_LOGGED, vec![(None, 940)]));
    }
}
