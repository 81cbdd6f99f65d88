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
//! order only roughly, so the change must be younger by the usual lag of search. Of a pending creation the event log is
//! asked as well before the proof counts. The wait without proof is the last resort, and only where nothing else can prove
//! it: [`Gap::clock`].

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use strum::VariantArray;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::Instant;
use uuid::Uuid;

use crate::close::Clock;
use crate::domain::journal::{ChangeKind, KeyHash};

/// The longest lag of search that was seen is 18 hours (close-api.md §15, 1). Without any proof, search counts as complete
/// after this.
pub const LONGEST_SEARCH_LAG: Duration = Duration::from_hours(24);

/// More pending creations than this are remembered only by their time.
const MAX_PENDING: usize = 50_000;

/// Shown changes that are remembered. Of older proofs only the time is lost: they then count from a later search on.
const MAX_SHOWN: usize = 100;

/// What one worker knows about the lag of search. Shared by all messages.
pub struct LagGuard {
    state: Mutex<State>,
    progress: Notify,
    /// How long a creation that was sent may take to happen.
    timeout: Duration,
    clock: Clock,
}

#[derive(Clone, Debug, Default)]
struct State {
    pending: HashMap<Uuid, Unanswered>,
    by_key: HashMap<KeyHash, Vec<Uuid>>,
    /// Changes up to this time are forgotten, by kind.
    forgotten: [Option<Forgotten>; ChangeKind::VARIANTS.len()],
    /// The last changes that search has shown, by kind: each is younger than the one before.
    shown: [VecDeque<Shown>; ChangeKind::VARIANTS.len()],
    /// Search may show a change this much later than a younger one.
    disorder: SignedDuration,
}

/// A pending creation, by the clock of this process.
#[derive(Clone, Debug)]
struct Unanswered {
    pending: Pending,
    /// An earlier search proves nothing about it.
    began: Instant,
    /// It can no longer happen.
    over: Instant,
    /// Without proof it counts as shown from then on.
    clock: Instant,
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
    /// When the search was answered. What a search shows that was sent before is not known.
    answered: Instant,
}

/// Changes that search may not show yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// When the first pending creation was sent, and when the last one ended. `None` where only forgotten changes matter.
    pub pending: Option<(Timestamp, Timestamp)>,
    /// When the last pending creation can no longer happen.
    pub over: Instant,
    /// Without proof search counts as complete from then on.
    pub clock: Instant,
}

impl fmt::Debug for LagGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with(|state| state.fmt(f))
    }
}

impl LagGuard {
    /// A guard for a search whose changes may overtake each other by `disorder`. A creation that was sent happens within
    /// `timeout`.
    pub fn new(disorder: Duration, timeout: Duration, clock: Clock) -> Self {
        let disorder = SignedDuration::try_from(disorder).unwrap_or(SignedDuration::MAX);
        let state = Mutex::new(State { disorder, ..State::default() });
        Self { state, progress: Notify::new(), timeout, clock }
    }

    /// A copy for a rehearsal.
    pub(crate) fn for_rehearsal(&self) -> Self {
        Self {
            state: Mutex::new(self.with(|state| state.clone())),
            progress: Notify::new(),
            timeout: self.timeout,
            clock: self.clock.clone(),
        }
    }

    fn with<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        let now = self.clock.now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.forget_proofs_after(now);
        with(&mut state)
    }

    /// A creation with these keys is about to be sent, or was sent at that time by another worker, which may still be
    /// sending it. The same operation again replaces its times.
    pub fn begin(&self, operation: Uuid, keys: Vec<KeyHash>, creates_lead: bool, sent: Timestamp) {
        let (began, ends) = (Instant::now(), self.ends());
        let (over, clock) = (began + self.timeout, self.last_resort(sent));
        let pending = Pending { keys, creates_lead, sent, ends };
        self.with(|state| state.begin(operation, Unanswered { pending, began, over, clock }));
    }

    /// A creation that was sent up to now, or is sent now, may still happen.
    pub fn extend(&self, operation: Uuid) {
        let (now, ends) = (Instant::now(), self.ends());
        self.with(|state| {
            if let Some(doubt) = state.pending.get_mut(&operation) {
                doubt.pending.ends = doubt.pending.ends.max(ends);
                doubt.over = now + self.timeout;
                doubt.clock = now + LONGEST_SEARCH_LAG;
            }
        });
    }

    fn ends(&self) -> Timestamp {
        self.clock.now().saturating_add(self.timeout).unwrap_or(Timestamp::MAX)
    }

    /// When search shows a change of this time even without proof.
    fn last_resort(&self, change: Timestamp) -> Instant {
        let age = Duration::try_from(self.clock.now().duration_since(change)).unwrap_or_default();
        Instant::now() + LONGEST_SEARCH_LAG.saturating_sub(age)
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

    /// Changes of this kind up to a time are not remembered. They count as shown `after` a while, even without proof.
    pub fn forget(&self, kind: ChangeKind, until: Timestamp, after: Duration) {
        self.with(|state| state.forget(kind, until, Instant::now() + after));
    }

    /// Changes of this kind up to a time are not remembered. They count as shown when search cannot lag as long.
    pub fn forget_up_to(&self, kind: ChangeKind, at: Timestamp) {
        let clock = self.last_resort(at);
        self.with(|state| state.forget(kind, at, clock));
    }

    /// Search has shown a change. `answered`: when the answer arrived. A change later than now has a wrong time and proves
    /// nothing.
    pub fn shown(&self, kind: ChangeKind, change: Timestamp, answered: Instant) {
        if change > self.clock.now() {
            return;
        }
        self.with(|state| {
            let shown = &mut state.shown[kind as usize];
            if shown.back().is_none_or(|before| before.change < change) {
                shown.push_back(Shown { change, answered });
                let too_many = shown.len().saturating_sub(MAX_SHOWN);
                shown.drain(..too_many);
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
            let pending = |id: Uuid| Some((id, state.pending.get(&id)?.pending.clone()));
            operations.into_iter().filter_map(pending).collect()
        })
    }

    /// Up to when changes of each kind are forgotten and search has not been proven to show them, and how long they count
    /// as not shown without proof.
    pub fn forgotten(&self) -> Vec<(ChangeKind, Timestamp, Duration)> {
        let now = Instant::now();
        let forgotten = |state: &State, kind: ChangeKind| {
            let Forgotten { until, clock, .. } = state.forgotten(kind, now)?;
            Some((kind, until, clock.duration_since(now)))
        };
        self.with(|state| ChangeKind::VARIANTS.iter().filter_map(|kind| forgotten(state, *kind)).collect())
    }

    /// The kinds of which changes are forgotten without proof, and since when a change is young enough to prove that search
    /// shows them.
    pub fn lacks_proof(&self) -> Vec<(ChangeKind, Timestamp)> {
        let disorder = self.with(|state| state.disorder);
        let forgotten = self.forgotten().into_iter();
        forgotten.filter_map(|(kind, until, _)| Some((kind, until.checked_add(disorder).ok()?))).collect()
    }

    /// The creations without an answer that search need not show yet, for the next worker.
    pub fn pending(&self) -> Vec<(Uuid, Pending)> {
        let now = Instant::now();
        self.with(|state| {
            let pending = state.pending.iter().filter(|(_, doubt)| now < doubt.clock);
            pending.map(|(id, doubt)| (*id, doubt.pending.clone())).collect()
        })
    }

    /// How many creations that can no longer happen have no answer, unless search has been proven to show them. Forgets those
    /// that search must show.
    pub fn unanswered(&self) -> usize {
        let now = Instant::now();
        self.with(|state| {
            state.drop_expired();
            let is_proven = |doubt: &Unanswered| state.settlement(doubt).is_some();
            state.pending.values().filter(|doubt| doubt.over <= now && !is_proven(doubt)).count()
        })
    }

    /// The changes that are certainly shown by now: younger ones than these may be missing.
    pub fn shows_up_to(&self, kind: ChangeKind) -> Option<Timestamp> {
        self.with(|state| state.shown[kind as usize].back()?.change.checked_sub(state.disorder).ok())
    }

    /// Completes once something is learnt about the lag after this call.
    pub fn progress(&self) -> Notified<'_> {
        self.progress.notified()
    }
}

impl State {
    /// The clock was ahead, so these prove nothing.
    fn forget_proofs_after(&mut self, now: Timestamp) {
        for shown in &mut self.shown {
            while shown.pop_back_if(|shown| shown.change > now).is_some() {}
        }
    }

    fn begin(&mut self, operation: Uuid, doubt: Unanswered) {
        if !self.pending.contains_key(&operation) {
            self.make_room();
            for key in &doubt.pending.keys {
                self.by_key.entry(*key).or_default().push(operation);
            }
        }
        self.pending.insert(operation, doubt);
    }

    fn settle(&mut self, operation: Uuid) {
        let keys = self.pending.get(&operation).map(|doubt| doubt.pending.keys.clone());
        self.settle_for(operation, &keys.unwrap_or_default());
    }

    fn settle_for(&mut self, operation: Uuid, keys: &[KeyHash]) -> bool {
        let Some(Unanswered { pending, .. }) = self.pending.get_mut(&operation) else { return false };
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

    /// Forgets those that search must show by now.
    fn drop_expired(&mut self) {
        let now = Instant::now();
        let expired = self.pending.iter().filter(|(_, doubt)| doubt.clock <= now).map(|(id, _)| *id);
        for operation in expired.collect::<Vec<_>>() {
            self.settle(operation);
        }
    }

    /// Forgets those that search must show by now, or else all but the youngest half.
    fn make_room(&mut self) {
        if self.pending.len() < MAX_PENDING {
            return;
        }
        self.drop_expired();
        if self.pending.len() < MAX_PENDING {
            return;
        }
        let mut by_age: Vec<(Timestamp, Uuid)> =
            self.pending.iter().map(|(id, doubt)| (doubt.pending.ends, *id)).collect();
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
    /// The first proof counts, or else a look-up would have to begin anew with each younger one. `after`: what was shown
    /// before proves nothing.
    fn proof(&self, kind: ChangeKind, until: Timestamp, after: Option<Instant>) -> Option<Instant> {
        let proves = |shown: &&Shown| {
            shown.change.duration_since(until) >= self.disorder
                && after.is_none_or(|after| shown.answered >= after)
        };
        self.shown[kind as usize].iter().find(proves).map(|shown| shown.answered)
    }

    /// Since when searches show what a pending creation has created. Clocks of workers differ, and may be set back.
    fn settlement(&self, doubt: &Unanswered) -> Option<Instant> {
        self.proof(ChangeKind::Creation, doubt.pending.ends, Some(doubt.began))
    }

    fn forgotten(&self, kind: ChangeKind, searched: Instant) -> Option<Forgotten> {
        let forgotten = self.forgotten[kind as usize]?;
        let is_proven = self.proof(kind, forgotten.until, None).is_some_and(|from| searched >= from);
        (!is_proven && searched < forgotten.clock).then_some(forgotten)
    }

    fn gap(&self, keys: &[KeyHash], searched: Instant, except: Option<Uuid>) -> Option<Gap> {
        let forgotten = ChangeKind::VARIANTS.iter().filter_map(|kind| self.forgotten(*kind, searched));
        let mut gap: Option<Gap> = None;
        for Forgotten { clock, .. } in forgotten {
            gap = Some(Gap { pending: None, over: searched, clock }.and(gap));
        }
        let operations = keys.iter().filter_map(|key| self.by_key.get(key)).flatten();
        let pending = operations.filter(|id| except != Some(**id)).filter_map(|id| self.pending.get(id));
        for doubt in pending.filter(|doubt| searched < doubt.clock) {
            if self.settlement(doubt).is_none_or(|from| searched < from) {
                let Unanswered { pending, over, clock, .. } = doubt;
                let span = Some((pending.sent, pending.ends));
                gap = Some(Gap { pending: span, over: *over, clock: *clock }.and(gap));
            }
        }
        gap
    }
}

impl Gap {
    fn and(self, other: Option<Self>) -> Self {
        let Some(other) = other else { return self };
        let pending = match (self.pending, other.pending) {
            (Some((sent, ends)), Some((since, until))) => Some((sent.min(since), ends.max(until))),
            (one, other) => one.or(other),
        };
        Self { pending, over: self.over.max(other.over), clock: self.clock.max(other.clock) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicI64;
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::domain::mapping::Key;

    const DISORDER: Duration = Duration::from_secs(20);
    const TIMEOUT: Duration = Duration::from_secs(30);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A guard and its wall clock, in seconds.
    fn guard() -> (LagGuard, Arc<AtomicI64>) {
        let now = Arc::new(AtomicI64::new(100));
        let clock = Arc::clone(&now);
        (LagGuard::new(DISORDER, TIMEOUT, Clock::new(move || at(clock.load(Relaxed)))), now)
    }

    fn key(text: &str) -> KeyHash {
        KeyHash::of(&Key::User(text.into()))
    }

    fn keys(texts: &[&str]) -> Vec<KeyHash> {
        texts.iter().map(|text| key(text)).collect()
    }

    fn last_resort() -> Instant {
        Instant::now() + LONGEST_SEARCH_LAG
    }

    #[tokio::test(start_paused = true)]
    async fn a_pending_creation_concerns_its_keys_until_search_has_shown_a_younger_one() {
        let (guard, now) = guard();
        let operation = Uuid::from_u128(1);
        guard.begin(operation, keys(&["a", "b"]), true, at(100));
        let searched = Instant::now();
        let gap = Gap { pending: Some((at(100), at(130))), over: searched + TIMEOUT, clock: last_resort() };
        assert_eq!(guard.gap(&keys(&["b", "c"]), searched, None), Some(gap));
        assert_eq!(guard.gap(&keys(&["c"]), searched, None), None);
        assert_eq!(guard.gap(&keys(&["a"]), searched, Some(operation)), None, "the caller's own");

        tokio::time::advance(Duration::from_mins(1)).await;
        now.store(1000, Relaxed);
        let later = Instant::now();
        guard.shown(ChangeKind::KeyChange, at(500), later);
        guard.shown(ChangeKind::Creation, at(149), later);
        assert_eq!(guard.gap(&keys(&["a"]), later, None), Some(gap), "may have been overtaken by it");
        assert_eq!(guard.unanswered(), 1);
        guard.shown(ChangeKind::Creation, at(150), later);
        assert_eq!((guard.gap(&keys(&["a"]), later, None), guard.unanswered()), (None, 0));
        assert_eq!(guard.gap(&keys(&["a"]), searched, None), Some(gap), "an older search proves nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_proof_is_not_taken_back_by_a_younger_one() {
        let (guard, now) = guard();
        guard.begin(Uuid::from_u128(1), keys(&["a"]), true, at(100));
        now.store(1000, Relaxed);
        tokio::time::advance(Duration::from_secs(1)).await;
        guard.shown(ChangeKind::Creation, at(150), Instant::now());
        let searched = Instant::now();
        for second in 151..500 {
            tokio::time::advance(Duration::from_millis(1)).await;
            guard.shown(ChangeKind::Creation, at(second), Instant::now());
            let is_remembered = second < 250;
            assert_eq!(guard.gap(&keys(&["a"]), searched, None).is_none(), is_remembered, "{second}");
        }
        assert_eq!(guard.gap(&keys(&["a"]), Instant::now(), None), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_ahead_or_was_set_back_proves_nothing() {
        let (guard, now) = guard();
        guard.shown(ChangeKind::Creation, at(500), Instant::now());
        assert_eq!(guard.shows_up_to(ChangeKind::Creation), None, "of the future");
        now.store(600, Relaxed);
        guard.shown(ChangeKind::Creation, at(500), Instant::now());
        assert_eq!(guard.shows_up_to(ChangeKind::Creation), Some(at(480)));
        now.store(100, Relaxed);
        assert_eq!(guard.shows_up_to(ChangeKind::Creation), None, "the clock was set back");
        guard.forget_up_to(ChangeKind::Creation, at(90));
        assert_eq!(guard.forgotten().len(), 1, "not proven");
        guard.shown(ChangeKind::Creation, at(99), Instant::now());
        assert_eq!(guard.shows_up_to(ChangeKind::Creation), Some(at(79)), "a proof again");
        tokio::time::advance(Duration::from_secs(1)).await;
        guard.begin(Uuid::from_u128(1), keys(&["a"]), true, at(100));
        assert!(guard.gap(&keys(&["a"]), Instant::now(), None).is_some(), "that search came before");
    }

    #[tokio::test(start_paused = true)]
    async fn a_settled_creation_is_no_gap() {
        let (guard, _) = guard();
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        guard.begin(one, keys(&["a"]), true, at(100));
        guard.begin(two, keys(&["a"]), true, at(200));
        guard.settle(two);
        let gap =
            Gap { pending: Some((at(100), at(130))), over: Instant::now() + TIMEOUT, clock: last_resort() };
        assert_eq!(guard.gap(&keys(&["a"]), Instant::now(), None), Some(gap), "an earlier one stays pending");
        guard.settle(one);
        assert_eq!(guard.gap(&keys(&["a"]), Instant::now(), None), None);
        assert!(guard.with(|state| state.pending.is_empty() && state.by_key.is_empty()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_creation_stays_pending_for_the_keys_that_were_not_looked_for() {
        let (guard, _) = guard();
        let operation = Uuid::from_u128(1);
        guard.begin(operation, keys(&["a", "b"]), true, at(100));
        assert!(!guard.settle_for(operation, &keys(&["a", "c"])));
        assert_eq!(guard.gap(&keys(&["a"]), Instant::now(), None), None);
        assert!(guard.gap(&keys(&["b"]), Instant::now(), None).is_some());
        assert_eq!(guard.pending()[0].1.keys, keys(&["b"]), "the next worker learns that");
        assert!(guard.settle_for(operation, &keys(&["b"])));
        assert!(guard.with(|state| state.pending.is_empty() && state.by_key.is_empty()));
    }

    #[tokio::test(start_paused = true)]
    async fn forgotten_changes_concern_all_keys_until_search_has_shown_younger_ones_of_each_kind() {
        let (guard, now) = guard();
        guard.forget_up_to(ChangeKind::Creation, at(100));
        guard.forget_up_to(ChangeKind::KeyChange, at(90));
        let searched = Instant::now();
        let late = Duration::from_secs(10);
        let forgotten = |kind, second, age| (kind, at(second), LONGEST_SEARCH_LAG.saturating_sub(age));
        let creations = forgotten(ChangeKind::Creation, 100, Duration::ZERO);
        let key_changes = forgotten(ChangeKind::KeyChange, 90, late);
        assert_eq!(guard.forgotten(), [creations, key_changes]);
        let clock = |age: Duration| guard.gap(&keys(&["a"]), searched, None).map(|gap| gap.clock + age);
        assert_eq!(clock(Duration::ZERO), Some(last_resort()));
        now.store(120, Relaxed);
        guard.shown(ChangeKind::Creation, at(120), searched);
        assert_eq!((clock(late), guard.forgotten()), (Some(last_resort()), vec![key_changes]));
        guard.shown(ChangeKind::KeyChange, at(120), searched);
        assert_eq!((clock(late), guard.forgotten()), (None, vec![]));
    }

    #[tokio::test(start_paused = true)]
    async fn an_eviction_of_what_search_has_long_shown_is_no_gap() {
        let (guard, now) = guard();
        now.store(500, Relaxed);
        guard.shown(ChangeKind::Creation, at(400), Instant::now());
        tokio::time::advance(Duration::from_secs(1)).await;
        guard.forget_up_to(ChangeKind::Creation, at(380));
        assert_eq!(guard.gap(&keys(&["a"]), Instant::now(), None), None);
        guard.forget_up_to(ChangeKind::Creation, at(381));
        assert!(guard.gap(&keys(&["a"]), Instant::now(), None).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn the_clock_is_the_last_resort() {
        let (guard, _) = guard();
        let clock = Instant::now() + DISORDER;
        guard.forget(ChangeKind::Creation, at(100), DISORDER);
        assert_eq!(guard.gap(&[], Instant::now(), None).unwrap().clock, clock);
        assert_eq!(guard.gap(&[], clock, None), None);
        guard.begin(Uuid::from_u128(1), keys(&["a"]), true, at(100));
        assert_eq!(guard.gap(&keys(&["a"]), clock, None).unwrap().clock, last_resort());
        assert_eq!(guard.gap(&keys(&["a"]), last_resort(), None), None);
        assert_eq!((guard.pending().len(), guard.unanswered()), (1, 0), "it may still happen");
        tokio::time::advance(TIMEOUT).await;
        assert_eq!(guard.unanswered(), 1);
        tokio::time::advance(LONGEST_SEARCH_LAG).await;
        assert_eq!(guard.pending(), [], "the next worker need not know");
        assert_eq!((guard.unanswered(), guard.with(|state| state.pending.len())), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn pending_creations_are_bounded_and_those_without_room_are_forgotten() {
        let (guard, now) = guard();
        for number in 0..=MAX_PENDING {
            let second = i64::try_from(number).unwrap();
            now.store(second, Relaxed);
            guard.begin(Uuid::from_u128(number as u128), keys(&[&number.to_string()]), true, at(second));
        }
        assert_eq!(guard.pending().len(), MAX_PENDING / 2 + 1);
        let until = i64::try_from(MAX_PENDING / 2).unwrap() - 1 + 30;
        assert_eq!(guard.forgotten()[0].1, at(until));
    }
}
