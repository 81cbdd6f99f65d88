//! A person edits records in Close between any two calls of ours.

use proptest::prelude::*;

use super::*;
use crate::domain::decision::LookUp;
use crate::domain::mapping::WriteRule;
use crate::domain::record::{Entry, Fields, Lists};

/// What a person does to the records of Jane.
#[derive(Clone, Debug)]
pub(super) enum Edit {
    Add(Channel, &'static str),
    Set(Field, &'static str),
    /// Sets a field of Jane's Lead.
    SetLead(Field, &'static str),
    /// Deletes Jane's Contact.
    Delete,
    /// Merges Jane's Lead into another one. The other one keeps its fields.
    Merge,
}

/// What a person has done.
#[derive(Clone, Debug)]
pub(super) struct Edited {
    at: Instant,
    edit: Edit,
    contact: ContactId,
}

impl State {
    pub(super) fn let_the_person_work(&mut self) {
        while let Some((at, edit)) = self.edits.pop_front_if(|(at, _)| *at <= Instant::now()) {
            self.past.push((at, self.records.clone()));
            let now = Some(super::at(1000 * i64::try_from(self.past.len()).unwrap()));
            let InMemoryRecords { leads, contacts, .. } = &mut self.records;
            let is_jane =
                |contact: &&mut Contact| contact.id.as_str() == "cont_1" || contact.fields.len() > 1;
            let Some(jane) = contacts.values_mut().find(is_jane) else { continue };
            let (id, lead) = (jane.id.clone(), jane.lead_id.clone().unwrap());
            match &edit {
                Edit::Add(channel, value) => {
                    let entry = Entry { value: (*value).to_owned(), kind: "home".to_owned() };
                    jane.lists.entry(*channel).or_default().push(entry);
                    jane.date_updated = now;
                }
                Edit::Set(field, value) => {
                    jane.fields.insert(field.clone(), json!(value));
                    jane.date_updated = now;
                }
                Edit::SetLead(field, value) => {
                    let lead = leads.get_mut(&lead).unwrap();
                    lead.fields.insert(field.clone(), json!(value));
                    lead.date_updated = now;
                }
                Edit::Delete => drop(contacts.remove(&id)),
                Edit::Merge => {
                    let Some(other) = leads.keys().find(|other| **other != lead).cloned() else { continue };
                    for contact in
                        contacts.values_mut().filter(|contact| contact.lead_id.as_ref() == Some(&lead))
                    {
                        contact.lead_id = Some(other.clone());
                    }
                    leads.remove(&lead);
                }
            }
            self.edited.push(Edited { at, edit, contact: id });
        }
    }
}

impl FakeClose {
    /// A write waits this long for its budget.
    fn with_budget_wait(self, wait: Duration) -> Self {
        self.state(|state| state.budget_wait = wait);
        self
    }

    /// A person does this after a time.
    fn with_edit(self, after: Duration, edit: Edit) -> Self {
        self.state(|state| state.edits.push_back((Instant::now() + after, edit)));
        self
    }
}

const WAIT: Duration = Duration::from_secs(3);
const THEIR_PHONE: &str = "+18005550000";

fn title_if_empty() -> Rules {
    let mut rules = rules();
    rules.contact.fields.get_mut(&Field::Title).unwrap().write = WriteRule::IfEmpty;
    rules
}

/// Jane's event with a phone number and a title.
async fn sync_jane(context: &Context, close: &FakeClose) {
    let traits = json!({"email": "jane@acme.test", "phone": "+18004445555", "title": "CEO",
        "company": {"id": "acme", "name": "Acme"}});
    let desired = desired(context, 5, json!({"userId": "u1", "traits": traits}));
    let outcome = attempts(context, close, &desired).retry_in_place().await;
    assert!(matches!(outcome, Outcome::Synced(_)), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_phone_that_a_person_adds_while_the_write_waits_is_kept() {
    for after in (1..30).map(|n| n * Duration::from_millis(100)) {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
            .with_budget_wait(WAIT)
            .with_edit(after, Edit::Add(Channel::Phone, THEIR_PHONE));
        sync_jane(&context, &close).await;
        assert_eq!(phones(&close.contact("cont_1")), [THEIR_PHONE, "+18004445555"], "{after:?}");
        assert_eq!(close.written(), ["update_lead", "update_contact"], "{after:?}");
    }
}

/// Close refuses the phone. While the write waits to be sent without it, a person changes the title.
#[tokio::test(start_paused = true)]
async fn a_refused_value_is_not_sent_again_when_a_person_changes_the_record() {
    for (refusal, also) in [(&[&["phones"][..]][..], None), (&[], Some("emails"))] {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
            .with_budget_wait(WAIT)
            .with_fault(WriteFault::Before(rejection(refusal)))
            .with_edit(WAIT + Duration::from_secs(1), Edit::Set(Field::Title, "Chief"));
        let email = also.map(|_| "other@acme.test");
        let traits =
            json!({"phone": "+18004445555", "email": email, "title": "CEO", "company": {"id": "acme"}});
        let desired = desired(&context, 5, json!({"userId": "u1", "traits": traits}));
        let mut attempts = attempts(&context, &close, &desired);
        let outcome = attempts.retry_in_place().await;
        assert_eq!(outcome, Outcome::Synced(Effect::Updated));
        let contact = close.contact("cont_1");
        assert_eq!((&contact.fields[&Field::Title], phones(&contact)), (&json!("CEO"), vec![]));
        assert_eq!(close.written(), ["update_contact", "update_contact"]);
        let dropped = attempts.decision.dropped.iter();
        let dropped: Vec<_> = dropped.map(|dropped| (dropped.field.as_str(), dropped.reason)).collect();
        let refused = also.into_iter().chain(["phones"]).map(|field| (field, DropReason::Refused));
        assert_eq!(dropped, refused.collect::<Vec<_>>(), "each is counted once");
    }
}

#[tokio::test(start_paused = true)]
async fn a_phone_that_a_person_adds_while_an_answer_is_under_way_is_kept() {
    for after in (1..30).map(|n| n * Duration::from_millis(100)) {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
            .with_edit(after, Edit::Add(Channel::Phone, THEIR_PHONE));
        close.state(|state| state.answer_delay = WAIT);
        sync_jane(&context, &close).await;
        assert_eq!(phones(&close.contact("cont_1")), [THEIR_PHONE, "+18004445555"], "{after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_phone_that_a_person_adds_while_close_answers_429_is_kept() {
    let context = context(&rules());
    let event = desired(&context, 5, json!({"userId": "u1", "traits": {"phone": "+18004445555"}}));
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_budget_wait(WAIT)
        .with_fault(WriteFault::Busy)
        .with_edit(WAIT + WAIT / 2, Edit::Add(Channel::Phone, THEIR_PHONE));
    attempts(&context, &close, &event).run_once().await.ok().unwrap();
    assert_eq!(phones(&close.contact("cont_1")), [THEIR_PHONE, "+18004445555"]);
}

#[tokio::test(start_paused = true)]
async fn a_field_that_a_person_fills_while_the_write_waits_is_kept() {
    let context = context(&title_if_empty());
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()])
        .with_budget_wait(WAIT)
        .with_edit(WAIT / 2, Edit::Set(Field::Title, "Chair"));
    let event = desired(&context, 5, json!({"userId": "u1", "traits": {"title": "CEO"}}));
    let completed = attempts(&context, &close, &event).run_once().await.ok().unwrap();
    assert_eq!(completed.outcome, Outcome::Synced(Effect::Unchanged));
    assert_eq!(close.contact("cont_1").fields[&Field::Title], json!("Chair"));
    assert_eq!(close.written(), [""; 0], "nothing is left to write");
}

#[tokio::test(start_paused = true)]
async fn ids_that_a_person_sets_while_the_write_waits_are_kept() {
    let company = || Field::Custom(FieldId::new("cf_company"));
    let user = || Field::Custom(FieldId::new("cf_user"));
    let context = context(&rules());
    // The Lead would be adopted, and belongs to another company by then.
    let lead = json!({"id": "lead_1", "date_created": "2026-01-01", "name": "Old"});
    let close = FakeClose::new(&context, &[lead], &[janes_contact()])
        .with_budget_wait(WAIT)
        .with_edit(WAIT / 2, Edit::SetLead(company(), "globex"));
    sync_jane(&context, &close).await;
    assert_eq!(close.lead("lead_1").custom(&FieldId::new("cf_company")), Some("globex"));

    // The Contact would get the user id, and has another one by then.
    context.id_cache.forget_records();
    let mut jane = janes_contact();
    jane["custom.cf_user"] = json!(null);
    let close = FakeClose::new(&context, &[acme()], &[jane])
        .with_budget_wait(WAIT)
        .with_edit(WAIT / 2, Edit::Set(user(), "u2"));
    sync_jane(&context, &close).await;
    assert_eq!(close.contact("cont_1").custom(&FieldId::new("cf_user")), Some("u2"));
    assert_eq!(close.records().contacts.len(), 2, "the person of the event has a Contact of their own");
}

#[tokio::test(start_paused = true)]
async fn a_record_is_read_again_only_if_the_write_waited_and_could_undo_edits() {
    let reads = async |wait: Duration, traits: Value| {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()]).with_budget_wait(wait);
        let desired = desired(&context, 5, json!({"userId": "u1", "traits": traits}));
        let mut attempts = attempts(&context, &close, &desired);
        attempts.run_once().await.ok().unwrap();
        assert_eq!(close.written(), ["update_contact"]);
        let is_read = |look_up: &&LookUp| **look_up == LookUp::Read("cont_1".into());
        attempts.decision.look_ups.iter().filter(is_read).count()
    };
    assert_eq!(reads(Duration::ZERO, json!({"phone": "+18004445555"})).await, 1, "no wait");
    assert_eq!(reads(WAIT, json!({"title": "CEO"})).await, 1, "the rule says always");
    assert_eq!(reads(WAIT, json!({"phone": "+18004445555"})).await, 2);
}

/// A call takes at most this long. A read stays fresh for a second, see [`super::super::freshness`].
const WINDOW: Duration = Duration::from_millis(1100);

fn edit() -> impl Strategy<Value = Edit> {
    let numbers = &["+18005550001", "+18005550002", "+18005550003"];
    let emails = &["jane@home.test", "doe@home.test"];
    prop_oneof![
        6 => proptest::sample::select(&numbers[..]).prop_map(|phone| Edit::Add(Channel::Phone, phone)),
        3 => proptest::sample::select(&emails[..]).prop_map(|email| Edit::Add(Channel::Email, email)),
        2 => Just(Edit::Set(Field::Title, "Chair")),
        2 => Just(Edit::Set(Field::Name, "J. Doe")),
        1 => Just(Edit::SetLead(Field::Description, "a note")),
        1 => Just(Edit::Delete),
        1 => Just(Edit::Merge),
    ]
}

/// Whether a write to the Contact came so soon after the edit that it could not know of it.
fn came_too_late(
    state: &State,
    edited: &Edited,
    window: Duration,
    writes: impl Fn(&Fields, &Lists) -> bool,
) -> bool {
    state.applied.iter().any(|(at, step)| match step {
        Step::UpdateContact { id, changes } => {
            *id == edited.contact
                && (edited.at..=edited.at + window).contains(at)
                && writes(&changes.fields, &changes.lists)
        }
        Step::CreateLead { .. } | Step::CreateContact { .. } | Step::UpdateLead { .. } => false,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nothing_that_a_person_enters_is_lost(
        exists in any::<bool>(),
        waits in proptest::collection::vec(0u64..6000, 1..5),
        read_lag in proptest::sample::select(vec![0u64, 0, 300, 1000]),
        edits in proptest::collection::btree_map(0u64..20_000, edit(), 0..10),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut context = context(&title_if_empty());
            // In place of the delay queues.
            context.settings.retry.in_place = Duration::from_mins(5);
            let other = json!({"id": "lead_2", "date_created": "2026-01-02", "name": "Other"});
            let (leads, contacts) = if exists { (vec![acme(), other], vec![janes_contact()]) } else { (vec![other], vec![]) };
            let read_lag = Duration::from_millis(read_lag);
            let mut close = FakeClose::new(&context, &leads, &contacts).with_read_lag(read_lag);
            for (after, edit) in &edits {
                close = close.with_edit(Duration::from_millis(*after), edit.clone());
            }
            for (second, (wait, phone)) in (1..).zip(waits.iter().zip(PHONES)) {
                close = close.with_budget_wait(Duration::from_millis(*wait));
                let traits = json!({"email": "jane@acme.test", "phone": phone, "title": "CEO",
                    "company": {"id": "acme", "name": "Acme"}});
                let desired = desired(&context, second, json!({"userId": "u1", "traits": traits}));
                let outcome = attempts(&context, &close, &desired).retry_in_place().await;
                prop_assert!(matches!(outcome, Outcome::Synced(_)), "{:?}", outcome);
            }
            close.state(|state| {
                let window = WINDOW + read_lag;
                for edited in &state.edited {
                    let Some(contact) = state.records.contacts.get(&edited.contact) else { continue };
                    match &edited.edit {
                        Edit::Add(channel, value) => prop_assert!(
                            contact.has(*channel, value, None)
                                || came_too_late(state, edited, window, |_, lists| lists.contains_key(channel)),
                            "{:?} is lost: {:?}", edited, state.applied
                        ),
                        Edit::Set(Field::Title, title) => prop_assert!(
                            contact.fields[&Field::Title] == json!(title)
                                || came_too_late(state, edited, window, |fields, _| fields.contains_key(&Field::Title)),
                            "{:?} is lost: {:?}", edited, state.applied
                        ),
                        // The rule for the name is `always`.
                        Edit::Set(..) | Edit::SetLead(..) | Edit::Delete | Edit::Merge => {}
                    }
                }
                let count = |wanted: fn(&Edit) -> bool| state.edited.iter().filter(|edited| wanted(&edited.edit)).count();
                let deleted = count(|edit| matches!(edit, Edit::Delete));
                let created = state.applied.iter().filter(|(_, step)| step.creates()).count();
                prop_assert!(created <= deleted + usize::from(!exists), "{:?} {:?}", state.edited, state.applied);
                let users = state.records.contacts.values();
                let users = users.filter(|contact| contact.custom(&FieldId::new("cf_user")) == Some("u1")).count();
                prop_assert!(users == 1, "{:?}", state.records.contacts);
                Ok(())
            })
        })?;
    }
}
