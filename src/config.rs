//! Settings from three layers: the commented defaults compiled in, a TOML file, the environment.
//!
//! The defaults file is the schema: a key it does not have is unknown, and a value must have the type
//! of its default. Each key has one environment variable, its path in capitals joined by `_`. All
//! mistakes are collected and told at once, naming key, value and remedy; values of secret keys are
//! never repeated.
//!
//! This is the only module that reads raw settings or the environment. The modules below own their
//! validated settings and never import this one.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use secrecy::SecretString;
use toml::{Table, Value};
use url::Url;

use crate::amqp::{self, Delay};
use crate::close;
use crate::domain::mapping::{Anonymous, FreeMail, RecordRules, Rule, Rules, Trigger, WriteRule};
use crate::domain::plan::Switches;
use crate::domain::record::{Channel, Field};
use crate::domain::schema::FieldRef;
use crate::domain::source::{Alternative, Normalize, Source};
use crate::retry::Policy;
use crate::worker;

/// The defaults, which are also the reference manual.
pub const DEFAULTS: &str = include_str!("config.default.toml");

/// Keys whose values are never shown.
const SECRETS: [&str; 2] = ["close.api_key", "amqp.url"];
/// What a file that cannot be parsed is told.
const NO_TOML: &str = "is no TOML";
/// Tables whose keys are the user's.
const OPEN: [&str; 2] = ["mapping.lead.custom", "mapping.contact.custom"];
/// The keys of a mapping rule.
const RULE: [&str; 4] = ["from", "write", "normalize", "values"];

/// The validated settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// The broker.
    pub amqp: amqp::Settings,
    /// Close.
    pub close: close::Settings,
    /// The work on messages.
    pub worker: worker::Settings,
    /// What goes where.
    pub rules: Rules,
    /// How often custom fields, statuses and users are looked at again.
    pub schema_refresh: Duration,
    /// Messages worked on at the same time.
    pub concurrency: usize,
    /// How long messages in hand may take to finish on shutdown.
    pub grace: Duration,
    /// Where metrics and health are served.
    pub http_addr: SocketAddr,
    /// How log lines look.
    pub log_format: LogFormat,
    effective: Table,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// What a command needs of the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The broker only: an API key may be missing.
    Broker,
    /// Everything.
    All,
}

/// Everything that is wrong with the settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problems(Vec<Problem>);

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Problem {
    key: String,
    message: String,
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

impl Config {
    /// Reads and checks all settings.
    ///
    /// # Errors
    /// All problems at once.
    pub fn load(
        file: Option<&Path>,
        environment: &HashMap<String, String>,
        need: Need,
    ) -> Result<Self, Problems> {
        let text = match file {
            None => Ok(String::new()),
            Some(path) => std::fs::read_to_string(path).map_err(|error| {
                let key = path.display().to_string();
                Problems(vec![Problem { key, message: format!("cannot be read: {error}") }])
            }),
        };
        Self::from_parts(&text?, file.map(|path| path.display().to_string()).as_deref(), environment, need)
    }

    fn from_parts(
        text: &str,
        name: Option<&str>,
        environment: &HashMap<String, String>,
        need: Need,
    ) -> Result<Self, Problems> {
        let mut problems = Vec::new();
        let mut settings: Table = toml::from_str(DEFAULTS).map_err(|error| {
            Problems(vec![Problem { key: "defaults".into(), message: error.message().into() }])
        })?;
        match toml::from_str::<Table>(text) {
            Ok(file) => overlay(&mut settings, file, "", &mut problems),
            Err(error) => {
                let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
                let key = format!("{}, line {line}", name.unwrap_or("configuration file"));
                // Only the parser's words: the line itself may hold a secret.
                problems.push(Problem { key, message: format!("{NO_TOML}: {}", error.message()) });
            }
        }
        overlay_environment(&mut settings, "", environment, &mut problems);
        Reader { settings: &settings, problems: &mut problems }
            .read(need)
            .ok_or(())
            .and_then(|config| {
                if problems.is_empty() {
                    Ok(Self { effective: mask(settings.clone()), ..config })
                } else {
                    Err(())
                }
            })
            .map_err(|()| {
                problems.sort_by(|a, b| a.key.cmp(&b.key));
                problems.dedup();
                Problems(problems)
            })
    }

    /// The settings in force as TOML, secrets masked.
    pub fn show(&self) -> String {
        toml::to_string(&self.effective).unwrap_or_default()
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

fn join(path: &str, key: &str) -> String {
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
            (Some(Value::Table(inner)), Value::Table(value)) if OPEN.contains(&path.as_str()) => {
                *inner = value;
            }
            // Its keys are looked at where it is read.
            (Some(Value::Table(inner)), Value::Table(value)) if is_rule(inner) => inner.extend(value),
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

fn leaf<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
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

/// Turns raw settings into typed ones. A value that does not fit is noted, and `None`.
struct Reader<'a> {
    settings: &'a Table,
    problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    /// All settings, or `None` if anything is wrong. Every key is looked at either way.
    fn read(mut self, need: Need) -> Option<Config> {
        let amqp = self.amqp();
        let close = self.close(need);
        let worker = self.worker();
        let rules = self.mapping();
        // Two calls of the schema's group each time; Close counts them.
        let schema_refresh = self.duration("close.schema_refresh", Duration::from_secs(10));
        let concurrency = self.number("worker.concurrency", 1, 1024);
        let grace = self.duration("worker.grace", Duration::ZERO);
        let http_addr =
            self.parsed("http.addr", "an address and port like `127.0.0.1:9090`", |text| text.parse().ok());
        let log_format = self.parsed("log.format", "one of `auto`, `text`, `json`", |text| match text {
            "auto" => Some(LogFormat::Auto),
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            _ => None,
        });
        Some(Config {
            amqp: amqp?,
            close: close?,
            worker: worker?,
            rules: rules?,
            schema_refresh: schema_refresh?,
            concurrency: usize::try_from(concurrency?).ok()?,
            grace: grace?,
            http_addr: http_addr?,
            log_format: log_format?,
            effective: Table::new(),
        })
    }

    fn amqp(&mut self) -> Option<amqp::Settings> {
        let url = self.parsed("amqp.url", "a broker URL like `amqp://user:password@host:5672/%2f`", |text| {
            let url = Url::parse(text).ok()?;
            (matches!(url.scheme(), "amqp" | "amqps") && url.has_host()).then(|| SecretString::from(text))
        });
        let exchange = self.name("amqp.exchange");
        let queue = self.name("amqp.queue");
        let prefetch = self.number("amqp.prefetch", 1, u16::MAX.into());
        let delays = self.delays();
        Some(amqp::Settings {
            url: url?,
            exchange: exchange?,
            queue: queue?,
            prefetch: u16::try_from(prefetch?).ok()?,
            delays: delays?,
        })
    }

    fn close(&mut self, need: Need) -> Option<close::Settings> {
        let url = self.parsed("close.api_url", "a URL like `https://api.close.com/api/v1/`", |text| {
            let whole = if text.ends_with('/') { text.to_owned() } else { format!("{text}/") };
            let url = Url::parse(&whole).ok()?;
            (matches!(url.scheme(), "http" | "https") && url.has_host()).then_some(url)
        });
        let api_key = self.text("close.api_key");
        let told = self
            .problems
            .iter()
            .any(|problem| problem.key == "close.api_key" || problem.message.starts_with(NO_TOML));
        if api_key.is_empty() && need == Need::All && !told {
            self.problem("close.api_key", "is not set: make a key in Close (Settings > API Keys)");
        }
        if api_key.contains(|c: char| c.is_whitespace() || c == ':') {
            self.problem("close.api_key", "contains a blank, a line break or a colon, which no key has");
        }
        let timeout = self.duration("close.timeout", Duration::from_millis(1));
        Some(close::Settings { url: url?, api_key: SecretString::from(api_key), timeout: timeout? })
    }

    fn worker(&mut self) -> Option<worker::Settings> {
        let switches =
            leaf(self.settings, "switches").and_then(|table| table.clone().try_into::<Switches>().ok());
        let in_place = self.duration("retry.in_place", Duration::ZERO);
        let delays = self.delays();
        let max_message_bytes = self.number("worker.max_message_bytes", 1, 1 << 30);
        let search_lag = self.duration("close.search_lag", Duration::ZERO);
        let hold = self.duration("worker.hold", Duration::from_secs(1));
        if in_place.zip(hold).is_some_and(|(in_place, hold)| in_place >= hold) {
            self.problem("retry.in_place", "must be shorter than `worker.hold`");
        }
        Some(worker::Settings {
            switches: switches?,
            retry: Policy {
                in_place: in_place?,
                delays: delays?.into_iter().map(|delay| delay.duration).collect(),
            },
            max_message_bytes: usize::try_from(max_message_bytes?).ok()?,
            search_lag: search_lag?,
            hold: hold?,
        })
    }

    fn mapping(&mut self) -> Option<Rules> {
        let trigger = self.text("mapping.trigger");
        let trigger = Trigger::parse(&trigger).map_err(|message| self.problem("mapping.trigger", &message));
        let anonymous = self.parsed("mapping.anonymous", "one of `dead_letter`, `skip`", |text| match text {
            "dead_letter" => Some(Anonymous::DeadLetter),
            "skip" => Some(Anonymous::Skip),
            _ => None,
        });
        let free_mail: Option<Vec<String>> = leaf(self.settings, "mapping.free_mail_domains")
            .and_then(Value::as_array)
            .and_then(|list| list.iter().map(|item| item.as_str().map(str::to_lowercase)).collect());
        if free_mail.is_none() {
            self.problem(
                "mapping.free_mail_domains",
                "must be a list of domains like `[\"gmail.com\", \"yahoo.*\"]`",
            );
        }
        let lead = RecordRules {
            fields: self.rules(
                "mapping.lead",
                &[("name", Field::Name), ("description", Field::Description), ("status_id", Field::Status)],
            ),
            custom: self.custom_rules("mapping.lead.custom"),
            key: self.field("close.lead_company_id_field"),
            id: self.id_source("mapping.company_id"),
        };
        let contact = RecordRules {
            fields: self.rules("mapping.contact", &[("name", Field::Name), ("title", Field::Title)]),
            custom: self.custom_rules("mapping.contact.custom"),
            key: self.field("close.contact_user_id_field"),
            id: self.id_source("mapping.user_id"),
        };
        let channels = self.rules(
            "mapping.contact",
            &[("email", Channel::Email), ("phone", Channel::Phone), ("url", Channel::Url)],
        );
        for (path, rules) in [("mapping.lead.custom", &lead), ("mapping.contact.custom", &contact)] {
            if let Some(key) = &rules.key
                && rules.custom.contains_key(key)
            {
                let message = "is a lookup field, filled from `mapping.company_id` or `mapping.user_id`: remove it here";
                self.problem(&join(path, key.as_str()), message);
            }
        }
        let free_mail = FreeMail(free_mail?);
        Some(Rules { trigger: trigger.ok()?, anonymous: anonymous?, lead, contact, channels, free_mail })
    }

    fn rules<T: Ord + Clone>(&mut self, path: &str, fields: &[(&str, T)]) -> BTreeMap<T, Rule> {
        let rule = |(key, field): &(&str, T)| Some((field.clone(), self.rule(&join(path, key))?));
        fields.iter().filter_map(rule).collect()
    }

    fn custom_rules(&mut self, path: &str) -> BTreeMap<FieldRef, Rule> {
        let table = leaf(self.settings, path).and_then(Value::as_table).cloned().unwrap_or_default();
        let mut rules = BTreeMap::new();
        for name in table.keys() {
            let key = join(path, name);
            match field_ref(name) {
                Some(field) => rules.extend(self.rule(&key).map(|rule| (field, rule))),
                None => self.problem(&key, NO_FIELD),
            }
        }
        rules
    }

    fn rule(&mut self, path: &str) -> Option<Rule> {
        let source = self.source(path, &RULE)?;
        let write = match leaf(self.settings, &join(path, "write")).map(|value| value.clone().try_into()) {
            None => WriteRule::default(),
            Some(Ok(write)) => write,
            Some(Err(_)) => {
                self.problem(&join(path, "write"), "must be one of `always`, `if_empty`, `on_create`");
                return None;
            }
        };
        Some(Rule { source, write })
    }

    /// Where an id comes from. It is always written: the record is found by it.
    fn id_source(&mut self, path: &str) -> Source {
        let known: Vec<&str> = RULE.into_iter().filter(|key| *key != "write").collect();
        self.source(path, &known).unwrap_or_default()
    }

    fn source(&mut self, path: &str, known: &[&str]) -> Option<Source> {
        let rule = leaf(self.settings, path).and_then(Value::as_table);
        for key in rule.into_iter().flat_map(Table::keys) {
            if !known.contains(&key.as_str()) {
                self.problems.push(Problem {
                    key: join(path, key),
                    message: format!("is no setting (known here: {})", known.join(", ")),
                });
            }
        }
        let from = join(path, "from");
        let Some(alternatives) = rule.and_then(|rule| rule.get("from")).and_then(Value::as_array) else {
            self.problem(path, "must be a table like `{ from = [\"$.traits.title\"] }`");
            return None;
        };
        let alternatives: Vec<_> = alternatives
            .iter()
            .filter_map(|item| alternative(item).map_err(|message| self.problem(&from, &message)).ok())
            .collect();

        let key = join(path, "normalize");
        let normalize = rule.and_then(|rule| rule.get("normalize"));
        let normalize = normalize.map_or(Some(Vec::new()), |list| {
            let word = |item: &Value| Normalize::ALL.into_iter().find(|n| Some(n.label()) == item.as_str());
            list.as_array()?.iter().map(word).collect()
        });
        if normalize.is_none() {
            let words = Normalize::ALL.map(|word| format!("`{}`", word.label())).join(", ");
            self.problem(&key, &format!("must be a list of {words}"));
        }
        let values = rule.and_then(|rule| rule.get("values"));
        let values = values.map_or(Some(BTreeMap::new()), |table| {
            table.as_table()?.iter().map(|(from, to)| Some((from.clone(), scalar(to)?))).collect()
        });
        if values.is_none() {
            self.problem(&join(path, "values"), "must be a table like `{ true = \"Yes\", false = \"No\" }`");
        }
        Some(Source::new(alternatives).normalized(normalize?).translated(values?))
    }

    fn delays(&mut self) -> Option<Vec<Delay>> {
        let list = leaf(self.settings, "retry.delays").and_then(Value::as_array).cloned().unwrap_or_default();
        let delays: Option<Vec<Delay>> = list
            .iter()
            .map(|item| {
                let name = item.as_str()?;
                let duration = duration(name).filter(|duration| !duration.is_zero())?;
                // The name becomes part of a queue's name.
                name.chars()
                    .all(|c| c.is_ascii_alphanumeric())
                    .then(|| Delay { name: name.to_owned(), duration })
            })
            .collect();
        if delays.is_none() {
            self.problem("retry.delays", "must be a list of durations like `[\"30s\", \"2m\"]`");
        }
        let delays = delays?;
        if delays.is_empty() {
            self.problem(
                "retry.delays",
                "must have one delay at least: messages that wait for rate limits go there",
            );
            return None;
        }
        if !delays.is_sorted_by(|a, b| a.duration < b.duration) {
            self.problem("retry.delays", "must grow: the shortest delay first, none twice");
            return None;
        }
        Some(delays)
    }

    fn field(&mut self, path: &str) -> Option<FieldRef> {
        let text = self.text(path);
        if text.is_empty() {
            return None;
        }
        let field = field_ref(&text);
        if field.is_none() {
            self.problem(path, &format!("\"{text}\" {NO_FIELD}"));
        }
        field
    }

    /// A name for the broker: AMQP bounds names to 255 bytes, and suffixes are added to ours.
    fn name(&mut self, path: &str) -> Option<String> {
        self.parsed(path, "a name of 1 to 200 characters that does not begin with `amq.`", |text| {
            let fits = (1..=200).contains(&text.len()) && !text.starts_with("amq.");
            fits.then(|| text.to_owned())
        })
    }

    fn duration(&mut self, path: &str, least: Duration) -> Option<Duration> {
        self.parsed(path, "a duration like `30s` or `5m`", |text| {
            duration(text).filter(|duration| *duration >= least)
        })
    }

    fn number(&mut self, path: &str, least: i64, most: i64) -> Option<i64> {
        let number = leaf(self.settings, path).and_then(Value::as_integer)?;
        if !(least..=most).contains(&number) {
            self.problem(path, &format!("{number} is not between {least} and {most}"));
            return None;
        }
        Some(number)
    }

    fn parsed<T>(&mut self, path: &str, expected: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let text = self.text(path);
        let value = parse(&text);
        if value.is_none() {
            let shown = if SECRETS.contains(&path) { "the value".to_owned() } else { format!("\"{text}\"") };
            self.problem(path, &format!("{shown} is not {expected}"));
        }
        value
    }

    fn text(&self, path: &str) -> String {
        leaf(self.settings, path).and_then(Value::as_str).unwrap_or_default().trim().to_owned()
    }

    fn problem(&mut self, key: &str, message: &str) {
        self.problems.push(Problem { key: key.to_owned(), message: message.to_owned() });
    }
}

fn duration(text: &str) -> Option<Duration> {
    text.parse::<jiff::SignedDuration>().ok()?.try_into().ok()
}

const NO_FIELD: &str = "must be the id of a custom field, `cf_...`, or its name, without `custom.`";

/// The id or name of a custom field.
fn field_ref(text: &str) -> Option<FieldRef> {
    let text = text.trim();
    (!text.is_empty() && !text.starts_with("custom.")).then(|| FieldRef::new(text))
}

/// One item of `from`.
fn alternative(item: &Value) -> Result<Alternative, String> {
    let constant = |table: &Table| scalar(table.get("value").filter(|_| table.len() == 1)?);
    match item {
        Value::String(text) => Alternative::parse(text),
        Value::Table(table) if constant(table).is_some() => {
            Ok(Alternative::constant(constant(table).unwrap_or_default()))
        }
        Value::Array(_) => {
            Err("has a list in its list: several values are joined by a template like `\"{$.traits.a} {$.traits.b}\"`".into())
        }
        Value::Table(_) | Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => {
            Err("must be a list of JSONPaths, templates, or constants like `{ value = \"Customer\" }`".into())
        }
    }
}

/// A single value, in JSON.
fn scalar(value: &Value) -> Option<serde_json::Value> {
    match value {
        Value::String(text) => Some(text.as_str().into()),
        Value::Integer(number) => Some((*number).into()),
        Value::Float(number) => serde_json::Number::from_f64(*number).map(Into::into),
        Value::Boolean(flag) => Some((*flag).into()),
        Value::Datetime(moment) => Some(moment.to_string().into()),
        Value::Array(_) | Value::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    fn load(text: &str, environment: &[(&str, &str)]) -> Result<Config, Problems> {
        let environment =
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Config::from_parts(text, Some("close-sync.toml"), &environment, Need::All)
    }

    fn problems(text: &str, environment: &[(&str, &str)]) -> String {
        load(text, environment).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_need_only_a_key() {
        assert_eq!(
            problems("", &[]),
            "the configuration has 1 problem\n  close.api_key (CLOSE_API_KEY): is not set: make a key in Close \
             (Settings > API Keys)"
        );
        let config = load("", &[("CLOSE_API_KEY", "api_k")]).unwrap();
        assert_eq!(config.amqp.delays.len(), 4);
        assert_eq!(config.amqp.retry_exchange(), "close-sync.retry");
        assert_eq!((&config.rules.lead.key, &config.rules.contact.key), (&None, &None));
        assert!(Config::from_parts("", None, &HashMap::new(), Need::Broker).is_ok());
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
        let file = "[close]\napi_key = 'api_file'\napi_url = 'http://x.test'\n[retry]\ndelays = ['1s']\n\
                    [mapping.lead.custom]\ncf_1 = { from = ['$.traits.plan'] }\n\
                    [mapping.contact]\ntitle = { write = 'if_empty' }";
        let environment = [
            ("CLOSE_API_KEY", "api_environment"),
            ("RETRY_DELAYS", "[\"5s\", \"1m\"]"),
            ("SWITCHES_ALLOW_CREATING_NEW_LEADS", "false"),
            ("MAPPING_LEAD_NAME", "{ from = [\"$.context.groupId\"] }"),
            ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_company"),
        ];
        let config = load(file, &environment).unwrap();
        assert_eq!(config.close.api_key.expose_secret(), "api_environment");
        assert_eq!(config.close.url.as_str(), "http://x.test/");
        assert_eq!(config.amqp.delays[1].duration, Duration::from_mins(1));
        assert!(!config.worker.switches.allow_creating_new_leads);
        assert!(config.worker.switches.allow_creating_new_contacts);
        let Rules { lead, contact, .. } = &config.rules;
        assert_eq!(lead.custom[&FieldRef::new("cf_1")].write, WriteRule::Always);
        assert_eq!(contact.fields[&Field::Title].write, WriteRule::IfEmpty);
        let group = Alternative::parse("$.context.groupId").unwrap();
        assert_eq!(lead.fields[&Field::Name].source, Source::new([group]));
        assert_eq!(lead.key, Some(FieldRef::new("cf_company")));
    }

    #[test]
    fn all_mistakes_are_told_at_once_and_no_secret_is_repeated() {
        let file = "typo = 1\n[close]\napi_key = 'api secret'\nlead_company_id_field = 'custom.cf_1'\n\
                    contact_user_id_field = 'cf_u'\ntimeout = 'soon'\n\
                    [amqp]\nurl = 'http://user:hunter2@host'\nprefetch = 0\nqueue = ''\n\
                    [retry]\ndelays = ['2m', '30s']\n[switches]\nallow_creating_new_leads = 'no'\n\
                    [mapping.lead]\nname = { from = ['$.['], rite = 1 }\n\
                    [mapping.contact.custom]\nplan = { from = ['$.a'] }\ncf_u = { from = ['$.b'] }\n\
                    cf_w = { from = ['$.b'], write = 'never' }";
        insta::assert_snapshot!(problems(file, &[("WORKER_CONCURRENCY", "many"), ("HTTP_ADDR", "9090")]));
        insta::assert_snapshot!(problems("[close]\napi_key = \"api_secret", &[("CLOSE_API_KEY", "k")]));
    }

    #[test]
    fn what_is_shown_hides_secrets() {
        let shown = load("", &[("CLOSE_API_KEY", "api_secret"), ("AMQP_URL", "amqp://u:hunter2@host/v")])
            .unwrap()
            .show();
        assert!(shown.contains("url = \"amqp://u:***@host/v\""), "{shown}");
        assert!(shown.contains("api_key = \"***\""), "{shown}");
        assert!(!shown.contains("secret") && !shown.contains("hunter2"));
    }
}
