//! Reading values in events: text, numbers, times and domains, each in one notation.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Number, Value};

use crate::domain::dropped::DropReason;
use crate::domain::web_address;

/// Text without surrounding whitespace and without control characters, except line breaks and tabs.
pub(crate) fn clean(text: &str) -> String {
    let kept: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    kept.trim().to_owned()
}

/// A single value as text; `None` for lists and objects.
///
/// A whole number has no decimals: an id that is 42 in one event and 42.0 in another is one id. A number beyond the
/// exact range of a float has no text: two ids of 21 digits, sent as numbers, would become the same.
pub(crate) fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(clean(text)).filter(|text| !text.is_empty()),
        Value::Number(number) => match integer(number) {
            Some(integer) => Some(integer.to_string()),
            None => is_exact(number).then(|| number.to_string()),
        },
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// 2^53: up to here a float represents every whole number exactly.
const EXACT: f64 = 9_007_199_254_740_992.0;

fn is_exact(number: &Number) -> bool {
    number.is_u64() || number.as_f64().is_some_and(|float| float.abs() <= EXACT)
}

/// The number as an integer, if it is whole and exact.
pub(crate) fn integer(number: &Number) -> Option<i64> {
    number.as_i64().or_else(|| {
        let float = number.as_f64()?;
        #[expect(clippy::cast_possible_truncation, reason = "whole and within range")]
        (float.fract() == 0.0 && float.abs() <= EXACT).then_some(float as i64)
    })
}

/// The values, with each list replaced by its items.
pub(crate) fn flatten(values: &[Value]) -> impl Iterator<Item = &Value> {
    values.iter().flat_map(|value| value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice))
}

/// Text with each run of whitespace replaced by one space.
pub(crate) fn single_spaces(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The domain of an email address or URL.
pub(crate) fn domain(text: &str) -> Option<String> {
    let host = match text.rsplit_once('@') {
        Some((_, domain)) if !text.contains('/') => domain.to_owned(),
        Some(_) | None => web_address::parse(text)?.host_str()?.trim_start_matches("www.").to_owned(),
    };
    Some(host.to_lowercase()).filter(|host| host.contains('.'))
}

/// A point in time: RFC 3339, a date and time without offset (taken as UTC), or seconds or milliseconds since 1970.
pub(crate) fn timestamp(value: &Value) -> Result<Timestamp, DropReason> {
    if value.is_boolean() || value.is_array() || value.is_object() {
        return Err(DropReason::NotAValue);
    }
    let text = text(value).ok_or(DropReason::NotADate)?;
    text.parse::<Timestamp>()
        .ok()
        .or_else(|| TimeZone::UTC.to_timestamp(text.parse().ok()?).ok())
        .or_else(|| since_1970(serde_json::from_str(&text).ok()?))
        .ok_or(DropReason::NotADate)
}

/// Seconds or milliseconds, between 1973 and 2286. Other numbers are years, dates such as 20260131 or errors, and a
/// wrong date is worse than no date.
fn since_1970(number: f64) -> Option<Timestamp> {
    const SECONDS: std::ops::Range<f64> = 1e8..1e10;
    let milliseconds = if SECONDS.contains(&number) { number * 1000.0 } else { number };
    let plausible = (SECONDS.start * 1000.0..SECONDS.end * 1000.0).contains(&milliseconds);
    #[expect(clippy::cast_possible_truncation, reason = "within range")]
    plausible.then(|| Timestamp::from_millisecond(milliseconds.round() as i64).ok())?
}

/// A time in Close's notation: UTC with six decimals, of which Close keeps milliseconds (close-api.md §1).
pub(crate) fn format_timestamp(timestamp: Timestamp) -> String {
    let timestamp = Timestamp::from_millisecond(timestamp.as_millisecond()).unwrap_or(timestamp);
    timestamp.strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00").to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn different_notations_of_a_number_give_the_same_text() {
        for (value, expected) in [
            (json!(42), Some("42")),
            (json!(42.0), Some("42")),
            (json!(-0.5), Some("-0.5")),
            (json!(18_446_744_073_709_551_615_u64), Some("18446744073709551615")),
            (json!([1]), None),
        ] {
            assert_eq!(text(&value).as_deref(), expected);
        }
    }
}
