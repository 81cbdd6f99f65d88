//! How soon creations go on after the active worker was killed or restarted. `tests/takeover` measures it with 50 kills.
//!
//! Creations arrive all the time. The active worker is killed with SIGKILL. The log of the standby says when it received
//! its first message, which is when the broker's own takeover ends. The log of the simulator says when it created the
//! first record after that. Between the two, the standby reads what it has not read of the journal before.

use std::collections::HashSet;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use close_sync_simulator::{Request, Settings};
use jiff::Timestamp;
use serde_json::json;

use crate::support::journal::{ENTRIES, JournalReader, Past};
use crate::support::{Bench, Worker, env, identify};

/// A creation arrives this often.
const GAP: Duration = Duration::from_millis(50);

/// What the journal looks like when the active worker is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// It ends with a checkpoint that repeats all creations.
    Checkpointed,
    /// As much follows the checkpoint as may follow it, with one creation in a message, as under light load.
    LongTail,
    /// There is no checkpoint yet, and almost as much as may precede it, with one creation in a message.
    NoCheckpoint,
}

impl Shape {
    fn of(name: &str) -> Self {
        match name {
            "checkpointed" => Self::Checkpointed,
            "long-tail" => Self::LongTail,
            "no-checkpoint" => Self::NoCheckpoint,
            name => panic!("unknown journal {name}"),
        }
    }
}

fn number(name: &str, default: usize) -> usize {
    env(name).map_or(default, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_creates_at_once_after_a_kill() {
    let kills = number("TAKEOVER_KILLS", 3);
    let entries = number("TAKEOVER_ENTRIES", 60_000);
    let shape = Shape::of(&env("TAKEOVER_JOURNAL").unwrap_or_else(|| "checkpointed".to_owned()));
    // What a killed worker was creating is settled once search has shown a younger creation.
    let settings = Settings::fast().with(|close| close.search_lag = "3s".parse().unwrap());
    let bench = Bench::with(settings).await.set("RUST_LOG", "info,lapin=off").set("CLOSE_TIMEOUT", "5s");
    let bench = Arc::new(bench);
    // Declares the journal, then stops.
    bench.worker().await.terminate().await;
    let mut past = Past::new(&bench);
    let journal = JournalReader::of(&bench).await;
    match shape {
        Shape::Checkpointed | Shape::LongTail => past.append(entries / ENTRIES, 80).await,
        Shape::NoCheckpoint => past.append_bytes(CHECKPOINT_AFTER * 15 / 16).await,
    }

    let mut active = bench.worker().await;
    let stop = Arc::new(AtomicBool::new(false));
    let publishing = tokio::spawn(publish(Arc::clone(&bench), Arc::clone(&stop)));
    active.until("creating", async |_| !bench.simulator.leads().is_empty()).await;
    let mut times = Vec::new();
    let mut tail = 0;
    for kill in 0..kills {
        let standby = bench.starting_worker();
        standby.until("standing by", async |standby| standby.is("standing_by", None).await).await;
        if shape == Shape::LongTail || (shape == Shape::Checkpointed && kill == 0) {
            // The last kill came shortly before a checkpoint was due.
            past.append_bytes(tail / 15).await;
            let id = active.logged_event("journal_read").unwrap().0;
            let size = journal.checkpoint_since(id).await;
            if shape == Shape::LongTail {
                tail = (2 * size).max(CHECKPOINT_AFTER) * 15 / 16;
                past.append_bytes(tail).await;
            }
        }
        standby.until("has followed the journal", async |standby| is_idle(standby).await).await;
        let takeover = Takeover::after_kill(&bench, &active, &standby).await;
        print(&format!("kill {:>2}: {}", kill + 1, takeover.line()));
        times.push(takeover);
        active = standby;
    }
    // More creations show that search is complete up to the last kill.
    let before = bench.simulator.leads().len() + 100;
    active.until("settled", async |_| has_settled(&bench, before).await).await;
    stop.store(true, Ordering::Relaxed);
    let published = publishing.await.unwrap();
    bench.depth_becomes("", 0).await;
    active.until("done", async |active| active.metrics().await.count("messages_in_flight") == 0).await;
    bench.assert_each_once(published);
    assert_eq!(bench.depth(".dead").await, 0);
    active.terminate().await;
    report(shape, entries, &mut times);
}

/// Three workers are restarted one after the other, while creations arrive all the time. None of them waits for search.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_makes_no_creation_wait_for_search() {
    let seconds = u64::try_from(number("TAKEOVER_SECONDS_APART", 1)).unwrap();
    // Search shows nothing, so only the journal tells a worker what exists.
    let settings = Settings::fast().with(|close| close.search_lag = "24h".parse().unwrap());
    let bench = Bench::with(settings).await.set("RUST_LOG", "info,lapin=off").set("CLOSE_SEARCH_LAG", "20s");
    let bench = Arc::new(bench);
    // Declares the journal, then stops.
    bench.worker().await.terminate().await;
    Past::new(&bench).begin().await;

    let mut workers = Vec::new();
    for _ in 0..3 {
        workers.push(bench.worker().await);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let publishing = tokio::spawn(publish(Arc::clone(&bench), Arc::clone(&stop)));
    let mut restarts = Vec::new();
    for _ in 0..3 {
        let before = bench.simulator.leads().len();
        workers[0].until("creating", async |_| bench.simulator.leads().len() > before + 20).await;
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let old = workers.remove(0);
        assert_waited_for_no_search(&old).await;
        restarts.push(Timestamp::now());
        old.terminate().await;
        assert_eq!(old.events("message_delayed"), 0, "{}", old.log());
        workers.push(bench.worker().await);
    }
    stop.store(true, Ordering::Relaxed);
    let published = publishing.await.unwrap();
    workers[0].until("done", async |_| bench.simulator.leads().len() >= published).await;
    bench.depth_becomes("", 0).await;
    bench.assert_each_once(published);
    for worker in &workers {
        assert_waited_for_no_search(worker).await;
        worker.terminate().await;
    }
    let requests = bench.simulator.requests();
    let created = requests.iter().filter(|request| is_creation(request)).map(|request| request.at);
    print_rate(&created.collect::<Vec<_>>(), &restarts);
}

async fn assert_waited_for_no_search(worker: &Worker) {
    let metrics = worker.metrics().await;
    let waits =
        ["lag_guard_waits_total", "messages_delayed_total{cause=\"search\"}"].map(|name| metrics.count(name));
    assert_eq!(waits, [0, 0], "{}", worker.log());
}

/// Prints the creations per second, and the longest time between two.
fn print_rate(created: &[Timestamp], restarts: &[Timestamp]) {
    let Some(first) = created.first() else { return };
    let second = |at: &Timestamp| at.duration_since(*first).as_secs();
    print("second  creations  restarts");
    for now in 0..=created.last().map_or(0, second) {
        let number = |times: &[Timestamp]| times.iter().filter(|at| second(at) == now).count();
        print(&format!("{now:>6}  {:>9}  {:>8}", number(created), number(restarts)));
    }
    let gaps = created.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_millis());
    print(&format!("longest time without a creation: {} ms", gaps.max().unwrap_or(0)));
}

/// Whether a standby reads no more of the journal than what the active worker appends now.
async fn is_idle(standby: &Worker) -> bool {
    let before = standby.cpu_time();
    tokio::time::sleep(Duration::from_millis(500)).await;
    standby.cpu_time().saturating_sub(before) < Duration::from_millis(100)
}

/// Whether all of the first people are created.
async fn has_settled(bench: &Bench, first: usize) -> bool {
    tokio::time::sleep(Duration::from_millis(500)).await;
    let leads = bench.simulator.leads();
    let ids: HashSet<&str> =
        leads.iter().filter_map(|lead| lead["custom.cf_leadcompanyid"].as_str()).collect();
    (0..first).all(|number| ids.contains(format!("c{number}").as_str()))
}

/// A checkpoint is due after this many bytes (`consumer::journal`).
const CHECKPOINT_AFTER: usize = 4 << 20;

struct Takeover {
    /// From the kill to the first delivery.
    broker: Duration,
    /// From the first delivery until the journal is read.
    reading: Duration,
    /// From the first delivery to the first creation.
    creating: Duration,
    /// The CPU time that the standby used for that.
    cpu: Duration,
    /// How much was read.
    bytes: u64,
    /// The most memory that the standby has used so far, in KiB.
    memory: u64,
}

impl Takeover {
    async fn after_kill(bench: &Bench, active: &Worker, standby: &Worker) -> Self {
        let (killed, cpu) = (Timestamp::now(), standby.cpu_time());
        active.kill().await;
        let mut first = None;
        standby
            .until("creating", async |standby| {
                let Some((activated, _)) = standby.logged_event("worker_active") else { return false };
                let requests = bench.simulator.requests();
                let mut requests = requests.iter().rev().take_while(|request| request.at >= activated);
                first = requests.by_ref().filter(|request| is_creation(request)).last().map(|last| last.at);
                first.is_some()
            })
            .await;
        let (activated, _) = standby.logged_event("worker_active").unwrap();
        let (read, line) = standby.logged_event("journal_read").unwrap();
        let between = |from: Timestamp, to: Timestamp| to.duration_since(from).try_into().unwrap_or_default();
        Self {
            broker: between(killed, activated),
            reading: between(activated, read),
            creating: between(activated, first.unwrap()),
            cpu: standby.cpu_time().saturating_sub(cpu),
            bytes: line["bytes"].as_u64().unwrap(),
            memory: standby.peak_memory().unwrap(),
        }
    }

    fn line(&self) -> String {
        let Self { broker, reading, creating, cpu, bytes, memory } = self;
        let [broker, reading, creating, cpu] = [broker, reading, creating, cpu].map(Duration::as_millis);
        format!(
            "broker {broker} ms, journal read after {reading} ms ({bytes} bytes), created after {creating} ms, CPU {cpu} ms, {} MiB",
            memory / 1024
        )
    }
}

fn is_creation(request: &Request) -> bool {
    request.method == "POST" && request.path == "/lead/"
}

fn report(shape: Shape, entries: usize, times: &mut [Takeover]) {
    let mut row = |name: &str, of: fn(&Takeover) -> Duration| {
        times.sort_by_key(of);
        let at = |percent: usize| of(&times[(times.len() * percent).div_ceil(100).max(1) - 1]).as_millis();
        print(&format!("{name:<40} {:>6} {:>6} {:>6}", at(50), at(99), at(100)));
    };
    print(&format!("{shape:?}, {entries} entries: milliseconds p50, p99, max"));
    row("broker: kill to first delivery", |takeover| takeover.broker);
    row("first delivery to journal read", |takeover| takeover.reading);
    row("first delivery to first creation", |takeover| takeover.creating);
    row("CPU time of the standby", |takeover| takeover.cpu);
    let memory = times.iter().map(|takeover| takeover.memory / 1024).max().unwrap_or(0);
    print(&format!("peak memory of a standby: {memory} MiB"));
}

fn print(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Publishes new people until it is stopped. Returns how many.
async fn publish(bench: Arc<Bench>, stop: Arc<AtomicBool>) -> usize {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let traits = json!({"name": format!("Person {number}"), "email": format!("p{number}@x.test"),
            "company": {"id": format!("c{number}"), "name": format!("Company {number}")}});
        bench.publish(&[identify(&format!("u{number}"), traits)]).await;
        number += 1;
        tokio::time::sleep(GAP).await;
    }
    number
}
