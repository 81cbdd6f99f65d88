//! The values of the fields.

use std::{fmt, str::FromStr, time::Duration};

use jiff::SignedDuration;
use rlibphonenumber::{PHONE_NUMBER_UTIL, Region};
use serde::{Deserialize, Serialize};
use strum::VariantNames;

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
            Self::Fixed(Duration::ZERO) => f.write_str("0s"),
            Self::Fixed(lag) => write!(f, "{lag:?}"),
            Self::Between(least, most) => write!(f, "{least:?}..{most:?}"),
        }
    }
}

/// Which of its contacts an answer with a lead has. The specification of 2026 marks `contacts` as deprecated and requires
/// only `contact_ids`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum EventData {
    /// As long as the event, as for admins.
    Kept,
    /// For one hour, as for other users. Then both are null.
    HiddenAfterAnHour,
}

/// The forms of Close's rate limit headers over the years (close-api.md §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum ErrorTexts {
    /// Those of Close's own validator.
    Cleancat,
    /// Those of pydantic, which Close uses for parameters since 2026.
    Pydantic,
}

/// The 404 for a record that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum MissingRecord {
    /// Close's words: `Empty query: Lead matching query does not exist.`
    Words,
    /// `{"error": "Not Found"}`.
    OtherWords,
    /// A page in HTML.
    Html,
}

/// The 404 for a URL that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum UnknownUrl {
    /// `{"error": "The requested URL was not found on the server."}`.
    Json,
    /// A page in HTML.
    Html,
}

/// What a search does with a custom field in `_fields` that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum UnknownSelector {
    /// 400.
    Refused,
    /// The rows do not have it.
    Ignored,
}

/// The cursor of the last page of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum LastCursor {
    Null,
    /// `""`.
    Empty,
    /// No such key.
    Absent,
}

/// What the rows of a search have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum SearchRows {
    /// The fields that were asked for.
    Fields,
    /// Only the id.
    OnlyIds,
}

/// The body of a 429 (close-api.md §2). Clients should not need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum ExactValue {
    /// Ignores case and surrounding whitespace, so a match can still be a different id.
    FoldsCase,
    /// Compares exactly.
    Exact,
    /// The mode is unknown: 400.
    Refused,
}

/// What a cursor of a search does in descending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum DescendingCursor {
    /// Loses a row at the end of each page.
    LosesRows,
    /// Returns every row once.
    Exact,
}

/// The response to a path without its trailing slash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum MissingSlash {
    /// 404, so that a test shows the mistake at once.
    NotFound,
    /// 301 to the correct path, as Close does. Many clients then repeat a POST as a GET.
    Redirected,
}

/// Which contact lists the response to `POST /lead/` has. A recording of 2025 had no `contact_ids`, and the
/// 2026 specification deprecates `contacts` (close-api.md §4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, VariantNames)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
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
