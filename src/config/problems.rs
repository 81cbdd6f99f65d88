//! Problems of the settings: the key, and a message that says what to do.

use std::fmt;

use toml::{Table, Value};

use crate::config::keys::{DEFAULTS, is_leaf, is_rule, leaf, split, variable, within};
use crate::text::line;

/// The start of the message about a file that cannot be parsed.
pub(super) const NOT_TOML: &str = "not valid TOML";

/// All problems of the settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub(super) Vec<Problem>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) key: String,
    pub(super) message: String,
}

impl Problem {
    pub(super) fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), message: message.into() }
    }

    /// An unknown key. The message lists the keys of its table.
    pub(super) fn unknown<'a>(key: String, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known: Vec<_> = known.into_iter().collect();
        Self { key, message: format!("unknown setting; this table has: {}", known.join(", ")) }
    }

    /// Merged settings that do not fit `raw`. A unit test prevents this.
    pub(super) fn bug(error: &toml::de::Error) -> Self {
        Self::new("defaults", format!("bug in close-sync: {}", error.message()))
    }

    /// The same problem with the key of a destination's own setting.
    pub(super) fn of(self, destination: &str) -> Self {
        Self { key: within(destination, &self.key), ..self }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            1 => write!(f, "the configuration has 1 problem")?,
            n => write!(f, "the configuration has {n} problems")?,
        }
        for (key, message) in self.lines() {
            write!(f, "\n  {}: {}", line(&key), line(message))?;
        }
        Ok(())
    }
}

impl Problems {
    /// Each problem: the key with its environment variable, and the message.
    pub fn lines(&self) -> impl Iterator<Item = (String, &str)> {
        let defaults: Table = toml::from_str(DEFAULTS).unwrap_or_default();
        self.0.iter().map(move |problem| {
            let key = split(&problem.key).map_or(problem.key.as_str(), |(_, key)| key);
            let in_rule = key.rsplit_once('.').and_then(|(table, _)| leaf(&defaults, table));
            let in_rule = in_rule.and_then(Value::as_table).is_some_and(is_rule);
            let has_variable = !in_rule && leaf(&defaults, key).is_some_and(|value| is_leaf(key, value));
            let variable =
                if has_variable { format!(" ({})", variable(&problem.key)) } else { String::new() };
            (format!("{}{variable}", problem.key), problem.message.as_str())
        })
    }
}
