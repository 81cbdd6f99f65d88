//! What the observations mean: each assumption about Close, what was found, and what follows. Pure.

use std::time::Duration;

use strum::VariantArray;

use crate::cli::certify::assumption::Assumption;
use crate::cli::certify::finding::{Finding, Found, Status};
use crate::cli::certify::observations::{
    ContactsForm, Delay, ErrorTexts, Exact, HeaderForm, LastCursor, ListForm, NotFound, Observations,
    Refusal, TimeForm,
};
use crate::cli::certify::values;
use crate::domain::phone::Country;

/// The settings that findings are compared with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Configured {
    pub(super) search_lag: Duration,
    pub(super) country: Option<Country>,
}

/// One finding for each assumption, and one for each configured field.
pub(super) fn findings(seen: &Observations, configured: Configured) -> Vec<Finding> {
    let of = |assumption: &Assumption| -> Vec<Finding> {
        if *assumption == Assumption::FieldReadBack {
            return seen.fields.iter().map(values::field).collect();
        }
        let found = found(*assumption, seen, configured).unwrap_or_else(Found::unknown);
        vec![found.of(*assumption, None)]
    };
    Assumption::VARIANTS.iter().flat_map(of).collect()
}

fn found(assumption: Assumption, seen: &Observations, configured: Configured) -> Option<Found> {
    match assumption {
        Assumption::MissingRecord => seen.missing_record.map(missing_record),
        Assumption::UnknownUrl => seen.unknown_url.map(unknown_url),
        Assumption::MissingSlash => seen.missing_slash.map(missing_slash),
        Assumption::RateLimitHeader => headers(seen),
        Assumption::TimeNotation => times(seen),
        Assumption::CreatedLead => seen.created_lists.map(created_lists),
        Assumption::LeadContacts => seen.read_lists.map(read_lists),
        Assumption::ContactLists => seen.unknown_lists.as_deref().map(contact_lists),
        Assumption::ListEndpoint => list_endpoint(seen),
        Assumption::ReadCreated => seen.read_created.map(|delay| read(delay, "the new record")),
        Assumption::ReadChanged => {
            seen.read_changed.map(|delay| read(delay, "the change").like("read_lag", lag(delay)))
        }
        Assumption::ReadDeleted => seen.read_deleted.map(|delay| read(delay, "the deletion")),
        Assumption::SearchCreated => seen.search_created.map(|delay| {
            search(delay, configured).like("search_lag", lag(delay)).like("creation_search_lag", lag(delay))
        }),
        Assumption::SearchKey => seen.search_key.map(|delay| search(delay, configured)),
        Assumption::SearchChanged => seen
            .search_changed
            .map(|delay| search(delay, configured).like("custom_field_search_lag", lag(delay))),
        Assumption::EventLog => seen.event.map(event_log),
        Assumption::EventData => event_data(seen),
        Assumption::ExactSearch => seen.exact.map(exact),
        Assumption::EmailSearch => seen.email_search.map(email_search),
        Assumption::DescendingCursor => seen.descending.map(descending),
        Assumption::PutIsPatch => seen.is_patch.map(put_is_patch),
        Assumption::PhoneRewriting => values::phone_rewriting(seen),
        Assumption::PhoneCountry => values::phone_country(seen, configured.country),
        Assumption::BadPhone => seen.bad_phone.map(|form| values::refusal(form, "phone")),
        Assumption::BadEmail => seen.bad_email.map(|form| {
            let found = values::refusal(form, "email address");
            match form {
                Refusal::Nested
                | Refusal::Plain
                | Refusal::Dotted
                | Refusal::List
                | Refusal::General
                | Refusal::Vague
                | Refusal::Detail => found.like("error_shape", <&str>::from(form)),
                Refusal::OnlyList
                | Refusal::NotJson
                | Refusal::Kept
                | Refusal::LeftOut
                | Refusal::OtherStatus => found,
            }
        }),
        Assumption::ErrorTexts => seen.error_texts.map(error_texts),
        Assumption::LastCursor => seen.last_cursor.map(last_cursor),
        Assumption::SearchRows => seen.rows_have_fields.map(search_rows),
        Assumption::UnknownSelector => seen.unknown_selector_refused.map(unknown_selector),
        Assumption::UnknownKey => seen.unknown_key_refused.map(unknown_key),
        // A finding for each field.
        Assumption::FieldReadBack => None,
    }
}

fn missing_record(form: NotFound) -> Found {
    let found = Found::new;
    match form {
        NotFound::Record => {
            found(Status::AsAssumed, "it does", "a deleted Lead is noticed").like("missing_record", "words")
        }
        NotFound::Url | NotFound::OtherJson | NotFound::NotJson => {
            let found = found(
                Status::NotSupported,
                "another text",
                "close-sync does not take a record for deleted; messages for deleted records are retried and then \
                 dead-lettered",
            );
            match form {
                NotFound::OtherJson => found.like("missing_record", "other_words"),
                NotFound::NotJson => found.like("missing_record", "html"),
                NotFound::Record | NotFound::Url | NotFound::OtherStatus => found,
            }
        }
        NotFound::OtherStatus => found(
            Status::NotSupported,
            "not a 404",
            "messages for deleted records are retried and then dead-lettered",
        ),
    }
}

fn unknown_url(form: NotFound) -> Found {
    match form {
        NotFound::Url => Found::new(
            Status::AsAssumed,
            "it does",
            "a wrong close.api_url is not taken for a deleted record",
        )
        .like("unknown_url", "json"),
        NotFound::Record => Found::new(
            Status::NotSupported,
            "the text of a missing record",
            "with a wrong route or proxy, close-sync would take records for deleted and create them again",
        ),
        NotFound::OtherJson | NotFound::NotJson | NotFound::OtherStatus => {
            let found = Found::new(
                Status::Handled,
                "another answer",
                "close-sync retries and takes no record for deleted",
            );
            if form == NotFound::NotJson { found.like("unknown_url", "html") } else { found }
        }
    }
}

fn missing_slash(status: u16) -> Found {
    let meaning = "close-sync always sends the slash";
    match status {
        404 => Found::new(Status::AsAssumed, "404", meaning).like("missing_slash", "not_found"),
        300..=399 => {
            Found::new(Status::AsAssumed, status.to_string(), meaning).like("missing_slash", "redirected")
        }
        other => Found::new(Status::Handled, other.to_string(), meaning),
    }
}

fn headers(seen: &Observations) -> Option<Found> {
    let names: Vec<&str> = seen.headers.iter().map(|form| (*form).into()).collect();
    let worst = seen.headers.iter().max_by_key(|form| match form {
        HeaderForm::Absent => 2,
        HeaderForm::Unreadable | HeaderForm::UnreadableAndTriple => 1,
        HeaderForm::Comma
        | HeaderForm::Semicolon
        | HeaderForm::SemicolonAndTriple
        | HeaderForm::Triple
        | HeaderForm::Legacy
        | HeaderForm::Proxy => 0,
    })?;
    let (status, meaning) = match worst {
        HeaderForm::Absent => (
            Status::Handled,
            "some answers have none; close-sync keeps its own cautious pace and slows down on a 429",
        ),
        HeaderForm::Unreadable | HeaderForm::UnreadableAndTriple => {
            (Status::Handled, "close-sync reads the other headers, or keeps its own cautious pace")
        }
        HeaderForm::Comma
        | HeaderForm::Semicolon
        | HeaderForm::SemicolonAndTriple
        | HeaderForm::Triple
        | HeaderForm::Legacy
        | HeaderForm::Proxy => (Status::AsAssumed, "close-sync uses the whole limit and avoids a 429"),
    };
    let found = Found::new(status, names.join(", "), meaning);
    let has_no_name = matches!(worst, HeaderForm::Unreadable | HeaderForm::Triple);
    Some(if has_no_name { found } else { found.like("header_style", <&str>::from(worst)) })
}

fn times(seen: &Observations) -> Option<Found> {
    let names: Vec<&str> = seen.times.iter().map(|form| (*form).into()).collect();
    if names.is_empty() {
        return None;
    }
    let meaning = "close-sync compares instants";
    let status = if seen.times.contains(&TimeForm::Unreadable) {
        Status::NotSupported
    } else if seen.times.iter().all(|form| matches!(form, TimeForm::Utc | TimeForm::Zulu)) {
        Status::AsAssumed
    } else {
        Status::Handled
    };
    let found = Found::new(status, names.join(", "), meaning);
    let form = match seen.times.iter().next() {
        Some(TimeForm::OtherOffset) => Some("offset"),
        Some(form @ (TimeForm::Utc | TimeForm::Zulu | TimeForm::Naive)) => Some((*form).into()),
        Some(TimeForm::Unreadable) | None => None,
    };
    Some(match form.filter(|_| seen.times.len() == 1) {
        Some(form) => found.like("times", form),
        None => found,
    })
}

fn created_lists(form: ContactsForm) -> Found {
    let word: &'static str = form.into();
    match form {
        ContactsForm::Whole | ContactsForm::WithoutContactIds | ContactsForm::WithoutContacts => {
            let status = if form == ContactsForm::Whole { Status::AsAssumed } else { Status::Handled };
            Found::new(status, word, "the new Contact is known without another call")
                .like("created_lead", word)
        }
        ContactsForm::Partial | ContactsForm::Neither => Found::new(
            Status::Handled,
            word,
            "close-sync looks up the new Contact before the next message of that person",
        ),
    }
}

fn read_lists(form: ContactsForm) -> Found {
    let word: &'static str = form.into();
    match form {
        ContactsForm::Whole => {
            Found::new(Status::AsAssumed, word, "a Lead is read in one call").like("lead_contacts", "whole")
        }
        ContactsForm::WithoutContactIds => Found::new(Status::Handled, word, "close-sync uses `contacts`"),
        ContactsForm::WithoutContacts | ContactsForm::Partial => {
            let value = if form == ContactsForm::Partial { "without_newest" } else { "absent" };
            Found::new(Status::Handled, word, "close-sync reads the missing Contacts one by one")
                .like("lead_contacts", value)
        }
        ContactsForm::Neither => Found::new(
            Status::NotSupported,
            word,
            "close-sync cannot see the people of a Lead, and would create them again",
        ),
    }
}

fn contact_lists(unknown: &[(&'static str, ListForm)]) -> Found {
    if unknown.is_empty() {
        return Found::new(Status::AsAssumed, "it does", "close-sync adds to the lists")
            .like("contact_lists", "whole");
    }
    let parts: Vec<String> =
        unknown.iter().map(|(list, form)| format!("{list} {}", <&str>::from(form))).collect();
    let (status, meaning) = if unknown.iter().any(|(list, _)| *list == "emails") {
        (
            Status::NotSupported,
            "close-sync cannot see who has an email address; messages about new people of a known company fail",
        )
    } else {
        (Status::Handled, "close-sync does not write over a list that it cannot see")
    };
    let found = Found::new(status, parts.join(", "), meaning);
    let all = |wanted: ListForm| unknown.iter().all(|(_, form)| *form == wanted);
    if all(ListForm::Missing) {
        found.like("contact_lists", "missing")
    } else if all(ListForm::Null) {
        found.like("contact_lists", "null")
    } else {
        found
    }
}

fn list_endpoint(seen: &Observations) -> Option<Found> {
    let shows_new = seen.list_shows_new?;
    // Without a lag of search, both kinds of lists look the same.
    let tells = shows_new && seen.search_created == Some(Delay::None);
    let found = if shows_new { "shows a new Lead at once" } else { "does not show a new Lead at once" };
    let found = Found::new(Status::AsAssumed, found, "no consequence");
    Some(if tells { found } else { found.like("lists_from_index", !shows_new) })
}

fn seconds(duration: Duration) -> String {
    let tenths = duration.as_millis().div_ceil(100);
    if tenths.is_multiple_of(10) {
        format!("{}s", tenths / 10)
    } else {
        format!("{}.{}s", tenths / 10, tenths % 10)
    }
}

/// A lag for the simulator.
fn lag(delay: Delay) -> String {
    match delay {
        Delay::None => "0s".into(),
        Delay::Within(time) | Delay::Longer(time) => seconds(time),
    }
}

fn within(delay: Delay) -> String {
    match delay {
        Delay::None => "at once".into(),
        Delay::Within(time) => format!("after {}", seconds(time)),
        Delay::Longer(time) => format!("not within {}", seconds(time)),
    }
}

fn read(delay: Delay, what: &str) -> Found {
    let found = format!("reads show {what} {}", within(delay));
    match delay {
        Delay::None => Found::new(Status::AsAssumed, found, "close-sync reads what it wrote"),
        Delay::Within(_) | Delay::Longer(_) => Found::new(
            Status::Handled,
            found,
            "close-sync remembers its own writes, and takes no older answer for the current state",
        ),
    }
}

/// Doubled, because the lag varies, in whole seconds.
fn recommended(lag: Duration) -> Duration {
    Duration::from_secs(lag.saturating_mul(2).as_secs().saturating_add(1))
}

fn search(delay: Delay, configured: Configured) -> Found {
    let found = within(delay);
    let set = |status: Status, meaning: String, value: Duration| {
        let setting = Some(format!("close.search_lag = \"{}s\"", value.as_secs()));
        Found { setting, ..Found::new(status, found.clone(), meaning) }
    };
    let now = seconds(configured.search_lag);
    match delay {
        Delay::None => Found::new(Status::AsAssumed, found, format!("close.search_lag is {now}")),
        Delay::Within(lag) if lag <= configured.search_lag => {
            Found::new(Status::AsAssumed, found, format!("close.search_lag is {now}"))
        }
        Delay::Within(lag) => set(
            Status::ChangeSetting,
            format!("close.search_lag is {now}; a search that comes too early makes a duplicate"),
            recommended(lag),
        ),
        Delay::Longer(lag) if lag < configured.search_lag => Found::new(
            Status::Unknown,
            found,
            format!("close.search_lag is {now}; measure it with a longer --max-wait"),
        ),
        Delay::Longer(lag) => set(
            Status::ChangeSetting,
            format!("close.search_lag is {now}; measure the lag with a longer --max-wait"),
            lag.saturating_mul(5),
        ),
    }
}

fn event_log(delay: Delay) -> Found {
    let found = within(delay);
    let found = match delay {
        Delay::None => Found::new(Status::AsAssumed, found, "a creation without an answer is found soon"),
        Delay::Within(_) | Delay::Longer(_) => {
            Found::new(Status::Handled, found, "a creation without an answer waits for close.search_lag")
        }
    };
    found.like("event_lag", lag(delay))
}

fn event_data(seen: &Observations) -> Option<Found> {
    if seen.event_has_data == Some(false) {
        return Some(Found::new(
            Status::Handled,
            "new events have no data",
            "a creation without an answer waits for close.search_lag",
        ));
    }
    match seen.old_event_has_data {
        Some(false) => Some(
            Found::new(
                Status::Handled,
                "not after an hour: the user of the API key is not an admin",
                "with close.search_lag above 25 minutes, a creation without an answer waits for search",
            )
            .like("event_data", "hidden_after_an_hour"),
        ),
        Some(true) => Some(
            Found::new(Status::AsAssumed, "they do, also after an hour", "no consequence")
                .like("event_data", "kept"),
        ),
        None => seen
            .event_has_data
            .map(|_| Found::new(Status::AsAssumed, "they do; no older event was seen", "no consequence")),
    }
}

fn exact(exact: Exact) -> Found {
    let word: &'static str = exact.into();
    match exact {
        Exact::FoldsCase => Found::new(Status::AsAssumed, "it ignores case", "close-sync compares again")
            .like("exact_value", word),
        Exact::KeepsCase => {
            Found::new(Status::AsAssumed, "it distinguishes case", "close-sync compares again")
                .like("exact_value", word)
        }
        Exact::Words => Found::new(
            Status::Handled,
            "it also finds longer values",
            "close-sync compares again; searches return more rows",
        ),
        Exact::Refused => Found::new(
            Status::Handled,
            "Close refuses it",
            "close-sync searches by phrase and compares again; searches return more rows",
        )
        .like("exact_value", word),
        Exact::FindsNothing => Found::new(
            Status::NotSupported,
            "it does not find the value",
            "close-sync would create a Lead and a Contact with every message; do not run it",
        ),
    }
}

fn email_search(finds: bool) -> Found {
    if finds {
        Found::new(Status::AsAssumed, "it does", "people are found by email")
    } else {
        Found::new(
            Status::NotSupported,
            "it does not",
            "people whose address Close has in another case are created again",
        )
    }
}

fn descending(is_exact: bool) -> Found {
    let (found, value) = if is_exact { ("every row once", "exact") } else { ("rows are lost", "loses_rows") };
    Found::new(Status::AsAssumed, found, "no consequence").like("descending_cursor", value)
}

fn put_is_patch(is_patch: bool) -> Found {
    if is_patch {
        Found::new(Status::AsAssumed, "it does", "fields that no rule fills stay as people left them")
    } else {
        Found::new(
            Status::NotSupported,
            "other fields were lost",
            "close-sync would delete data; do not run it",
        )
    }
}

fn error_texts(texts: ErrorTexts) -> Found {
    let word: &'static str = texts.into();
    Found::new(Status::AsAssumed, word, "dead letters name the reason").like("error_texts", word)
}

fn last_cursor(cursor: LastCursor) -> Found {
    let word: &'static str = cursor.into();
    let status = if cursor == LastCursor::Null { Status::AsAssumed } else { Status::Handled };
    Found::new(status, word, "no further search is made").like("last_cursor", word)
}

fn search_rows(have_fields: bool) -> Found {
    if have_fields {
        Found::new(Status::AsAssumed, "they do", "a found record needs no other call")
            .like("search_rows", "fields")
    } else {
        Found::new(Status::Handled, "they have only ids", "close-sync reads each found record")
            .like("search_rows", "only_ids")
    }
}

fn unknown_selector(is_refused: bool) -> Found {
    if is_refused {
        Found::new(Status::AsAssumed, "it is", "close-sync reads the custom fields again")
            .like("unknown_selector", "refused")
    } else {
        let meaning = "a deleted lookup field is noticed when the custom fields are read again";
        Found::new(Status::Handled, "it is ignored", meaning).like("unknown_selector", "ignored")
    }
}

fn unknown_key(is_refused: bool) -> Found {
    let found = if is_refused { "it is refused" } else { "it is ignored" };
    Found::new(Status::AsAssumed, found, "no consequence").like("strict_contact_keys", is_refused)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cli::certify::observations::{FieldObservation, Kept};
    use crate::cli::certify::script::{NATIONAL, WITH_EXTENSION, WITH_TRUNK_ZERO};

    const SECOND: Duration = Duration::from_secs(1);

    fn one(assumption: Assumption, see: impl FnOnce(&mut Observations)) -> Finding {
        let mut seen = Observations::default();
        see(&mut seen);
        let configured = Configured { search_lag: 20 * SECOND, country: None };
        let mut found = findings(&seen, configured).into_iter();
        found.find(|finding| finding.assumption == assumption).unwrap()
    }

    #[test]
    fn what_was_not_seen_is_unknown() {
        let configured = Configured { search_lag: SECOND, country: None };
        let found = findings(&Observations::default(), configured);
        assert_eq!(found.len(), Assumption::VARIANTS.len() - 1, "no field is configured");
        assert!(found.iter().all(|finding| finding.status == Status::Unknown));
    }

    #[test]
    fn the_country_of_phones_is_compared_with_the_setting() {
        let seen = Observations {
            phones: vec![(NATIONAL, Some("+448004445555".into()))],
            ..Observations::default()
        };
        let line = "close.country = \"GB\"";
        for (country, status, setting) in [
            (None, Status::AsAssumed, None),
            (Some("GB"), Status::AsAssumed, None),
            (Some("DE"), Status::ChangeSetting, Some(line)),
        ] {
            let configured = Configured { search_lag: SECOND, country: country.and_then(Country::parse) };
            let mut found = findings(&seen, configured).into_iter();
            let finding = found.find(|finding| finding.assumption == Assumption::PhoneCountry).unwrap();
            assert_eq!((finding.status, finding.setting.as_deref()), (status, setting), "{country:?}");
        }
    }

    #[test]
    fn a_lag_of_search_is_compared_with_the_setting() {
        for (delay, status, setting) in [
            (Delay::None, Status::AsAssumed, None),
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
    fn what_close_sync_cannot_work_with_is_not_supported() {
        type See = fn(&mut Observations);
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
        type See = fn(&mut Observations);
        let cases: [(Assumption, See, Status, Value); 13] = [
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
                    (seen.list_shows_new, seen.search_created) = (Some(true), Some(Delay::None));
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
            (
                Assumption::PhoneCountry,
                |seen| seen.phones = vec![(NATIONAL, None)],
                Status::Handled,
                json!({}),
            ),
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
        ];
        for (assumption, see, status, behaviour) in cases {
            let finding = one(assumption, see);
            assert_eq!((finding.status, json!(finding.behaviour)), (status, behaviour), "{assumption:?}");
        }
    }
}
