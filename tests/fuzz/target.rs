//! The fuzz target: decodes a message and maps it to fields of Close.

use std::path::Path;
use std::sync::LazyLock;

use close_sync::config::{Destination, Layers, Need};
use close_sync::domain::event::Event;
use close_sync::domain::mapping::Mapping;
use close_sync::domain::record::{Channel, FieldId};
use close_sync::domain::schema::{CustomField, FieldKind, Schema, Status, User};

/// Two mappings: the default, and one that uses every feature.
static MAPPINGS: LazyLock<[Mapping; 2]> = LazyLock::new(|| {
    let all = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/mapping.toml");
    // For cargo-fuzz, the package is this folder.
    let alone = concat!(env!("CARGO_MANIFEST_DIR"), "/mapping.toml");
    let file = [all, alone].map(Path::new).into_iter().find(|file| file.exists());
    [None, file].map(|file| {
        let environment = [("CLOSE_API_KEY".to_owned(), "api_fuzz.key".to_owned())].into();
        let Destination { rules, .. } =
            Layers::load(file, &environment).unwrap().read(Need::All).unwrap().single().unwrap();
        Mapping::resolve(&rules, &schema()).unwrap()
    })
});

fn schema() -> Schema {
    let field = |name: &str, kind, multiple| CustomField {
        id: FieldId::parse(&format!("cf_{}", name.replace(' ', ""))).expect("an id"),
        name: name.to_owned(),
        kind,
        multiple,
        required: false,
    };
    let choices = || FieldKind::Choices(["Yes", "No", "free", "Größe L"].map(str::to_owned).into());
    Schema {
        lead: vec![
            field("Company ID", FieldKind::Text, false),
            field("Text", FieldKind::Text, false),
            field("Number", FieldKind::Number, false),
            field("Date", FieldKind::Date, false),
            field("Time", FieldKind::Datetime, false),
            field("Choice", choices(), false),
            field("Choices", choices(), true),
            field("Owner", FieldKind::User, false),
        ],
        contact: vec![
            field("User ID", FieldKind::Text, false),
            field("Notes", FieldKind::Textarea, false),
            field("Twin", FieldKind::Contact, true),
            field("Object", FieldKind::CustomObject, false),
        ],
        statuses: vec![Status { id: "stat_1".into(), label: "Potential".into() }],
        users: vec![User { id: "user_1".into(), name: "Ada".into(), email: "ada@close.test".into() }],
        ..Schema::default()
    }
}

/// Decodes and maps a message. Panics if the result is not valid.
pub(crate) fn decode_and_map(bytes: &[u8]) {
    let Ok(event) = Event::decode(bytes, 1 << 20) else { return };
    let _ = (event.time(), event.message_id());
    for mapping in &*MAPPINGS {
        let _ = mapping.not_for_close(&event);
        let Ok(desired) = mapping.apply(&event) else { continue };
        let identity = &desired.identity;
        assert!(identity.user_id.is_some() || identity.email.is_some(), "no identity: {desired:?}");
        let ids = [&identity.company_id, &identity.user_id, &identity.email].into_iter().flatten();
        ids.for_each(|id| assert!(!id.trim().is_empty() && id == id.trim(), "invalid id: {desired:?}"));
        let ids = [&identity.company_id, &identity.user_id, &identity.email].into_iter().flatten();
        ids.for_each(|id| assert!(id.chars().count() <= 255, "long id: {desired:?}"));
        for dropped in desired.dropped.iter().filter_map(|dropped| dropped.value.as_ref()) {
            assert!(dropped.to_string().len() < 8192, "a dropped value is kept whole: {dropped}");
        }
        for (field, wanted) in desired.lead.iter().chain(&desired.contact) {
            let value = &wanted.value;
            // Close accepts no objects, and empty text would clear the field (close-api.md §5).
            assert!(!value.is_object() && !value.is_null() && *value != "", "{field}: {value}");
            let name = ["name", "title"].contains(&field.to_string().as_str());
            let fits = value
                .as_str()
                .is_some_and(|text| text.chars().count() <= 1000 && !text.chars().any(char::is_control));
            assert!(!name || fits, "{field}: {value}");
        }
        for (channel, wanted) in &desired.channels {
            let value = wanted.value.as_str().unwrap();
            assert!(!value.is_empty() && (*channel != Channel::Email || value.contains('@')), "{value}");
        }
        assert_eq!(mapping.apply(&event).as_ref(), Ok(&desired), "mapping must be deterministic");
    }
}
