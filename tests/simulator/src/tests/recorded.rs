//! Replays recorded requests of the real Close: the simulator answers with the same status, headers and shape.
//!
//! The pairs are in `recorded/pairs.json`, each with its source. Ids, names and addresses of people are replaced. The
//! shape is the keys and types at each level, the notation of times, and the first sentence of each error text.

use std::collections::HashMap;

use jiff::SignedDuration;
use serde::Deserialize;

use super::*;
use crate::offline::Reply;
use crate::refusal::Object;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    name: String,
    /// Where it was recorded.
    source: String,
    /// When.
    recorded: String,
    /// Behaviours that differ from the default.
    #[serde(default)]
    behaviour: Object,
    /// Whether the rate limit is used up.
    #[serde(default)]
    limited: bool,
    key: Option<String>,
    /// Calls that make what the request needs. They and the request are sent in a British account.
    #[serde(default)]
    before: Vec<Call>,
    /// How long after the start the request is sent.
    #[serde(default)]
    after_seconds: i64,
    request: Call,
    answer: Answer,
    /// Keys that Close had not at that time, such as `phones.country`.
    #[serde(default)]
    newer: Vec<String>,
    /// Lists whose items the simulator does not have.
    #[serde(default)]
    items_differ: Vec<String>,
    /// Keys whose values are equal too.
    #[serde(default)]
    exact: Vec<String>,
    /// Whether the source shows only a part of the answer.
    #[serde(default)]
    part: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    method: String,
    path: String,
    body: Option<Value>,
    #[serde(default)]
    after_seconds: i64,
    /// Values of the answer, by pointer, for `{name}` in later calls.
    #[serde(default)]
    save: HashMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    status: u16,
    #[serde(default)]
    headers: HashMap<String, String>,
    body: Value,
}

fn pairs() -> Vec<Pair> {
    serde_json::from_str(include_str!("../../recorded/pairs.json")).unwrap()
}

/// Sends a call with the saved values in their places.
fn send(
    close: &mut Offline,
    call: &Call,
    key: &str,
    saved: &mut HashMap<String, String>,
    now: Timestamp,
) -> Reply {
    let fill = |text: &str| {
        saved.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
    };
    let body = call.body.as_ref().map(|body| serde_json::from_str(&fill(&body.to_string())).unwrap());
    let reply = close.ask(key, &call.method, &fill(&call.path), body.as_ref(), now);
    let answer: Value = serde_json::from_str(&reply.body).unwrap_or_default();
    for (name, pointer) in &call.save {
        let value = answer.pointer(pointer).and_then(Value::as_str);
        saved.insert(name.clone(), value.unwrap_or_else(|| panic!("{pointer}: {answer}")).to_owned());
    }
    reply
}

struct Comparison<'a> {
    pair: &'a Pair,
    differences: Vec<String>,
}

impl Comparison<'_> {
    fn compare(&mut self, recorded: &Value, answered: &Value, path: &str) {
        let named = |list: &[String]| list.iter().any(|name| name == path);
        match (recorded, answered) {
            (Value::Object(recorded), Value::Object(answered)) => {
                let below =
                    |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
                for (key, value) in recorded {
                    match answered.get(key) {
                        Some(answered) => self.compare(value, answered, &below(key)),
                        None => self.differences.push(format!("{} is missing", below(key))),
                    }
                }
                let is_new =
                    |key: &&String| !recorded.contains_key(*key) && !self.pair.newer.contains(&below(key));
                let new: Vec<_> = answered.keys().filter(is_new).map(|key| below(key)).collect();
                if !self.pair.part {
                    self.differences.extend(new.iter().map(|key| format!("{key} was not recorded")));
                }
            }
            (Value::Array(_), Value::Array(_)) if named(&self.pair.items_differ) => {}
            (Value::Array(recorded), Value::Array(answered)) => {
                let Some(first) = recorded.first() else {
                    if !answered.is_empty() && !self.pair.part {
                        self.differences.push(format!("{path} has items"));
                    }
                    return;
                };
                if answered.is_empty() {
                    self.differences.push(format!("{path} is empty"));
                }
                for item in answered {
                    self.compare(first, item, path);
                }
            }
            (Value::String(recorded), Value::String(answered)) => {
                let is_error = self.pair.answer.status >= 400;
                let digits = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "0");
                let sentence = |text: &str| text.split('.').next().unwrap_or_default().to_owned();
                let is_same = if is_error && recorded.contains(' ') {
                    digits(&sentence(recorded)) == digits(&sentence(answered))
                } else if recorded.contains('T') && recorded.parse::<jiff::civil::DateTime>().is_ok() {
                    digits(recorded) == digits(answered)
                } else {
                    !named(&self.pair.exact) || recorded == answered
                };
                if !is_same {
                    self.differences.push(format!("{path}: {recorded:?}, but {answered:?}"));
                }
            }
            (Value::Null, Value::Null)
            | (Value::Bool(_), Value::Bool(_))
            | (Value::Number(_), Value::Number(_)) => {}
            // Null is the absence of a value of any type.
            (Value::Null, Value::String(_)) | (Value::String(_), Value::Null) if !named(&self.pair.exact) => {
            }
            (recorded, answered) => self.differences.push(format!("{path}: {recorded}, but {answered}")),
        }
    }
}

#[test]
fn recorded_requests_are_answered_as_they_were() {
    let start: Timestamp = "2026-01-31T10:00:00Z".parse().unwrap();
    let mut differences = Vec::new();
    for pair in pairs() {
        let field = |id: &str, name: &str| CustomField::new(id, name, FieldKind::Text, Owner::Lead);
        let custom_fields = vec![
            field("lcf_offer", "Offer ID"),
            field("lcf_mixpanel", "Mixpanel ID"),
            field("lcf_analytics", "Google Analytics ID"),
        ];
        let mut settings = Settings { custom_fields, ..Settings::default() };
        settings.behaviour.set("country", "GB").unwrap();
        settings.behaviour.change(pair.behaviour.clone()).unwrap();
        if pair.limited {
            settings.limits.lead = Rate::new(0, 8);
        }
        let mut close = Offline::new(settings, start);
        let at = |seconds: i64| start + SignedDuration::from_secs(seconds);
        let mut saved = HashMap::new();
        for call in &pair.before {
            let reply = send(&mut close, call, "api_simulator.key", &mut saved, at(call.after_seconds));
            assert_eq!(reply.status, 200, "{}: {}", pair.name, reply.body);
        }
        let key = pair.key.as_deref().unwrap_or("api_simulator.key");
        let reply = send(&mut close, &pair.request, key, &mut saved, at(pair.after_seconds.max(2)));
        let answered: Value = serde_json::from_str(&reply.body).unwrap_or_default();
        let mut comparison = Comparison { pair: &pair, differences: Vec::new() };
        if reply.status != pair.answer.status {
            comparison.differences.push(format!("{}, but {}", pair.answer.status, reply.status));
        }
        comparison.compare(&pair.answer.body, &answered, "");
        for (name, value) in &pair.answer.headers {
            let shape = |text: &str| text.replace(|c: char| c.is_ascii_digit() || c == '.', "");
            let sent = reply.headers.iter().find(|(sent, _)| sent == name).map(|(_, value)| value.as_str());
            if sent.map(shape) != Some(shape(value)) {
                comparison.differences.push(format!("{name}: {value}, but {sent:?}"));
            }
        }
        differences.extend(comparison.differences.iter().map(|text| format!("{}: {text}", pair.name)));
    }
    assert!(differences.is_empty(), "{differences:#?}");
}

#[test]
fn every_recording_has_a_source_and_a_date() {
    let pairs = pairs();
    assert!(pairs.len() > 30);
    for Pair { name, source, recorded, .. } in pairs {
        assert!(source.contains('/') && recorded.starts_with("20"), "{name}");
    }
    // Ids of real organizations have 43 characters.
    let text = include_str!("../../recorded/pairs.json");
    let is_long = |word: &str| word.len() > 40 && word.chars().all(|c| c.is_ascii_alphanumeric());
    assert!(!text.split(|c: char| !c.is_ascii_alphanumeric()).any(is_long));
}
