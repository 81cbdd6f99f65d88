//! Findings about how late reads, search and the event log show a write.

use std::time::Duration;

use crate::cli::certify::finding::{Found, Status};
use crate::cli::certify::observations::Delay;

/// Rounded up to tenths.
fn seconds(duration: Duration) -> String {
    let tenths = duration.as_millis().div_ceil(100);
    if tenths.is_multiple_of(10) {
        format!("{}s", tenths / 10)
    } else {
        format!("{}.{}s", tenths / 10, tenths % 10)
    }
}

/// The longest lag that fits, for the simulator.
fn lag(delay: Delay) -> String {
    match delay {
        Delay::Below(time) | Delay::Within(time) | Delay::Longer(time) => seconds(time),
    }
}

fn within(delay: Delay) -> String {
    match delay {
        Delay::Below(time) => format!("below {}", seconds(time)),
        Delay::Within(time) => format!("after {}", seconds(time)),
        Delay::Longer(time) => format!("not within {}", seconds(time)),
    }
}

pub(super) fn read(delay: Delay, what: &str) -> Found {
    match delay {
        Delay::Below(_) => Found::new(
            Status::AsAssumed,
            format!("the first read shows {what}, {}", within(delay)),
            "close-sync reads what it wrote",
        ),
        Delay::Within(_) | Delay::Longer(_) => Found::new(
            Status::Handled,
            format!("reads show {what} {}", within(delay)),
            "close-sync remembers its own writes, and takes no older answer for the current state",
        ),
    }
}

pub(super) fn read_changed(delay: Delay) -> Found {
    like_if_late(read(delay, "the change"), "read_lag", delay)
}

/// Without a lag at the first look, the simulator has none.
fn like_if_late(found: Found, key: &str, delay: Delay) -> Found {
    match delay {
        Delay::Below(_) => found,
        Delay::Within(_) | Delay::Longer(_) => found.like(key, lag(delay)),
    }
}

/// Doubled, because the lag varies, in whole seconds.
fn recommended(lag: Duration) -> Duration {
    Duration::from_secs(lag.saturating_mul(2).as_secs().saturating_add(1))
}

/// A lag of search, `configured` as `close.search_lag`, and the settings of the simulator for it.
pub(super) fn search(delay: Delay, configured: Duration, like: &[&str]) -> Found {
    let found = within(delay);
    let now = format!("close.search_lag is {}", seconds(configured));
    let set = |meaning: &str, value: Duration| {
        let setting = Some(format!("close.search_lag = \"{}s\"", value.as_secs()));
        Found { setting, ..Found::new(Status::ChangeSetting, found.clone(), format!("{now}; {meaning}")) }
    };
    let unknown = |meaning: &str| Found::new(Status::Unknown, found.clone(), format!("{now}; {meaning}"));
    let found = match delay {
        Delay::Below(lag) | Delay::Within(lag) if lag <= configured => {
            Found::new(Status::AsAssumed, found.clone(), now)
        }
        // The lag may be anything below, so it suggests no setting.
        Delay::Below(_) => unknown("a lag this short was not measured"),
        Delay::Within(lag) => set("a search that comes too early makes a duplicate", recommended(lag)),
        Delay::Longer(lag) if lag < configured => unknown("measure it with a longer --max-wait"),
        Delay::Longer(lag) => set("measure the lag with a longer --max-wait", lag.saturating_mul(5)),
    };
    like.iter().fold(found, |found, key| found.like(key, lag(delay)))
}

pub(super) fn event_log(delay: Delay) -> Found {
    let found = within(delay);
    let found = match delay {
        Delay::Below(_) => Found::new(Status::AsAssumed, found, "a creation without an answer is found soon"),
        Delay::Within(_) | Delay::Longer(_) => {
            Found::new(Status::Handled, found, "a creation without an answer waits for close.search_lag")
        }
    };
    like_if_late(found, "event_lag", delay)
}
