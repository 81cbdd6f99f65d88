//! Endpoint groups and the results of calls, for rate limits and metrics.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use strum::{IntoStaticStr, VariantArray};

/// The groups of path and method that Close limits separately (close-api.md §2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Endpoint {
    /// `GET /me/`.
    Me,
    /// `GET /custom_field_schema/…/`.
    Schema,
    /// `GET /user/`.
    Users,
    /// `POST /data/search/`, by far the lowest limit.
    Search,
    /// `GET /event/`.
    Events,
    /// `GET /lead/…/`.
    ReadLead,
    /// `POST /lead/`.
    CreateLead,
    /// `PUT /lead/…/`.
    UpdateLead,
    /// `GET /contact/…/`.
    ReadContact,
    /// `POST /contact/`.
    CreateContact,
    /// `PUT /contact/…/`.
    UpdateContact,
}

impl Endpoint {
    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }

    pub(crate) fn method(self) -> Method {
        match self {
            Self::Me | Self::Schema | Self::Users | Self::Events | Self::ReadLead | Self::ReadContact => {
                Method::GET
            }
            Self::Search | Self::CreateLead | Self::CreateContact => Method::POST,
            Self::UpdateLead | Self::UpdateContact => Method::PUT,
        }
    }

    /// The path template, relative to the base of the API.
    pub(crate) fn template(self) -> &'static str {
        match self {
            Self::Me => "/me/",
            Self::Schema => "/custom_field_schema/{object_type}/",
            Self::Users => "/user/",
            Self::Search => "/data/search/",
            Self::Events => "/event/",
            Self::ReadLead | Self::UpdateLead => "/lead/{id}/",
            Self::CreateLead => "/lead/",
            Self::ReadContact | Self::UpdateContact => "/contact/{id}/",
            Self::CreateContact => "/contact/",
        }
    }

    /// The maximum size of an answer in bytes. Many messages read at the same time, and their memory adds up. A page of a
    /// search has 100 rows of a few fields, where 100 Contacts with 100 of the longest emails take 6.5 MB. A Lead with all its
    /// Contacts can be larger than this, and is then read without them.
    pub(crate) fn max_answer(self) -> usize {
        match self {
            Self::Search => 8 << 20,
            Self::Schema | Self::Events => 4 << 20,
            Self::Me | Self::Users => 2 << 20,
            Self::CreateLead
            | Self::ReadLead
            | Self::UpdateLead
            | Self::ReadContact
            | Self::CreateContact
            | Self::UpdateContact => 1 << 20,
        }
    }

    /// Whether the answer is a Lead or a Contact, which others may have made larger than the limit.
    pub(crate) fn answers_with_record(self) -> bool {
        match self {
            Self::ReadLead
            | Self::CreateLead
            | Self::UpdateLead
            | Self::ReadContact
            | Self::CreateContact
            | Self::UpdateContact => true,
            Self::Me | Self::Schema | Self::Users | Self::Search | Self::Events => false,
        }
    }

    pub(crate) fn writes(self) -> bool {
        match self {
            Self::CreateLead | Self::CreateContact | Self::UpdateLead | Self::UpdateContact => true,
            Self::Me
            | Self::Schema
            | Self::Users
            | Self::Events
            | Self::ReadLead
            | Self::ReadContact
            | Self::Search => false,
        }
    }
}

/// The result of a call, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum StatusClass {
    /// 2xx.
    Ok,
    /// 401, 402, 403.
    Denied,
    /// 404.
    NotFound,
    /// 429.
    RateLimited,
    /// Any other status that is not a success.
    Refused,
    /// 5xx.
    ServerError,
    /// No response.
    NoAnswer,
}

impl StatusClass {
    /// The label in metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }

    pub(crate) fn of(status: StatusCode) -> Self {
        match status.as_u16() {
            200..=299 => Self::Ok,
            401..=403 => Self::Denied,
            404 => Self::NotFound,
            429 => Self::RateLimited,
            500..=599 => Self::ServerError,
            _ => Self::Refused,
        }
    }
}

/// One call, for metrics.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub endpoint: Endpoint,
    pub status: StatusClass,
    /// From sending to the end of the response.
    pub took: Duration,
    /// The wait for the rate limiter.
    pub waited: Duration,
}
