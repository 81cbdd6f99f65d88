//! How far a replay has come, and how it ended: for terminals and the page alike.

use std::collections::BTreeMap;

use crate::amqp::topology::Depth;
use crate::consumer::outcome_events::DeadLetterSummary;
use crate::outcome::DEAD;
use crate::text::count;

/// How far a replay has come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// Dead letters that are meant.
    pub matched: usize,
    /// Those sent.
    pub sent: usize,
    /// Those under way, of which there will be news.
    pub in_flight: usize,
    /// Those without an end of which it may have been told while there was no connection.
    pub missed: usize,
    /// Those with an end, by what became of them.
    pub outcomes: BTreeMap<String, usize>,
    /// Times one failed for now and waits in a delay queue.
    pub delayed: usize,
    /// The last of those that failed again.
    pub last_failure: Option<DeadLetterSummary>,
    /// Fingerprints of those that failed again, and how many they were.
    pub failures: BTreeMap<String, usize>,
    /// The work queue, as it was found while nothing was heard, if the broker tells us.
    pub work: Option<Depth>,
}

/// What a replay is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Looking for the dead letters that are meant.
    #[default]
    Scanning,
    /// Somebody else is at it.
    Waiting,
    /// One was sent; the rest waits for it.
    Canary,
    /// Sending.
    Sending,
    /// All that was to be sent is; the last are under way.
    Finishing,
    /// The broker is gone, for now.
    Reconnecting,
    /// It has ended.
    Finished(End),
}

/// How a replay ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything meant was sent.
    Done,
    /// One failed again before any was known to get through, the first one as a rule: no more were sent.
    CanaryFailed,
    /// One failed in a way that is known already.
    SameFailure,
    /// No news for too long.
    TimedOut,
    /// It was asked to.
    Stopped,
}

impl Progress {
    /// What it is doing, for people.
    pub fn describe(&self) -> String {
        match &self.stage {
            Stage::Canary => match self.work {
                Some(Depth { consumers: 0, .. }) => "the first waits: no worker consumes just now".to_owned(),
                Some(Depth { ready: ahead @ 1.., .. }) => {
                    format!("the first is under way, {} before it", count(ahead, "message", "messages"))
                }
                Some(_) | None => "the first is under way".to_owned(),
            },
            Stage::Scanning => "looking for them".to_owned(),
            Stage::Waiting => "waiting for another operator".to_owned(),
            Stage::Sending => "replaying".to_owned(),
            Stage::Finishing => "waiting for the last".to_owned(),
            Stage::Reconnecting => "reconnecting to RabbitMQ".to_owned(),
            Stage::Finished(End::Done) if self.matched == 0 => "there was nothing to replay".to_owned(),
            Stage::Finished(End::Done) if self.failed_again() == 0 => "done: none failed again".to_owned(),
            Stage::Finished(End::Done) => "done, and some failed again".to_owned(),
            Stage::Finished(End::CanaryFailed) if self.matched == 1 => "it failed again".to_owned(),
            Stage::Finished(End::CanaryFailed) if self.sent == 1 => {
                "the first one failed again, so nothing else was sent".to_owned()
            }
            Stage::Finished(End::CanaryFailed) => {
                "one failed again before it was heard of any that did not, so no more were sent".to_owned()
            }
            Stage::Finished(End::SameFailure) => {
                "stopped, as what went wrong before goes wrong again".to_owned()
            }
            Stage::Finished(End::TimedOut) if self.only_missed() => format!(
                "all were sent, but what became of {} may have been told while the connection was lost; none of them had \
                 failed again when it was back",
                count(self.missed as u64, "message", "messages")
            ),
            Stage::Finished(End::TimedOut) => {
                "no worker told what became of them: they were sent, and are worked on when their turn comes"
                    .to_owned()
            }
            Stage::Finished(End::Stopped) => "stopped; replaying the same again goes on".to_owned(),
        }
    }

    /// Those that failed again.
    pub fn failed_again(&self) -> usize {
        self.outcomes.get(DEAD).copied().unwrap_or(0)
    }

    /// Whether all were sent, and news are lacking of those only whose news may have been missed.
    pub fn only_missed(&self) -> bool {
        self.missed > 0 && self.in_flight == 0 && self.sent >= self.matched
    }

    /// Those with an end.
    pub fn ended(&self) -> usize {
        self.outcomes.values().sum()
    }
}
