//! Completing a URL as producers write it: without a scheme, or with its separators mistyped.

use std::borrow::Cow;

use url::Url;

use crate::domain::dropped::DropReason;

/// The maximum length of a URL, in bytes. One that is longer is not read.
const MAX_LENGTH: usize = 2048;
/// The scheme that Close adds to a URL without one (close-api.md §5).
const DEFAULT_SCHEME: &str = "http";
/// Schemes of the web, which browsers also accept with other slashes than `//`.
const WEB_SCHEMES: [&str; 2] = ["http", "https"];
/// Schemes that run code in the browser of the person who clicks.
const SCRIPTS: [&str; 3] = ["javascript", "vbscript", "data"];

/// The address with a scheme and its two slashes. Everything behind them stays as it was sent.
///
/// | form | example |
/// | --- | --- |
/// | no scheme | `acme.test/a`, `www.acme.test`, `acme.test:8080/a?to=https://x.test` |
/// | scheme of the page it stood on | `//acme.test/a`, `://acme.test` |
/// | other slashes | `HTTP:\\acme.test`, `https:/acme.test`, `http:acme.test`, `http:///acme.test` |
/// | twice | `http://https://acme.test` |
///
/// # Errors
/// [`DropReason::TooLong`], or [`DropReason::InvalidUrl`] for what is not an address of the web, such as
/// `mailto:jane@acme.test` or a script.
pub(crate) fn complete(text: &str) -> Result<Cow<'_, str>, DropReason> {
    let text = text.trim();
    if text.len() > MAX_LENGTH {
        return Err(DropReason::TooLong);
    }
    let whole = with_scheme(text).ok_or(DropReason::InvalidUrl)?;
    if whole.len() > MAX_LENGTH { Err(DropReason::TooLong) } else { Ok(whole) }
}

fn with_scheme(text: &str) -> Option<Cow<'_, str>> {
    let Some((scheme, rest)) = split_scheme(text) else {
        let host = text.strip_prefix(':').filter(|rest| rest.starts_with(is_slash)).unwrap_or(text);
        return Some(format!("{DEFAULT_SCHEME}://{}", host.trim_start_matches(is_slash)).into());
    };
    if SCRIPTS.iter().any(|script| scheme.eq_ignore_ascii_case(script)) {
        return None;
    }
    if !is_web(scheme) {
        return rest.starts_with("//").then_some(text.into());
    }
    // Of two schemes the second counts. Producers do not write three.
    let inner = rest.trim_start_matches(is_slash);
    let doubled = split_scheme(inner).filter(|(scheme, _)| is_web(scheme));
    let (text, (scheme, rest)) = doubled.map_or((text, (scheme, rest)), |parts| (inner, parts));
    let host = rest.trim_start_matches(is_slash);
    if rest.strip_prefix("//") == Some(host) {
        return Some(text.into());
    }
    Some(format!("{}://{host}", scheme.to_ascii_lowercase()).into())
}

fn is_slash(c: char) -> bool {
    matches!(c, '/' | '\\')
}

fn is_web(scheme: &str) -> bool {
    WEB_SCHEMES.iter().any(|web| scheme.eq_ignore_ascii_case(web))
}

/// The address as a URL. `None` if it is not valid or too long.
pub(crate) fn parse(text: &str) -> Option<Url> {
    Url::parse(&complete(text).ok()?).ok()
}

/// The scheme and what follows its colon. `None` if the text has no scheme: a colon may also stand before a port or a
/// password, or in the path.
fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let mut letters = scheme.chars();
    let is_scheme = letters.next().is_some_and(|c| c.is_ascii_alphabetic())
        && letters.all(|c| c.is_ascii_alphanumeric() || "+-".contains(c));
    let is_port = rest.starts_with(|c: char| c.is_ascii_digit());
    (is_scheme && (!is_port || is_web(scheme))).then_some((scheme, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gets_the_scheme_that_it_lacks() {
        let cases = [
            ("http://acme.test", Some("http://acme.test")),
            ("HTTPS://Acme.test/A?b=c:d#e", Some("HTTPS://Acme.test/A?b=c:d#e")),
            ("acme.test", Some("http://acme.test")),
            ("www.acme.test", Some("http://www.acme.test")),
            ("acme.test:8080/a", Some("http://acme.test:8080/a")),
            ("localhost:8080/a", Some("http://localhost:8080/a")),
            ("acme.test/login?to=https://x.test/", Some("http://acme.test/login?to=https://x.test/")),
            ("acme.test:8080/?to=https://x.test/", Some("http://acme.test:8080/?to=https://x.test/")),
            ("[::1]:8080/a", Some("http://[::1]:8080/a")),
            ("//acme.test/a", Some("http://acme.test/a")),
            ("://acme.test/a", Some("http://acme.test/a")),
            ("\\\\acme.test\\a", Some("http://acme.test\\a")),
            ("HTTP:\\\\acme.test", Some("http://acme.test")),
            ("https:/acme.test//b", Some("https://acme.test//b")),
            ("http:acme.test", Some("http://acme.test")),
            ("http:10.0.0.1/a", Some("http://10.0.0.1/a")),
            ("http:////acme.test/a", Some("http://acme.test/a")),
            ("http://https://acme.test/a", Some("https://acme.test/a")),
            ("http://http:\\\\acme.test", Some("http://acme.test")),
            // Not an address, but a host called `http`.
            ("http://http://http://acme.test", Some("http://http://acme.test")),
            ("ftp://acme.test/a", Some("ftp://acme.test/a")),
            ("mailto:jane@acme.test", None),
            ("tel:+12125550100", None),
            ("javascript:alert(1)", None),
            ("JavaScript://acme.test/%0aalert(1)", None),
            ("data:text/html,acme.test", None),
        ];
        for (text, address) in cases {
            assert_eq!(complete(text).ok().as_deref(), address, "{text}");
        }
    }

    #[test]
    fn a_longer_address_is_not_read() {
        let page = |bytes: usize| format!("http://acme.test/{}", "a".repeat(bytes - 17));
        assert!(complete(&page(MAX_LENGTH)).is_ok());
        assert!(complete(&page(MAX_LENGTH)[7..]).is_ok());
        for text in [page(MAX_LENGTH + 1), format!("{}a", &page(MAX_LENGTH)[7..])] {
            assert_eq!(complete(&text), Err(DropReason::TooLong), "{}", text.len());
        }
        for piece in ["http:", "http://", "https:\\\\", "HTTP:/", ":", "/", "data:", "a"] {
            let text = piece.repeat((1 << 20) / piece.len());
            assert_eq!(complete(&text), Err(DropReason::TooLong), "{piece}");
            assert_eq!(parse(&text), None, "{piece}");
        }
    }
}
