//! What can become of a message: closed lists, with the labels that logs, metrics and dead-letter
//! headers share.

use std::fmt;
use std::time::Duration;
use strum::VariantArray;

use crate::close::{CloseError, ResponseExcerpt};
use crate::domain::event::NotForClose;
use crate::domain::plan::{Plan, Refusal, Step};

/// The label of messages that can't succeed.
pub const DEAD: &str = "dead";

/// What the broker edge has to do with a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Close agrees with the message: ack.
    Synced(Effect),
    /// Nothing was to be done, for a reason: ack.
    Skipped(Skip),
    /// Again later: publish to a delay queue, then ack.
    Delayed {
        /// Which of the configured delays.
        level: usize,
        /// What stood in the way.
        cause: DelayCause,
    },
    /// Can't succeed: publish to the dead-letter queue, then ack.
    Dead(DeadLetter),
    /// Not the message's fault: consumption stops, the delivery goes back.
    Paused(PauseCause),
}

impl Outcome {
    /// The label in metrics and in what a replay is told.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Synced(effect) => effect.label(),
            Self::Skipped(_) => "skipped",
            Self::Delayed { .. } => "delayed",
            Self::Dead(_) => DEAD,
            Self::Paused(_) => "handed_back",
        }
    }

    /// Whether Close did its part: then nothing is wrong with it in general.
    pub fn proves_close(&self) -> bool {
        match self {
            Self::Synced(_) | Self::Skipped(Skip::Switch(_)) => true,
            Self::Dead(dead) => match dead.reason {
                Reason::Rejected | Reason::NotFound => true,
                Reason::Malformed
                | Reason::NoIdentity
                | Reason::Forbidden
                | Reason::Exhausted
                | Reason::Internal => false,
            },
            Self::Skipped(Skip::Event(_) | Skip::Anonymous) | Self::Delayed { .. } | Self::Paused(_) => false,
        }
    }
}

/// Why a message waits in a delay queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DelayCause {
    /// It failed, which has used up an attempt.
    Failed(String),
    /// The rate limits did not let it through for as long as it may be held.
    RateLimited(Duration),
    /// An earlier message that shares a key waits there.
    BehindEarlier,
}

impl DelayCause {
    /// Whether the message has used up an attempt.
    pub fn uses_attempt(&self) -> bool {
        match self {
            Self::Failed(_) => true,
            Self::RateLimited(_) | Self::BehindEarlier => false,
        }
    }
}

impl fmt::Display for DelayCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(why) => f.write_str(why),
            Self::RateLimited(held) => {
                write!(f, "held for {} s, waiting for Close's rate limits", held.as_secs())
            }
            Self::BehindEarlier => {
                f.write_str("an earlier message of the same person or company waits there")
            }
        }
    }
}

/// What a synced message did to Close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// A Lead was created, with its Contact as far as the switches allow.
    Created,
    /// A Contact was added to a Lead.
    Added,
    /// Records were changed.
    Updated,
    /// Everything was as wanted; nothing was sent.
    Unchanged,
}

/// Why nothing was to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Skip {
    /// The event is not for Close.
    Event(NotForClose),
    /// The event names nobody, and the configuration lets such events go.
    Anonymous,
    /// The switches forbid every step.
    Switch(Refusal),
}

impl Skip {
    /// All reasons, for metrics.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Event(NotForClose::Trigger), Self::Event(NotForClose::Integrations), Self::Anonymous]
            .into_iter()
            .chain(Refusal::VARIANTS.iter().copied().map(Self::Switch))
    }

    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Event(NotForClose::Trigger) => "trigger",
            Self::Event(NotForClose::Integrations) => "integrations",
            Self::Anonymous => "anonymous",
            Self::Switch(refusal) => refusal.label(),
        }
    }
}

impl Outcome {
    /// What became of a message whose plan was carried out as far as the switches allow.
    pub fn of(plan: &Plan, effect: Effect) -> Self {
        match plan.refused.first() {
            Some(refusal) if effect == Effect::Unchanged => Self::Skipped(Skip::Switch(*refusal)),
            Some(_) | None => Self::Synced(effect),
        }
    }
}

impl Effect {
    /// What a step does, once Close has accepted it.
    pub fn of(step: &Step) -> Self {
        match step {
            Step::CreateLead { .. } => Self::Created,
            Step::CreateContact { .. } => Self::Added,
            Step::UpdateLead { .. } | Step::UpdateContact { .. } => Self::Updated,
        }
    }

    /// All effects, for metrics.
    pub const ALL: [Self; 4] = [Self::Created, Self::Added, Self::Updated, Self::Unchanged];

    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Added => "added",
            Self::Updated => "updated",
            Self::Unchanged => "unchanged",
        }
    }
}

/// A message that can't succeed, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Why, from a closed list.
    pub reason: Reason,
    /// Where it failed.
    pub stage: Stage,
    /// What happened, in words without personal data.
    pub error: String,
    /// The field of Close it is about, if Close named one; of what is no event, what is wrong with it.
    pub field: Option<String>,
    /// How far it came, [`crate::domain::decision::Decision::summary`].
    pub decision: Option<String>,
    /// What Close said.
    pub said: Option<ResponseExcerpt>,
}

impl DeadLetter {
    /// Equal for messages that failed alike: reason, stage and field.
    pub fn fingerprint(&self) -> String {
        let field = self.field.as_deref().unwrap_or("-");
        format!("{}:{}:{field}", self.reason.label(), self.stage.label())
    }
}

/// Why a message was dead-lettered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Not an event.
    Malformed,
    /// Names nobody.
    NoIdentity,
    /// Close refused what it says.
    Rejected,
    /// The key's user may not do what it asks for.
    Forbidden,
    /// The record vanished, twice.
    NotFound,
    /// Failed at every attempt.
    Exhausted,
    /// A defect of ours.
    Internal,
}

impl Reason {
    /// All reasons, for metrics and `--help`.
    pub const ALL: [Self; 7] = [
        Self::Malformed,
        Self::NoIdentity,
        Self::Rejected,
        Self::Forbidden,
        Self::NotFound,
        Self::Exhausted,
        Self::Internal,
    ];

    /// The label in logs, metrics and headers.
    pub fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NoIdentity => "no_identity",
            Self::Rejected => "rejected",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Exhausted => "exhausted",
            Self::Internal => "internal",
        }
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Malformed => {
                "have the producer send a JSON object as the README describes, and discard this one"
            }
            Self::NoIdentity => {
                "have the producer send `userId` or a valid `traits.email`, and discard this one"
            }
            Self::Rejected => {
                "fix the field that Close named: in Close, in the mapping, or in the message with `dlq edit`; then replay. To see \
                 Close's full answer, replay one message with `dlq replay --id`"
            }
            Self::Forbidden => "give the API key's user the permission in Close, and replay",
            Self::NotFound => "replay: the record was deleted or merged while the message was worked on",
            Self::Exhausted => "replay once Close answers again",
            Self::Internal => "report the error with the version of close-sync; replay after an upgrade",
        }
    }
}

/// Where a message failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading the body.
    Decode,
    /// Mapping it to fields of Close.
    Map,
    /// Looking up what Close has.
    LookUp,
    /// Writing to Close.
    Write,
}

impl Stage {
    /// The label in logs and headers.
    pub fn label(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Map => "map",
            Self::LookUp => "look_up",
            Self::Write => "write",
        }
    }
}

/// Why consumption stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PauseCause {
    /// Close does not accept the key.
    Unauthorized,
    /// The organization's plan is at its limit.
    PlanLimit,
    /// The key's user may do nothing at all.
    Forbidden,
    /// Close cannot be reached.
    Unreachable,
    /// Close answers, but most messages fail.
    Failing,
    /// A lookup field is gone or has another type.
    LookupField,
}

impl PauseCause {
    /// All causes, for metrics.
    pub const ALL: [Self; 6] = [
        Self::Unauthorized,
        Self::PlanLimit,
        Self::Forbidden,
        Self::Unreachable,
        Self::Failing,
        Self::LookupField,
    ];

    /// Whether a probe of Close proves that the cause is gone. Otherwise only a message that succeeds does.
    pub fn ends_with_probe(self) -> bool {
        match self {
            Self::Unauthorized | Self::Unreachable | Self::LookupField => true,
            Self::PlanLimit | Self::Forbidden | Self::Failing => false,
        }
    }

    /// What an operator can do.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Unauthorized => {
                "set `close.api_key` to a key that is valid in Close, then send SIGHUP or restart"
            }
            Self::PlanLimit => "extend the plan of the Close organization, or free what is counted",
            Self::Forbidden => "let the user of the API key read and write Leads and Contacts in Close",
            Self::Unreachable => "check the network, and whether Close is down (its status page)",
            Self::Failing => {
                "check whether Close is down (its status page); if only certain messages fail, stop those who publish them"
            }
            Self::LookupField => "`close-sync check` tells what is wrong with the lookup fields",
        }
    }

    /// The label in logs, metrics and `/readyz`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::PlanLimit => "plan_limit",
            Self::Forbidden => "forbidden",
            Self::Unreachable => "unreachable",
            Self::Failing => "failing",
            Self::LookupField => "lookup_field",
        }
    }
}

/// A sync that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Where.
    pub stage: Stage,
    /// What Close said.
    pub error: CloseError,
}
