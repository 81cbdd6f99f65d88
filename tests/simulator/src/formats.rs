//! How Close validates and rewrites email addresses, URLs and phone numbers.

use rlibphonenumber::{PHONE_NUMBER_UTIL, PhoneNumberFormat};

use crate::behaviour::Country;

/// The trimmed address, if it is valid by the rule of Close's own library (close-api.md §15 row 21): one `@`, dots only
/// between other characters, no white space, and a last label of Latin letters. Letters of other scripts and quotes pass.
pub(crate) fn email(text: &str) -> Option<&str> {
    let address = text.trim();
    let (local, domain) = address.split_once('@')?;
    let (host, end) = domain.rsplit_once('.')?;
    let is_plain = |part: &str| part.split('.').all(|atom| !atom.is_empty());
    let has_end = (2..=63).contains(&end.len()) && end.bytes().all(|byte| byte.is_ascii_alphabetic());
    let has_odd = domain.contains('@') || address.contains(char::is_whitespace);
    (address.chars().count() <= 254 && is_plain(local) && is_plain(host) && has_end && !has_odd)
        .then_some(address)
}

/// The URL, if it is valid by the rule of Close's own library. A missing scheme becomes `http://` (close-api.md §3).
/// Credentials pass; a host is an IPv4 address or has a dot, so `http://[::1]/` and `localhost` are refused (§15 row 21).
pub(crate) fn url(text: &str) -> Option<String> {
    let text = text.trim();
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let (scheme, rest) = full.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = match host.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        Some(_) | None => host,
    };
    let is_known = ["http", "https", "ftp"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
    let is_letter = |c: char| c.is_ascii_alphanumeric() || c == '-' || c >= '\u{a1}';
    let (name, end) = host.rsplit_once('.')?;
    let has_end = (2..=63).contains(&end.chars().count()) && end.chars().all(is_letter);
    let is_host = !name.is_empty() && name.chars().all(|c| is_letter(c) || "._+~%".contains(c));
    (is_known && (host.parse::<std::net::Ipv4Addr>().is_ok() || (is_host && has_end))).then_some(full)
}

/// A phone number as Close stores it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Phone {
    /// `+` and digits, and the extension as `x12`.
    pub(crate) number: String,
    /// The country, if the number is valid there.
    pub(crate) country: Option<String>,
    /// The number in the form shown to people.
    pub(crate) formatted: String,
}

/// Rewrites a number as Close's `PhoneField` does, with libphonenumber and the country of the organization
/// (close-api.md §15 row 3). `None` if the library cannot parse it.
pub(crate) fn phone(text: &str, country: Country) -> Option<Phone> {
    // Close removes the country code of a number without `+` before it calls the library.
    let code = country.calling_code().to_string();
    let text = text.strip_prefix(code.as_str()).unwrap_or(text);
    // The table of recorded numbers has this refused, and libphonenumber of today reads it: the harsher reading.
    let is_refused = country.to_string() == "AU" && text.trim_start().starts_with("0011");
    let parsed = PHONE_NUMBER_UTIL.parse(text, Some(country.region())).ok().filter(|_| !is_refused)?;
    let e164 = parsed.format_as(PhoneNumberFormat::E164);
    let extension = parsed.extension.as_deref().filter(|extension| !extension.is_empty());
    let region = PHONE_NUMBER_UTIL.get_region_for_number(&parsed);
    Some(Phone {
        number: extension.map_or_else(|| e164.to_string(), |extension| format!("{e164}x{extension}")),
        country: region.map(|region| region.as_region_str().to_string()),
        formatted: parsed.format_as(PhoneNumberFormat::International).to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emails() {
        for (text, expected) in [
            ("jane@example.test", Some("jane@example.test")),
            ("  Jane.Doe+x@Example.test\n", Some("Jane.Doe+x@Example.test")),
            ("jane@example.co.uk", Some("jane@example.co.uk")),
            ("jane", None),
            ("jane@", None),
            ("@example.test", None),
            ("jane@example", None),
            ("jane@example.1", None),
            ("jane@exa mple.test", None),
            ("ja ne@example.test", None),
            ("jane..doe@example.test", None),
            ("jane@@example.test", None),
            ("jane@example.xn--p1ai", None),
            ("jane@example.рф", None),
            (".jane@example.test", None),
            ("jane.@example.test", None),
            ("jane@.example.test", None),
            ("jäne@exämple.test", Some("jäne@exämple.test")),
            ("\"jane\"@example.test", Some("\"jane\"@example.test")),
            ("", None),
        ] {
            assert_eq!(email(text), expected, "{text}");
        }
        assert_eq!(email(&format!("{}@example.test", "a".repeat(242))), None);
    }

    #[test]
    fn urls() {
        for (text, expected) in [
            ("https://example.test", Some("https://example.test")),
            ("HTTPS://Example.test/A?b=c", Some("HTTPS://Example.test/A?b=c")),
            ("example.test/path", Some("http://example.test/path")),
            (" example.test:8080 ", Some("http://example.test:8080")),
            ("http://127.0.0.1/", Some("http://127.0.0.1/")),
            ("http://jane:secret@example.test/", Some("http://jane:secret@example.test/")),
            ("http://exämple.рф", Some("http://exämple.рф")),
            ("http://[::1]/", None),
            ("mailto:jane@example.test", Some("http://mailto:jane@example.test")),
            ("javascript://example.test", None),
            ("not a url", None),
            ("localhost", None),
            ("http://", None),
            ("", None),
        ] {
            assert_eq!(url(text).as_deref(), expected, "{text}");
        }
    }

    fn country(code: &str) -> Country {
        code.to_owned().try_into().unwrap()
    }

    #[test]
    fn phones_are_rewritten_as_close_does() {
        // What Close keeps of a number, by the country of the organization (close-api.md §15 row 3).
        for (code, text, expected) in [
            ("US", "+49 030 123456", Some("+4930123456")),
            ("US", "+44 020 7946 0958", Some("+442079460958")),
            ("US", "+44 07700 900123", Some("+447700900123")),
            ("US", "+61 0412 345 678", Some("+61412345678")),
            ("US", "+33 06 12 34 56 78", Some("+33612345678")),
            ("US", "+31 06 12345678", Some("+31612345678")),
            ("US", "+972 050-1234567", Some("+972501234567")),
            ("US", "+91 098765 43210", Some("+919876543210")),
            ("US", "+234 0803 123 4567", Some("+2348031234567")),
            ("US", "+7 8 800 555 35 35", Some("+78005553535")),
            ("US", "+54 11 15 1234 5678", Some("+5491112345678")),
            ("US", "+52 044 55 1234 5678", Some("+520445512345678")),
            ("US", "+55 011 91234-5678", Some("+5511912345678")),
            ("US", "+353 087 123 4567", Some("+353871234567")),
            ("US", "+27 082 123 4567", Some("+27821234567")),
            ("US", "+1 1 800 444 5555", Some("+18004445555")),
            ("US", "011 44 20 7946 0958", Some("+442079460958")),
            ("US", "011 49 30 123456", Some("+4930123456")),
            ("US", "1 (800) 444-5555", Some("+18004445555")),
            ("US", "(800) 444-5555", Some("+18004445555")),
            ("US", "8004445555", Some("+18004445555")),
            ("US", "0044 20 7946 0958", Some("+100442079460958")),
            ("US", "+44 (0)20 7946 0958", Some("+442079460958")),
            ("US", "+39 06 1234567", Some("+39061234567")),
            ("US", "+36 06 30 123 4567", Some("+36301234567")),
            ("US", "+370 8 612 34567", Some("+37061234567")),
            ("US", "+375 8 029 123 45 67", Some("+375291234567")),
            ("US", "+380 067 123 4567", Some("+380671234567")),
            ("US", "+90 0532 123 45 67", Some("+905321234567")),
            ("US", "+20 010 1234 5678", Some("+201012345678")),
            ("GB", "07700 900123", Some("+447700900123")),
            ("GB", "00 1 800 444 5555", Some("+18004445555")),
            ("DE", "0049 30 123456", Some("+4930123456")),
            ("DE", "030 123456", Some("+4930123456")),
            ("RU", "8 800 555 35 35", Some("+78005553535")),
            ("AU", "0011 44 20 7946 0958", None),
            ("JP", "010 44 20 7946 0958", Some("+442079460958")),
            ("FR", "06 12 34 56 78", Some("+33612345678")),
            ("HU", "06 30 123 4567", Some("+36301234567")),
            ("MX", "01 55 1234 5678", Some("+52015512345678")),
            ("AR", "011 15 1234 5678", Some("+5491112345678")),
            ("BR", "0 15 11 91234-5678", Some("+5511912345678")),
            ("US", "1234", Some("+1234")),
            ("US", "911", Some("+1911")),
            ("GB", "4412", Some("+4412")),
            ("IN", "0 98765 43210", Some("+919876543210")),
            ("KR", "010-1234-5678", Some("+821012345678")),
            ("NG", "0803 123 4567", Some("+2348031234567")),
            // Recorded in 2017 and 2018.
            ("GB", "8004445555", Some("+448004445555")),
            ("GB", "1234", Some("+441234")),
            // Tests of Close's own field.
            ("US", "+1 (650) 618 - 1234 x 768", Some("+16506181234x768")),
            ("US", "+1 650-618-1234 ext 768", Some("+16506181234x768")),
            ("US", "notaphone", None),
            // Letters become digits.
            ("US", "1-800-FLOWERS", Some("+18003569377")),
            ("US", "+", None),
            ("US", "", None),
        ] {
            let found = phone(text, country(code));
            assert_eq!(found.map(|phone| phone.number).as_deref(), expected, "{code}: {text}");
        }
    }

    #[test]
    fn only_a_valid_phone_has_a_country() {
        for (text, expected) in [
            ("800 444 5555", (Some("US"), "+1 800-444-5555")),
            ("+442079460958", (Some("GB"), "+44 20 7946 0958")),
            ("1234", (None, "+1 234")),
        ] {
            let found = phone(text, Country::default()).unwrap();
            assert_eq!((found.country.as_deref(), found.formatted.as_str()), expected, "{text}");
        }
    }
}
