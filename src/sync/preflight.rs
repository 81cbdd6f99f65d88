//! What must be true of a Close organization before anything is written to it: the key is accepted,
//! and the lookup fields exist and are of type text. `check` and `run` ask at start; a pause asks
//! until it holds again; while it holds, it is asked from time to time what fields there are.

use crate::close::{Client, CloseError};
use crate::domain::mapping::{LookupFieldError, Mapping, Rules};
use crate::domain::schema::Schema;
use crate::outcome::PauseCause;

/// Why Close cannot be worked with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreflightError {
    /// Close did not answer as it should.
    #[error("{0}")]
    Close(CloseError),
    /// A lookup field cannot serve.
    #[error("{0}")]
    Field(LookupFieldError),
}

/// What was found in order.
#[derive(Clone, Debug)]
pub struct Ready {
    /// The name of the organization.
    pub organization: String,
    /// The mapping, with every field known.
    pub mapping: Mapping,
}

impl PreflightError {
    /// The pause this obstacle calls for. Without one it is a fault of the moment.
    pub fn pause_cause(&self) -> Option<PauseCause> {
        match self {
            Self::Field(_) => Some(PauseCause::LookupField),
            Self::Close(CloseError::Unauthorized) => Some(PauseCause::Unauthorized),
            Self::Close(CloseError::PlanLimit) => Some(PauseCause::PlanLimit),
            Self::Close(CloseError::Forbidden) => Some(PauseCause::Forbidden),
            Self::Close(CloseError::Unreachable(_)) => Some(PauseCause::Unreachable),
            Self::Close(CloseError::NotFound | CloseError::Rejected(_) | CloseError::Transient(_)) => None,
        }
    }

    /// The obstacle, and what to do about it if it is the key's. `api_key` is how its operator finds that setting.
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

/// Asks Close. Tells everything that is wrong with the lookup fields; the list is never empty.
pub async fn run(client: &Client, rules: &Rules) -> Result<Ready, Vec<PreflightError>> {
    let close = |error| vec![PreflightError::Close(error)];
    let organization = client.me().await.map_err(close)?;
    let mut schema = Schema { statuses: organization.statuses, ..Schema::default() };
    let (leads, contacts) = rules.needs();
    if leads {
        schema.lead = client.lead_fields().await.map_err(close)?;
    }
    if contacts {
        schema.contact = client.contact_fields().await.map_err(close)?;
    }
    if rules.wants_users(&schema) {
        schema.users = client.users().await.map_err(close)?;
    }
    let fields = |bad: Vec<LookupFieldError>| bad.into_iter().map(PreflightError::Field).collect::<Vec<_>>();
    let mapping = Mapping::resolve(rules, &schema).map_err(fields)?;
    Ok(Ready { organization: organization.name, mapping })
}
