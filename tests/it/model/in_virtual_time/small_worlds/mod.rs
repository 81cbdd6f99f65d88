//! All schedules of small worlds, beside the random histories of large ones.
//!
//! A world has up to three events, a worker and its standby, one worker that dies or loses the queue without knowing it, one
//! lost answer, and an index that shows nothing until it catches up. The steps are: a call to Close, an entry in the
//! journal, the publishing of an event, each of the faults, and the index that catches up. In between, workers
//! run until they wait for a step. Time passes only while no step can happen.
//!
//! The search is depth first. Each schedule is replayed from the beginning, on the real workers. A state that was reached
//! before is not explored again. Three rules keep the number of states small:
//!
//! - **The state of a worker is what it was answered, and not in which order.** Order counts where it shows in an answer, in
//!   what waits when an event arrives, when an entry of another worker arrives, at a fault, and in what Close and the
//!   journal hold. So two reads of different messages commute, and so do a read and the worker's own entry. A worker that
//!   is dead has no state.
//! - **Acks arrive when it matters**: at a fault, where the first of those in flight arrive and the others are lost, and
//!   when all else is done.
//! - **An entry in the journal arrives at once where no other worker can become active** and nothing can come between.
//!
//! **What is explored.** By default one event with a crash, a lost answer and an index that catches up, or with a lost queue;
//! and pairs of events with a crash, or a lost answer. With `CLOSE_SYNC_SMALL_WORLDS=all`: triples about one person, with a
//! crash and a lost answer in one world; triples about two people of one company with a lost answer, or, if every two events
//! share a key, with a crash; and pairs with a crash, a lost answer and an index that catches up in one world. With
//! `=lost-queue`: pairs with a lost queue, and one event with all faults. Where the index does not catch up, search shows
//! nothing. More faults together would take hours. An event that shares no key with the others is not explored. See
//! [`worlds`].

mod worlds;

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant as WallClock};

use close_sync::domain::staleness::SyncedAtFields;
use jiff::Timestamp;

use super::super::history::Event;
use super::super::oracle::Expected;
use super::broker::Message;
use super::mutant::Mutant;
use super::plan::Plan;
use super::process::{Process, WorkerConfig};
use super::stepped::{Kind, Step, Steps, Way, records};
use super::world::{TIMEOUT, World};
use super::{CONFIG, in_virtual_time, print};
use crate::support::env;
use worlds::{CRASH, MOST, SUPERSEDED, SmallWorld};

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

/// What a worker has learnt. Order counts only for what [`Learnt::add_in_order`] adds.
#[derive(Clone, Copy, Default, Hash)]
struct Learnt(u64);

impl Learnt {
    fn add(&mut self, what: u64) {
        self.0 = self.0.wrapping_add(what);
    }

    /// Adds it so that its place after all that was learnt before counts.
    fn add_in_order(&mut self, what: impl Hash) {
        let mut hasher = DefaultHasher::new();
        (what, self.0).hash(&mut hasher);
        self.add(hasher.finish());
    }
}

/// One schedule of a world.
struct Schedule<'a> {
    world: Arc<World>,
    processes: Vec<Process>,
    unpublished: Vec<&'a Event>,
    small: &'a SmallWorld,
    fault: Option<Fault>,
    answer_lost: bool,
    /// By process, what it has learnt.
    learnt: Vec<Learnt>,
    /// What was appended to the journal, in order.
    journal: DefaultHasher,
    /// How often in a row time has passed.
    waits: usize,
    /// What Close held when a write last arrived or lost its answer, and when that was.
    written: (u64, Duration),
    trace: String,
}

impl<'a> Schedule<'a> {
    fn new(small: &'a SmallWorld, events: &'a [Event], config: &WorkerConfig) -> Self {
        let world = World::stepped(Plan { mutant: small.mutant, ..Plan::calm() });
        let processes = (1..=2).map(|number| Process::start(&world, number, config.clone())).collect();
        Self {
            world,
            processes,
            unpublished: events.iter().rev().collect(),
            small,
            fault: None,
            answer_lost: false,
            learnt: vec![Learnt::default(); 3],
            journal: DefaultHasher::new(),
            waits: 0,
            written: (0, Duration::ZERO),
            trace: String::new(),
        }
    }

    fn steps(&self) -> &Steps {
        self.world.steps().expect("a small world")
    }

    /// All that may happen next. What goes on without faults comes first.
    fn choices(&self) -> Vec<Choice> {
        let (faults, mut steps) = (&self.small.faults, self.steps().lock());
        steps.retain(|step| step.kind() != Kind::Void);
        let of = |kind: Kind| steps.iter().enumerate().filter(move |(_, step)| step.kind() == kind);
        let may_fail = self.fault.is_none() && (faults.crash || faults.supersede);
        if !may_fail && self.fault != Some(Fault::Supersede) {
            // No other worker can become active. An event may arrive before a session has started, and after. An entry of a dead
            // worker may arrive before the announcement of a creation does.
            let is_late = of(Kind::Orphan).any(|(_, step)| step.is_append());
            let may_wait = |step: &Step| {
                (step.starts() && !self.unpublished.is_empty()) || (step.announces() && is_late)
            };
            let is_next = |step: &Step| step.is_append() && !may_wait(step);
            let append = of(Kind::Awaited).find(|(_, step)| is_next(step));
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
        let lags = faults.catch_up && !self.world.index_caught_up();
        choices.extend((is_noticed && lags).then_some(Choice::CatchUp));
        if may_fail && (is_working || !self.world.broker().is_empty()) {
            let acks = of(Kind::Awaited).filter(|(_, step)| step.is_ack()).count();
            let both = [(faults.crash, Fault::Crash), (faults.supersede, Fault::Supersede)];
            for (_, fault) in both.into_iter().filter(|(may_happen, _)| *may_happen) {
                choices.extend((0..=acks).map(|acks| Choice::Fault(fault, acks)));
            }
        }
        if faults.answer_lost && !self.answer_lost {
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
        let steps = self.steps().lock();
        let pending = steps.iter().map(|step| {
            let orphan = (step.kind() == Kind::Orphan).then(|| step.age().as_secs());
            (&step.label, orphan)
        });
        let mut pending: Vec<_> = pending.collect();
        pending.sort();
        (pending, self.unpublished.len(), self.fault, self.answer_lost).hash(&mut state);
        (self.world.index_caught_up(), self.waits, self.journal.finish()).hash(&mut state);
        let since = self.world.elapsed().saturating_sub(self.written.1).min(TIMEOUT + EVENT_LOG_LAG);
        (self.written.0, since.as_secs(), self.world.broker().digest()).hash(&mut state);
        state.finish()
    }

    /// The first acks in flight arrive.
    fn acks_arrive(&self, number: usize) {
        let mut steps = self.steps().lock();
        let acks: Vec<_> =
            steps.extract_if(.., |step| step.is_ack() && step.kind() == Kind::Awaited).take(number).collect();
        drop(steps);
        for ack in acks {
            ack.happen(Way::Whole, &self.world);
        }
    }

    fn happen(&mut self, step: Step, way: Way) {
        let _ = writeln!(self.trace, "{} {way:?}", step.label);
        self.answer_lost |= way != Way::Whole;
        let (sender, is_heard, is_write) = (step.process, step.kind() == Kind::Awaited, step.is_write());
        if step.is_append() {
            step.label.hash(&mut self.journal);
            for reader in self.processes.iter().filter(|process| process.number != sender || !is_heard) {
                self.learnt[reader.number].add_in_order(&step.label);
            }
        }
        let learnt = step.happen(way, &self.world);
        if is_heard {
            self.learnt[sender].add(learnt);
        }
        if is_write {
            let mut content = DefaultHasher::new();
            records(&self.world).hash(&mut content);
            self.written = (content.finish(), self.world.elapsed());
        }
    }

    /// An event is published. What the active worker makes of it depends on whether its session has started, and on which
    /// messages are settled.
    fn publish(&mut self) {
        let event = self.unpublished.pop().expect("an event to publish");
        let began: Timestamp = "2000-01-01T00:00:00Z".parse().unwrap();
        let body = event.message(began).to_string().into_bytes();
        let _ = writeln!(self.trace, "publish {event}");
        let number = self.active().number;
        let (acks, starts) = {
            let steps = self.steps().lock();
            let of_active =
                || steps.iter().filter(|step| step.process == number && step.kind() == Kind::Awaited);
            let acks: Vec<String> =
                of_active().filter(|step| step.is_ack()).map(|step| step.label.clone()).collect();
            (acks, of_active().any(Step::starts))
        };
        let mut arrival = DefaultHasher::new();
        (event.number, acks, starts, self.world.broker().digest()).hash(&mut arrival);
        self.learnt[number].add(arrival.finish());
        self.world.broker().publish(Message::new(event.number, body));
    }

    fn active(&self) -> &Process {
        self.processes.iter().find(|process| process.is_active()).expect("an active worker")
    }

    /// The active worker fails. What its successor makes of its messages depends on which have been published.
    fn fail(&mut self, fault: Fault) {
        self.fault = Some(fault);
        let active = self.active().number;
        match fault {
            Fault::Crash => {
                self.processes.extract_if(.., |process| process.number == active).for_each(Process::crash);
                self.learnt[active] = Learnt::default();
            }
            Fault::Supersede => self.active().lose_queue(),
        }
        let unpublished = self.unpublished.len();
        for successor in self.processes.iter().filter(|process| process.number != active) {
            self.learnt[successor.number].add_in_order(unpublished);
        }
    }

    /// Makes a choice, and lets the workers run until they wait.
    async fn make(&mut self, choice: Choice) {
        let world = Arc::clone(&self.world);
        self.waits = if choice == Choice::Wait { self.waits + 1 } else { 0 };
        match choice {
            Choice::Step(at, way) => {
                let step = self.steps().lock().remove(at);
                self.happen(step, way);
            }
            Choice::Publish => self.publish(),
            Choice::Acks => self.acks_arrive(usize::MAX),
            Choice::Fault(fault, acks) => {
                let _ = writeln!(self.trace, "{fault:?} after {acks} acks");
                self.acks_arrive(acks);
                self.fail(fault);
            }
            Choice::CatchUp => {
                let _ = writeln!(self.trace, "the index catches up");
                world.catch_up();
            }
            Choice::Wait => {
                let _ = writeln!(self.trace, "time passes");
                let until = tokio::time::Instant::now() + PATIENCE;
                let has_work = || self.steps().lock().iter().any(|step| step.kind() == Kind::Awaited);
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
    small: &SmallWorld,
    config: &WorkerConfig,
    path: &mut Path,
    explored: &mut Explored,
) -> Option<String> {
    let history = small.history();
    let mut schedule = Schedule::new(small, &history.events, config);
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
        let broker = schedule.world.broker();
        if !broker.dead.is_empty() {
            return Some(format!("{}\ndead: {:?}", schedule.trace, broker.dead));
        }
    }
    let (leads, broker) = (schedule.world.close().leads(), schedule.world.broker());
    let mut problems = Expected::of(&history).compare(&leads).err().unwrap_or_default();
    if !broker.unsettled().is_empty() {
        let _ = writeln!(problems, "not settled: {:?}", broker.unsettled());
    }
    (!problems.is_empty()).then(|| format!("{}\n{problems}", schedule.trace))
}

/// Explores a world until a schedule has a problem.
fn explore(small: &SmallWorld) -> Explored {
    let config = config();
    let (mut explored, mut path) = (Explored::default(), Path::new());
    loop {
        let problem = in_virtual_time(run(small, &config, &mut path, &mut explored));
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

#[test]
fn small_worlds_have_no_bad_schedule() {
    let worlds = SmallWorld::of(env("CLOSE_SYNC_SMALL_WORLDS").as_deref());
    LazyLock::force(&CONFIG);
    let began = WallClock::now();
    let remaining = Mutex::new(worlds.iter());
    let explore_remaining = || {
        let mut total = [0, 0, 0];
        loop {
            let next = remaining.lock().unwrap().next();
            let Some(small) = next else { return total };
            let explored = explore(small);
            if let Some(problem) = explored.problem {
                panic!("{}{:?}\n{problem}", small.history(), small.faults);
            }
            let counts = [explored.states.len(), explored.schedules, explored.steps];
            let [states, schedules, steps] = counts;
            print(&format!(
                "{:?} {:?}: {states} states, {schedules} schedules of {steps} steps in all, {:?}",
                small.kinds,
                small.faults,
                began.elapsed()
            ));
            // Fewer: the search stopped early.
            assert!(states > 100, "{small:?}: {states} states");
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
        let small = SmallWorld { kinds: vec![0], faults, mutant: Some(mutant) };
        let Explored { states, problem, .. } = explore(&small);
        print(&format!(
            "{mutant:?}: {} states\n{}",
            states.len(),
            problem.as_deref().unwrap_or("no problem")
        ));
        assert_eq!(problem.is_some(), is_killed, "{mutant:?}");
    }
}
