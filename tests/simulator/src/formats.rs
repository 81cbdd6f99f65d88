//! How Close validates and rewrites email addresses, URLs and phone numbers.

use crate::behaviour::Country;

/// The trimmed address, if it is valid. Stricter than the standards, like the regular expression of Close
/// (close-api.md §3): ASCII, no quotes, and a domain with a dot and a non-numeric last label.
pub(crate) fn email(text: &str) -> Option<&str> {
    let address = text.trim();
    let (local, domain) = address.rsplit_once('@')?;
    let local_is_good = !local.is_empty()
        && local.split('.').all(|atom| {
            !atom.is_empty()
                && atom.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+/=?^_`{}|~-".contains(&b))
        });
    (address.len() <= 254 && local_is_good && is_domain(domain)).then_some(address)
}

fn is_domain(domain: &str) -> bool {
    let labels_are_good = domain.split('.').all(|label| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    });
    let end = domain.rsplit_once('.').map_or("", |(_, end)| end);
    labels_are_good && end.len() >= 2 && !end.bytes().all(|byte| byte.is_ascii_digit())
}

/// The URL, if it is valid. A missing scheme becomes `http://` (close-api.md §3).
pub(crate) fn url(text: &str) -> Option<String> {
    let text = text.trim();
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let parsed = url::Url::parse(&full).ok()?;
    let host = parsed.host_str()?;
    let known_scheme = matches!(parsed.scheme(), "http" | "https" | "ftp");
    let is_ip = matches!(parsed.host(), Some(url::Host::Ipv4(_) | url::Host::Ipv6(_)));
    let has_user = !parsed.username().is_empty() || parsed.password().is_some();
    (known_scheme && !has_user && (is_ip || is_domain(host)) && !full.contains(char::is_whitespace))
        .then_some(full)
}

/// A phone number as Close stores it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Phone {
    /// `+` and digits.
    pub(crate) number: String,
    /// The country, if the number is plausible there.
    pub(crate) country: Option<String>,
    /// The number in the form shown to people.
    pub(crate) formatted: String,
}

/// Rewrites a number as Close does: a number without `+` gets the prefix of the default country, even if it
/// is very short (close-api.md §5). Refuses a number without digits, or longer than E.164 allows.
pub(crate) fn phone(text: &str, default: &Country) -> Option<Phone> {
    let text = text.trim();
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    let code = default.calling_code.as_str();
    let number = if text.starts_with('+') {
        digits
    } else if let Some(international) = digits.strip_prefix("00") {
        international.to_owned()
    } else if code == "1" && digits.len() == 11 && digits.starts_with('1') {
        digits
    } else {
        // Outside North America, a national number is dialled with a leading 0 that does not belong to it.
        let national =
            if code == "1" { digits.as_str() } else { digits.strip_prefix('0').unwrap_or(&digits) };
        if national.is_empty() { String::new() } else { format!("{code}{national}") }
    };
    if number.is_empty() || number.len() > 15 {
        return None;
    }
    let known = [("1", "US"), (code, default.code.as_str()), ("44", "GB"), ("49", "DE"), ("33", "FR")];
    let (prefix, country) = known
        .into_iter()
        .find(|(prefix, _)| number.starts_with(prefix))
        .map_or(("", None), |(prefix, country)| (prefix, (number.len() >= 10).then(|| country.to_owned())));
    let national = &number[prefix.len()..];
    let formatted = match (prefix, national.len()) {
        ("1", 10) => format!("+1 {}-{}-{}", &national[..3], &national[3..6], &national[6..]),
        ("", _) => format!("+{national}"),
        _ => format!("+{prefix} {national}"),
    };
    Some(Phone { number: format!("+{number}"), country, formatted })
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
            ("jane@-example.test", None),
            ("jäne@example.test", None),
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
            ("mailto:jane@example.test", None),
            ("javascript://example.test", None),
            ("not a url", None),
            ("localhost", None),
            ("http://", None),
            ("", None),
        ] {
            assert_eq!(url(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn phones() {
        let us = Country::default();
        let gb = Country { code: "GB".into(), calling_code: "44".into() };
        for (country, text, expected) in [
            (&us, "8004445555", Some(("+18004445555", Some("US"), "+1 800-444-5555"))),
            (&us, "(800) 444-5555", Some(("+18004445555", Some("US"), "+1 800-444-5555"))),
            (&us, "1 800 444 5555", Some(("+18004445555", Some("US"), "+1 800-444-5555"))),
            (&us, "+44 800 444 5555", Some(("+448004445555", Some("GB"), "+44 8004445555"))),
            (&us, "0044 800 444 5555", Some(("+448004445555", Some("GB"), "+44 8004445555"))),
            (&us, "+998901234567", Some(("+998901234567", None, "+998901234567"))),
            (&gb, "8004445555", Some(("+448004445555", Some("GB"), "+44 8004445555"))),
            (&gb, "020 7946 0958", Some(("+442079460958", Some("GB"), "+44 2079460958"))),
            (&gb, "1234", Some(("+441234", None, "+44 1234"))),
            (&us, "call me", None),
            (&us, "+", None),
            (&us, "", None),
            (&us, "+1234567890123456", None),
        ] {
            let found = phone(text, country);
            let found =
                found.as_ref().map(|p| (p.number.as_str(), p.country.as_deref(), p.formatted.as_str()));
            assert_eq!(found, expected, "{text}");
        }
    }
}
