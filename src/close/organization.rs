//! Reading what an organization has besides records: custom fields, lead statuses and users.
//!
//! Answers can lack members, or have null in their place (close-api.md §15). Each item is read alone: one that cannot be
//! read is left out and reported, and the others stay.

use serde::Deserialize;
use serde_json::Value;

use crate::domain::record::{FieldId, is_id};
use crate::domain::schema::{CustomField, FieldKind, Item, Problem, Status, UnreadableItem, User};

/// The organization of the API key, from `GET /me/`.
#[derive(Clone, Debug, PartialEq)]
pub struct Organization {
    pub id: Option<String>,
    pub name: String,
    /// In the organization's order. Empty when Close did not send them.
    pub statuses: Listed<Status>,
    /// The country of national phone numbers, if Close says it.
    pub country: Option<String>,
}

/// What could be read of a list, and what could not.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed<T> {
    pub items: Vec<T>,
    pub unreadable: Vec<UnreadableItem>,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self { items: Vec::new(), unreadable: Vec::new() }
    }
}

impl<T> Listed<T> {
    fn read(list: &[Value], item: Item, read: impl Fn(&Value) -> Result<T, Problem>) -> Self {
        let (mut items, mut unreadable) = (Vec::with_capacity(list.len()), Vec::new());
        for member in list {
            match read(member) {
                Ok(read) => items.push(read),
                Err(problem) => {
                    let (id, name) = (text(member, "id"), text(member, "name").or(text(member, "label")));
                    unreadable.push(UnreadableItem { item, id, name, problem });
                }
            }
        }
        Self { items, unreadable }
    }

    pub(crate) fn append(&mut self, mut other: Self) {
        self.items.append(&mut other.items);
        self.unreadable.append(&mut other.unreadable);
    }
}

fn text(member: &Value, key: &str) -> Option<String> {
    member.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn id(member: &Value, prefix: &str) -> Result<String, Problem> {
    text(member, "id").filter(|id| is_id(Some(prefix), id)).ok_or(Problem::Id)
}

#[derive(Deserialize)]
pub(crate) struct Schema {
    fields: Vec<Value>,
}

impl Schema {
    pub(crate) fn custom_fields(&self, of: Item) -> Listed<CustomField> {
        Listed::read(&self.fields, of, |member| custom_field(member, of))
    }
}

fn custom_field(member: &Value, of: Item) -> Result<CustomField, Problem> {
    let id = text(member, "id").and_then(|id| FieldId::parse(&id)).ok_or(Problem::Id)?;
    let kind = text(member, "type").ok_or(Problem::Type)?;
    let choices = member.get("choices").and_then(Value::as_array);
    if kind == "choices" && choices.is_none() {
        return Err(Problem::Choices);
    }
    // A choice without a text cannot be written.
    let choices = choices.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    Ok(CustomField {
        // A field without a name can be named by its id.
        name: text(member, "name").unwrap_or_else(|| id.to_string()),
        kind: FieldKind::parse(&kind, choices),
        multiple: member.get("accepts_multiple_values").and_then(Value::as_bool).unwrap_or(false),
        required: is_required(member, of),
        id,
    })
}

/// Whether a shared field is required for records of this kind.
fn is_required(member: &Value, of: Item) -> bool {
    let kind = match of {
        Item::LeadField => "lead",
        Item::ContactField => "contact",
        Item::LeadStatus | Item::User => return false,
    };
    let associations = member.get("associations").and_then(Value::as_array).into_iter().flatten();
    associations
        .filter(|association| association["object_type"] == kind)
        .any(|association| association["required"] == true)
}

#[derive(Deserialize)]
pub(crate) struct Users {
    pub(crate) data: Vec<Value>,
    #[serde(default)]
    pub(crate) has_more: Option<bool>,
}

impl Users {
    pub(crate) fn users(&self) -> Listed<User> {
        Listed::read(&self.data, Item::User, user)
    }
}

/// A user (<https://developer.close.com/api/resources/users/list>).
fn user(member: &Value) -> Result<User, Problem> {
    let id = id(member, "user")?;
    let names = ["first_name", "last_name"].into_iter().filter_map(|key| text(member, key));
    let name = names.collect::<Vec<_>>().join(" ").trim().to_owned();
    Ok(User { id, name, email: text(member, "email").unwrap_or_default() })
}

#[derive(Deserialize)]
pub(crate) struct Me {
    organizations: Option<Vec<Value>>,
}

impl From<Me> for Organization {
    fn from(me: Me) -> Self {
        let organization = me.organizations.unwrap_or_default().into_iter().next().unwrap_or_default();
        let statuses = organization.get("lead_statuses").and_then(Value::as_array);
        let status = |member: &Value| {
            let id = id(member, "stat")?;
            Ok(Status { label: text(member, "label").unwrap_or_else(|| id.clone()), id })
        };
        Self {
            id: text(&organization, "id"),
            name: text(&organization, "name").unwrap_or_default(),
            statuses: Listed::read(statuses.map_or(&[][..], Vec::as_slice), Item::LeadStatus, status),
            // Not documented, and not in any recording.
            country: text(&organization, "country"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(members: Value) -> Listed<CustomField> {
        let schema: Schema = serde_json::from_value(json!({"fields": members})).unwrap();
        schema.custom_fields(Item::LeadField)
    }

    #[test]
    fn an_odd_custom_field_is_left_out_alone() {
        let good = json!({"id": "cf_1", "name": "Plan", "type": "choices", "choices": ["a", null, 5, "b"]});
        for (odd, problem) in [
            (json!({"id": "cf_x", "name": "X", "type": null}), Problem::Type),
            (json!({"id": "cf_x", "name": "X"}), Problem::Type),
            (json!({"id": null, "name": "X", "type": "text"}), Problem::Id),
            (json!({"id": "../contact/cont_x", "name": "X", "type": "text"}), Problem::Id),
            (json!({"id": "cf_x", "name": "X", "type": "choices", "choices": null}), Problem::Choices),
            (json!({"id": "cf_x", "name": "X", "type": "choices"}), Problem::Choices),
            (json!(null), Problem::Id),
            (json!("cf_x"), Problem::Id),
        ] {
            let listed = fields(json!([odd, good]));
            let ids: Vec<&str> = listed.items.iter().map(|field| field.id.as_str()).collect();
            assert_eq!(ids, ["cf_1"], "{odd}");
            assert_eq!(listed.items[0].kind, FieldKind::Choices(vec!["a".into(), "b".into()]));
            let problems: Vec<Problem> = listed.unreadable.iter().map(|item| item.problem).collect();
            assert_eq!(problems, [problem], "{odd}");
        }
    }

    #[test]
    fn a_missing_name_or_list_is_no_reason_to_leave_a_field_out() {
        for odd in [
            json!({"id": "cf_1", "type": "text"}),
            json!({"id": "cf_1", "name": null, "type": "text", "choices": null, "accepts_multiple_values": null}),
        ] {
            let listed = fields(json!([odd]));
            assert_eq!(listed.unreadable, [], "{odd}");
            assert_eq!((listed.items[0].name.as_str(), listed.items[0].multiple), ("cf_1", false));
        }
        assert!(serde_json::from_value::<Schema>(json!({"fields": null})).is_err(), "not a schema");
    }

    #[test]
    fn odd_statuses_users_and_organizations_are_left_out() {
        let me = |organizations: Value| {
            Organization::from(serde_json::from_value::<Me>(json!({"organizations": organizations})).unwrap())
        };
        let statuses = json!([{"id": "stat_1", "label": null}, {"label": "L"}, {"id": "lead_1"}, null]);
        let organization = me(json!([{"name": null, "lead_statuses": statuses}]));
        assert_eq!(organization.statuses.items, [Status { id: "stat_1".into(), label: "stat_1".into() }]);
        assert_eq!(organization.statuses.unreadable.len(), 3);
        for odd in [json!(null), json!([]), json!([null]), json!([{"lead_statuses": null}])] {
            assert_eq!(me(odd).statuses, Listed::default());
        }
        let users = json!({"data": [{"id": "user_1", "first_name": null, "email": null}, {"id": "../x"}], "has_more": null});
        let users = serde_json::from_value::<Users>(users).unwrap().users();
        assert_eq!((users.items.len(), users.unreadable.len()), (1, 1));
    }
}
