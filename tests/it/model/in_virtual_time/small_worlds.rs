//! All schedules of small worlds, beside the random histories of large ones.
//!
//! A world has up to three events, a worker and its standby, one worker that dies or loses the queue without knowing it, one
//! lost answer, and an index that shows nothing until it catches up. The steps are: a call to Close, an entry in the
//! journal, an ack, the publishing of an event, each of the faults, and the index that catches up. In between, workers
//! run until they wait for a step. Time passes only where there is no step to wait for.
//!
//! The search is depth first. Each schedule is replayed from the beginning, on the real workers. A state that was reached
//! before is not explored again: there each worker has had the same answers, and all else is the same but for times.
//!
//! **What is explored.** By default one event: with a crash and a lost answer, with a lost answer and an index that catches up,
//! and with a worker that lost the queue. With
//! `CLOSE_SYNC_SMALL_WORLDS=all`: one event with all faults together, all pairs of events with each fault, and triples with a lost
//! answer, where every two events share a key. Other triples run beside each other, which takes minutes for each. These,
//! and triples with a crash or a worker that lost the queue, are in `CLOSE_SYNC_SMALL_WORLDS=triples`. Events that share no key
//! change nothing for each other, so each event must share one with another.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant as WallClock};

use close_sync::domain::staleness::SyncedAtFields;
use jiff::Timestamp;

use super::super::history::{Event, History};
use super::super::oracle::Expected;
use super::broker::Message;
use super::plan::Plan;
use super::process::{Process, WorkerConfig};
use super::stepped::{Kind, Way, records};
use super::world::World;
use super::{CONFIG, in_virtual_time, print};
use crate::support::env;

/// Workers run until they wait, and then this time passes.
const TICK: Duration = Duration::from_millis(1);
/// How long to wait for a step before deciding again.
const PATIENCE: Duration = Duration::from_secs(3);
/// More steps than any schedule needs.
const MAX_STEPS: usize = 150;
/// How long the event log lags. It is a small part of the default, because time passes step by step.
const EVENT_LOG_LAG: Duration = Duration::from_secs(2);

/// A fault that happens once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fault {
    /// The active worker is killed.
    Crash,
    /// The broker gives the queue to the other worker.
    Supersede,
}

/// The faults of a world. Each happens once or not at all.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "any of them may be on")]
struct Faults {
    crash: bool,
    supersede: bool,
    answer_lost: bool,
    /// The index catches up. Otherwise search shows nothing.
    catch_up: bool,
}

const NONE: Faults = Faults { crash: false, supersede: false, answer_lost: false, catch_up: false };
const CRASH: Faults = Faults { crash: true, ..NONE };
const SUPERSEDED: Faults = Faults { supersede: true, ..NONE };
const LOST: Faults = Faults { answer_lost: true, ..NONE };
const ALL: Faults = Faults { crash: true, supersede: true, answer_lost: true, catch_up: true };

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Step(usize, Way),
    Publish,
    Fault(Fault),
    CatchUp,
    Wait,
    /// Nothing more happens.
    End,
}

/// How the exploration of one world went.
#[derive(Debug, Default)]
struct Explored {
    states: HashSet<u64>,
    schedules: usize,
    steps: usize,
    /// The first schedule with a problem.
    problem: Option<String>,
}

/// The decisions of a schedule: which one of how many.
type Path = Vec<(usize, usize)>;

fn event(number: usize, user: Option<&str>, email: Option<&str>, company: Option<&str>) -> Event {
    let text = |text: &str| text.to_owned();
    Event {
        number,
        at: number,
        user: user.map(text),
        email: email.map(|email| format!("{email}@{}", super::super::DOMAIN)),
        company: company.map(text),
        company_name: company.map(|_| format!("n{number}")),
        title: Some(format!("t{number}")),
        phone: None,
        twice: false,
    }
}

/// The kinds of events that worlds are made from. All are about one company or person.
const EVENTS: [(Option<&str>, Option<&str>, Option<&str>); 4] = [
    (Some("u1"), Some("main1"), Some("c1")),
    (Some("u1"), Some("main1"), None),
    (None, Some("main1"), None),
    (Some("u2"), Some("main2"), Some("c1")),
];

fn history(kinds: &[usize]) -> History {
    let event = |(number, kind): (usize, &usize)| {
        let (user, email, company) = EVENTS[*kind];
        event(number, user, email, company)
    };
    History { seed: 0, events: kinds.iter().enumerate().map(event).collect() }
}

/// Whether each event shares a key with another one, or `all`, with all others.
fn share_keys(events: &[Event], all: bool) -> bool {
    let shares = |one: &Event, other: &Event| one.keys().iter().any(|key| other.keys().contains(key));
    events.iter().all(|one| {
        let mut others = events.iter().filter(|other| one.number != other.number);
        if all { others.all(|other| shares(one, other)) } else { others.any(|other| shares(one, other)) }
    })
}

fn config() -> WorkerConfig {
    let mut config = CONFIG.clone();
    (config.rules.lead.synced_at, config.rules.contact.synced_at) = (None, None);
    config.mapping.synced_at = SyncedAtFields::default();
    config.settings.event_log_lag = EVENT_LOG_LAG;
    // Search shows changes in order, and there was no worker before the journal.
    config.settings.search_lag = Duration::ZERO;
    (config.settings.retry.in_place, config.settings.hold) =
        (Duration::from_hours(1), Duration::from_hours(2));
    config
}

/// One schedule of a world.
struct Schedule<'a> {
    world: Arc<World>,
    processes: Vec<Process>,
    unpublished: Vec<&'a Event>,
    faults: Faults,
    fault: Option<Fault>,
    answer_lost: bool,
    /// By process, what it has learnt.
    learnt: Vec<DefaultHasher>,
    trace: String,
}

impl<'a> Schedule<'a> {
    fn new(history: &'a History, config: &WorkerConfig, faults: Faults) -> Self {
        let world = World::stepped(Plan::calm());
        let processes = (1..=2).map(|number| Process::start(&world, number, config.clone())).collect();
        Self {
            world,
            processes,
            unpublished: history.events.iter().rev().collect(),
            faults,
            fault: None,
            answer_lost: false,
            learnt: vec![DefaultHasher::new(); 3],
            trace: String::new(),
        }
    }

    /// All that may happen next. What goes on without faults comes first.
    fn choices(&self) -> Vec<Choice> {
        let steps = self.world.steps().expect("a network of steps");
        steps.lock().retain(|step| step.kind() != Kind::Void);
        let steps = steps.lock();
        let of = |kind: Kind| steps.iter().enumerate().filter(move |(_, step)| step.kind() == kind);
        let mut choices: Vec<Choice> =
            of(Kind::Awaited).map(|(at, _)| Choice::Step(at, Way::Whole)).collect();
        let is_working = !choices.is_empty();
        choices.extend((!self.unpublished.is_empty()).then_some(Choice::Publish));
        if choices.is_empty() {
            let is_done = self.world.broker().is_empty();
            choices.push(if is_done { Choice::End } else { Choice::Wait });
        }
        if choices[0] != Choice::End {
            // Only a search notices it.
            let is_noticed = of(Kind::Awaited).any(|(_, step)| step.is_search());
            let lags = self.faults.catch_up && !self.world.index_caught_up();
            choices.extend((is_noticed && lags).then_some(Choice::CatchUp));
            if is_working && self.fault.is_none() {
                choices.extend(self.faults.crash.then_some(Choice::Fault(Fault::Crash)));
                choices.extend(self.faults.supersede.then_some(Choice::Fault(Fault::Supersede)));
            }
        }
        for (at, step) in of(Kind::Awaited) {
            let lost = step
                .ways(self.faults.answer_lost && !self.answer_lost)
                .iter()
                .filter(|way| **way != Way::Whole);
            choices.extend(lost.map(|way| Choice::Step(at, *way)));
        }
        choices.extend(of(Kind::Orphan).map(|(at, _)| Choice::Step(at, Way::Whole)));
        choices
    }

    /// The state, without times.
    fn state(&self) -> u64 {
        let mut state = DefaultHasher::new();
        self.learnt.iter().for_each(|learnt| learnt.finish().hash(&mut state));
        let steps = self.world.steps().expect("a network of steps").lock();
        let mut pending: Vec<(String, bool)> =
            steps.iter().map(|step| (step.label(), step.kind() == Kind::Orphan)).collect();
        pending.sort();
        (pending, self.unpublished.len(), self.fault, self.answer_lost).hash(&mut state);
        (self.world.index_caught_up(), self.world.elapsed().as_secs()).hash(&mut state);
        (self.world.journal.len(), self.world.broker().digest()).hash(&mut state);
        records(&self.world).hash(&mut state);
        state.finish()
    }

    /// Makes a choice, and lets the workers run until they wait.
    async fn make(&mut self, choice: Choice) {
        let world = Arc::clone(&self.world);
        match choice {
            Choice::Step(at, way) => {
                let step = world.steps().expect("a network of steps").lock().remove(at);
                let _ = writeln!(self.trace, "{} {way:?}", step.label());
                self.answer_lost |= way != Way::Whole;
                let process = step.process;
                step.happen(way, &world).hash(&mut self.learnt[process]);
            }
            Choice::Publish => {
                let event = self.unpublished.pop().expect("an event to publish");
                let began: Timestamp = "2000-01-01T00:00:00Z".parse().unwrap();
                let body = event.message(began).to_string().into_bytes();
                let _ = writeln!(self.trace, "publish {event}");
                world.broker().publish(Message::new(event.number, body));
            }
            Choice::Fault(fault) => {
                let _ = writeln!(self.trace, "{fault:?}");
                self.fault = Some(fault);
                let active = self.processes.iter().position(Process::is_active).expect("an active worker");
                match fault {
                    Fault::Crash => self.processes.remove(active).crash(),
                    Fault::Supersede => self.processes[active].lose_queue(),
                }
            }
            Choice::CatchUp => {
                let _ = writeln!(self.trace, "the index catches up");
                world.catch_up();
            }
            Choice::Wait => {
                let _ = writeln!(self.trace, "time passes");
                let until = tokio::time::Instant::now() + PATIENCE;
                let has_work = || {
                    let steps = world.steps().expect("a network of steps").lock();
                    steps.iter().any(|step| step.kind() == Kind::Awaited)
                };
                while tokio::time::Instant::now() < until && !has_work() && !world.broker().is_empty() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            Choice::End => {}
        }
        tokio::time::sleep(TICK).await;
    }
}

/// Replays a path and goes on from its end. Returns the problem.
async fn run(
    history: &History,
    config: &WorkerConfig,
    faults: Faults,
    path: &mut Path,
    explored: &mut Explored,
) -> Option<String> {
    let mut schedule = Schedule::new(history, config, faults);
    tokio::time::sleep(TICK).await;
    explored.schedules += 1;
    for at in 0.. {
        let choices = schedule.choices();
        explored.steps += 1;
        if at < path.len() {
            assert_eq!(path[at].1, choices.len(), "a schedule runs the same again:\n{}", schedule.trace);
        } else {
            if !explored.states.insert(schedule.state()) {
                return None;
            }
            path.push((0, choices.len()));
        }
        if at > MAX_STEPS {
            return Some(format!("{}\nstuck", schedule.trace));
        }
        let choice = choices[path[at].0];
        if choice == Choice::End {
            break;
        }
        schedule.make(choice).await;
    }
    let (leads, broker) = (schedule.world.close().leads(), schedule.world.broker());
    let mut problems = Expected::of(history).compare(&leads).err().unwrap_or_default();
    if !broker.unsettled().is_empty() || !broker.dead.is_empty() {
        let _ = writeln!(problems, "not settled: {:?}, dead: {:?}", broker.unsettled(), broker.dead);
    }
    (!problems.is_empty()).then(|| format!("{}\n{problems}", schedule.trace))
}

/// Explores a world until a schedule has a problem.
fn explore(kinds: &[usize], faults: Faults) -> Explored {
    let (history, config) = (history(kinds), config());
    let (mut explored, mut path) = (Explored::default(), Path::new());
    loop {
        let problem = in_virtual_time(run(&history, &config, faults, &mut path, &mut explored));
        if problem.is_some() {
            return Explored { problem, ..explored };
        }
        // The next schedule differs in the last decision that has another choice.
        while path.pop_if(|(chosen, number)| *chosen + 1 == *number).is_some() {}
        match path.last_mut() {
            Some((chosen, _)) => *chosen += 1,
            None => return explored,
        }
    }
}

/// The worlds to explore: their events and faults.
fn worlds(which: Option<&str>) -> Vec<(Vec<usize>, Faults)> {
    let kinds = 0..EVENTS.len();
    let pairs = kinds.clone().flat_map(|one| kinds.clone().map(move |two| vec![one, two]));
    let triples =
        pairs.clone().flat_map(|pair| kinds.clone().map(move |third| [&pair[..], &[third]].concat()));
    let shares = |kinds: &Vec<usize>, all| share_keys(&history(kinds).events, all);
    let with = |worlds: &[Vec<usize>], faults: &[Faults]| -> Vec<(Vec<usize>, Faults)> {
        worlds.iter().flat_map(|kinds| faults.iter().map(|faults| (kinds.clone(), *faults))).collect()
    };
    let (one, pairs): (_, Vec<_>) = (vec![0], pairs.filter(|kinds| shares(kinds, true)).collect());
    let triples = triples.filter(|kinds| shares(kinds, false));
    let (in_order, beside): (Vec<_>, Vec<_>) = triples.partition(|kinds| shares(kinds, true));
    match which {
        None => [Faults { crash: true, ..LOST }, Faults { catch_up: true, ..LOST }, SUPERSEDED]
            .map(|faults| (one.clone(), faults))
            .to_vec(),
        Some("all") => {
            let of_pairs = with(&pairs, &[CRASH, SUPERSEDED, LOST]);
            [vec![(one, ALL)], of_pairs, with(&in_order, &[LOST])].concat()
        }
        Some("triples") => {
            let faults = [CRASH, SUPERSEDED];
            [with(&beside, &[LOST]), with(&in_order, &faults), with(&beside, &faults)].concat()
        }
        Some(other) => panic!("CLOSE_SYNC_SMALL_WORLDS={other}: all or triples"),
    }
}

#[test]
fn small_worlds_have_no_bad_schedule() {
    let worlds = worlds(env("CLOSE_SYNC_SMALL_WORLDS").as_deref());
    LazyLock::force(&CONFIG);
    let began = WallClock::now();
    let remaining = Mutex::new(worlds.iter());
    let explore_remaining = || {
        let mut total = [0, 0, 0];
        loop {
            let next = remaining.lock().unwrap().next();
            let Some((kinds, faults)) = next else { return total };
            let explored = explore(kinds, *faults);
            if let Some(problem) = explored.problem {
                panic!("{}{faults:?}\n{problem}", history(kinds));
            }
            let counts = [explored.states.len(), explored.schedules, explored.steps];
            let [states, schedules, steps] = counts;
            print(&format!(
                "{kinds:?} {faults:?}: {states} states, {schedules} schedules of {steps} steps in all, {:?}",
                began.elapsed()
            ));
            total = add(total, counts);
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let [states, schedules, steps] = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(explore_remaining)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).fold([0, 0, 0], add)
    });
    print(&format!(
        "{} worlds: {states} states, {schedules} schedules of {steps} steps in all",
        worlds.len()
    ));
    assert!(states > 300, "{states} states");
}

fn add(one: [usize; 3], other: [usize; 3]) -> [usize; 3] {
    [one[0] + other[0], one[1] + other[1], one[2] + other[2]]
}
