//! Ten minutes at full speed while something breaks every few seconds. `tests/soak` runs it.
//!
//! Two workers, one active and one standing by, each with a way of its own to a private broker; a producer that
//! keeps messages waiting; and faults of workers, broker, network and Close, drawn from a seed. Each event carries
//! the number it has among those of its person, so that afterwards Close itself tells whether the newest one won.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::time::{Duration, Instant};

use close_sync_simulator::Settings;
use jiff::{SignedDuration, Timestamp};
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Confirmation};
use serde_json::{Value, json};

use self::crew::Crew;
use self::strike::{Bag, Strike};
use crate::support::{Bench, Node, env};

mod crew;
mod strike;

/// Among all other tests: enough for a few kinds of faults. `tests/soak` takes minutes, in which each comes several times.
const SECONDS: u64 = 20;
/// Messages that wait, at most.
const WAITING: u32 = 1500;
/// Published one after the other before their confirms are awaited.
const BATCH: usize = 100;
/// Nothing keeps messages from being settled for longer once everything works again.
const TIME_TO_DRAIN: Duration = Duration::from_mins(5);
const DELAYS: [&str; 3] = ["1s", "2s", "5s"];

fn number(name: &str, default: u64) -> u64 {
    env(name).map_or(default, |text| text.parse().unwrap())
}

fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_while_something_breaks_every_few_seconds() {
    let (seconds, seed) = (number("SOAK_SECONDS", SECONDS), number("SOAK_SEED", 1));
    let node = Node::start().await;
    let settings = Settings { search_lag: "0s..500ms".parse().unwrap(), ..Settings::fast() };
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
    let mut bag = Bag::default();
    let mut crew = Crew::new(&bench).await;
    let mut producer = Producer::new(seed);

    let (start, mut journal) = (Instant::now(), Vec::new());
    let run = Duration::from_secs(seconds);
    while start.elapsed() < run {
        let pause = Duration::from_millis(random.u64(500..4000));
        producer.publish_for(&bench, pause).await;
        let (strike, began) = (bag.draw(&mut random), Timestamp::now());
        let strikes = strike.strike(&bench, &node, &mut crew, &mut random);
        // The producer goes on meanwhile.
        tokio::join!(strikes, producer.publish_for(&bench, Duration::from_secs(1)));
        journal.push((strike, began, Timestamp::now()));
        crew.look();
        say(&format!(
            "{:>4} s  {:<28} published {}, settled {}; {}",
            start.elapsed().as_secs(),
            strike.label(),
            producer.published(),
            crew.settled.len(),
            crew.states().await
        ));
    }
    bench.simulator.clear_faults();
    producer.finish(&bench).await;
    let busy_until = Timestamp::now();
    drain(&bench, &mut crew).await;
    let dead = bench.depth(".dead").await;
    if dead > 0 {
        bench.output(&["dlq", "replay", "--all", "--no-wait"]).await;
        drain(&bench, &mut crew).await;
    }
    let left = bench.depth(".dead").await;
    crew.dismiss().await;

    let report = Report {
        seconds: start.elapsed().as_secs(),
        messages: producer.published(),
        outcomes: crew.outcomes(),
        dead_letters_replayed: dead,
        dead_letters_left: left,
        lost: producer.lost(&crew),
        doubled: doubled(&bench),
        wrong: producer.wrong(&bench),
        peak_memory_mib: crew.peak_memory / 1024,
        longest_stall: stall(&crew, &journal, busy_until),
        faults: journal.iter().fold(BTreeMap::new(), |mut counts, (strike, ..)| {
            *counts.entry(strike.label()).or_default() += 1;
            counts
        }),
    };
    say(&report.told(seed));
    assert!(report.is_clean(), "see above");
}

/// Waits until nothing waits and nobody has anything in hand.
async fn drain(bench: &Bench, crew: &mut Crew) {
    let start = Instant::now();
    loop {
        let mut waiting = bench.depth("").await;
        for delay in DELAYS {
            waiting += bench.depth(&format!(".retry.{delay}")).await;
        }
        crew.look();
        if waiting == 0 && crew.is_idle().await {
            return;
        }
        assert!(start.elapsed() < TIME_TO_DRAIN, "{waiting} messages wait\n{}", crew.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Publishes events at full speed, and knows what each person's newest one says.
struct Producer {
    random: fastrand::Rng,
    base: Timestamp,
    /// How many events there were of each person.
    events: Vec<u64>,
    /// Published and not confirmed yet.
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

    /// Publishes for so long, as fast as the broker confirms and not so much that too many wait.
    async fn publish_for(&mut self, bench: &Bench, time: Duration) {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            // A broker that is away, or takes nothing, is waited for.
            if tokio::time::timeout(left, self.batch(bench)).await.is_err() {
                return;
            }
        }
    }

    /// Publishes what was not confirmed so far.
    async fn finish(&mut self, bench: &Bench) {
        while !self.pending.is_empty() {
            self.batch(bench).await;
        }
    }

    async fn batch(&mut self, bench: &Bench) {
        if !self.tried(bench).await.unwrap_or(false) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Whether there was something to publish, and all of it is confirmed.
    async fn tried(&mut self, bench: &Bench) -> lapin::Result<bool> {
        let channel = bench.try_channel().await?;
        if self.pending.is_empty() {
            if bench.try_depth("").await? > WAITING {
                return Ok(false);
            }
            for _ in 0..BATCH {
                // Some are new.
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
        // What is not confirmed is published again, in its order; also when this is cut short.
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

    fn lost(&self, crew: &Crew) -> Vec<String> {
        let all = self.events.iter().enumerate();
        let ids =
            all.flat_map(|(person, count)| (1..=*count).map(move |number| format!("{person}-{number}")));
        ids.filter(|id| !crew.done.contains(id)).collect()
    }

    /// Persons whose record does not say what their newest event said.
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

/// Companies with several Leads, and persons with several Contacts.
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

/// The longest time in which nothing was settled while messages waited, and what went wrong then.
fn stall(crew: &Crew, journal: &[(Strike, Timestamp, Timestamp)], until: Timestamp) -> (u64, String) {
    let mut times: Vec<Timestamp> =
        crew.settled.values().flatten().copied().filter(|at| *at < until).collect();
    times.sort();
    let gaps = times.windows(2).map(|pair| (pair[1].duration_since(pair[0]), pair[0], pair[1]));
    let Some((gap, from, to)) = gaps.max() else { return (0, String::new()) };
    let during = journal.iter().filter(|(_, began, ended)| *began <= to && *ended >= from);
    let labels: Vec<_> = during.map(|(strike, ..)| strike.label()).collect();
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

    fn told(&self, seed: u64) -> String {
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
            format!("seed {seed}: {} messages in {} s ({rate} a second)", self.messages, self.seconds),
            format!("settled            {:?}", self.outcomes),
            format!(
                "dead letters       {} replayed, {} left",
                self.dead_letters_replayed, self.dead_letters_left
            ),
            format!("lost               {}", list(&self.lost)),
            format!("doubled            {}", list(&self.doubled)),
            format!("wrong              {}", list(&self.wrong)),
            format!("peak memory        {} MiB", self.peak_memory_mib),
            format!("longest stall      {stall} ms ({during})"),
            format!("faults             {:?}", self.faults),
        ]
        .join("\n")
    }
}

/// What a worker holds does not depend on how much waits: so many messages make no difference to one worker that has
/// settled as many as another.
#[tokio::test(flavor = "multi_thread")]
async fn memory_does_not_grow_with_the_backlog() {
    const SETTLED: usize = 3000;
    let few = 2 * SETTLED;
    let many = usize::try_from(number("SOAK_BACKLOG", 60_000)).unwrap();
    let mut peaks = Vec::new();
    for backlog in [few, many] {
        let bench = Bench::new().await.set("RUST_LOG", "info,lapin=off");
        // Declares, and leaves.
        bench.worker().await.terminate().await;
        let began = Instant::now();
        publish(&bench, backlog).await;
        let took = began.elapsed();
        let worker = bench.worker().await;
        worker.settled(SETTLED).await;
        let peak = worker.peak_memory().unwrap();
        say(&format!(
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

/// Publishes small events about many people, many at once.
async fn publish(bench: &Bench, messages: usize) {
    let channel = bench.channel().await;
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let mut under_way = std::collections::VecDeque::new();
    for number in 0..messages {
        let body =
            json!({"type": "identify", "userId": format!("u{}", number % 1000), "traits": {}}).to_string();
        let properties = BasicProperties::default().with_delivery_mode(2);
        let (exchange, key) = (bench.exchange.as_str().into(), "users".into());
        let confirm =
            channel.basic_publish(exchange, key, options, body.as_bytes(), properties).await.unwrap();
        under_way.push_back(confirm);
        if under_way.len() == 1000 {
            assert_eq!(under_way.pop_front().unwrap().await.unwrap(), Confirmation::Ack(None));
        }
    }
    for confirm in under_way {
        assert_eq!(confirm.await.unwrap(), Confirmation::Ack(None));
    }
}
