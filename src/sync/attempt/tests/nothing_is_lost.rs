//! The law of people: between any two calls of ours a person may do anything in Close, and nothing of it is lost.
//!
//! Close has no condition on a version, so a write can undo what a person did after our last read of the record. That read
//! is at most a second old when the write is sent, or, if Close takes longer to answer, the write follows its answer at
//! once. So each of our writes must be right for the records *as they were at some moment of that window*:
//!
//! - A list is that of the moment, entry by entry in its order, and then values of the event. So an entry that a person
//!   added or moved before the window stays, and one that a person removed does not come back unless the event has it.
//! - A field is one that the event sets. Under the rule `if_empty`, and if it is an id, it was empty at that moment. Under
//!   `always`, the value of the event wins at any time.
//! - A record is created only if at that moment Close had no record of the person. The wait for the budget of a creation
//!   belongs to its window: it could only undo the creation of the same record by a person.

use proptest::prelude::*;

use super::people_win::title_if_empty;
use super::person::Edit;
use super::*;
use crate::domain::mapping::WriteRule;
use crate::domain::record::{Entry, Lists};
use crate::sync::lag_guard::LONGEST_SEARCH_LAG;

/// How old a read may be, see [`super::super::freshness`].
const FRESH: Duration = Duration::from_secs(1);
/// The longest time from the look-up to a creation.
const CREATION: Duration = Duration::from_secs(40);

const PEOPLES_PHONES: [&str; 3] = ["+18005550001", "+18005550002", "+18004445551"];
const PEOPLES_EMAILS: [&str; 2] = ["jane@home.test", "doe@home.test"];
const WEBSITES: [&str; 2] = ["http://jane.test", "http://acme.test"];

fn rules_of_all_kinds() -> Rules {
    let mut rules = title_if_empty();
    rules.lead.custom.values_mut().for_each(|plan| plan.write = WriteRule::IfEmpty);
    rules
}

fn custom(id: &str) -> Field {
    Field::Custom(FieldId::new(id))
}

fn edit() -> impl Strategy<Value = Edit> {
    let channels = [Channel::Email, Channel::Phone, Channel::Phone, Channel::Url];
    let channel = proptest::sample::select(channels.to_vec());
    // A person enters no id. The record would be that of somebody else.
    let set = vec![Field::Name, Field::Title, custom("cf_note")];
    let set_in_lead = vec![Field::Name, Field::Description, custom("cf_plan"), custom("cf_seats")];
    let cleared = [set.clone(), vec![custom("cf_user")]].concat();
    let cleared_in_lead = [set_in_lead.clone(), vec![custom("cf_company")]].concat();
    let one_of = proptest::sample::select::<Field>;
    prop_oneof![
        4 => proptest::sample::select(&PEOPLES_PHONES[..]).prop_map(|phone| Edit::Add(Channel::Phone, phone)),
        2 => proptest::sample::select(&PEOPLES_EMAILS[..]).prop_map(|email| Edit::Add(Channel::Email, email)),
        1 => proptest::sample::select(&WEBSITES[..]).prop_map(|url| Edit::Add(Channel::Url, url)),
        5 => (channel.clone(), 0usize..9).prop_map(|(channel, place)| Edit::Remove(channel, place)),
        3 => channel.prop_map(Edit::Reorder),
        3 => one_of(set).prop_map(|field| Edit::Set(field, "theirs")),
        2 => one_of(cleared).prop_map(Edit::Clear),
        3 => one_of(set_in_lead).prop_map(|field| Edit::SetLead(field, "theirs")),
        2 => one_of(cleared_in_lead).prop_map(Edit::ClearLead),
        1 => Just(Edit::DeleteContact),
        1 => Just(Edit::MergeLead),
    ]
}

/// An event about Jane, and how long its writes wait for budget.
#[derive(Clone, Debug)]
struct Message {
    event: Value,
    wait: Duration,
    /// It is written together with the one before it, if that is possible.
    merged: bool,
}

fn message() -> impl Strategy<Value = Message> {
    let traits = (
        proptest::option::of(proptest::sample::select(&PHONES[..])),
        proptest::option::of(proptest::sample::select(&WEBSITES[..])),
        proptest::option::of(Just("CEO")),
        proptest::option::of(Just("Jane Doe")),
        proptest::option::of(proptest::sample::select(&["free", "pro"][..])),
    );
    let company = prop_oneof![3 => Just(json!({"id": "acme", "name": "Acme"})), 1 => Just(json!(null))];
    (traits, company, 0u64..6000, any::<bool>()).prop_map(
        |((phone, website, title, name, plan), company, wait, merged)| {
            let mut traits = json!({"email": "jane@acme.test", "phone": phone, "website": website, "title": title,
                "name": name, "plan": plan, "company": company});
            traits.as_object_mut().unwrap().retain(|_, value| !value.is_null());
            let event = json!({"userId": "u1", "traits": traits});
            Message { event, wait: Duration::from_millis(wait), merged }
        },
    )
}

fn fault() -> impl Strategy<Value = Option<u8>> {
    proptest::option::weighted(0.2, 0u8..4)
}

fn fault_of(number: u8) -> WriteFault {
    match number {
        0 => WriteFault::Busy,
        1 => WriteFault::BadPhones,
        2 => WriteFault::Before(timed_out()),
        _ => WriteFault::After(timed_out()),
    }
}

/// What a write may do at a moment, given the states of the records until then, the latest last.
struct Law<'a> {
    events: &'a [Desired],
    keys: &'a KeyFields,
    /// Each with the time until which it lasted.
    states: &'a [(Instant, InMemoryRecords)],
    /// The first state after our last creation. Records that we created ourselves are expected.
    created: usize,
    at: Instant,
    window: Duration,
}

impl Law<'_> {
    fn allows(&self, step: &Step) -> bool {
        let is_jane = |contact: &&Contact| {
            self.events.iter().any(|event| {
                let likeness = compare(contact, &event.identity, self.keys);
                likeness.is_person()
            })
        };
        let update = |allows: &dyn Fn(&InMemoryRecords) -> bool| {
            self.states.iter().any(|(until, records)| *until + self.window >= self.at && allows(records))
        };
        let creation = |lead: Option<&LeadId>| {
            let mut states = self.states[self.created..].iter();
            states.any(|(until, records)| {
                let mut janes = records.contacts.values().filter(is_jane);
                *until + CREATION >= self.at
                    && janes.all(|jane| lead.is_some() && jane.lead_id.as_ref() != lead)
            })
        };
        match step {
            Step::CreateLead { .. } => creation(None),
            Step::CreateContact { lead, .. } => creation(Some(lead)),
            Step::UpdateLead { id, changes } => update(&|records| {
                let lead = records.leads.get(id);
                lead.is_some_and(|lead| self.allows_fields(changes, &lead.fields, |event| &event.lead))
            }),
            Step::UpdateContact { id, changes } => update(&|records| {
                records.contacts.get(id).is_some_and(|contact| {
                    self.allows_fields(&changes.fields, &contact.fields, |event| &event.contact)
                        && self.allows_lists(&changes.lists, contact)
                })
            }),
        }
    }

    fn allows_fields(
        &self,
        changes: &Fields,
        before: &Fields,
        wanted: impl Fn(&Desired) -> &BTreeMap<Field, Wanted>,
    ) -> bool {
        changes.iter().all(|(field, value)| {
            let is_key = [&self.keys.company, &self.keys.user]
                .into_iter()
                .flatten()
                .any(|key| *field == custom(key.as_str()));
            let before = before.get(field);
            let is_free = before.is_none() || before == Some(value);
            self.events.iter().any(|event| {
                wanted(event).get(field).is_some_and(|wanted| {
                    wanted.value == *value
                        && match wanted.write {
                            WriteRule::Always => !is_key || is_free,
                            WriteRule::IfEmpty => is_free,
                            WriteRule::OnCreate | WriteRule::Add => false,
                        }
                })
            })
        })
    }

    fn allows_lists(&self, lists: &Lists, before: &Contact) -> bool {
        lists.iter().all(|(channel, list)| {
            let is_of_an_event = |entry: &Entry| {
                let mut wanted = self.events.iter().filter_map(|event| event.channels.get(channel));
                wanted.any(|wanted| wanted.value == json!(entry.value))
            };
            list.strip_prefix(before.list(*channel))
                .is_some_and(|added| !added.is_empty() && added.iter().all(is_of_an_event))
        })
    }
}

/// Writes events together, or one by one if that is not possible.
async fn sync(context: &Context, close: &FakeClose, events: &[Desired]) -> Result<(), TestCaseError> {
    let (first, others) = events.split_first().unwrap();
    if !others.is_empty() && others.iter().all(|other| other.can_merge_with(first, context.settings.switches))
    {
        let mut merged = attempts(context, close, first);
        merged.others = others.iter().collect();
        if merged.run_once().await.is_ok() {
            return Ok(());
        }
    }
    for event in events {
        let outcome = attempts(context, close, event).retry_in_place().await;
        prop_assert!(matches!(outcome, Outcome::Synced(_)), "{:?}", outcome);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn nothing_that_a_person_enters_is_lost(
        contacts in 0usize..3,
        messages in proptest::collection::vec(message(), 1..5),
        faults in proptest::collection::vec(fault(), 0..6),
        read_lag in proptest::sample::select(vec![0u64, 0, 300, 1000]),
        answer_delay in proptest::sample::select(vec![0u64, 0, 700, 2000]),
        edits in proptest::collection::btree_map(0u64..20_000, (0usize..3, edit()), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut context = context(&rules_of_all_kinds());
            // In place of the delay queues. The event log never settles a lost creation.
            context.settings.retry.in_place = 10 * LONGEST_SEARCH_LAG;
            let other = json!({"id": "lead_2", "date_created": "2026-01-02", "name": "Other"});
            let mut second = janes_contact();
            (second["id"], second["lead_id"], second["custom.cf_user"]) = (json!("cont_2"), json!("lead_2"), json!(null));
            let janes = [janes_contact(), second];
            let leads = if contacts == 0 { vec![other] } else { vec![acme(), other] };
            let (read_lag, answer_delay) = (Duration::from_millis(read_lag), Duration::from_millis(answer_delay));
            let mut close = FakeClose::new(&context, &leads, &janes[..contacts]).with_read_lag(read_lag);
            close.state(|state| state.answer_delay = answer_delay);
            for (after, (contact, edit)) in &edits {
                close = close.with_edit_of(*contact, Duration::from_millis(*after), edit.clone());
            }
            for fault in &faults {
                // A write without a fault takes as long as any other.
                close = close.with_fault(fault.map_or(WriteFault::Slow(LATENCY), fault_of));
            }
            let read = |(second, message): (i64, &Message)| desired(&context, second, message.event.clone());
            let events: Vec<Desired> = (1..).zip(&messages).map(read).collect();
            let mut next = 0;
            for group in messages.chunk_by(|_, next| next.merged) {
                close = close.with_budget_wait(group[0].wait);
                sync(&context, &close, &events[next..next + group.len()]).await?;
                next += group.len();
            }
            let window = FRESH.max(LATENCY + answer_delay) + 2 * LATENCY + read_lag;
            close.state(|state| {
                let mut created = 0;
                for Applied { at, step, state: number } in &state.applied {
                    let states = &state.past[..=*number];
                    let law = Law { events: &events, keys: &context.keys, states, created, at: *at, window };
                    prop_assert!(law.allows(step), "{:?} at {:?} of {:#?}", step, at, states);
                    if step.creates() {
                        created = number + 1;
                    }
                }
                Ok(())
            })
        })?;
    }
}
