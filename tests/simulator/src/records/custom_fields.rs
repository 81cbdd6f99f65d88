//! Creates, changes and deletes custom fields, and updates the values in the records.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::Records;
use crate::custom;
use crate::refusal::{FieldErrors, NOT_A_CHOICE, NOT_TEXT, Object, REQUIRED, Refusal};
use crate::schema::{CustomField, FieldKind, Owner};

impl Records {
    /// Creates a custom field from a request body (close-api.md §7).
    pub(crate) fn create_field(&mut self, owner: Owner, body: &Object) -> Result<Value, Refusal> {
        let invalid = |field: &str, text: &str| Refusal::Invalid(FieldErrors::one(field, text));
        let name = body.get("name").and_then(Value::as_str).ok_or_else(|| invalid("name", REQUIRED))?;
        let kind = body.get("type").ok_or_else(|| invalid("type", REQUIRED))?;
        let kind: FieldKind =
            serde_json::from_value(kind.clone()).map_err(|_| invalid("type", NOT_A_CHOICE))?;
        let choices: Vec<String> = match body.get("choices") {
            None | Some(Value::Null) => Vec::new(),
            Some(choices) => {
                serde_json::from_value(choices.clone()).map_err(|_| invalid("choices", NOT_TEXT))?
            }
        };
        let mut field = CustomField::new(&self.ids.make("cf"), name, kind, owner);
        field.choices = choices;
        field.accepts_multiple_values = body.get("accepts_multiple_values") == Some(&json!(true));
        let item = self.schema.item(&field);
        self.add_field(field)?;
        Ok(item)
    }

    /// Adds a custom field. Its id must be unused.
    pub(crate) fn add_field(&mut self, field: CustomField) -> Result<(), Refusal> {
        self.validate_field(&field)?;
        if self.schema.fields.iter().any(|other| other.id == field.id) {
            let text = "A Custom Field with this id already exists.";
            return Err(Refusal::Invalid(FieldErrors::one("id", text)));
        }
        self.schema.fields.push(field);
        Ok(())
    }

    /// Replaces the custom field with the same id. Values that are no longer valid are deleted; Close documents
    /// only that it does not return them (close-api.md §7).
    pub(crate) fn change_field(&mut self, field: CustomField, now: Timestamp) -> Result<(), Refusal> {
        self.validate_field(&field)?;
        let id = field.id.clone();
        let mut fields = self.schema.fields.iter_mut();
        *fields.find(|old| old.id == id).ok_or(Refusal::Missing("CustomField"))? = field;
        self.revalidate_values(&id, now);
        Ok(())
    }

    /// Deletes a custom field and its values (close-api.md §7). Returns whether the field existed.
    pub(crate) fn remove_field(&mut self, id: &str, now: Timestamp) -> bool {
        let n_before = self.schema.fields.len();
        self.schema.fields.retain(|field| field.id != id);
        self.revalidate_values(id, now);
        self.schema.fields.len() < n_before
    }

    fn validate_field(&self, field: &CustomField) -> Result<(), Refusal> {
        let invalid = |key: &str, text: &str| Err(Refusal::Invalid(FieldErrors::one(key, text)));
        if field.accepts_multiple_values && !field.kind.may_be_multiple() {
            return invalid("accepts_multiple_values", NOT_A_CHOICE);
        }
        if field.kind == FieldKind::Choices && field.choices.is_empty() {
            return invalid("choices", REQUIRED);
        }
        let rivals = |other: &&CustomField| other.owner == field.owner && other.id != field.id;
        if self.schema.fields.iter().filter(rivals).any(|other| other.name == field.name) {
            return invalid("name", "A Custom Field with this name already exists.");
        }
        Ok(())
    }

    /// Deletes the values that a changed or deleted custom field no longer accepts.
    fn revalidate_values(&mut self, field_id: &str, now: Timestamp) {
        let mut changed = Vec::new();
        for record in self.by_id.values_mut() {
            let Some(value) = record.custom.remove(field_id) else { continue };
            let field = self.schema.fields_of(record.kind).find(|field| field.id == field_id);
            if let Some(value) = field.and_then(|field| custom::still_valid(field, &value, &self.schema)) {
                record.custom.insert(field_id.to_owned(), value);
            }
            changed.push(record.id.clone());
        }
        // The order decides which random lag each record gets.
        changed.sort_unstable();
        for id in changed {
            self.reindex(&id, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::super::tests::{at, lead, map, records};
    use super::*;
    use crate::ids::Ids;
    use crate::schema::Kind;
    use crate::settings::Settings;

    #[test]
    fn a_changed_field_keeps_the_values_it_takes() {
        let field = |kind, owner| CustomField::new("cf_x", "X", kind, owner);
        let text = field(FieldKind::Text, Owner::Lead);
        let letter = field(FieldKind::Choices, Owner::Lead).choices(["a", "b", "c"]);
        let letters = letter.clone().multiple();
        for (before, held, after, kept) in [
            (&text, json!("x"), CustomField { name: "Y".into(), ..text.clone() }, json!("x")),
            (&text, json!("x"), field(FieldKind::Number, Owner::Lead), json!(null)),
            (&text, json!("2026-01-31"), field(FieldKind::Date, Owner::Lead), json!("2026-01-31")),
            (&text, json!("Ada Account"), field(FieldKind::User, Owner::Lead), json!("user_adaaccount")),
            (&text, json!("x"), field(FieldKind::Text, Owner::Shared), json!("x")),
            (&text, json!("x"), field(FieldKind::Text, Owner::Contact), json!(null)),
            (&letter, json!("c"), letter.clone().choices(["a", "b"]), json!(null)),
            (&letter, json!("a"), letters.clone(), json!(["a"])),
            (&letters, json!(["a", "b", "c"]), letters.clone().choices(["c", "b"]), json!(["b", "c"])),
            (&letters, json!(["b", "c"]), letters.clone().choices(["a"]), json!(null)),
            (&letters, json!(["b", "c"]), letter.clone(), json!("b")),
        ] {
            let settings = Settings { custom_fields: vec![before.clone()], ..Settings::fast() };
            let mut records = Records::new(&settings, Ids::new(Uuid::nil()), at(0));
            let id = lead(&mut records, json!({"custom.cf_x": held}));
            records.change_field(after.clone(), at(2)).unwrap();
            let lead = records.get(Kind::Lead, &id).unwrap();
            assert_eq!(lead["custom.cf_x"], kept, "{held} of {before:?} in {after:?}");
            records.index.apply_due(at(2));
            assert_eq!(records.index.get(&id).unwrap().value["custom.cf_x"], kept);
        }
    }

    #[test]
    fn a_deleted_field_takes_its_values_along() {
        let mut records = records();
        let id = lead(&mut records, json!({"custom.cf_leadseats": 5, "custom.cf_leadplan": "pro"}));
        assert!(records.remove_field("cf_leadseats", at(2)));
        assert!(!records.remove_field("cf_leadseats", at(2)));
        let lead = records.get(Kind::Lead, &id).unwrap();
        assert_eq!((lead.get("custom.cf_leadseats"), &lead["custom"]), (None, &json!({"Plan": "pro"})));
        assert_eq!(lead["date_updated"], lead["date_created"], "deleting a field does not update the lead");
        let seats = map(json!({"custom.cf_leadseats": 6}));
        assert!(records.update(Kind::Lead, &id, &seats, at(3)).is_err());
        records.add_field(CustomField::new("cf_leadseats", "Seats", FieldKind::Number, Owner::Lead)).unwrap();
        let lead = records.get(Kind::Lead, &id).unwrap();
        assert_eq!(lead.get("custom.cf_leadseats"), None, "the new field starts empty");
    }

    #[test]
    fn fields_that_make_no_sense_are_refused() {
        let new = |id: &str, name: &str, kind| CustomField::new(id, name, kind, Owner::Lead);
        let wrong = |key: &str, text: &str| Err(Refusal::Invalid(FieldErrors::one(key, text)));
        for (field, refused) in [
            (
                new("cf_leadseats", "X", FieldKind::Text).multiple(),
                wrong("accepts_multiple_values", NOT_A_CHOICE),
            ),
            (new("cf_leadseats", "X", FieldKind::Choices), wrong("choices", REQUIRED)),
            (
                new("cf_leadseats", "Plan", FieldKind::Number),
                wrong("name", "A Custom Field with this name already exists."),
            ),
        ] {
            assert_eq!(records().add_field(field.clone()), refused, "{field:?}");
            assert_eq!(records().change_field(field, at(1)), refused);
        }
        let known = new("cf_leadplan", "Plan", FieldKind::Text);
        assert_eq!(
            records().add_field(known.clone()),
            wrong("id", "A Custom Field with this id already exists.")
        );
        assert_eq!(records().change_field(known, at(1)), Ok(()));
        let unknown = CustomField { owner: Owner::Contact, ..new("cf_x", "Plan", FieldKind::Text) };
        assert_eq!(records().add_field(unknown.clone()), Ok(()), "another owner may use the name");
        assert_eq!(records().change_field(unknown, at(1)), Err(Refusal::Missing("CustomField")));
    }
}
