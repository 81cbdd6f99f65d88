//! The contract for producers in `deploy/schema` agrees with the worker.

use std::path::Path;

use boon::{Compiler, SchemaIndex, Schemas};
use close_sync::config::{Config, Need};
use close_sync::domain::event::{Event, split};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const IDENTIFY: &str = include_str!("../../../deploy/schema/identify.json");
const ASYNCAPI: &str = include_str!("../../../deploy/schema/asyncapi.json");

/// A JSON schema.
pub(crate) struct Schema {
    schemas: Schemas,
    index: SchemaIndex,
}

impl Schema {
    pub(crate) fn of(text: &str) -> Self {
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler.add_resource("schema.json", serde_json::from_str(text).unwrap()).unwrap();
        let index = compiler.compile("schema.json", &mut schemas).unwrap();
        Self { schemas, index }
    }

    pub(crate) fn fits(&self, value: &Value) -> bool {
        self.schemas.validate(value, self.index).is_ok()
    }
}

/// Whether the worker can decode it.
fn is_decoded(value: &Value) -> bool {
    Event::decode(value.to_string().as_bytes(), usize::MAX).is_ok()
}

#[test]
fn the_schema_accepts_exactly_the_sdk_payloads_that_the_worker_decodes() {
    let schema = Schema::of(IDENTIFY);
    let mut seen = 0;
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/payloads")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "ndjson") {
            for line in split(&std::fs::read(&path).unwrap()) {
                let Ok(value) = serde_json::from_slice(&line) else { continue };
                seen += 1;
                assert_eq!(schema.fits(&value), is_decoded(&value), "{}: {value}", path.display());
            }
        }
    }
    assert!(seen > 100, "{seen}");
    for example in serde_json::from_str::<Value>(IDENTIFY).unwrap()["examples"].as_array().unwrap() {
        assert!(schema.fits(example) && is_decoded(example), "{example}");
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f32>().prop_map(|number| json!(number)),
        "[a-z@.]{0,8}".prop_map(Value::from),
        Just(json!([])),
        Just(json!([{"type": "identify"}])),
        Just(json!({})),
        Just(json!({"id": 1})),
    ]
}

proptest! {
    #[test]
    fn the_schema_accepts_exactly_the_events_that_the_worker_decodes(
        parts in proptest::collection::btree_map(
            prop_oneof![
                Just("type"), Just("traits"), Just("userId"), Just("integrations"), Just("batch"),
                Just("messageId"), Just("timestamp"), Just("other"),
            ],
            any_value(),
            0..8,
        ),
        other in any_value(),
    ) {
        thread_local!(static SCHEMA: Schema = Schema::of(IDENTIFY));
        let event = Value::Object(parts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>());
        for value in [event, other] {
            prop_assert_eq!(SCHEMA.with(|schema| schema.fits(&value)), is_decoded(&value), "{}", value);
        }
    }
}

#[test]
fn the_asyncapi_document_names_the_default_exchange() {
    let document: Value = serde_json::from_str(ASYNCAPI).unwrap();
    let defaults = Config::load(None, &[].into(), Need::Broker).unwrap().single().unwrap();
    let exchange = &document["channels"]["identify"]["bindings"]["amqp"]["exchange"];
    assert_eq!(exchange["name"], defaults.amqp.exchange.as_str());
    assert_eq!((&exchange["type"], &exchange["durable"]), (&json!("topic"), &json!(true)));
    // Every reference resolves.
    let mut open = vec![&document];
    while let Some(value) = open.pop() {
        if let Some(target) = value.get("$ref").and_then(Value::as_str) {
            match target.strip_prefix('#') {
                Some(pointer) => assert!(document.pointer(pointer).is_some(), "{target}"),
                None => assert!(["./identify.json", "./outcome.json"].contains(&target), "{target}"),
            }
        }
        match value {
            Value::Array(items) => open.extend(items),
            Value::Object(entries) => open.extend(entries.values()),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
}
