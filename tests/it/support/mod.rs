//! The test bench: each test has its own simulator, its own queues on the shared broker, and workers as processes.

pub(crate) mod amqp10;
pub(crate) mod behaviour;
pub(crate) mod dead_letters;
pub(crate) mod journal;
mod node;
pub(crate) mod producer;
mod proxy;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::process::Output;
use std::time::{Duration, Instant};

use close_sync::amqp::envelope;
use close_sync::amqp::server_info::ServerInfo;
use close_sync::config::{Config, Need};
use close_sync_simulator::{Effect, Fault, FaultBody, Settings, Simulator, When};
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions,
    QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use serde_json::{Value, json};

pub(crate) use node::Node;
pub(crate) use proxy::Proxy;
pub(crate) use worker::Worker;

/// The timeout of everything a test waits for, long enough for a busy machine.
pub(crate) const TIMEOUT: Duration = Duration::from_mins(3);

/// Close rejects a request for good: it names a field that records are found by.
pub(crate) fn refusal() -> Effect {
    let body = json!({"errors": [], "field-errors": {"custom.cf_contactuserid": "Not a valid choice."}});
    Effect::Status { code: 400, body: FaultBody::Exactly(body), when: When::BeforeCommit }
}

/// The environment of one test.
pub(crate) struct Bench {
    pub(crate) simulator: Simulator,
    pub(crate) amqp_url: String,
    pub(crate) queue: String,
    pub(crate) exchange: String,
    environment: BTreeMap<String, String>,
    channel: tokio::sync::Mutex<Option<Channel>>,
}

impl Bench {
    /// A bench without rate limits and search lag.
    pub(crate) async fn new() -> Self {
        Self::with(Settings::fast()).await
    }

    pub(crate) async fn with(settings: Settings) -> Self {
        Self::on(&shared_broker(), settings).await
    }

    /// A bench on another broker than the shared one.
    pub(crate) async fn on(amqp_url: &str, settings: Settings) -> Self {
        let simulator = Simulator::start(settings, "127.0.0.1:0".parse().unwrap()).await.unwrap();
        Self::around(simulator, amqp_url)
    }

    /// A bench with an existing simulator.
    pub(crate) fn around(simulator: Simulator, amqp_url: &str) -> Self {
        let name = format!("t-{}", uuid::Uuid::now_v7().simple());
        let exchange = format!("{name}-identify");
        let environment = [
            ("AMQP_URL", amqp_url),
            ("AMQP_QUEUE", name.as_str()),
            ("AMQP_EXCHANGE", exchange.as_str()),
            ("CLOSE_API_URL", &simulator.url()),
            ("CLOSE_API_KEY", "api_simulator.key"),
            ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_leadcompanyid"),
            ("CLOSE_CONTACT_USER_ID_FIELD", "cf_contactuserid"),
            ("CLOSE_SEARCH_LAG", "0s"),
            ("CLOSE_EVENT_LOG_LAG", "0s"),
            ("RETRY_IN_PLACE", "1s"),
            ("RETRY_DELAYS", "[\"200ms\", \"400ms\"]"),
            ("HTTP_ADDR", "127.0.0.1:0"),
            ("LOG_FORMAT", "json"),
            ("RUST_LOG", "debug,lapin=off,hyper=off,reqwest=off"),
        ];
        Self {
            simulator,
            amqp_url: amqp_url.to_owned(),
            queue: name.clone(),
            exchange: exchange.clone(),
            environment: environment
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            channel: tokio::sync::Mutex::default(),
        }
    }

    /// Sets an environment variable for processes started later.
    #[must_use]
    pub(crate) fn set(mut self, variable: &str, value: &str) -> Self {
        self.environment.insert(variable.to_owned(), value.to_owned());
        self
    }

    /// Uses this exchange and queue instead of its own.
    #[must_use]
    pub(crate) fn named(mut self, exchange: &str, queue: &str) -> Self {
        (self.exchange, self.queue) = (exchange.to_owned(), queue.to_owned());
        self.set("AMQP_EXCHANGE", exchange).set("AMQP_QUEUE", queue)
    }

    pub(crate) fn unset(mut self, variable: &str) -> Self {
        self.environment.remove(variable);
        self
    }

    /// The environment variables of its processes.
    pub(crate) fn environment(&self) -> HashMap<String, String> {
        self.environment.clone().into_iter().collect()
    }

    /// Starts a worker and waits until it is ready.
    pub(crate) async fn worker(&self) -> Worker {
        let worker = self.starting_worker();
        worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
        worker
    }

    pub(crate) fn starting_worker(&self) -> Worker {
        Worker::start(&self.environment, &["run"])
    }

    /// Starts another command and keeps it running, for example to send it a signal.
    pub(crate) fn starting(&self, arguments: &[&str]) -> Worker {
        Worker::start(&self.environment, arguments)
    }

    /// Runs another command and waits until it exits.
    pub(crate) async fn run(&self, arguments: &[&str], input: &[u8]) -> Output {
        worker::run(&self.environment, arguments, input).await
    }

    /// The standard output of a command that must succeed.
    pub(crate) async fn output(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments, b"").await;
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The output and exit code of a command, with placeholders for values that differ between runs.
    pub(crate) async fn transcript(&self, arguments: &[&str], input: &[u8]) -> String {
        let output = self.run(arguments, input).await;
        let text = format!(
            "exit code {}\n--- stdout\n{}--- stderr\n{}",
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        );
        let (_, host) = self.amqp_url.split_once('@').unwrap();
        let address = format!("amqp://guest:***@{host}");
        let text = match self.broker().await {
            Some(broker) => {
                text.replace(&broker.to_string(), "RabbitMQ VERSION").replace(&broker.describe(), "USES")
            }
            None => text,
        };
        text.replace(&address, "BROKER")
            .replace(&self.exchange, "EXCHANGE")
            .replace(&self.queue, "QUEUE")
            .replace(&self.simulator.addr().to_string(), "SIMULATOR")
    }

    /// The version and features of the broker, if it answers.
    pub(crate) async fn broker(&self) -> Option<ServerInfo> {
        let config = Config::load(None, &self.environment(), Need::Broker).ok()?;
        Some(config.single().ok()?.amqp.open("test").await.ok()?.server)
    }

    /// Publishes events in order.
    pub(crate) async fn publish(&self, events: &[Value]) {
        for event in events {
            self.publish_bytes(event.to_string().as_bytes(), BasicProperties::default()).await;
        }
    }

    pub(crate) async fn publish_bytes(&self, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let channel = self.channel().await;
        let confirm = channel
            .basic_publish(
                self.exchange.as_str().into(),
                "users".into(),
                options,
                body,
                properties.with_delivery_mode(2),
            )
            .await
            .unwrap();
        match confirm.await.unwrap() {
            lapin::Confirmation::Ack(None) => {}
            lapin::Confirmation::Ack(Some(returned)) => panic!("no queue is bound: {returned:?}"),
            nack @ (lapin::Confirmation::Nack(_) | lapin::Confirmation::NotRequested) => {
                panic!("the broker refused the message: {nack:?}")
            }
        }
    }

    /// Starts a worker, publishes, waits until everything is settled, and stops the worker.
    pub(crate) async fn sync(&self, events: &[Value]) -> Metrics {
        let worker = self.worker().await;
        self.publish(events).await;
        let metrics = worker.settled(events.len()).await;
        worker.terminate().await;
        metrics
    }

    /// The ready messages in the queue with this suffix: "", ".dead" or ".retry.200ms".
    pub(crate) async fn depth(&self, suffix: &str) -> u32 {
        self.try_depth(suffix).await.unwrap()
    }

    /// The same, for a broker that may be unreachable.
    pub(crate) async fn try_depth(&self, suffix: &str) -> lapin::Result<u32> {
        let connection = connect(&self.amqp_url).await?;
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let name = format!("{}{suffix}", self.queue);
        let queue = channel.queue_declare(name.into(), options, FieldTable::default()).await?;
        let depth = queue.message_count();
        connection.close(200, "".into()).await?;
        Ok(depth)
    }

    /// Consumes everything published to an exchange from now on.
    pub(crate) async fn outcomes(&self, exchange: &str) -> Consumer {
        self.outcomes_like(exchange, "#").await
    }

    /// The same, for messages that match a routing key.
    pub(crate) async fn outcomes_like(&self, exchange: &str, key: &str) -> Consumer {
        let (channel, none) = (self.channel().await, FieldTable::default());
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let queue = channel.queue_declare("".into(), options, none.clone()).await.unwrap();
        let (name, options) = (queue.name().clone(), QueueBindOptions::default());
        channel.queue_bind(name.clone(), exchange.into(), key.into(), options, none.clone()).await.unwrap();
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        channel.basic_consume(name, "".into(), options, none).await.unwrap()
    }

    /// Waits until the queue with this suffix has exactly this many ready messages.
    pub(crate) async fn depth_becomes(&self, suffix: &str, wanted: u32) {
        let start = Instant::now();
        loop {
            let depth = self.depth(suffix).await;
            if depth == wanted {
                return;
            }
            assert!(start.elapsed() < TIMEOUT, "{suffix:?} holds {depth} messages, not {wanted}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Removes a dead letter from its queue. Returns its body, its text and number headers, and its properties.
    pub(crate) async fn take_dead_letter(&self) -> (Vec<u8>, BTreeMap<String, String>, BasicProperties) {
        let channel = self.channel().await;
        let name = format!("{}.dead", self.queue);
        let options = BasicGetOptions { no_ack: true };
        let message = channel.basic_get(name.into(), options).await.unwrap().expect("a dead letter").delivery;
        let properties = &message.properties;
        let names =
            properties.headers().iter().flat_map(|table| table.inner().keys()).map(ToString::to_string);
        let number = |name: &str| envelope::number(properties, name).map(|number| number.to_string());
        let texts = names.filter_map(|name| {
            let value = envelope::text(properties, &name).or_else(|| number(&name))?;
            Some((name, value))
        });
        (message.data.clone(), texts.collect(), properties.clone())
    }

    /// The test's own channel. Opens a new one if the connection was lost.
    pub(crate) async fn channel(&self) -> Channel {
        self.try_channel().await.unwrap()
    }

    /// The same, for a broker that may be unreachable.
    pub(crate) async fn try_channel(&self) -> lapin::Result<Channel> {
        let mut channel = self.channel.lock().await;
        if let Some(open) = channel.as_ref().filter(|channel| channel.status().connected()) {
            return Ok(open.clone());
        }
        let connection = connect(&self.amqp_url).await?;
        let new = connection.create_channel().await?;
        new.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(channel.insert(new).clone())
    }

    /// Deletes everything its workers declared, for tests with many benches.
    pub(crate) async fn clean_up(&self, delays: &[&str]) {
        let channel = self.channel().await;
        let mut queues = vec![self.queue.clone(), format!("{}.dead", self.queue)];
        queues.extend(delays.iter().map(|delay| format!("{}.retry.{delay}", self.queue)));
        for queue in queues {
            channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
        }
        for exchange in
            [self.exchange.clone(), format!("{}.retry", self.queue), format!("{}.dead", self.queue)]
        {
            channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.unwrap();
        }
    }

    /// The simulator's faults that can still affect a request.
    pub(crate) async fn remaining_faults(&self) -> Vec<Fault> {
        let url = format!("http://{}/_sim/faults", self.simulator.addr());
        reqwest::get(url).await.unwrap().json().await.unwrap()
    }

    /// The only Lead. Panics if there is not exactly one.
    pub(crate) fn the_lead(&self) -> Value {
        let mut leads = self.simulator.leads();
        assert_eq!(leads.len(), 1, "{leads:#?}");
        leads.remove(0)
    }

    /// Creates a Lead as another user of Close would, optionally with a company id.
    pub(crate) fn lead(&self, company_id: Option<&str>, contacts: Value) -> Value {
        let mut body = json!({"name": "Made by hand", "contacts": contacts});
        if let Some(id) = company_id {
            body["custom.cf_leadcompanyid"] = id.into();
        }
        self.simulator.add_lead(body).unwrap()
    }

    /// Asserts that Close has each company and each person of `people(count)` exactly once.
    pub(crate) fn assert_each_once(&self, count: usize) {
        let leads = self.simulator.leads();
        let mut companies: Vec<_> =
            leads.iter().map(|lead| lead["custom.cf_leadcompanyid"].to_string()).collect();
        companies.sort();
        companies.dedup();
        assert_eq!((leads.len(), companies.len()), (count, count), "{companies:?}");
        assert_eq!(self.simulator.contacts().len(), count);
    }

    /// All writes to Close so far, such as `POST lead`.
    pub(crate) fn writes(&self) -> Vec<String> {
        let requests = self.simulator.requests();
        let written =
            requests.iter().filter(|request| request.method != "GET" && !request.path.contains("/search/"));
        written
            .map(|request| format!("{} {}", request.method, request.path.split('/').nth(1).unwrap()))
            .collect()
    }
}

/// The URL of the broker that `tests/run` starts for all tests.
pub(crate) fn shared_broker() -> String {
    env("CLOSE_SYNC_TEST_AMQP_URL").unwrap_or_else(|| {
        panic!("these tests need RabbitMQ: run `tests/run`, or set CLOSE_SYNC_TEST_AMQP_URL to the URL of a broker")
    })
}

/// An event about a person.
pub(crate) fn identify(user: &str, traits: Value) -> Value {
    json!({"type": "identify", "userId": user, "traits": traits})
}

/// An event about a person in a company, both by number.
pub(crate) fn employee(person: usize, company: usize, title: &str) -> Value {
    let company = json!({"id": format!("c{company}"), "name": format!("Company {company}")});
    identify(
        &format!("u{person}"),
        json!({"email": format!("p{person}@c.test"), "title": title, "company": company}),
    )
}

/// Events about this many people, each in another company.
pub(crate) fn people(count: usize) -> Vec<Value> {
    (0..count).map(|n| identify(&format!("u{n}"), json!({"company": {"id": format!("c{n}")}}))).collect()
}

/// The values of a list of a Contact: `values(&contact, "emails", "email")`.
pub(crate) fn values(contact: &Value, list: &str, item: &str) -> Vec<String> {
    let entries = contact[list].as_array().unwrap_or_else(|| panic!("no {list} in {contact:#}"));
    entries.iter().map(|entry| entry[item].as_str().unwrap().to_owned()).collect()
}

pub(crate) async fn connect(url: &str) -> lapin::Result<Connection> {
    Connection::connect(url, ConnectionProperties::default()).await
}

/// The samples of `/metrics`, by name and labels.
#[derive(Debug)]
pub(crate) struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    fn parse(page: &str) -> Self {
        let samples = page.lines().filter(|line| !line.starts_with('#'));
        Self(
            samples
                .map(|line| {
                    line.rsplit_once(' ')
                        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
                        .unwrap()
                })
                .collect(),
        )
    }

    /// A sample by its name without the prefix `close_sync_`: `messages_settled_total{outcome="created"}`.
    pub(crate) fn get(&self, name: &str) -> f64 {
        *self.0.get(&format!("close_sync_{name}")).unwrap_or_else(|| panic!("no metric {name}"))
    }

    /// The same, as an integer.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small counts")]
    pub(crate) fn count(&self, name: &str) -> u32 {
        self.get(name) as u32
    }

    /// The sum of all samples of a name.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small counts")]
    pub(crate) fn sum(&self, name: &str) -> u32 {
        let prefix = format!("close_sync_{name}{{");
        self.0.iter().filter(|(name, _)| name.starts_with(&prefix)).map(|(_, value)| *value as u32).sum()
    }

    pub(crate) fn outcome(&self, outcome: &str) -> u32 {
        self.count(&format!("messages_settled_total{{outcome=\"{outcome}\"}}"))
    }

    /// The same, for one of several destinations.
    pub(crate) fn outcome_of(&self, outcome: &str, destination: &str) -> u32 {
        self.count(&format!("messages_settled_total{{outcome=\"{outcome}\",destination=\"{destination}\"}}"))
    }

    /// All settled messages, including those in delay queues, without `handed_back`.
    pub(crate) fn settled(&self) -> f64 {
        let all = self.0.iter().filter(|(name, _)| name.starts_with("close_sync_messages_settled_total"));
        all.filter(|(name, _)| !name.contains("handed_back")).map(|(_, value)| value).sum()
    }

    /// The settled messages by outcome, without zeros.
    pub(crate) fn outcomes(&self) -> BTreeMap<&str, u32> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small counts")]
        self.0
            .iter()
            .filter(|(_, value)| **value > 0.0)
            .filter_map(|(name, value)| {
                let (_, rest) = name.split_once("messages_settled_total{outcome=\"")?;
                Some((rest.strip_suffix("\"}")?, *value as u32))
            })
            .collect()
    }

    /// The names of all samples with their labels, in order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

#[expect(clippy::disallowed_methods, reason = "`tests/run` passes its settings in environment variables")]
pub(crate) fn env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
