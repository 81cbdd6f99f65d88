//! Completing a URL as producers write it: without a scheme, or with its separators mistyped.

use std::borrow::Cow;

use url::Url;

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
/// `None` for what is not an address of the web, such as `mailto:jane@acme.test` or a script.
pub(crate) fn complete(text: &str) -> Option<Cow<'_, str>> {
    let text = text.trim();
    let is_slash = |c: char| matches!(c, '/' | '\\');
    let Some((scheme, rest)) = split_scheme(text) else {
        let host = text.strip_prefix(':').filter(|rest| rest.starts_with(is_slash)).unwrap_or(text);
        return Some(format!("{DEFAULT_SCHEME}://{}", host.trim_start_matches(is_slash)).into());
    };
    let lower = scheme.to_ascii_lowercase();
    if SCRIPTS.contains(&lower.as_str()) {
        return None;
    }
    if !WEB_SCHEMES.contains(&lower.as_str()) {
        return rest.starts_with("//").then_some(text.into());
    }
    let host = rest.trim_start_matches(is_slash);
    match split_scheme(host) {
        Some((inner, _)) if WEB_SCHEMES.iter().any(|web| inner.eq_ignore_ascii_case(web)) => complete(host),
        _ if rest.strip_prefix("//") == Some(host) => Some(text.into()),
        _ => Some(format!("{lower}://{host}").into()),
    }
}

/// The address as a URL.
pub(crate) fn parse(text: &str) -> Option<Url> {
    Url::parse(&complete(text)?).ok()
}

/// The scheme and what follows its colon. `None` if the text has no scheme: a colon may also stand before a port or a
/// password, or in the path.
fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let mut letters = scheme.chars();
    let is_scheme = letters.next().is_some_and(|c| c.is_ascii_alphabetic())
        && letters.all(|c| c.is_ascii_alphanumeric() || "+-".contains(c));
    let is_port = rest.starts_with(|c: char| c.is_ascii_digit());
    let is_web = WEB_SCHEMES.iter().any(|web| scheme.eq_ignore_ascii_case(web));
    (is_scheme && (!is_port || is_web)).then_some((scheme, rest))
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
            ("ftp://acme.test/a", Some("ftp://acme.test/a")),
            ("mailto:jane@acme.test", None),
            ("tel:+12125550100", None),
            ("javascript:alert(1)", None),
            ("JavaScript://acme.test/%0aalert(1)", None),
            ("data:text/html,acme.test", None),
        ];
        for (text, address) in cases {
            assert_eq!(complete(text).as_deref(), address, "{text}");
        }
    }
}
