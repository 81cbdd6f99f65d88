//! The layers: the defaults, the file and the environment, merged into one table of raw settings.
//!
//! The defaults are the schema: other keys are unknown, and a value must have the type of its default. A value of
//! another type is reported, and the value of the layer below stays. So one run finds all mistakes. Each destination
//! is one more layer over the shared settings: first its table in the file, then its environment variables.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use toml::{Table, Value};

use crate::config::effective::effective;
use crate::config::keys::{
    DEFAULTS, DESTINATIONS, OPEN_TABLES, SECRETS, is_leaf, is_rule, join, key, leaf, leaf_mut, split,
    split_process, variable,
};
use crate::config::problems::{NOT_TOML, Problem, Problems};
use crate::config::settings::{Config, Destination, Need};
use crate::config::{destination, process};

/// The suffix of the variable that names a file with a secret.
const FILE_SUFFIX: &str = "_FILE";

/// The environment of the process. Skips variables that are not valid UTF-8.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
pub fn environment() -> HashMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// The merged settings, not yet checked.
#[derive(Clone, Debug)]
pub struct Layers {
    /// The settings of the process, and those that the destinations share.
    shared: Table,
    /// The settings of each destination by name, merged over the shared ones. Empty: `shared` is the only destination.
    destinations: BTreeMap<String, Table>,
    problems: Vec<Problem>,
}

impl Layers {
    /// Merges the defaults, a file and the environment.
    ///
    /// # Errors
    /// When the file cannot be read. [`Layers::read`] reports everything else.
    pub fn load(file: Option<&Path>, environment: &HashMap<String, String>) -> Result<Self, Problems> {
        let Some(path) = file else { return Ok(Self::new("", "", environment)) };
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Self::new(&text, &name, environment)),
            Err(error) => Err(Problems(vec![Problem::new(name, format!("cannot read the file: {error}"))])),
        }
    }

    pub(super) fn new(text: &str, name: &str, environment: &HashMap<String, String>) -> Self {
        let mut problems = Vec::new();
        let mut settings: Table = toml::from_str(DEFAULTS).unwrap_or_else(|error| {
            problems.push(Problem::new("defaults", error.message()));
            Table::new()
        });
        match toml::from_str::<Table>(text) {
            Ok(file) => overlay(&mut settings, file, "", &mut problems),
            Err(error) => {
                let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
                // The parser's message only: the line itself may hold a secret.
                let message = format!("{NOT_TOML}: {}", error.message());
                problems.push(Problem::new(format!("{name}, line {line}"), message));
            }
        }
        let variables = Variables { environment, prefix: String::new() };
        variables.overlay(&mut settings, "", &mut problems);
        let mut destinations = BTreeMap::new();
        if let Some(Value::Table(layers)) = settings.remove(DESTINATIONS) {
            for (name, layer) in layers {
                destinations
                    .insert(name.clone(), merged(&settings, &name, layer, environment, &mut problems));
            }
        }
        Self { shared: settings, destinations, problems }
    }

    /// Adds a layer to every destination. It wins over those below.
    #[must_use]
    pub fn over(mut self, layer: Table) -> Self {
        overlay(&mut self.shared, layer.clone(), "", &mut self.problems);
        for settings in self.destinations.values_mut() {
            // Its problems are reported once, above.
            overlay(settings, layer.clone(), "", &mut Vec::new());
        }
        self
    }

    /// Keeps only the destination called `name`, if a name is given.
    ///
    /// # Errors
    /// When no destination has this name.
    pub fn only(mut self, name: Option<&str>) -> Result<Self, Problems> {
        let Some(name) = name else { return Ok(self) };
        if !self.destinations.contains_key(name) {
            let names: Vec<String> = self.destinations.into_keys().collect();
            let message = match names.as_slice() {
                [] => format!("unknown destination \"{name}\"; the configuration has no `{DESTINATIONS}`"),
                names => format!("unknown destination \"{name}\"; configured: {}", names.join(", ")),
            };
            return Err(Problems(vec![Problem::new("--destination", message)]));
        }
        self.destinations.retain(|each, _| each == name);
        // Problems of the other destinations do not matter then.
        self.problems.retain(|problem| split(&problem.key).is_none_or(|(each, _)| each == name));
        Ok(self)
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// All problems at once.
    pub fn read(self, need: Need) -> Result<Config, Problems> {
        let Self { shared, destinations, mut problems } = self;
        let (process, shared_destination) = split_process(shared.clone());
        let process = process::read(process, &mut problems);
        let checked: Vec<Option<Destination>> = if destinations.is_empty() {
            vec![destination::read(None, shared_destination, need, &mut problems)]
        } else {
            let check = |(name, settings): (&String, &Table)| {
                let mut own = problems.clone();
                let before = own.len();
                let checked = destination::read(Some(name), settings.clone(), need, &mut own);
                problems.extend(own.drain(before..).map(|problem| {
                    let is_own = leaf(settings, &problem.key) != leaf(&shared, &problem.key);
                    // A problem with a shared setting is reported once. An API key is needed by each destination.
                    if is_own || problem.key == key!(Destination: close.api_key) {
                        problem.of(name)
                    } else {
                        problem
                    }
                }));
                checked
            };
            destinations.iter().map(check).collect()
        };
        let checked: Option<Vec<Destination>> = checked.into_iter().collect();
        if let Some(checked) = &checked {
            problems.extend(clashes(checked));
        }
        match checked.zip(process) {
            Some((checked, process)) if problems.is_empty() => Ok(Config {
                destinations: checked,
                http_addr: process.http_addr,
                page: process.page,
                log_format: process.log_format,
                traces: process.traces,
                effective: effective(shared, destinations),
            }),
            _ => {
                problems.sort_by(|a, b| a.key.cmp(&b.key));
                problems.dedup();
                Err(Problems(problems))
            }
        }
    }
}

/// The settings of a destination: the shared ones, then its table, then its variables.
fn merged(
    shared: &Table,
    name: &str,
    layer: Value,
    environment: &HashMap<String, String>,
    problems: &mut Vec<Problem>,
) -> Table {
    let (_, mut settings) = split_process(shared.clone());
    let key = format!("{DESTINATIONS}.{name}");
    // The name becomes part of variables and labels.
    let fits = !name.is_empty() && name.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_'));
    if !fits {
        problems.push(Problem::new(
            key.clone(),
            "not a valid name for a destination; use lower-case letters, digits and `_`",
        ));
    }
    // Each destination needs broker objects of its own, so the default differs by destination.
    if let Some(Value::String(queue)) = leaf_mut(&mut settings, key!(Destination: amqp.queue)) {
        *queue = format!("{queue}-{name}");
    }
    let mut own = Vec::new();
    if let Value::Table(layer) = layer {
        overlay(&mut settings, layer, "", &mut own);
    } else {
        problems.push(Problem::new(key.clone(), format!("must be a table, not {}", kind(&layer))));
    }
    let variables = Variables { environment, prefix: format!("{}_", variable(&key)) };
    variables.overlay(&mut settings, "", &mut own);
    problems.extend(own.into_iter().map(|problem| problem.of(name)));
    settings
}

/// Finds what two destinations must not share: a queue, because each queue has one worker, and an API key, because rate
/// limits and the order of messages belong to the organization.
fn clashes(destinations: &[Destination]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let pairs = (1..destinations.len()).flat_map(|later| (0..later).map(move |earlier| (earlier, later)));
    for (earlier, later) in pairs.map(|(a, b)| (&destinations[a], &destinations[b])) {
        let (Some(name), Some(other)) = (&later.name, &earlier.name) else { continue };
        let mut clash = |key: &str, message: String| {
            problems.push(Problem::new(key, message).of(name));
        };
        if earlier.amqp.overlaps(&later.amqp) {
            let (queue, theirs) = (&later.amqp.queue, &earlier.amqp.queue);
            clash(
                key!(Destination: amqp.queue),
                format!(
                    "\"{queue}\" conflicts with \"{theirs}\" of destination `{other}`; choose another name"
                ),
            );
        }
        if earlier.close.is_same_key(&later.close) {
            clash(
                key!(Destination: close.api_key),
                format!(
                    "same API key as destination `{other}`; each destination needs its own Close organization"
                ),
            );
        }
    }
    problems
}

/// Merges a layer into the settings. Reports unknown keys and values of the wrong type.
fn overlay(settings: &mut Table, layer: Table, path: &str, problems: &mut Vec<Problem>) {
    for (key, value) in layer {
        let path = join(path, &key);
        let known: Vec<String> = settings.keys().cloned().collect();
        match (settings.get_mut(&key), value) {
            (None, _) => {
                problems.push(Problem::unknown(path, known.iter().map(String::as_str)));
            }
            // The keys in it are checked where rules are read.
            (Some(Value::Table(inner)), Value::Table(value))
                if OPEN_TABLES.contains(&path.as_str()) || is_rule(inner) =>
            {
                inner.extend(value);
            }
            (Some(Value::Table(inner)), Value::Table(value)) => overlay(inner, value, &path, problems),
            (Some(current), value) => {
                let given = kind(&value);
                if !put(current, value) {
                    problems.push(Problem::new(path, format!("must be {}, not {given}", kind(current))));
                }
            }
        }
    }
}

/// Environment variables: those of the process, or with a prefix those of a destination.
struct Variables<'a> {
    environment: &'a HashMap<String, String>,
    prefix: String,
}

impl Variables<'_> {
    /// Merges them into the settings.
    fn overlay(&self, settings: &mut Table, path: &str, problems: &mut Vec<Problem>) {
        for (key, current) in settings.iter_mut() {
            let path = join(path, key);
            if !is_leaf(&path, current) {
                if let Value::Table(inner) = current {
                    self.overlay(inner, &path, problems);
                }
                continue;
            }
            let text = match self.text(&path) {
                Ok(Some(text)) => text,
                Ok(None) => continue,
                Err(message) => {
                    problems.push(Problem::new(path, message));
                    continue;
                }
            };
            if let Err(message) = set(current, &path, text) {
                problems.push(Problem::new(path, message));
            }
        }
    }

    /// The value of a key's variable, or the content of the file that a secret's `_FILE` variable names.
    fn text(&self, path: &str) -> Result<Option<String>, String> {
        let name = format!("{}{}", self.prefix, variable(path));
        let value = self.environment.get(&name);
        let file = format!("{name}{FILE_SUFFIX}");
        match (value, self.environment.get(&file).filter(|_| SECRETS.contains(&path))) {
            (value, None) => Ok(value.cloned()),
            (None, Some(path)) => secret(path, &file).map(Some),
            (Some(_), Some(_)) => Err(format!("{name} and {file} are both set; unset one of them")),
        }
    }
}

/// Reads a secret from the file that `variable` names. The messages never contain the secret.
fn secret(path: &str, variable: &str) -> Result<String, String> {
    let content = std::fs::read_to_string(path).map_err(|error| {
        format!("cannot read \"{path}\" ({variable}): {error}; name a file that this user may read")
    })?;
    // Editors and `echo` end a file with a line break, which is not part of the secret.
    let line = content.strip_suffix('\n').unwrap_or(&content);
    let value = line.strip_suffix('\r').unwrap_or(line);
    if value.is_empty() {
        return Err(format!("\"{path}\" ({variable}) is empty; write the secret into it"));
    }
    Ok(value.to_owned())
}

/// Sets a key to the value of its variable.
fn set(current: &mut Value, path: &str, text: String) -> Result<(), String> {
    let value = if current.is_str() {
        Some(Value::String(text.clone()))
    } else {
        toml::from_str::<Table>(&format!("value = {text}")).ok().and_then(|mut table| table.remove("value"))
    };
    match (current, value) {
        (Value::Table(inner), Some(Value::Table(value))) if OPEN_TABLES.contains(&path) => *inner = value,
        (Value::Table(inner), Some(Value::Table(value))) => inner.extend(value),
        (current, value) => {
            if !value.is_some_and(|value| put(current, value)) {
                // The value for destinations contains their API keys.
                let shown = if path == DESTINATIONS { "the value".to_owned() } else { format!("\"{text}\"") };
                return Err(format!("{shown} is not {} in TOML syntax", kind(current)));
            }
        }
    }
    Ok(())
}

/// Replaces a value by one of the same type. Returns false if the types differ.
fn put(current: &mut Value, value: Value) -> bool {
    let value = match (&current, value) {
        // A whole number is a valid number.
        (Value::Float(_), Value::Integer(whole)) => {
            i32::try_from(whole).map_or(Value::Integer(whole), |whole| Value::Float(whole.into()))
        }
        (_, value) => value,
    };
    let fits = current.same_type(&value);
    if fits {
        *current = value;
    }
    fits
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
