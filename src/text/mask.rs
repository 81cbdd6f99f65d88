//! URLs without their secrets.
//!
//! What cannot be told apart is hidden: a URL whose parts are not certain is `***` as a whole. A password with an
//! unescaped slash, such as `amqp://user:123/secret@host`, parses as the host `user` with the port 123. So an `@`
//! behind the host means that the parts are not what they seem.

use url::Url;

const MASK: &str = "***";

/// Parameters of broker URLs whose values are no secrets.
const HARMLESS: [&str; 5] = ["auth_mechanism", "channel_max", "connection_timeout", "frame_max", "heartbeat"];

/// Shows one URL, or several separated by commas, without passwords, unknown parameters and fragments. `***` if one of
/// them is not a valid URL with a host: a comma in a password would otherwise show a part of it.
pub fn masked_urls(urls: &str) -> String {
    let each: Option<Vec<_>> = urls.split(',').map(|url| masked(url.trim())).collect();
    each.map_or_else(|| MASK.to_owned(), |urls| urls.join(","))
}

/// Whether a part of the credentials may be taken for something else.
pub fn is_ambiguous(url: &Url) -> bool {
    [Some(url.path()), url.query(), url.fragment()].iter().flatten().any(|part| part.contains('@'))
}

fn masked(text: &str) -> Option<String> {
    let mut url = Url::parse(text).ok().filter(|url| url.has_host() && !is_ambiguous(url))?;
    if url.password().is_some() {
        url.set_password(Some(MASK)).ok()?;
    } else if !url.username().is_empty() {
        // A token may stand in the place of the user.
        url.set_username(MASK).ok()?;
    }
    if let Some(query) = url.query() {
        let query: Vec<_> =
            query.split('&').map(|pair| if is_harmless(pair) { pair } else { MASK }).collect();
        url.set_query(Some(&query.join("&")));
    }
    if url.fragment().is_some() {
        url.set_fragment(Some(MASK));
    }
    Some(url.to_string())
}

fn is_harmless(pair: &str) -> bool {
    pair.split_once('=').is_some_and(|(key, value)| {
        let is_number = value.bytes().all(|byte| byte.is_ascii_digit());
        HARMLESS.contains(&key) && (is_number || key == "auth_mechanism")
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_is_known_to_be_harmless_is_shown() {
        for (url, shown) in [
            ("amqp://u:secret@a/v", "amqp://u:***@a/v"),
            (
                "amqp://u:secret@a/v, amqps://u:secret@b:1/v?heartbeat=5",
                "amqp://u:***@a/v,amqps://u:***@b:1/v?heartbeat=5",
            ),
            ("amqp://c", "amqp://c"),
            ("amqp://[::1]:5672/%2f", "amqp://[::1]:5672/%2f"),
            ("amqps://c/v?auth_mechanism=external&token=secret", "amqps://c/v?auth_mechanism=external&***"),
            ("amqp://c?heartbeat=secret", "amqp://c?***"),
            ("https://api.close.com/api/v1/", "https://api.close.com/api/v1/"),
            ("https://secret@proxy:3128", "https://***@proxy:3128/"),
            ("http://x/?secret", "http://x/?***"),
            ("http://x/#secret", "http://x/#***"),
            // The parser takes these for a host with a port.
            ("amqp://user:123/secret@host", "***"),
            ("amqp://user:123?secret@host", "***"),
            ("amqp://user:123#secret@host/v", "***"),
            ("http://user:123\\secret@host/", "***"),
            ("amqp://u:1234,secret@a/v", "***"),
            ("secret", "***"),
            ("data:secret", "***"),
            ("u:secret@host", "***"),
            ("", "***"),
        ] {
            assert_eq!(masked_urls(url), shown, "{url}");
        }
    }

    proptest! {
        /// Wherever a password stands in text that is meant as a URL, escaped or not.
        #[test]
        fn no_part_of_a_password_is_shown(
            password in "[0-9a-zA-Z/?#@:,;=&%\\\\\\[\\] .!$^_-]{3,24}",
            scheme in "(amqps?|https?|socks5)://|",
            user in "(guest)?",
            rest in "host(:5672)?(/%2f|/)?(\\?heartbeat=5)?",
            place in 0..4,
        ) {
            let url = match place {
                // With a colon, it would be a user and a password.
                1 if password.contains(':') => return Ok(()),
                0 => format!("{scheme}{user}:{password}@{rest}"),
                1 => format!("{scheme}{password}@{rest}"),
                2 => format!("{scheme}{rest}#{password}"),
                _ => format!("{scheme}host/?token={password}"),
            };
            let shown = masked_urls(&url);
            let own = format!("{scheme}{user}:***@{rest}#?token ***&***,://host/");
            let chars: Vec<char> = password.chars().collect();
            for part in chars.windows(3) {
                let part: String = part.iter().collect();
                prop_assert!(!shown.contains(&part) || own.contains(&part), "{url} -> {shown}");
            }
        }
    }
}
