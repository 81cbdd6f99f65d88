//! Earlier states of records, for reads by id that lag (close-api.md §15 row 2).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;

/// The states of each record from when they were written, oldest first. `None`: the record was deleted.
#[derive(Debug, Default)]
pub(super) struct Past {
    states: HashMap<String, States>,
}

type States = VecDeque<(Timestamp, Option<Arc<Value>>)>;

impl Past {
    /// Keeps a state that was written at `now`, and as many earlier ones as reads with this lag show.
    pub(super) fn keep(&mut self, id: &str, state: Option<Arc<Value>>, now: Timestamp, lag: Duration) {
        let oldest = now.saturating_sub(lag).unwrap_or(Timestamp::MIN);
        let states = self.states.entry(id.to_owned()).or_default();
        states.push_back((now, state));
        // One state from before is shown until the next one is old enough.
        while states.get(1).is_some_and(|(at, _)| *at <= oldest) {
            states.pop_front();
        }
    }

    /// The state at a time. `None` if the record did not exist then.
    pub(super) fn at(&self, id: &str, time: Timestamp) -> Option<Arc<Value>> {
        let states = self.states.get(id)?;
        states.iter().rev().find(|(at, _)| *at <= time)?.1.clone()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_state_is_shown_until_the_next_one_and_old_ones_are_dropped() {
        let mut past = Past::default();
        let keep = |past: &mut Past, second, state: Option<i64>| {
            past.keep(
                "lead_1",
                state.map(|state| Arc::new(json!(state))),
                at(second),
                Duration::from_secs(5),
            );
        };
        keep(&mut past, 10, Some(1));
        keep(&mut past, 20, Some(2));
        keep(&mut past, 22, None);
        let shown = |past: &Past, second| past.at("lead_1", at(second)).map(|state| (*state).clone());
        let states = [9, 10, 19, 20, 21, 22].map(|second| shown(&past, second));
        assert_eq!(states, [None, Some(json!(1)), Some(json!(1)), Some(json!(2)), Some(json!(2)), None]);
        keep(&mut past, 30, Some(3));
        assert_eq!(past.states["lead_1"].len(), 2, "states that reads no longer show are dropped");
    }
}
