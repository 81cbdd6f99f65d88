//! The order of the work: which messages may be worked on now, and which go together.
//!
//! [`KeyQueues`] keep messages apart that share a key, [`DelayedMessages`] see to it that nobody overtakes one that waits
//! in a delay queue. Pure: a session tells what it receives and what it has finished, and asks what to do
//! next; so does the test that plays whole histories in virtual time.

pub mod delayed;
pub mod key_queues;

use std::collections::HashMap;
use std::hash::Hash;

use tokio::time::Instant;
use uuid::Uuid;

use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::scheduler::key_queues::{JobId, KeyQueues};

/// Most messages that are worked on together: what they change becomes one write.
const MOST_TOGETHER: usize = 100;

/// What was received and is not settled, in order.
#[derive(Debug)]
pub struct Scheduler<'a, K, R, T> {
    lanes: KeyQueues<K, R, Message<T>>,
    detours: &'a mut DelayedMessages<K>,
    /// The ids of messages that are worked on and were away before.
    were_away: HashMap<JobId, Uuid>,
}

#[derive(Debug)]
struct Message<T> {
    /// Its id, if it comes from a delay queue.
    id: Option<Uuid>,
    entry: T,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// Work on these; where there are several, together.
    Run(Vec<(JobId, T)>),
    /// Send this one to a delay queue, uncharged: earlier ones that share a key are in delay queues until then.
    Defer(JobId, T, Instant),
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// It is settled.
    Done,
    /// It waits in a delay queue.
    Delayed {
        /// By this it will be known when it comes back.
        id: Uuid,
        /// When.
        due: Instant,
    },
}

impl<'a, K: Clone + Eq + Hash, R: Copy + Ord, T> Scheduler<'a, K, R, T> {
    /// A desk for a new session: everything that was not settled will be received again. What waits in delay
    /// queues stays known from one session to the next.
    pub fn new(detours: &'a mut DelayedMessages<K>) -> Self {
        detours.start_over();
        Self { lanes: KeyQueues::default(), detours, were_away: HashMap::new() }
    }

    /// Takes in a message, behind all others. `id` as given by [`Completion::Delayed`], if it comes from a delay queue.
    pub fn receive(&mut self, keys: Vec<K>, rank: R, id: Option<Uuid>, entry: T) {
        if let Some(id) = id {
            self.detours.come_back(id);
        }
        self.lanes.push(keys, rank, Message { id, entry });
    }

    /// A message that is about nobody came: no other waits for it, and it needs no turn.
    pub fn pass(&mut self, id: Option<Uuid>) {
        if let Some(id) = id {
            self.detours.forget(id);
        }
    }

    /// What to do next, if there is anything that may be done now. Later messages that `go_along` with the
    /// first are worked on with it.
    pub fn next(&mut self, go_along: impl Fn(&T, &T) -> bool) -> Option<Next<T>> {
        let (ticket, first) = self.lanes.start()?;
        let (first, behind) = self.begin(ticket, first);
        if let Some(due) = behind {
            return Some(Next::Defer(ticket, first, due));
        }
        let (mut tickets, mut run) = (vec![ticket], vec![(ticket, first)]);
        while run.len() < MOST_TOGETHER {
            let joins = |keys: &[K], message: &Message<T>| {
                go_along(&run[0].1, &message.entry) && self.detours.behind(message.id, keys).is_none()
            };
            let Some((ticket, message)) = self.lanes.start_behind(&tickets, joins) else { break };
            tickets.push(ticket);
            run.push((ticket, self.begin(ticket, message).0));
        }
        Some(Next::Run(run))
    }

    /// The same with any message that may be worked on, by a number that was drawn, and alone.
    pub fn any(&mut self, drawn: usize) -> Option<Next<T>> {
        let (ticket, message) = self.lanes.start_any(drawn)?;
        let (entry, behind) = self.begin(ticket, message);
        Some(match behind {
            Some(due) => Next::Defer(ticket, entry, due),
            None => Next::Run(vec![(ticket, entry)]),
        })
    }

    fn begin(&mut self, ticket: JobId, message: Message<T>) -> (T, Option<Instant>) {
        let Message { id, entry } = message;
        let behind = self.detours.behind(id, self.lanes.keys(ticket));
        if let Some(id) = id {
            self.detours.begin(id);
            self.were_away.insert(ticket, id);
        }
        (entry, behind)
    }

    /// A message is done with: those behind it may go on.
    pub fn finish(&mut self, ticket: JobId, fate: Completion) {
        let was_away = self.were_away.remove(&ticket);
        match (fate, was_away) {
            (Completion::Delayed { id, due }, _) => {
                self.detours.leave(id, self.lanes.keys(ticket).to_vec(), due);
            }
            (Completion::Done, Some(id)) => self.detours.forget(id),
            (Completion::Done, None) => {}
        }
        self.lanes.finish(ticket);
    }

    /// A message has to wait again, where it was.
    pub fn put_back(&mut self, ticket: JobId, entry: T) {
        let id = self.were_away.remove(&ticket);
        self.lanes.put_back(ticket, Message { id, entry });
    }

    /// How many messages wait for their turn.
    pub fn waiting(&self) -> usize {
        self.lanes.waiting()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Tried<'a> = Scheduler<'a, &'static str, u8, &'static str>;

    fn same_person(first: &&str, next: &&str) -> bool {
        first.split(' ').next() == next.split(' ').next()
    }

    fn run(next: Option<Next<&'static str>>) -> Vec<(JobId, &'static str)> {
        match next {
            Some(Next::Run(run)) => run,
            other @ (Some(Next::Defer(..)) | None) => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_waits_for_one_person_goes_together_and_apart_when_that_fails() {
        let mut detours = DelayedMessages::default();
        let mut desk = Tried::new(&mut detours);
        desk.receive(vec!["acme", "jane"], 0, None, "jane 1");
        desk.receive(vec!["acme", "jane"], 0, None, "jane 2");
        desk.receive(vec!["acme", "bob"], 0, None, "bob");
        desk.receive(vec!["acme", "jane"], 0, None, "jane 3");
        let together = run(desk.next(same_person));
        assert_eq!(together.iter().map(|(_, name)| *name).collect::<Vec<_>>(), ["jane 1", "jane 2"]);
        assert_eq!(desk.next(same_person), None);
        for (ticket, name) in together {
            desk.put_back(ticket, name);
        }
        for name in ["jane 1", "jane 2", "bob", "jane 3"] {
            let alone = run(desk.next(|_, _| false));
            assert_eq!(alone[0].1, name);
            desk.finish(alone[0].0, Completion::Done);
        }
        assert_eq!(desk.waiting(), 0);
    }

    #[test]
    fn who_waits_in_a_delay_queue_is_followed_and_comes_first_when_it_is_back() {
        let mut detours = DelayedMessages::default();
        let (first, second) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let due = Instant::now();
        let mut desk = Tried::new(&mut detours);
        desk.receive(vec!["jane"], 0, None, "jane 1");
        desk.receive(vec!["jane"], 0, None, "jane 2");
        let alone = run(desk.next(|_, _| false));
        desk.finish(alone[0].0, Completion::Delayed { id: first, due });
        let Some(Next::Defer(ticket, "jane 2", until)) = desk.next(same_person) else {
            panic!("it overtakes")
        };
        assert_eq!(until, due);
        desk.finish(ticket, Completion::Delayed { id: second, due });

        // Both are back, and a third comes; the session ends, and they come again.
        for _ in 0..2 {
            desk = Tried::new(&mut detours);
            desk.receive(vec!["jane"], 1, Some(first), "jane 1");
            desk.receive(vec!["jane"], 1, Some(second), "jane 2");
            desk.receive(vec!["jane"], 0, None, "jane 3");
            let names: Vec<_> = run(desk.next(same_person)).into_iter().map(|(_, name)| name).collect();
            assert_eq!(names, ["jane 1", "jane 2", "jane 3"]);
        }
    }

    #[test]
    fn nobody_waits_for_a_message_that_turns_out_to_be_about_nobody() {
        let mut detours = DelayedMessages::default();
        let mut desk = Tried::new(&mut detours);
        let id = Uuid::from_u128(1);
        desk.receive(vec!["jane"], 0, None, "jane 1");
        let due = Instant::now() + std::time::Duration::from_secs(30);
        let first = run(desk.next(same_person));
        desk.finish(first[0].0, Completion::Delayed { id, due });
        // When it comes back, another configuration makes nothing of it.
        desk.pass(Some(id));
        desk.receive(vec!["jane"], 0, None, "jane 2");
        assert_eq!(run(desk.next(same_person))[0].1, "jane 2");
    }
}
