//! Findings about values: phones, refusals, and the fields that the configuration fills.

use serde_json::Value;

use crate::cli::certify::assumption::Assumption;
use crate::cli::certify::finding::{Finding, Found, Status};
use crate::cli::certify::observations::{FieldObservation, Kept, Observations, Refusal};
use crate::cli::certify::script::{NATIONAL, WITH_EXTENSION, WITH_TRUNK_ZERO};
use crate::domain::phone::{Country, stored_form};

/// Each phone as it was sent and kept.
fn phones<'a>(seen: &'a Observations, wanted: &[&str]) -> Vec<(&'static str, Option<&'a str>)> {
    let phones = seen.phones.iter().filter(|(sent, _)| wanted.contains(sent));
    phones.map(|(sent, kept)| (*sent, kept.as_deref())).collect()
}

pub(super) fn phone_rewriting(seen: &Observations) -> Option<Found> {
    let phones = phones(seen, &[WITH_TRUNK_ZERO, WITH_EXTENSION]);
    if phones.is_empty() {
        return None;
    }
    let shown = |(sent, kept): &(&str, Option<&str>)| format!("{sent} → {}", kept.unwrap_or("refused"));
    let text = phones.iter().map(shown).collect::<Vec<_>>().join(", ");
    let is_expected = phones.iter().all(|(sent, kept)| stored_form(sent, None).as_deref() == *kept);
    Some(if is_expected {
        Found::new(Status::AsAssumed, text, "a phone is added once, in any spelling")
    } else {
        Found::new(
            Status::Handled,
            text,
            "close-sync learns what Close keeps; send phones in international form",
        )
    })
}

pub(super) fn phone_country(seen: &Observations, configured: Option<Country>) -> Option<Found> {
    let (_, kept) = phones(seen, &[NATIONAL]).pop()?;
    let meaning = "send phones with their country";
    let Some(kept) = kept else {
        return Some(Found::new(Status::Handled, "Close refuses a phone without a country", meaning));
    };
    let text = format!("{NATIONAL} → {kept}");
    let Some(country) = Country::of_answer(NATIONAL, kept) else {
        return Some(Found::new(Status::Handled, text, meaning));
    };
    let setting = format!("close.country = \"{country}\"");
    let found = match configured {
        None => Found::new(Status::AsAssumed, text, format!("{meaning}, or set {setting}")),
        // Countries that share a country code read most numbers alike.
        Some(configured) if stored_form(NATIONAL, Some(configured)).as_deref() == Some(kept) => {
            Found::new(Status::AsAssumed, text, format!("close.country is {configured}"))
        }
        Some(configured) => {
            let meaning =
                format!("close.country is {configured}; a phone may be added once more after a start");
            Found { setting: Some(setting), ..Found::new(Status::ChangeSetting, text, meaning) }
        }
    };
    Some(found.like("country", country.to_string()))
}

pub(super) fn refusal(refusal: Refusal, what: &str) -> Found {
    let word: &'static str = refusal.into();
    match refusal {
        Refusal::Nested | Refusal::Dotted | Refusal::Plain | Refusal::OnlyList | Refusal::Detail => {
            Found::new(
                Status::AsAssumed,
                format!("refused, {word} shape"),
                format!("only the {what} is left out; the rest is written"),
            )
        }
        Refusal::List | Refusal::General | Refusal::Vague | Refusal::NotJson => Found::new(
            Status::Handled,
            format!("refused without a name ({word})"),
            "all optional values of that message are left out; the rest is written",
        ),
        Refusal::Kept | Refusal::LeftOut => Found::new(
            Status::Handled,
            format!("accepted ({word})"),
            format!("an invalid {what} is not reported by Close"),
        ),
        Refusal::OtherStatus => Found::new(
            Status::NotSupported,
            "an unexpected status",
            format!("a message with an invalid {what} may be retried and dead-lettered"),
        ),
    }
}

pub(super) fn bad_email(refusal: Refusal) -> Found {
    let found = self::refusal(refusal, "email address");
    match refusal {
        Refusal::Nested
        | Refusal::Plain
        | Refusal::Dotted
        | Refusal::List
        | Refusal::General
        | Refusal::Vague
        | Refusal::Detail => found.like("error_shape", <&str>::from(refusal)),
        Refusal::OnlyList | Refusal::NotJson | Refusal::Kept | Refusal::LeftOut | Refusal::OtherStatus => {
            found
        }
    }
}

pub(super) fn country_in_me(names_it: bool) -> Found {
    let found = if names_it {
        Found::new(Status::AsAssumed, "it does", "a phone without a country is compared in that country")
    } else {
        let meaning = "close-sync learns the country from the first phones that Close rewrites";
        Found::new(Status::AsAssumed, "it does not", meaning)
    };
    found.like("country_in_me", names_it)
}

pub(super) fn field(observation: &FieldObservation) -> Finding {
    let FieldObservation { setting, kind, sent, kept, .. } = observation;
    let (status, found, meaning) = match kept {
        Kept::Same => (Status::AsAssumed, "as it was sent".to_owned(), "no consequence"),
        Kept::OtherNotation(kept) => {
            (Status::Handled, format!("{sent} → {kept}"), "close-sync compares by meaning")
        }
        Kept::Different(kept) => (
            Status::Handled,
            format!("{sent} → {kept}"),
            "close-sync remembers the pair and does not send the value again",
        ),
        Kept::Missing => (
            Status::NotSupported,
            format!("{sent} was not kept"),
            "values for this field are lost; check the permissions of the field in Close",
        ),
        Kept::Refused => (
            Status::NotSupported,
            format!("{sent} was refused"),
            "values for this field are left out; check its type in Close",
        ),
        Kept::NotTried(reason) => (
            Status::Unknown,
            (*reason).to_owned(),
            "the metric close_sync_values_not_kept_total counts values that Close does not keep",
        ),
    };
    let found = Found::new(status, found, meaning);
    let found = match kept {
        Kept::OtherNotation(kept) => match notation(sent, kept) {
            Some((key, value)) => found.like(key, value),
            None => found,
        },
        Kept::Missing => found.like("lossy_fields", vec![observation.key.clone()]),
        Kept::Same | Kept::Different(_) | Kept::Refused | Kept::NotTried(_) => found,
    };
    found.of(Assumption::FieldReadBack, Some(format!("{setting} ({kind})")))
}

/// The notation of a value that came back, for the simulator.
fn notation(sent: &Value, kept: &Value) -> Option<(&'static str, &'static str)> {
    match (sent, kept) {
        (Value::Number(_), Value::String(_)) => Some(("numbers", "text")),
        (_, Value::Object(_)) => Some(("users", "object")),
        (Value::Array(_), Value::Array(_)) => None,
        (Value::Array(_), _) => Some(("lists", "never_list_of_one")),
        (_, Value::Array(_)) => Some(("lists", "always_list")),
        _ => None,
    }
}
