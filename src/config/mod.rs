//! Settings from three layers: the commented defaults compiled in, a TOML file, the environment.
//!
//! The defaults file is the schema: a key it does not have is unknown, and a value must have the type
//! of its default. Each key has one environment variable, its path in capitals joined by `_`; a secret has a
//! second one, with `_FILE` at its end, that names a file with the value. All mistakes are collected and told at
//! once, naming key, value and remedy; values of secret keys are never repeated.
//!
//! One process can serve several Close organizations: `[destinations.<name>]` holds what each has otherwise than
//! the rest of the file, by the same keys, so that one organization needs none of it. A table by name and not a
//! list, because the name makes the variables (`DESTINATIONS_EMEA_CLOSE_API_KEY`), labels and queues.
//!
//! `layers` lays them over one another; this file and `mapping` read the result.
//!
//! This is the only module that reads raw settings or the environment. The modules below own their
//! validated settings and never import this one.

mod layers;
mod mapping;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use secrecy::SecretString;
use toml::{Table, Value};
use url::Url;

use crate::amqp::nodes::Nodes;
use crate::amqp::tls::{Files, Tls};
use crate::amqp::{self, Delay};
use crate::domain::mapping::Rules;
use crate::domain::switches::Switches;
use crate::http::admin;
use crate::retry::{self, Policy};
use crate::telemetry::otel;
use crate::{close, sync};

pub use layers::{DEFAULTS, Layers, Problems, environment};
use layers::{NO_TOML, Problem, SECRETS, hash, leaf, within};

/// The validated settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// The Close organizations this process keeps in step, one at least.
    pub destinations: Vec<Destination>,
    /// Where metrics and health are served.
    pub http_addr: SocketAddr,
    /// The operator's page, if there is to be one.
    pub page: Option<admin::Settings>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Where traces go.
    pub traces: otel::Settings,
    effective: Table,
}

/// The settings of one Close organization.
#[derive(Clone, Debug, PartialEq)]
pub struct Destination {
    /// Its name, where several are configured.
    pub name: Option<String>,
    /// The broker.
    pub amqp: amqp::Settings,
    /// Close.
    pub close: close::Settings,
    /// The work on messages.
    pub worker: sync::Settings,
    /// What goes where.
    pub rules: Rules,
    /// How often custom fields, statuses and users are looked at again.
    pub schema_refresh: Duration,
    /// Messages worked on at the same time.
    pub concurrency: usize,
    /// How long messages in hand may take to finish on shutdown.
    pub grace: Duration,
    /// Equal where all settings are, secrets and those of the process aside.
    pub hash: String,
}

impl Destination {
    /// Whether both must not be worked for at once: they are shown under one name, spend one organization's budget,
    /// or share objects on the broker.
    pub fn excludes(&self, other: &Self) -> bool {
        self.name == other.name || self.close.is_same_key(&other.close) || self.amqp.overlaps(&other.amqp)
    }

    /// The setting of the API key as its operator finds it: "`close.api_key` (`CLOSE_API_KEY`)".
    pub fn api_key_setting(&self) -> String {
        layers::spell(self.name.as_deref(), "close.api_key")
    }
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
        Layers::load(file, environment)?.read(need)
    }

    /// The only destination.
    ///
    /// # Errors
    /// When there are several, with their names.
    pub fn single(mut self) -> Result<Destination, Vec<String>> {
        match (self.destinations.pop(), self.destinations.is_empty()) {
            (Some(destination), true) => Ok(destination),
            (last, _) => {
                Err(self.destinations.into_iter().chain(last).filter_map(|each| each.name).collect())
            }
        }
    }

    /// The settings in force as TOML, secrets masked.
    pub fn show(&self) -> String {
        toml::to_string(&self.effective).unwrap_or_default()
    }
}

/// What concerns the whole process.
struct Process {
    http_addr: SocketAddr,
    page: Option<admin::Settings>,
    log_format: LogFormat,
    traces: otel::Settings,
}

/// Turns raw settings into typed ones. A value that does not fit is noted, and `None`.
struct Reader<'a> {
    settings: &'a Table,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Reader<'a> {
    fn of(settings: &'a Table, problems: &'a mut Vec<Problem>) -> Self {
        Self { settings, problems }
    }

    /// What concerns the whole process.
    fn process(mut self) -> Option<Process> {
        let http_addr =
            self.parsed("http.addr", "an address and port like `127.0.0.1:9090`", |text| text.parse().ok());
        let page = self.page(http_addr);
        let log_format = self.parsed("log.format", "one of `auto`, `text`, `json`", |text| match text {
            "auto" => Some(LogFormat::Auto),
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            _ => None,
        });
        let is_on = leaf(self.settings, "http.page").and_then(Value::as_bool)?;
        let traces = self.traces();
        Some(Process {
            http_addr: http_addr?,
            page: is_on.then_some(page?),
            log_format: log_format?,
            traces: traces?,
        })
    }

    /// The operator's page, whether it is on or off.
    fn page(&mut self, addr: Option<SocketAddr>) -> Option<admin::Settings> {
        // Guessing one takes longer than anybody has.
        const LEAST: usize = 16;
        let is_on = leaf(self.settings, "http.page").and_then(Value::as_bool)?;
        let token = self.text("http.page_token");
        let is_open = addr.is_some_and(|addr| !addr.ip().is_loopback());
        if !token.is_empty() && token.len() < LEAST {
            self.problem(
                "http.page_token",
                &format!("is too short: make one with `openssl rand -hex {LEAST}`"),
            );
        }
        if is_on && is_open && token.is_empty() {
            self.problem(
                "http.page_token",
                &format!(
                    "is not set, and others than this machine can reach `http.addr`: make one with \
                     `openssl rand -hex {LEAST}`, or set `http.addr` (HTTP_ADDR) to `127.0.0.1:9090`"
                ),
            );
        }
        let hosts = self.page_hosts()?;
        let token = (!token.is_empty()).then(|| SecretString::from(token));
        Some(admin::Settings { token, hosts })
    }

    fn page_hosts(&mut self) -> Option<Vec<String>> {
        let list = leaf(self.settings, "http.page_hosts").and_then(Value::as_array)?;
        let host = |item: &Value| {
            let name = item.as_str()?.trim().to_ascii_lowercase();
            // Without scheme, port and path.
            url::Host::parse(&name).ok().map(|host| host.to_string()).filter(|host| *host == name)
        };
        let hosts: Option<Vec<String>> = list.iter().map(host).collect();
        if hosts.is_none() {
            self.problem(
                "http.page_hosts",
                "must be a list of host names or addresses without scheme and port, like `[\"sync.example.com\"]`",
            );
        }
        hosts
    }

    fn traces(&mut self) -> Option<otel::Settings> {
        const ENDPOINT: &str = "otel.exporter.otlp.endpoint";
        const RATIO: &str = "otel.traces.sampler.arg";
        let endpoint = match self.text(ENDPOINT) {
            none if none.is_empty() => Some(None),
            // It is shown, in logs too.
            text if text.contains(['@', '?', '#']) => {
                let message = "must be a URL without credentials and parameters, like `http://localhost:4318`: \
                               credentials belong into `otel.exporter.otlp.headers`";
                self.problem(ENDPOINT, message);
                None
            }
            _ => self.parsed(ENDPOINT, "a URL like `http://localhost:4318`", otel::endpoint).map(Some),
        };
        let expected = "a list of headers like `api-key=secret,x-tenant=crm`, special characters as in `%20`";
        let headers = self.parsed("otel.exporter.otlp.headers", expected, otel::headers);
        let service =
            self.parsed("otel.service.name", "a name", |text| (!text.is_empty()).then(|| text.to_owned()));
        let ratio = leaf(self.settings, RATIO).and_then(Value::as_float)?;
        if !(0.0..=1.0).contains(&ratio) {
            self.problem(RATIO, &format!("{ratio} is not between 0 and 1"));
        }
        Some(otel::Settings { endpoint: endpoint?, headers: headers?, service: service?, ratio })
    }

    /// A destination, or `None` if anything is wrong. Every key is looked at either way.
    fn destination(mut self, name: Option<&str>, need: Need) -> Option<Destination> {
        let amqp = self.amqp();
        let close = self.close(name, need);
        let worker = self.worker();
        let rules = self.mapping();
        // Two calls of the schema's group each time; Close counts them.
        let schema_refresh = self.duration("close.schema_refresh", Duration::from_secs(10));
        let concurrency = self.number("worker.concurrency", 1, 1024);
        let grace = self.duration("worker.grace", Duration::ZERO);
        Some(Destination {
            name: name.map(str::to_owned),
            amqp: amqp?,
            close: close?,
            worker: worker?,
            rules: rules?,
            schema_refresh: schema_refresh?,
            concurrency: usize::try_from(concurrency?).ok()?,
            grace: grace?,
            hash: hash(self.settings),
        })
    }

    fn amqp(&mut self) -> Option<amqp::Settings> {
        let expected = "a broker URL like `amqp://user:password@host:5672/%2f`, or several separated by commas \
                        (within a password, a comma is written `%2c`)";
        let nodes = self.parsed("amqp.url", expected, Nodes::parse);
        let tls = self.tls(nodes.as_ref());
        let exchange = self.name("amqp.exchange");
        let queue = self.name("amqp.queue");
        let prefetch = self.prefetch();
        let delays = self.delays();
        let binding_keys = self.binding_keys();
        let topology = self.parsed("amqp.topology", "one of `declare`, `check`", |text| match text {
            "declare" => Some(amqp::TopologyMode::Declare),
            "check" => Some(amqp::TopologyMode::Check),
            _ => None,
        });
        let outcomes = self.text("amqp.outcomes");
        if outcomes.len() > 255 || outcomes.starts_with("amq.") {
            self.problem(
                "amqp.outcomes",
                "must be the name of an exchange: at most 255 bytes, not beginning with `amq.`",
            );
        }
        if !outcomes.is_empty() && [exchange.as_ref(), queue.as_ref()].contains(&Some(&outcomes)) {
            self.problem(
                "amqp.outcomes",
                "must be another exchange than that of producers: the worker would read what it tells",
            );
        }
        Some(amqp::Settings {
            nodes: nodes?.with_tls(tls?),
            exchange: exchange?,
            queue: queue?,
            prefetch: prefetch?,
            delays: delays?,
            binding_keys: binding_keys?,
            topology: topology?,
            outcomes: (!outcomes.is_empty()).then_some(outcomes),
        })
    }

    fn tls(&mut self, broker: Option<&Nodes>) -> Option<Tls> {
        let [ca, cert, key] =
            ["ca_file", "cert_file", "key_file"].map(|name| self.text(&format!("amqp.tls.{name}")));
        let files = Files { ca: &ca, cert: &cert, key: &key };
        if broker.is_some_and(|broker| !broker.is_encrypted()) {
            for (name, _) in files.given() {
                self.problem(
                    &format!("amqp.tls.{name}"),
                    "is of use with `amqps://` only: not all of `amqp.url` is",
                );
            }
        }
        let read = Tls::read(files);
        for (name, message) in read.as_ref().err().into_iter().flatten() {
            self.problem(&format!("amqp.tls.{name}"), message);
        }
        read.ok()
    }

    fn binding_keys(&mut self) -> Option<Vec<String>> {
        let list = leaf(self.settings, "amqp.binding_keys").and_then(Value::as_array)?;
        // AMQP bounds keys to 255 bytes.
        let key = |item: &Value| item.as_str().filter(|key| key.len() <= 255).map(str::to_owned);
        let keys: Option<Vec<String>> = list.iter().map(key).collect();
        let keys = keys.filter(|keys| !keys.is_empty());
        if keys.is_none() {
            self.problem(
                "amqp.binding_keys",
                "must be a list of routing keys, one at least, like `[\"#\"]` or `[\"users.*\", \"identify\"]`",
            );
        }
        keys
    }

    /// The window that lanes and merging choose from, wide enough to fill every place with messages whose look-ups can
    /// share a search. It follows from the concurrency: each place needs others behind it, as messages that share a
    /// key wait for one another.
    ///
    /// Close's budget has no part in it. It is not known before Close has told, and differs by endpoint and hour,
    /// while RabbitMQ takes the number when a consumer begins (rabbitmq.md §2.3). Nothing is spent for being in the
    /// window: each call passes the rate gate, and `worker.hold` counts from the start of the work. A small budget is
    /// a reason for a wide window rather than a small one, as it is there that calls are saved.
    fn prefetch(&mut self) -> Option<u16> {
        // With less choice, lanes stand still behind the first of a person, and few can be merged.
        const LEAST: i64 = 200;
        let prefetch = self.number("amqp.prefetch", 0, u16::MAX.into())?;
        let concurrency = leaf(self.settings, "worker.concurrency").and_then(Value::as_integer)?;
        if prefetch == 0 {
            return u16::try_from(concurrency.saturating_mul(3).max(LEAST)).ok();
        }
        if prefetch < concurrency {
            let message =
                format!("{prefetch} is less than `worker.concurrency`: {concurrency} can never be at work");
            self.problem("amqp.prefetch", &message);
        }
        u16::try_from(prefetch).ok()
    }

    fn close(&mut self, name: Option<&str>, need: Need) -> Option<close::Settings> {
        const KEY: &str = "close.api_key";
        let url = self.parsed("close.api_url", "a URL like `https://api.close.com/api/v1/`", |text| {
            let whole = if text.ends_with('/') { text.to_owned() } else { format!("{text}/") };
            let url = Url::parse(&whole).ok()?;
            (matches!(url.scheme(), "http" | "https") && url.has_host()).then_some(url)
        });
        let api_key = self.text(KEY);
        // Of the others' keys it does not tell.
        let keys = [Some(KEY.to_owned()), name.map(|name| within(name, KEY))];
        let told = |problem: &Problem| {
            keys.iter().flatten().any(|key| problem.key == *key) || problem.message.starts_with(NO_TOML)
        };
        let told = self.problems.iter().any(told);
        if api_key.is_empty() && need == Need::All && !told {
            self.problem(KEY, "is not set: make a key in Close (Settings > API Keys)");
        }
        if api_key.contains(|c: char| c.is_whitespace() || c == ':') {
            self.problem(KEY, "contains a blank, a line break or a colon, which no key has");
        }
        let timeout = self.duration("close.timeout", Duration::from_millis(1));
        let share = self.number("close.rate_limit_share", 1, 100);
        Some(close::Settings {
            url: url?,
            api_key: SecretString::from(api_key),
            timeout: timeout?,
            share: f64::from(u8::try_from(share?).ok()?) / 100.0,
        })
    }

    fn worker(&mut self) -> Option<sync::Settings> {
        let switches =
            leaf(self.settings, "switches").and_then(|table| table.clone().try_into::<Switches>().ok());
        let in_place = self.duration("retry.in_place", Duration::ZERO);
        let delays = self.delays();
        let max_message_bytes = self.number("worker.max_message_bytes", 1, 1 << 30);
        let search_lag = self.duration("close.search_lag", Duration::ZERO);
        let hold = self.duration("worker.hold", Duration::from_secs(1));
        let merge = leaf(self.settings, "worker.merge").and_then(Value::as_bool);
        if hold.is_some_and(|hold| hold > LONGEST_HOLD) {
            self.problem(
                "worker.hold",
                "must not be longer than `15m`: RabbitMQ takes back what is held for 30 minutes",
            );
        }
        if in_place.zip(hold).is_some_and(|(in_place, hold)| in_place >= hold) {
            self.problem("retry.in_place", "must be shorter than `worker.hold`");
        }
        Some(sync::Settings {
            switches: switches?,
            retry: Policy {
                in_place: in_place?,
                jitter: retry::JITTER,
                delays: delays?.into_iter().map(|delay| delay.duration).collect(),
            },
            max_message_bytes: usize::try_from(max_message_bytes?).ok()?,
            search_lag: search_lag?,
            hold: hold?,
            merge: merge?,
        })
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

/// Half of RabbitMQ's `consumer_timeout` (rabbitmq.md), and what the alert for messages that are stuck goes by.
const LONGEST_HOLD: Duration = Duration::from_mins(15);

fn duration(text: &str) -> Option<Duration> {
    text.parse::<jiff::SignedDuration>().ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;
    use crate::domain::mapping::WriteRule;
    use crate::domain::mapping::source::{Alternative, Source};
    use crate::domain::record::Field;
    use crate::domain::schema::FieldRef;

    fn load(text: &str, environment: &[(&str, &str)]) -> Result<Config, Problems> {
        let environment =
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Layers::new(text, "close-sync.toml", &environment).read(Need::All)
    }

    fn single(text: &str, environment: &[(&str, &str)]) -> Destination {
        load(text, environment).unwrap().single().unwrap()
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
        let config = single("", &[("CLOSE_API_KEY", "api_k")]);
        assert_eq!((config.amqp.delays.len(), config.amqp.prefetch), (4, 200));
        let many = single("[worker]\nconcurrency = 500", &[("CLOSE_API_KEY", "api_k")]);
        assert_eq!(many.amqp.prefetch, 1500);
        assert_eq!(config.amqp.retry_exchange(), "close-sync.retry");
        assert_eq!((&config.rules.lead.key, &config.rules.contact.key), (&None, &None));
        assert!(Config::load(None, &HashMap::new(), Need::Broker).is_ok());
    }

    #[test]
    fn settings_have_one_name_wherever_they_stand_and_secrets_no_part_in_it() {
        let hash = |text: &str, more: &[(&str, &str)]| {
            single(text, &[&[("CLOSE_API_KEY", "api_k")], more].concat()).hash
        };
        let defaults = hash("", &[]);
        for same in ["http.addr = '127.0.0.1:1'", "[worker]\nconcurrency = 64"] {
            assert_eq!(hash(same, &[("CLOSE_API_KEY", "api_other"), ("LOG_FORMAT", "json")]), defaults);
        }
        let other = hash("[worker]\nconcurrency = 65", &[]);
        assert_eq!(hash("", &[("WORKER_CONCURRENCY", "65")]), other);
        assert!(other != defaults && other.len() == 12);
        let user = |url| hash("", &[("AMQP_URL", url)]);
        assert_eq!(user("amqp://a:one@h/%2f"), user("amqp://a:two@h/%2f"));
        assert_ne!(user("amqp://a:one@h/%2f"), user("amqp://b:one@h/%2f"));
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
        let config = single(file, &environment);
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
                    [amqp]\nurl = 'http://user:hunter2@host'\nprefetch = 70000\nqueue = ''\n\
                    [retry]\ndelays = ['2m', '30s']\n[switches]\nallow_creating_new_leads = 'no'\n\
                    [mapping.lead]\nname = { from = ['$.['], rite = 1 }\n\
                    [mapping.contact.custom]\nplan = { from = ['$.a'] }\ncf_u = { from = ['$.b'] }\n\
                    cf_w = { from = ['$.b'], write = 'never' }";
        insta::assert_snapshot!(problems(
            file,
            &[("WORKER_CONCURRENCY", "many"), ("WORKER_HOLD", "16m"), ("HTTP_ADDR", "9090")]
        ));
        insta::assert_snapshot!(problems("[close]\napi_key = \"api_secret", &[("CLOSE_API_KEY", "k")]));
    }

    /// Two organizations that share most settings.
    const TWO: &str = "[close]\nsearch_lag = '5s'\nlead_company_id_field = 'cf_shared'\n\
                       [destinations.emea]\nclose.api_key = 'api_emea'\namqp.prefetch = 150\n\
                       [destinations.apac]\nclose = { api_key = 'api_file', lead_company_id_field = 'cf_own' }\n\
                       amqp.queue = 'asia'\nmapping.lead.name = { from = ['$.name'] }";

    #[test]
    fn destinations_have_what_all_share_and_what_is_their_own() {
        let environment = [
            ("CLOSE_SEARCH_LAG", "7s"),
            ("AMQP_PREFETCH", "99"),
            ("DESTINATIONS_APAC_CLOSE_API_KEY", "api_apac"),
        ];
        let config = load(TWO, &environment).unwrap();
        let told: Vec<_> = config
            .destinations
            .iter()
            .map(|each| {
                let (lag, key) = (each.worker.search_lag.as_secs(), each.close.api_key.expose_secret());
                let field = each.rules.lead.key.as_ref().unwrap().clone();
                (each.name.as_deref().unwrap(), each.amqp.queue.as_str(), each.amqp.prefetch, key, field, lag)
            })
            .collect();
        assert_eq!(
            told,
            [
                ("apac", "asia", 99, "api_apac", FieldRef::new("cf_own"), 7),
                ("emea", "close-sync-emea", 150, "api_emea", FieldRef::new("cf_shared"), 7),
            ]
        );
        assert_eq!(config.clone().single().unwrap_err(), ["apac", "emea"]);

        let layers = Layers::new(TWO, "close-sync.toml", &HashMap::new());
        let emea = layers.clone().only(Some("emea")).unwrap().read(Need::All).unwrap().single().unwrap();
        assert_eq!((emea.name.as_deref(), emea.amqp.prefetch), (Some("emea"), 150));
        assert!(layers.only(Some("emae")).unwrap_err().to_string().contains("there are: apac, emea"));

        // What is shown can be read again, and says the same.
        let shown = load(TWO, &environment).unwrap().show();
        assert!(!shown.contains("api_emea") && !shown.contains("api_apac"), "{shown}");
        let keys = [("DESTINATIONS_APAC_CLOSE_API_KEY", "1"), ("DESTINATIONS_EMEA_CLOSE_API_KEY", "2")];
        assert_eq!(load(&shown, &keys).unwrap().show(), shown);
        let own = shown.split_once("[destinations.emea.amqp]").unwrap().1;
        assert!(
            own.starts_with("\nprefetch = 150\nqueue = \"close-sync-emea\"\n\n[destinations.emea.close]"),
            "{own}"
        );
    }

    #[test]
    fn mistakes_of_destinations_name_whose_they_are_and_what_two_must_not_share() {
        let file = "[retry]\ndelays = []\n[destinations.a]\namqp.prefetch = 1\nhttp.addr = 'x'\n\
                    [destinations.Bad-Name]\nclose.api_key = 'api_c'\nclose.timeout = 'soon'";
        insta::assert_snapshot!(problems(file, &[("DESTINATIONS_A_WORKER_MERGE", "perhaps")]));
        let file = "[close]\napi_key = 'api_shared'\n[destinations.a]\n[destinations.b]\namqp.queue = 'close-sync-a.dead'";
        insta::assert_snapshot!(problems(file, &[]));
    }

    #[test]
    fn an_organization_under_another_name_is_the_same_one() {
        let read = |name: &str, key: &str, queue: &str| {
            single(&format!("[destinations.{name}]\nclose.api_key = '{key}'\namqp.queue = '{queue}'"), &[])
        };
        let emea = read("emea", "api_a", "q-a");
        for same in
            [read("emea", "api_b", "q-b"), read("europe", "api_a", "q-b"), read("europe", "api_b", "q-a")]
        {
            assert!(emea.excludes(&same) && same.excludes(&emea), "{same:?}");
        }
        assert!(!emea.excludes(&read("europe", "api_b", "q-b")));
    }

    #[test]
    fn every_destination_without_a_key_is_told_of_once() {
        let file = "[destinations.a]\n[destinations.b]\nclose.api_key = 1\n[destinations.c]";
        let told = problems(file, &[]);
        let lines: Vec<_> = told.lines().skip(1).map(|line| line.split(' ').nth(2).unwrap()).collect();
        assert_eq!(lines, ["a", "b", "c"].map(|name| format!("destinations.{name}.close.api_key")), "{told}");
        // Who needs the broker only needs none.
        let layers = Layers::new("[destinations.a]\n[destinations.b]", "", &HashMap::new());
        assert_eq!(layers.read(Need::Broker).unwrap().destinations.len(), 2);
    }

    #[test]
    fn what_is_read_again_is_the_same_unless_something_of_it_has_changed() {
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca.pem");
        let renew = || {
            let key = rcgen::KeyPair::generate().unwrap();
            let made = rcgen::CertificateParams::default().self_signed(&key).unwrap();
            std::fs::write(&ca, made.pem()).unwrap();
        };
        renew();
        let file = format!(
            "[close]\napi_key = 'api_a'\n[amqp]\nurl = 'amqps://u:p@a'\ntls.ca_file = '{}'",
            ca.display()
        );
        let one = single(&file, &[]);
        assert_eq!(one, single(&format!("{file}\n[http]\naddr = '127.0.0.1:1'"), &[]), "of the process");
        let others = [
            ("CLOSE_API_KEY", "api_b"),
            ("CLOSE_API_URL", "http://x.test"),
            ("CLOSE_TIMEOUT", "1s"),
            ("CLOSE_RATE_LIMIT_SHARE", "50"),
            ("CLOSE_SCHEMA_REFRESH", "1m"),
            ("AMQP_URL", "amqps://u:q@a"),
            ("AMQP_PREFETCH", "300"),
            ("WORKER_MERGE", "false"),
            ("WORKER_GRACE", "1s"),
            ("MAPPING_LEAD_NAME", "{ write = \"if_empty\" }"),
        ];
        for other in others {
            assert_ne!(one, single(&file, &[other]), "{other:?}");
        }
        renew();
        assert_ne!(one, single(&file, &[]), "a certificate was renewed where it was");
    }

    #[test]
    fn traces_are_off_without_a_collector_and_their_settings_are_checked() {
        let key = ("CLOSE_API_KEY", "api_k");
        let traces = |text: &str, environment: &[(&str, &str)]| load(text, environment).unwrap().traces;
        let off = traces("", &[key]);
        assert_eq!((off.endpoint, off.service.as_str(), off.ratio), (None, "close-sync", 1.0));
        let standard = [
            key,
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=hunter2"),
            ("OTEL_SERVICE_NAME", "crm"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ];
        let on = traces("[otel.traces.sampler]\narg = 1", &standard);
        let endpoint = on.endpoint.as_ref().map(Url::as_str);
        assert_eq!(
            (endpoint, on.service.as_str(), on.ratio),
            (Some("http://collector:4318/v1/traces"), "crm", 0.25)
        );
        assert_eq!(on.headers["api-key"], "hunter2");
        let shown = load("", &standard).unwrap().show();
        assert!(shown.contains("headers = \"***\"") && !shown.contains("hunter2"), "{shown}");
        // Whole numbers are numbers, in the file and in the environment.
        let (none, all) = ("otel.traces.sampler.arg = 0", [key, ("OTEL_TRACES_SAMPLER_ARG", "1")]);
        assert_eq!((traces(none, &[key]).ratio, traces(none, &all).ratio), (0.0, 1.0));

        let file = "[otel]\nservice.name = ' '\ntraces.sampler.arg = 2\n[otel.exporter.otlp]\n\
                    endpoint = 'localhost:4318'\nheaders = 'hunter2'\n\
                    [destinations.emea]\notel.service.name = 'own'";
        insta::assert_snapshot!(problems(file, &[("DESTINATIONS_EMEA_CLOSE_API_KEY", "api_k")]));
        let told = problems("", &[key, ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:hunter2@collector")]);
        assert!(told.contains("without credentials") && !told.contains("hunter2"), "{told}");
    }

    #[test]
    fn destinations_in_one_variable_are_not_repeated() {
        let told = problems("", &[("DESTINATIONS", "{ emea = { close.api_key = 'api_secret' }")]);
        assert!(told.contains("destinations (DESTINATIONS): the value is not a table"), "{told}");
        assert!(!told.contains("secret"), "{told}");
    }

    #[test]
    fn a_page_that_others_can_reach_needs_a_token() {
        let page = |environment: &[(&str, &str)]| {
            let key = ("CLOSE_API_KEY", "api_key");
            load("", &[&[key], environment].concat()).map(|config| config.page.is_some())
        };
        assert_eq!(page(&[]), Ok(false));
        assert_eq!(page(&[("HTTP_PAGE", "true")]), Ok(true), "loopback");
        let (open, token) = (("HTTP_ADDR", "0.0.0.0:9090"), ("HTTP_PAGE_TOKEN", "0123456789abcdef"));
        assert_eq!(page(&[open]), Ok(false), "it is off");
        assert_eq!(page(&[("HTTP_PAGE", "true"), open, token]), Ok(true));
        let wrong = [open, ("HTTP_PAGE_TOKEN", "short"), ("HTTP_PAGE_HOSTS", "[\"http://x.test:80/\"]")];
        let told = wrong.map(|wrong| page(&[("HTTP_PAGE", "true"), wrong]).unwrap_err().to_string());
        insta::assert_snapshot!(told.join("\n"));
    }

    #[test]
    fn a_secret_can_be_the_content_of_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (url, key) = (file("url", "amqp://u:hunter2@host/v\r\n"), file("key", "api_secret\n"));
        let environment = [("CLOSE_API_KEY_FILE", key.as_str()), ("AMQP_URL_FILE", &url)];
        let config = load("[close]\napi_key = 'api_file'", &environment).unwrap();
        let shown = config.show();
        assert!(shown.contains("api_key = \"***\"") && shown.contains("amqp://u:***@host/v"), "{shown}");
        let one = config.single().unwrap();
        assert_eq!(one.close.api_key.expose_secret(), "api_secret");
        assert_eq!(one.amqp.nodes.masked(), "amqp://u:***@host/v");

        let emea = file("emea", "api_own");
        let own = [("CLOSE_API_KEY_FILE", key.as_str()), ("DESTINATIONS_EMEA_CLOSE_API_KEY_FILE", &emea)];
        let config = load("[destinations.apac]\n[destinations.emea]", &own).unwrap();
        let keys = config.destinations.iter().map(|each| each.close.api_key.expose_secret());
        assert_eq!(keys.collect::<Vec<_>>(), ["api_secret", "api_own"]);
    }

    #[test]
    fn what_is_wrong_with_the_file_of_a_secret_is_told_with_everything_else() {
        let environment = [
            ("CLOSE_API_KEY", "api_secret"),
            ("CLOSE_API_KEY_FILE", "/nowhere/key"),
            ("AMQP_URL_FILE", "/nowhere/url"),
            ("DESTINATIONS_EMEA_CLOSE_API_KEY_FILE", "/dev/null"),
            ("DESTINATIONS_EMEA_AMQP_URL", "amqp://u:secret@host/v"),
            ("DESTINATIONS_EMEA_AMQP_URL_FILE", "/nowhere/url"),
            // No secret has this name, and what it means is not ours to say.
            ("CLOSE_TIMEOUT_FILE", "/nowhere/timeout"),
        ];
        insta::assert_snapshot!(problems("[close]\ntimeout = 'soon'\n[destinations.emea]", &environment));
        for key in SECRETS {
            let name = format!("{}_FILE", key.replace('.', "_").to_uppercase());
            let told = problems("", &[(&name, "/nowhere/secret")]);
            assert!(told.contains(&format!("\"/nowhere/secret\" ({name}) cannot be read")), "{told}");
        }
    }

    #[test]
    fn what_is_shown_hides_secrets() {
        let urls = "amqp://u:hunter2@host/v, amqp://u:hunter2@other/v";
        let token = ("HTTP_PAGE_TOKEN", "secret-0123456789");
        let shown = load("", &[("CLOSE_API_KEY", "api_secret"), ("AMQP_URL", urls), token]).unwrap().show();
        assert!(shown.contains("url = \"amqp://u:***@host/v,amqp://u:***@other/v\""), "{shown}");
        assert!(shown.contains("api_key = \"***\""), "{shown}");
        assert!(shown.contains("page_token = \"***\""), "{shown}");
        assert!(!shown.contains("secret") && !shown.contains("hunter2"));
    }
}
