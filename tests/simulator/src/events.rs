//! The event log behind `GET /event/` (close-api.md §11, §15 row 15, and
//! <https://developer.close.com/api/resources/events/list>).
//!
//! The newest events are not settled: an event may appear late (`event_lag`), and a later change of the same object
//! within five minutes updates the event of the earlier one.

use std::collections::{BTreeSet, VecDeque};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::behaviour::EventData;
use crate::ids::{format_naive, parse_timestamp};
use crate::refusal::Refusal;

#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) id: String,
    pub(crate) object_type: &'static str,
    pub(crate) object_id: String,
    pub(crate) lead_id: Option<String>,
    pub(crate) action: &'static str,
    pub(crate) created: Timestamp,
    /// When the last action happened that the event is about.
    pub(crate) updated: Timestamp,
    pub(crate) visible: Timestamp,
    /// The other keys: `data`, `previous_data`, `changed_fields`, `meta` and more.
    pub(crate) details: Value,
}

/// How long a later change of the same object still updates an event.
const UNSETTLED: SignedDuration = SignedDuration::from_mins(5);
/// How long users without admin rights see `data` and `previous_data`.
const PRIVATE_AFTER: SignedDuration = SignedDuration::from_hours(1);

impl Event {
    fn json(&self, data: EventData, now: Timestamp) -> Value {
        let mut event = self.details.clone();
        if data == EventData::HiddenAfterAnHour && now.duration_since(self.updated) > PRIVATE_AFTER {
            event["data"] = Value::Null;
            event["previous_data"] = Value::Null;
        }
        event["id"] = json!(self.id);
        event["object_type"] = json!(self.object_type);
        event["object_id"] = json!(self.object_id);
        event["lead_id"] = json!(self.lead_id);
        event["action"] = json!(self.action);
        // Unlike the dates of records, these have no offset.
        event["date_created"] = json!(format_naive(self.created));
        event["date_updated"] = json!(format_naive(self.updated));
        event
    }

    /// Whether a later event only continues this one.
    fn takes_in(&self, later: &Self) -> bool {
        (self.action, later.action) == ("updated", "updated")
            && self.object_id == later.object_id
            && later.updated.duration_since(self.updated) < UNSETTLED
    }

    /// Two updates as one event: what changed in either, the values before the first, the object after the last.
    fn merged(self, later: Self) -> Self {
        let mut details = later.details;
        let mut changed: Vec<Value> = [&self.details["changed_fields"], &details["changed_fields"]]
            .into_iter()
            .flat_map(|fields| fields.as_array().into_iter().flatten().cloned())
            .collect();
        changed.sort_by_key(ToString::to_string);
        changed.dedup();
        details["changed_fields"] = changed.into();
        let previous = self.details["previous_data"].as_object().into_iter().flatten();
        for (field, value) in previous {
            details["previous_data"][field] = value.clone();
        }
        Self { id: self.id, created: self.created, details, ..later }
    }
}

/// The most recent events, oldest first. Close keeps 30 days; the simulator keeps a fixed number.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
    /// With their positions, which cursors name. The position of an event changes when it is updated.
    events: VecDeque<(u64, Event)>,
    next: u64,
}

/// The position and direction of a cursor.
#[derive(Clone, Copy)]
enum Bound {
    /// Events before this position.
    Older(u64),
    /// Events at or after this position.
    Newer(u64),
}

impl EventLog {
    const KEPT: usize = 10_000;

    pub(crate) fn push(&mut self, mut event: Event) {
        let unsettled = self.events.iter().rposition(|(_, known)| known.takes_in(&event));
        if let Some((_, known)) = unsettled.and_then(|index| self.events.remove(index)) {
            event = known.merged(event);
        }
        if self.events.len() == Self::KEPT {
            self.events.pop_front();
        }
        self.events.push_back((self.next, event));
        self.next += 1;
    }

    /// One page for the parameters of a query string, newest first.
    pub(crate) fn page(
        &self,
        parameters: &[(String, String)],
        data: EventData,
        now: Timestamp,
    ) -> Result<Value, Refusal> {
        let filter = Filter::parse(parameters)?;
        let is_shown = |(position, event): &&(u64, Event)| {
            event.visible <= now && filter.includes(*position) && filter.matches(event)
        };
        let mut found: Vec<&(u64, Event)> = self.events.iter().filter(is_shown).collect();
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
            None => Some(self.next),
        });
        Ok(json!({
            "data": found.iter().map(|(_, event)| event.json(data, now)).collect::<Vec<_>>(),
            "cursor_next": older.map(|position| format!("older-{position}")),
            "cursor_previous": newer.map(|position| format!("newer-{position}")),
        }))
    }
}

/// The combinations of filters that Close supports. Dates, `_limit` and `_cursor` may be added to each.
const COMBINATIONS: [&[&str]; 16] = [
    &[],
    &["lead_id"],
    &["user_id"],
    &["request_id"],
    &["object_type", "object_id"],
    &["object_type", "action"],
    &["object_id", "action"],
    &["lead_id", "object_type"],
    &["lead_id", "object_type", "action"],
    &["lead_id", "user_id"],
    &["lead_id", "user_id", "object_type"],
    &["lead_id", "user_id", "object_type", "action"],
    &["user_id", "object_id"],
    &["user_id", "object_id", "action"],
    &["user_id", "object_type"],
    &["user_id", "object_type", "action"],
];

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
                _ => match name.strip_prefix("date_updated__") {
                    Some(comparison @ ("gt" | "gte" | "lt" | "lte")) => {
                        filter.dates.push((comparison, parse_timestamp(value).ok_or_else(malformed)?));
                    }
                    Some(_) | None => return Err(malformed()),
                },
            }
        }
        let names: BTreeSet<&str> = filter.equal.iter().map(|(name, _)| *name).collect();
        if !COMBINATIONS.iter().any(|known| known.iter().copied().collect::<BTreeSet<_>>() == names) {
            let names: Vec<&str> = names.into_iter().collect();
            let text = format!("This combination of filters is not supported: {}.", names.join(", "));
            return Err(Refusal::Malformed(text));
        }
        if filter.bound.is_some() {
            // A cursor replaces the dates.
            filter.dates.clear();
        }
        Ok(filter)
    }

    fn includes(&self, position: u64) -> bool {
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
            let (at, bound) = (event.updated.as_millisecond(), timestamp.as_millisecond());
            match *comparison {
                "gt" => at > bound,
                "gte" => at >= bound,
                "lt" => at < bound,
                _ => at <= bound,
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
                created: at(n),
                updated: at(n),
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
        let page = log.page(&parameters, EventData::Kept, at(now)).unwrap();
        let ids = page["data"].as_array().unwrap().iter();
        (ids.map(|event| event["id"].as_str().unwrap().to_owned()).collect(), page)
    }

    #[test]
    fn filters_narrow_newest_first() {
        let log = log(7);
        for (query, now, expected) in [
            (&[][..], 100, &["6", "5", "4", "3", "2", "1", "0"][..]),
            (&[], 3, &["2", "1", "0"]), // the others are not visible yet
            (&[("object_type", "contact"), ("action", "created")], 100, &["6", "3", "0"]),
            (&[("object_type", "contact"), ("lead_id", "lead_0")], 100, &["6", "0"]),
            (&[("action", "deleted"), ("object_type", "lead")], 100, &[]),
            (&[("user_id", "user_2")], 100, &[]),
            (&[("object_id", "lead_4"), ("action", "created")], 100, &["4"]),
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
        let Some((_, event)) = log(6).events.pop_back() else { panic!("six events") };
        long.push(event);
        assert_eq!(page(&long, &[("_cursor", newer)], 100).0, ["5"]);
    }

    #[test]
    fn bad_parameters_are_refused() {
        for (name, value) in [
            ("_limit", "51"),
            ("_limit", "x"),
            ("_cursor", "x"),
            ("date_updated__gte", "now"),
            ("_skip", "1"),
        ] {
            let parameters = [(name.to_owned(), value.to_owned())];
            assert!(log(1).page(&parameters, EventData::Kept, at(9)).is_err(), "{name}={value}");
        }
    }

    #[test]
    fn only_documented_combinations_of_filters_are_supported() {
        let names = ["object_type", "object_id", "lead_id", "action", "user_id", "request_id"];
        let mut n_supported = 0;
        for chosen in 0..1_usize << names.len() {
            let chosen = names.iter().enumerate().filter(|(index, _)| chosen >> index & 1 == 1);
            let parameters: Vec<_> = chosen.map(|(_, name)| ((*name).to_owned(), "x".to_owned())).collect();
            n_supported += usize::from(log(1).page(&parameters, EventData::Kept, at(9)).is_ok());
        }
        assert_eq!(n_supported, COMBINATIONS.len());
        for alone in ["action", "object_type", "object_id"] {
            let parameters = [(alone.to_owned(), "x".to_owned())];
            assert!(log(1).page(&parameters, EventData::Kept, at(9)).is_err(), "{alone}");
        }
    }

    #[test]
    fn updates_within_five_minutes_are_one_event() {
        let update = |id: &str, field: &str, second: i64| Event {
            id: id.into(),
            object_type: "lead",
            object_id: "lead_1".into(),
            lead_id: Some("lead_1".into()),
            action: "updated",
            created: at(second),
            updated: at(second),
            visible: at(second),
            details: json!({"changed_fields": [field], "previous_data": {field: id}, "data": {"id": id}}),
        };
        let mut log = log(1);
        log.push(update("a", "name", 10));
        log.push(update("b", "url", 200));
        log.push(update("c", "name", 499));
        log.push(update("d", "name", 799));
        let (ids, page) = page(&log, &[], 1000);
        assert_eq!(ids, ["d", "a", "0"]);
        let a = &page["data"][1];
        assert_eq!(a["changed_fields"], json!(["name", "url"]));
        assert_eq!(a["previous_data"], json!({"name": "a", "url": "b"}), "before the first change");
        assert_eq!(a["data"]["id"], "c");
        assert_eq!(
            (&a["date_created"], &a["date_updated"]),
            (&json!("1970-01-01T00:00:10.000000"), &json!("1970-01-01T00:08:19.000000")),
            "without an offset"
        );
    }

    #[test]
    fn the_data_of_old_events_may_be_hidden() {
        let mut log = EventLog::default();
        let details = json!({"data": {"id": "lead_1"}, "previous_data": {}});
        let event = Event { details, ..super::tests::log(1).events.pop_back().unwrap().1 };
        log.push(event);
        for (data, now, shown) in [
            (EventData::Kept, 10_000, true),
            (EventData::HiddenAfterAnHour, 3600, true),
            (EventData::HiddenAfterAnHour, 3601, false),
        ] {
            let page = log.page(&[], data, at(now)).unwrap();
            assert_eq!(page["data"][0]["data"].is_object(), shown, "{data:?} {now}");
        }
    }
}
