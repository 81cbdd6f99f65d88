//! What the simulated organization contains at the start, and how it behaves.
//!
//! `Settings::fast` turns off what only costs time.

use jiff::Timestamp;
use uuid::Uuid;

use crate::behaviour::{Behaviour, Lag};
use crate::ids::Ids;
use crate::limits::Limits;
use crate::schema::{CustomField, FieldKind, Owner, Schema, UnknownName, User};

/// How the simulated organization behaves and what it contains at the start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The valid API key, sent as the user name of HTTP Basic (close-api.md §1).
    pub api_key: String,
    /// More valid API keys. Each key has its own rate limits; all share those of the organization
    /// (close-api.md §2).
    pub more_api_keys: Vec<String>,
    /// The rate limits of each endpoint group (close-api.md §2).
    pub limits: Limits,
    /// How Close behaves where its documentation is silent or several answers were recorded.
    pub behaviour: Behaviour,
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
            limits: Limits::documented(),
            behaviour: Behaviour::default(),
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
        // Custom objects have ids `custobj_…`, their types `cotype_…` (close-api.md §15 row 8).
        lead("cf_leadcontract", "Contract", FieldKind::CustomObject),
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
        let settings = Self { limits: Limits::unlimited(), ..Self::default() };
        settings.with(|behaviour| behaviour.search_lag = Lag::NONE)
    }

    /// The names in the lists of the behaviour that the organization does not have.
    pub fn unknown_names(&self) -> Vec<UnknownName> {
        let schema = Schema::new(self, &mut Ids::new(self.seed), Timestamp::UNIX_EPOCH);
        schema.unknown_names(&self.behaviour)
    }

    /// Changes the behaviour: `Settings::fast().with(|behaviour| behaviour.search_lag = lag)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Behaviour)) -> Self {
        change(&mut self.behaviour);
        self
    }
}
