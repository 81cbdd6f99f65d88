//! What an organization has besides records: users, lead statuses, custom fields, and its behaviour.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::behaviour::{self, Behaviour};
use crate::ids::{Ids, format_timestamp};
use crate::readback;
use crate::refusal::{Object, Refusal};
use crate::settings::Settings;

/// A member of the organization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The id, which starts with `user_`.
    pub id: String,
    /// The given name.
    pub first_name: String,
    /// The family name.
    pub last_name: String,
    /// The email address.
    pub email: String,
}

impl User {
    pub fn new(id: &str, first_name: &str, last_name: &str, email: &str) -> Self {
        let [id, first_name, last_name, email] = [id, first_name, last_name, email].map(str::to_owned);
        Self { id, first_name, last_name, email }
    }

    /// The full name. User fields accept it in place of the id.
    pub fn name(&self) -> String {
        format!("{} {}", self.first_name, self.last_name)
    }
}

/// A custom field: configured at the start or created through the API (close-api.md §7).
///
/// As JSON, for `/_sim/fields`: `{"id": "cf_x", "name": "X", "type": "text", "owner": "lead"}`.
/// `choices` and `accepts_multiple_values` are optional.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CustomField {
    /// The id, which starts with `cf_`.
    pub id: String,
    /// The label in Close's user interface. Writes may use it in place of the id.
    pub name: String,
    /// The type of its values.
    #[serde(rename = "type")]
    pub kind: FieldKind,
    /// The allowed values of a choices field.
    #[serde(default)]
    pub choices: Vec<String>,
    /// Whether its value is a list.
    #[serde(default)]
    pub accepts_multiple_values: bool,
    /// Which kinds of records have it.
    pub owner: Owner,
}

impl CustomField {
    /// A field that holds a single value, without choices.
    pub fn new(id: &str, name: &str, kind: FieldKind, owner: Owner) -> Self {
        Self {
            id: id.to_owned(),
            name: name.to_owned(),
            kind,
            choices: Vec::new(),
            accepts_multiple_values: false,
            owner,
        }
    }

    /// Sets the choices.
    #[must_use]
    pub fn choices<'a>(mut self, choices: impl IntoIterator<Item = &'a str>) -> Self {
        self.choices = choices.into_iter().map(str::to_owned).collect();
        self
    }

    /// Makes the value a list.
    #[must_use]
    pub fn multiple(mut self) -> Self {
        self.accepts_multiple_values = true;
        self
    }
}

/// The types of custom fields (close-api.md §7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FieldKind {
    /// A string.
    Text,
    /// A long string.
    Textarea,
    /// A JSON number.
    Number,
    /// `2026-01-31`.
    Date,
    /// ISO 8601. Responses have UTC with six fraction digits.
    Datetime,
    /// One of the field's choices.
    Choices,
    /// A user's id or exact name. Responses have the id.
    User,
    /// A contact's id.
    Contact,
    /// A custom object's id.
    CustomObject,
    /// A string that Close's user interface does not show.
    Hidden,
}

impl FieldKind {
    /// Whether a field of this type may hold a list.
    pub(crate) fn may_be_multiple(self) -> bool {
        match self {
            Self::User | Self::Choices | Self::Contact | Self::CustomObject => true,
            Self::Text | Self::Textarea | Self::Number | Self::Date | Self::Datetime | Self::Hidden => false,
        }
    }
}

/// The kinds of records that have a custom field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// Leads only.
    Lead,
    /// Contacts only.
    Contact,
    /// A shared field of both.
    Shared,
}

/// The two kinds of records in the simulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Lead,
    Contact,
}

impl Kind {
    pub(crate) const BOTH: [Self; 2] = [Self::Lead, Self::Contact];

    /// The word used in paths, search and events.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Lead => "lead",
            Self::Contact => "contact",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<Self> {
        Self::BOTH.into_iter().find(|kind| kind.word() == word)
    }

    /// The word used in error texts.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Lead => "Lead",
            Self::Contact => "Contact",
        }
    }
}

/// A lead status.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    pub(crate) id: String,
    pub(crate) label: String,
}

impl Status {
    /// A status with an id that tests can predict from the label.
    fn new(label: &str) -> Self {
        let letters = label.chars().filter(|letter| letter.is_alphanumeric());
        let id = format!("stat_{}", letters.flat_map(char::to_lowercase).collect::<String>());
        Self { id, label: label.to_owned() }
    }
}

/// A name in a list of the behaviour that the organization does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownName {
    /// The setting with the list.
    pub setting: &'static str,
    /// The name.
    pub name: String,
    hint: String,
}

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: unknown name `{}`; {}", self.setting, self.name, self.hint)
    }
}

/// The schema that writes are validated against.
#[derive(Debug)]
pub(crate) struct Schema {
    pub(crate) organization_id: String,
    /// The user of the API keys.
    pub(crate) user: User,
    more_users: Vec<User>,
    pub(crate) statuses: Vec<Status>,
    pub(crate) fields: Vec<CustomField>,
    pub(crate) behaviour: Behaviour,
    created: Timestamp,
}

impl Schema {
    pub(crate) fn new(settings: &Settings, ids: &mut Ids, created: Timestamp) -> Self {
        Self {
            organization_id: ids.make("orga"),
            user: settings.user.clone(),
            more_users: settings.more_users.clone(),
            statuses: settings.statuses.iter().map(|label| Status::new(label)).collect(),
            fields: settings.custom_fields.clone(),
            behaviour: settings.behaviour.clone(),
            created,
        }
    }

    /// The fields of a kind of record, including shared fields.
    pub(crate) fn fields_of(&self, kind: Kind) -> impl Iterator<Item = &CustomField> {
        let own = match kind {
            Kind::Lead => Owner::Lead,
            Kind::Contact => Owner::Contact,
        };
        self.fields.iter().filter(move |field| field.owner == own || field.owner == Owner::Shared)
    }

    /// The field with this id or, if there is none, with this name.
    pub(crate) fn field(&self, kind: Kind, id_or_name: &str) -> Option<&CustomField> {
        self.fields_of(kind)
            .find(|field| field.id == id_or_name)
            .or_else(|| self.fields_of(kind).find(|field| field.name == id_or_name))
    }

    pub(crate) fn status_label(&self, id: &str) -> Option<&str> {
        self.statuses.iter().find(|status| status.id == id).map(|status| status.label.as_str())
    }

    /// All users; the first is the user of the API keys.
    pub(crate) fn users(&self) -> impl Iterator<Item = &User> {
        std::iter::once(&self.user).chain(&self.more_users)
    }

    /// `GET /me/` (close-api.md §1).
    pub(crate) fn me(&self) -> Value {
        let statuses: Vec<Value> =
            self.statuses.iter().map(|s| self.shown(json!({"id": s.id, "label": s.label}))).collect();
        let created = format_timestamp(self.created);
        let mut me = self.user_item(&self.user);
        me["email_accounts"] = json!([]);
        me["phone_numbers"] = json!([]);
        me["memberships"] = json!([{"id": "memb_simulator", "organization_id": self.organization_id}]);
        me["organizations"] = json!([{
            "id": self.organization_id,
            "name": "Simulated organisation",
            "date_created": created,
            "date_updated": created,
            "created_by": null,
            "updated_by": null,
            "lead_statuses": statuses,
            "pipelines": [],
        }]);
        if self.behaviour.country_in_me {
            me["organizations"][0]["country"] = json!(self.behaviour.country);
        }
        me
    }

    /// `GET /user/`: the members of the organization (<https://developer.close.com/api/resources/users/list>).
    pub(crate) fn user_list(&self) -> Vec<Value> {
        self.users().map(|user| self.shown(self.user_item(user))).collect()
    }

    /// `GET /user/{id}/` (<https://developer.close.com/api/resources/users/get>).
    pub(crate) fn user_by_id(&self, id: &str) -> Result<Value, Refusal> {
        let user = self.users().find(|user| user.id == id).ok_or(Refusal::Missing("User"))?;
        Ok(self.user_item(user))
    }

    fn user_item(&self, user: &User) -> Value {
        let created = format_timestamp(self.created);
        json!({
            "id": user.id,
            "first_name": user.first_name,
            "last_name": user.last_name,
            "email": user.email,
            "image": null,
            "last_used_timezone": null,
            "organizations": [self.organization_id],
            "date_created": created,
            "date_updated": created,
        })
    }

    /// `GET /status/lead/`: ordered by id, not by pipeline, as recorded (close-api.md §8).
    pub(crate) fn statuses(&self) -> Value {
        let mut statuses: Vec<&Status> = self.statuses.iter().collect();
        statuses.sort_by(|a, b| a.id.cmp(&b.id));
        let data: Vec<Value> = statuses
            .into_iter()
            .map(|s| json!({"id": s.id, "label": s.label, "organization_id": self.organization_id}))
            .collect();
        json!({"has_more": false, "data": data})
    }

    /// `GET /custom_field/{owner}/`. It is unclear whether Close's lists for leads and contacts include shared
    /// fields (close-api.md §7). Here they do not, so a client that checks only these lists fails its tests.
    pub(crate) fn custom_fields(&self, owner: Owner) -> Vec<Value> {
        self.fields.iter().filter(|field| field.owner == owner).map(|field| self.item(field)).collect()
    }

    /// `GET /custom_field_schema/{kind}/`: own and shared fields (close-api.md §7).
    pub(crate) fn custom_field_schema(&self, kind: Kind) -> Value {
        let fields: Vec<Value> = self.fields_of(kind).map(|field| self.shown(self.item(field))).collect();
        json!({
            "name": kind.title(),
            "object_type": kind.word(),
            "organization_id": self.organization_id,
            "fields": fields,
        })
    }

    /// The names in the lists of a behaviour that the organization does not have. They would have no effect.
    pub(crate) fn unknown_names(&self, behaviour: &Behaviour) -> Vec<UnknownName> {
        let lossy = ["name", "description", "url", "status_id", "title", "emails", "phones", "urls"]
            .map(String::from);
        let custom = self.fields.iter().map(|field| format!("custom.{}", field.id));
        let lossy: Vec<String> = lossy.into_iter().chain(custom).collect();
        let statuses = self.statuses.iter().map(|status| json!({"id": status.id, "label": status.label}));
        let items = self.fields.iter().map(|field| self.item(field)).chain(statuses);
        let items = items.chain(self.users().map(|user| self.user_item(user)));
        let members: Vec<String> = items
            .flat_map(|item| {
                let id = item["id"].as_str().unwrap_or_default();
                let members = item.as_object().into_iter().flat_map(Object::keys);
                members.map(|member| format!("{id}.{member}")).collect::<Vec<_>>()
            })
            .collect();
        let shared = self.fields.iter().filter(|field| field.owner == Owner::Shared);
        let shared: Vec<String> = shared.map(|field| field.id.clone()).collect();
        let lists = [
            ("lossy_fields", &behaviour.lossy_fields, lossy),
            ("null_members", &behaviour.null_members, members),
            ("required_fields", &behaviour.required_fields, shared),
        ];
        let unknown = lists.into_iter().flat_map(|(setting, names, known)| {
            let unknown = names.iter().filter(|name| !known.contains(name)).cloned().collect::<Vec<_>>();
            unknown.into_iter().map(move |name| {
                let hint = behaviour::known(&name, known.iter());
                UnknownName { setting, name, hint }
            })
        });
        unknown.collect()
    }

    /// An item of the organization, with its members that are null.
    fn shown(&self, item: Value) -> Value {
        readback::with_nulls(item, &self.behaviour.null_members)
    }

    pub(crate) fn item(&self, field: &CustomField) -> Value {
        let created = format_timestamp(self.created);
        let choices = (field.kind == FieldKind::Choices).then_some(&field.choices);
        let mut item = json!({
            "id": field.id,
            "name": field.name,
            "description": "",
            "type": field.kind,
            "choices": choices,
            "accepts_multiple_values": field.accepts_multiple_values,
            "is_shared": field.owner == Owner::Shared,
            "editable_with_roles": [],
            "referenced_custom_type_id": (field.kind == FieldKind::CustomObject).then_some("cotype_simulator"),
            "back_reference_is_visible": false,
            "organization_id": self.organization_id,
            "created_by": self.user.id,
            "updated_by": self.user.id,
            "date_created": created,
            "date_updated": created,
        });
        if field.owner == Owner::Shared {
            let association = |kind: Kind| {
                json!({
                    "object_type": kind.word(),
                    "editable_with_roles": [],
                    "required": self.behaviour.required_fields.contains(&field.id),
                })
            };
            item["associations"] = Kind::BOTH.map(association).into_iter().collect();
        }
        item
    }
}
