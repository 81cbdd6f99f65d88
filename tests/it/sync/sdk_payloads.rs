//! Payloads of the public SDKs, recorded in `tests/payloads`, mapped with the default settings.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use close_sync::config::{Config, Need};
use close_sync::domain::event::Event;
use close_sync::domain::mapping::Mapping;
use close_sync::domain::record::FieldId;
use close_sync::domain::schema::{CustomField, FieldKind, Schema};
use close_sync::outcome::Skip;

/// The default settings, with both lookup fields.
fn defaults() -> Mapping {
    let environment = [
        ("CLOSE_API_KEY", "api_k"),
        ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_company"),
        ("CLOSE_CONTACT_USER_ID_FIELD", "cf_user"),
    ];
    let environment: HashMap<String, String> =
        environment.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let text = |id: &str, name: &str| CustomField {
        id: FieldId::parse(id).unwrap(),
        name: name.to_owned(),
        kind: FieldKind::Text,
        multiple: false,
        required: false,
    };
    let schema = Schema {
        lead: vec![text("cf_company", "Company ID")],
        contact: vec![text("cf_user", "User ID")],
        ..Schema::default()
    };
    let rules = Config::load(None, &environment, Need::All).unwrap().single().unwrap().rules;
    Mapping::resolve(&rules, &schema).unwrap()
}

/// One line with the result of mapping.
fn read(mapping: &Mapping, body: &[u8]) -> String {
    let event = match Event::decode(body, 1 << 20) {
        Ok(event) => event,
        Err(malformed) => return format!("malformed: {malformed}"),
    };
    if let Some(reason) = mapping.not_for_close(&event) {
        return format!("skipped: {}", Skip::Event(reason).label());
    }
    match mapping.apply(&event) {
        Err(no_identity) => format!("dead letter: {no_identity}"),
        Ok(desired) => {
            let mut text = String::new();
            for (field, wanted) in &desired.lead {
                let _ = write!(text, "lead {field}={} ", wanted.value);
            }
            for (field, wanted) in &desired.contact {
                let _ = write!(text, "contact {field}={} ", wanted.value);
            }
            for (channel, wanted) in &desired.channels {
                let _ = write!(text, "{channel}+{} ", wanted.value);
            }
            for dropped in &desired.dropped {
                let _ = write!(text, "without {} ({}) ", dropped.field, dropped.reason.label());
            }
            text.trim_end().to_owned()
        }
    }
}

#[test]
fn payloads_of_the_public_sdks_are_mapped_correctly() {
    let mapping = defaults();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/payloads");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "ndjson"));
    files.sort();
    assert_eq!(files.len(), 9);
    let mut text = String::new();
    for file in files {
        let _ = writeln!(text, "{}", file.file_name().unwrap().display());
        let bytes = std::fs::read(&file).unwrap();
        for (number, line) in (1..).zip(bytes.trim_ascii_end().split(|byte| *byte == b'\n')) {
            let _ = writeln!(text, "{number:3} {}", read(&mapping, line));
        }
    }
    insta::assert_snapshot!(text);
}
