//! Whether an event repeats what was applied before. Producers send an event at each login, so most say nothing new.
//!
//! An event has parts: what it says about its company, and what it says about its person in that company. Without a company
//! both are one part. A part repeats the last one with the same keys if it has the same values. It was applied if its rules have
//! nothing left to write: a value that was dropped, refused, or skipped for a newer event must be looked at again.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;

use crate::domain::decision::Decision;
use crate::domain::journal::{KeyHash, RecordId};
use crate::domain::mapping::{Desired, Identity, Wanted};
use crate::domain::plan::{FieldVerdict, NEW_CONTACT, NEW_LEAD};
use crate::domain::staleness::{FieldHash, RecordVersions};

/// Separates these hashes from all other uses of the same function.
const NAMESPACE: Uuid = Uuid::from_u128(0x1c4e_83d7_56a9_4f0b_a2d1_7be0_93f8_6c25);

/// A hash of the values of a [`Part`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentHash(u64);

/// What an event says about a company or a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub keys: Vec<KeyHash>,
    pub content: ContentHash,
    about: About,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum About {
    Company,
    Person,
    Both,
}

/// The fields of a record that an event has set, or has found set to its values.
pub type AppliedFields = Vec<(RecordId, Vec<FieldHash>)>;

impl Part {
    /// The parts of an event.
    pub fn of(event: &Desired) -> Vec<Self> {
        let Desired { identity, lead, contact, channels, .. } = event;
        let Identity { company_id, user_id, email } = identity;
        let ids = [company_id, user_id, email].map(|id| id.as_deref());
        let person_keys: Vec<KeyHash> = identity.person().map(|key| KeyHash::of(&key)).collect();
        let mut person = Hasher::default();
        person.add(&ids);
        person.add_wanted(contact);
        person.add_wanted(channels);
        let Some(company) = identity.company() else {
            person.add_wanted(lead);
            return vec![Self { keys: person_keys, content: person.finish(), about: About::Both }];
        };
        let mut of_company = Hasher::default();
        of_company.add(&company_id);
        of_company.add_wanted(lead);
        vec![
            Self { keys: vec![KeyHash::of(&company)], content: of_company.finish(), about: About::Company },
            Self { keys: person_keys, content: person.finish(), about: About::Person },
        ]
    }

    fn is_about(&self, record: &RecordId) -> bool {
        match self.about {
            About::Company => matches!(record, RecordId::Lead(_)),
            About::Person => matches!(record, RecordId::Contact(_)),
            About::Both => true,
        }
    }

    /// The fields that the event has set, of the records that this part is about. `None` unless all of the event was applied.
    pub fn applied(&self, event: &Desired, decision: &Decision) -> Option<AppliedFields> {
        if !is_applied(decision) {
            return None;
        }
        let mut versions = RecordVersions::new();
        decision.plan.note_versions(&mut versions, event);
        let mut applied = AppliedFields::new();
        for (id, versions) in versions {
            let record = match id.as_str() {
                NEW_LEAD => RecordId::Lead(decision.new_lead.clone()?),
                NEW_CONTACT => RecordId::Contact(decision.new_contact.clone()?),
                _ => RecordId::try_from(id).ok()?,
            };
            if self.is_about(&record) {
                applied.push((record, versions.fields.into_keys().collect()));
            }
        }
        Some(applied)
    }
}

/// Whether the rules have nothing left to write.
fn is_applied(decision: &Decision) -> bool {
    let plan = &decision.plan;
    let is_in_place = |verdict| match verdict {
        FieldVerdict::Set
        | FieldVerdict::Appended
        | FieldVerdict::Same
        | FieldVerdict::NotEmpty
        | FieldVerdict::OnlyOnCreate => true,
        FieldVerdict::Rewritten
        | FieldVerdict::ListFull
        | FieldVerdict::ListUnknown
        | FieldVerdict::NotKept
        | FieldVerdict::Stale
        | FieldVerdict::Refused
        | FieldVerdict::RefusedTogether
        | FieldVerdict::RefusedBefore => false,
    };
    let mut records = plan.records.iter();
    !decision.merged
        && decision.dropped.is_empty()
        && decision.conflicts() == 0
        && plan.refused.is_empty()
        && records.all(|record| {
            record.refused.is_none() && record.fields.iter().all(|field| is_in_place(field.verdict))
        })
}

#[derive(Default)]
struct Hasher(Vec<u8>);

impl Hasher {
    fn add(&mut self, value: &impl Serialize) {
        // Serializing these values to memory cannot fail.
        let _ = serde_json::to_writer(&mut self.0, value);
    }

    fn add_wanted<F: ToString>(&mut self, wanted: &BTreeMap<F, Wanted>) {
        for (field, Wanted { value, write }) in wanted {
            self.add(&(field.to_string(), value, *write as u8));
        }
        // The maps of an event follow each other.
        self.0.push(0);
    }

    fn finish(self) -> ContentHash {
        ContentHash(Uuid::new_v5(&NAMESPACE, &self.0).as_u64_pair().0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::domain::decision::Candidate;
    use crate::domain::event::Event;
    use crate::domain::mapping::tests::{rules, schema};
    use crate::domain::mapping::{Mapping, WriteRule};
    use crate::domain::matching::Verdict;
    use crate::domain::plan::{FieldPlan, Plan, RecordPlan, RecordRef, Refusal};
    use crate::domain::record::{ContactId, Field};

    fn desired(body: Value) -> Desired {
        Mapping::resolve(&rules(), &schema()).unwrap().apply(&Event { body }).unwrap()
    }

    #[test]
    fn what_is_said_of_a_company_does_not_depend_on_the_person() {
        let parts = |user: &str, name: &str, company: &str| {
            let traits = json!({"name": name, "company": {"id": company, "name": "Acme"}});
            Part::of(&desired(json!({"userId": user, "traits": traits})))
        };
        let (one, other) = (parts("u1", "Ann", "c1"), parts("u2", "Bo", "c1"));
        assert_eq!((one.len(), &one[0]), (2, &other[0]));
        assert_ne!(one[1], other[1]);
        let elsewhere = parts("u1", "Ann", "c2");
        assert_eq!(elsewhere[1].keys, one[1].keys);
        assert_ne!(elsewhere[1].content, one[1].content, "a person is in a company");
    }

    #[test]
    fn a_value_of_the_lead_is_not_one_of_the_contact() {
        let event = |lead, contact| Desired { lead, contact, ..Desired::default() };
        let name = || BTreeMap::from([(Field::Name, Wanted { value: "x".into(), write: WriteRule::Always })]);
        let (lead, contact) = (event(name(), BTreeMap::new()), event(BTreeMap::new(), name()));
        assert_ne!(Part::of(&lead)[0].content, Part::of(&contact)[0].content);
    }

    /// A decision that sets the title of an existing Contact.
    fn decision(verdict: FieldVerdict) -> Decision {
        let title = FieldPlan {
            field: "title".into(),
            before: None,
            wanted: "CEO".into(),
            write: WriteRule::Always,
            verdict,
        };
        let record = RecordRef::Contact(ContactId::new("cont_1"));
        let record = RecordPlan { record, name: None, refused: None, fields: vec![title] };
        Decision { plan: Plan { records: vec![record], ..Plan::default() }, ..Decision::default() }
    }

    #[test]
    fn only_what_is_in_the_records_was_applied() {
        let event = Desired { at: Some(jiff::Timestamp::UNIX_EPOCH), ..desired(json!({"userId": "u1"})) };
        let part = &Part::of(&event)[0];
        let applied = |decision: &Decision| part.applied(&event, decision).is_some();
        let title = (RecordId::Contact(ContactId::new("cont_1")), vec![FieldHash::of("title")]);
        assert_eq!(part.applied(&event, &decision(FieldVerdict::Set)), Some(vec![title]));
        for verdict in [FieldVerdict::Same, FieldVerdict::NotEmpty, FieldVerdict::OnlyOnCreate] {
            assert!(applied(&decision(verdict)), "{verdict:?}");
        }
        for verdict in [FieldVerdict::Stale, FieldVerdict::Refused, FieldVerdict::NotKept] {
            assert!(!applied(&decision(verdict)), "{verdict:?}");
        }
        let changed = |change: fn(&mut Decision)| {
            let mut decision = decision(FieldVerdict::Set);
            change(&mut decision);
            applied(&decision)
        };
        let is_conflict = |decision: &mut Decision| {
            decision.candidates = vec![Candidate { id: "cont_2".into(), verdict: Verdict::DifferentPerson }];
        };
        assert!(!changed(is_conflict));
        assert!(!changed(|decision| decision.plan.refused = vec![Refusal::UpdateLead]));
        assert!(!changed(|decision| decision.merged = true));
        let is_new = |decision: &mut Decision| decision.plan.records[0].record = RecordRef::NewContact(None);
        assert!(!changed(is_new), "Close did not say which Contact it created");
    }
}
