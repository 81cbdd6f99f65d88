//! The event log behind `GET /event/` (close-api.md §11).

use std::collections::VecDeque;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::ids::{format_timestamp, parse_timestamp};
use crate::refusal::Refusal;

#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) id: String,
    pub(crate) object_type: &'static str,
    pub(crate) object_id: String,
    pub(crate) lead_id: Option<String>,
    pub(crate) action: &'static str,
    pub(crate) at: Timestamp,
    pub(crate) visible: Timestamp,
    /// The other keys: `data`, `previous_data`, `changed_fields`, `meta` and more.
    pub(crate) details: Value,
}

impl Event {
    fn json(&self) -> Value {
        let mut event = self.details.clone();
        event["id"] = json!(self.id);
        event["object_type"] = json!(self.object_type);
        event["object_id"] = json!(self.object_id);
        event["lead_id"] = json!(self.lead_id);
        event["action"] = json!(self.action);
        event["date_created"] = json!(format_timestamp(self.at));
        event["date_updated"] = json!(format_timestamp(self.at));
        event
    }
}

/// The most recent events, oldest first. Close keeps 30 days; the simulator keeps a fixed number.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
    events: VecDeque<Event>,
    forgotten: usize,
}

/// The position and direction of a cursor.
#[derive(Clone, Copy)]
enum Bound {
    /// Events before this position.
    Older(usize),
    /// Events at or after this position.
    Newer(usize),
}

impl EventLog {
    const KEPT: usize = 10_000;

    pub(crate) fn push(&mut self, event: Event) {
        if self.events.len() == Self::KEPT {
            self.events.pop_front();
            self.forgotten += 1;
        }
        self.events.push_back(event);
    }

    /// One page for the parameters of a query string, newest first.
    pub(crate) fn page(&self, parameters: &[(String, String)], now: Timestamp) -> Result<Value, Refusal> {
        let filter = Filter::parse(parameters)?;
        let next = self.forgotten + self.events.len();
        let mut found: Vec<(usize, &Event)> = self
            .events
            .iter()
            .enumerate()
            .map(|(index, event)| (self.forgotten + index, event))
            .filter(|(position, event)| {
                event.visible <= now && filter.includes(*position) && filter.matches(event)
            })
            .collect();
        let more_than_a_page = found.len() > filter.limit;
        match filter.bound {
            // The next page on the newer side is the one closest to the cursor.
            Some(Bound::Newer(_)) => found.truncate(filter.limit),
            Some(Bound::Older(_)) | None => drop(found.drain(..found.len().saturating_sub(filter.limit))),
        }
        found.reverse();
        let oldest = found.last().map(|(position, _)| *position);
        let newest = found.first().map(|(position, _)| position + 1);
        let older = match filter.bound {
            Some(Bound::Newer(position)) => Some(oldest.unwrap_or(position)),
            Some(Bound::Older(_)) | None => oldest.filter(|_| more_than_a_page),
        };
        let newer = newest.or(match filter.bound {
            Some(Bound::Newer(position) | Bound::Older(position)) => Some(position),
            None => Some(next),
        });
        Ok(json!({
            "data": found.iter().map(|(_, event)| event.json()).collect::<Vec<_>>(),
            "cursor_next": older.map(|position| format!("older-{position}")),
            "cursor_previous": newer.map(|position| format!("newer-{position}")),
        }))
    }
}

struct Filter<'a> {
    limit: usize,
    bound: Option<Bound>,
    equal: Vec<(&'a str, &'a str)>,
    dates: Vec<(&'a str, Timestamp)>,
}

impl<'a> Filter<'a> {
    fn parse(parameters: &'a [(String, String)]) -> Result<Self, Refusal> {
        const MAX_LIMIT: usize = 50;
        let mut filter = Self { limit: MAX_LIMIT, bound: None, equal: Vec::new(), dates: Vec::new() };
        for (name, value) in parameters {
            let malformed = || Refusal::Malformed(format!("Invalid value for {name}: {value}"));
            match name.as_str() {
                "object_type" | "object_id" | "lead_id" | "action" | "user_id" | "request_id" => {
                    filter.equal.push((name, value));
                }
                "_limit" => {
                    filter.limit = value.parse().map_err(|_| malformed())?;
                    if filter.limit > MAX_LIMIT {
                        return Err(Refusal::too_many(MAX_LIMIT));
                    }
                }
                "_cursor" => filter.bound = Some(bound(value).ok_or_else(malformed)?),
                _ => {
                    if let Some(comparison) = name.strip_prefix("date_updated__") {
                        filter.dates.push((comparison, parse_timestamp(value).ok_or_else(malformed)?));
                    }
                }
            }
        }
        Ok(filter)
    }

    fn includes(&self, position: usize) -> bool {
        match self.bound {
            None => true,
            Some(Bound::Older(end)) => position < end,
            Some(Bound::Newer(start)) => position >= start,
        }
    }

    fn matches(&self, event: &Event) -> bool {
        self.equal.iter().all(|(name, wanted)| match *name {
            "object_type" => event.object_type == *wanted,
            "object_id" => event.object_id == *wanted,
            "lead_id" => event.lead_id.as_deref() == Some(*wanted),
            "action" => event.action == *wanted,
            other => event.details[other] == *wanted,
        }) && self.dates.iter().all(|(comparison, timestamp)| {
            // Compare milliseconds: the response has no finer resolution.
            let (at, bound) = (event.at.as_millisecond(), timestamp.as_millisecond());
            match *comparison {
                "gt" => at > bound,
                "gte" => at >= bound,
                "lt" => at < bound,
                "lte" => at <= bound,
                _ => true,
            }
        })
    }
}

fn bound(cursor: &str) -> Option<Bound> {
    let (side, position) = cursor.split_once('-')?;
    let position = position.parse().ok()?;
    match side {
        "older" => Some(Bound::Older(position)),
        "newer" => Some(Bound::Newer(position)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Event `n` happens at second `n` and becomes visible a second later. Every third is about a contact.
    fn log(n_events: i64) -> EventLog {
        let mut log = EventLog::default();
        for n in 0..n_events {
            log.push(Event {
                id: n.to_string(),
                object_type: if n % 3 == 0 { "contact" } else { "lead" },
                object_id: format!("lead_{n}"),
                lead_id: Some(format!("lead_{}", n % 2)),
                action: "created",
                at: at(n),
                visible: at(n + 1),
                details: json!({"user_id": "user_1"}),
            });
        }
        log
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn page(log: &EventLog, query: &[(&str, &str)], now: i64) -> (Vec<String>, Value) {
        let parameters: Vec<_> = query.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let page = log.page(&parameters, at(now)).unwrap();
        let ids = page["data"].as_array().unwrap().iter();
        (ids.map(|event| event["id"].as_str().unwrap().to_owned()).collect(), page)
    }

    #[test]
    fn filters_narrow_newest_first() {
        let log = log(7);
        for (query, now, expected) in [
            (&[][..], 100, &["6", "5", "4", "3", "2", "1", "0"][..]),
            (&[], 3, &["2", "1", "0"]), // the others are not visible yet
            (&[("object_type", "contact")], 100, &["6", "3", "0"]),
            (&[("object_type", "contact"), ("lead_id", "lead_0")], 100, &["6", "0"]),
            (&[("action", "deleted")], 100, &[]),
            (&[("user_id", "user_2")], 100, &[]),
            (&[("object_id", "lead_4")], 100, &["4"]),
            (&[("date_updated__gte", "1970-01-01T00:00:05+00:00")], 100, &["6", "5"]),
            (&[("date_updated__gt", "1970-01-01T00:00:05Z")], 100, &["6"]),
            (&[("date_updated__lt", "1970-01-01T00:00:01Z")], 100, &["0"]),
            (&[("date_updated__lte", "1970-01-01T00:00:01Z"), ("_limit", "1")], 100, &["1"]),
        ] {
            assert_eq!(page(&log, query, now).0, expected, "{query:?}");
        }
    }

    #[test]
    fn cursors_lead_to_older_and_newer_pages() {
        let mut long = log(5);
        let (ids, first) = page(&long, &[("_limit", "2")], 100);
        assert_eq!(ids, ["4", "3"]);
        let (ids, second) =
            page(&long, &[("_limit", "2"), ("_cursor", first["cursor_next"].as_str().unwrap())], 100);
        assert_eq!(ids, ["2", "1"]);
        let (ids, last) =
            page(&long, &[("_limit", "2"), ("_cursor", second["cursor_next"].as_str().unwrap())], 100);
        assert_eq!((ids, &last["cursor_next"]), (vec!["0".to_owned()], &Value::Null));
        let newer = first["cursor_previous"].as_str().unwrap();
        assert!(page(&long, &[("_cursor", newer)], 100).0.is_empty());
        let Some(event) = log(6).events.pop_back() else { panic!("six events") };
        long.push(event);
        assert_eq!(page(&long, &[("_cursor", newer)], 100).0, ["5"]);
    }

    #[test]
    fn bad_parameters_are_refused() {
        for (name, value) in
            [("_limit", "51"), ("_limit", "x"), ("_cursor", "x"), ("date_updated__gte", "now")]
        {
            let parameters = [(name.to_owned(), value.to_owned())];
            assert!(log(1).page(&parameters, at(9)).is_err(), "{name}={value}");
        }
    }
}
