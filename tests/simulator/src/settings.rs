//! The settings of the simulated Close: one struct, and a small enum for each open question.
//!
//! Each setting covers something that the public documentation leaves open (close-api.md §12). The default is
//! the stricter interpretation. `Settings::fast` turns off what only costs time.

use std::{fmt, str::FromStr, time::Duration};

use jiff::SignedDuration;
use serde::Deserialize;
use uuid::Uuid;

use crate::limits::Limits;
use crate::schema::{CustomField, FieldKind, Owner, User};

/// How the simulated organization behaves and what it contains at the start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The valid API key, sent as the user name of HTTP Basic (close-api.md §1).
    pub api_key: String,
    /// More valid API keys. Each key has its own rate limits; all share those of the organization
    /// (close-api.md §2).
    pub more_api_keys: Vec<String>,
    /// How long a write stays invisible to search (close-api.md §6).
    pub search_lag: Lag,
    /// How long an event stays invisible in the event log. Close documents no lag, so the default is none.
    pub event_lag: Lag,
    /// The rate limits of each endpoint group (close-api.md §2).
    pub limits: Limits,
    /// The form of the rate limit headers (close-api.md §2).
    pub header_style: HeaderStyle,
    /// The body of a 429 (close-api.md §2).
    pub rate_limit_body: RateLimitBody,
    /// How search interprets the text mode `exact_value` (close-api.md §6).
    pub exact_value: ExactValue,
    /// The response to a path without its trailing slash (close-api.md §1).
    pub missing_slash: MissingSlash,
    /// Which of its two contact lists the response to `POST /lead/` has (close-api.md §4).
    pub created_lead: CreatedLead,
    /// Refuse keys that are not in the published contact schema, instead of ignoring them
    /// (close-api.md §5).
    pub strict_contact_keys: bool,
    /// `GET /lead/` and `GET /contact/` read from the lagging search index (close-api.md §12).
    pub lists_from_index: bool,
    /// The country of phone numbers without a prefix (close-api.md §5).
    pub country: Country,
    /// Larger bodies get a 413.
    pub max_body_bytes: usize,
    /// The user of the API keys.
    pub user: User,
    /// More users of the organization.
    pub more_users: Vec<User>,
    /// Labels of the lead statuses, in the order of the organization. New leads get the first. The ids are
    /// `stat_` and the lower-cased letters and digits of the label, such as `stat_badfit`.
    pub statuses: Vec<String>,
    /// The custom fields that exist from the start.
    pub custom_fields: Vec<CustomField>,
    /// The seed of ids and random numbers. Two simulators with the same seed give the same ids in the same
    /// order. By default every start has a new seed.
    pub seed: Uuid,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            api_key: "api_simulator.key".into(),
            more_api_keys: Vec::new(),
            search_lag: Lag::Fixed(Duration::from_secs(2)),
            event_lag: Lag::NONE,
            limits: Limits::documented(),
            header_style: HeaderStyle::Comma,
            rate_limit_body: RateLimitBody::Nested,
            exact_value: ExactValue::FoldsCase,
            missing_slash: MissingSlash::NotFound,
            created_lead: CreatedLead::Whole,
            strict_contact_keys: false,
            lists_from_index: false,
            country: Country::default(),
            max_body_bytes: 1 << 20,
            user: User::new("user_simulator", "Sim", "Ulator", "sim@close.test"),
            more_users: vec![User::new("user_adaaccount", "Ada", "Account", "ada@close.test")],
            statuses: ["Potential", "Bad Fit", "Qualified", "Customer"].map(String::from).into(),
            custom_fields: default_fields(),
            seed: Uuid::now_v7(),
        }
    }
}

/// Fields of all common types. The usage text suggests the first text field of each owner.
fn default_fields() -> Vec<CustomField> {
    let lead = |id, name, kind| CustomField::new(id, name, kind, Owner::Lead);
    let contact = |id, name, kind| CustomField::new(id, name, kind, Owner::Contact);
    vec![
        lead("cf_leadcompanyid", "Company ID", FieldKind::Text),
        contact("cf_contactuserid", "User ID", FieldKind::Text),
        lead("cf_leadplan", "Plan", FieldKind::Choices).choices(["free", "pro", "enterprise"]),
        lead("cf_leadseats", "Seats", FieldKind::Number),
        lead("cf_leadnumericid", "Numeric company id", FieldKind::Number),
        contact("cf_contactsyncedat", "Synced at", FieldKind::Datetime),
        lead("cf_leadsyncedat", "Synced at", FieldKind::Datetime),
        lead("cf_leadowner", "Account owner", FieldKind::User),
        lead("cf_leadtags", "Tags", FieldKind::Choices).choices(["red", "green", "blue"]).multiple(),
        lead("cf_leadsince", "Customer since", FieldKind::Date),
        lead("cf_leadactive", "Active", FieldKind::Choices).choices(["Yes", "No"]),
        lead("cf_leadnotes", "Notes", FieldKind::Textarea),
        contact("cf_contactrole", "Role", FieldKind::Choices).choices(["Buyer", "User", "Champion"]),
        contact("cf_contactscore", "Score", FieldKind::Number),
        contact("cf_contactborn", "Born", FieldKind::Date),
        contact("cf_contactreferrer", "Referrer", FieldKind::Contact),
    ]
}

impl Settings {
    /// The defaults without what slows a test down: no effective rate limits and no search lag.
    pub fn fast() -> Self {
        Self { limits: Limits::unlimited(), search_lag: Lag::NONE, ..Self::default() }
    }
}

/// How long a write stays invisible: a fixed time, or a random time for each write.
///
/// Its text form is `2s`, or `1s..10s` for a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Lag {
    /// Every write takes this long.
    Fixed(Duration),
    /// Every write takes a random time from this range, so that writes can overtake one another.
    Between(Duration, Duration),
}

impl Lag {
    pub const NONE: Self = Self::Fixed(Duration::ZERO);

    pub(crate) fn longest(self) -> Duration {
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

impl fmt::Display for Lag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(lag) => write!(f, "{lag:?}"),
            Self::Between(least, most) => write!(f, "{least:?}..{most:?}"),
        }
    }
}

/// The forms of Close's rate limit headers over the years (close-api.md §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderStyle {
    /// `RateLimit: limit=1, remaining=0, reset=0.5`: the documented form.
    Comma,
    /// The same with `;` between the items.
    Semicolon,
    /// The deprecated `X-Rate-Limit-Limit`, `-Remaining` and `-Reset`.
    Legacy,
    /// The legacy names next to the `ratelimit-*` triple of a proxy, as recorded in 2022.
    Proxy,
    /// No header at all; a 429 has no `Retry-After` either.
    Absent,
}

/// The body of a 429 (close-api.md §2). Clients should not need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExactValue {
    /// Ignores case and surrounding whitespace, so a match can still be a different id.
    FoldsCase,
    /// Compares exactly.
    Exact,
    /// The mode is unknown: 400.
    Refused,
}

/// The response to a path without its trailing slash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissingSlash {
    /// 404, so that a test shows the mistake at once.
    NotFound,
    /// 301 to the correct path, as Close does. Many clients then repeat a POST as a GET.
    Redirected,
}

/// Which contact lists the response to `POST /lead/` has. A recording of 2025 had no `contact_ids`, and the
/// 2026 specification deprecates `contacts` (close-api.md §4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreatedLead {
    /// Both `contacts` and `contact_ids`.
    Whole,
    /// `contacts` only.
    WithoutContactIds,
    /// `contact_ids` only.
    WithoutContacts,
}

/// A country, for phone numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Country {
    /// Two letters, such as `US`.
    pub code: String,
    /// Digits put before a national number, such as `1`.
    pub calling_code: String,
}

impl Default for Country {
    fn default() -> Self {
        Self { code: "US".into(), calling_code: "1".into() }
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
}
