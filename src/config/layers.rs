//! The layers: laid over one another, checked against the defaults, with every mistake kept.
//!
//! What a destination says of itself is one more layer, over what all share: its table in the file, then its
//! variables.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use toml::{Table, Value};
use uuid::Uuid;

use crate::amqp::nodes::masked;
use crate::config::{Config, Destination, Need, Reader};

/// The defaults, which are also the reference manual.
pub const DEFAULTS: &str = include_str!("defaults.toml");

/// Keys whose values are never shown, and can be given as files.
pub(super) const SECRETS: [&str; 4] =
    ["close.api_key", "amqp.url", "http.page_token", "otel.exporter.otlp.headers"];
/// What the variable of a secret ends with that names a file with the value.
const FILE: &str = "_FILE";
/// What a file that cannot be parsed is told.
pub(super) const NO_TOML: &str = "is no TOML";
/// Tables whose keys are the user's.
const OPEN: [&str; 3] = ["mapping.lead.custom", "mapping.contact.custom", DESTINATIONS];
/// The table of destinations, by name.
const DESTINATIONS: &str = "destinations";
/// What a destination cannot have for itself.
const OF_THE_PROCESS: [&str; 4] = ["http", "log", "otel", DESTINATIONS];

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
            let key = split(&problem.key).map_or(problem.key.as_str(), |(_, key)| key);
            let in_rule = key.rsplit_once('.').and_then(|(table, _)| leaf(&defaults, table));
            let in_rule = in_rule.and_then(Value::as_table).is_some_and(is_rule);
            let known = !in_rule && leaf(&defaults, key).is_some_and(|value| is_leaf(key, value));
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

/// A destination's own key.
pub(super) fn within(name: &str, key: &str) -> String {
    format!("{DESTINATIONS}.{name}.{key}")
}

/// A setting as its operator finds it: the key, of the destination if it has a name, and the variable.
pub(super) fn spell(destination: Option<&str>, key: &str) -> String {
    let key = destination.map_or_else(|| key.to_owned(), |name| within(name, key));
    format!("`{key}` ({})", variable(&key))
}

/// The name of the destination and its key, of a key within one.
fn split(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(DESTINATIONS)?.strip_prefix('.')?.split_once('.')
}

impl Problem {
    /// The same of a destination's own key.
    fn of(self, name: &str) -> Self {
        Self { key: within(name, &self.key), ..self }
    }
}

/// The settings, laid over one another and not yet read.
#[derive(Clone, Debug)]
pub struct Layers {
    /// What concerns the process, and what its destinations have in common.
    shared: Table,
    /// The destinations by name, laid over what they share. Without any, `shared` is the only one.
    destinations: BTreeMap<String, Table>,
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
        let variables = Variables { environment, prefix: String::new() };
        variables.overlay(&mut settings, "", &mut problems);
        let mut destinations = BTreeMap::new();
        if let Some(Value::Table(layers)) = settings.remove(DESTINATIONS) {
            for (name, layer) in layers {
                destinations.insert(name.clone(), lay(&settings, &name, layer, environment, &mut problems));
            }
        }
        Self { shared: settings, destinations, problems }
    }

    /// One more layer, which wins over those below, for every destination.
    #[must_use]
    pub fn over(mut self, layer: Table) -> Self {
        overlay(&mut self.shared, layer.clone(), "", &mut self.problems);
        for settings in self.destinations.values_mut() {
            // Told of the layer once already.
            overlay(settings, layer.clone(), "", &mut Vec::new());
        }
        self
    }

    /// Only one of the destinations, if `name` names one.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn only(mut self, name: Option<&str>) -> Result<Self, Problems> {
        let Some(name) = name else { return Ok(self) };
        if !self.destinations.contains_key(name) {
            let names: Vec<String> = self.destinations.into_keys().collect();
            let message = match names.as_slice() {
                [] => format!("\"{name}\" is none, the configuration has no `{DESTINATIONS}`"),
                names => format!("\"{name}\" is none (there are: {})", names.join(", ")),
            };
            return Err(Problems(vec![Problem { key: "--destination".into(), message }]));
        }
        self.destinations.retain(|each, _| each == name);
        // What is wrong with the others is no obstacle.
        self.problems.retain(|problem| split(&problem.key).is_none_or(|(each, _)| each == name));
        Ok(self)
    }

    /// The settings, validated.
    ///
    /// # Errors
    /// All problems at once.
    pub fn read(self, need: Need) -> Result<Config, Problems> {
        let Self { shared, destinations, mut problems } = self;
        let process = Reader::of(&shared, &mut problems).process();
        let read: Vec<Option<Destination>> = if destinations.is_empty() {
            vec![Reader::of(&shared, &mut problems).destination(None, need)]
        } else {
            let one = |(name, settings): (&String, &Table)| {
                let mut own = problems.clone();
                let told = own.len();
                let destination = Reader::of(settings, &mut own).destination(Some(name), need);
                problems.extend(own.drain(told..).map(|problem| {
                    let is_own = leaf(settings, &problem.key) != leaf(&shared, &problem.key);
                    // A key it has in common with all others is told of once, but each needs one of its own.
                    if is_own || problem.key == "close.api_key" { problem.of(name) } else { problem }
                }));
                destination
            };
            destinations.iter().map(one).collect()
        };
        let read: Option<Vec<Destination>> = read.into_iter().collect();
        if let Some(read) = &read {
            problems.extend(clashes(read));
        }
        match read.zip(process) {
            Some((destinations_read, process)) if problems.is_empty() => Ok(Config {
                destinations: destinations_read,
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

/// The settings of a destination: what all share, what its table says, what its variables say.
fn lay(
    shared: &Table,
    name: &str,
    layer: Value,
    environment: &HashMap<String, String>,
    problems: &mut Vec<Problem>,
) -> Table {
    let mut settings = shared.clone();
    settings.retain(|key, _| !OF_THE_PROCESS.contains(&key));
    let key = format!("{DESTINATIONS}.{name}");
    // It becomes part of variables and labels.
    let fits = !name.is_empty() && name.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_'));
    if !fits {
        let message = "is no name for a destination: use small letters, digits and `_`".to_owned();
        problems.push(Problem { key: key.clone(), message });
    }
    // Its objects are its own also where it does not say so.
    if let Some(Value::String(queue)) = leaf_mut(&mut settings, "amqp.queue") {
        *queue = format!("{queue}-{name}");
    }
    let mut own = Vec::new();
    if let Value::Table(layer) = layer {
        overlay(&mut settings, layer, "", &mut own);
    } else {
        problems
            .push(Problem { key: key.clone(), message: format!("must be a table, not {}", kind(&layer)) });
    }
    let variables = Variables { environment, prefix: format!("{}_", variable(&key)) };
    variables.overlay(&mut settings, "", &mut own);
    problems.extend(own.into_iter().map(|problem| problem.of(name)));
    settings
}

/// What two destinations must not share: a queue, as there is one worker for each, and a key, as the rate limits
/// and the order of the work belong to the organization.
fn clashes(destinations: &[Destination]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let pairs = (1..destinations.len()).flat_map(|later| (0..later).map(move |earlier| (earlier, later)));
    for (earlier, later) in pairs.map(|(a, b)| (&destinations[a], &destinations[b])) {
        let (Some(name), Some(other)) = (&later.name, &earlier.name) else { continue };
        let mut clash = |key: &str, message: String| {
            problems.push(Problem { key: key.to_owned(), message }.of(name));
        };
        if earlier.amqp.overlaps(&later.amqp) {
            let (queue, theirs) = (&later.amqp.queue, &earlier.amqp.queue);
            clash(
                "amqp.queue",
                format!("\"{queue}\" gets in the way of \"{theirs}\" of destination `{other}`"),
            );
        }
        if earlier.close.is_same_key(&later.close) {
            clash(
                "close.api_key",
                format!("is the key of destination `{other}` too: each needs an organization of its own"),
            );
        }
    }
    problems
}

/// The settings in force, secrets hidden; of destinations what differs from what they share.
fn effective(shared: Table, destinations: BTreeMap<String, Table>) -> Table {
    let own = |(name, settings): (String, Table)| (name, Value::Table(mask(difference(settings, &shared))));
    let destinations: Table = destinations.into_iter().map(own).collect();
    let mut all = mask(shared.clone());
    if !destinations.is_empty() {
        all.insert(DESTINATIONS.into(), Value::Table(destinations));
    }
    all
}

/// What `table` has otherwise than `base`.
fn difference(table: Table, base: &Table) -> Table {
    let differs = |(key, value): (String, Value)| match (value, base.get(&key)) {
        (value, Some(same)) if value == *same => None,
        (Value::Table(inner), Some(Value::Table(base))) if !is_rule(&inner) => {
            Some((key, Value::Table(difference(inner, base))))
        }
        (value, _) => Some((key, value)),
    };
    table.into_iter().filter_map(differs).collect()
}

/// The settings with their secrets hidden.
fn mask(mut settings: Table) -> Table {
    for path in SECRETS {
        match leaf_mut(&mut settings, path) {
            // What is not secret of it helps.
            Some(Value::String(url)) if path == "amqp.url" => *url = masked(url),
            Some(Value::String(secret)) if !secret.is_empty() => *secret = "***".into(),
            Some(_) | None => {}
        }
    }
    settings
}

/// A short name for the settings of a destination. Without secrets, or it would be a way to guess them.
pub(super) fn hash(settings: &Table) -> String {
    let mut settings = mask(settings.clone());
    settings.retain(|key, _| !OF_THE_PROCESS.contains(&key));
    let text = toml::to_string(&settings).unwrap_or_default();
    let mut hash = Uuid::new_v5(&Uuid::nil(), text.as_bytes()).simple().to_string();
    hash.truncate(12);
    hash
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
            (Some(current), value) => {
                let given = kind(&value);
                if !put(current, value) {
                    let message = format!("must be {}, not {given}", kind(current));
                    problems.push(Problem { key: path, message });
                }
            }
        }
    }
}

/// The variables of the process, or those of a destination, which begin with its name.
struct Variables<'a> {
    environment: &'a HashMap<String, String>,
    prefix: String,
}

impl Variables<'_> {
    /// Lays them over the settings.
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
                    problems.push(Problem { key: path, message });
                    continue;
                }
            };
            if let Err(message) = set(current, &path, text) {
                problems.push(Problem { key: path, message });
            }
        }
    }

    /// What the variable of a key says, or the file that a secret's names.
    fn text(&self, path: &str) -> Result<Option<String>, String> {
        let name = format!("{}{}", self.prefix, variable(path));
        let value = self.environment.get(&name);
        let file = format!("{name}{FILE}");
        match (value, self.environment.get(&file).filter(|_| SECRETS.contains(&path))) {
            (value, None) => Ok(value.cloned()),
            (None, Some(path)) => secret(path, &file).map(Some),
            (Some(_), Some(_)) => Err(format!("{name} and {file} are both set: unset one of them")),
        }
    }
}

/// The content of a file with a secret, which `variable` names. What is wrong with it is told without it.
fn secret(path: &str, variable: &str) -> Result<String, String> {
    let content = std::fs::read_to_string(path).map_err(|error| {
        format!("\"{path}\" ({variable}) cannot be read: {error}: name a file that this user may read")
    })?;
    // Editors and `echo` end a file with a line break, which belongs to nobody's key.
    let line = content.strip_suffix('\n').unwrap_or(&content);
    let value = line.strip_suffix('\r').unwrap_or(line);
    if value.is_empty() {
        return Err(format!("\"{path}\" ({variable}) is empty: write the value into it"));
    }
    Ok(value.to_owned())
}

/// Gives a key what a variable says.
fn set(current: &mut Value, path: &str, text: String) -> Result<(), String> {
    let value = if current.is_str() {
        Some(Value::String(text.clone()))
    } else {
        toml::from_str::<Table>(&format!("value = {text}")).ok().and_then(|mut table| table.remove("value"))
    };
    match (current, value) {
        (Value::Table(inner), Some(Value::Table(value))) if OPEN.contains(&path) => *inner = value,
        (Value::Table(inner), Some(Value::Table(value))) => inner.extend(value),
        (current, value) => {
            if !value.is_some_and(|value| put(current, value)) {
                // Of destinations it holds their keys.
                let shown = if path == DESTINATIONS { "the value".to_owned() } else { format!("\"{text}\"") };
                return Err(format!("{shown} is not {} in TOML's notation", kind(current)));
            }
        }
    }
    Ok(())
}

/// Replaces a value by one of its type; false if it is of another.
fn put(current: &mut Value, value: Value) -> bool {
    let value = match (&current, value) {
        // A whole number is a number.
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
