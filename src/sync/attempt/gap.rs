//! Closing a gap: a plan that needs proof of what does not exist waits until search has shown enough, or the event log
//! answers ([`crate::sync::lag_guard`]).

use std::collections::HashSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;
use uuid::Uuid;

use crate::close::{Api, Created, CreatedIds};
use crate::domain::decision::Decision;
use crate::domain::journal::{ChangeKind, Entry, KeyHash, RecordId};
use crate::domain::mapping::{Identity, Key, KeyFields};
use crate::domain::matching::{self, Found, compare, match_lead};
use crate::domain::record::{Contact, Lead};
use crate::domain::time;
use crate::sync::attempt::Attempts;
use crate::sync::context::Context;
use crate::sync::id_cache::Change;
use crate::sync::journal;
use crate::sync::lag_guard::{Gap, Pending};
use crate::sync::lookups::Reads;
use crate::waits::WaitCause;

/// What the attempts at a message remember while they repeat a look-up because search may have missed a record.
#[derive(Default)]
pub(crate) struct GapWait {
    looks: u32,
    event_log: AskedEventLog,
    /// Records that a look-up has read, or that the event log had shown before it. If it did not find them, they are gone, or
    /// somebody else's: the event log says nothing new of them.
    looked_at: HashSet<String>,
    /// What the event log has shown since the last look-up began. The id cache may have no room for it.
    shown: HashSet<String>,
    /// The creations without an answer that the rest is about.
    operations: Vec<Uuid>,
    pub(super) wanted_to_create: bool,
}

impl GapWait {
    /// A look-up begins.
    pub(super) fn looks_up(&mut self) {
        self.looked_at.extend(self.shown.drain());
    }

    /// It has ended. A Contact that is known by its email is not read where the user id decides.
    pub(super) fn has_looked_up(&mut self, reads: &Reads, decision: &Decision) {
        self.looked_at.extend(reads.keys().cloned());
        let gone =
            decision.candidates.iter().filter(|candidate| candidate.verdict == matching::Verdict::Gone);
        self.looked_at.extend(gone.map(|candidate| candidate.id.clone()));
    }

    /// The look-up is about these creations. For others than before, the log is asked from the beginning.
    fn is_about(&mut self, pending: &[(Uuid, Pending)]) {
        let operations: Vec<Uuid> = pending.iter().map(|(operation, _)| *operation).collect();
        if self.operations != operations {
            self.operations = operations;
            (self.looks, self.event_log) = (0, AskedEventLog::NotYet);
        }
    }

    /// The pause before the next look-up: longer each time, because each costs a search.
    fn backoff(&mut self) -> Duration {
        self.looks = self.looks.saturating_add(1);
        MAX_LOOK_INTERVAL.min(FIRST_LOOK_INTERVAL.saturating_mul(2_u32.saturating_pow(self.looks - 1)))
    }

    /// At first, because a creation that happened shows soon, and again once it must show.
    fn asks_event_log(&mut self, must_show: bool) -> bool {
        match self.event_log {
            AskedEventLog::NotYet => {
                self.event_log = AskedEventLog::Asked;
                true
            }
            AskedEventLog::Asked => must_show,
            AskedEventLog::TooLong => false,
        }
    }
}

/// What the event log has said about the creations so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum AskedEventLog {
    #[default]
    NotYet,
    Asked,
    /// Since the creation must show, it had more entries than are read. It only gets longer.
    TooLong,
}

/// What the event log says about a creation.
enum InEventLog {
    Found,
    Absent,
    /// It has more entries than are read.
    TooLong,
    /// It did not answer.
    Unknown,
}

/// The event log is read from this long before a creation was sent until this long after its end, because clocks differ.
const CLOCK_MARGIN: Duration = Duration::from_mins(3);
/// Close's clock may differ this much from ours.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_secs(60);
/// Between two look-ups while search may have missed a record.
const FIRST_LOOK_INTERVAL: Duration = Duration::from_secs(2);
const MAX_LOOK_INTERVAL: Duration = Duration::from_mins(1);

fn is_companys(lead: &Lead, person: &Identity, keys: &KeyFields) -> bool {
    let company = person.company_id.as_deref();
    company.is_some_and(|company| match_lead(lead, company, keys) == matching::Verdict::SameCompany)
}

impl<C: Api> Attempts<'_, C> {
    /// Looks into the event log, or waits until there is reason to look up again. A dry run does not wait: returns false.
    pub(super) async fn close_gap(&mut self, gap: &Gap, pending: &[(Uuid, Pending)], found: &Found) -> bool {
        let Context { settings, lag_guard, search_lag, client, keys, .. } = self.context;
        let hashes = KeyHash::of_all(&self.keys);
        let concerns = || {
            let gap = lag_guard.gap(&hashes, Instant::now(), None);
            (lag_guard.pending_with(&hashes), gap.map(|gap| gap.clock))
        };
        let before = concerns();
        self.gap_wait.is_about(pending);
        let mut next = Instant::now() + self.gap_wait.backoff();
        if let Some(pending_in) = gap.pending {
            // What is missing from the log by then did not happen.
            let shows_at = gap.over + settings.event_log_lag;
            let must_show = shows_at <= Instant::now();
            if self.gap_wait.asks_event_log(must_show) {
                match self.find_in_event_log(pending_in, found).await {
                    InEventLog::Found => return true,
                    InEventLog::Absent if must_show => {
                        self.settle_all(pending, found);
                        return true;
                    }
                    InEventLog::TooLong if must_show => self.gap_wait.event_log = AskedEventLog::TooLong,
                    InEventLog::TooLong | InEventLog::Absent | InEventLog::Unknown => {}
                }
            }
            if !must_show {
                next = next.min(shows_at);
            }
        }
        if !self.writes() {
            return false;
        }
        for (kind, from) in lag_guard.lacks_proof() {
            search_lag.need_proof(client, keys, kind, from);
        }
        next = next.min(gap.clock.max(Instant::now()));
        let _waiting = self.client.waits().start(WaitCause::Search);
        let changed = async {
            loop {
                let progress = lag_guard.progress();
                // Creations of others are settled all the time, and each look-up costs a search.
                if concerns() != before {
                    return;
                }
                progress.await;
            }
        };
        let _ = tokio::time::timeout_at(next, changed).await;
        true
    }

    /// Search has been proven to show what these creations have created, and shows no more than was found. The proof assumes
    /// that it is in order, so the event log is asked, too. Returns whether to look up again: it knows more, or does not answer
    /// yet. It may not show the creations before [`crate::sync::Settings::event_log_lag`].
    pub(super) async fn event_log_disagrees(&mut self, pending: &[(Uuid, Pending)], found: &Found) -> bool {
        self.gap_wait.is_about(pending);
        let span = pending.iter().map(|(_, pending)| (pending.sent, pending.ends));
        let span = span.reduce(|(sent, ends), (since, until)| (sent.min(since), ends.max(until)));
        let Some((since, until)) = span.filter(|_| self.gap_wait.event_log != AskedEventLog::TooLong) else {
            return false;
        };
        match self.find_in_event_log((since, until), found).await {
            InEventLog::Found => {
                self.gap_wait.wanted_to_create = true;
                true
            }
            InEventLog::Absent | InEventLog::TooLong => false,
            InEventLog::Unknown => {
                let shows_at = until.saturating_add(self.context.settings.event_log_lag);
                let must_show = shows_at.is_ok_and(|shows_at| shows_at <= self.context.now());
                if must_show || !self.writes() {
                    return false;
                }
                let pause = tokio::time::sleep(self.gap_wait.backoff());
                self.client.waits().during(WaitCause::Search, pause).await;
                true
            }
        }
    }

    /// Settles the creations without an answer that have created a record that was found. One that was known before the first
    /// attempt may be something else's.
    pub(super) fn settle_found(&self, pending: &[(Uuid, Pending)], found: &Found) {
        for (operation, pending) in pending {
            let records = self.created_meanwhile(pending, found);
            if !records.iter().all(|record| self.known.contains(record.as_str())) {
                // A Lead comes with a Contact. Where only the Lead was found, the Contact is still to be found.
                let has_contact = records.iter().any(|record| matches!(record, RecordId::Contact(_)));
                let is_clear = |key: &&Key| has_contact || matches!(key, Key::Company(_));
                let keys: Vec<Key> = self.keys.iter().filter(is_clear).cloned().collect();
                self.settle(*operation, pending, records, &keys);
            }
        }
    }

    /// The records that were found and that a creation without an answer may be for: they were created meanwhile. A new Lead has
    /// the company id from the beginning, and its Contact is in it. Without the company id it may be a Lead that a person has just
    /// made, or taken from another company. Where the event has none, the Contact tells.
    fn created_meanwhile(&self, pending: &Pending, found: &Found) -> Vec<RecordId> {
        let (person, keys) = (&self.desired.identity, &self.context.keys);
        let was_meanwhile = |date_created: &str| {
            time::read_back(date_created).is_some_and(|created| {
                let since_sent = created.duration_since(pending.sent);
                since_sent >= -CLOCK_SKEW && created.duration_since(pending.ends) <= CLOCK_SKEW
            })
        };
        let (leads, contacts) = found.records();
        let leads = leads.filter(|lead| pending.creates_lead && was_meanwhile(&lead.date_created));
        let leads: Vec<_> = leads.filter(|lead| is_companys(lead, person, keys)).collect();
        let company = person.company_id.clone().map(|id| KeyHash::of(&Key::Company(id)));
        let needs_lead = pending.creates_lead && company.is_some_and(|key| pending.keys.contains(&key));
        let contacts = contacts.filter(|_| !needs_lead || !leads.is_empty());
        let contacts = contacts.filter(|contact| was_meanwhile(&contact.date_created));
        let leads = leads.iter().map(|lead| RecordId::Lead(lead.id.clone()));
        leads.chain(contacts.map(|contact| RecordId::Contact(contact.id.clone()))).collect()
    }

    /// These creations have created nothing but what was found.
    pub(super) fn settle_all(&self, pending: &[(Uuid, Pending)], found: &Found) {
        for (operation, pending) in pending {
            self.settle(*operation, pending, self.created_meanwhile(pending, found), &self.keys);
        }
    }

    /// It is known what came of a creation as far as these keys are concerned. The next worker must know the records as well:
    /// search may not show them yet.
    fn settle(&self, operation: Uuid, pending: &Pending, records: Vec<RecordId>, keys: &[Key]) {
        let person = &self.desired.identity;
        let change = Change { kind: ChangeKind::Creation, at: pending.sent };
        let entries = records.into_iter().map(|record| {
            let keys: Vec<Key> = match &record {
                RecordId::Lead(_) => person.company_id.clone().map(Key::Company).into_iter().collect(),
                RecordId::Contact(_) => person.person().collect(),
            };
            let keys = KeyHash::of_all(&keys);
            self.context.id_cache.changed(&keys, &record, change);
            journal::keys(record, keys, change)
        });
        let mut entries: Vec<Entry> = entries.collect();
        if self.context.lag_guard.settle_for(operation, &KeyHash::of_all(keys)) {
            entries.push(Entry::Settled { operation });
        }
        self.run.journal.append(entries);
    }

    /// Looks in the event log for records with these keys that the look-up did not find, and caches their ids.
    async fn find_in_event_log(
        &mut self,
        (since, until): (Timestamp, Timestamp),
        found: &Found,
    ) -> InEventLog {
        let Context { id_cache, keys, client, .. } = self.context;
        let span = (since.checked_sub(client.timeout() + CLOCK_MARGIN), until.checked_add(CLOCK_MARGIN));
        let (Ok(since), Ok(until)) = span else { return InEventLog::Unknown };
        let Ok(Created { leads, contacts, complete }) = self.client.created_between(since, until).await
        else {
            return InEventLog::Unknown;
        };
        let person = &self.desired.identity;
        let known_contacts: Vec<&str> = found.records().1.map(|contact| contact.id.as_str()).collect();
        // A Lead that would be adopted is not the company's yet.
        let has_lead = found.records().0.any(|lead| is_companys(lead, person, keys));
        let is_lead = |lead: &Lead| !has_lead && is_companys(lead, person, keys);
        let is_person = |contact: &Contact| {
            compare(contact, person, keys).is_person() && !known_contacts.contains(&contact.id.as_str())
        };
        let is_new = |id: &str| !self.gap_wait.looked_at.contains(id);
        let lead = leads.into_iter().find(|lead| is_lead(lead) && is_new(lead.id.as_str()));
        let contact = contacts.into_iter().find(|contact| is_person(contact) && is_new(contact.id.as_str()));
        if lead.is_none() && contact.is_none() {
            return if complete { InEventLog::Absent } else { InEventLog::TooLong };
        }
        let created =
            CreatedIds { lead: lead.map(|lead| lead.id), contact: contact.map(|contact| contact.id) };
        self.gap_wait.shown.extend(created.lead.iter().map(ToString::to_string));
        self.gap_wait.shown.extend(created.contact.iter().map(ToString::to_string));
        id_cache.remember_created(person, created, false);
        InEventLog::Found
    }
}
