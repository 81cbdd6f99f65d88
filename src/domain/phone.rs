//! Phone numbers: as producers write them, and as Close stores them.
//!
//! Close rewrites every number with libphonenumber to E.164, by the country of the organization, and appends an extension
//! as `x12` (close-api.md §15). A port of the same library gives the stored form here. Comparing the text, or the digits,
//! would append the same number with every event.
//!
//! Numbers are sent as the producer wrote them, only with ASCII digits: what a national number means is Close's decision.

use rlibphonenumber::{PHONE_NUMBER_UTIL, PhoneNumber, PhoneNumberFormat, Region};

use crate::domain::value::{ascii_digit, trim};

/// The maximum number of digits in a phone number (ITU-T E.164).
const MAX_DIGITS: usize = 15;

/// The longest extension that Close keeps, in digits.
const MAX_EXTENSION: usize = 7;

/// The country by which Close reads national numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Country(Region);

impl Country {
    /// Reads two letters, `GB`. `None` for an unknown country, and for one that uses the numbers of another.
    pub fn parse(code: &str) -> Option<Self> {
        let country = Self(code.parse().ok()?);
        country.calling_code().map(|_| country)
    }

    fn calling_code(self) -> Option<i32> {
        PHONE_NUMBER_UTIL.get_country_code_for_region(self.0)
    }

    /// The country by which Close has read a national number, seen from the form in which it stores it. `None` if that
    /// form does not depend on a country.
    pub fn of_answer(sent: &str, stored: &str) -> Option<Self> {
        if stored_form(sent, None).is_some() {
            return None;
        }
        // Countries that share a country code read local numbers in different ways, the main one first. Asking the library
        // for the country of a number would cost hundreds of megabytes of compiled patterns.
        let code = parse(stored, None)?.country_code;
        let countries = PHONE_NUMBER_UTIL.get_regions_for_country_calling_code(code)?.map(Self);
        countries.into_iter().find(|country| stored_form(sent, Some(*country)).as_deref() == Some(stored))
    }
}

/// Two letters.
impl std::fmt::Display for Country {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.as_region_str())
    }
}

/// The longest text that the library reads.
const MAX_TEXT: usize = 250;

/// A number as Close reads it. `None` if it is not a number, or a national one and the country is unknown.
fn parse(text: &str, country: Option<Country>) -> Option<PhoneNumber> {
    if text.len() > MAX_TEXT {
        return None;
    }
    // Close removes the country code of a number without `+` before it calls the library.
    let code = country.and_then(Country::calling_code).map(|code| code.to_string());
    let text = code.and_then(|code| text.strip_prefix(code.as_str())).unwrap_or(text);
    PHONE_NUMBER_UTIL.parse(text, country.map(|Country(region)| region)).ok()
}

/// The form in which Close stores a number: `+442079460958`, with an extension `+442079460958x12`.
pub fn stored_form(text: &str, country: Option<Country>) -> Option<String> {
    let number = parse(trim(text), country)?;
    let extension = number.extension.as_deref().filter(|extension| !extension.is_empty());
    let extension = extension.map(|extension| format!("x{extension}")).unwrap_or_default();
    Some(format!("{}{extension}", number.format_as(PhoneNumberFormat::E164)))
}

/// Whether Close stores two numbers as the same. While the country of the organization is unknown, only if that holds in
/// every country: a national number may be any country's, and to take it for another one would lose it.
pub(crate) fn same(one: &str, other: &str, country: Option<Country>) -> bool {
    let (one, other) = (trim(one), trim(other));
    if one == other {
        return true;
    }
    let form = stored_form(one, country);
    form.is_some() && (form.as_deref() == Some(other) || form == stored_form(other, country))
}

/// The number with ASCII digits, or `None` if the text is not a phone number.
///
/// The zero of `+44 (0)20 …`, which is not dialled from abroad, is removed. An extension is written as ` x12`.
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
    let mut number = if number.starts_with('+') { number.replacen("(0)", "", 1) } else { number.to_owned() };
    if !is_extension || !fits(&digits(&number)) {
        return None;
    }
    let extension = digits(extension);
    if (1..=MAX_EXTENSION).contains(&extension.len()) {
        number.push_str(" x");
        number.push_str(&extension);
    }
    Some(number)
}

/// The ASCII digits of a number.
fn digits(number: &str) -> String {
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
pub(crate) mod tests {
    use super::*;

    #[test]
    fn a_number_is_written_with_ascii_digits() {
        let cases = [
            ("+44 (0)20 7946 0958", Some("+44 20 7946 0958")),
            ("(020) 7946 0958", Some("(020) 7946 0958")),
            ("+1 800 444-5555 ext. 12", Some("+1 800 444-5555 x12")),
            ("800 444 5555 x12", Some("800 444 5555 x12")),
            ("tel:+18004445555;ext=12", Some("+18004445555 x12")),
            ("TEL: +1-800-444-5555", Some("+1-800-444-5555")),
            ("+1 800 444-5555 ext.", Some("+1 800 444-5555")),
            ("+1 800 444-5555 x12345678", Some("+1 800 444-5555")),
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
            ("２１２５５５０１００ ｘ１２", Some("2125550100 x12")),
            ("②①②", None),
        ];
        for (text, number) in cases {
            assert_eq!(normalize(text).as_deref(), number, "{text}");
        }
    }

    /// What Close keeps of a number, by the country of the organization (close-api.md §15).
    pub(crate) const REWRITES: [(&str, &str, &str); 50] = [
        ("US", "+49 030 123456", "+4930123456"),
        ("US", "+44 020 7946 0958", "+442079460958"),
        ("US", "+44 07700 900123", "+447700900123"),
        ("US", "+61 0412 345 678", "+61412345678"),
        ("US", "+33 06 12 34 56 78", "+33612345678"),
        ("US", "+31 06 12345678", "+31612345678"),
        ("US", "+972 050-1234567", "+972501234567"),
        ("US", "+91 098765 43210", "+919876543210"),
        ("US", "+234 0803 123 4567", "+2348031234567"),
        ("US", "+7 8 800 555 35 35", "+78005553535"),
        ("US", "+54 11 15 1234 5678", "+5491112345678"),
        ("US", "+52 044 55 1234 5678", "+520445512345678"),
        ("US", "+55 011 91234-5678", "+5511912345678"),
        ("US", "+353 087 123 4567", "+353871234567"),
        ("US", "+27 082 123 4567", "+27821234567"),
        ("US", "+1 1 800 444 5555", "+18004445555"),
        ("US", "011 44 20 7946 0958", "+442079460958"),
        ("US", "011 49 30 123456", "+4930123456"),
        ("US", "1 (800) 444-5555", "+18004445555"),
        ("US", "(800) 444-5555", "+18004445555"),
        ("US", "8004445555", "+18004445555"),
        ("US", "0044 20 7946 0958", "+100442079460958"),
        ("US", "+44 (0)20 7946 0958", "+442079460958"),
        ("US", "+39 06 1234567", "+39061234567"),
        ("US", "+36 06 30 123 4567", "+36301234567"),
        ("US", "+370 8 612 34567", "+37061234567"),
        ("US", "+375 8 029 123 45 67", "+375291234567"),
        ("US", "+380 067 123 4567", "+380671234567"),
        ("US", "+90 0532 123 45 67", "+905321234567"),
        ("US", "+20 010 1234 5678", "+201012345678"),
        ("GB", "07700 900123", "+447700900123"),
        ("GB", "00 1 800 444 5555", "+18004445555"),
        ("DE", "0049 30 123456", "+4930123456"),
        ("DE", "030 123456", "+4930123456"),
        ("RU", "8 800 555 35 35", "+78005553535"),
        ("JP", "010 44 20 7946 0958", "+442079460958"),
        ("FR", "06 12 34 56 78", "+33612345678"),
        ("HU", "06 30 123 4567", "+36301234567"),
        ("MX", "01 55 1234 5678", "+52015512345678"),
        ("AR", "011 15 1234 5678", "+5491112345678"),
        ("BR", "0 15 11 91234-5678", "+5511912345678"),
        ("US", "1234", "+1234"),
        ("US", "911", "+1911"),
        ("GB", "4412", "+4412"),
        ("IN", "0 98765 43210", "+919876543210"),
        ("KR", "010-1234-5678", "+821012345678"),
        ("NG", "0803 123 4567", "+2348031234567"),
        ("GB", "8004445555", "+448004445555"),
        ("GB", "1234", "+441234"),
        ("US", "+1 (650) 618 - 1234 x 768", "+16506181234x768"),
    ];

    fn country(code: &str) -> Option<Country> {
        Country::parse(code)
    }

    #[test]
    fn a_number_is_the_one_that_close_stores_for_it() {
        for (code, text, stored) in REWRITES {
            let sent = normalize(text).unwrap();
            assert_eq!(stored_form(&sent, country(code)).as_deref(), Some(stored), "{code}: {text}");
            assert!(same(&sent, stored, country(code)), "{code}: {text}");
            // What is stored is not rewritten again.
            assert!(
                same(stored, stored, country(code)) && same(stored, &sent, country(code)),
                "{code}: {text}"
            );
        }
    }

    #[test]
    fn while_the_country_is_unknown_only_what_holds_in_every_country_is_the_same() {
        let regions = PHONE_NUMBER_UTIL.get_supported_regions();
        let countries: Vec<Country> =
            regions.filter_map(|region| Country::parse(&region.as_region_str())).collect();
        assert!(countries.len() > 200, "{}", countries.len());
        let mut recognized = 0;
        for text in REWRITES.map(|(_, text, _)| text).iter().chain(&["020 7946 0958", "+442079460958"]) {
            let sent = normalize(text).unwrap();
            let forms: Vec<String> =
                countries.iter().filter_map(|country| stored_form(&sent, Some(*country))).collect();
            for stored in &forms {
                let is_same = forms.iter().all(|form| form == stored);
                assert_eq!(same(&sent, stored, None), is_same, "{text} {stored}");
                assert_eq!(same(stored, &sent, None), is_same, "{text} {stored}");
                recognized += usize::from(is_same);
            }
        }
        assert!(recognized > 1000, "{recognized}");
    }

    #[test]
    fn two_numbers_are_not_the_same_because_their_ends_agree() {
        for (code, sent, stored) in [
            ("DE", "030 901820", "+4330901820"),
            ("GB", "020 7946 0958", "+12079460958"),
            ("US", "800 444 5555", "+448004445555"),
            ("US", "4445555", "+18004445555"),
            ("US", "+1 800 444 5555 x12", "+18004445555"),
            ("US", "+1 800 444 5555 x12", "+18004445555x13"),
        ] {
            assert!(!same(sent, stored, country(code)), "{code}: {sent} is not {stored}");
        }
    }

    #[test]
    fn the_country_is_learned_from_what_close_stores() {
        for (sent, stored, learned) in [
            ("020 7946 0958", "+442079460958", Some("GB")),
            ("800 444 5555", "+18004445555", Some("US")),
            ("8 800 555 35 35", "+78005553535", Some("RU")),
            ("03-1234-5678", "+81312345678", Some("JP")),
            ("2921234", "+14412921234", Some("BM")),
            ("4301234", "+12464301234", Some("BB")),
            // They do not depend on the country, or were rewritten by another rule.
            ("+44 20 7946 0958", "+442079460958", None),
            ("020 7946 0958", "+12079460958", None),
            ("020 7946 0958", "n/a", None),
        ] {
            let found = Country::of_answer(sent, stored).map(|country| country.to_string());
            assert_eq!(found.as_deref(), learned, "{sent} -> {stored}");
        }
        for code in ["", "U", "usa", "ZZ", "1!"] {
            assert_eq!(Country::parse(code), None, "{code}");
        }
        assert_eq!(Country::parse("gb"), country("GB"));
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
