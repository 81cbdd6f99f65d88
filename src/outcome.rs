//! The possible outcomes of a message, as closed lists. Logs, metrics and dead-letter headers share their labels.

use std::fmt;
use std::time::Duration;
use strum::{EnumDiscriminants, EnumString, IntoStaticStr, VariantArray};

use crate::close::{CloseError, ResponseExcerpt};
use crate::domain::event::NotForClose;
use crate::domain::plan::{Plan, Refusal, Step};
use crate::waits::WaitCause;

/// The label of a dead-lettered message.
pub const DEAD: &str = "dead";

/// The outcome of a delivery, which decides how the consumer settles it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The records in Close match the message: ack.
    Synced(Effect),
    /// There was nothing to do: ack.
    Skipped(Skip),
    /// Retry later: publish to a delay queue, then ack.
    Delayed {
        /// The index of the delay queue.
        level: usize,
        cause: DelayCause,
    },
    /// The message cannot succeed: publish to the dead-letter queue, then ack.
    Dead(DeadLetter),
    /// The message is not the cause: pause consumption and requeue the delivery.
    Paused(PauseCause),
}

impl Outcome {
    /// The label in metrics and in outcome events.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Synced(effect) => effect.label(),
            Self::Skipped(_) => "skipped",
            Self::Delayed { .. } => "delayed",
            Self::Dead(_) => DEAD,
            Self::Paused(_) => "handed_back",
        }
    }

    /// Whether the outcome shows that Close works. It then closes the circuit breaker.
    pub fn proves_close_works(&self) -> bool {
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
#[derive(Clone, Debug, PartialEq, Eq, EnumDiscriminants)]
#[strum_discriminants(
    name(DelayLabel),
    doc = "The causes without their details, for metrics.",
    derive(Hash, IntoStaticStr, VariantArray),
    strum(serialize_all = "snake_case")
)]
pub enum DelayCause {
    /// An attempt failed.
    Failed(String),
    /// An attempt failed for a reason that cannot be the message's.
    NotClose(String),
    /// The message was held for the longest time that a delivery may be held.
    Held(Held),
    /// An earlier message with a common key waits in a delay queue.
    BehindEarlier,
}

/// How a message spent the longest time that a delivery may be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The cause of the longest wait.
    pub cause: WaitCause,
    /// How long the message waited for that.
    pub waited: Duration,
    pub held: Duration,
}

impl DelayCause {
    /// All labels.
    pub fn labels() -> impl Iterator<Item = &'static str> {
        let held = WaitCause::VARIANTS.iter().map(|cause| cause.label());
        let others = DelayLabel::VARIANTS.iter().filter(|label| **label != DelayLabel::Held);
        others.map(Into::into).chain(held)
    }

    /// Whether the delay counts as an attempt.
    pub fn uses_attempt(&self) -> bool {
        match self {
            Self::Failed(_) => true,
            Self::NotClose(_) | Self::Held(_) | Self::BehindEarlier => false,
        }
    }

    /// The label in logs and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Held(held) => held.cause.label(),
            Self::Failed(_) | Self::NotClose(_) | Self::BehindEarlier => DelayLabel::from(self).into(),
        }
    }
}

impl fmt::Display for DelayCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(why) | Self::NotClose(why) => f.write_str(why),
            Self::Held(held) => held.fmt(f),
            Self::BehindEarlier => {
                f.write_str("an earlier message about the same person or company is delayed")
            }
        }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cause, waited, held } = self;
        let (held, waited) = (held.as_secs(), waited.as_secs());
        write!(f, "held for {held} s, {waited} s of it waiting for {}", cause.description())
    }
}

/// What a synced message changed in Close, ordered from the greatest change to the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Effect {
    /// A Lead was created, with its Contact unless the switches forbid it.
    Created,
    /// A Contact was added to an existing Lead.
    Added,
    /// Existing records were changed.
    Updated,
    /// The records already matched; nothing was written.
    Unchanged,
}

/// Why there was nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Skip {
    /// The event is not for Close.
    Event(NotForClose),
    /// The event identifies no person, and the configuration skips such events.
    Anonymous,
    /// The switches forbid every step.
    Switch(Refusal),
}

impl Skip {
    /// Every reason, for metrics.
    pub fn all() -> impl Iterator<Item = Self> {
        let events = NotForClose::VARIANTS.iter().copied().map(Self::Event);
        let switches = Refusal::VARIANTS.iter().copied().map(Self::Switch);
        events.chain([Self::Anonymous]).chain(switches)
    }

    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Event(reason) => reason.label(),
            Self::Anonymous => "anonymous",
            Self::Switch(refusal) => refusal.label(),
        }
    }
}

impl Outcome {
    /// The outcome of a message whose plan was executed as far as the switches allow.
    pub fn of(plan: &Plan, effect: Effect) -> Self {
        match plan.refused.first() {
            Some(refusal) if effect == Effect::Unchanged => Self::Skipped(Skip::Switch(*refusal)),
            Some(_) | None => Self::Synced(effect),
        }
    }
}

impl Effect {
    /// The effect of a step that Close accepted.
    pub fn of(step: &Step) -> Self {
        match step {
            Step::CreateLead { .. } => Self::Created,
            Step::CreateContact { .. } => Self::Added,
            Step::UpdateLead { .. } | Step::UpdateContact { .. } => Self::Updated,
        }
    }

    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Why a message is dead-lettered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    pub reason: Reason,
    pub stage: Stage,
    /// The error message, without personal data.
    pub error: String,
    /// The field that Close rejected, if it named one. For a malformed event, a label of what is wrong.
    pub field: Option<String>,
    /// The [`crate::domain::decision::Decision::summary`], if processing got that far.
    pub decision: Option<String>,
    /// The response of Close.
    pub response: Option<ResponseExcerpt>,
}

impl DeadLetter {
    /// Reason, stage and field: the same for all messages that failed in the same way.
    pub fn fingerprint(&self) -> String {
        let field = self.field.as_deref().unwrap_or("-");
        format!("{}:{}:{field}", self.reason.label(), self.stage.label())
    }
}

/// The reason of a dead letter.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, EnumString, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case")]
pub enum Reason {
    /// The body is not a valid event.
    Malformed,
    /// The event identifies no person.
    NoIdentity,
    /// Close rejected a value.
    Rejected,
    /// The user of the API key lacks a permission.
    Forbidden,
    /// In every attempt, the record that was found was gone.
    NotFound,
    /// Every attempt failed.
    Exhausted,
    /// A bug in close-sync.
    Internal,
}

impl Reason {
    /// The label in logs, metrics and headers.
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// What the operator can do.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Malformed => {
                "have the producer send a JSON object as the README describes, and discard this message"
            }
            Self::NoIdentity => {
                "have the producer send `userId` or a valid `traits.email`, and discard this message"
            }
            Self::Rejected => {
                "fix the field that Close named: in Close, in the mapping, or in the message with `dlq edit`; then replay. To see \
                 Close's full answer, replay one message with `dlq replay --id`"
            }
            Self::Forbidden => "give the user of the API key the permission in Close, then replay",
            Self::NotFound => "replay: the record was deleted or merged while the message was processed",
            Self::Exhausted => "replay when Close is available again",
            Self::Internal => "report the error with the version of close-sync; replay after an upgrade",
        }
    }
}

/// The stage of processing in which a message failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Stage {
    /// Reading the body.
    Decode,
    /// Mapping the event to the fields of Close.
    Map,
    /// Looking up records in Close.
    LookUp,
    /// Writing to Close.
    Write,
}

impl Stage {
    /// The label in logs and headers.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Why consumption is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum PauseCause {
    /// Close rejects the API key.
    Unauthorized,
    /// The organization has reached a limit of its Close plan.
    PlanLimit,
    /// The user of the API key has no access at all.
    Forbidden,
    /// Close cannot be reached.
    Unreachable,
    /// Close answers, but most messages fail.
    Failing,
    /// A lookup field was deleted or has another type.
    LookupField,
}

impl PauseCause {
    /// Whether a successful probe ends the pause. Otherwise only a message that succeeds ends it.
    pub fn ends_with_probe(self) -> bool {
        match self {
            Self::Unauthorized | Self::Unreachable | Self::LookupField => true,
            Self::PlanLimit | Self::Forbidden | Self::Failing => false,
        }
    }

    /// What the operator can do.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Unauthorized => {
                "set `close.api_key` to a key that is valid in Close, then send SIGHUP or restart"
            }
            Self::PlanLimit => {
                "upgrade the plan of the Close organization, or delete what counts towards its limit"
            }
            Self::Forbidden => {
                "give the user of the API key permission to read and write Leads and Contacts in Close"
            }
            Self::Unreachable => {
                "check the network, proxies and `close.api_url`, and on Close's status page whether Close is down"
            }
            Self::Failing => {
                "if the last failure names a proxy or a redirect, check these and `close.api_url`; else check on Close's status \
                 page whether it is down; if only certain messages fail, stop their producers"
            }
            Self::LookupField => "run `close-sync check`, which reports what is wrong with the lookup fields",
        }
    }

    /// The label in logs, metrics and `/readyz`.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// A failed attempt to sync a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub stage: Stage,
    pub error: CloseError,
}
