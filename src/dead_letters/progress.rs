//! The progress and the result of a replay, for terminals and the operator's page.

use std::collections::BTreeMap;

use crate::amqp::topology::Depth;
use crate::consumer::outcome_events::DeadLetterSummary;
use crate::dead_letters::guard::GuardCounts;
use crate::outcome::DEAD;
use crate::text::count;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    pub stage: Stage,
    /// Dead letters to replay.
    pub matched: usize,
    /// What guards newer values against them, counted before the first is sent.
    pub guards: GuardCounts,
    pub sent: usize,
    /// Sent messages whose outcome will arrive.
    pub in_flight: usize,
    /// Sent messages whose outcome may have been reported while there was no connection.
    pub missed: usize,
    /// Finished messages by outcome.
    pub outcomes: BTreeMap<String, usize>,
    /// How often a message failed for now and went to a delay queue.
    pub delayed: usize,
    /// The last message that failed again.
    pub last_failure: Option<DeadLetterSummary>,
    /// Messages that failed again, by fingerprint.
    pub failures: BTreeMap<String, usize>,
    /// The work queue, when no outcome had arrived for a while. `None` if the user may not look at it.
    pub work: Option<Depth>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Looking for the dead letters to replay.
    #[default]
    Scanning,
    /// Another operator holds the dead letters.
    Waiting,
    /// One message was sent. The others wait for its outcome.
    Canary,
    Sending,
    /// Everything was sent. The last outcomes are awaited.
    Finishing,
    Reconnecting,
    Finished(End),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything was sent.
    Done,
    /// A message failed again before any other succeeded, usually the first one. No more were sent.
    CanaryFailed,
    /// A message failed with an error that was seen before. No more were sent.
    SameFailure,
    /// No outcome arrived in time.
    TimedOut,
    /// The operator stopped it.
    Stopped,
}

impl Progress {
    /// One line about the stage, for operators.
    pub fn describe(&self) -> String {
        let line = match &self.stage {
            Stage::Canary => match self.work {
                Some(Depth { consumers: 0, .. }) => "the first message waits: no worker is consuming",
                Some(Depth { ready: ahead @ 1.., .. }) => {
                    let ahead = count(ahead, "message is", "messages are");
                    return format!("the first message was sent, {ahead} ahead of it");
                }
                Some(_) | None => "the first message was sent",
            },
            Stage::Scanning => "scanning the dead letters",
            Stage::Waiting => "waiting for another operator",
            Stage::Sending => "replaying",
            Stage::Finishing => "waiting for the last outcomes",
            Stage::Reconnecting => "reconnecting to RabbitMQ",
            Stage::Finished(End::Done) if self.matched == 0 => "nothing to replay",
            Stage::Finished(End::Done) if self.failed_again() == 0 => "done: none failed again",
            Stage::Finished(End::Done) => "done, but some failed again",
            Stage::Finished(End::CanaryFailed) if self.matched == 1 => "the message failed again",
            Stage::Finished(End::CanaryFailed) if self.sent == 1 => {
                "the first message failed again, so no others were sent"
            }
            Stage::Finished(End::CanaryFailed) => {
                "a message failed again before any other succeeded, so no more were sent"
            }
            Stage::Finished(End::SameFailure) => {
                "stopped, because a message failed with the same error as an earlier one"
            }
            Stage::Finished(End::TimedOut) if self.only_missed() => {
                let missed = count(self.missed as u64, "message", "messages");
                return format!(
                    "all messages were sent, but the connection was lost meanwhile and the outcome of {missed} may have been \
                     missed; none of them had failed again after the reconnect"
                );
            }
            Stage::Finished(End::TimedOut) => {
                "no worker reported an outcome in time; the sent messages stay in the work queue until a worker processes \
                 them"
            }
            Stage::Finished(End::Stopped) => "stopped; run the same replay again to continue",
        };
        line.to_owned()
    }

    pub fn failed_again(&self) -> usize {
        self.outcomes.get(DEAD).copied().unwrap_or(0)
    }

    /// Whether everything was sent, and only outcomes that may have been missed are open.
    pub fn only_missed(&self) -> bool {
        self.missed > 0 && self.in_flight == 0 && self.sent >= self.matched
    }

    /// Messages with a final outcome.
    pub fn finished(&self) -> usize {
        self.outcomes.values().sum()
    }
}
