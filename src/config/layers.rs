//! The layers: laid over one another, checked against the defaults, with every mistake kept.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use toml::{Table, Value};
use url::Url;

use super::{Config, Need, Reader};

/// The defaults, which are also the reference manual.
pub const DEFAULTS: &str = include_str!("../config.default.toml");

/// Keys whose values are never shown.
pub(super) const SECRETS: [&str; 2] = ["close.api_key", "amqp.url"];
/// What a file that cannot be parsed is told.
pub(super) const NO_TOML: &str = "is no TOML";
/// Tables whose keys are the user's.
const OPEN: [&str; 2] = ["mapping.lead.custom", "mapping.contact.custom"];

/// Everything that is wrong with the settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problems(Vec<Problem>);

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) key: String,
    pub(super) message: String,
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            1 => write!(f, "the configuration has 1 problem")?,
            n => write!(f, "the configuration has {n} problems")?,
        }
        for (key, message) in self.lines() {
            write!(f, "\n  {key}: {message}")?;
        }
        Ok(())
    }
}

impl Problems {
    /// Each problem: the key with its variable, and what to do.
    pub fn lines(&self) -> impl Iterator<Item = (String, &str)> {
        let defaults: Table = toml::from_str(DEFAULTS).unwrap_or_default();
        self.0.iter().map(move |problem| {
            let in_rule = problem.key.rsplit_once('.').and_then(|(table, _)| leaf(&defaults, table));
            let in_rule = in_rule.and_then(Value::as_table).is_some_and(is_rule);
            let known =
                !in_rule && leaf(&defaults, &problem.key).is_some_and(|value| is_leaf(&problem.key, value));
            let variable = if known { format!(" ({})", variable(&problem.key)) } else { String::new() };
            (format!("{}{variable}", problem.key), problem.message.as_str())
        })
    }
}

/// The environment of the process. Values that are no text are left out.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
pub fn environment() -> HashMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// The environment variable of a key.
fn variable(key: &str) -> String {
    key.replace('.', "_").to_uppercase()
}

/// The settings, laid over one another and not yet read.
#[derive(Clone, Debug)]
pub struct Layers {
    settings: Table,
    problems: Vec<Problem>,
}

impl Layers {
    /// The defaults, a file and the environment.
    ///
    /// # Errors
    /// Only that the file cannot be read; everything else is told by [`Layers::read`].
    pub fn load(file: Option<&Path>, environment: &HashMap<String, String>) -> Result<Self, Problems> {
        let Some(path) = file else { return Ok(Self::new("", "", environment)) };
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Self::new(&text, &name, environment)),
            Err(error) => {
                Err(Problems(vec![Problem { key: name, message: format!("cannot be read: {error}") }]))
            }
        }
    }

    pub(super) fn new(text: &str, name: &str, environment: &HashMap<String, String>) -> Self {
        let mut problems = Vec::new();
        let mut settings: Table = toml::from_str(DEFAULTS).unwrap_or_else(|error| {
            problems.push(Problem { key: "defaults".into(), message: error.message().into() });
            Table::new()
        });
        match toml::from_str::<Table>(text) {
            Ok(file) => overlay(&mut settings, file, "", &mut problems),
            Err(error) => {
                let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
                // Only the parser's words: the line itself may hold a secret.
                let message = format!("{NO_TOML}: {}", error.message());
                problems.push(Problem { key: format!("{name}, line {line}"), message });
            }
        }
        overlay_environment(&mut settings, "", environment, &mut problems);
        Self { settings, problems }
    }

    /// One more layer, which wins over those below.
    #[must_use]
    pub fn over(mut self, layer: Table) -> Self {
        overlay(&mut self.settings, layer, "", &mut self.problems);
        self
    }

    /// The settings, validated.
    ///
    /// # Errors
    /// All problems at once.
    pub fn read(self, need: Need) -> Result<Config, Problems> {
        let Self { settings, mut problems } = self;
        let config = Reader { settings: &settings, problems: &mut problems }.read(need);
        match config {
            Some(config) if problems.is_empty() => Ok(Config { effective: mask(settings), ..config }),
            _ => {
                problems.sort_by(|a, b| a.key.cmp(&b.key));
                problems.dedup();
                Err(Problems(problems))
            }
        }
    }
}

/// The settings with their secrets hidden.
fn mask(mut settings: Table) -> Table {
    if let Some(Value::String(key)) = leaf_mut(&mut settings, "close.api_key")
        && !key.is_empty()
    {
        *key = "***".into();
    }
    if let Some(Value::String(url)) = leaf_mut(&mut settings, "amqp.url") {
        *url = masked(url);
    }
    settings
}

/// A broker URL without its password.
pub fn masked(url: &str) -> String {
    Url::parse(url).map_or_else(
        |_| "***".into(),
        |mut url| {
            if url.password().is_some() {
                let _ = url.set_password(Some("***"));
            }
            url.to_string()
        },
    )
}

pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Whether a table is one value to the user: a mapping rule, or a table with the user's own keys.
fn is_leaf(path: &str, value: &Value) -> bool {
    value.as_table().is_none_or(|table| OPEN.contains(&path) || is_rule(table))
}

fn is_rule(table: &Table) -> bool {
    table.contains_key("from")
}

/// Lays a layer over the settings: only known keys, only of the known type.
fn overlay(settings: &mut Table, layer: Table, path: &str, problems: &mut Vec<Problem>) {
    for (key, value) in layer {
        let path = join(path, &key);
        let known: Vec<String> = settings.keys().cloned().collect();
        match (settings.get_mut(&key), value) {
            (None, _) => {
                let message = format!("is no setting (known here: {})", known.join(", "));
                problems.push(Problem { key: path, message });
            }
            // Their keys are looked at where they are read.
            (Some(Value::Table(inner)), Value::Table(value))
                if OPEN.contains(&path.as_str()) || is_rule(inner) =>
            {
                inner.extend(value);
            }
            (Some(Value::Table(inner)), Value::Table(value)) => overlay(inner, value, &path, problems),
            (Some(current), value) if current.same_type(&value) => *current = value,
            (Some(current), value) => {
                let message = format!("must be {}, not {}", kind(current), kind(&value));
                problems.push(Problem { key: path, message });
            }
        }
    }
}

fn overlay_environment(
    settings: &mut Table,
    path: &str,
    environment: &HashMap<String, String>,
    problems: &mut Vec<Problem>,
) {
    for (key, current) in settings.iter_mut() {
        let path = join(path, key);
        if !is_leaf(&path, current) {
            if let Value::Table(inner) = current {
                overlay_environment(inner, &path, environment, problems);
            }
            continue;
        }
        let Some(text) = environment.get(&variable(&path)) else { continue };
        let value = if current.is_str() {
            Some(Value::String(text.clone()))
        } else {
            toml::from_str::<Table>(&format!("value = {text}"))
                .ok()
                .and_then(|mut table| table.remove("value"))
        };
        match (current, value) {
            (Value::Table(inner), Some(Value::Table(value))) if OPEN.contains(&path.as_str()) => {
                *inner = value;
            }
            (Value::Table(inner), Some(Value::Table(value))) => inner.extend(value),
            (current, Some(value)) if current.same_type(&value) => *current = value,
            (current, _) => {
                let message = format!("\"{text}\" is not {} in TOML's notation", kind(current));
                problems.push(Problem { key: path, message });
            }
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "text in quotes",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

pub(super) fn leaf<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
    match path.split_once('.') {
        None => table.get(path),
        Some((first, rest)) => leaf(table.get(first)?.as_table()?, rest),
    }
}

fn leaf_mut<'a>(table: &'a mut Table, path: &str) -> Option<&'a mut Value> {
    match path.split_once('.') {
        None => table.get_mut(path),
        Some((first, rest)) => leaf_mut(table.get_mut(first)?.as_table_mut()?, rest),
    }
}
