//! The records that `certify` made, and their deletion, also after an interruption.

use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use tokio::time::sleep;

use crate::close::{RawClient, RawError};

/// Tries for each record, with a pause between them.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// The calls that deleting needs: each Lead, and the look-up of one whose creation is in doubt.
pub(super) fn reserve(made: &Made) -> u32 {
    let leads = u32::try_from(made.leads.len()).unwrap_or(u32::MAX).saturating_add(1);
    leads.saturating_mul(TRIES).saturating_add(2)
}

/// The Leads that were made. Their Contacts are deleted with them.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// The name of every record contains it.
    pub(super) marker: String,
    leads: Vec<String>,
    /// A creation was sent, and its answer was not seen.
    in_doubt: bool,
}

impl Made {
    pub(super) fn new(marker: String) -> Self {
        Self { marker, ..Self::default() }
    }

    /// A creation is about to be sent.
    pub(super) fn sending(&mut self) {
        self.in_doubt = true;
    }

    /// Close answered, and created this Lead or none.
    pub(super) fn answered(&mut self, lead: Option<&str>) {
        self.in_doubt = false;
        self.leads.extend(lead.map(str::to_owned));
    }

    pub(super) fn deleted(&mut self, lead: &str) {
        self.leads.retain(|made| made != lead);
    }
}

/// Deletes everything. Returns the ids of what could not be deleted; if a creation stayed in doubt, also the marker.
pub(super) async fn delete_all(client: &mut RawClient, made: &mut Made) -> Vec<String> {
    let mut left = Vec::new();
    if made.in_doubt {
        match find_by_marker(client, &made.marker).await {
            Ok(found) => {
                made.leads.extend(found);
                made.leads.sort_unstable();
                made.leads.dedup();
            }
            Err(_) => left.push(format!("a Lead with \"{}\" in its name, if there is one", made.marker)),
        }
    }
    for lead in std::mem::take(&mut made.leads) {
        if !delete(client, &lead).await {
            left.push(lead);
        }
    }
    left
}

/// Deletes a Lead with its Contacts. Returns whether it is gone.
pub(super) async fn delete(client: &mut RawClient, lead: &str) -> bool {
    let mut is_gone = false;
    for attempt in 0..TRIES {
        if attempt > 0 {
            sleep(PAUSE).await;
        }
        let status = match client.call(Method::DELETE, &format!("lead/{lead}/"), None).await {
            Ok(response) => response.status.as_u16(),
            Err(RawError::Close(_) | RawError::RateLimited) => continue,
            Err(RawError::OutOfCalls) => return false,
        };
        match status {
            200..=299 => return true,
            // A record that was just made may not be known everywhere yet, so one 404 proves nothing.
            404 if is_gone => return true,
            404 => is_gone = true,
            _ => {}
        }
    }
    is_gone
}

/// The Leads whose name has the marker. The event log shows them before search does.
async fn find_by_marker(client: &mut RawClient, marker: &str) -> Result<Vec<String>, RawError> {
    let path = "event/?object_type=lead&action=created&_limit=50";
    let response = client.call(Method::GET, path, None).await?;
    let page: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    let events = page["data"].as_array().into_iter().flatten().map(|event| &event["data"]);
    let leads = events.filter(|lead| lead["name"].as_str().is_some_and(|name| name.contains(marker)));
    Ok(leads.filter_map(|lead| lead["id"].as_str()).map(str::to_owned).collect())
}
