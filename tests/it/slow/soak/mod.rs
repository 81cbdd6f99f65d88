//! The soak test: full load while something fails every few seconds. `tests/soak` runs it for ten minutes.
//!
//! There are two workers, one active and one on standby, each with its own proxy to a private broker. A producer keeps
//! messages waiting in the queue. Failures of workers, broker, network and Close are drawn from a seed. The title in
//! each event is its number among the events of its person. So the records in Close show whether the newest event won.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::time::{Duration, Instant};

use close_sync_simulator::Settings;
use jiff::{SignedDuration, Timestamp};
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Confirmation};
use serde_json::{Value, json};

use self::disruption::{Disruption, DisruptionBag};
use self::workers::Workers;
use crate::support::{Bench, Node, env};

mod disruption;
mod workers;

/// The default duration, enough for a few kinds of failures. `tests/soak` runs for minutes, with each kind several
/// times.
const SECONDS: u64 = 20;
/// The maximum number of waiting messages.
const WAITING: u32 = 1500;
/// The number of messages published before their confirms are awaited.
const BATCH: usize = 100;
/// The time limit for settling all messages after the last failure.
const DRAIN_LIMIT: Duration = Duration::from_mins(5);
const DELAYS: [&str; 3] = ["1s", "2s", "5s"];

fn number(name: &str, default: u64) -> u64 {
    env(name).map_or(default, |text| text.parse().unwrap())
}

fn print(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_message_is_lost_or_duplicated_while_components_fail() {
    let (seconds, seed) = (number("SOAK_SECONDS", SECONDS), number("SOAK_SEED", 1));
    let node = Node::start().await;
    let settings = Settings::fast().with(|close| close.search_lag = "0s..500ms".parse().unwrap());
    let bench = Bench::on(&node.url, settings)
        .await
        .set("CLOSE_LEAD_SYNCED_AT_FIELD", "cf_leadsyncedat")
        .set("CLOSE_CONTACT_SYNCED_AT_FIELD", "cf_contactsyncedat")
        .set("CLOSE_SEARCH_LAG", "2s")
        .set("CLOSE_TIMEOUT", "1s")
        .set("RETRY_IN_PLACE", "3s")
        .set("RETRY_DELAYS", &format!("{DELAYS:?}"))
        .set("RUST_LOG", "info,lapin=off");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bag = DisruptionBag::default();
    let mut workers = Workers::new(&bench).await;
    let mut producer = Producer::new(seed);

    let (start, mut journal) = (Instant::now(), Vec::new());
    let run = Duration::from_secs(seconds);
    while start.elapsed() < run {
        let pause = Duration::from_millis(random.u64(500..4000));
        producer.publish_for(&bench, pause).await;
        let (disruption, began) = (bag.draw(&mut random), Timestamp::now());
        let disrupting = disruption.apply(&bench, &node, &mut workers, &mut random);
        // The producer continues meanwhile.
        tokio::join!(disrupting, producer.publish_for(&bench, Duration::from_secs(1)));
        journal.push((disruption, began, Timestamp::now()));
        workers.read_logs();
        print(&format!(
            "{:>4} s  {:<28} published {}, settled {}; {}",
            start.elapsed().as_secs(),
            disruption.label(),
            producer.published(),
            workers.settled.len(),
            workers.states().await
        ));
    }
    bench.simulator.clear_faults();
    producer.finish(&bench).await;
    let busy_until = Timestamp::now();
    drain(&bench, &mut workers).await;
    let dead = bench.depth(".dead").await;
    if dead > 0 {
        bench.output(&["dlq", "replay", "--all", "--no-wait"]).await;
        drain(&bench, &mut workers).await;
    }
    let left = bench.depth(".dead").await;
    workers.terminate().await;

    let report = Report {
        seconds: start.elapsed().as_secs(),
        messages: producer.published(),
        outcomes: workers.outcomes(),
        dead_letters_replayed: dead,
        dead_letters_left: left,
        lost: producer.lost(&workers),
        doubled: doubled(&bench),
        wrong: producer.wrong(&bench),
        peak_memory_mib: workers.peak_memory / 1024,
        longest_stall: stall(&workers, &journal, busy_until),
        faults: journal.iter().fold(BTreeMap::new(), |mut counts, (disruption, ..)| {
            *counts.entry(disruption.label()).or_default() += 1;
            counts
        }),
    };
    print(&report.render(seed));
    assert!(report.is_clean(), "see above");
}

/// Waits until the queues are empty and the workers are idle.
async fn drain(bench: &Bench, workers: &mut Workers) {
    let start = Instant::now();
    loop {
        let mut waiting = bench.depth("").await;
        for delay in DELAYS {
            waiting += bench.depth(&format!(".retry.{delay}")).await;
        }
        workers.read_logs();
        if waiting == 0 && workers.is_idle().await {
            return;
        }
        assert!(start.elapsed() < DRAIN_LIMIT, "{waiting} messages wait\n{}", workers.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Publishes events at full speed, and knows the newest event of each person.
struct Producer {
    random: fastrand::Rng,
    base: Timestamp,
    /// The number of events of each person.
    events: Vec<u64>,
    /// Published events without a confirm.
    pending: Vec<(usize, u64)>,
    published: usize,
}

impl Producer {
    fn new(seed: u64) -> Self {
        let base = Timestamp::now().checked_sub(SignedDuration::from_hours(240)).unwrap();
        let random = fastrand::Rng::with_seed(!seed);
        Self { random, base, events: vec![0; 100], pending: Vec::new(), published: 0 }
    }

    fn published(&self) -> usize {
        self.published
    }

    /// Publishes for this time, as fast as the broker confirms, and pauses while too many messages wait.
    async fn publish_for(&mut self, bench: &Bench, time: Duration) {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            // The broker may be unreachable or accept no messages.
            if tokio::time::timeout(left, self.batch(bench)).await.is_err() {
                return;
            }
        }
    }

    /// Publishes everything that is not confirmed yet.
    async fn finish(&mut self, bench: &Bench) {
        while !self.pending.is_empty() {
            self.batch(bench).await;
        }
    }

    async fn batch(&mut self, bench: &Bench) {
        if !self.try_batch(bench).await.unwrap_or(false) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Publishes one batch. Returns whether there was anything to publish and all of it was confirmed.
    async fn try_batch(&mut self, bench: &Bench) -> lapin::Result<bool> {
        let channel = bench.try_channel().await?;
        if self.pending.is_empty() {
            if bench.try_depth("").await? > WAITING {
                return Ok(false);
            }
            for _ in 0..BATCH {
                // Sometimes there is a new person.
                if self.random.u8(..40) == 0 {
                    self.events.push(0);
                }
                let person = self.random.usize(..self.events.len());
                self.events[person] += 1;
                self.pending.push((person, self.events[person]));
                self.published += 1;
            }
        }
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let mut confirms = Vec::new();
        for (person, number) in &self.pending {
            let body = self.event(*person, *number).to_string();
            let properties = BasicProperties::default()
                .with_delivery_mode(2)
                .with_message_id(format!("{person}-{number}").into());
            let (exchange, key) = (bench.exchange.as_str().into(), "users".into());
            confirms.push(channel.basic_publish(exchange, key, options, body.as_bytes(), properties).await?);
        }
        // Unconfirmed events stay pending and are published again in order, even if this future is dropped.
        let mut unconfirmed = Vec::new();
        for (event, confirm) in self.pending.iter().zip(confirms) {
            if !matches!(confirm.await, Ok(Confirmation::Ack(None))) {
                unconfirmed.push(*event);
            }
        }
        self.pending = unconfirmed;
        Ok(self.pending.is_empty())
    }

    fn event(&self, person: usize, number: u64) -> Value {
        let time =
            self.base.checked_add(SignedDuration::from_secs(2 * i64::try_from(number).unwrap())).unwrap();
        json!({
            "type": "identify",
            "userId": format!("u{person}"),
            "timestamp": time.to_string(),
            "traits": {
                "title": number.to_string(),
                "email": format!("u{person}@example.com"),
                "company": { "id": format!("c{}", person / 3), "name": format!("Company {}", person / 3) },
            },
        })
    }

    fn lost(&self, workers: &Workers) -> Vec<String> {
        let all = self.events.iter().enumerate();
        let ids =
            all.flat_map(|(person, count)| (1..=*count).map(move |number| format!("{person}-{number}")));
        ids.filter(|id| !workers.done.contains(id)).collect()
    }

    /// The people whose record does not match their newest event.
    fn wrong(&self, bench: &Bench) -> Vec<String> {
        let contacts = bench.simulator.contacts();
        let titles: HashMap<_, _> = contacts
            .iter()
            .map(|each| (each["custom.cf_contactuserid"].as_str(), each["title"].as_str()))
            .collect();
        let people = self.events.iter().enumerate().filter(|(_, count)| **count > 0);
        people
            .filter_map(|(person, count)| {
                let user = format!("u{person}");
                let title = titles.get(&Some(user.as_str())).copied().flatten();
                (title != Some(count.to_string().as_str())).then(|| format!("{user}: {title:?}, not {count}"))
            })
            .collect()
    }
}

/// Companies with several Leads, and people with several Contacts.
fn doubled(bench: &Bench) -> Vec<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let leads = bench.simulator.leads();
    let ids = leads.iter().map(|lead| &lead["custom.cf_leadcompanyid"]);
    let contacts = bench.simulator.contacts();
    for id in ids.chain(contacts.iter().map(|contact| &contact["custom.cf_contactuserid"])) {
        *counts.entry(id.to_string()).or_default() += 1;
    }
    counts.into_iter().filter(|(_, count)| *count > 1).map(|(id, count)| format!("{id}: {count}")).collect()
}

/// The longest time without a settled message while messages waited, and the disruptions during it.
fn stall(
    workers: &Workers,
    journal: &[(Disruption, Timestamp, Timestamp)],
    until: Timestamp,
) -> (u64, String) {
    let mut times: Vec<Timestamp> =
        workers.settled.values().flatten().copied().filter(|at| *at < until).collect();
    times.sort();
    let gaps = times.windows(2).map(|pair| (pair[1].duration_since(pair[0]), pair[0], pair[1]));
    let Some((gap, from, to)) = gaps.max() else { return (0, String::new()) };
    let during = journal.iter().filter(|(_, began, ended)| *began <= to && *ended >= from);
    let labels: Vec<_> = during.map(|(disruption, ..)| disruption.label()).collect();
    (u64::try_from(gap.as_millis()).unwrap(), labels.join(", "))
}

struct Report {
    seconds: u64,
    messages: usize,
    outcomes: BTreeMap<String, usize>,
    dead_letters_replayed: u32,
    dead_letters_left: u32,
    lost: Vec<String>,
    doubled: Vec<String>,
    wrong: Vec<String>,
    peak_memory_mib: u64,
    longest_stall: (u64, String),
    faults: BTreeMap<&'static str, u32>,
}

impl Report {
    fn is_clean(&self) -> bool {
        self.lost.is_empty()
            && self.doubled.is_empty()
            && self.wrong.is_empty()
            && self.dead_letters_left == 0
    }

    fn render(&self, seed: u64) -> String {
        let (stall, during) = &self.longest_stall;
        if env("SOAK_JSON").is_some() {
            return json!({
                "seed": seed, "seconds": self.seconds, "messages": self.messages, "outcomes": self.outcomes,
                "dead_letters_replayed": self.dead_letters_replayed, "dead_letters_left": self.dead_letters_left,
                "lost": self.lost, "doubled": self.doubled, "wrong": self.wrong,
                "peak_memory_mib": self.peak_memory_mib, "longest_stall_ms": stall, "stalled_during": during,
                "faults": self.faults,
            })
            .to_string();
        }
        let list = |all: &[String]| match all {
            [] => "0".to_owned(),
            some => {
                format!("{}: {}", some.len(), some.iter().take(20).cloned().collect::<Vec<_>>().join("; "))
            }
        };
        let rate = self.messages as u64 / self.seconds.max(1);
        [
            String::new(),
            format!("seed {seed}: {} messages in {} s ({rate} per second)", self.messages, self.seconds),
            format!("settled            {:?}", self.outcomes),
            format!(
                "dead letters       {} replayed, {} remaining",
                self.dead_letters_replayed, self.dead_letters_left
            ),
            format!("lost               {}", list(&self.lost)),
            format!("duplicated         {}", list(&self.doubled)),
            format!("wrong              {}", list(&self.wrong)),
            format!("peak memory        {} MiB", self.peak_memory_mib),
            format!("longest stall      {stall} ms ({during})"),
            format!("faults             {:?}", self.faults),
        ]
        .join("\n")
    }
}

/// The memory of a worker does not depend on the length of the queue. This compares two workers that have settled the
/// same number of messages, with a short and with a long queue.
#[tokio::test(flavor = "multi_thread")]
async fn memory_does_not_grow_with_the_backlog() {
    const SETTLED: usize = 3000;
    let few = 2 * SETTLED;
    let many = usize::try_from(number("SOAK_BACKLOG", 60_000)).unwrap();
    let mut peaks = Vec::new();
    for backlog in [few, many] {
        let bench = Bench::new().await.set("RUST_LOG", "info,lapin=off");
        // Declares the queues, then stops.
        bench.worker().await.terminate().await;
        let began = Instant::now();
        publish(&bench, backlog).await;
        let took = began.elapsed();
        let worker = bench.worker().await;
        worker.settled(SETTLED).await;
        let peak = worker.peak_memory().unwrap();
        print(&format!(
            "{backlog} messages, published in {:.1} s: peak memory {} MiB",
            took.as_secs_f64(),
            peak / 1024
        ));
        assert!(bench.depth("").await > 0, "there is still a backlog");
        worker.kill().await;
        bench.clean_up(&["200ms", "400ms"]).await;
        peaks.push(peak);
    }
    assert!(peaks[1] < peaks[0] + 10 * 1024, "{peaks:?} KiB");
}

/// Publishes small events about many people, with many unconfirmed at a time.
async fn publish(bench: &Bench, messages: usize) {
    let channel = bench.channel().await;
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let mut unconfirmed_messages = std::collections::VecDeque::new();
    for number in 0..messages {
        let body =
            json!({"type": "identify", "userId": format!("u{}", number % 1000), "traits": {}}).to_string();
        let properties = BasicProperties::default().with_delivery_mode(2);
        let (exchange, key) = (bench.exchange.as_str().into(), "users".into());
        let confirm =
            channel.basic_publish(exchange, key, options, body.as_bytes(), properties).await.unwrap();
        unconfirmed_messages.push_back(confirm);
        if unconfirmed_messages.len() == 1000 {
            assert_eq!(unconfirmed_messages.pop_front().unwrap().await.unwrap(), Confirmation::Ack(None));
        }
    }
    for confirm in unconfirmed_messages {
        assert_eq!(confirm.await.unwrap(), Confirmation::Ack(None));
    }
}
