//! Whether "not found" means that a record does not exist. Search lags, for hours at times (close-api.md §15, 1), so a
//! clock cannot tell.
//!
//! Records that we created or gave keys to are in the id cache until search shows them. What remains:
//!
//! - **Pending creations.** A creation was sent, by this worker or one before it, and no answer arrived. It may have
//!   happened. A message that learns what came of it learns that for its own keys only: it does not look for the other
//!   person of a creation that has its company id.
//! - **Forgotten changes.** There was no room for them, or a worker without a journal made them.
//!
//! Search is proven to show these when it has shown a change of ours that is younger ([`LagGuard::shown`]). Search is in
//! order only roughly, so the change must be younger by the usual lag of search. The wait without such proof is the last
//! resort, and only where nothing else can prove it: [`Gap::clock`].

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use strum::VariantArray;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::domain::journal::{ChangeKind, KeyHash};

/// The longest lag of search that was seen is 18 hours (close-api.md §15, 1). Without any proof, search counts as complete
/// after this.
pub const LONGEST_SEARCH_LAG: Duration = Duration::from_hours(24);

/// More pending creations than this are remembered only by their time.
const MAX_PENDING: usize = 50_000;

/// What one worker knows about the lag of search. Shared by all messages.
#[derive(Debug, Default)]
pub struct LagGuard {
    state: Mutex<State>,
    progress: Notify,
}

#[derive(Clone, Debug, Default)]
struct State {
    pending: HashMap<Uuid, (Pending, Instant)>,
    by_key: HashMap<KeyHash, Vec<Uuid>>,
    /// Changes up to this time are forgotten, by kind.
    forgotten: [Option<Forgotten>; ChangeKind::VARIANTS.len()],
    /// The youngest change that search has shown, by kind.
    shown: [Option<Shown>; ChangeKind::VARIANTS.len()],
    /// Search may show a change this much later than a younger one.
    disorder: SignedDuration,
}

/// A creation without an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    pub keys: Vec<KeyHash>,
    /// Of a Lead with its Contact, not of a Contact in an existing Lead.
    pub creates_lead: bool,
    /// When it was sent.
    pub sent: Timestamp,
    /// After this time it can no longer happen.
    pub ends: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Forgotten {
    until: Timestamp,
    /// Without proof the changes count as shown from then on.
    clock: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shown {
    change: Timestamp,
    /// When the search was sent.
    searched: Instant,
}

/// Changes that search may not show yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// When the first pending creation was sent. `None` where only forgotten changes matter.
    pub pending_since: Option<Timestamp>,
    /// When the last change took effect, at the latest.
    pub until: Timestamp,
    /// Without proof search counts as complete from then on.
    pub clock: Instant,
}

impl LagGuard {
    /// A guard for a search whose changes may overtake each other by `disorder`.
    pub fn new(disorder: Duration) -> Self {
        let disorder = SignedDuration::try_from(disorder).unwrap_or(SignedDuration::MAX);
        Self { state: Mutex::new(State { disorder, ..State::default() }), progress: Notify::new() }
    }

    /// A copy for a rehearsal.
    pub(crate) fn for_rehearsal(&self) -> Self {
        Self { state: Mutex::new(self.with(|state| state.clone())), progress: Notify::new() }
    }

    fn with<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A creation is about to be sent. The same operation again replaces its times.
    pub fn begin(&self, operation: Uuid, pending: Pending) {
        self.with(|state| state.begin(operation, pending));
    }

    /// A creation may still happen up to this time.
    pub fn extend(&self, operation: Uuid, ends: Timestamp) {
        self.with(|state| {
            if let Some((pending, clock)) = state.pending.get_mut(&operation) {
                *clock = Instant::now() + LONGEST_SEARCH_LAG;
                pending.ends = pending.ends.max(ends);
            }
        });
    }

    /// Close answered the creation, or refused it.
    pub fn settle(&self, operation: Uuid) {
        self.with(|state| state.settle(operation));
        self.progress.notify_waiters();
    }

    /// For these keys it is known what came of the creation. Returns whether no other key remains.
    pub fn settle_for(&self, operation: Uuid, keys: &[KeyHash]) -> bool {
        let is_settled = self.with(|state| state.settle_for(operation, keys));
        self.progress.notify_waiters();
        is_settled
    }

    /// Changes of this kind up to a time are not remembered.
    pub fn forget(&self, kind: ChangeKind, until: Timestamp, clock: Instant) {
        self.with(|state| state.forget(kind, until, clock));
    }

    /// Search has shown a change. `searched`: when that search was sent.
    pub fn shown(&self, kind: ChangeKind, change: Timestamp, searched: Instant) {
        self.with(|state| {
            let shown = &mut state.shown[kind as usize];
            if shown.is_none_or(|before| before.change < change) {
                *shown = Some(Shown { change, searched });
            }
        });
        self.progress.notify_waiters();
    }

    /// Whether a search for these keys that was sent at `searched` may have missed a record. `except`: the caller's own
    /// creation.
    pub fn gap(&self, keys: &[KeyHash], searched: Instant, except: Option<Uuid>) -> Option<Gap> {
        self.with(|state| state.gap(keys, searched, except))
    }

    /// The creations without an answer that share a key.
    pub fn pending_with(&self, keys: &[KeyHash]) -> Vec<(Uuid, Pending)> {
        self.with(|state| {
            let mut operations: Vec<Uuid> =
                keys.iter().filter_map(|key| state.by_key.get(key)).flatten().copied().collect();
            operations.sort_unstable();
            operations.dedup();
            let pending = |id: Uuid| Some((id, state.pending.get(&id)?.0.clone()));
            operations.into_iter().filter_map(pending).collect()
        })
    }

    /// The forgotten changes that search has not been proven to show, the newest of each kind.
    pub fn forgotten(&self) -> Option<Timestamp> {
        let now = Instant::now();
        self.with(|state| {
            let kinds = ChangeKind::VARIANTS.iter();
            kinds.filter_map(|kind| Some(state.forgotten(*kind, now)?.until)).max()
        })
    }

    /// The creations without an answer, for the next worker.
    pub fn pending(&self) -> Vec<(Uuid, Pending)> {
        self.with(|state| state.pending.iter().map(|(id, (pending, _))| (*id, pending.clone())).collect())
    }

    /// The changes that are certainly shown by now: younger ones than these may be missing.
    pub fn shows_up_to(&self, kind: ChangeKind) -> Option<Timestamp> {
        self.with(|state| state.shown[kind as usize]?.change.checked_sub(state.disorder).ok())
    }

    /// Waits until something is learnt about the lag.
    pub async fn progress(&self) {
        self.progress.notified().await;
    }
}

impl State {
    fn begin(&mut self, operation: Uuid, pending: Pending) {
        if !self.pending.contains_key(&operation) {
            self.make_room();
            for key in &pending.keys {
                self.by_key.entry(*key).or_default().push(operation);
            }
        }
        self.pending.insert(operation, (pending, Instant::now() + LONGEST_SEARCH_LAG));
    }

    fn settle(&mut self, operation: Uuid) {
        let keys = self.pending.get(&operation).map(|(pending, _)| pending.keys.clone());
        self.settle_for(operation, &keys.unwrap_or_default());
    }

    fn settle_for(&mut self, operation: Uuid, keys: &[KeyHash]) -> bool {
        let Some((pending, _)) = self.pending.get_mut(&operation) else { return false };
        pending.keys.retain(|key| !keys.contains(key));
        let is_settled = pending.keys.is_empty();
        if is_settled {
            self.pending.remove(&operation);
        }
        for key in keys {
            if let Some(operations) = self.by_key.get_mut(key) {
                operations.retain(|known| *known != operation);
                if operations.is_empty() {
                    self.by_key.remove(key);
                }
            }
        }
        is_settled
    }

    /// Forgets all but the youngest half.
    fn make_room(&mut self) {
        if self.pending.len() < MAX_PENDING {
            return;
        }
        let mut by_age: Vec<(Timestamp, Uuid)> =
            self.pending.iter().map(|(id, (pending, _))| (pending.ends, *id)).collect();
        by_age.sort_unstable();
        by_age.truncate(MAX_PENDING / 2);
        if let Some((until, _)) = by_age.last() {
            self.forget(ChangeKind::Creation, *until, Instant::now() + LONGEST_SEARCH_LAG);
        }
        for (_, operation) in by_age {
            self.settle(operation);
        }
    }

    fn forget(&mut self, kind: ChangeKind, until: Timestamp, clock: Instant) {
        let before = self.forgotten(kind, Instant::now());
        let clock = before.map_or(clock, |before| before.clock.max(clock));
        let until = before.map_or(until, |before| before.until.max(until));
        self.forgotten[kind as usize] = Some(Forgotten { until, clock });
    }

    /// Search has been proven to show all changes up to `until`, in every search that was sent at the returned time or later.
    fn proof(&self, kind: ChangeKind, until: Timestamp) -> Option<Instant> {
        let shown = self.shown[kind as usize]?;
        let is_younger = shown.change.duration_since(until) >= self.disorder;
        is_younger.then_some(shown.searched)
    }

    fn forgotten(&self, kind: ChangeKind, searched: Instant) -> Option<Forgotten> {
        let forgotten = self.forgotten[kind as usize]?;
        let is_proven = self.proof(kind, forgotten.until).is_some_and(|from| searched >= from);
        (!is_proven && searched < forgotten.clock).then_some(forgotten)
    }

    fn gap(&self, keys: &[KeyHash], searched: Instant, except: Option<Uuid>) -> Option<Gap> {
        let forgotten = ChangeKind::VARIANTS.iter().filter_map(|kind| self.forgotten(*kind, searched));
        let mut gap: Option<Gap> = None;
        for Forgotten { until, clock } in forgotten {
            gap = Some(Gap { pending_since: None, until, clock }.and(gap));
        }
        let operations = keys.iter().filter_map(|key| self.by_key.get(key)).flatten();
        let pending = operations.filter(|id| except != Some(**id)).filter_map(|id| self.pending.get(id));
        for (Pending { sent, ends, .. }, clock) in pending.filter(|(_, clock)| searched < *clock) {
            let proof = self.proof(ChangeKind::Creation, *ends);
            if proof.is_none_or(|from| searched < from) {
                gap = Some(Gap { pending_since: Some(*sent), until: *ends, clock: *clock }.and(gap));
            }
        }
        gap
    }
}

impl Gap {
    fn and(self, other: Option<Self>) -> Self {
        let Some(other) = other else { return self };
        let since = self.pending_since.into_iter().chain(other.pending_since).min();
        Self { pending_since: since, until: self.until.max(other.until), clock: self.clock.max(other.clock) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::mapping::Key;

    const DISORDER: Duration = Duration::from_secs(20);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn key(text: &str) -> KeyHash {
        KeyHash::of(&Key::User(text.into()))
    }

    fn pending(keys: &[&str], sent: i64) -> Pending {
        Pending {
            keys: keys.iter().map(|text| key(text)).collect(),
            creates_lead: true,
            sent: at(sent),
            ends: at(sent + 30),
        }
    }

    fn last_resort() -> Instant {
        Instant::now() + LONGEST_SEARCH_LAG
    }

    #[tokio::test(start_paused = true)]
    async fn a_pending_creation_concerns_its_keys_until_search_has_shown_a_younger_one() {
        let guard = LagGuard::new(DISORDER);
        let operation = Uuid::from_u128(1);
        guard.begin(operation, pending(&["a", "b"], 100));
        let gap = Gap { pending_since: Some(at(100)), until: at(130), clock: last_resort() };
        let searched = Instant::now();
        assert_eq!(guard.gap(&[key("b"), key("c")], searched, None), Some(gap));
        assert_eq!(guard.gap(&[key("c")], searched, None), None);
        assert_eq!(guard.gap(&[key("a")], searched, Some(operation)), None, "the caller's own");

        tokio::time::advance(Duration::from_mins(1)).await;
        let later = Instant::now();
        guard.shown(ChangeKind::KeyChange, at(500), later);
        guard.shown(ChangeKind::Creation, at(149), later);
        assert_eq!(guard.gap(&[key("a")], later, None), Some(gap), "may have been overtaken by it");
        guard.shown(ChangeKind::Creation, at(150), later);
        assert_eq!(guard.gap(&[key("a")], later, None), None);
        assert_eq!(guard.gap(&[key("a")], searched, None), Some(gap), "an older search proves nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_settled_creation_concerns_nobody() {
        let guard = LagGuard::new(DISORDER);
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        guard.begin(one, pending(&["a"], 100));
        guard.begin(two, pending(&["a"], 200));
        guard.settle(two);
        let gap = Gap { pending_since: Some(at(100)), until: at(130), clock: last_resort() };
        assert_eq!(guard.gap(&[key("a")], Instant::now(), None), Some(gap), "an earlier one stays pending");
        guard.settle(one);
        assert_eq!(guard.gap(&[key("a")], Instant::now(), None), None);
        assert!(guard.with(|state| state.pending.is_empty() && state.by_key.is_empty()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_creation_stays_pending_for_the_keys_that_nobody_looked_for() {
        let guard = LagGuard::new(DISORDER);
        let operation = Uuid::from_u128(1);
        guard.begin(operation, pending(&["a", "b"], 100));
        assert!(!guard.settle_for(operation, &[key("a"), key("c")]));
        assert_eq!(guard.gap(&[key("a")], Instant::now(), None), None);
        assert!(guard.gap(&[key("b")], Instant::now(), None).is_some());
        assert_eq!(guard.pending()[0].1.keys, [key("b")], "the next worker learns that");
        assert!(guard.settle_for(operation, &[key("b")]));
        assert!(guard.with(|state| state.pending.is_empty() && state.by_key.is_empty()));
    }

    #[tokio::test(start_paused = true)]
    async fn forgotten_changes_concern_all_keys_until_search_has_shown_younger_ones_of_each_kind() {
        let guard = LagGuard::new(DISORDER);
        guard.forget(ChangeKind::Creation, at(100), last_resort());
        guard.forget(ChangeKind::KeyChange, at(90), last_resort());
        let now = Instant::now();
        let gap = |until| Some(Gap { pending_since: None, until: at(until), clock: last_resort() });
        assert_eq!(guard.gap(&[key("a")], now, None), gap(100));
        guard.shown(ChangeKind::Creation, at(120), now);
        assert_eq!((guard.gap(&[key("a")], now, None), guard.forgotten()), (gap(90), Some(at(90))));
        guard.shown(ChangeKind::KeyChange, at(120), now);
        assert_eq!((guard.gap(&[key("a")], now, None), guard.forgotten()), (None, None));
    }

    #[tokio::test(start_paused = true)]
    async fn the_clock_is_the_last_resort() {
        let guard = LagGuard::new(DISORDER);
        let clock = Instant::now() + DISORDER;
        guard.forget(ChangeKind::Creation, at(100), clock);
        assert_eq!(guard.gap(&[], Instant::now(), None).unwrap().clock, clock);
        assert_eq!(guard.gap(&[], clock, None), None);
        guard.begin(Uuid::from_u128(1), pending(&["a"], 100));
        assert_eq!(guard.gap(&[key("a")], clock, None).unwrap().clock, last_resort());
        assert_eq!(guard.gap(&[key("a")], last_resort(), None), None);
    }

    #[tokio::test(start_paused = true)]
    async fn pending_creations_are_bounded_and_those_without_room_are_forgotten() {
        let guard = LagGuard::new(DISORDER);
        for number in 0..=MAX_PENDING {
            let sent = i64::try_from(number).unwrap();
            guard.begin(Uuid::from_u128(number as u128), pending(&[&number.to_string()], sent));
        }
        assert_eq!(guard.pending().len(), MAX_PENDING / 2 + 1);
        let until = i64::try_from(MAX_PENDING / 2).unwrap() - 1 + 30;
        assert_eq!(guard.gap(&[key("a")], Instant::now(), None).unwrap().until, at(until));
    }
}
