//! Findings about the schema and the form of answers.

use crate::cli::certify::finding::{Found, Status};
use crate::cli::certify::observations::{
    ContactsForm, Delay, ErrorTexts, HeaderForm, ListForm, NotFound, Observations, TimeForm,
};
use crate::domain::schema::{CustomField, Problem, UnreadableItem};

pub(super) fn schema(unreadable: &[UnreadableItem]) -> Found {
    if unreadable.is_empty() {
        return Found::new(Status::AsAssumed, "they are", "no consequence");
    }
    let texts: Vec<String> = unreadable.iter().map(ToString::to_string).collect();
    let found = Found::new(Status::Handled, texts.join("; "), "close-sync ignores them");
    // Without its id, the simulator cannot name an item.
    let members = unreadable.iter().filter_map(|item| {
        let member = match item.problem {
            Problem::Id => return None,
            Problem::Type => "type",
            Problem::Choices => "choices",
        };
        Some(format!("{}.{member}", item.id.as_ref()?))
    });
    let members: Vec<String> = members.collect();
    if members.is_empty() { found } else { found.like("null_members", members) }
}

pub(super) fn required_fields(missing: &[CustomField]) -> Found {
    if missing.is_empty() {
        return Found::new(Status::AsAssumed, "it does", "no consequence");
    }
    let names: Vec<&str> = missing.iter().map(|field| field.name.as_str()).collect();
    let ids: Vec<String> = missing.iter().map(|field| field.id.to_string()).collect();
    Found::new(
        Status::Handled,
        format!("no rule fills {}", names.join(", ")),
        "Close may refuse new records; add rules for these fields",
    )
    .like("required_fields", ids)
}

pub(super) fn missing_record(form: NotFound) -> Found {
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

pub(super) fn unknown_url(form: NotFound) -> Found {
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

pub(super) fn missing_slash(status: u16) -> Found {
    let meaning = "close-sync always sends the slash";
    match status {
        404 => Found::new(Status::AsAssumed, "404", meaning).like("missing_slash", "not_found"),
        300..=399 => {
            Found::new(Status::AsAssumed, status.to_string(), meaning).like("missing_slash", "redirected")
        }
        other => Found::new(Status::Handled, other.to_string(), meaning),
    }
}

pub(super) fn headers(seen: &Observations) -> Option<Found> {
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

pub(super) fn times(seen: &Observations) -> Option<Found> {
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

pub(super) fn created_lists(form: ContactsForm) -> Found {
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

pub(super) fn read_lists(form: ContactsForm) -> Found {
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

pub(super) fn contact_lists(unknown: &[(&'static str, ListForm)]) -> Found {
    if unknown.is_empty() {
        return Found::new(Status::AsAssumed, "it does", "close-sync adds to the lists")
            .like("contact_lists", "whole");
    }
    let parts: Vec<String> =
        unknown.iter().map(|(list, form)| format!("{list} {}", <&str>::from(form))).collect();
    let (status, meaning) = if unknown.iter().any(|(list, _)| *list == "emails") {
        (
            Status::NotSupported,
            "close-sync only knows from search who has an email address, so a lag of search can make duplicates",
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

pub(super) fn list_endpoint(seen: &Observations) -> Option<Found> {
    let shows_new = seen.list_shows_new?;
    // Without a lag of search, both kinds of lists look the same.
    let tells = shows_new && matches!(seen.search_created, Some(Delay::Below(_)));
    let found = if shows_new { "shows a new Lead at once" } else { "does not show a new Lead at once" };
    let found = Found::new(Status::AsAssumed, found, "no consequence");
    Some(if tells { found } else { found.like("lists_from_index", !shows_new) })
}

pub(super) fn event_data(seen: &Observations) -> Option<Found> {
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

pub(super) fn put_is_patch(is_patch: bool) -> Found {
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

pub(super) fn error_texts(texts: ErrorTexts) -> Found {
    let word: &'static str = texts.into();
    Found::new(Status::AsAssumed, word, "dead letters name the reason").like("error_texts", word)
}

pub(super) fn unknown_key(is_refused: bool) -> Found {
    let found = if is_refused { "it is refused" } else { "it is ignored" };
    Found::new(Status::AsAssumed, found, "no consequence").like("strict_contact_keys", is_refused)
}
