//! The preflight check: Close accepts the API key, and the lookup fields exist and are of type text.
//!
//! Nothing is written to Close before the check succeeds. `check` and `run` run it at the start. During a pause it is
//! repeated until it succeeds. Afterwards it runs periodically, to read changes of the custom fields.

use crate::close::{Client, CloseError, Listed};
use crate::domain::mapping::{LookupFieldError, Mapping, Rules, UnresolvedField};
use crate::domain::phone::Country;
use crate::domain::schema::Schema;
use crate::outcome::PauseCause;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreflightError {
    /// A call failed.
    #[error("{0}")]
    Close(CloseError),
    /// A lookup field is missing or has the wrong type.
    #[error("{0}")]
    Field(LookupFieldError),
    /// A rule that can never be applied.
    #[error("`{}`: {}", .0.setting, .0.description())]
    Rule(UnresolvedField),
}

/// The result of a check that succeeded.
#[derive(Clone, Debug)]
pub struct Ready {
    /// The name of the organization.
    pub organization: String,
    /// The mapping, resolved against the custom fields in Close.
    pub mapping: Mapping,
}

impl Ready {
    /// The result, unless a rule can never be applied: the start then fails. A worker that runs leaves its values out.
    ///
    /// # Errors
    /// Each such rule.
    pub fn for_start(self) -> Result<Self, Vec<PreflightError>> {
        let rules = self.mapping.unresolved.iter().filter(|unresolved| unresolved.stops_start());
        let errors: Vec<_> = rules.cloned().map(PreflightError::Rule).collect();
        if errors.is_empty() { Ok(self) } else { Err(errors) }
    }
}

impl PreflightError {
    /// The cause of the pause that this error leads to. `None` if the error may be temporary.
    pub fn pause_cause(&self) -> Option<PauseCause> {
        match self {
            Self::Field(_) | Self::Rule(_) => Some(PauseCause::LookupField),
            Self::Close(CloseError::Unauthorized) => Some(PauseCause::Unauthorized),
            Self::Close(CloseError::PlanLimit) => Some(PauseCause::PlanLimit),
            Self::Close(CloseError::Forbidden) => Some(PauseCause::Forbidden),
            Self::Close(CloseError::Unreachable(_)) => Some(PauseCause::Unreachable),
            Self::Close(CloseError::NotFound | CloseError::Rejected(_) | CloseError::Transient(_)) => None,
        }
    }

    /// The error, with a remedy if the API key causes it. `api_key` is the name of that setting.
    pub fn with_remedy(&self, api_key: &str) -> String {
        match self.pause_cause() {
            Some(PauseCause::Unauthorized) => {
                format!("{self}: set {api_key} to a key that is valid in Close")
            }
            Some(cause @ PauseCause::Forbidden) => format!("{self}: {}", cause.remedy()),
            Some(
                PauseCause::LookupField
                | PauseCause::PlanLimit
                | PauseCause::Unreachable
                | PauseCause::Failing,
            )
            | None => self.to_string(),
        }
    }
}

/// Runs the check.
///
/// # Errors
/// The failed call, or every lookup field that cannot be used. The list is never empty.
pub async fn run(client: &Client, rules: &Rules) -> Result<Ready, Vec<PreflightError>> {
    let close = |error| vec![PreflightError::Close(error)];
    let organization = client.me().await.map_err(close)?;
    let Listed { items: statuses, unreadable } = organization.statuses;
    let country = organization.country.as_deref().and_then(Country::parse);
    let mut schema =
        Schema { statuses, country, organization: organization.id, unreadable, ..Schema::default() };
    let (leads, contacts) = rules.needs();
    if leads {
        let mut fields = client.lead_fields().await.map_err(close)?;
        schema.lead = fields.items;
        schema.unreadable.append(&mut fields.unreadable);
    }
    if contacts {
        let mut fields = client.contact_fields().await.map_err(close)?;
        schema.contact = fields.items;
        schema.unreadable.append(&mut fields.unreadable);
    }
    if rules.wants_users(&schema) {
        let mut users = client.users().await.map_err(close)?;
        schema.users = users.items;
        schema.unreadable.append(&mut users.unreadable);
    }
    let fields = |bad: Vec<LookupFieldError>| bad.into_iter().map(PreflightError::Field).collect::<Vec<_>>();
    let mapping = Mapping::resolve(rules, &schema).map_err(fields)?;
    Ok(Ready { organization: organization.name, mapping })
}
