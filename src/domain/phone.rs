//! Reading a phone number as producers write it.
//!
//! Close parses and rewrites a number with libphonenumber (close-api.md §15). Here every spelling is first written with
//! ASCII digits, so that the number can be compared with what Close returns. Otherwise it would be appended again with
//! every event.

use crate::domain::value::ascii_digit;

/// The maximum number of digits in a phone number (ITU-T E.164).
const MAX_DIGITS: usize = 15;

/// The number with ASCII digits, or `None` if the text is not a phone number.
///
/// Parts that Close would read in another way are removed: an extension, and the zero of `+44 (0)20 …`, which is not
/// dialled from abroad.
pub(crate) fn normalize(text: &str) -> Option<String> {
    let text: String = text.chars().filter_map(ascii).collect();
    let text = text.trim();
    let scheme = text.get(..4).filter(|scheme| scheme.eq_ignore_ascii_case("tel:"));
    let text = scheme.and_then(|scheme| text.get(scheme.len()..)).unwrap_or(text).trim_start();
    match from_float(text) {
        Float::Number(number) => return Some(number),
        Float::Lost => return None,
        Float::No => {}
    }
    let end = text.find(|c: char| c.is_alphabetic() || ";,#".contains(c)).unwrap_or(text.len());
    let (number, extension) = text.split_at(end);
    let number = number.trim_end();
    let word: String = extension.chars().filter(|c| c.is_alphabetic()).collect();
    let is_extension = ["", "x", "ext", "extension"].contains(&word.to_lowercase().as_str());
    let number = if number.starts_with('+') { number.replacen("(0)", "", 1) } else { number.to_owned() };
    (is_extension && fits(&digits(&number))).then_some(number)
}

/// The ASCII digits of a number.
pub(crate) fn digits(number: &str) -> String {
    number.chars().filter(char::is_ascii_digit).collect()
}

fn fits(digits: &str) -> bool {
    (1..=MAX_DIGITS).contains(&digits.len())
}

/// A character as libphonenumber reads it: digits of all scripts, full-width punctuation, dashes, and nothing for
/// invisible characters, which come with numbers that were copied from an address book.
fn ascii(c: char) -> Option<char> {
    match c {
        '\u{00AD}'
        | '\u{200B}'..='\u{200F}'
        | '\u{202A}'..='\u{202E}'
        | '\u{2060}'..='\u{2069}'
        | '\u{FEFF}' => None,
        '\u{2010}'..='\u{2015}' | '\u{2212}' | '\u{30FC}' => Some('-'),
        '\u{3000}' => Some(' '),
        '\u{FE62}' => Some('+'),
        // The full-width form of an ASCII character.
        '\u{FF01}'..='\u{FF5E}' => char::from_u32(u32::from(c) - 0xFEE0),
        _ => Some(ascii_digit(c)),
    }
}

/// The fewest digits before `.0` that make a float. Shorter groups, as in `030.0`, can be an area code and a number.
const SHORTEST: usize = 7;
/// The most zeros that end a number in scientific notation. A spreadsheet writes `1.21256E+10` and drops the other digits.
const MOST_ZEROS: usize = 2;

/// A text as a number that a program stored as a float: `12125550100.0` or `1.21255501E10`.
enum Float {
    Number(String),
    /// It has lost digits.
    Lost,
    /// The text has another form.
    No,
}

fn from_float(text: &str) -> Float {
    let (sign, unsigned) = text.strip_prefix('+').map_or(("", text), |rest| ("+", rest));
    let Some((whole, rest)) = unsigned.split_once('.') else { return Float::No };
    let (fraction, exponent) = rest.split_once(['e', 'E']).map_or((rest, None), |(f, e)| (f, Some(e)));
    let only_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !only_digits(whole) || !only_digits(fraction) {
        return Float::No;
    }
    let number = if let Some(exponent) = exponent {
        let Ok(exponent) = exponent.strip_prefix('+').unwrap_or(exponent).parse::<usize>() else {
            return Float::No;
        };
        let zeros = exponent.checked_sub(fraction.len());
        let zeros = zeros.filter(|zeros| *zeros <= MOST_ZEROS && whole.len() == 1);
        zeros.map(|zeros| format!("{sign}{whole}{fraction}{}", "0".repeat(zeros)))
    } else if whole.len() >= SHORTEST && fraction.bytes().all(|byte| byte == b'0') {
        Some(format!("{sign}{whole}"))
    } else {
        return Float::No;
    };
    number.filter(|number| fits(&digits(number))).map_or(Float::Lost, Float::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_written_with_ascii_digits_and_without_an_extension() {
        let cases = [
            ("+44 (0)20 7946 0958", Some("+44 20 7946 0958")),
            ("(020) 7946 0958", Some("(020) 7946 0958")),
            ("+1 800 444-5555 ext. 12", Some("+1 800 444-5555")),
            ("800 444 5555 x12", Some("800 444 5555")),
            ("tel:+18004445555;ext=12", Some("+18004445555")),
            ("TEL: +1-800-444-5555", Some("+1-800-444-5555")),
            ("1-800-FLOWERS", None),
            ("n/a", None),
            ("()", None),
            ("call 800 444 5555", None),
            ("+1234567890123456", None),
            // Numbers that went through a float.
            ("12125550100.0", Some("12125550100")),
            ("12125550100.00", Some("12125550100")),
            ("+12125550100.0", Some("+12125550100")),
            ("+442079460958.0", Some("+442079460958")),
            ("１２１２５５５０１００.０", Some("12125550100")),
            ("1.21255501E10", Some("12125550100")),
            ("1.2125550143e+10", Some("12125550143")),
            ("4.42079460958E11", Some("442079460958")),
            ("1.21256E+10", None),
            ("1.2E10", None),
            ("1.2125550143e-10", None),
            ("1.5e99999999999999999999", None),
            ("1234567890123456.0", None),
            // Dots as separators.
            ("212.555.0100", Some("212.555.0100")),
            ("555.0100", Some("555.0100")),
            ("030.0", Some("030.0")),
            ("2125550100.5", Some("2125550100.5")),
            // Other scripts.
            ("٠٢١٢٣٤٥٦٧", Some("021234567")),
            ("۰۲۱ ۱۲۳۴ ۵۶۷۸", Some("021 1234 5678")),
            ("+९१ ९८७६५ ४३२१०", Some("+91 98765 43210")),
            ("＋８１（３）１２３４－５６７８", Some("+81(3)1234-5678")),
            ("０３ー１２３４ー５６７８", Some("03-1234-5678")),
            ("＋１　２１２　５５５　０１００", Some("+1 212 555 0100")),
            ("\u{202d}+1 (212) 555\u{2011}0100\u{202c}", Some("+1 (212) 555-0100")),
            ("２１２５５５０１００ ｘ１２", Some("2125550100")),
            ("②①②", None),
        ];
        for (text, number) in cases {
            assert_eq!(normalize(text).as_deref(), number, "{text}");
        }
    }

    #[test]
    fn every_script_has_its_ten_digits() {
        for zero in crate::domain::value::ZEROS {
            for (digit, ascii) in ('0'..='9').enumerate() {
                let other = u32::from(zero) + u32::try_from(digit).unwrap();
                let text: String = std::iter::repeat_n(char::from_u32(other).unwrap(), 7).collect();
                assert!(text.chars().all(char::is_numeric), "{text}");
                assert_eq!(normalize(&text), Some(ascii.to_string().repeat(7)), "{text}");
            }
        }
    }
}
