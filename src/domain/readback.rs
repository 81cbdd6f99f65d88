//! How Close keeps what it was sent, as its own answers show it.
//!
//! [`same`] and [`Channel::same`] know the notations in which Close may return a value. What
//! they cannot know is learnt: the country by which Close reads national phone numbers, and for each value that came back
//! as something else, what it came back as. Such a value is not sent again as long as Close returns the same and the event
//! wants the same, but for a limited time ([`Answers::forget_not_kept`]): what Close keeps may change.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::Value;
use strum::VariantArray;

use crate::domain::phone::{self, Country};
use crate::domain::record::{Channel, Entry, Field, Fields, Lists, missing_items, same};

/// The most values that are remembered for one field of a record.
const MAX_ANSWERS: usize = 8;

/// What is known about the records of one plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Readback {
    /// The country of national phone numbers, once it is known.
    pub country: Option<Country>,
    /// By the id of the record.
    pub records: HashMap<String, Answers>,
}

/// The values of one record that Close returned otherwise than they were sent, by the key of the field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers(BTreeMap<String, Vec<Answer>>);

/// Hashes, because the values are personal data that may be large.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    effect: DifferenceEffect,
    sent: u64,
    /// `None` if nothing was kept.
    kept: Option<u64>,
}

/// A value that Close returned otherwise than it was sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The key of the field in Close.
    pub field: String,
    answer: Answer,
}

impl Difference {
    pub fn effect(&self) -> DifferenceEffect {
        self.answer.effect
    }
}

/// What Close did with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum DifferenceEffect {
    /// It stored another value.
    Rewritten,
    /// It answered with success, and kept what it had.
    Lost,
}

impl DifferenceEffect {
    pub fn label(self) -> &'static str {
        self.into()
    }
}

impl Answers {
    pub fn learn(&mut self, differences: &[Difference]) {
        for Difference { field, answer, .. } in differences {
            let answers = self.0.entry(field.clone()).or_default();
            answers.retain(|known| known.sent != answer.sent);
            answers.push(answer.clone());
            if answers.len() > MAX_ANSWERS {
                answers.remove(0);
            }
        }
    }

    /// Whether there is a value that is tried again after some time.
    pub fn has_not_kept(&self) -> bool {
        self.0.iter().any(|(field, answers)| answers.iter().any(|answer| !is_lasting(field, answer)))
    }

    /// Forgets the values that Close did not keep, so that they are sent again.
    pub fn forget_not_kept(&mut self) {
        self.0.retain(|field, answers| {
            answers.retain(|answer| is_lasting(field, answer));
            !answers.is_empty()
        });
    }

    fn of(&self, field: &str, sent: u64) -> Option<&Answer> {
        self.0.get(field)?.iter().find(|answer| answer.sent == sent)
    }
}

/// Whether the answer is never forgotten: an entry of a list that Close stored in another form. Sending it again would add
/// it twice.
fn is_lasting(field: &str, answer: &Answer) -> bool {
    answer.kept.is_some() && Channel::VARIANTS.iter().any(|channel| channel.list() == field)
}

impl Readback {
    /// What Close does with a value, if it then answers with what it returns now, `before`.
    pub fn futile(
        &self,
        record: &str,
        field: &str,
        before: Option<&Value>,
        wanted: &Value,
    ) -> Option<DifferenceEffect> {
        let answer = self.records.get(record).and_then(|answers| answers.of(field, hash(wanted)))?;
        (answer.kept == before.map(hash)).then_some(answer.effect)
    }

    /// How the list of a Contact has a value, if sending it would not change the list.
    pub fn find(&self, record: &str, channel: Channel, list: &[Entry], wanted: &str) -> Option<InList> {
        if list.iter().any(|entry| channel.same(wanted, &entry.value, self.country)) {
            return Some(InList::Present);
        }
        let answers = self.records.get(record)?;
        match answers.of(channel.list(), hash_text(wanted))?.kept {
            None => Some(InList::Refused),
            Some(kept) => list.iter().any(|entry| hash_text(&entry.value) == kept).then_some(InList::Present),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InList {
    Present,
    /// Close did not keep it.
    Refused,
}

/// The fields of a step that Close answered with another value. `before` are the values before the step.
pub fn differences(sent: &Fields, before: Option<&Fields>, kept: &Fields) -> Vec<Difference> {
    let different = |(field, value): (&Field, &Value)| {
        let (stored, is_kept): (_, fn(&Value, &Value) -> bool) = match field {
            Field::Add(id) => {
                (&Field::Custom(id.clone()), |answer, value| missing_items(Some(answer), value).is_empty())
            }
            Field::Name | Field::Description | Field::Status | Field::Title | Field::Custom(_) => {
                (field, same)
            }
        };
        let answer = kept.get(stored);
        if answer.is_some_and(|answer| is_kept(answer, value)) {
            return None;
        }
        let is_lost = answer.is_none() || answer == before.and_then(|fields| fields.get(stored));
        let effect = if is_lost { DifferenceEffect::Lost } else { DifferenceEffect::Rewritten };
        let answer = Answer { effect, sent: hash(value), kept: answer.map(hash) };
        Some(Difference { field: field.key(), answer })
    };
    sent.iter().filter_map(different).collect()
}

/// The same for the entries of lists. Lists that the answer does not have are unknown and show nothing.
pub fn list_differences(sent: &Lists, kept: &Lists, country: Option<Country>) -> Vec<Difference> {
    let mut differences = Vec::new();
    for (&channel, sent) in sent {
        let Some(kept) = kept.get(&channel) else { continue };
        let has = |sent: &Entry, kept: &Entry| channel.same(&sent.value, &kept.value, country);
        let missing: Vec<&Entry> =
            sent.iter().filter(|sent| !kept.iter().any(|kept| has(sent, kept))).collect();
        let other: Vec<&Entry> =
            kept.iter().filter(|kept| !sent.iter().any(|sent| has(sent, kept))).collect();
        for (number, entry) in missing.iter().enumerate() {
            // Close keeps the order of a list.
            let kept = other.get(number).filter(|_| other.len() == missing.len());
            let effect = if kept.is_some() { DifferenceEffect::Rewritten } else { DifferenceEffect::Lost };
            let kept = kept.map(|entry| hash_text(&entry.value));
            let answer = Answer { effect, sent: hash_text(&entry.value), kept };
            differences.push(Difference { field: channel.list().to_owned(), answer });
        }
    }
    differences
}

/// The country by which Close has read a new phone number of a list, if the list shows it and `known` does not explain it.
///
/// Numbers that were in the list before say nothing: they may be of any country. Close keeps the order of a list, so the
/// place of a number shows what it became. Without that, a foreign number with the same digits could be taken for it.
pub fn country_of(before: &[Entry], sent: &Lists, kept: &Lists, known: Option<Country>) -> Option<Country> {
    let (sent, kept) = (sent.get(&Channel::Phone)?, kept.get(&Channel::Phone)?);
    let is_old = |sent: &Entry| before.iter().any(|other| other.value == sent.value);
    let is_in_place = |(sent, kept): (&Entry, &Entry)| !is_old(sent) || sent.value == kept.value;
    if sent.len() != kept.len() || !sent.iter().zip(kept).all(is_in_place) {
        return None;
    }
    let new = sent.iter().zip(kept).filter(|(sent, _)| !is_old(sent));
    let mut unexplained = new.filter(|(sent, kept)| {
        known.is_none() || phone::stored_form(&sent.value, known).as_ref() != Some(&kept.value)
    });
    unexplained.find_map(|(sent, kept)| Country::of_answer(&sent.value, &kept.value))
}

fn hash_text(text: &str) -> u64 {
    hash(&Value::from(text))
}

/// The same for a list in any order.
fn hash(value: &Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    match value {
        Value::Array(items) => {
            let mut items: Vec<u64> = items.iter().map(hash).collect();
            items.sort_unstable();
            items.hash(&mut hasher);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
            value.to_string().hash(&mut hasher);
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::phone::tests::REWRITES;

    fn phones(values: &[&str]) -> Lists {
        let entry = |value: &&str| Entry { value: (*value).to_owned(), kind: "office".into() };
        [(Channel::Phone, values.iter().map(entry).collect())].into()
    }

    /// How a list has a number after Close answered `sent` with `kept`.
    fn found(sent: &[&str], kept: &[&str], wanted: &str) -> Option<InList> {
        let (sent, kept) = (phones(sent), phones(kept));
        let mut readback = Readback::default();
        let answers = readback.records.entry("cont_1".into()).or_default();
        answers.learn(&list_differences(&sent, &kept, None));
        readback.find("cont_1", Channel::Phone, &kept[&Channel::Phone], wanted)
    }

    #[test]
    fn a_number_that_close_stored_in_an_unknown_form_is_recognized() {
        let present = Some(InList::Present);
        assert_eq!(found(&["0019 44 20 1"], &["+99 1"], "0019 44 20 1"), present);
        assert_eq!(found(&["+1800", "0019 44 20 1"], &["+1800", "+99 1"], "0019 44 20 1"), present);
        assert_eq!(found(&["0019 44 20 1"], &["+99 1"], "0019 44 20 2"), None, "another number");
        assert_eq!(found(&["0019 44 20 1"], &[], "0019 44 20 1"), Some(InList::Refused));
        assert_eq!(found(&["+1800", "0019 1"], &["+1800"], "0019 1"), Some(InList::Refused));
        assert_eq!(found(&["+44 020 7946 0958"], &["+442079460958"], "+44 20 7946 0958"), present);
    }

    #[test]
    fn an_event_that_is_applied_twice_adds_a_phone_once_in_every_country() {
        let regions = rlibphonenumber::PHONE_NUMBER_UTIL.get_supported_regions();
        let countries: Vec<Country> =
            regions.filter_map(|region| Country::parse(&region.as_region_str())).collect();
        assert!(countries.len() > 200, "{}", countries.len());
        for country in countries {
            for (_, text, _) in REWRITES {
                let sent = phone::normalize(text).unwrap();
                // What the library does not read, Close refuses.
                let Some(stored) = phone::stored_form(&sent, Some(country)) else { continue };
                let entry = &phones(&[&stored])[&Channel::Phone];
                let mut readback = Readback { country: Some(country), ..Readback::default() };
                let present = Some(InList::Present);
                assert_eq!(
                    readback.find("cont_1", Channel::Phone, entry, &sent),
                    present,
                    "{country}: {text}"
                );

                // The country is unknown, and learned from the first answer if it shows it.
                let (sent_list, kept) = (phones(&[&sent]), phones(&[&stored]));
                readback.country = country_of(&[], &sent_list, &kept, None);
                let answers = readback.records.entry("cont_1".into()).or_default();
                let differences = list_differences(&sent_list, &kept, readback.country);
                answers.learn(&differences);
                assert_eq!(
                    readback.find("cont_1", Channel::Phone, entry, &sent),
                    present,
                    "{country}: {text}"
                );
            }
        }
    }

    #[test]
    fn numbers_that_were_in_the_list_teach_no_country() {
        let country = |before: &[&str], sent: &[&str], kept: &[&str], known: Option<&str>| {
            let before = phones(before).remove(&Channel::Phone).unwrap();
            let known = known.and_then(Country::parse);
            country_of(&before, &phones(sent), &phones(kept), known).map(|country| country.to_string())
        };
        let (vienna, berlin, local) = ("+4330901820", "+4930901820", "030 901820");
        let sent = [vienna, local];
        assert_eq!(country(&[vienna], &sent, &[vienna, berlin], Some("DE")), None);
        assert_eq!(country(&[vienna], &sent, &[vienna, berlin], None).as_deref(), Some("DE"));
        assert_eq!(country(&[vienna], &sent, &[vienna], None), None, "lost, or the same");
        assert_eq!(country(&[vienna], &sent, &[vienna, vienna], None).as_deref(), Some("AT"));
        assert_eq!(country(&[vienna], &sent, &[berlin, vienna], None), None, "in another order");
        assert_eq!(country(&[], &[local], &[berlin], Some("AT")).as_deref(), Some("DE"));
    }

    #[test]
    fn a_number_that_a_person_deleted_is_added_again() {
        let mut readback = Readback::default();
        let answers = readback.records.entry("cont_1".into()).or_default();
        let differences = list_differences(&phones(&["0019 1"]), &phones(&["+99 1"]), None);
        answers.learn(&differences);
        assert_eq!(readback.find("cont_1", Channel::Phone, &[], "0019 1"), None);
    }

    #[test]
    fn only_what_close_keeps_in_a_list_in_another_form_is_never_forgotten() {
        let mut readback = Readback::default();
        let kept = phones(&["+99 1"]);
        let answers = readback.records.entry("cont_1".into()).or_default();
        answers.learn(&list_differences(&phones(&["0019 1"]), &kept, None));
        assert!(!answers.has_not_kept());
        answers.learn(&list_differences(&phones(&["+99 1", "0019 2"]), &kept, None));
        let title = |title: &str| Fields::from([(Field::Title, Value::from(title))]);
        answers.learn(&differences(&title("CEO"), None, &title("Chief")));
        assert!(answers.has_not_kept());
        let find = |readback: &Readback, wanted: &str| {
            readback.find("cont_1", Channel::Phone, &kept[&Channel::Phone], wanted)
        };
        assert_eq!(find(&readback, "0019 2"), Some(InList::Refused));
        readback.records.get_mut("cont_1").unwrap().forget_not_kept();
        assert_eq!(find(&readback, "0019 1"), Some(InList::Present), "it would be added twice");
        assert_eq!(find(&readback, "0019 2"), None);
        let (before, wanted) = (Value::from("Chief"), Value::from("CEO"));
        assert_eq!(readback.futile("cont_1", "title", Some(&before), &wanted), None);
    }

    #[test]
    fn the_answers_of_one_field_are_bounded() {
        let mut answers = Answers::default();
        let value = |n: usize| Fields::from([(Field::Title, Value::from(n.to_string()))]);
        for n in 0..2 * MAX_ANSWERS {
            answers.learn(&differences(&value(n), None, &Fields::new()));
        }
        assert_eq!(answers.0["title"].len(), MAX_ANSWERS);
    }

    #[test]
    fn a_list_that_the_answer_lacks_shows_nothing() {
        assert_eq!(list_differences(&phones(&["+1800"]), &Lists::new(), None), []);
    }
}
