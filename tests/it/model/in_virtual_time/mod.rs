//! Histories played on the real worker in virtual time, in one thread: a seed is one history, and everything
//! that goes wrong while it is played.
//!
//! Real are the worker with its gates, doubts, claims and retries, the lanes, and the simulated Close.
//! Played are the network between them, the broker, and what a session does with both ([`process`]). Time
//! stands still while anybody has something to do, and then jumps to the next thing that is due: hours take
//! a moment, and the same seed gives the same run.
//!
//! `CLOSE_SYNC_MODEL_SEEDS` tells how many seeds are played and `CLOSE_SYNC_MODEL_FIRST` the first of them. The
//! first seed that fails is told with its history, what went wrong on the way, and all calls.
//!
//! Two clocks do not follow: what is remembered for some minutes is remembered for ever, and the event log
//! is asked by the clock on the wall, which is before everything that happens here.

mod broker;
mod plan;
mod process;
mod world;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant as WallClock};

use close_sync::close::Client;
use close_sync::config::{Config, Need};
use close_sync::domain::staleness::SyncedAtFields;
use close_sync::sync::preflight;
use close_sync::telemetry::metrics::Metrics;
use jiff::Timestamp;

use self::broker::Message;
use self::plan::{Blow, Plan};
use self::process::{Parts, Process};
use self::world::{Line, TIMEOUT, World};
use super::history::{History, Shape};
use super::oracle::{self, Expected};
use crate::support::env;

/// No history takes longer, in its own time.
const PATIENCE: Duration = Duration::from_hours(12);

/// Longer than anything may still be under way to Close.
const AFTERMATH: Duration = Duration::from_secs(30);

/// How a history went.
struct Run {
    trace: Vec<String>,
    took: Duration,
    /// What is wrong; nothing if all is well.
    wrong: String,
}

/// The rules and settings of all workers, and how these rules map to the fields of Close.
static PARTS: LazyLock<Parts> = LazyLock::new(|| {
    let environment: HashMap<String, String> = [
        ("CLOSE_API_KEY", "api_simulator.key"),
        ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_leadcompanyid"),
        ("CLOSE_CONTACT_USER_ID_FIELD", "cf_contactuserid"),
        // By these an older event is told from a newer one also after a restart.
        ("CLOSE_LEAD_SYNCED_AT_FIELD", "cf_leadsyncedat"),
        ("CLOSE_CONTACT_SYNCED_AT_FIELD", "cf_contactsyncedat"),
        // Above the lag of search there is, with what a creation may be under way.
        ("CLOSE_SEARCH_LAG", "15s"),
        ("RETRY_DELAYS", "[\"30s\", \"2m\"]"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    let mut config = Config::load(None, &environment, Need::All).unwrap().single().unwrap();
    // Chance is in the network.
    config.worker.retry.jitter = 0.0;
    let rules = config.rules.clone();
    let mapping = virtually(async move {
        let plan = Plan { trouble: 0, outage: None, ..Plan::draw(&mut fastrand::Rng::with_seed(0)) };
        let line = Line { world: World::new(plan, 0), process: 0, alive: Arc::new(true.into()) };
        let client = Client::with_transport(line, TIMEOUT, 1.0, |_| {});
        preflight::run(&client, &rules).await.unwrap().mapping
    });
    Parts {
        amqp: Arc::new(config.amqp),
        settings: config.worker,
        rules: config.rules,
        mapping,
        metrics: Metrics::new(None).unwrap(),
    }
});

/// Runs something in one thread and in its own time.
fn virtually<T>(what: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(what)
}

/// Of every other history some messages come once more long after, and by custom fields in Close older events are
/// told from newer ones. After a restart these tell less than memory: nothing is undone, but a value may be left
/// out although no newer one is known.
fn is_late(seed: u64) -> bool {
    seed % 2 == 1
}

fn history(seed: u64) -> History {
    let usual = Shape::default();
    History::generate(seed, Shape { late: if is_late(seed) { usual.late } else { 0 }, ..usual })
}

/// Whether messages may go through delay queues: then a process that is gone leaves nobody who knows their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    Endless,
    Short,
}

fn play(seed: u64, patience: Patience) -> Run {
    let history = history(seed);
    let mut random = fastrand::Rng::with_seed(seed ^ 0x5eed);
    let plan = Plan::draw(&mut random);
    let mut parts = PARTS.clone();
    if !is_late(seed) {
        (parts.rules.lead.synced_at, parts.rules.contact.synced_at) = (None, None);
        parts.mapping.synced_at = SyncedAtFields::default();
    }
    (parts.settings.retry.in_place, parts.settings.hold) = match patience {
        Patience::Endless => (Duration::from_hours(1), Duration::from_hours(2)),
        Patience::Short => (Duration::from_secs(3), Duration::from_mins(1)),
    };
    virtually(async {
        let world = World::new(plan, seed);
        world.tell(format_args!("{:?}", world.plan));
        let ended = tokio::time::timeout(PATIENCE, live(&world, &history, &parts, &mut random)).await;
        let mut wrong = String::new();
        if ended.is_err() {
            wrong += "it does not come to an end\n";
        }
        tokio::time::sleep(AFTERMATH).await;
        let unsettled = world.broker().unsettled();
        if !unsettled.is_empty() {
            let _ = writeln!(wrong, "not settled: {unsettled:?}");
        }
        let leads = world.close().leads();
        let dead = world.broker().dead.clone();
        if dead.iter().any(|(_, reason)| patience == Patience::Endless || reason != "exhausted") {
            let _ = writeln!(wrong, "dead: {dead:?}");
        }
        // One process that knows the order of messages in delay queues, and which values are the newest.
        let one_memory =
            !world.plan.standby && world.plan.blows.iter().all(|(_, blow)| *blow == Blow::CutOff);
        let certain = match patience {
            Patience::Endless => one_memory || !is_late(seed),
            Patience::Short => one_memory && dead.is_empty(),
        };
        wrong += &if certain {
            Expected::of(&history).compare(&leads).err().unwrap_or_default()
        } else {
            oracle::doubles(&leads)
        };
        if one_memory || is_late(seed) {
            wrong += &world.undone();
        }
        let took = world.elapsed();
        Run { trace: world.trace(), took, wrong }
    })
}

/// From the first message published to the last one settled.
async fn live(world: &Arc<World>, history: &History, parts: &Parts, random: &mut fastrand::Rng) {
    let mut count = 0;
    let mut start = || {
        count += 1;
        Process::start(world, count, parts.clone())
    };
    let mut processes = vec![start()];
    if world.plan.standby {
        processes.push(start());
    }
    let publishing = publish(world, history, random);
    let striking = async {
        for (at, blow) in &world.plan.blows {
            tokio::time::sleep(at.saturating_sub(world.elapsed())).await;
            let Some(active) = processes.iter().position(Process::is_active) else { continue };
            match blow {
                Blow::CutOff => processes[active].cut_off(),
                Blow::Killed => {
                    world.tell(format_args!("a process is killed"));
                    processes.remove(active).kill().await;
                    processes.push(start());
                }
            }
        }
    };
    tokio::join!(publishing, striking);
    while !world.broker().is_empty() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn publish(world: &World, history: &History, random: &mut fastrand::Rng) {
    let gap = u64::try_from(world.plan.gap.as_millis()).unwrap();
    for event in history.published() {
        tokio::time::sleep(Duration::from_millis(random.u64(0..=gap))).await;
        let body = event.message(Timestamp::UNIX_EPOCH).to_string().into_bytes();
        world.broker().publish(Message::new(event.number, body));
    }
}

/// Everything there is to know about a seed that failed.
fn report(seed: u64, run: &Run) -> String {
    let history = history(seed);
    format!("seed {seed}\n{history}\n{}\n\nseed {seed}:\n{}", run.trace.join("\n"), run.wrong)
}

fn number(name: &str, default: u64) -> u64 {
    env(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Plays seeds on all cores, and tells the first that fails.
fn play_all(patience: Patience, by_default: u64) {
    LazyLock::force(&PARTS);
    let first = number("CLOSE_SYNC_MODEL_FIRST", 0);
    let seeds = first..first + number("CLOSE_SYNC_MODEL_SEEDS", by_default);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let began = WallClock::now();
    let (mut failed, mut lived) = (Vec::new(), Duration::ZERO);
    std::thread::scope(|scope| {
        let seeds = &seeds;
        let threads: Vec<_> = (0..cores)
            .map(|core| {
                scope.spawn(move || {
                    let (mut failed, mut lived) = (Vec::new(), Duration::ZERO);
                    for seed in seeds.clone().skip(core).step_by(cores) {
                        let run = play(seed, patience);
                        lived += run.took;
                        if !run.wrong.is_empty() {
                            failed.push((seed, run));
                        }
                    }
                    (failed, lived)
                })
            })
            .collect();
        for thread in threads {
            let (its, of_it) = thread.join().unwrap();
            failed.extend(its);
            lived += of_it;
        }
    });
    failed.sort_by_key(|(seed, _)| *seed);
    let number = seeds.end - seeds.start;
    let a_second = f64::from(u32::try_from(number).unwrap()) / began.elapsed().as_secs_f64();
    let told = format!(
        "{number} histories of {:.0} hours, {a_second:.0} a second; failed: {:?}",
        lived.as_secs_f64() / 3600.0,
        failed
            .iter()
            .map(|(seed, run)| (seed, run.wrong.lines().next().unwrap_or_default()))
            .collect::<Vec<_>>()
    );
    if let Some((seed, run)) = failed.first() {
        panic!("{}\n{told}", report(*seed, run));
    }
    tell(&told);
}

#[expect(clippy::print_stdout, reason = "`--nocapture` shows how fast it is")]
fn tell(text: &str) {
    println!("{text}");
}

#[test]
fn close_holds_what_the_model_says() {
    play_all(Patience::Endless, 100);
}

#[test]
fn nothing_is_made_twice_where_order_is_lost() {
    play_all(Patience::Short, 50);
}

#[test]
fn a_seed_is_one_run() {
    for seed in 0..5 {
        let (one, other) = (play(seed, Patience::Endless), play(seed, Patience::Endless));
        let differ = one.trace.iter().zip(&other.trace).find(|(one, other)| one != other);
        assert_eq!(differ, None, "seed {seed}");
        assert_eq!(one.trace.len(), other.trace.len(), "seed {seed}");
    }
}
