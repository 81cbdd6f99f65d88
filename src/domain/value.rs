//! Reading values in events: text, numbers and domains, each in one notation.

use serde_json::{Number, Value};

use crate::domain::web_address;

/// Text without control characters, except line breaks and tabs, and without what is invisible at its ends.
pub(crate) fn clean(text: &str) -> String {
    let kept: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    trim(&kept).to_owned()
}

/// Text without what is invisible at its ends. Copied text brings such characters along: the byte-order mark of a CSV
/// file, the direction marks around a phone number in an address book, the soft hyphen of a web page.
pub(crate) fn trim(text: &str) -> &str {
    text.trim_matches(is_invisible)
}

/// Whitespace (the non-breaking space too), control characters, and the characters of Unicode's
/// `Default_Ignorable_Code_Point` that text has between words. Variation selectors and tags are not among them: they
/// belong to the emoji before them.
fn is_invisible(c: char) -> bool {
    c.is_whitespace()
        || c.is_control()
        || matches!(
            c,
            // Soft hyphen, combining grapheme joiner.
            '\u{AD}' | '\u{34F}'
            // Direction marks, embeddings, overrides and isolates.
            | '\u{61C}' | '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}'
            // Zero-width space, non-joiner and joiner, word joiner, invisible operators, deprecated format characters.
            | '\u{200B}'..='\u{200D}' | '\u{2060}'..='\u{2065}' | '\u{206A}'..='\u{206F}'
            // Byte-order mark, interlinear annotation, the Mongolian vowel separator, Hangul fillers.
            | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{180E}' | '\u{115F}' | '\u{1160}' | '\u{3164}' | '\u{FFA0}'
        )
}

/// Whether two words differ only in case and in what is invisible at their ends.
pub(crate) fn same_word(one: &str, other: &str) -> bool {
    trim(one).to_lowercase() == trim(other).to_lowercase()
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

/// The zeros of the decimal digits in scripts of today. In each script, the other nine digits follow the zero.
pub(crate) const ZEROS: [char; 28] = [
    '\u{0660}', '\u{06F0}', '\u{07C0}', '\u{0966}', '\u{09E6}', '\u{0A66}', '\u{0AE6}', '\u{0B66}',
    '\u{0BE6}', '\u{0C66}', '\u{0CE6}', '\u{0D66}', '\u{0DE6}', '\u{0E50}', '\u{0ED0}', '\u{0F20}',
    '\u{1040}', '\u{1090}', '\u{17E0}', '\u{1810}', '\u{1946}', '\u{19D0}', '\u{1A80}', '\u{1B50}',
    '\u{1BB0}', '\u{A9D0}', '\u{ABF0}', '\u{FF10}',
];

/// A digit of any script as the ASCII digit. Other characters stay. Phones with an Arabic or Persian locale write numbers
/// and times in the digits of their script.
pub(crate) fn ascii_digit(c: char) -> char {
    let digit = |zero: char| u32::from(c).checked_sub(u32::from(zero)).filter(|digit| *digit < 10);
    let digit = if c.is_ascii() { None } else { ZEROS.into_iter().find_map(digit) };
    digit.and_then(|digit| char::from_digit(digit, 10)).unwrap_or(c)
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

    #[test]
    fn invisible_characters_at_the_ends_do_not_count() {
        let invisible = [
            "\u{feff}",
            "\u{200b}",
            "\u{200e}",
            "\u{202a}",
            "\u{202c}",
            "\u{2066}",
            "\u{2069}",
            "\u{ad}",
            "\u{a0}",
            "\u{2060}",
            "\u{3000}",
            "\u{202f}",
            "\u{0}",
            " \u{feff}\u{200b}\n",
        ];
        for mark in invisible {
            assert_eq!(clean(&format!("{mark}u 1{mark}")), "u 1", "{mark:?}");
            assert_eq!(clean(mark), "", "{mark:?}");
            assert!(same_word(&format!("{mark}U1"), "u1"), "{mark:?}");
        }
        for visible in ["❤\u{fe0f}", "שלום", "a\u{200d}b", "a\u{ad}b", "🏴\u{e0067}\u{e007f}"] {
            assert_eq!(clean(visible), visible);
        }
    }
}
