//! Text from outside that cannot control a terminal, forge a line of output, or hide in it.
//!
//! Producers choose ids, headers and values; users of Close choose names and labels. A terminal obeys escape sequences
//! in them, and characters that change the direction of text make a line read as another one. Every command passes
//! such text through [`line()`] or [`block`] where it prints, and through [`shell`] or [`argument`] where it is meant to be
//! copied.

use std::fmt::Write;

/// Stands for a character that is not shown.
const REPLACEMENT: char = '\u{fffd}';

/// Text on one line.
pub fn line(text: &str) -> String {
    text.chars().map(|c| if is_unsafe(c) { REPLACEMENT } else { c }).collect()
}

/// Text that may have several lines. Only for text whose line breaks are ours.
pub fn block(text: &str) -> String {
    text.chars().map(|c| if is_unsafe(c) && c != '\n' { REPLACEMENT } else { c }).collect()
}

/// A word of a command that the operator may copy, quoted for a POSIX shell where that is needed.
pub fn shell(word: &str) -> String {
    let word = line(word);
    // The only text that cannot be quoted has a zero byte, which `line` has replaced.
    shlex::try_quote(&word).map_or_else(|_| "''".to_owned(), std::borrow::Cow::into_owned)
}

/// The last argument of a command that the operator may copy. A word that begins with a dash would be read as an option.
pub fn argument(word: &str) -> String {
    let quoted = shell(word);
    if word.starts_with('-') { format!("-- {quoted}") } else { quoted }
}

/// Escapes the unsafe characters in JSON, which stays the same data: outside of strings, JSON has none but line breaks.
pub fn json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        if is_unsafe(c) && c != '\n' {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                // Writing to a string cannot fail.
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Characters that act instead of being seen.
fn is_unsafe(c: char) -> bool {
    // C0, DEL and C1: terminals read U+009B as the start of an escape sequence.
    c.is_control()
        || matches!(c,
            // Direction: the Arabic letter mark, marks, embeddings, overrides and isolates.
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{206f}'
            // No width: soft hyphen, Mongolian vowel separator, spaces, joiners, invisible operators, BOM.
            | '\u{ad}' | '\u{180e}' | '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}' | '\u{feff}'
            // Line and paragraph separators, annotations, tags.
            | '\u{2028}' | '\u{2029}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_that_acts_is_replaced_and_text_that_is_read_stays() {
        for hostile in [
            "\u{1b}[2J",
            "\u{9b}31m",
            "\u{1b}]0;title\u{7}",
            "a\rb",
            "a\u{8}b",
            "\u{7f}",
            "\u{202e}txt",
            "\u{2066}x",
            "\u{200f}x",
            "\u{61c}x",
            "x\u{200b}",
            "\u{feff}x",
            "a\u{2028}b",
            "\u{ad}",
            "\u{e0041}",
        ] {
            for shown in [line(hostile), block(hostile), shell(hostile)] {
                assert!(
                    shown.contains(REPLACEMENT) && !shown.chars().any(is_unsafe),
                    "{hostile:?}: {shown:?}"
                );
            }
        }
        assert_eq!((line("a\nb").as_str(), block("a\nb").as_str()), ("a\u{fffd}b", "a\nb"));
        for plain in ["Ada Lovelace", "Zoë ñ", "e\u{301}", "李雷", "مرحبا", "नमस्ते", "a\u{a0}b", "🚀"]
        {
            assert_eq!((line(plain), block(plain)), (plain.to_owned(), plain.to_owned()));
        }
    }

    #[test]
    fn a_word_of_a_command_is_quoted_only_where_that_is_needed() {
        for (word, quoted) in [
            ("0192-aB_c", "0192-aB_c"),
            ("", "''"),
            ("a b", "'a b'"),
            ("$(reboot)", "'$(reboot)'"),
            ("x; rm -rf /", "'x; rm -rf /'"),
            ("a\nb", "'a\u{fffd}b'"),
        ] {
            assert_eq!((shell(word).as_str(), argument(word).as_str()), (quoted, quoted));
        }
        for (word, last) in
            [("-x", "-- -x"), ("--all", "-- --all"), ("-$(a)", "-- '-$(a)'"), ("-\n", "-- '-\u{fffd}'")]
        {
            assert_eq!(argument(word), last);
        }
    }

    proptest! {
        #[test]
        fn escaped_json_is_the_same_data(text in "\\PC*|(.|[\u{0}-\u{a0}\u{200b}-\u{2069}\u{e0001}\n])*", pretty in any::<bool>()) {
            let value = serde_json::json!({"a": [text.clone()], text.clone(): 1});
            let plain = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let escaped = json(&plain.unwrap());
            prop_assert!(!escaped.chars().any(|c| is_unsafe(c) && c != '\n'), "{escaped:?}");
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap(), value);
        }

        #[test]
        fn a_quoted_word_is_one_word(word in "(.|[\u{0}-\u{ff}])*") {
            prop_assert_eq!(shlex::split(&shell(&word)), Some(vec![line(&word)]));
        }
    }
}
