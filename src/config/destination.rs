//! The settings of one destination: broker, Close, worker and retries.

use std::time::Duration;

use secrecy::SecretString;
use toml::{Table, Value};
use url::Url;

use crate::amqp::nodes::Nodes;
use crate::amqp::tls::{Files, Tls};
use crate::amqp::{self, Delay, JournalSettings, TopologyMode};
use crate::config::effective::hash;
use crate::config::keys::within;
use crate::config::mapping;
use crate::config::problems::{NOT_TOML, Problem};
use crate::config::raw::{self, setting};
use crate::config::reader::{Reader, duration};
use crate::config::settings::{Destination, Need};
use crate::domain::phone::Country;
use crate::retry::{self, Policy};
use crate::{close, sync};

/// Half of RabbitMQ's `consumer_timeout` (rabbitmq.md), and the threshold of the alert for stuck messages.
const LONGEST_HOLD: Duration = Duration::from_mins(15);

/// Checks every key. Returns `None` if there is a problem.
pub(super) fn read(
    name: Option<&str>,
    settings: Table,
    need: Need,
    problems: &mut Vec<Problem>,
) -> Option<Destination> {
    let hash = hash(&settings);
    let raw: raw::Destination = match settings.try_into() {
        Ok(raw) => raw,
        Err(error) => {
            problems.push(Problem::bug(&error));
            return None;
        }
    };
    let mut reader = Reader { problems };
    let delays = delays(&raw, &mut reader);
    let amqp = amqp(&raw, delays.as_deref(), &mut reader);
    let close = close(&raw, name, need, &mut reader);
    let worker = worker(&raw, delays.as_deref(), &mut reader);
    let rules = mapping::read(&raw, &mut reader);
    // Each refresh makes two calls, which count against the rate limit.
    let schema_refresh = reader.duration(setting!(raw, close.schema_refresh), Duration::from_secs(10));
    let concurrency = reader.number(setting!(raw, worker.concurrency), 1..=1024);
    let grace = reader.duration(setting!(raw, worker.grace), Duration::ZERO);
    Some(Destination {
        name: name.map(str::to_owned),
        amqp: amqp?,
        close: close?,
        worker: worker?,
        rules: rules?,
        schema_refresh: schema_refresh?,
        concurrency: usize::try_from(concurrency?).ok()?,
        grace: grace?,
        hash,
    })
}

fn amqp(raw: &raw::Destination, delays: Option<&[Delay]>, reader: &mut Reader<'_>) -> Option<amqp::Settings> {
    let expected = "`amqp://user:password@host:5672/%2f`, or several separated by commas; in a password, write a comma \
                    as `%2c`, a slash as `%2f`, `?` as `%3f` and `#` as `%23`";
    let nodes = reader.parsed(setting!(raw, amqp.url), "broker URL", expected, Nodes::parse);
    let tls = tls(raw, nodes.as_ref(), reader);
    let exchange = reader.broker_name(setting!(raw, amqp.exchange));
    let queue = reader.broker_name(setting!(raw, amqp.queue));
    let prefetch = prefetch(raw, reader);
    let binding_keys = binding_keys(raw, reader);
    let topology =
        reader.parsed(setting!(raw, amqp.topology), "mode", "`declare` or `check`", |text| match text {
            "declare" => Some(TopologyMode::Declare),
            "check" => Some(TopologyMode::Check),
            _ => None,
        });
    let journal = journal(raw, reader);
    let outcomes = outcomes(raw, [exchange.as_ref(), queue.as_ref()], reader);
    Some(amqp::Settings {
        nodes: nodes?.with_tls(tls?),
        exchange: exchange?,
        queue: queue?,
        prefetch: prefetch?,
        delays: delays?.to_vec(),
        binding_keys: binding_keys?,
        topology: topology?,
        outcomes,
        journal: journal?,
    })
}

fn journal(raw: &raw::Destination, reader: &mut Reader<'_>) -> Option<JournalSettings> {
    // The broker deletes whole segments, and needs a few of them.
    const LEAST_BYTES: i64 = 64 << 20;
    let max_age = reader.duration(setting!(raw, journal.max_age), Duration::from_hours(1));
    let max_bytes = reader.number(setting!(raw, journal.max_bytes), LEAST_BYTES..=1 << 50);
    Some(JournalSettings {
        enabled: raw.journal.enabled,
        max_age: max_age?,
        max_bytes: u64::try_from(max_bytes?).ok()?,
    })
}

fn outcomes(raw: &raw::Destination, taken: [Option<&String>; 2], reader: &mut Reader<'_>) -> Option<String> {
    let setting = setting!(raw, amqp.outcomes);
    let name = setting.text().to_owned();
    if name.is_empty() {
        return None;
    }
    if name.len() > 255 || name.starts_with("amq.") {
        let message = format!(
            "\"{name}\" is not a valid exchange name; expected at most 255 bytes that do not begin with `amq.`"
        );
        reader.problem(setting.key, message);
    } else if taken.contains(&Some(&name)) {
        let message = "must differ from `amqp.exchange` and `amqp.queue`; the worker would consume its own outcome \
                       events";
        reader.problem(setting.key, message);
    }
    Some(name)
}

fn tls(raw: &raw::Destination, nodes: Option<&Nodes>, reader: &mut Reader<'_>) -> Option<Tls> {
    let (ca, cert, key) = (
        setting!(raw, amqp.tls.ca_file),
        setting!(raw, amqp.tls.cert_file),
        setting!(raw, amqp.tls.key_file),
    );
    let files = Files { ca: ca.text(), cert: cert.text(), key: key.text() };
    let table = setting!(raw, amqp.tls).key;
    if nodes.is_some_and(|nodes| !nodes.is_encrypted()) {
        for (name, _) in files.given() {
            let message = "needs `amqps://` in every URL of `amqp.url`";
            reader.problem(format!("{table}.{name}"), message);
        }
    }
    let read = Tls::read(files);
    for (name, message) in read.as_ref().err().into_iter().flatten() {
        reader.problem(format!("{table}.{name}"), message);
    }
    read.ok()
}

fn binding_keys(raw: &raw::Destination, reader: &mut Reader<'_>) -> Option<Vec<String>> {
    let setting = setting!(raw, amqp.binding_keys);
    // AMQP limits keys to 255 bytes.
    let key = |item: &Value| item.as_str().filter(|key| key.len() <= 255).map(str::to_owned);
    let keys: Option<Vec<String>> = setting.value.iter().map(key).collect();
    let keys = keys.filter(|keys| !keys.is_empty());
    if keys.is_none() {
        let message =
            "must be a list with at least one routing key, like `[\"#\"]` or `[\"users.*\", \"identify\"]`";
        reader.problem(setting.key, message);
    }
    keys
}

/// The number of unacked messages that the scheduler chooses from. It must exceed the concurrency: messages with a common
/// key wait for each other, so the scheduler needs others to run meanwhile.
///
/// It does not depend on Close's rate limits. They differ by endpoint and hour, and RabbitMQ takes the number when a
/// consumer starts (rabbitmq.md §2.3). A waiting message makes no calls, and `worker.hold` counts from the start of its
/// processing. Low rate limits need a large number, because merging and shared searches save calls.
fn prefetch(raw: &raw::Destination, reader: &mut Reader<'_>) -> Option<u16> {
    // With fewer, one person's messages can fill the window, and few messages can be merged.
    const MIN_PREFETCH: i64 = 200;
    let concurrency = raw.worker.concurrency;
    let setting = setting!(raw, amqp.prefetch);
    let key = setting.key.clone();
    let prefetch = reader.number(setting, 0..=u16::MAX.into())?;
    if prefetch == 0 {
        return u16::try_from(concurrency.saturating_mul(3).max(MIN_PREFETCH)).ok();
    }
    if prefetch < concurrency {
        let message = format!(
            "{prefetch} is less than `worker.concurrency` ({concurrency}), which could not be reached; use at least \
             {concurrency}, or 0"
        );
        reader.problem(key, message);
    }
    u16::try_from(prefetch).ok()
}

fn close(
    raw: &raw::Destination,
    name: Option<&str>,
    need: Need,
    reader: &mut Reader<'_>,
) -> Option<close::Settings> {
    let setting = setting!(raw, close.api_url);
    let url = if setting.text().contains(['@', '?', '#']) {
        // The URL is shown, so it must not contain secrets, and the message must not repeat it.
        let message = "must be a URL without credentials and parameters, like `https://api.close.com/api/v1/`; \
                       put the API key into `close.api_key` (CLOSE_API_KEY)";
        reader.problem(setting.key, message);
        None
    } else {
        reader.parsed(setting, "URL", "for example `https://api.close.com/api/v1/`", |text| {
            let whole = if text.ends_with('/') { text.to_owned() } else { format!("{text}/") };
            let url = Url::parse(&whole).ok()?;
            (matches!(url.scheme(), "http" | "https") && url.has_host()).then_some(url)
        })
    };
    let api_key = api_key(raw, name, need, reader);
    let timeout = reader.duration(setting!(raw, close.timeout), Duration::from_millis(1));
    let share = reader.number(setting!(raw, close.rate_limit_share), 1..=100);
    Some(close::Settings {
        url: url?,
        api_key,
        timeout: timeout?,
        share: f64::from(u8::try_from(share?).ok()?) / 100.0,
    })
}

fn api_key(raw: &raw::Destination, name: Option<&str>, need: Need, reader: &mut Reader<'_>) -> SecretString {
    let setting = setting!(raw, close.api_key);
    let text = setting.text().to_owned();
    // A problem with the key or with the whole file is reported already.
    let keys = [Some(setting.key.clone()), name.map(|name| within(name, &setting.key))];
    let is_reported = reader.problems.iter().any(|problem| {
        keys.iter().flatten().any(|key| problem.key == *key) || problem.message.starts_with(NOT_TOML)
    });
    if text.is_empty() && need == Need::All && !is_reported {
        reader.problem(setting.key, "not set; create a key in Close (Settings > API Keys)");
    } else if text.contains(|c: char| c.is_whitespace() || c == ':') {
        reader.problem(setting.key, "not a valid API key: contains a space, a line break or a colon");
    }
    SecretString::from(text)
}

fn worker(
    raw: &raw::Destination,
    delays: Option<&[Delay]>,
    reader: &mut Reader<'_>,
) -> Option<sync::Settings> {
    let in_place = reader.duration(setting!(raw, retry.in_place), Duration::ZERO);
    let max_age = reader.duration(setting!(raw, retry.max_age), Duration::ZERO);
    let max_message_bytes = reader.number(setting!(raw, worker.max_message_bytes), 1..=1 << 30);
    let search_lag = reader.duration(setting!(raw, close.search_lag), Duration::ZERO);
    let event_log_lag = reader.duration(setting!(raw, close.event_log_lag), Duration::ZERO);
    let expected = "two letters (ISO 3166) like `GB`, or nothing";
    let country = reader.parsed(setting!(raw, close.country), "country", expected, |text| {
        if text.is_empty() { Some(None) } else { Country::parse(text).map(Some) }
    });
    let hold = reader.duration(setting!(raw, worker.hold), Duration::from_secs(1));
    let recheck = reader.duration(setting!(raw, worker.recheck), Duration::ZERO);
    if hold.is_some_and(|hold| hold > LONGEST_HOLD) {
        let message =
            "must not be longer than `15m`; RabbitMQ takes back messages that are held for 30 minutes";
        reader.problem(setting!(raw, worker.hold).key, message);
    }
    if in_place.zip(hold).is_some_and(|(in_place, hold)| in_place >= hold) {
        reader.problem(setting!(raw, retry.in_place).key, "must be shorter than `worker.hold`");
    }
    Some(sync::Settings {
        switches: raw.switches,
        retry: Policy {
            in_place: in_place?,
            jitter: retry::JITTER,
            delays: delays?.iter().map(|delay| delay.duration).collect(),
            max_age: max_age?,
        },
        max_message_bytes: usize::try_from(max_message_bytes?).ok()?,
        search_lag: search_lag?,
        event_log_lag: event_log_lag?,
        hold: hold?,
        recheck: recheck?,
        country: country?,
        merge: raw.worker.merge,
    })
}

fn delays(raw: &raw::Destination, reader: &mut Reader<'_>) -> Option<Vec<Delay>> {
    let setting = setting!(raw, retry.delays);
    let delay = |item: &Value| {
        let name = item.as_str()?;
        let duration = duration(name).filter(|duration| !duration.is_zero())?;
        // The name becomes part of a queue's name.
        name.chars().all(|c| c.is_ascii_alphanumeric()).then(|| Delay { name: name.to_owned(), duration })
    };
    let delays: Option<Vec<Delay>> = setting.value.iter().map(delay).collect();
    let problem = match &delays {
        None => "must be a list of durations like `[\"30s\", \"2m\"]`",
        Some(delays) if delays.is_empty() => {
            "must have at least one delay; messages that wait for rate limits go there"
        }
        Some(delays) if !delays.is_sorted_by(|a, b| a.duration < b.duration) => {
            "must be in ascending order, without duplicates"
        }
        Some(_) => return delays,
    };
    reader.problem(setting.key, problem);
    None
}
