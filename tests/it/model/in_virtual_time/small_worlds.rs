//! All schedules of small worlds, beside the random histories of large ones.
//!
//! A world has up to three events, a worker and its standby, one worker that dies or loses the queue without knowing it, one
//! lost answer, and an index that shows nothing until it catches up. The steps are: a call to Close, an entry in the
//! journal, the publishing of an event, each of the faults, and the index that catches up. In between, workers
//! run until they wait for a step. Time passes only where there is no step to wait for.
//!
//! The search is depth first. Each schedule is replayed from the beginning, on the real workers. A state that was reached
//! before is not explored again. Three rules keep the number of states small:
//!
//! - **The state of a worker is what it has been answered**, and not in which order: the order of two answers matters only
//!   if something changed in between, and then the answers differ. A worker that is dead has no state.
//! - **Acks arrive when it matters**: at a fault, where the first of those in flight arrive and the others are lost, and
//!   when all else is done.
//! - **An entry in the journal arrives at once if no other worker will read it.**
//!
//! Without these rules, all pairs of events with a crash or a lost answer have the same outcomes, in thirty times as many
//! steps.
//!
//! **What is explored.** By default one event, and pairs of events with one fault each. With `CLOSE_SYNC_SMALL_WORLDS=all`,
//! which takes eight minutes on two cores: one event with all faults together; all pairs, and the triples of which every
//! two events share a key, with a crash, a lost answer and an index that catches up; and triples of which two share no key,
//! with a crash or a lost answer. There workers do more at a time, and all faults together would take hours. An event that
//! shares no key with another one changes nothing for it.

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
use super::mutant::Mutant;
use super::plan::Plan;
use super::process::{Process, WorkerConfig};
use super::stepped::{Kind, Step, Way, records};
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
/// No worker goes on without the queue.
const MOST: Faults = Faults { crash: true, answer_lost: true, catch_up: true, ..NONE };
const ALL: Faults = Faults { supersede: true, ..MOST };

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Step(usize, Way),
    Publish,
    /// This many acks of the active worker arrive before it, and the others are lost.
    Fault(Fault, usize),
    CatchUp,
    /// All acks arrive.
    Acks,
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
const KINDS: [(Option<&str>, Option<&str>, Option<&str>); 4] = [
    (Some("u1"), Some("main1"), Some("c1")),
    (Some("u1"), Some("main1"), None),
    (None, Some("main1"), None),
    (Some("u2"), Some("main2"), Some("c1")),
];

fn history(kinds: &[usize]) -> History {
    let event = |(number, kind): (usize, &usize)| {
        let (user, email, company) = KINDS[*kind];
        event(number, user, email, company)
    };
    History { seed: 0, events: kinds.iter().enumerate().map(event).collect() }
}

/// How many of the other events share a key with the event that shares one with the fewest.
fn fewest_neighbours(kinds: &[usize]) -> usize {
    let events = history(kinds).events;
    let shares = |one: &Event, other: &Event| one.keys().iter().any(|key| other.keys().contains(key));
    let neighbours =
        |one: &Event| events.iter().filter(|other| one.number != other.number && shares(one, other)).count();
    events.iter().map(neighbours).min().unwrap_or_default()
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
    /// By process, the sum of what it has learnt.
    learnt: Vec<u64>,
    /// What was appended to the journal, in order.
    journal: DefaultHasher,
    /// How often in a row time has passed.
    waits: usize,
    /// What Close held last, and since when.
    changed: (u64, Duration),
    trace: String,
}

impl<'a> Schedule<'a> {
    fn new(history: &'a History, config: &WorkerConfig, faults: Faults, mutant: Option<Mutant>) -> Self {
        let world = World::stepped(Plan { mutant, ..Plan::calm() });
        let processes = (1..=2).map(|number| Process::start(&world, number, config.clone())).collect();
        Self {
            world,
            processes,
            unpublished: history.events.iter().rev().collect(),
            faults,
            fault: None,
            answer_lost: false,
            learnt: vec![0; 3],
            journal: DefaultHasher::new(),
            waits: 0,
            changed: (0, Duration::ZERO),
            trace: String::new(),
        }
    }

    /// All that may happen next. What goes on without faults comes first.
    fn choices(&self) -> Vec<Choice> {
        let steps = self.world.steps().expect("a network of steps");
        steps.lock().retain(|step| step.kind() != Kind::Void);
        let steps = steps.lock();
        let of = |kind: Kind| steps.iter().enumerate().filter(move |(_, step)| step.kind() == kind);
        let may_fail = self.fault.is_none() && (self.faults.crash || self.faults.supersede);
        if !may_fail && self.fault != Some(Fault::Supersede) {
            // Nobody else will read the journal, so it does not matter when an entry arrives.
            let append = of(Kind::Awaited).find(|(_, step)| step.is_append());
            if let Some((at, _)) = append {
                return vec![Choice::Step(at, Way::Whole)];
            }
        }
        let awaited = of(Kind::Awaited).filter(|(_, step)| !step.is_ack());
        let mut choices: Vec<Choice> = awaited.map(|(at, _)| Choice::Step(at, Way::Whole)).collect();
        let is_working = of(Kind::Awaited).next().is_some();
        choices.extend((!self.unpublished.is_empty()).then_some(Choice::Publish));
        if choices.is_empty() {
            let is_done = self.world.broker().is_empty();
            choices.push(match (is_working, is_done) {
                (true, _) => Choice::Acks,
                (false, true) => Choice::End,
                (false, false) => Choice::Wait,
            });
        }
        if choices[0] == Choice::Acks && !may_fail {
            return choices;
        }
        // Only a search notices it.
        let is_noticed = of(Kind::Awaited).any(|(_, step)| step.is_search());
        let lags = self.faults.catch_up && !self.world.index_caught_up();
        choices.extend((is_noticed && lags).then_some(Choice::CatchUp));
        if is_working && may_fail {
            let acks = of(Kind::Awaited).filter(|(_, step)| step.is_ack()).count();
            let faults = [(self.faults.crash, Fault::Crash), (self.faults.supersede, Fault::Supersede)];
            for (_, fault) in faults.into_iter().filter(|(may_happen, _)| *may_happen) {
                choices.extend((0..=acks).map(|acks| Choice::Fault(fault, acks)));
            }
        }
        if self.faults.answer_lost && !self.answer_lost {
            for (at, step) in of(Kind::Awaited) {
                choices.extend(step.losses().iter().map(|way| Choice::Step(at, *way)));
            }
        }
        // At the end, no worker reads the journal again.
        let is_read = |step: &Step| !step.is_append() || choices[0] != Choice::End;
        let orphans: Vec<Choice> = of(Kind::Orphan)
            .filter(|(_, step)| is_read(step))
            .map(|(at, _)| Choice::Step(at, Way::Whole))
            .collect();
        choices.extend(orphans);
        choices
    }

    /// The state, with times only where they matter.
    fn state(&self) -> u64 {
        let mut state = DefaultHasher::new();
        self.learnt.hash(&mut state);
        let steps = self.world.steps().expect("a network of steps").lock();
        let pending = steps.iter().map(|step| {
            let orphan = (step.kind() == Kind::Orphan).then(|| step.age().as_secs());
            (&step.label, orphan)
        });
        let mut pending: Vec<_> = pending.collect();
        pending.sort();
        (pending, self.unpublished.len(), self.fault, self.answer_lost).hash(&mut state);
        (self.world.index_caught_up(), self.waits, self.journal.finish()).hash(&mut state);
        let since = self.world.elapsed().saturating_sub(self.changed.1).min(EVENT_LOG_LAG);
        (self.changed.0, since.as_secs(), self.world.broker().digest()).hash(&mut state);
        state.finish()
    }

    /// The first acks of each worker arrive.
    fn acks_arrive(&mut self, number: usize) {
        let mut steps = self.world.steps().expect("a network of steps").lock();
        let acks: Vec<_> =
            steps.extract_if(.., |step| step.is_ack() && step.kind() == Kind::Awaited).take(number).collect();
        drop(steps);
        for ack in acks {
            ack.happen(Way::Whole, &self.world);
        }
    }

    /// Makes a choice, and lets the workers run until they wait.
    async fn make(&mut self, choice: Choice) {
        let world = Arc::clone(&self.world);
        self.waits = if choice == Choice::Wait { self.waits + 1 } else { 0 };
        match choice {
            Choice::Step(at, way) => {
                let step = world.steps().expect("a network of steps").lock().remove(at);
                let _ = writeln!(self.trace, "{} {way:?}", step.label);
                self.answer_lost |= way != Way::Whole;
                if step.is_append() {
                    step.label.hash(&mut self.journal);
                }
                let (process, is_heard) = (step.process, step.kind() == Kind::Awaited);
                let is_write = step.is_write();
                let learnt = step.happen(way, &world);
                if is_heard {
                    self.learnt[process] = self.learnt[process].wrapping_add(learnt);
                }
                if is_write {
                    let mut content = DefaultHasher::new();
                    records(&world).hash(&mut content);
                    self.changed = (content.finish(), world.elapsed());
                }
            }
            Choice::Publish => {
                let event = self.unpublished.pop().expect("an event to publish");
                let began: Timestamp = "2000-01-01T00:00:00Z".parse().unwrap();
                let body = event.message(began).to_string().into_bytes();
                let _ = writeln!(self.trace, "publish {event}");
                world.broker().publish(Message::new(event.number, body));
            }
            Choice::Acks => self.acks_arrive(usize::MAX),
            Choice::Fault(fault, acks) => {
                let _ = writeln!(self.trace, "{fault:?} after {acks} acks");
                self.fault = Some(fault);
                self.acks_arrive(acks);
                let active = self.processes.iter().position(Process::is_active).expect("an active worker");
                match fault {
                    Fault::Crash => {
                        let dead = self.processes.remove(active);
                        self.learnt[dead.number] = 0;
                        dead.crash();
                    }
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
    (faults, mutant): (Faults, Option<Mutant>),
    path: &mut Path,
    explored: &mut Explored,
) -> Option<String> {
    let mut schedule = Schedule::new(history, config, faults, mutant);
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
fn explore(kinds: &[usize], faults: Faults, mutant: Option<Mutant>) -> Explored {
    let (history, config) = (history(kinds), config());
    let (mut explored, mut path) = (Explored::default(), Path::new());
    loop {
        let problem = in_virtual_time(run(&history, &config, (faults, mutant), &mut path, &mut explored));
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
    let with = |worlds: &[Vec<usize>], faults: &[Faults]| -> Vec<(Vec<usize>, Faults)> {
        worlds.iter().flat_map(|kinds| faults.iter().map(|faults| (kinds.clone(), *faults))).collect()
    };
    let (one, mut pairs) = (vec![vec![0]], sequences(2, &[0, 1, 2, 3]));
    pairs.retain(|kinds| fewest_neighbours(kinds) == 1 && !is_renamed(kinds));
    match which {
        None => [with(&one, &[MOST, SUPERSEDED]), with(&pairs, &[CRASH, LOST])].concat(),
        Some("all") => {
            let mut triples = sequences(3, &[0, 2, 3]);
            triples.retain(|kinds| fewest_neighbours(kinds) > 0 && !is_renamed(kinds));
            let (in_order, beside): (Vec<_>, Vec<_>) =
                triples.into_iter().partition(|kinds| fewest_neighbours(kinds) == 2);
            // Where the neighbour of both comes last, both are created beside each other: a million steps with a crash.
            let mut beside_with_crash = beside.clone();
            beside_with_crash.retain(|kinds| kinds.last() != Some(&0));
            let of_beside = [with(&beside, &[LOST]), with(&beside_with_crash, &[CRASH])].concat();
            // The longest come first: at the end, one core would wait for another.
            [with(&in_order, &[MOST]), with(&one, &[ALL]), with(&pairs, &[MOST]), of_beside].concat()
        }
        Some(other) => panic!("CLOSE_SYNC_SMALL_WORLDS={other}: it is unset or \"all\""),
    }
}

/// All sequences of these kinds.
fn sequences(length: usize, kinds: &[usize]) -> Vec<Vec<usize>> {
    let longer = |worlds: Vec<Vec<usize>>| {
        let with = |world: Vec<usize>| kinds.iter().map(move |kind| [&world[..], &[*kind]].concat());
        worlds.into_iter().flat_map(with).collect()
    };
    (0..length).fold(vec![Vec::new()], |worlds, _| longer(worlds))
}

/// Whether a world is another one with the second person for the first.
fn is_renamed(kinds: &[usize]) -> bool {
    kinds[0] == 3 && kinds.iter().all(|kind| [0, 3].contains(kind))
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
            let explored = explore(kinds, *faults, None);
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

/// The protections of the journal that hold where little time passes.
#[test]
fn one_event_kills_the_mutants() {
    LazyLock::force(&CONFIG);
    for (mutant, faults, is_killed) in [
        (Mutant::Control, MOST, false),
        (Mutant::NoIntent, CRASH, true),
        (Mutant::NoResult, CRASH, true),
        (Mutant::NoMemory, CRASH, true),
        (Mutant::NoTail, SUPERSEDED, true),
    ] {
        let Explored { states, problem, .. } = explore(&[0], faults, Some(mutant));
        print(&format!(
            "{mutant:?}: {} states\n{}",
            states.len(),
            problem.as_deref().unwrap_or("no problem")
        ));
        assert_eq!(problem.is_some(), is_killed, "{mutant:?}");
    }
}
