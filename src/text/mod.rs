//! Text for people: phrases that commands and the operator's page share, and text from outside that is safe to show.

mod mask;
mod printable;

pub use mask::{is_ambiguous, masked_urls};
pub use printable::{argument, block, json, line, shell};

/// Ends an error with the values that would be valid: `; configured: a, b`. Empty when there are none to list.
pub fn choices(label: &str, choices: &[String]) -> String {
    if choices.is_empty() { String::new() } else { format!("; {label}: {}", choices.join(", ")) }
}

/// A number with its noun: `1 message`, `3 messages`.
pub fn count(number: impl Into<u64>, singular: &str, plural: &str) -> String {
    match number.into() {
        1 => format!("1 {singular}"),
        number => format!("{number} {plural}"),
    }
}
