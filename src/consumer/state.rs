//! What a session has received, what runs, and when consumption resumes after a pause. Pure, with the time as input.
//!
//! **After a pause** a session starts a few messages, and one more for each that succeeds with Close
//! ([`HALF_OPEN_PROBES`]). Where only a message can prove that Close works again ([`Resume::HalfOpen`]), the circuit
//! breaker is half-open until one succeeds, or there is none to try ([`HALF_OPEN_IDLE`]). The messages to try are then
//! drawn at random from those received in the first moments: the first in the queue may be those that always fail, and
//! would be tried first every time.

use std::hash::Hash;
use std::ops::AddAssign;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::amqp::BrokerError;
use crate::consumer::scheduler::key_queues::JobId;
use crate::consumer::scheduler::{Completion, Next, Scheduler};
use crate::outcome::PauseCause;
use crate::sync::circuit_breaker::HALF_OPEN_PROBES;

/// A half-open circuit breaker closes after this long without a message to try. One that failed is to be tried again when
/// it is back from its delay queue, so the breaker does not close before.
const HALF_OPEN_IDLE: Duration = Duration::from_mins(1);

/// How long a half-open session receives messages before it draws some.
const DRAW_AFTER: Duration = Duration::from_millis(200);

/// What a session did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Deliveries settled.
    pub settled: u64,
    /// Those of them that prove that Close works.
    pub by_close: u64,
    /// The circuit breaker is closed.
    pub breaker_closed: bool,
    /// Deliveries received but not settled: they went back to the queue.
    pub handed_back: u64,
}

impl AddAssign for SessionStats {
    fn add_assign(&mut self, more: Self) {
        let Self { settled, by_close, breaker_closed, handed_back } = self;
        *settled += more.settled;
        *by_close += more.by_close;
        *breaker_closed |= more.breaker_closed;
        *handed_back += more.handed_back;
    }
}

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// A shutdown was requested.
    Stopped,
    /// Close does not work.
    Paused(PauseCause),
    /// The broker is gone, or refuses us.
    Lost(BrokerError),
}

/// How one delivery ended.
#[derive(Debug)]
pub(crate) enum Settlement {
    Settled {
        by_close: bool,
        completion: Completion,
        /// The id of the dead letter it became, if it became one.
        dead_letter: Option<Uuid>,
    },
    /// Dropped by the end of the session, or acked too late. The broker delivers it again.
    HandedBack,
    Paused(PauseCause),
    Failed(BrokerError),
}

/// How the work of one task ended.
pub(crate) enum Processed<T> {
    Settled(Vec<(JobId, Settlement)>),
    /// The merged run failed. The messages run one by one.
    Split(Vec<(JobId, T)>),
}

/// How a session starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resume {
    /// There was no pause.
    Normal,
    /// After a pause that a successful probe ended.
    Slowly,
    /// After a pause for which a probe proves nothing: only a message that succeeds does.
    HalfOpen,
}

impl Resume {
    pub(crate) fn after(pause: Option<PauseCause>) -> Self {
        match pause {
            None => Self::Normal,
            Some(cause) if cause.ends_with_probe() => Self::Slowly,
            Some(_) => Self::HalfOpen,
        }
    }
}

/// How much a session has in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Messages that are worked on.
    pub(crate) in_progress: usize,
    /// Messages that wait for their turn.
    pub(crate) waiting: usize,
    /// More could run if there were more concurrency.
    pub(crate) saturated: bool,
}

/// The state of a session.
pub(crate) struct SessionState<'a, K, R, T> {
    scheduler: Scheduler<'a, K, R, T>,
    concurrency: usize,
    resume: Resume,
    /// Tasks that run, and the messages in them.
    tasks: usize,
    in_progress: usize,
    received: u64,
    stats: SessionStats,
    /// What earlier workers did is being read. Nothing starts before.
    is_taking_over: bool,
    /// Since when there has been no message to try. In the future while one is in a delay queue.
    idle_since: Instant,
    draw: Draw,
}

/// Whether messages to try are about to be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Draw {
    BeforeFirstDelivery,
    At(Instant),
    Done,
}

impl<'a, K: Clone + Eq + Hash, R: Copy + Ord, T> SessionState<'a, K, R, T> {
    pub(crate) fn new(
        scheduler: Scheduler<'a, K, R, T>,
        concurrency: usize,
        resume: Resume,
        now: Instant,
    ) -> Self {
        let half_open = resume == Resume::HalfOpen;
        Self {
            scheduler,
            concurrency,
            resume,
            tasks: 0,
            in_progress: 0,
            received: 0,
            stats: SessionStats { breaker_closed: !half_open, ..SessionStats::default() },
            is_taking_over: false,
            idle_since: now,
            draw: if half_open { Draw::BeforeFirstDelivery } else { Draw::Done },
        }
    }

    /// Counts a delivery. Returns whether it is the first.
    pub(crate) fn received(&mut self, now: Instant) -> bool {
        self.received += 1;
        let first = self.received == 1;
        if first && self.draw == Draw::BeforeFirstDelivery {
            self.draw = Draw::At(now + DRAW_AFTER);
        }
        first
    }

    /// Schedules a message behind all others. `id` is set if it comes from a delay queue.
    pub(crate) fn schedule(&mut self, keys: Vec<K>, rank: R, id: Option<Uuid>, message: T) {
        self.scheduler.receive(keys, rank, id, message);
    }

    /// A message needs no turn: its outcome is known without Close.
    pub(crate) fn skip(&mut self, id: Option<Uuid>) {
        self.scheduler.skip(id);
    }

    /// What to start next, if another task may run. `drawn` is a random number.
    pub(crate) fn next(
        &mut self,
        now: Instant,
        drawn: impl FnOnce() -> usize,
        can_merge: impl Fn(&T, &T) -> bool,
    ) -> Option<Next<T>> {
        if let Draw::At(at) = self.draw
            && now >= at
        {
            self.draw = Draw::Done;
        }
        let limit = self.limit();
        if self.is_taking_over || self.draw != Draw::Done || self.tasks >= limit {
            return None;
        }
        let next = if limit < self.concurrency {
            self.scheduler.next_drawn(drawn())
        } else {
            self.scheduler.next(can_merge)
        }?;
        self.tasks += 1;
        self.in_progress += match &next {
            Next::Run(run) => run.len(),
            Next::Defer(..) => 1,
        };
        self.try_until(now);
        Some(next)
    }

    /// A task ended. Returns why the session has to end, if it has to. Messages that were not settled keep their place,
    /// so that none behind them starts.
    pub(crate) fn processed(&mut self, processed: Processed<T>, now: Instant) -> Option<End> {
        self.tasks -= 1;
        self.try_until(now);
        match processed {
            Processed::Settled(each) => {
                self.in_progress -= each.len();
                let mut end = None;
                for (job, settlement) in each {
                    if let Settlement::Settled { completion, .. } = settlement {
                        if let Completion::Delayed { due, .. } = completion {
                            self.try_until(due);
                        }
                        self.scheduler.finish(job, completion);
                    }
                    end = end.or(self.settled(settlement));
                }
                end
            }
            Processed::Split(run) => {
                self.in_progress -= run.len();
                for (job, message) in run {
                    self.scheduler.put_back(job, message);
                }
                None
            }
        }
    }

    /// There is a message to try until then.
    fn try_until(&mut self, until: Instant) {
        self.idle_since = self.idle_since.max(until);
    }

    /// Counts a settlement. Returns why the session has to end, if it has to.
    pub(crate) fn settled(&mut self, settlement: Settlement) -> Option<End> {
        match settlement {
            Settlement::Settled { by_close, .. } => {
                self.stats.settled += 1;
                self.stats.by_close += u64::from(by_close);
                None
            }
            Settlement::HandedBack => None,
            Settlement::Paused(cause) => Some(End::Paused(cause)),
            Settlement::Failed(error) => Some(End::Lost(error)),
        }
    }

    /// Closes a half-open circuit breaker once a message has succeeded, or none came to try for a while. Returns
    /// whether it did.
    pub(crate) fn close_breaker(&mut self, now: Instant) -> bool {
        let is_idle = self.tasks == 0 && now >= self.idle_since + HALF_OPEN_IDLE;
        let closes = !self.stats.breaker_closed && (self.stats.by_close > 0 || is_idle);
        self.stats.breaker_closed |= closes;
        closes
    }

    /// When to look again although nothing happens.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        let idle =
            (!self.stats.breaker_closed && self.tasks == 0).then_some(self.idle_since + HALF_OPEN_IDLE);
        let draw = if let Draw::At(at) = self.draw { Some(at) } else { None };
        idle.into_iter().chain(draw).min()
    }

    /// This is the active worker, and the breaker is closed.
    pub(crate) fn is_consuming(&self) -> bool {
        self.stats.breaker_closed && self.received > 0
    }

    /// Starts nothing while the journal is read.
    pub(crate) fn set_taking_over(&mut self, is_taking_over: bool) {
        self.is_taking_over = is_taking_over;
    }

    pub(crate) fn is_taking_over(&self) -> bool {
        self.is_taking_over
    }

    pub(crate) fn load(&self) -> Load {
        let waiting = self.scheduler.waiting();
        let saturated = self.tasks == self.concurrency && waiting >= self.concurrency;
        Load { in_progress: self.in_progress, waiting, saturated }
    }

    /// What the session did, once it is over.
    pub(crate) fn stats(&self) -> SessionStats {
        SessionStats { handed_back: self.received - self.stats.settled, ..self.stats }
    }

    /// How many tasks may run now: after a pause one more for each message that succeeds.
    fn limit(&self) -> usize {
        let succeeded = usize::try_from(self.stats.by_close).unwrap_or(usize::MAX);
        match self.resume {
            Resume::Normal => self.concurrency,
            Resume::Slowly | Resume::HalfOpen => {
                self.concurrency.min(succeeded.saturating_add(HALF_OPEN_PROBES))
            }
        }
    }
}
