//! A destination and the paths of its pages.

use crate::http::registry::DestinationHandle;

/// The path of the first page. All others are below it.
pub const HOME: &str = "/page";

/// The path segment of a destination without a name. Names cannot have this form.
const NAMELESS: &str = "-";

pub(super) struct Destination {
    /// Its segment in paths.
    pub(super) segment: String,
    pub(super) name: Option<String>,
    pub(super) handle: DestinationHandle,
}

impl Destination {
    pub(super) fn new(name: String, handle: DestinationHandle) -> Self {
        let name = Some(name).filter(|name| !name.is_empty());
        Self { segment: name.clone().unwrap_or_else(|| NAMELESS.to_owned()), name, handle }
    }

    /// The path of one of its pages. The path of its first page is the empty string.
    pub(super) fn path(&self, page: &str) -> String {
        let slash = if page.is_empty() { "" } else { "/" };
        format!("{HOME}/{}{slash}{page}", self.segment)
    }

    pub(super) fn title(&self) -> &str {
        self.name.as_deref().unwrap_or("close-sync")
    }
}
