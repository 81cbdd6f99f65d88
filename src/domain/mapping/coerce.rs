//! Coercion: converting a value to the type of its field in Close.
//!
//! Close rejects a whole call if one value in it is invalid (close-api.md §5). So a value is converted to the type of the
//! field where that makes sense, and otherwise left out with a [`DropReason`]. The result has the notation in which Close
//! returns the value. Planning again then finds no difference.
//!
//! | field | accepts |
//! | --- | --- |
//! | text | text; numbers and booleans as text |
//! | number | numbers; text that is a number; true as 1, false as 0 |
//! | date | `2026-01-31`; the day of a time, as written, see [`crate::domain::time`] |
//! | datetime | a time, see [`crate::domain::time`]; a date, as midnight; a number since 1970, from 1973 on |
//! | choices | a choice, in any case; a boolean as `true`/`yes` or `false`/`no`, if that is a choice |
//! | user | the id, full name or email of a user |
//! | contact, custom object | an id |
//! | several values | a list or a single value; items that cannot be converted are left out |
//!
//! Every value has a maximum length, because it stays in memory while its message waits. Close documents few limits
//! (close-api.md §12, 20); where it documents none, ours is far above what people enter.

use serde_json::Value;

use crate::domain::dropped::{DropReason, excerpt};
use crate::domain::phone;
use crate::domain::record::is_id;
use crate::domain::schema::{CustomField, FieldKind, Status, User};
use crate::domain::time::{date, format_timestamp, timestamp};
use crate::domain::value::{flatten, integer, same_word, single_spaces, text};
use crate::domain::web_address;

/// The maximum length of a name or title in Close, in characters (close-api.md §5).
pub const MAX_TEXT: usize = 1000;
/// The maximum length of an email address in Close, in characters (close-api.md §3).
const MAX_EMAIL: usize = 254;

/// The maximum length of an id of a company or a person, in characters. Most sources of such ids accept at most this
/// many (Mixpanel 255, `PostHog` 200, Customer.io 150 bytes). An id that is longer is not cut, because two ids could then
/// become one.
pub const MAX_ID: usize = 255;
/// The maximum length of a long text, and of all texts in a list, in bytes. A longer text is cut.
pub const MAX_LONG_TEXT: usize = 64 << 10;
/// The maximum number of items in a list.
pub const MAX_ITEMS: usize = 1000;
/// The maximum length of a word that is looked up among choices, users and ids, in bytes.
const MAX_WORD: usize = 4 * MAX_TEXT;

/// Why a value cannot be used, and an excerpt of it. For a list, of the first item that cannot be used.
pub type Unusable = (DropReason, Option<Value>);

/// The first value as text, for a field that has one value.
fn one(values: &[Value]) -> Result<String, DropReason> {
    values.first().and_then(text).ok_or(DropReason::NotAValue)
}

/// A name or title: one line, cut to the maximum length. A boolean is not a name, also as text.
pub fn line(values: &[Value]) -> Result<Value, DropReason> {
    let text = single_spaces(&one(values)?);
    if ["true", "false"].contains(&text.as_str()) {
        return Err(DropReason::NotAValue);
    }
    Ok(Value::String(text.chars().take(MAX_TEXT).collect()))
}

/// A text of several lines, and what was cut off.
pub fn long_text(values: &[Value]) -> (Option<Value>, Option<Unusable>) {
    match one(values) {
        Ok(text) => cut(text),
        Err(reason) => (None, Some((reason, values.first().map(excerpt)))),
    }
}

/// The text up to its maximum length. What was cut off is reported.
fn cut(mut text: String) -> (Option<Value>, Option<Unusable>) {
    if text.len() <= MAX_LONG_TEXT {
        return (Some(Value::String(text)), None);
    }
    let unusable = (DropReason::TooLong, Some(excerpt(&Value::String(text.clone()))));
    text.truncate(text.floor_char_boundary(MAX_LONG_TEXT));
    text.shrink_to_fit();
    (Some(Value::String(text)), Some(unusable))
}

/// An id that records are looked up by.
pub fn id(values: &[Value]) -> Result<String, DropReason> {
    match values.first() {
        Some(value @ (Value::String(_) | Value::Number(_))) => {
            let id = text(value).ok_or(DropReason::NotAValue)?;
            if id.chars().nth(MAX_ID).is_some() { Err(DropReason::TooLong) } else { Ok(id) }
        }
        Some(Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_)) | None => {
            Err(DropReason::NotAValue)
        }
    }
}

/// A lead status by id or label. If Close did not send its statuses, an id is passed on unchecked.
pub fn status(values: &[Value], statuses: &[Status]) -> Result<Value, DropReason> {
    let wanted = one(values)?;
    if wanted.len() > MAX_WORD {
        return Err(DropReason::NotAChoice);
    }
    let by_id = statuses.iter().find(|status| status.id == wanted);
    let known = by_id.or_else(|| statuses.iter().find(|status| same_word(&status.label, &wanted)));
    match known {
        Some(status) => Ok(status.id.clone().into()),
        None if statuses.is_empty() && wanted.starts_with("stat_") => Ok(wanted.into()),
        None => Err(DropReason::NotAChoice),
    }
}

/// An email address. Close does not accept one with a display name.
pub fn email(values: &[Value]) -> Result<String, DropReason> {
    let address = one(values)?;
    let options = email_address::Options::default().without_display_text().without_domain_literal();
    let plausible = address.chars().count() <= MAX_EMAIL
        && email_address::EmailAddress::parse_with_options(&address, options).is_ok();
    plausible.then_some(address).ok_or(DropReason::InvalidEmail)
}

/// The maximum length of a phone number with its spaces and signs, in bytes.
const MAX_PHONE: usize = 64;

/// A phone number, normalized.
pub fn phone(values: &[Value]) -> Result<String, DropReason> {
    let number = phone::normalize(&one(values)?).filter(|number| number.len() <= MAX_PHONE);
    number.ok_or(DropReason::InvalidPhone)
}

/// A URL with a scheme. Close would add a missing one itself, but its schema requires a URI (close-api.md §5). A host
/// without a dot is not valid, because it is usually a placeholder such as `n/a`.
pub fn url(values: &[Value]) -> Result<String, DropReason> {
    let page = one(values)?;
    let whole = web_address::complete(&page)?;
    match url::Url::parse(&whole) {
        Ok(url) if url.host_str().is_some_and(|host| host.contains(['.', ':'])) => Ok(whole.into_owned()),
        Ok(_) | Err(_) => Err(DropReason::InvalidUrl),
    }
}

/// The value for a custom field, and what was left out of it. Both are present when only some items of a list can be
/// used.
pub fn custom(values: &[Value], field: &CustomField, users: &[User]) -> (Option<Value>, Option<Unusable>) {
    if !field.multiple {
        return match values.first().map(|value| (value, item(value, field, users))) {
            Some((_, Ok(Value::String(text)))) => cut(text),
            Some((_, Ok(value))) => (Some(value), None),
            Some((value, Err(reason))) => (None, Some((reason, Some(excerpt(value))))),
            None => (None, None),
        };
    }
    let (mut usable, mut unusable, mut length) = (Vec::new(), None, 0);
    for (number, value) in flatten(values).enumerate() {
        let fitting = item(value, field, users).and_then(|item| {
            let longer = length + item.as_str().map_or(0, str::len);
            if number < MAX_ITEMS && longer <= MAX_LONG_TEXT {
                Ok((item, longer))
            } else {
                Err(DropReason::TooLong)
            }
        });
        match fitting {
            Ok((item, longer)) if !usable.contains(&item) => {
                usable.push(item);
                length = longer;
            }
            Ok(_) => {}
            Err(reason) => unusable = unusable.or_else(|| Some((reason, Some(excerpt(value))))),
        }
        if number == MAX_ITEMS {
            break;
        }
    }
    usable.shrink_to_fit();
    ((!usable.is_empty()).then(|| usable.into()), unusable)
}

fn item(value: &Value, field: &CustomField, users: &[User]) -> Result<Value, DropReason> {
    let word = || text(value).ok_or(DropReason::NotAValue);
    match &field.kind {
        FieldKind::Text | FieldKind::Textarea | FieldKind::Hidden => word().map(Value::String),
        FieldKind::Number => number(value),
        FieldKind::Date => date(value).map(|date| date.to_string().into()),
        FieldKind::Datetime => timestamp(value).map(|at| format_timestamp(at).into()),
        FieldKind::Choices(choices) => choice(value, choices),
        FieldKind::User => {
            let wanted = word()?;
            if wanted.len() > MAX_WORD {
                return Err(DropReason::NoSuchUser);
            }
            let user = users.iter().find(|user| {
                user.id == wanted || same_word(&user.email, &wanted) || same_word(&user.name, &wanted)
            });
            user.map(|user| user.id.clone().into()).ok_or(DropReason::NoSuchUser)
        }
        FieldKind::Contact => reference(&word()?, "cont"),
        FieldKind::CustomObject => reference(&word()?, "custobj"),
        FieldKind::Other(_) if value.is_object() || value.is_array() => Err(DropReason::NotAValue),
        FieldKind::Other(_) => Ok(value.clone()),
    }
}

fn reference(id: &str, prefix: &str) -> Result<Value, DropReason> {
    is_id(Some(prefix), id).then(|| id.into()).ok_or(DropReason::NotAnId)
}

fn number(value: &Value) -> Result<Value, DropReason> {
    let number = match value {
        Value::Number(number) => Some(number.clone()),
        Value::Bool(flag) => Some(i64::from(*flag).into()),
        // Parsed as JSON, so that "inf" and "0x1F" are not numbers.
        Value::String(text) => serde_json::from_str(text.trim_start_matches('+')).ok(),
        Value::Null | Value::Array(_) | Value::Object(_) => return Err(DropReason::NotAValue),
    };
    let number = number.ok_or(DropReason::NotANumber)?;
    Ok(integer(&number).map_or_else(|| Value::Number(number), Value::from))
}

fn choice(value: &Value, choices: &[String]) -> Result<Value, DropReason> {
    let wanted = text(value).ok_or(DropReason::NotAValue)?;
    if wanted.len() > MAX_WORD {
        return Err(DropReason::NotAChoice);
    }
    let among = |word: &str| {
        let exact = choices.iter().find(|choice| *choice == word);
        exact.or_else(|| choices.iter().find(|choice| same_word(choice, word)))
    };
    let other = match value {
        Value::Bool(true) => Some("yes"),
        Value::Bool(false) => Some("no"),
        Value::Null | Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => None,
    };
    let found = among(&wanted).or_else(|| among(other?));
    found.map(|choice| choice.clone().into()).ok_or(DropReason::NotAChoice)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::record::{Channel, FieldId};
    use crate::domain::value;

    fn coerced(kind: FieldKind, multiple: bool, value: Value) -> Result<Value, &'static str> {
        let field =
            CustomField { id: FieldId::new("cf_1"), name: "F".into(), kind, multiple, required: false };
        let ada = User { id: "user_ada".into(), name: "Ada Account".into(), email: "ada@close.test".into() };
        match custom(&[value], &field, &[ada]) {
            (Some(value), None) => Ok(value),
            (None, Some((reason, _))) => Err(reason.label()),
            (Some(value), Some((reason, _))) => Ok(json!([value, reason.label()])),
            (None, None) => unreachable!(),
        }
    }

    #[test]
    fn values_are_converted_to_the_type_of_the_field() {
        use FieldKind::{Choices, Contact, CustomObject, Date, Datetime, Number, Other, Text, User};
        let plans = || Choices(vec!["Free".into(), "Pro".into(), "2".into()]);
        let yes_no = || Choices(vec!["Yes".into(), "No".into()]);
        let cases = [
            (Text, json!(7), Ok(json!("7"))),
            (Text, json!(7.50), Ok(json!("7.5"))),
            (Text, json!(true), Ok(json!("true"))),
            (Text, json!(["a"]), Err("not_a_value")),
            (Number, json!(5.0), Ok(json!(5))),
            (Number, json!("12.5"), Ok(json!(12.5))),
            (Number, json!("+3"), Ok(json!(3))),
            (Number, json!(true), Ok(json!(1))),
            (Number, json!("1,000"), Err("not_a_number")),
            (Number, json!("NaN"), Err("not_a_number")),
            (Number, json!([1]), Err("not_a_value")),
            (Date, json!("2026-01-31"), Ok(json!("2026-01-31"))),
            (Date, json!("2026-01-31T23:30:00-05:00"), Ok(json!("2026-01-31"))),
            (Date, json!("2026-01-31T23:30:00.000Z"), Ok(json!("2026-01-31"))),
            (Date, json!(1_769_900_400), Ok(json!("2026-01-31"))),
            (Date, json!("31.01.2026"), Err("not_a_date")),
            (Date, json!(20_240_115), Ok(json!("2024-01-15"))),
            (Date, json!("20240115"), Ok(json!("2024-01-15"))),
            (Date, json!(2024), Err("not_a_date")),
            (Date, json!("12"), Err("not_a_date")),
            (Date, json!(0), Err("placeholder")),
            (Date, json!("1970-01-01T00:00:00.000Z"), Ok(json!("1970-01-01"))),
            (Datetime, json!("1970-01-01T00:00:00.000Z"), Err("placeholder")),
            (Date, json!(90_000_000_000_i64), Err("not_a_date")),
            (Date, json!(-86_400), Err("not_a_date")),
            (Date, json!("2026-02-30"), Err("not_a_date")),
            (Date, json!(false), Err("not_a_value")),
            (Datetime, json!("2026-01-31T10:00:00+01:00"), Ok(json!("2026-01-31T09:00:00.000000+00:00"))),
            (Datetime, json!("2026-01-31T10:00:00.123456Z"), Ok(json!("2026-01-31T10:00:00.123000+00:00"))),
            (Datetime, json!("2026-01-31T10:00:00"), Ok(json!("2026-01-31T10:00:00.000000+00:00"))),
            (Datetime, json!("2026-01-31"), Ok(json!("2026-01-31T00:00:00.000000+00:00"))),
            (Datetime, json!(1_769_900_400), Ok(json!("2026-01-31T23:00:00.000000+00:00"))),
            (Datetime, json!(1_769_900_400_000_i64), Ok(json!("2026-01-31T23:00:00.000000+00:00"))),
            (Datetime, json!("1769900400"), Ok(json!("2026-01-31T23:00:00.000000+00:00"))),
            (Datetime, json!("soon"), Err("not_a_date")),
            (Datetime, json!(1e300), Err("not_a_date")),
            (plans(), json!("Pro"), Ok(json!("Pro"))),
            (plans(), json!(" pRO"), Ok(json!("Pro"))),
            (plans(), json!(2), Ok(json!("2"))),
            (plans(), json!("Gold"), Err("not_a_choice")),
            (yes_no(), json!(true), Ok(json!("Yes"))),
            (yes_no(), json!(false), Ok(json!("No"))),
            (Choices(vec!["True".into()]), json!(true), Ok(json!("True"))),
            (User, json!("user_ada"), Ok(json!("user_ada"))),
            (User, json!("ada account"), Ok(json!("user_ada"))),
            (User, json!("ADA@close.test"), Ok(json!("user_ada"))),
            (User, json!("Bob"), Err("no_such_user")),
            (Contact, json!("cont_1"), Ok(json!("cont_1"))),
            (Contact, json!("Jane"), Err("not_an_id")),
            (CustomObject, json!("custobj_1"), Ok(json!("custobj_1"))),
            (CustomObject, json!("cotype_1"), Err("not_an_id")),
            (Other("emoji".into()), json!(5), Ok(json!(5))),
            (Other("emoji".into()), json!([5]), Err("not_a_value")),
        ];
        for (kind, value, expected) in cases {
            assert_eq!(coerced(kind.clone(), false, value.clone()), expected, "{kind:?} {value}");
        }
    }

    #[test]
    fn a_list_loses_only_items_that_cannot_be_used() {
        let colours = || FieldKind::Choices(vec!["red".into(), "blue".into()]);
        let cases = [
            (json!(["red", "Blue", "red"]), Ok(json!(["red", "blue"]))),
            (json!("red"), Ok(json!(["red"]))),
            (json!(["red", "pink"]), Ok(json!([["red"], "not_a_choice"]))),
            (json!([{"a": 1}, "pink"]), Err("not_a_value")),
        ];
        for (value, expected) in cases {
            assert_eq!(coerced(colours(), true, value.clone()), expected, "{value}");
        }
    }

    #[test]
    fn every_value_has_a_maximum_length() {
        let text = |length: usize| json!("é".repeat(length / 2));
        let (cut, reported) = long_text(&[text(MAX_LONG_TEXT + 2)]);
        assert_eq!(cut, Some(text(MAX_LONG_TEXT)));
        assert_eq!(reported.map(|(reason, _)| reason), Some(DropReason::TooLong));
        assert_eq!(long_text(&[text(MAX_LONG_TEXT)]), (Some(text(MAX_LONG_TEXT)), None));
        let long = || text(MAX_LONG_TEXT + 2);
        let cases = [
            (FieldKind::Text, false, long(), Ok(json!([text(MAX_LONG_TEXT), "too_long"]))),
            (FieldKind::Other("emoji".into()), false, long(), Ok(json!([text(MAX_LONG_TEXT), "too_long"]))),
            (FieldKind::Choices(vec!["a".into()]), false, long(), Err("not_a_choice")),
            (FieldKind::User, false, long(), Err("no_such_user")),
            (FieldKind::Contact, false, json!(format!("cont_{}", "a".repeat(MAX_ID))), Err("not_an_id")),
            (FieldKind::Number, false, json!("1".repeat(MAX_LONG_TEXT)), Err("not_a_number")),
            (FieldKind::Date, false, json!("2026-01-31".repeat(MAX_LONG_TEXT)), Err("not_a_date")),
            (
                FieldKind::Text,
                true,
                json!(["a", long(), "b", text(MAX_LONG_TEXT), "c"]),
                Ok(json!([["a", "b", "c"], "too_long"])),
            ),
            (
                FieldKind::Number,
                true,
                json!((0..=MAX_ITEMS).collect::<Vec<_>>()),
                Ok(json!([(0..MAX_ITEMS).collect::<Vec<_>>(), "too_long"])),
            ),
        ];
        for (kind, multiple, value, expected) in cases {
            assert_eq!(coerced(kind.clone(), multiple, value), expected, "{kind:?}");
        }
        assert_eq!(id(&[text(2 * MAX_ID)]), Ok("é".repeat(MAX_ID)));
        assert_eq!(id(&[text(2 * MAX_ID + 2)]), Err(DropReason::TooLong));
        assert_eq!(phone(&[json!(format!("1{}", "-".repeat(MAX_PHONE)))]), Err(DropReason::InvalidPhone));
        assert_eq!(url(&[json!(format!("http://a.test/{}", "a".repeat(2048)))]), Err(DropReason::TooLong));
        assert_eq!(
            status(&[json!(format!("stat_{}", "a".repeat(MAX_WORD)))], &[]),
            Err(DropReason::NotAChoice)
        );
    }

    /// Such a text would overflow the stack if it were read by recursion.
    #[test]
    fn a_text_of_any_length_is_read() {
        let schemes = ["http:", "http://", "https:\\\\", "HTTP:/", "://", "data:"];
        let signs = ["1", "(0)", "+", "+(0)", "@", "a@", ".", "1.", "e", "[", "\"", "%", "-", "T", ":"];
        let invisible = ["\u{200b}", "\u{feff}", " ", "\n", "\u{0}", "\u{661}", "\u{130}", "a\u{ad}"];
        let kinds = || {
            use FieldKind::{Choices, Contact, CustomObject, Date, Datetime, Number, Other, Text, User};
            [
                Text,
                Number,
                Date,
                Datetime,
                Choices(vec!["a".into()]),
                User,
                Contact,
                CustomObject,
                Other("x".into()),
            ]
        };
        for piece in schemes.into_iter().chain(signs).chain(invisible) {
            let page = piece.repeat((1 << 20) / piece.len());
            assert!(url(&[json!(page)]).is_err(), "{piece:?}");
            assert!(
                Channel::Url.same(&page, &page, None) && !Channel::Url.same(&page, "http://acme.test", None)
            );
            let text = piece.repeat((1 << 17) / piece.len());
            assert!(!Channel::Phone.same(&text, "+1234", None) && Channel::Email.same(&text, &text, None));
            assert!(value::domain(&page).is_none_or(|domain| domain.len() <= page.len()), "{piece:?}");
            let values = [json!(text)];
            for refused in [id(&values).err(), email(&values).err(), phone(&values).err()] {
                assert!(refused.is_some(), "{piece:?}");
            }
            assert!(status(&values, &[]).is_err(), "{piece:?}");
            assert!(
                line(&values).is_ok_and(|line| line.as_str().unwrap().len() <= 4 * MAX_TEXT)
                    || one(&values).is_err()
            );
            for kind in kinds() {
                let kept = coerced(kind, true, values[0].clone()).map(|kept| kept.to_string().len());
                assert!(kept.is_ok_and(|kept| kept <= 2 * MAX_LONG_TEXT) || kept.is_err(), "{piece:?}");
            }
        }
    }

    #[test]
    fn a_status_is_found_by_id_or_label() {
        let statuses = [Status { id: "stat_1".into(), label: "Potential".into() }];
        let status = |value: &str, statuses| super::status(&[json!(value)], statuses);
        assert_eq!(status("stat_1", &statuses), Ok(json!("stat_1")));
        assert_eq!(status("potential", &statuses), Ok(json!("stat_1")));
        assert_eq!(status("stat_2", &statuses), Err(DropReason::NotAChoice));
        assert_eq!(status("stat_2", &[]), Ok(json!("stat_2")));
        assert_eq!(status("Potential", &[]), Err(DropReason::NotAChoice));
    }

    #[test]
    fn emails_phones_and_urls_are_checked() {
        let emails = [
            ("jane@example.test", true),
            ("jane+crm@example.test", true),
            ("jäne@exämple.test", true),
            ("Jane <jane@example.test>", false),
            ("jane@[127.0.0.1]", false),
            ("jane", false),
            ("@example.test", false),
        ];
        for (address, good) in emails {
            assert_eq!(email(&[json!(address)]).is_ok(), good, "{address}");
        }
        assert!(email(&[json!(format!("{}@example.test", "j".repeat(250)))]).is_err());
        assert_eq!(phone(&[json!(493_012_345)]).as_deref(), Ok("493012345"));
        assert_eq!(phone(&[json!(12_125_550_100.0)]).as_deref(), Ok("12125550100"));
        assert_eq!(phone(&[json!("12125550100.0")]).as_deref(), Ok("12125550100"));
        assert_eq!(phone(&[json!(["+1 212 555 0100"])]), Err(DropReason::NotAValue));
        assert_eq!(phone(&[json!("n/a")]), Err(DropReason::InvalidPhone));
        for script in ["javascript:alert(1)", "mailto:jane@acme.test", "//", "\\\\", ":"] {
            assert_eq!(url(&[json!(script)]), Err(DropReason::InvalidUrl), "{script}");
        }
        assert_eq!(url(&[json!("//acme.test/a")]).as_deref(), Ok("http://acme.test/a"));
        assert_eq!(url(&[json!("acme.test/a")]).as_deref(), Ok("http://acme.test/a"));
        assert_eq!(url(&[json!("http://")]), Err(DropReason::InvalidUrl));
        assert_eq!(url(&[json!("n/a")]), Err(DropReason::InvalidUrl));
        assert_eq!(url(&[json!("http://[::1]/")]).as_deref(), Ok("http://[::1]/"));
        assert_eq!(id(&[json!(true)]), Err(DropReason::NotAValue));
        assert_eq!(id(&[json!(u64::MAX)]).as_deref(), Ok("18446744073709551615"));
        assert_eq!(id(&[serde_json::from_str("110169484474386276334").unwrap()]), Err(DropReason::NotAValue));
        assert_eq!(line(&[json!(false)]), Err(DropReason::NotAValue));
        assert_eq!(line(&[json!("true")]), Err(DropReason::NotAValue));
        assert_eq!(line(&[json!("True Fit")]), Ok(json!("True Fit")));
        assert_eq!(line(&[json!("Jane\n Doe")]), Ok(json!("Jane Doe")));
        assert_eq!(line(&[json!("é".repeat(2000))]), Ok(json!("é".repeat(MAX_TEXT))));
    }
}
