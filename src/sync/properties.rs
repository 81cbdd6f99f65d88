//! Property tests of matching on random records in memory: look up, decide, apply, and look up again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::FutureExt;
use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Value, json};
use strum::VariantArray;
use tokio::time::Instant;

use crate::close::in_memory::InMemoryRecords;
use crate::close::{Clock, CloseError, CreatedIds};
use crate::domain::decision::Decision;
use crate::domain::event::Event;
use crate::domain::mapping::tests::{rules, schema};
use crate::domain::mapping::{Desired, Mapping, WriteRule};
use crate::domain::matching::{Case, MAX_CONTACTS, compare};
use crate::domain::phone::Country;
use crate::domain::plan::Step;
use crate::domain::record::{
    Channel, Contact, ContactId, Entry, Field, FieldId, Fields, Lead, LeadId, Lists,
};
use crate::domain::repeat::Part;
use crate::domain::schema::FieldRef;
use crate::domain::staleness::FieldHash;
use crate::domain::switches::Switches;
use crate::sync::applied_cache::{AppliedCache, AppliedEvent};
use crate::sync::id_cache::IdCache;
use crate::sync::lag_guard::LagGuard;
use crate::sync::lookups::{Lookups, Reads};
use crate::sync::readback_cache::ReadbackCache;
use crate::sync::recent_records::RecentRecords;
use crate::sync::resolver::{Decided, Resolver};
use crate::sync::version_cache::VersionCache;
use crate::sync::write_log::WriteLog;

const SEARCH_LAG: Duration = Duration::from_secs(20);

/// The caches that the worker keeps from one message to the next.
pub(crate) struct Caches {
    pub(crate) id_cache: IdCache,
    pub(crate) lag_guard: LagGuard,
    pub(crate) version_cache: VersionCache,
    pub(crate) applied_cache: AppliedCache,
    pub(crate) write_log: WriteLog,
    pub(crate) readback_cache: ReadbackCache,
    pub(crate) recent: RecentRecords,
}

/// The country is that of [`InMemoryRecords`].
impl Default for Caches {
    fn default() -> Self {
        let readback_cache = ReadbackCache::default();
        readback_cache.start_with(Country::parse("US"));
        Self {
            id_cache: IdCache::default(),
            lag_guard: LagGuard::new(SEARCH_LAG, SEARCH_LAG, Clock::system()),
            version_cache: VersionCache::default(),
            applied_cache: AppliedCache::default(),
            write_log: WriteLog::default(),
            readback_cache,
            recent: RecentRecords::default(),
        }
    }
}

impl Caches {
    /// A resolver on these caches, for records that search shows completely.
    pub(crate) fn resolver<'a>(
        &'a self,
        records: &'a InMemoryRecords,
        mapping: &'a Mapping,
        switches: Switches,
        decision: &'a mut Decision,
    ) -> Resolver<'a, InMemoryRecords> {
        let Self { id_cache, lag_guard, version_cache, readback_cache, recent, .. } = self;
        let keys = &mapping.keys;
        let lookups = Lookups {
            records,
            id_cache,
            lag_guard,
            keys,
            recent,
            reads: Reads::new(),
            search_is_complete: true,
            decision,
        };
        Resolver { lookups, version_cache, readback_cache, switches, retry_refused: false }
    }
}

/// Whether an event says what was last applied, like the worker.
pub(crate) fn is_repeat(caches: &Caches, event: &Desired) -> bool {
    let Caches { applied_cache, version_cache, write_log, .. } = caches;
    let memories = (version_cache, write_log);
    applied_cache.repeat(event, &Part::of(event), memories, Duration::from_hours(24)).is_some()
}

/// Decides about messages that are merged, like an attempt of the worker. After a 404 it looks up once more.
pub(crate) fn decide(
    records: &InMemoryRecords,
    caches: &Caches,
    mapping: &Mapping,
    switches: Switches,
    events: &[&Desired],
) -> Result<(Decision, Decided), CloseError> {
    let mut decision = Decision::default();
    let mut resolver = caches.resolver(records, mapping, switches, &mut decision);
    let (first, others) = events.split_first().expect("an event");
    let mut decided =
        || resolver.decide(first, others).now_or_never().expect("records in memory answer at once");
    let decided = match decided() {
        Err(CloseError::NotFound) => decided(),
        first => first,
    }?;
    Ok((decision, decided))
}

fn sync(
    records: &mut InMemoryRecords,
    caches: &Caches,
    setup: &Setup,
    events: &[&Desired],
) -> (Decision, Decided) {
    let decided = decide(records, caches, &setup.mapping, setup.switches, events).unwrap();
    apply(records, caches, events, &decided);
    decided
}

/// Applies the steps and updates the caches, like the worker.
pub(crate) fn apply(
    records: &mut InMemoryRecords,
    Caches { id_cache, version_cache, applied_cache, readback_cache, write_log, .. }: &Caches,
    events: &[&Desired],
    (decision, Decided { versions, merged, .. }): &(Decision, Decided),
) {
    let (mut new, mut versions) = (CreatedIds::default(), versions.clone());
    for event in events {
        applied_cache.forget(Part::of(event).iter());
    }
    for step in &merged.steps {
        if let Some(id) = step.changes() {
            write_log.ends(id, write_log.begins(id));
        }
        let mut made = CreatedIds::of(step, &records.apply(step));
        if step.creates() {
            new = made.clone();
        }
        if let (Some(Case::AdoptedLead), Step::UpdateLead { id, .. }) = (decision.case, step) {
            made.lead = Some(id.clone());
        }
        id_cache.remember_created(&events[0].identity, made, decision.is_new_person());
    }
    events.iter().zip(&merged.plans).for_each(|(event, plan)| plan.note_versions(&mut versions, event));
    version_cache.remember(versions, &new, Instant::now());
    if let [event] = events {
        let decision = Decision { new_lead: new.lead, new_contact: new.contact, ..decision.clone() };
        // One after the other: all writes so far are its own, or came before it.
        let since = write_log.now();
        let (decision, checked) = (&decision, Instant::now());
        let applied = AppliedEvent { event, decision, since, own: &[], checked };
        applied_cache.remember(&applied, write_log, readback_cache);
    }
}

/// Records in Close, with the mapping and the switches.
#[derive(Clone, Debug)]
struct Setup {
    records: InMemoryRecords,
    mapping: Mapping,
    switches: Switches,
}

fn maybe(values: &'static [&'static str]) -> impl Strategy<Value = Option<&'static str>> {
    proptest::option::of(proptest::sample::select(values))
}

const COMPANIES: &[&str] = &["acme", "Acme", "77"];
const USERS: &[&str] = &["u1", "u2", "U1"];
const EMAILS: &[&str] =
    &["jane@acme.test", "Jane@Acme.test", "jane+crm@acme.test", "info@acme.test", "bob@gmail.com"];
const PHONES: &[&str] = &["+1 800 444 5555", "800 444-5555", "n/a", "+49 30 1234567"];
/// As Close stores them. The last one is older than Close's validation.
const STORED_PHONES: &[&str] = &["+18004445555", "+49301234567", "n/a"];
const NAMES: &[&str] = &["Jane", "Bob", " ", "\u{202e}Jane\u{0}"];
const DATES: &[&str] = &["2026-01-01", "2026-01-02"];

fn lists() -> impl Strategy<Value = Lists> {
    let entries = |channel: Channel, values: &'static [&'static str]| {
        proptest::sample::subsequence(values, 0..=values.len()).prop_map(move |values| {
            let entry = |value: &&str| Entry { value: (*value).to_owned(), kind: "home".into() };
            (channel, values.iter().map(entry).collect::<Vec<_>>())
        })
    };
    (entries(Channel::Email, EMAILS), entries(Channel::Phone, STORED_PHONES))
        .prop_map(|(emails, phones)| [emails, phones].into_iter().collect())
}

fn fields(key: &str, id: Option<&str>, name: Option<&str>) -> Fields {
    let id = id.map(|id| (Field::Custom(FieldId::new(key)), json!(id)));
    id.into_iter().chain(name.map(|name| (Field::Name, json!(name)))).collect()
}

fn records() -> impl Strategy<Value = InMemoryRecords> {
    let leads =
        proptest::collection::vec((maybe(COMPANIES), maybe(NAMES), proptest::sample::select(DATES)), 1..5);
    let contact = (
        maybe(USERS),
        maybe(NAMES),
        lists(),
        proptest::sample::select(DATES),
        any::<proptest::sample::Index>(),
    );
    let many_contacts = proptest::option::of(0..5_usize);
    (leads, proptest::collection::vec(contact, 0..25), many_contacts).prop_map(|(leads, contacts, many)| {
        let mut records = InMemoryRecords::default();
        records.many_contacts = many;
        for (number, (company, name, date)) in leads.iter().enumerate() {
            let id = LeadId::new(format!("lead_{number}"));
            let lead = Lead {
                id: id.clone(),
                date_created: (*date).into(),
                date_updated: None,
                fields: fields("cf_company", *company, *name),
            };
            records.leads.insert(id, lead);
        }
        for (number, (user, name, lists, date, lead)) in contacts.into_iter().enumerate() {
            let id = ContactId::new(format!("cont_{number:02}"));
            let lead_id = Some(LeadId::new(format!("lead_{}", lead.index(leads.len()))));
            let fields = fields("cf_user", user, name);
            let contact = Contact {
                id: id.clone(),
                lead_id,
                date_created: date.into(),
                date_updated: None,
                fields,
                lists,
                unknown_lists: BTreeSet::new(),
            };
            records.contacts.insert(id, contact);
        }
        records
    })
}

fn setup() -> impl Strategy<Value = Setup> {
    let write = proptest::sample::select(&[WriteRule::Always, WriteRule::IfEmpty, WriteRule::OnCreate][..]);
    let switch = || proptest::bool::weighted(0.8);
    let switches = (switch(), switch(), switch(), switch(), switch());
    let keys = (proptest::bool::weighted(0.9), proptest::bool::weighted(0.9), any::<bool>());
    (records(), proptest::collection::vec(write, 8), switches, keys).prop_map(
        |(records, writes, on, keys)| {
            let mut rules = rules();
            let mut writes = writes.into_iter().cycle();
            let all = rules.lead.fields.values_mut().chain(rules.lead.custom.values_mut());
            let all = all.chain(rules.contact.fields.values_mut()).chain(rules.channels.values_mut());
            all.for_each(|rule| rule.write = writes.next().unwrap());
            rules.lead.key.take_if(|_| !keys.0);
            rules.contact.key.take_if(|_| !keys.1);
            rules.lead.synced_at = keys.2.then(|| FieldRef::new("cf_lead_at"));
            rules.contact.synced_at = keys.2.then(|| FieldRef::new("cf_contact_at"));
            let switches = Switches {
                allow_creating_new_leads: on.0,
                allow_updating_existing_leads: on.1,
                allow_creating_new_contacts: on.2,
                allow_updating_existing_contacts: on.3,
                allow_creating_duplicate_contacts: on.4,
            };
            Setup { records, mapping: Mapping::resolve(&rules, &schema()).unwrap(), switches }
        },
    )
}

fn event() -> impl Strategy<Value = Value> {
    let plan = maybe(&["free", "pro"]);
    (maybe(USERS), maybe(EMAILS), maybe(COMPANIES), maybe(NAMES), maybe(PHONES), plan).prop_map(
        |(user, email, company, name, phone, plan)| {
            json!({"userId": user, "traits": {
                "email": email, "name": name, "phone": phone, "plan": plan, "company": {"id": company, "name": name},
            }})
        },
    )
}

/// Any JSON, with keys that the mapping reads among its keys.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        ".{0,20}".prop_map(Value::from),
        proptest::sample::select([EMAILS, PHONES, NAMES, COMPANIES].concat()).prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 64, 8, |inner| {
        let keys = [
            "userId",
            "traits",
            "company",
            "id",
            "name",
            "email",
            "phone",
            "website",
            "plan",
            "title",
            "type",
            "integrations",
            "x",
        ];
        let key = proptest::sample::select(keys.to_vec()).prop_map(str::to_owned);
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map(key, inner, 0..10).prop_map(|map| json!(map)),
        ]
    })
}

fn labels(decision: &Decision) -> Vec<&'static str> {
    decision.plan.steps.iter().map(Step::label).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn syncing_an_event_again_changes_nothing(setup in setup(), events in proptest::collection::vec(event(), 1..4)) {
        let (mut records, caches) = (setup.records.clone(), Caches::default());
        for event in events {
            let Ok(desired) = setup.mapping.apply(&Event { body: event }) else { continue };
            sync(&mut records, &caches, &setup, &[&desired]);
            // With the caches, and after a restart.
            for caches in [&caches, &Caches::default()] {
                let again = decide(&records, caches, &setup.mapping, setup.switches, &[&desired]).unwrap();
                prop_assert_eq!(&again.1.merged.steps, &[]);
            }
        }
    }

    /// What is settled from memory would change nothing, in whatever order the times of the events are.
    #[test]
    fn a_repeat_has_nothing_to_write(
        setup in setup(),
        events in proptest::collection::vec(event(), 1..5),
        sequence in proptest::collection::vec((any::<proptest::sample::Index>(), 1..20_i64), 1..20),
    ) {
        let (mut records, caches) = (setup.records.clone(), Caches::default());
        for (which, at) in sequence {
            let event = Event { body: which.get(&events).clone() };
            let Ok(mut desired) = setup.mapping.apply(&event) else { continue };
            desired.at = Timestamp::from_second(at).ok();
            let decide = || decide(&records, &caches, &setup.mapping, setup.switches, &[&desired]).unwrap();
            let (decision, decided) = decide();
            if is_repeat(&caches, &desired) {
                prop_assert_eq!(&decided.merged.steps, &[]);
                prop_assert_eq!(decision.dropped, []);
                let mut versions = decided.versions;
                decided.merged.plans[0].note_versions(&mut versions, &desired);
                // Nothing compares the times of lists.
                let lists: Vec<_> = Channel::VARIANTS.iter().map(|list| FieldHash::of(&list.to_string())).collect();
                let mut again = decide().1.versions;
                for known in versions.values_mut().chain(again.values_mut()) {
                    known.fields.retain(|field, _| !lists.contains(field));
                }
                prop_assert_eq!(again, versions);
            } else {
                apply(&mut records, &caches, &[&desired], &(decision, decided));
            }
        }
    }

    #[test]
    fn a_sync_never_removes_values_or_records(setup in setup(), event in event()) {
        let Ok(desired) = setup.mapping.apply(&Event { body: event }) else { return Ok(()) };
        let mut records = setup.records.clone();
        let (decision, decided) = sync(&mut records, &Caches::default(), &setup, &[&desired]);

        for (id, before) in &setup.records.contacts {
            let after = &records.contacts[id];
            prop_assert_eq!(&after.lead_id, &before.lead_id);
            for (channel, entries) in &before.lists {
                prop_assert!(after.list(*channel).starts_with(entries), "{:?}", after);
            }
            prop_assert!(before.fields.keys().all(|field| after.fields.contains_key(field)));
        }
        let exists = |id| records.leads.contains_key(id);
        prop_assert!(setup.records.leads.keys().all(exists));

        let changed = decided.merged.changed();
        let distinct: BTreeSet<&String> = changed.iter().collect();
        prop_assert_eq!(distinct.len(), changed.len(), "a record is written twice");
        let contacts = labels(&decision).iter().filter(|label| **label == "update_contact").count();
        prop_assert!(contacts <= MAX_CONTACTS);
        prop_assert!(records.leads.len() <= setup.records.leads.len() + 1);
        prop_assert!(records.contacts.len() <= setup.records.contacts.len() + 1);
    }

    #[test]
    fn no_duplicate_contact_or_lead_is_created(
        setup in setup(), events in proptest::collection::vec(event(), 1..6), lags in any::<bool>(),
    ) {
        // Also while search does not show what the worker writes, because its caches do.
        let records = setup.records.clone();
        let (mut records, caches) = (if lags { records.with_frozen_search() } else { records }, Caches::default());
        for event in events {
            let Ok(desired) = setup.mapping.apply(&Event { body: event }) else { continue };
            let is_known = records.contacts.values().any(|contact| {
                compare(contact, &desired.identity, &setup.mapping.keys).is_person()
            });
            let (decision, decided) = sync(&mut records, &caches, &setup, &[&desired]);
            let has_no_company = desired.identity.company_id.is_none();
            prop_assert!(!(is_known && has_no_company && decided.merged.creates()), "{}", decision.summary());
        }
        let Mapping { keys, .. } = &setup.mapping;
        let companies = |records: &InMemoryRecords| count(records.leads.values().filter_map(|lead| {
            lead.custom(keys.company.as_ref()?).map(str::to_owned)
        }));
        let before = companies(&setup.records);
        for (company, number) in companies(&records) {
            prop_assert!(number <= before.get(&company).copied().unwrap_or(1), "{} {}", company, number);
        }
        // Contacts from before may get the same user id, if they have the same email.
        let people = |records: &InMemoryRecords, new: bool| count(records.contacts.values().filter_map(|contact| {
            let user = contact.custom(keys.user.as_ref()?)?.to_owned();
            (new != setup.records.contacts.contains_key(&contact.id)).then(|| (user, contact.lead_id.clone()))
        }));
        let before = people(&setup.records, false);
        for (person, number) in people(&records, true) {
            prop_assert!(number == 1 && !before.contains_key(&person), "{:?}", person);
        }
    }

    #[test]
    fn merged_events_have_the_same_effect_as_single_ones(
        setup in setup(), first in event(), events in proptest::collection::vec((event(), 0i64..9), 1..6),
        before in proptest::option::of(event()),
    ) {
        let mapped = |event: &Value, at: i64| {
            let mut desired = setup.mapping.apply(&Event { body: event.clone() }).ok()?;
            desired.at = Timestamp::from_second(1_000_000_000 + at).ok();
            Some(desired)
        };
        let Some(first) = mapped(&first, 4) else { return Ok(()) };
        // Events about the same person with other values.
        let same = |(event, at): (Value, i64)| {
            let (mut event, identity) = (event, &first.identity);
            event["userId"] = json!(identity.user_id);
            let email = event["traits"]["email"].is_string() || identity.user_id.is_none();
            event["traits"]["email"] = if email { json!(identity.email) } else { Value::Null };
            event["traits"]["company"]["id"] = json!(identity.company_id);
            mapped(&event, at)
        };
        let others: Vec<Desired> = events.into_iter().filter_map(same).collect();
        let others: Vec<&Desired> = others.iter().filter(|other| other.can_merge_with(&first, setup.switches)).collect();
        let all: Vec<&Desired> = std::iter::once(&first).chain(others).collect();

        // Close may hold values of an event with a time between the others.
        let start = || {
            let (mut records, caches) = (setup.records.clone(), Caches::default());
            if let Some(before) = before.as_ref().and_then(|event| mapped(event, 4)) {
                sync(&mut records, &caches, &setup, &[&before]);
            }
            (records, caches)
        };
        let (mut one_by_one, caches) = start();
        for event in &all {
            sync(&mut one_by_one, &caches, &setup, &[event]);
        }
        let (mut merged_records, caches) = start();
        let (_, decided) = sync(&mut merged_records, &caches, &setup, &all);
        let changed = decided.merged.changed();
        prop_assert_eq!(changed.iter().collect::<BTreeSet<_>>().len(), changed.len(), "a record is written twice");
        prop_assert_eq!(&one_by_one.leads, &merged_records.leads);
        prop_assert_eq!(&one_by_one.contacts, &merged_records.contacts);
        // The caches have the same effect afterwards.
        for event in &all {
            let again = decide(&merged_records, &caches, &setup.mapping, setup.switches, &[event]).unwrap();
            let steps = again.1.merged.steps;
            let before = decide(&one_by_one, &caches, &setup.mapping, setup.switches, &[event]).unwrap();
            prop_assert_eq!(steps, before.1.merged.steps);
        }
    }

    #[test]
    fn events_in_any_order_set_the_same_values(
        events in proptest::collection::vec(event(), 1..6).prop_shuffle(), rotation in any::<u64>(), stores in any::<bool>(),
    ) {
        let mut rules = rules();
        if stores {
            rules.lead.synced_at = Some(FieldRef::new("cf_lead_at"));
            rules.contact.synced_at = Some(FieldRef::new("cf_contact_at"));
        }
        let mapping = Mapping::resolve(&rules, &schema()).unwrap();
        let setup = Setup { records: InMemoryRecords::default(), mapping, switches: Switches::default() };
        // Events about one person, who exists from the start. Each has other values.
        let mut late: Vec<Desired> = (1..).zip(&events).map(|(at, event)| {
            let mut event = event.clone();
            event["userId"] = json!("u1");
            event["traits"]["company"]["id"] = json!("acme");
            let mut desired = setup.mapping.apply(&Event { body: event }).unwrap();
            desired.at = Timestamp::from_second(1_000_000_000 + at).ok();
            desired
        }).collect();
        let person = json!({"userId": "u1", "traits": {"name": "Who", "plan": "none", "company": {"id": "acme", "name": "What"}}});
        let mut person = setup.mapping.apply(&Event { body: person }).unwrap();
        person.at = Timestamp::from_second(1_000_000_000).ok();

        let final_values = |events: &[Desired]| {
            let (mut records, caches) = (InMemoryRecords::default(), Caches::default());
            for event in std::iter::once(&person).chain(events) {
                sync(&mut records, &caches, &setup, &[event]);
            }
            // An event that changes nothing does not store its time.
            let values = |mut fields: Fields| {
                fields.retain(|field, _| !field.to_string().ends_with("_at"));
                fields
            };
            let leads: Vec<Fields> = records.leads.into_values().map(|lead| values(lead.fields)).collect();
            let contacts = records.contacts.into_values().map(|contact| values(contact.fields));
            (leads, contacts.collect::<Vec<_>>())
        };
        let in_order = final_values(&late);
        let position = usize::try_from(rotation).unwrap_or_default() % late.len();
        late.rotate_left(position);
        if rotation % 2 == 0 {
            late.reverse();
        }
        prop_assert_eq!(final_values(&late), in_order);
    }

    #[test]
    fn a_switch_that_is_off_prevents_its_steps(setup in setup(), event in event()) {
        let Ok(desired) = setup.mapping.apply(&Event { body: event }) else { return Ok(()) };
        let (decision, _) =
            decide(&setup.records, &Caches::default(), &setup.mapping, setup.switches, &[&desired]).unwrap();
        let Switches {
            allow_creating_new_leads,
            allow_updating_existing_leads,
            allow_creating_new_contacts,
            allow_updating_existing_contacts,
            allow_creating_duplicate_contacts,
        } = setup.switches;
        let with_contact = decision.plan.steps.iter().any(|step| {
            matches!(step, Step::CreateContact { .. } | Step::CreateLead { contact: Some(_), .. })
        });
        let labels = labels(&decision);
        prop_assert!(allow_creating_new_leads || !labels.contains(&"create_lead"));
        prop_assert!(allow_updating_existing_leads || !labels.contains(&"update_lead"));
        prop_assert!(allow_creating_new_contacts || !with_contact);
        prop_assert!(allow_updating_existing_contacts || !labels.contains(&"update_contact"));
        let person = desired.identity;
        let known = setup.records.contacts.values().any(|contact| {
            let user = setup.mapping.keys.user.as_ref().and_then(|field| contact.custom(field));
            user.is_some() && user == person.user_id.as_deref()
        });
        prop_assert!(allow_creating_duplicate_contacts || !known || !with_contact);
    }

    #[test]
    fn mapping_never_panics(body in any_json()) {
        if let Ok(event) = Event::decode(body.to_string().as_bytes(), 1 << 20) {
            let mapping = Mapping::resolve(&rules(), &schema()).unwrap();
            let _ = (mapping.not_for_close(&event), mapping.apply(&event).map(|desired| desired.identity.keys()));
        }
    }
}

fn count<T: Ord>(items: impl Iterator<Item = T>) -> BTreeMap<T, usize> {
    let mut counts = BTreeMap::new();
    items.for_each(|item| *counts.entry(item).or_default() += 1);
    counts
}
