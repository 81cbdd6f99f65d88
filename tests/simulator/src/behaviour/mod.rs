//! How the simulated Close behaves: one struct with a field for each property that Close does not document, or that
//! was recorded in several forms. The default is what was recorded last (close-api.md §15).
//!
//! Every field can be set when the simulator starts (`close-sync simulate --set KEY=VALUE`) and at run time
//! (`PUT /_sim/settings`). The doc comment of a field is also its text in `simulate --set help`.

mod knobs;
mod values;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::knobs::Forms;
pub use self::knobs::Knob;
pub(crate) use self::knobs::known;
pub use self::values::{
    ContactLists, Country, CreatedLead, DescendingCursor, ErrorShape, ErrorTexts, EventData, ExactValue,
    HeaderStyle, Lag, LastCursor, LeadContacts, MissingRecord, MissingSlash, RateLimitBody, SearchRows,
    UnknownSelector, UnknownUrl,
};
use crate::readback::{ListForm, NumberForm, TimeForm, UserForm};
use crate::refusal::Object;
use crate::schema::UnknownName;

/// The struct, its default and its help, from one list.
macro_rules! behaviour {
    ($($(#[doc = $doc:literal])+ $field:ident: $kind:ty = $default:expr,)+) => {
        /// The behaviour of the simulated Close. Its JSON form has one key per field.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Behaviour {
            $($(#[doc = $doc])+ pub $field: $kind,)+
        }

        impl Default for Behaviour {
            fn default() -> Self {
                Self { $($field: $default,)+ }
            }
        }

        impl Behaviour {
            /// The fields with their meaning, in order.
            pub fn knobs() -> Vec<Knob> {
                vec![$(Knob::new(stringify!($field), concat!($($doc),+), <$kind>::forms()),)+]
            }
        }
    };
}

behaviour! {
    /// How long a write stays invisible to search (close-api.md §6, §15 row 1).
    search_lag: Lag = Lag::Fixed(Duration::from_secs(2)),
    /// The same for creations, if it differs (close-api.md §15 row 1).
    creation_search_lag: Option<Lag> = None,
    /// The same for changes of custom fields, if it differs: 18 h on 2025-04-22 (close-api.md §15 row 1).
    custom_field_search_lag: Option<Lag> = None,
    /// How old a record is that a read by its id shows, drawn for each read. A record that was created since then is a 404,
    /// and one that was deleted is shown (close-api.md §15 row 2).
    read_lag: Lag = Lag::NONE,
    /// Which of its contacts an answer with a lead has (close-api.md §15 row 9).
    lead_contacts: LeadContacts = LeadContacts::Whole,
    /// Which answers have the emails, phones and URLs of a contact (close-api.md §15 row 9).
    contact_lists: ContactLists = ContactLists::Whole,
    /// How long an event stays invisible in the event log. No lag was recorded (close-api.md §15, end).
    event_lag: Lag = Lag::NONE,
    /// How long the event log shows the data of an object (close-api.md §15 row 15).
    event_data: EventData = EventData::Kept,
    /// The form of the rate limit headers (close-api.md §2, §15 row 12).
    header_style: HeaderStyle = HeaderStyle::SemicolonAndTriple,
    /// The body of a 429 (close-api.md §2).
    rate_limit_body: RateLimitBody = RateLimitBody::Nested,
    /// The seconds in `Retry-After` of a 503 that a fault causes. None: without that header (close-api.md §15 row 14).
    retry_after: Option<u32> = None,
    /// The form of a 400 that names fields (close-api.md §3, §15 row 6).
    error_shape: ErrorShape = ErrorShape::Nested,
    /// The words of a 400 that names fields (close-api.md §3, §15 row 6).
    error_texts: ErrorTexts = ErrorTexts::Cleancat,
    /// The 404 for a record that does not exist (close-api.md §15 row 5).
    missing_record: MissingRecord = MissingRecord::Words,
    /// The 404 for a URL that does not exist (close-api.md §15 row 5).
    unknown_url: UnknownUrl = UnknownUrl::Json,
    /// What a search does with a custom field in `_fields` that does not exist (close-api.md §15 row 7).
    unknown_selector: UnknownSelector = UnknownSelector::Refused,
    /// The cursor of the last page of a search. Null was recorded (close-api.md §6).
    last_cursor: LastCursor = LastCursor::Null,
    /// What the rows of a search have. All fields were recorded; rows with only an id are a precaution.
    search_rows: SearchRows = SearchRows::Fields,
    /// How search interprets the text mode `exact_value` (close-api.md §6, §15 row 20).
    exact_value: ExactValue = ExactValue::FoldsCase,
    /// What a cursor does in descending order (close-api.md §15 row 16).
    descending_cursor: DescendingCursor = DescendingCursor::LosesRows,
    /// The response to a path without its trailing slash (close-api.md §1).
    missing_slash: MissingSlash = MissingSlash::NotFound,
    /// Which of its two contact lists the response to `POST /lead/` has (close-api.md §4).
    created_lead: CreatedLead = CreatedLead::Whole,
    /// Refuse keys that are not in the published contact schema, instead of ignoring them (close-api.md §5).
    strict_contact_keys: bool = false,
    /// `GET /lead/` and `GET /contact/` read from the lagging search index (close-api.md §15 row 17).
    lists_from_index: bool = true,
    /// The country of phone numbers without a prefix (close-api.md §5).
    country: Country = Country::default(),
    /// `GET /me/` says the country. No recording has it.
    country_in_me: bool = false,
    /// How answers write times (close-api.md §15 row 10).
    times: TimeForm = TimeForm::Utc,
    /// How answers write numbers (close-api.md §15 row 10).
    numbers: NumberForm = NumberForm::Number,
    /// How answers write users (close-api.md §15 row 10).
    users: UserForm = UserForm::Id,
    /// How answers write lists of one (close-api.md §15 row 10).
    lists: ListForm = ListForm::AsDeclared,
    /// Fields whose values are accepted and not kept, such as `title` or `custom.cf_leadplan`.
    lossy_fields: Vec<String> = Vec::new(),
    /// Members of custom fields, statuses and users that are null, such as `cf_leadplan.choices` (close-api.md §15 row 11).
    null_members: Vec<String> = Vec::new(),
    /// Shared custom fields that new records have to have. Creations are not refused: it is unknown whether Close does
    /// (close-api.md §15 row 22).
    required_fields: Vec<String> = Vec::new(),
}

impl Behaviour {
    /// Changes the fields that `changes` names.
    ///
    /// # Errors
    /// An unknown field or an invalid value. Then nothing is changed.
    pub fn change(&mut self, changes: Object) -> Result<(), String> {
        let mut fields = self.fields();
        let mut new = self.clone();
        for (key, value) in changes {
            let Some(field) = fields.get_mut(&key) else {
                return Err(format!("unknown setting `{key}`; {}", known(&key, fields.keys())));
            };
            *field = value;
            new = serde_json::from_value(json!(fields)).map_err(|error| format!("`{key}`: {error}"))?;
        }
        *self = new;
        Ok(())
    }

    /// Changes one field, as `simulate --set` does. A value that is not JSON is a text: `search_lag=2s`.
    ///
    /// # Errors
    /// As `change`.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let set = |value: Value| Object::from_iter([(key.to_owned(), value)]);
        let parsed = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
        let is_null = parsed.is_null();
        match self.change(set(parsed)) {
            // Some fields can be null, some have the word as a value.
            Err(_) if is_null => self.change(set(json!(value))),
            result => result,
        }
    }

    /// Removes an unknown name from its list.
    pub fn forget(&mut self, unknown: &UnknownName) {
        for list in [&mut self.lossy_fields, &mut self.null_members, &mut self.required_fields] {
            list.retain(|name| *name != unknown.name);
        }
    }

    /// The fields by name, as JSON.
    pub fn fields(&self) -> Object {
        match json!(self) {
            Value::Object(fields) => fields,
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                Object::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_written_as_a_duration_or_a_range() {
        let seconds = Duration::from_secs;
        for (text, lag) in [
            ("0s", Ok(Lag::NONE)),
            ("2s", Ok(Lag::Fixed(seconds(2)))),
            ("5m", Ok(Lag::Fixed(seconds(300)))),
            ("1s..10s", Ok(Lag::Between(seconds(1), seconds(10)))),
            ("1s .. 10s", Ok(Lag::Between(seconds(1), seconds(10)))),
            ("soon", Err("`soon` is not a duration (try `2s` or `1s..10s`)".to_owned())),
            ("-1s", Err("`-1s` is not a duration (try `2s` or `1s..10s`)".to_owned())),
        ] {
            assert_eq!(text.parse(), lag, "{text}");
        }
    }

    #[test]
    fn a_drawn_lag_stays_in_its_range() {
        let seconds = Duration::from_secs;
        let lag = Lag::Between(seconds(1), seconds(3));
        assert_eq!([0.0, 0.5, 1.0].map(|fraction| lag.draw(fraction)), [1, 2, 3].map(seconds));
        assert_eq!(Lag::Between(seconds(3), seconds(1)).draw(0.7), seconds(3), "an empty range is its start");
    }

    #[test]
    fn fields_are_set_by_name() {
        let mut behaviour = Behaviour::default();
        for (key, value) in [
            ("search_lag", "1s..10s"),
            ("lists_from_index", "false"),
            ("exact_value", "refused"),
            ("country", "GB"),
        ] {
            behaviour.set(key, value).unwrap();
        }
        let seconds = Duration::from_secs;
        let country = Country::try_from("GB".to_owned()).unwrap();
        let expected = Behaviour {
            search_lag: Lag::Between(seconds(1), seconds(10)),
            lists_from_index: false,
            exact_value: ExactValue::Refused,
            country,
            ..Behaviour::default()
        };
        assert_eq!(behaviour, expected);
        let unknown = behaviour.set("serch_lag", "1s").unwrap_err();
        assert!(unknown.contains("`serch_lag`") && unknown.contains("search_lag, "), "{unknown}");
        for (key, value) in [("search_lag", "soon"), ("lists_from_index", "1"), ("exact_value", "odd")] {
            let wrong = behaviour.set(key, value).unwrap_err();
            assert!(wrong.contains(&format!("`{key}`")), "{wrong}");
        }
        assert_eq!(behaviour, expected, "an error changes nothing");
    }
}
