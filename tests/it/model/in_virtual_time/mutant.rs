//! Workers without one of the protections of the journal. The model must find what each of them does wrong.
//!
//! They are the real workers: the journal on the simulated broker lies to them.

use close_sync::domain::journal::{Batch, ChangeKind, Entry};
use jiff::{SignedDuration, Timestamp};
use strum::VariantArray;
use uuid::Uuid;

#[derive(Clone, Copy, Debug, PartialEq, Eq, VariantArray)]
pub(super) enum Mutant {
    /// Lacks nothing: the same histories do not kill it.
    Control,
    /// Does not write down a creation before it sends it.
    NoIntent,
    /// Does not write down which records it created.
    NoResult,
    /// Reads nothing of others after its own start.
    NoTail,
    /// Knows nothing of its predecessors.
    NoMemory,
    /// Takes for granted that search shows what is older than 20 seconds.
    ClockForEvidence,
}

const BELIEVED: SignedDuration = SignedDuration::from_secs(20);

impl Mutant {
    /// What arrives in the journal of what a worker appends.
    pub(super) fn appended(self, body: &[u8]) -> Vec<u8> {
        rewritten(body, |entry| match self {
            Self::NoIntent => !matches!(entry, Entry::Creating { .. }),
            Self::NoResult => !matches!(entry, Entry::Keys { change: ChangeKind::Creation, .. }),
            Self::Control | Self::NoTail | Self::NoMemory | Self::ClockForEvidence => true,
        })
    }

    /// What a worker reads. `started`: it has read its own start entry.
    pub(super) fn read(self, body: &[u8], session: Option<Uuid>, started: bool, now: Timestamp) -> Vec<u8> {
        let is_own = Batch::decode(body).is_ok_and(|batch| Some(batch.session) == session);
        rewritten(body, |entry| match self {
            _ if is_own => true,
            Self::Control | Self::NoIntent | Self::NoResult => true,
            Self::NoTail => !started,
            Self::NoMemory => started || matches!(entry, Entry::Start { .. }),
            Self::ClockForEvidence => match entry {
                Entry::Creating { at, .. } | Entry::Keys { at, .. } => now.duration_since(*at) < BELIEVED,
                Entry::Start { .. }
                | Entry::Settled { .. }
                | Entry::Written { .. }
                | Entry::Forgotten { .. }
                | Entry::CheckpointBegin { .. }
                | Entry::CheckpointEnd { .. } => true,
            },
        })
    }
}

fn rewritten(body: &[u8], keeps: impl Fn(&Entry) -> bool) -> Vec<u8> {
    let mut batch = Batch::decode(body).expect("a message of the journal");
    batch.entries.retain(keeps);
    batch.encode()
}
