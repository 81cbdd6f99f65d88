//! Ways in which Close may behave, drawn at random. Whichever it is, a test must have the same result.

use std::collections::BTreeSet;

use close_sync_simulator::Behaviour;

/// For each behaviour the values to draw from, in JSON or as a text. Without any it keeps its default.
const DRAWN: [(&str, &[&str]); 33] = [
    // How long something lags: each test has its own.
    ("search_lag", &[]),
    ("creation_search_lag", &[]),
    ("custom_field_search_lag", &[]),
    ("read_lag", &[]),
    ("event_lag", &[]),
    ("event_data", &["kept", "hidden_after_an_hour"]),
    (
        "header_style",
        &[
            "comma",
            "semicolon",
            "semicolon_and_triple",
            "unreadable_and_triple",
            "legacy",
            "proxy",
            // Not `absent`: a client then keeps its own pace, which is slower than a test.
        ],
    ),
    ("rate_limit_body", &["nested", "flat", "empty", "text"]),
    ("retry_after", &["null", "0", "1"]),
    ("error_shape", &["nested", "plain", "dotted", "list", "detail"]),
    ("error_texts", &["cleancat", "pydantic"]),
    // In other words a record is not gone, but the way to Close is broken.
    ("missing_record", &[]),
    ("unknown_url", &["json", "html"]),
    ("unknown_selector", &["refused", "ignored"]),
    ("last_cursor", &["\"null\"", "empty", "absent"]),
    ("search_rows", &["fields", "only_ids"]),
    // Not `exact`: an address in another case would not be found, which `certify` reports as not supported.
    ("exact_value", &["folds_case", "refused"]),
    ("descending_cursor", &["loses_rows", "exact"]),
    ("missing_slash", &["not_found", "redirected"]),
    ("created_lead", &["whole", "without_contact_ids", "without_contacts"]),
    ("strict_contact_keys", &["false", "true"]),
    ("lists_from_index", &["false", "true"]),
    ("country", &["US", "DE"]),
    ("country_in_me", &["false", "true"]),
    ("times", &["utc", "zulu", "offset", "naive"]),
    ("numbers", &["number", "text"]),
    ("users", &["id", "object"]),
    ("lists", &["as_declared", "always_list", "never_list_of_one"]),
    ("lead_contacts", &["whole", "without_newest", "empty", "absent"]),
    // Not `null` and `missing`: lists that Close never shows are not written, and an event fails when nothing else tells
    // who a Contact is.
    ("contact_lists", &["whole", "null_in_leads", "missing_in_leads"]),
    // Values that Close loses, and fields that cannot be read, change the result.
    ("lossy_fields", &[]),
    ("null_members", &[]),
    ("required_fields", &[]),
];

/// Draws a value for each behaviour.
pub(crate) fn any(random: &mut fastrand::Rng) -> Behaviour {
    let mut close = Behaviour::default();
    for (key, values) in DRAWN {
        if let Some(value) = random.choice(values) {
            close.set(key, value).unwrap();
        }
    }
    close
}

#[test]
fn every_behaviour_is_drawn_or_left_alone_for_a_reason() {
    let known: BTreeSet<String> = Behaviour::default().fields().keys().cloned().collect();
    let listed: BTreeSet<String> = DRAWN.iter().map(|(key, _)| (*key).to_owned()).collect();
    assert_eq!(known, listed);
    let mut random = fastrand::Rng::with_seed(0);
    assert!((0..20).map(|_| any(&mut random)).any(|close| close != Behaviour::default()));
}
