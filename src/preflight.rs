//! What must be true of a Close organization before anything is written to it: the key is accepted,
//! and the lookup fields exist and are of type text. `check` and `run` ask at start; a pause asks
//! until it holds again.

use crate::close::{Client, CloseError, CustomField, User};
use crate::domain::mapping::KeyFields;
use crate::domain::record::FieldId;
use crate::outcome::PauseCause;

/// Why Close cannot be worked with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// Close did not answer as it should.
    #[error("{0}")]
    Close(CloseError),
    /// A lookup field does not exist.
    #[error(
        "no {records} custom field has the id `{id}`{}: create one of type text in Close (Settings > Custom \
         Fields) and set `{setting}` to its id",
        suggest(.similar)
    )]
    NoSuchField {
        /// The key of the configuration.
        setting: &'static str,
        /// The id it names.
        id: FieldId,
        /// `Lead` or `Contact`.
        records: &'static str,
        /// Text fields that do exist.
        similar: Vec<String>,
    },
    /// A lookup field has a type that cannot hold any id.
    #[error(
        "the {records} custom field `{id}` (\"{name}\") is of type {kind}, but ids are looked up as text: create \
         one of type text in Close (Settings > Custom Fields) and set `{setting}` to its id"
    )]
    WrongType {
        /// The key of the configuration.
        setting: &'static str,
        /// The id it names.
        id: FieldId,
        /// The field's name in Close.
        name: String,
        /// `Lead` or `Contact`.
        records: &'static str,
        /// The type it has.
        kind: String,
    },
}

fn suggest(similar: &[String]) -> String {
    if similar.is_empty() { String::new() } else { format!(" (of type text are: {})", similar.join(", ")) }
}

/// What was found in order.
#[derive(Clone, Debug)]
pub struct Ready {
    /// Whose key it is.
    pub user: User,
    /// The lookup fields: setting, name in Close, id.
    pub fields: Vec<(&'static str, String, FieldId)>,
}

impl Obstacle {
    /// The pause this obstacle calls for. Without one it is a fault of the moment.
    pub fn pause_cause(&self) -> Option<PauseCause> {
        match self {
            Self::NoSuchField { .. } | Self::WrongType { .. } => Some(PauseCause::LookupField),
            Self::Close(CloseError::Unauthorized) => Some(PauseCause::Unauthorized),
            Self::Close(CloseError::PlanLimit) => Some(PauseCause::PlanLimit),
            Self::Close(CloseError::Forbidden) => Some(PauseCause::Forbidden),
            Self::Close(CloseError::Unreachable(_)) => Some(PauseCause::Unreachable),
            Self::Close(CloseError::NotFound | CloseError::Rejected(_) | CloseError::Transient(_)) => None,
        }
    }
}

/// Asks Close. Stops at the first thing that is wrong, except that both fields are looked at.
pub async fn run(client: &Client, keys: &KeyFields) -> Result<Ready, Obstacle> {
    all(client, keys).await.map_err(|mut obstacles| obstacles.swap_remove(0))
}

/// Asks Close, and tells everything that is wrong; the list is never empty.
pub async fn all(client: &Client, keys: &KeyFields) -> Result<Ready, Vec<Obstacle>> {
    let close = |error| vec![Obstacle::Close(error)];
    let user = client.me().await.map_err(close)?;
    let (mut fields, mut obstacles) = (Vec::new(), Vec::new());
    if let Some(id) = &keys.company {
        let there = client.lead_fields().await.map_err(close)?;
        match look("close.lead_company_id_field", id, "Lead", there) {
            Ok(field) => fields.push(("close.lead_company_id_field", field.name, field.id)),
            Err(obstacle) => obstacles.push(obstacle),
        }
    }
    if let Some(id) = &keys.user {
        let there = client.contact_fields().await.map_err(close)?;
        match look("close.contact_user_id_field", id, "Contact", there) {
            Ok(field) => fields.push(("close.contact_user_id_field", field.name, field.id)),
            Err(obstacle) => obstacles.push(obstacle),
        }
    }
    if obstacles.is_empty() { Ok(Ready { user, fields }) } else { Err(obstacles) }
}

fn look(
    setting: &'static str,
    id: &FieldId,
    records: &'static str,
    there: Vec<CustomField>,
) -> Result<CustomField, Obstacle> {
    let similar = there.iter().filter(|field| field.kind == "text");
    let similar = similar.map(|field| format!("`{}` \"{}\"", field.id, field.name)).collect();
    match there.into_iter().find(|field| field.id == *id) {
        None => Err(Obstacle::NoSuchField { setting, id: id.clone(), records, similar }),
        Some(field) if field.kind == "text" => Ok(field),
        Some(CustomField { id, name, kind }) => Err(Obstacle::WrongType { setting, id, name, records, kind }),
    }
}
