//! Reading points in time, in the notations that producers use.
//!
//! Beside RFC 3339 and seconds, milliseconds, microseconds or nanoseconds since 1970, these are read, because public
//! SDKs and standard libraries write them:
//!
//! | notation | written by |
//! | --- | --- |
//! | `2021-10-16T16:00:27.029:Z` | analytics-swift (issue 75) |
//! | `٢٠٢٣-٠٤-١٩T٠٤:٠٣:٤٦.٨٨٠Z` | analytics-android (pull request 350), analytics-kotlin (pull request 170) |
//! | `2026-09-02T3:33:07 PMZ` | `NSDateFormatter` without a fixed locale (Apple QA1480; posthog-ios, pull request 106) |
//! | `2021-10-16 16:00:27 +0000`, `2021-10-16 16:00:27 UTC` | Ruby, Postgres, `BigQuery` |
//! | `2021-10-16 16:00:27.029 +0000 UTC m=+0.5` | Go |
//! | `Sat, 16 Oct 2021 16:00:27 GMT` | HTTP, `toUTCString` of JavaScript |
//! | `Sat Oct 16 2021 16:00:27 GMT+0000 (Coordinated Universal Time)` | `toString` of JavaScript |
//! | `Sat Oct 16 16:00:27 UTC 2021` | Java, `date` |
//! | `2021/10/16 16:00:27` | Go's log, older Ruby |
//! | `2021-10-16T24:00:00Z` | ISO 8601 until 2019: midnight at the end of that day |
//!
//! A notation whose order of day and month is a matter of country, `10/11/2021`, is not read: a wrong time is worse than
//! none.

use std::ops::Range;

use jiff::civil::{Date, DateTime, Time};
use jiff::fmt::rfc2822;
use jiff::fmt::strtime::BrokenDownTime;
use jiff::fmt::temporal::Pieces;
use jiff::tz::{Offset, TimeZone};
use jiff::{Timestamp, ToSpan};
use serde_json::Value;

use crate::domain::dropped::DropReason;
use crate::domain::value;

/// The longest time that is read, in bytes.
const LONGEST: usize = 100;

/// 1971-01-01. An event before it has no usable time: its producer sent a zero time, or the time since its start. Mixpanel
/// draws the line at the same place.
const EARLIEST_EVENT: i64 = 365 * 24 * 60 * 60;

/// A point in time for a field in Close.
pub(crate) fn timestamp(value: &Value) -> Result<Timestamp, DropReason> {
    let text = single(value)?;
    if is_zero_date(&text) {
        return Err(DropReason::Placeholder);
    }
    let at = match read(&text) {
        Some(read) => read.timestamp().ok_or(DropReason::NotADate)?,
        None => from_number(&text)?,
    };
    if is_zero(at) { Err(DropReason::Placeholder) } else { Ok(at) }
}

/// The day of a point in time as it is written, before conversion to UTC. Midnight of 1970-01-01 is a day here: people are
/// born on it, and programs write a day as a time.
pub(crate) fn date(value: &Value) -> Result<Date, DropReason> {
    let text = single(value)?;
    if is_zero_date(&text) {
        return Err(DropReason::Placeholder);
    }
    match read(&text) {
        Some(read) if is_zero_year(read.date) => Err(DropReason::Placeholder),
        Some(read) => Ok(read.date),
        None => from_number(&text).map(|at| TimeZone::UTC.to_datetime(at).date()),
    }
}

/// When an event happened. [`DropReason::Placeholder`] if the producer has sent a zero time, and
/// [`DropReason::UnreadableTime`] if it has sent something else that is not a plausible time.
pub(crate) fn of_event(value: &Value) -> Result<Timestamp, DropReason> {
    // A year in seconds since 1970. Fields of Close may hold such numbers as years or days, events do not.
    let is_in_1970 = single(value)
        .ok()
        .and_then(|text| serde_json::from_str::<f64>(&text).ok())
        .is_some_and(|number| (0.0..31_536_000.0).contains(&number));
    match timestamp(value) {
        _ if is_in_1970 => Err(DropReason::Placeholder),
        Ok(at) if is_event_time(at) => Ok(at),
        // 1970, and its first hours in the time zones west of Greenwich.
        Ok(at) if at.as_second() > -24 * 60 * 60 => Err(DropReason::Placeholder),
        Err(DropReason::Placeholder) => Err(DropReason::Placeholder),
        Ok(_) | Err(_) => Err(DropReason::UnreadableTime),
    }
}

/// Whether an event can have happened then.
pub fn is_event_time(at: Timestamp) -> bool {
    at.as_second() >= EARLIEST_EVENT
}

/// The times that programs have before they have one: year 1 (Go, .NET) and 1970 to the second (everything else).
fn is_zero(at: Timestamp) -> bool {
    at.as_second() == 0 || is_zero_year(TimeZone::UTC.to_datetime(at).date())
}

fn is_zero_year(date: Date) -> bool {
    date.year() <= 1
}

/// The zero dates that are not dates: `0000-00-00` of `MySQL`, and how PHP reads it.
fn is_zero_date(text: &str) -> bool {
    text.starts_with("0000-00-00") || text.starts_with("-0001-11-30")
}

fn single(value: &Value) -> Result<String, DropReason> {
    match value {
        Value::Bool(_) | Value::Array(_) | Value::Object(_) => Err(DropReason::NotAValue),
        Value::Null => Err(DropReason::NotADate),
        Value::String(text) if text.len() > LONGEST => Err(DropReason::NotADate),
        Value::String(_) | Value::Number(_) => value::text(value).ok_or(DropReason::NotADate),
    }
}

/// Seconds, milliseconds, microseconds or nanoseconds since 1970, between 1973 and 2286. Other numbers are years, dates
/// such as 20260131 or errors, and a wrong date is worse than no date.
fn from_number(text: &str) -> Result<Timestamp, DropReason> {
    const SECONDS: Range<f64> = 1e8..1e10;
    let number: f64 = serde_json::from_str(text).map_err(|_| DropReason::NotADate)?;
    // The first second of year 1, in seconds and in milliseconds.
    if [0.0, -62_135_596_800.0, -62_135_596_800_000.0].contains(&number) {
        return Err(DropReason::Placeholder);
    }
    let scales = [1e0, 1e3, 1e6, 1e9];
    let scale = scales.into_iter().find(|scale| SECONDS.contains(&(number / scale)));
    let milliseconds = scale.map(|scale| (number / scale * 1e3).round()).ok_or(DropReason::NotADate)?;
    #[expect(clippy::cast_possible_truncation, reason = "within range")]
    Timestamp::from_millisecond(milliseconds as i64).map_err(|_| DropReason::NotADate)
}

/// A time as it is written.
#[derive(Clone, Copy, Debug)]
struct Written {
    date: Date,
    time: Option<Time>,
    /// UTC if the text has none.
    offset: Offset,
}

impl Written {
    fn timestamp(self) -> Option<Timestamp> {
        let time = self.time.unwrap_or(Time::midnight());
        self.offset.to_timestamp(self.date.to_datetime(time)).ok()
    }
}

fn read(text: &str) -> Option<Written> {
    let text = value::single_spaces(&text.chars().map(value::ascii_digit).collect::<String>());
    let starts_with_year = text.len() > 4 && text.bytes().take(4).all(|byte| byte.is_ascii_digit());
    if starts_with_year { year_first(&text) } else { named_month(&text) }
}

/// ISO 8601 and its relatives.
fn year_first(text: &str) -> Option<Written> {
    if let Some(written) = iso(text) {
        return Some(written);
    }
    // Go's monotonic clock, and the name of the zone.
    let text = text.split_once(" m=").map_or(text, |(text, _)| text);
    let named = ["UTC", "GMT", "Z", "z"].iter().find_map(|zone| text.strip_suffix(zone));
    let text = named.unwrap_or(text).trim_end();
    // The offset follows the time, so a sign in the date is none.
    let start = text.find(':').and_then(|colon| Some(colon + text[colon..].find(['+', '-'])?));
    let (text, offset) = match (start, named) {
        (Some(start), _) => text.split_at(start),
        (None, Some(_)) => (text, "Z"),
        (None, None) => (text, ""),
    };
    let text = text.trim_end_matches([' ', ':']);
    let (day, time) = text.split_once(['T', 't', ' ']).unwrap_or((text, ""));
    let day = day.replace('/', "-");
    if time.is_empty() {
        return iso(&day);
    }
    if let Some(seconds) = time.strip_prefix("24:00")
        && seconds.chars().all(|c| matches!(c, '0' | ':' | '.' | ','))
    {
        let midnight = iso(&format!("{day}T00:00:00{offset}"))?;
        return Some(Written { date: midnight.date.checked_add(1.day()).ok()?, ..midnight });
    }
    iso(&format!("{day}T{}{offset}", twenty_four_hours(time)?))
}

/// A time of day with two digits for the hour, of 24.
fn twenty_four_hours(time: &str) -> Option<String> {
    let (hour, rest) = time.split_once(':')?;
    let hour: u8 = hour.parse().ok()?;
    let marked = |marker: &str| rest.strip_suffix(marker).map(str::trim_end);
    let (hour, rest) = match (marked("AM"), marked("PM")) {
        (None, None) => (hour, rest),
        (morning, afternoon) => {
            let half_day = if afternoon.is_some() { 12 } else { 0 };
            ((1..=12).contains(&hour).then_some(hour % 12 + half_day)?, morning.or(afternoon)?)
        }
    };
    Some(format!("{hour:02}:{rest}"))
}

fn iso(text: &str) -> Option<Written> {
    let pieces = Pieces::parse(text).ok()?;
    let offset = pieces.to_numeric_offset();
    // A zone by name has no offset without a time zone database.
    let known = offset.is_some() || pieces.time_zone_annotation().is_none();
    known.then(|| Written { date: pieces.date(), time: pieces.time(), offset: offset.unwrap_or(Offset::UTC) })
}

fn named_month(text: &str) -> Option<Written> {
    let text = text.split_once(" (").map_or(text, |(text, _)| text);
    let written = |at: DateTime, offset| Written { date: at.date(), time: Some(at.time()), offset };
    if let Ok(zoned) = rfc2822::parse(text) {
        return Some(written(zoned.datetime(), zoned.offset()));
    }
    let formats = [
        "%a %b %d %Y %H:%M:%S GMT%z",
        "%a %b %d %H:%M:%S UTC %Y",
        "%a %b %d %H:%M:%S GMT %Y",
        "%a %b %d %H:%M:%S %Y",
    ];
    let parsed = formats.iter().find_map(|format| BrokenDownTime::parse(format, text).ok())?;
    Some(written(parsed.to_datetime().ok()?, parsed.offset().unwrap_or(Offset::UTC)))
}

/// A time as Close returns it: with `Z`, any offset, or none, which is UTC (close-api.md §15).
pub(crate) fn read_back(text: &str) -> Option<Timestamp> {
    if text.len() > LONGEST { None } else { iso(text)?.timestamp() }
}

/// A time in Close's notation: UTC with six decimals, of which Close keeps milliseconds (close-api.md §1).
pub(crate) fn format_timestamp(timestamp: Timestamp) -> String {
    let timestamp = Timestamp::from_millisecond(timestamp.as_millisecond()).unwrap_or(timestamp);
    timestamp.strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00").to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn shown(result: Result<Timestamp, DropReason>) -> Result<String, &'static str> {
        result.map(|at| at.to_string()).map_err(DropReason::label)
    }

    #[test]
    fn the_notations_of_sdks_and_libraries_are_read() {
        let cases = [
            ("2021-10-16T16:00:27.029Z", "2021-10-16T16:00:27.029Z"),
            ("2021-10-16T16:00:27.029:Z", "2021-10-16T16:00:27.029Z"),
            ("2021-10-16T18:00:27.029:+02:00", "2021-10-16T16:00:27.029Z"),
            ("2021-10-16 16:00:27", "2021-10-16T16:00:27Z"),
            ("2021-10-16 16:00:27 UTC", "2021-10-16T16:00:27Z"),
            ("2021-10-16 16:00:27.029 UTC", "2021-10-16T16:00:27.029Z"),
            ("2021-10-16T16:00:27.029UTC", "2021-10-16T16:00:27.029Z"),
            ("2021-10-16 16:00:27 GMT", "2021-10-16T16:00:27Z"),
            ("2021-10-16 16:00:27 Z", "2021-10-16T16:00:27Z"),
            ("2021-10-16t16:00:27z", "2021-10-16T16:00:27Z"),
            ("2021-10-16T18:00:27+0200", "2021-10-16T16:00:27Z"),
            ("2021-10-16T18:00:27+02", "2021-10-16T16:00:27Z"),
            ("2021-10-16 18:00:27 +0200", "2021-10-16T16:00:27Z"),
            ("2021-10-16 11:00:27 -05:00", "2021-10-16T16:00:27Z"),
            ("2021-10-16 18:00:27.029 +0200 CEST", "unreadable"),
            ("2021-10-16 16:00:27.029 +0000 UTC", "2021-10-16T16:00:27.029Z"),
            ("2021-10-16 16:00:27.029 +0000 UTC m=+0.000000001", "2021-10-16T16:00:27.029Z"),
            ("2021-10-16T16:00:27,029Z", "2021-10-16T16:00:27.029Z"),
            ("2021-10-16T16:00Z", "2021-10-16T16:00:00Z"),
            ("2021-10-16", "2021-10-16T00:00:00Z"),
            ("20211016T160027Z", "2021-10-16T16:00:27Z"),
            ("2021/10/16 16:00:27", "2021-10-16T16:00:27Z"),
            ("2021/10/16", "2021-10-16T00:00:00Z"),
            ("2021-10-16T18:00:27+02:00[Europe/Berlin]", "2021-10-16T16:00:27Z"),
            ("2021-10-16T18:00:27[Europe/Berlin]", "unreadable"),
            ("2021-10-16T24:00:00Z", "2021-10-17T00:00:00Z"),
            ("2021-12-31T24:00:00.000+01:00", "2021-12-31T23:00:00Z"),
            ("2021-10-16T24:05:00Z", "unreadable"),
            ("2021-10-16T25:00:00Z", "unreadable"),
            ("2021-10-16T3:33:07 PMZ", "2021-10-16T15:33:07Z"),
            ("2021-10-16T12:33:07 AMZ", "2021-10-16T00:33:07Z"),
            ("2021-10-16T12:33:07\u{202f}PMZ", "2021-10-16T12:33:07Z"),
            ("2021-10-16T10:30:33 PM+0100", "2021-10-16T21:30:33Z"),
            ("2021-10-16T13:30:33 PMZ", "unreadable"),
            ("٢٠٢١-١٠-١٦T١٦:٠٠:٢٧.٠٢٩Z", "2021-10-16T16:00:27.029Z"),
            ("۲۰۲۱-۱۰-۱۶T۱۶:۰۰:۲۷Z", "2021-10-16T16:00:27Z"),
            ("\u{feff}2021-10-16T16:00:27Z\u{200e}", "2021-10-16T16:00:27Z"),
            ("Sat, 16 Oct 2021 16:00:27 GMT", "2021-10-16T16:00:27Z"),
            ("Sat, 16 Oct 2021 18:00:27 +0200", "2021-10-16T16:00:27Z"),
            ("Sat Oct 16 2021 18:00:27 GMT+0200 (Central European Summer Time)", "2021-10-16T16:00:27Z"),
            ("Sat Oct 16 16:00:27 UTC 2021", "2021-10-16T16:00:27Z"),
            ("Sat Oct 16 16:00:27 2021", "2021-10-16T16:00:27Z"),
            ("1634400027", "2021-10-16T16:00:27Z"),
            ("1634400027.029", "2021-10-16T16:00:27.029Z"),
            ("1634400027029", "2021-10-16T16:00:27.029Z"),
            ("1634400027029000", "2021-10-16T16:00:27.029Z"),
            ("1634400027029000000", "2021-10-16T16:00:27.029Z"),
            ("10/11/2021", "unreadable"),
            ("16.10.2021", "unreadable"),
            ("yesterday", "unreadable"),
            ("Invalid Date", "unreadable"),
            ("2021-10-16T16:00:27-", "unreadable"),
            ("2021-10-16T", "2021-10-16T00:00:00Z"),
        ];
        for (text, expected) in cases {
            let expected =
                if expected == "unreadable" { Err("unreadable_time") } else { Ok(expected.to_owned()) };
            assert_eq!(shown(of_event(&json!(text))), expected, "{text}");
        }
        let long = format!("2021-10-16{}T16:00:27Z", " ".repeat(LONGEST));
        assert_eq!(shown(of_event(&json!(long))), Err("unreadable_time"));
        for value in [json!(1_634_400_027_029_i64), json!(1_634_400_027.029)] {
            assert_eq!(shown(of_event(&value)), Ok("2021-10-16T16:00:27.029Z".into()), "{value}");
        }
        for value in [json!(true), json!([1]), json!({"$date": "2021-10-16"}), json!(90_000_000_000_i64)] {
            assert_eq!(shown(of_event(&value)), Err("unreadable_time"), "{value}");
        }
    }

    #[test]
    fn a_zero_time_is_no_time() {
        let zero = [
            json!("0001-01-01T00:00:00Z"),
            json!("0001-01-01T00:00:00"),
            json!("0001-01-01 00:00:00 +0000 UTC"),
            json!("0001-01-01"),
            json!("0000-00-00 00:00:00"),
            json!("-0001-11-30T00:00:00+0000"),
            json!("1970-01-01T00:00:00.000Z"),
            json!("1969-12-31T16:00:00-08:00"),
            json!("Thu, 01 Jan 1970 00:00:00 GMT"),
            json!(0),
            json!("0"),
            json!(0.0),
            json!(-62_135_596_800_i64),
            json!(-62_135_596_800_000_i64),
        ];
        for value in zero {
            assert_eq!(shown(of_event(&value)), Err("placeholder"), "{value}");
            assert_eq!(shown(timestamp(&value)), Err("placeholder"), "{value}");
        }
        // For a field, these are a date or an error.
        for (value, expected) in [
            (json!("1970-01-01"), Err("placeholder")),
            (json!("1970-03-01T10:00:00Z"), Err("placeholder")),
            (json!("1970-01-01T05:30:00+05:30"), Err("placeholder")),
            (json!(5), Err("placeholder")),
            (json!("1970-12-31T23:59:59Z"), Err("placeholder")),
            (json!("1971-01-01T00:00:00Z"), Ok("1971-01-01T00:00:00Z".to_owned())),
            (json!("1402-01-30T10:00:00Z"), Err("unreadable_time")),
        ] {
            assert_eq!(shown(of_event(&value)), expected, "{value}");
        }
        for (text, day) in [
            ("1970-01-01", "1970-01-01"),
            ("1970-01-01T00:00:00.000Z", "1970-01-01"),
            ("1970-01-01 00:00:00", "1970-01-01"),
            ("1970-01-01T00:00:00+05:30", "1970-01-01"),
            ("1969-12-31T16:00:00-08:00", "1969-12-31"),
            ("Thu, 01 Jan 1970 00:00:00 GMT", "1970-01-01"),
            ("1902-05-03", "1902-05-03"),
        ] {
            assert_eq!(date(&json!(text)).map(|date| date.to_string()).as_deref(), Ok(day), "{text}");
        }
        for value in [
            json!("0001-01-01"),
            json!("0001-01-01T00:00:00Z"),
            json!("0000-00-00"),
            json!("0000-00-00 00:00:00"),
            json!("-0001-11-30T00:00:00+0000"),
            json!("0"),
            json!(0),
            json!(-62_135_596_800_i64),
        ] {
            assert_eq!(date(&value), Err(DropReason::Placeholder), "{value}");
        }
    }

    proptest! {
        #[test]
        fn reading_any_text_does_not_panic(text in "\\PC{0,40}", digits in "[0-9TZ:. +/-]{0,40}") {
            for text in [text, digits] {
                let _ = (of_event(&json!(text)), date(&json!(text)));
            }
        }
    }
}
