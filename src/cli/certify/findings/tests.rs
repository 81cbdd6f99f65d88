use serde_json::{Value, json};

use super::*;
use crate::cli::certify::finding::Status;
use crate::cli::certify::observations::{
    ContactsForm, FieldObservation, HeaderForm, Kept, ListForm, NotFound, TimeForm,
};
use crate::cli::certify::script::{NATIONAL, WITH_EXTENSION, WITH_TRUNK_ZERO};
use crate::domain::schema::{Item, Problem, UnreadableItem};

type See = fn(&mut Observations);

const SECOND: Duration = Duration::from_secs(1);
const RUN: Run =
    Run { search_lag: Duration::from_secs(20), country: None, has_company_field: true, ended_early: false };

fn one(assumption: Assumption, see: impl FnOnce(&mut Observations)) -> Finding {
    let mut seen = Observations::default();
    see(&mut seen);
    let mut found = findings(&seen, RUN).into_iter();
    found.find(|finding| finding.assumption == assumption).unwrap()
}

#[test]
fn what_was_not_seen_is_unknown() {
    let found = findings(&Observations::default(), RUN);
    assert_eq!(found.len(), Assumption::VARIANTS.len() - 1, "no field is configured");
    assert!(found.iter().all(|finding| finding.status == Status::Unknown));
}

/// Another run shows only what this one could have seen.
#[test]
fn what_another_run_cannot_show_has_a_reason() {
    let again = |run: Run, assumption: Assumption, see: See| {
        let mut seen = Observations { has_contact: true, ..Observations::default() };
        see(&mut seen);
        not_seen(assumption, &seen, run) == not_seen(assumption, &seen, Run { ended_early: true, ..RUN })
    };
    assert!(again(RUN, Assumption::PutIsPatch, |_| {}));
    let without_field = Run { has_company_field: false, ..RUN };
    let cases: [(Run, Assumption, See); 11] = [
        (without_field, Assumption::SearchKey, |_| {}),
        (without_field, Assumption::SearchChanged, |_| {}),
        (without_field, Assumption::ExactSearch, |_| {}),
        (RUN, Assumption::ExactSearch, |seen| seen.search_changed = Some(Delay::Longer(SECOND))),
        (RUN, Assumption::EmailSearch, |seen| seen.exact = Some(Exact::Refused)),
        (RUN, Assumption::DescendingCursor, |seen| seen.search_created = Some(Delay::Longer(SECOND))),
        (RUN, Assumption::SearchRows, |seen| seen.search_created = Some(Delay::Longer(SECOND))),
        (RUN, Assumption::PhoneCountry, |_| {}),
        (RUN, Assumption::BadPhone, |seen| seen.has_contact = false),
        (RUN, Assumption::ErrorTexts, |seen| seen.bad_email = Some(Refusal::Kept)),
        (RUN, Assumption::LastCursor, |_| {}),
    ];
    for (run, assumption, see) in cases {
        assert!(!again(run, assumption, see), "{assumption:?}");
    }
}

#[test]
fn the_country_of_phones_is_compared_with_the_setting() {
    let seen =
        Observations { phones: vec![(NATIONAL, Some("+448004445555".into()))], ..Observations::default() };
    let line = "close.country = \"GB\"";
    for (country, status, setting) in [
        (None, Status::AsAssumed, None),
        (Some("GB"), Status::AsAssumed, None),
        (Some("DE"), Status::ChangeSetting, Some(line)),
    ] {
        let run = Run { country: country.and_then(Country::parse), ..RUN };
        let mut found = findings(&seen, run).into_iter();
        let finding = found.find(|finding| finding.assumption == Assumption::PhoneCountry).unwrap();
        assert_eq!((finding.status, finding.setting.as_deref()), (status, setting), "{country:?}");
    }
}

#[test]
fn a_lag_of_search_is_compared_with_the_setting() {
    for (delay, status, setting) in [
        (Delay::Below(20 * SECOND), Status::AsAssumed, None),
        // It says nothing about the setting.
        (Delay::Below(21 * SECOND), Status::Unknown, None),
        (Delay::Within(20 * SECOND), Status::AsAssumed, None),
        (Delay::Within(21 * SECOND), Status::ChangeSetting, Some("close.search_lag = \"43s\"")),
        (Delay::Longer(19 * SECOND), Status::Unknown, None),
        (Delay::Longer(60 * SECOND), Status::ChangeSetting, Some("close.search_lag = \"300s\"")),
    ] {
        let finding = one(Assumption::SearchChanged, |seen| seen.search_changed = Some(delay));
        assert_eq!((finding.status, finding.setting.as_deref()), (status, setting), "{delay:?}");
        assert!(finding.behaviour.contains_key("custom_field_search_lag"));
    }
}

#[test]
fn a_lag_below_the_first_look_is_not_zero() {
    let short = Delay::Below(SECOND * 3 / 10);
    let finding = one(Assumption::SearchCreated, |seen| seen.search_created = Some(short));
    assert_eq!(json!(finding.behaviour), json!({"search_lag": "0.3s", "creation_search_lag": "0.3s"}));
    // A simulator whose reads lag is not like an organization whose first read was fresh.
    let finding = one(Assumption::ReadChanged, |seen| seen.read_changed = Some(short));
    assert_eq!((finding.status, json!(finding.behaviour)), (Status::AsAssumed, json!({})));
    let finding = one(Assumption::EventLog, |seen| seen.event = Some(short));
    assert_eq!((finding.status, json!(finding.behaviour)), (Status::AsAssumed, json!({})));
}

#[test]
fn what_close_sync_cannot_work_with_is_not_supported() {
    let cases: [(Assumption, See); 10] = [
        (Assumption::ContactLists, |seen| seen.unknown_lists = Some(vec![("emails", ListForm::Null)])),
        (Assumption::MissingRecord, |seen| seen.missing_record = Some(NotFound::NotJson)),
        (Assumption::UnknownUrl, |seen| seen.unknown_url = Some(NotFound::Record)),
        (Assumption::TimeNotation, |seen| seen.times = [TimeForm::Unreadable].into()),
        (Assumption::LeadContacts, |seen| seen.read_lists = Some(ContactsForm::Neither)),
        (Assumption::ExactSearch, |seen| seen.exact = Some(Exact::FindsNothing)),
        (Assumption::EmailSearch, |seen| seen.email_search = Some(false)),
        (Assumption::PutIsPatch, |seen| seen.is_patch = Some(false)),
        (Assumption::BadPhone, |seen| seen.bad_phone = Some(Refusal::OtherStatus)),
        (Assumption::FieldReadBack, |seen| {
            let (setting, kind) = ("mapping.lead.cf_1".into(), "text".into());
            seen.fields = vec![FieldObservation {
                setting,
                key: "custom.cf_1".into(),
                kind,
                sent: "x".into(),
                kept: Kept::Missing,
            }];
        }),
    ];
    for (assumption, see) in cases {
        assert_eq!(one(assumption, see).status, Status::NotSupported, "{assumption:?}");
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn the_simulator_learns_what_was_found() {
    let cases: [(Assumption, See, Status, Value); 15] = [
        (
            Assumption::ContactLists,
            |seen| seen.unknown_lists = Some(vec![("phones", ListForm::Missing)]),
            Status::Handled,
            json!({"contact_lists": "missing"}),
        ),
        (
            Assumption::EventData,
            |seen| {
                (seen.event_has_data, seen.old_event_has_data) = (Some(true), Some(false));
            },
            Status::Handled,
            json!({"event_data": "hidden_after_an_hour"}),
        ),
        (
            Assumption::EventData,
            |seen| {
                (seen.event_has_data, seen.old_event_has_data) = (Some(true), Some(true));
            },
            Status::AsAssumed,
            json!({"event_data": "kept"}),
        ),
        (
            Assumption::RateLimitHeader,
            |seen| {
                seen.headers = [HeaderForm::Semicolon, HeaderForm::Absent].into();
            },
            Status::Handled,
            json!({"header_style": "absent"}),
        ),
        (
            Assumption::RateLimitHeader,
            |seen| {
                seen.headers = [HeaderForm::Semicolon].into();
            },
            Status::AsAssumed,
            json!({"header_style": "semicolon"}),
        ),
        (
            Assumption::TimeNotation,
            |seen| {
                seen.times = [TimeForm::OtherOffset].into();
            },
            Status::Handled,
            json!({"times": "offset"}),
        ),
        (
            Assumption::ListEndpoint,
            |seen| {
                (seen.list_shows_new, seen.search_created) = (Some(true), Some(Delay::Within(SECOND)));
            },
            Status::AsAssumed,
            json!({"lists_from_index": false}),
        ),
        (
            Assumption::ListEndpoint,
            |seen| {
                (seen.list_shows_new, seen.search_created) = (Some(true), Some(Delay::Below(SECOND)));
            },
            Status::AsAssumed,
            json!({}),
        ),
        (
            Assumption::EventLog,
            |seen| {
                seen.event = Some(Delay::Within(SECOND * 3 / 2));
            },
            Status::Handled,
            json!({"event_lag": "1.5s"}),
        ),
        (
            Assumption::PhoneCountry,
            |seen| {
                seen.phones = vec![(NATIONAL, Some("+448004445555".into()))];
            },
            Status::AsAssumed,
            json!({"country": "GB"}),
        ),
        (Assumption::PhoneCountry, |seen| seen.phones = vec![(NATIONAL, None)], Status::Handled, json!({})),
        (
            Assumption::PhoneRewriting,
            |seen| {
                let kept = |text: &str| Some(text.to_owned());
                seen.phones = vec![
                    (WITH_TRUNK_ZERO, kept("+447700900123")),
                    (WITH_EXTENSION, kept("+18004445555x123")),
                ];
            },
            Status::AsAssumed,
            json!({}),
        ),
        (
            Assumption::FieldReadBack,
            |seen| {
                let (setting, kind) = ("mapping.lead.cf_1".into(), "user".into());
                let kept = Kept::OtherNotation(json!({"id": "user_1"}));
                seen.fields = vec![FieldObservation {
                    setting,
                    key: "custom.cf_1".into(),
                    kind,
                    sent: "user_1".into(),
                    kept,
                }];
            },
            Status::Handled,
            json!({"users": "object"}),
        ),
        (
            Assumption::FieldReadBack,
            |seen| {
                let (setting, kind) = ("mapping.lead.cf_1".into(), "custom_object".into());
                let kept = Kept::NotTried("no custom object");
                let key = "custom.cf_1".into();
                seen.fields = vec![FieldObservation { setting, key, kind, sent: Value::Null, kept }];
            },
            Status::Unknown,
            json!({}),
        ),
        (
            Assumption::Schema,
            |seen| {
                let item = |id: Option<&str>, problem| UnreadableItem {
                    item: Item::LeadField,
                    id: id.map(str::to_owned),
                    name: Some("Plan".into()),
                    problem,
                };
                seen.unreadable = Some(vec![item(Some("cf_1"), Problem::Choices), item(None, Problem::Id)]);
            },
            Status::Handled,
            json!({"null_members": ["cf_1.choices"]}),
        ),
    ];
    for (assumption, see, status, behaviour) in cases {
        let finding = one(assumption, see);
        assert_eq!((finding.status, json!(finding.behaviour)), (status, behaviour), "{assumption:?}");
    }
}
