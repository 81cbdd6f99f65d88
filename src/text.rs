//! Turns of phrase that commands and pages share.

/// The end of a sentence that lists what there is; nothing when it cannot be listed.
pub fn there_are(choices: &[String]) -> String {
    if choices.is_empty() { String::new() } else { format!(" (there are: {})", choices.join(", ")) }
}

/// A number of things.
pub fn count(number: impl Into<u64>, one: &str, several: &str) -> String {
    match number.into() {
        1 => format!("1 {one}"),
        number => format!("{number} {several}"),
    }
}
