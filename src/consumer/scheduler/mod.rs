//! Decides which message may run next, and which run merged.
//!
//! [`KeyQueues`] keeps messages that share a key in order. [`DelayedMessages`] keeps later messages from overtaking one
//! that waits in a delay queue. Pure: the session adds what it receives and finishes, and asks what to run next.

pub mod delayed;
pub mod key_queues;

use std::collections::HashMap;
use std::hash::Hash;

use tokio::time::Instant;
use uuid::Uuid;

use crate::consumer::scheduler::delayed::DelayedMessages;
use crate::consumer::scheduler::key_queues::{JobId, KeyQueues};

/// The maximum number of messages in one merged write.
const MAX_MERGED: usize = 100;

/// The messages that were received and are not settled, in order.
#[derive(Debug)]
pub struct Scheduler<'a, K, R, T> {
    queues: KeyQueues<K, R, Message<T>>,
    delayed: &'a mut DelayedMessages<K>,
    /// The ids of running messages that came from a delay queue.
    were_delayed: HashMap<JobId, Uuid>,
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
    /// Run these, merged where there are several.
    Run(Vec<(JobId, T)>),
    /// Send this one to a delay queue, without counting an attempt: earlier messages that share a key are in delay
    /// queues until then.
    Defer(JobId, T, Instant),
}

/// How the work on a message ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// It is settled.
    Done,
    /// It waits in a delay queue.
    Delayed {
        /// Identifies it when it returns.
        id: Uuid,
        /// When it returns.
        due: Instant,
    },
}

impl<'a, K: Clone + Eq + Hash, R: Copy + Ord, T> Scheduler<'a, K, R, T> {
    /// A scheduler for a new session. Everything that was not settled will be delivered again. `delayed` lasts from one
    /// session to the next.
    pub fn new(delayed: &'a mut DelayedMessages<K>) -> Self {
        delayed.session_started();
        Self { queues: KeyQueues::default(), delayed, were_delayed: HashMap::new() }
    }

    /// Adds a message behind all others. `id` is that of [`Completion::Delayed`], if it comes from a delay queue.
    pub fn receive(&mut self, keys: Vec<K>, rank: R, id: Option<Uuid>, entry: T) {
        if let Some(id) = id {
            self.delayed.returned(id);
        }
        self.queues.push(keys, rank, Message { id, entry });
    }

    /// A message came that needs no turn. If it comes from a delay queue, none waits for it any more.
    pub fn skip(&mut self, id: Option<Uuid>) {
        if let Some(id) = id {
            self.delayed.remove(id);
        }
    }

    /// What to do next, if anything may run now. Later messages that `can_merge` with the first run with it.
    pub fn next(&mut self, can_merge: impl Fn(&T, &T) -> bool) -> Option<Next<T>> {
        let (job, first) = self.queues.start()?;
        let (first, deferred_until) = self.start(job, first);
        if let Some(due) = deferred_until {
            return Some(Next::Defer(job, first, due));
        }
        let (mut jobs, mut run) = (vec![job], vec![(job, first)]);
        while run.len() < MAX_MERGED {
            let joins = |keys: &[K], message: &Message<T>| {
                can_merge(&run[0].1, &message.entry) && self.delayed.blocked_until(message.id, keys).is_none()
            };
            let Some((job, message)) = self.queues.start_behind(&jobs, joins) else { break };
            jobs.push(job);
            run.push((job, self.start(job, message).0));
        }
        Some(Next::Run(run))
    }

    /// One of the messages that may run now, chosen by the number `drawn`, and not merged.
    pub fn next_drawn(&mut self, drawn: usize) -> Option<Next<T>> {
        let (job, message) = self.queues.start_drawn(drawn)?;
        let (entry, deferred_until) = self.start(job, message);
        Some(match deferred_until {
            Some(due) => Next::Defer(job, entry, due),
            None => Next::Run(vec![(job, entry)]),
        })
    }

    fn start(&mut self, job: JobId, message: Message<T>) -> (T, Option<Instant>) {
        let Message { id, entry } = message;
        let deferred_until = self.delayed.blocked_until(id, self.queues.keys(job));
        if let Some(id) = id {
            self.delayed.started(id);
            self.were_delayed.insert(job, id);
        }
        (entry, deferred_until)
    }

    /// A message was settled: those behind it may run.
    pub fn finish(&mut self, job: JobId, completion: Completion) {
        let was_delayed = self.were_delayed.remove(&job);
        match (completion, was_delayed) {
            (Completion::Delayed { id, due }, _) => {
                self.delayed.add(id, self.queues.keys(job).to_vec(), due);
            }
            (Completion::Done, Some(id)) => self.delayed.remove(id),
            (Completion::Done, None) => {}
        }
        self.queues.finish(job);
    }

    /// A message that was started waits again, in its old place.
    pub fn put_back(&mut self, job: JobId, entry: T) {
        let id = self.were_delayed.remove(&job);
        self.queues.put_back(job, Message { id, entry });
    }

    /// How many messages have not been started.
    pub fn waiting(&self) -> usize {
        self.queues.waiting()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestScheduler<'a> = Scheduler<'a, &'static str, u8, &'static str>;

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
    fn messages_about_one_person_run_merged_and_split_after_a_failure() {
        let mut delayed = DelayedMessages::default();
        let mut scheduler = TestScheduler::new(&mut delayed);
        scheduler.receive(vec!["acme", "jane"], 0, None, "jane 1");
        scheduler.receive(vec!["acme", "jane"], 0, None, "jane 2");
        scheduler.receive(vec!["acme", "bob"], 0, None, "bob");
        scheduler.receive(vec!["acme", "jane"], 0, None, "jane 3");
        let merged = run(scheduler.next(same_person));
        assert_eq!(merged.iter().map(|(_, name)| *name).collect::<Vec<_>>(), ["jane 1", "jane 2"]);
        assert_eq!(scheduler.next(same_person), None);
        for (job, name) in merged {
            scheduler.put_back(job, name);
        }
        for name in ["jane 1", "jane 2", "bob", "jane 3"] {
            let split = run(scheduler.next(|_, _| false));
            assert_eq!(split[0].1, name);
            scheduler.finish(split[0].0, Completion::Done);
        }
        assert_eq!(scheduler.waiting(), 0);
    }

    #[test]
    fn messages_follow_one_in_a_delay_queue_and_run_after_it_when_it_returns() {
        let mut delayed = DelayedMessages::default();
        let (first, second) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let due = Instant::now();
        let mut scheduler = TestScheduler::new(&mut delayed);
        scheduler.receive(vec!["jane"], 0, None, "jane 1");
        scheduler.receive(vec!["jane"], 0, None, "jane 2");
        let split = run(scheduler.next(|_, _| false));
        scheduler.finish(split[0].0, Completion::Delayed { id: first, due });
        let Some(Next::Defer(job, "jane 2", until)) = scheduler.next(same_person) else {
            panic!("jane 2 overtakes jane 1")
        };
        assert_eq!(until, due);
        scheduler.finish(job, Completion::Delayed { id: second, due });

        // Both return and a third arrives. The session ends, and all are delivered again.
        for _ in 0..2 {
            scheduler = TestScheduler::new(&mut delayed);
            scheduler.receive(vec!["jane"], 1, Some(first), "jane 1");
            scheduler.receive(vec!["jane"], 1, Some(second), "jane 2");
            scheduler.receive(vec!["jane"], 0, None, "jane 3");
            let names: Vec<_> = run(scheduler.next(same_person)).into_iter().map(|(_, name)| name).collect();
            assert_eq!(names, ["jane 1", "jane 2", "jane 3"]);
        }
    }

    #[test]
    fn none_waits_for_a_message_that_needs_no_turn_when_it_returns() {
        let mut delayed = DelayedMessages::default();
        let mut scheduler = TestScheduler::new(&mut delayed);
        let id = Uuid::from_u128(1);
        scheduler.receive(vec!["jane"], 0, None, "jane 1");
        let due = Instant::now() + std::time::Duration::from_secs(30);
        let first = run(scheduler.next(same_person));
        scheduler.finish(first[0].0, Completion::Delayed { id, due });
        // When it returns, another configuration skips it.
        scheduler.skip(Some(id));
        scheduler.receive(vec!["jane"], 0, None, "jane 2");
        assert_eq!(run(scheduler.next(same_person))[0].1, "jane 2");
    }
}
