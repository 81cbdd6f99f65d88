//! What the fields of Close take, and how a producer's value is brought into that form.
//!
//! Nothing is sent that Close is known to refuse: one refused value fails the whole call (close-api.md
//! §5). A value is turned into what the field takes where that is sensible, and left out with a
//! [`DropReason`] where it is not. The result has the notation Close gives it back in, so that
//! planning again finds nothing to change.
//!
//! | field | takes |
//! | --- | --- |
//! | text | text; numbers and booleans as text |
//! | number | numbers; text that is one; true as 1, false as 0 |
//! | date | `2026-01-31`; a moment's day as it was written; seconds or milliseconds since 1970, from 1973 on |
//! | datetime | RFC 3339, UTC without an offset; a day's midnight; seconds or milliseconds since 1970 |
//! | choices | a choice, in any case; true and false as `true`/`yes` and `false`/`no`, whichever is a choice |
//! | user | the id, full name or email of a member |
//! | contact, custom object | an id |
//! | several values | a list or a single value; items that do not fit are left out |

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde_json::Value;

use crate::domain::dropped::DropReason;
use crate::domain::schema::{CustomField, FieldKind, Status, User};
use crate::domain::value::{flat, moment, notation, single_spaces, text, whole};

/// Longest name and title Close takes, in characters (close-api.md §5).
pub const MAX_TEXT: usize = 1000;
/// Longest email address Close takes, in characters (close-api.md §3).
const MAX_EMAIL: usize = 254;

/// Why a field does not take a value, and which it was: of a list, the first item that does not fit.
pub type Unfit = (DropReason, Option<Value>);

/// The first of several values, when one is needed.
fn one(values: &[Value]) -> Result<String, DropReason> {
    values.first().and_then(text).ok_or(DropReason::NotAValue)
}

/// A name or title: one line, cut to what Close takes. A boolean is not a name.
pub fn line(values: &[Value]) -> Result<Value, DropReason> {
    if values.first().is_some_and(Value::is_boolean) {
        return Err(DropReason::NotAValue);
    }
    let text = single_spaces(&one(values)?);
    Ok(Value::String(text.chars().take(MAX_TEXT).collect()))
}

/// Text of any length.
pub fn long_text(values: &[Value]) -> Result<Value, DropReason> {
    one(values).map(Value::String)
}

/// An id records are found by.
pub fn id(values: &[Value]) -> Result<String, DropReason> {
    match values.first() {
        Some(value @ (Value::String(_) | Value::Number(_))) => text(value).ok_or(DropReason::NotAValue),
        Some(Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_)) | None => {
            Err(DropReason::NotAValue)
        }
    }
}

/// A lead status by id or label. If Close did not send its statuses, an id is passed on.
pub fn status(values: &[Value], statuses: &[Status]) -> Result<Value, DropReason> {
    let wanted = one(values)?;
    let by_id = statuses.iter().find(|status| status.id == wanted);
    let known = by_id.or_else(|| statuses.iter().find(|status| same_word(&status.label, &wanted)));
    match known {
        Some(status) => Ok(status.id.clone().into()),
        None if statuses.is_empty() && wanted.starts_with("stat_") => Ok(wanted.into()),
        None => Err(DropReason::NotAChoice),
    }
}

/// An email address alone, as Close takes it: without a name in front.
pub fn email(values: &[Value]) -> Result<String, DropReason> {
    let address = one(values)?;
    let options = email_address::Options::default().without_display_text().without_domain_literal();
    let plausible = address.chars().count() <= MAX_EMAIL
        && email_address::EmailAddress::parse_with_options(&address, options).is_ok();
    plausible.then_some(address).ok_or(DropReason::InvalidEmail)
}

/// Most digits of a phone number (ITU-T E.164).
const MAX_PHONE_DIGITS: usize = 15;

/// A phone number. Close parses and rewrites it (close-api.md §5), so what it might read in two ways
/// is taken away first: an extension, and the zero of `+44 (0)20 …` that is not dialled from abroad.
/// Otherwise the number read back would differ, and be appended again with every event.
pub fn phone(values: &[Value]) -> Result<String, DropReason> {
    let whole = one(values)?;
    let number = whole.strip_prefix("tel:").unwrap_or(&whole);
    let end = number.find(|c: char| c.is_alphabetic() || ";,#".contains(c)).unwrap_or(number.len());
    let (number, extension) = number.split_at(end);
    let number = number.trim_end();
    let word: String = extension.chars().filter(|c| c.is_alphabetic()).collect();
    let is_extension = ["", "x", "ext", "extension"].contains(&word.to_lowercase().as_str());
    let number = if number.starts_with('+') { number.replacen("(0)", "", 1) } else { number.to_owned() };
    let digits = number.chars().filter(char::is_ascii_digit).count();
    let plausible = is_extension && (1..=MAX_PHONE_DIGITS).contains(&digits);
    plausible.then_some(number).ok_or(DropReason::InvalidPhone)
}

/// A web page. Close would add the scheme itself, but its schema asks for a URI (close-api.md §5). A host
/// without a dot, `n/a`, is none.
pub fn url(values: &[Value]) -> Result<String, DropReason> {
    let page = one(values)?;
    let whole = if page.contains("://") { page } else { format!("http://{page}") };
    match url::Url::parse(&whole) {
        Ok(url) if url.host_str().is_some_and(|host| host.contains(['.', ':'])) => Ok(whole),
        Ok(_) | Err(_) => Err(DropReason::InvalidUrl),
    }
}

/// What a custom field takes of the values, and why something was left out: both at once when only
/// some items of a list fit.
pub fn custom(values: &[Value], field: &CustomField, users: &[User]) -> (Option<Value>, Option<Unfit>) {
    let (mut fitting, mut unfit) = (Vec::new(), None);
    let items: Vec<&Value> =
        if field.multiple { flat(values).collect() } else { values.first().into_iter().collect() };
    for value in items {
        match item(value, field, users) {
            Ok(value) if !fitting.contains(&value) => fitting.push(value),
            Ok(_) => {}
            Err(reason) => unfit = unfit.or_else(|| Some((reason, Some(value.clone())))),
        }
    }
    let taken = if field.multiple && !fitting.is_empty() { Some(fitting.into()) } else { fitting.pop() };
    (taken, unfit)
}

fn item(value: &Value, field: &CustomField, users: &[User]) -> Result<Value, DropReason> {
    let word = || text(value).ok_or(DropReason::NotAValue);
    match &field.kind {
        FieldKind::Text | FieldKind::Textarea | FieldKind::Hidden => word().map(Value::String),
        FieldKind::Number => number(value),
        FieldKind::Date => date(value).map(|date| date.to_string().into()),
        FieldKind::Datetime => moment(value).map(|moment| notation(moment).into()),
        FieldKind::Choices(choices) => choice(value, choices),
        FieldKind::User => {
            let wanted = word()?;
            let user = users.iter().find(|user| {
                user.id == wanted || same_word(&user.email, &wanted) || same_word(&user.name, &wanted)
            });
            user.map(|user| user.id.clone().into()).ok_or(DropReason::NoSuchUser)
        }
        FieldKind::Contact => reference(&word()?, "cont_"),
        FieldKind::CustomObject => reference(&word()?, "co_"),
        FieldKind::Other(_) if value.is_object() || value.is_array() => Err(DropReason::NotAValue),
        FieldKind::Other(_) => Ok(value.clone()),
    }
}

fn same_word(one: &str, other: &str) -> bool {
    one.trim().to_lowercase() == other.trim().to_lowercase()
}

fn reference(id: &str, prefix: &str) -> Result<Value, DropReason> {
    id.starts_with(prefix).then(|| id.into()).ok_or(DropReason::NotAnId)
}

fn number(value: &Value) -> Result<Value, DropReason> {
    let number = match value {
        Value::Number(number) => Some(number.clone()),
        Value::Bool(flag) => Some(i64::from(*flag).into()),
        // JSON's own grammar, so that neither "inf" nor "0x1F" passes.
        Value::String(text) => serde_json::from_str(text.trim_start_matches('+')).ok(),
        Value::Null | Value::Array(_) | Value::Object(_) => return Err(DropReason::NotAValue),
    };
    let number = number.ok_or(DropReason::NotANumber)?;
    Ok(whole(&number).map_or_else(|| Value::Number(number), Value::from))
}

fn choice(value: &Value, choices: &[String]) -> Result<Value, DropReason> {
    let wanted = text(value).ok_or(DropReason::NotAValue)?;
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

fn date(value: &Value) -> Result<Date, DropReason> {
    if let Some(text) = text(value).filter(|_| !value.is_boolean()) {
        // A moment's day is the one its writer meant, whatever the offset.
        let day = text.get(..10).filter(|_| text.parse::<Timestamp>().is_ok()).unwrap_or(&text);
        if let Ok(day) = day.parse::<Date>() {
            return Ok(day);
        }
    }
    moment(value).map(|moment| TimeZone::UTC.to_datetime(moment).date())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::record::FieldId;

    fn taken(kind: FieldKind, multiple: bool, value: Value) -> Result<Value, &'static str> {
        let field = CustomField { id: FieldId::new("cf_1"), name: "F".into(), kind, multiple };
        let ada = User { id: "user_ada".into(), name: "Ada Account".into(), email: "ada@close.test".into() };
        match custom(&[value], &field, &[ada]) {
            (Some(value), None) => Ok(value),
            (None, Some((reason, _))) => Err(reason.label()),
            (Some(value), Some((reason, _))) => Ok(json!([value, reason.label()])),
            (None, None) => unreachable!(),
        }
    }

    #[test]
    fn every_type_takes_what_can_sensibly_be_turned_into_it() {
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
            (Date, json!(0), Err("not_a_date")),
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
            (CustomObject, json!("co_1"), Ok(json!("co_1"))),
            (Other("emoji".into()), json!(5), Ok(json!(5))),
            (Other("emoji".into()), json!([5]), Err("not_a_value")),
        ];
        for (kind, value, expected) in cases {
            assert_eq!(taken(kind.clone(), false, value.clone()), expected, "{kind:?} {value}");
        }
    }

    #[test]
    fn a_list_loses_only_what_does_not_fit() {
        let colours = || FieldKind::Choices(vec!["red".into(), "blue".into()]);
        let cases = [
            (json!(["red", "Blue", "red"]), Ok(json!(["red", "blue"]))),
            (json!("red"), Ok(json!(["red"]))),
            (json!(["red", "pink"]), Ok(json!([["red"], "not_a_choice"]))),
            (json!([{"a": 1}, "pink"]), Err("not_a_value")),
        ];
        for (value, expected) in cases {
            assert_eq!(taken(colours(), true, value.clone()), expected, "{value}");
        }
    }

    #[test]
    fn a_status_goes_by_id_or_label() {
        let statuses = [Status { id: "stat_1".into(), label: "Potential".into() }];
        let status = |value: &str, statuses| super::status(&[json!(value)], statuses);
        assert_eq!(status("stat_1", &statuses), Ok(json!("stat_1")));
        assert_eq!(status("potential", &statuses), Ok(json!("stat_1")));
        assert_eq!(status("stat_2", &statuses), Err(DropReason::NotAChoice));
        assert_eq!(status("stat_2", &[]), Ok(json!("stat_2")));
        assert_eq!(status("Potential", &[]), Err(DropReason::NotAChoice));
    }

    #[test]
    fn addresses_phones_and_pages_are_checked_before_they_are_sent() {
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
        let phones = [
            ("+44 (0)20 7946 0958", Some("+44 20 7946 0958")),
            ("(020) 7946 0958", Some("(020) 7946 0958")),
            ("+1 800 444-5555 ext. 12", Some("+1 800 444-5555")),
            ("800 444 5555 x12", Some("800 444 5555")),
            ("tel:+18004445555;ext=12", Some("+18004445555")),
            ("1-800-FLOWERS", None),
            ("n/a", None),
            ("()", None),
            ("call 800 444 5555", None),
            ("+1234567890123456", None),
        ];
        for (text, number) in phones {
            assert_eq!(phone(&[json!(text)]).ok().as_deref(), number, "{text}");
        }
        assert_eq!(url(&[json!("acme.test/a")]).as_deref(), Ok("http://acme.test/a"));
        assert_eq!(url(&[json!("http://")]), Err(DropReason::InvalidUrl));
        assert_eq!(url(&[json!("n/a")]), Err(DropReason::InvalidUrl));
        assert_eq!(url(&[json!("http://[::1]/")]).as_deref(), Ok("http://[::1]/"));
        assert_eq!(id(&[json!(true)]), Err(DropReason::NotAValue));
        assert_eq!(id(&[json!(u64::MAX)]).as_deref(), Ok("18446744073709551615"));
        assert_eq!(id(&[serde_json::from_str("110169484474386276334").unwrap()]), Err(DropReason::NotAValue));
        assert_eq!(line(&[json!(false)]), Err(DropReason::NotAValue));
        assert_eq!(line(&[json!("Jane\n Doe")]), Ok(json!("Jane Doe")));
        assert_eq!(line(&[json!("é".repeat(2000))]), Ok(json!("é".repeat(MAX_TEXT))));
    }
}
