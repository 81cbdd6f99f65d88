//! How the simulated Close behaves: one struct with a field for each property that Close does not document, or that
//! was recorded in several forms. The default is what was recorded last (close-api.md §15).
//!
//! Every field can be set when the simulator starts (`close-sync simulate --set KEY=VALUE`) and at run time
//! (`PUT /_sim/settings`).

use std::{fmt, str::FromStr, time::Duration};

use jiff::SignedDuration;
use rlibphonenumber::{PHONE_NUMBER_UTIL, Region};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::readback::{ListForm, NumberForm, TimeForm, UserForm};
use crate::refusal::Object;

/// The behaviour of the simulated Close. Its JSON form has one key per field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Behaviour {
    /// How long a write stays invisible to search (close-api.md §6, §15 row 1).
    pub search_lag: Lag,
    /// The same for creations, if it differs (close-api.md §15 row 1).
    pub creation_search_lag: Option<Lag>,
    /// The same for changes of custom fields, if it differs: 18 h on 2025-04-22 (close-api.md §15 row 1).
    pub custom_field_search_lag: Option<Lag>,
    /// How old a record is that a read by its id shows, drawn for each read. A record that was created since then is a 404,
    /// and one that was deleted is shown (close-api.md §15 row 2).
    pub read_lag: Lag,
    /// Which of its contacts an answer with a lead has (close-api.md §15 row 9).
    pub lead_contacts: LeadContacts,
    /// Which answers have the emails, phones and URLs of a contact (close-api.md §15 row 9).
    pub contact_lists: ContactLists,
    /// How long an event stays invisible in the event log. No lag was recorded (close-api.md §15, end).
    pub event_lag: Lag,
    /// How long the event log shows the data of an object (close-api.md §15 row 15).
    pub event_data: EventData,
    /// The form of the rate limit headers (close-api.md §2, §15 row 12).
    pub header_style: HeaderStyle,
    /// The body of a 429 (close-api.md §2).
    pub rate_limit_body: RateLimitBody,
    /// The seconds in `Retry-After` of a 503 that a fault causes. None: without that header (close-api.md §15 row 14).
    pub retry_after: Option<u32>,
    /// The form of a 400 that names fields (close-api.md §3, §15 row 6).
    pub error_shape: ErrorShape,
    /// The words of a 400 that names fields (close-api.md §3, §15 row 6).
    pub error_texts: ErrorTexts,
    /// The 404 for a record that does not exist (close-api.md §15 row 5).
    pub missing_record: MissingRecord,
    /// The 404 for a URL that does not exist (close-api.md §15 row 5).
    pub unknown_url: UnknownUrl,
    /// What a search does with a custom field in `_fields` that does not exist (close-api.md §15 row 7).
    pub unknown_selector: UnknownSelector,
    /// The cursor of the last page of a search. Null was recorded (close-api.md §6).
    pub last_cursor: LastCursor,
    /// What the rows of a search have. All fields were recorded; rows with only an id are a precaution.
    pub search_rows: SearchRows,
    /// How search interprets the text mode `exact_value` (close-api.md §6, §15 row 20).
    pub exact_value: ExactValue,
    /// What a cursor does in descending order (close-api.md §15 row 16).
    pub descending_cursor: DescendingCursor,
    /// The response to a path without its trailing slash (close-api.md §1).
    pub missing_slash: MissingSlash,
    /// Which of its two contact lists the response to `POST /lead/` has (close-api.md §4).
    pub created_lead: CreatedLead,
    /// Refuse keys that are not in the published contact schema, instead of ignoring them (close-api.md §5).
    pub strict_contact_keys: bool,
    /// `GET /lead/` and `GET /contact/` read from the lagging search index (close-api.md §15 row 17).
    pub lists_from_index: bool,
    /// The country of phone numbers without a prefix (close-api.md §5).
    pub country: Country,
    /// `GET /me/` says the country. No recording has it.
    pub country_in_me: bool,
    /// How answers write times (close-api.md §15 row 10).
    pub times: TimeForm,
    /// How answers write numbers (close-api.md §15 row 10).
    pub numbers: NumberForm,
    /// How answers write users (close-api.md §15 row 10).
    pub users: UserForm,
    /// How answers write lists of one (close-api.md §15 row 10).
    pub lists: ListForm,
    /// Fields whose values are accepted and not kept, such as `title` or `custom.cf_leadplan`.
    pub lossy_fields: Vec<String>,
    /// Members of custom fields, statuses and users that are null, such as `cf_leadplan.choices` (close-api.md §15 row 11).
    pub null_members: Vec<String>,
    /// Shared custom fields that new records have to have. Creations are not refused: it is unknown whether Close does
    /// (close-api.md §15 row 22).
    pub required_fields: Vec<String>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            search_lag: Lag::Fixed(Duration::from_secs(2)),
            creation_search_lag: None,
            custom_field_search_lag: None,
            read_lag: Lag::NONE,
            lead_contacts: LeadContacts::Whole,
            contact_lists: ContactLists::Whole,
            event_lag: Lag::NONE,
            event_data: EventData::Kept,
            header_style: HeaderStyle::SemicolonAndTriple,
            retry_after: None,
            error_shape: ErrorShape::Nested,
            error_texts: ErrorTexts::Cleancat,
            missing_record: MissingRecord::Words,
            unknown_url: UnknownUrl::Json,
            unknown_selector: UnknownSelector::Refused,
            last_cursor: LastCursor::Null,
            search_rows: SearchRows::Fields,
            rate_limit_body: RateLimitBody::Nested,
            exact_value: ExactValue::FoldsCase,
            descending_cursor: DescendingCursor::LosesRows,
            missing_slash: MissingSlash::NotFound,
            created_lead: CreatedLead::Whole,
            strict_contact_keys: false,
            lists_from_index: true,
            country: Country::default(),
            country_in_me: false,
            times: TimeForm::Utc,
            numbers: NumberForm::Number,
            users: UserForm::Id,
            lists: ListForm::AsDeclared,
            lossy_fields: Vec::new(),
            null_members: Vec::new(),
            required_fields: Vec::new(),
        }
    }
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
                let known: Vec<&str> = fields.keys().map(String::as_str).collect();
                return Err(format!("unknown setting `{key}`; known: {}", known.join(", ")));
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

/// How long a write stays invisible: a fixed time, or a random time for each write.
///
/// Its text form is `2s`, or `1s..10s` for a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Lag {
    /// Every write takes this long.
    Fixed(Duration),
    /// Every write takes a random time from this range, so that writes can overtake one another.
    Between(Duration, Duration),
}

impl Lag {
    pub const NONE: Self = Self::Fixed(Duration::ZERO);

    /// The longest lag of one write.
    pub fn longest(self) -> Duration {
        match self {
            Self::Fixed(lag) | Self::Between(_, lag) => lag,
        }
    }

    /// The lag of one write. `fraction` is a random number between 0 and 1.
    pub(crate) fn draw(self, fraction: f64) -> Duration {
        match self {
            Self::Fixed(lag) => lag,
            Self::Between(least, most) => {
                least + most.saturating_sub(least).mul_f64(fraction.clamp(0.0, 1.0))
            }
        }
    }
}

impl FromStr for Lag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let duration = |part: &str| -> Result<Duration, String> {
            let refused = || format!("`{part}` is not a duration (try `2s` or `1s..10s`)");
            let parsed: SignedDuration = part.trim().parse().map_err(|_| refused())?;
            Duration::try_from(parsed).map_err(|_| refused())
        };
        match text.split_once("..") {
            None => Ok(Self::Fixed(duration(text)?)),
            Some((least, most)) => Ok(Self::Between(duration(least)?, duration(most)?)),
        }
    }
}

impl TryFrom<String> for Lag {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Lag> for String {
    fn from(lag: Lag) -> Self {
        lag.to_string()
    }
}

impl fmt::Display for Lag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(lag) => write!(f, "{lag:?}"),
            Self::Between(least, most) => write!(f, "{least:?}..{most:?}"),
        }
    }
}

/// Which of its contacts an answer with a lead has. The specification of 2026 marks `contacts` as deprecated and requires
/// only `contact_ids`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeadContacts {
    /// All contacts.
    Whole,
    /// All but the newest one. `contact_ids` has them all.
    WithoutNewest,
    /// `contacts` is empty. `contact_ids` has them all.
    Empty,
    /// No `contacts`.
    Absent,
}

/// Which answers have the emails, phones and URLs of a contact. The specification of 2026 does not require them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContactLists {
    /// All answers.
    Whole,
    /// They are null in the contacts of a lead.
    NullInLeads,
    /// They are missing in the contacts of a lead.
    MissingInLeads,
    /// They are null everywhere.
    Null,
    /// They are missing everywhere.
    Missing,
}

/// How long the event log shows `data` and `previous_data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventData {
    /// As long as the event, as for admins.
    Kept,
    /// For one hour, as for other users. Then both are null.
    HiddenAfterAnHour,
}

/// The forms of Close's rate limit headers over the years (close-api.md §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeaderStyle {
    /// `RateLimit: limit=1, remaining=0, reset=0.5`: the documented form.
    Comma,
    /// The same with `;` between the items.
    Semicolon,
    /// The same with a `ratelimit-*` triple of another bucket beside it, as recorded in 2026.
    SemicolonAndTriple,
    /// The triple beside a `RateLimit` in a form that is not Close's: that of the IETF draft.
    UnreadableAndTriple,
    /// The deprecated `X-Rate-Limit-Limit`, `-Remaining` and `-Reset`.
    Legacy,
    /// The legacy names next to the `ratelimit-*` triple of a proxy, as recorded in 2022.
    Proxy,
    /// No header at all; a 429 has no `Retry-After` either.
    Absent,
}

/// The form of a 400 that names fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorShape {
    /// `{"field-errors": {"phones": {"errors": {"0": {"errors": [], "field-errors": {"phone": "…"}}}}}}`, as recorded.
    Nested,
    /// `{"field-errors": {"phones": {"0": {"phone": "…"}}}}`.
    Plain,
    /// `{"field-errors": {"phones.0.phone": "…"}}`.
    Dotted,
    /// `{"errors": ["…"]}`: the text alone.
    List,
    /// `{"error": "…"}`: the text alone.
    General,
    /// `{"error": "The request is not valid."}`: neither the field nor its text.
    Vague,
    /// 422 `{"detail": [{"loc": ["body", "phones", 0, "phone"], "msg": "…"}]}`.
    Detail,
}

/// The words of a 400 that names fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorTexts {
    /// Those of Close's own validator.
    Cleancat,
    /// Those of pydantic, which Close uses for parameters since 2026.
    Pydantic,
}

/// The 404 for a record that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MissingRecord {
    /// Close's words: `Empty query: Lead matching query does not exist.`
    Words,
    /// `{"error": "Not Found"}`.
    OtherWords,
    /// A page in HTML.
    Html,
}

/// The 404 for a URL that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnknownUrl {
    /// `{"error": "The requested URL was not found on the server."}`.
    Json,
    /// A page in HTML.
    Html,
}

/// What a search does with a custom field in `_fields` that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnknownSelector {
    /// 400.
    Refused,
    /// The rows do not have it.
    Ignored,
}

/// The cursor of the last page of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LastCursor {
    Null,
    /// `""`.
    Empty,
    /// No such key.
    Absent,
}

/// What the rows of a search have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SearchRows {
    /// The fields that were asked for.
    Fields,
    /// Only the id.
    OnlyIds,
}

/// The body of a 429 (close-api.md §2). Clients should not need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RateLimitBody {
    /// `{"error": {"message": …, "rate_reset": "0.5", …}}`, the recent form.
    Nested,
    /// The same keys at the top level, with a number for `rate_reset`.
    Flat,
    /// An empty body.
    Empty,
    /// Plain text.
    Text,
}

/// How search interprets `"mode": "exact_value"`, which Close does not document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExactValue {
    /// Ignores case and surrounding whitespace, so a match can still be a different id.
    FoldsCase,
    /// Compares exactly.
    Exact,
    /// The mode is unknown: 400.
    Refused,
}

/// What a cursor of a search does in descending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DescendingCursor {
    /// Loses a row at the end of each page.
    LosesRows,
    /// Returns every row once.
    Exact,
}

/// The response to a path without its trailing slash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MissingSlash {
    /// 404, so that a test shows the mistake at once.
    NotFound,
    /// 301 to the correct path, as Close does. Many clients then repeat a POST as a GET.
    Redirected,
}

/// Which contact lists the response to `POST /lead/` has. A recording of 2025 had no `contact_ids`, and the
/// 2026 specification deprecates `contacts` (close-api.md §4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CreatedLead {
    /// Both `contacts` and `contact_ids`.
    Whole,
    /// `contacts` only.
    WithoutContactIds,
    /// `contact_ids` only.
    WithoutContacts,
}

/// A country, for phone numbers. Its text form is two letters, such as `GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Country(Region);

impl Country {
    pub(crate) fn region(self) -> Region {
        self.0
    }

    pub(crate) fn calling_code(self) -> i32 {
        PHONE_NUMBER_UTIL.get_country_code_for_region(self.0).unwrap_or_default()
    }
}

impl TryFrom<String> for Country {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let country = text.parse().ok().map(Self).filter(|country| country.calling_code() != 0);
        country.ok_or_else(|| format!("`{text}` is not a country (try `US` or `GB`)"))
    }
}

impl From<Country> for String {
    fn from(country: Country) -> Self {
        country.to_string()
    }
}

impl fmt::Display for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.as_region_str())
    }
}

impl Default for Country {
    fn default() -> Self {
        Self(Region::US)
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
        let country = Country(Region::GB);
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
