//! What search shows, how late, and how it compares.

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cli::certify::looks::{Looks, progress};
use crate::cli::certify::observations::{Delay, Exact, LastCursor};
use crate::cli::certify::observe::{Leads, Observer, Stop, email, ids, json_of};
use crate::cli::certify::queries::{by_custom, by_name, contact_with_email, leads_with};

impl Observer {
    /// Waits until search and the event log show the new Leads.
    pub(super) async fn lags_of_creation(&mut self, leads: &Leads) -> Result<(), Stop> {
        let marker = self.made.marker.clone();
        let company_key = self.script.company_key.clone();
        let mut mode = "exact_value";
        let mut looks = Looks::new(leads.created, self.script.max_wait);
        progress("waiting until search and the event log show the new Leads", self.script.max_wait);
        loop {
            let mut conditions = vec![by_name(&format!("{marker}b"))];
            conditions.extend(company_key.as_deref().map(|key| by_custom(key, mode, &format!("{marker}-1"))));
            let shown = match self.search(leads_with(conditions), json!({})).await? {
                Ok(page) => {
                    self.seen.last_cursor = LastCursor::of(&page);
                    if let Some(row) = page.pointer("/data/0") {
                        self.seen.rows_have_fields = Some(row.get("name").is_some());
                    }
                    ids(&page)
                }
                Err(400) if mode == "exact_value" => {
                    self.seen.exact = Some(Exact::Refused);
                    mode = "phrase";
                    continue;
                }
                Err(status) => return Err(Stop::Refused { what: "a search", status }),
            };
            if self.seen.search_created.is_none() && shown.contains(&leads.named) {
                self.seen.search_created = Some(looks.seen());
            }
            if company_key.is_some() && self.seen.search_key.is_none() && shown.contains(&leads.keyed) {
                self.seen.search_key = Some(looks.seen());
            }
            if self.seen.event.is_none() {
                let path = "event/?object_type=lead&action=created&_limit=50";
                let response = self.get(path).await?;
                let page = json_of(&response);
                let mut events = page["data"].as_array().into_iter().flatten();
                if let Some(event) = events.find(|event| event["object_id"] == leads.named) {
                    self.seen.event = Some(looks.seen());
                    self.seen.event_has_data = Some(event["data"].is_object());
                } else if !response.status.is_success() {
                    self.seen.event = Some(looks.longer());
                }
            }
            let is_key_done = company_key.is_none() || self.seen.search_key.is_some();
            if self.seen.search_created.is_some() && is_key_done && self.seen.event.is_some() {
                return Ok(());
            }
            if !looks.next().await {
                break;
            }
        }
        self.seen.search_created.get_or_insert(looks.longer());
        self.seen.event.get_or_insert(looks.longer());
        if company_key.is_some() {
            self.seen.search_key.get_or_insert(looks.longer());
        }
        Ok(())
    }

    /// Asks a search for a custom field that does not exist.
    pub(super) async fn unknown_selector(&mut self) -> Result<(), Stop> {
        let unknown = format!("custom.cf_{}", self.made.marker);
        let query = leads_with(vec![by_name(&self.made.marker)]);
        let answer = self.search(query, json!({"_fields": {"lead": ["id", unknown]}})).await?;
        self.seen.unknown_selector_refused = match answer {
            Ok(_) => Some(false),
            Err(400 | 422) => Some(true),
            Err(_) => None,
        };
        Ok(())
    }

    /// Changes both Leads, reads one back at once, and waits until search shows the change.
    pub(super) async fn change(&mut self, leads: &Leads) -> Result<(), Stop> {
        let marker = self.made.marker.clone();
        let (keyed, named) = (format!("lead/{}/", leads.keyed), format!("lead/{}/", leads.named));
        let Some(key) = self.script.company_key.clone() else {
            let new = format!("{marker} changed");
            let response = self.put(&keyed, &json!({"description": new})).await?;
            return self.read_changed(&keyed, "description", &new, &response).await;
        };
        let (new, neighbour) = (format!("{marker}-2"), format!("{marker}-2-x"));
        self.put(&named, &json!({key.as_str(): neighbour})).await?;
        let response = self.put(&keyed, &json!({key.as_str(): new})).await?;
        let changed = Instant::now();
        self.read_changed(&keyed, &key, &new, &response).await?;

        let mode = if self.seen.exact == Some(Exact::Refused) { "phrase" } else { "exact_value" };
        let mut looks = Looks::new(changed, self.script.max_wait);
        progress("waiting until search shows the changed custom field", self.script.max_wait);
        loop {
            let query = leads_with(vec![by_custom(&key, mode, &new), by_custom(&key, mode, &neighbour)]);
            let shown = match self.search(query, json!({})).await? {
                Ok(page) => ids(&page),
                Err(status) => return Err(Stop::Refused { what: "a search", status }),
            };
            if [&leads.keyed, &leads.named].into_iter().all(|id| shown.contains(id)) {
                self.seen.search_changed = Some(looks.seen());
                return Ok(());
            }
            if !looks.next().await {
                self.seen.search_changed = Some(looks.longer());
                return Ok(());
            }
        }
    }

    /// How search compares, once it shows the records.
    pub(super) async fn exactness(&mut self, leads: &Leads) -> Result<(), Stop> {
        let marker = self.made.marker.clone();
        let key = self.script.company_key.clone();
        let is_shown = matches!(self.seen.search_changed, Some(Delay::Below(_) | Delay::Within(_)));
        if let Some(key) = key.filter(|_| is_shown && self.seen.exact.is_none()) {
            let mut found = Vec::new();
            for value in [format!("{marker}-2"), format!("{marker}-2").to_uppercase()] {
                let query = leads_with(vec![by_custom(&key, "exact_value", &value)]);
                found.push(match self.search(query, json!({})).await? {
                    Ok(page) => ids(&page),
                    Err(status) => return Err(Stop::Refused { what: "a search", status }),
                });
            }
            let has = |call: usize, id: &String| found.get(call).is_some_and(|ids| ids.contains(id));
            self.seen.exact = Some(if has(0, &leads.named) {
                Exact::Words
            } else if !has(0, &leads.keyed) {
                Exact::FindsNothing
            } else if has(1, &leads.keyed) {
                Exact::FoldsCase
            } else {
                Exact::KeepsCase
            });
        }
        if self.seen.exact != Some(Exact::Refused)
            && let (Some(contact), Some(Delay::Below(_) | Delay::Within(_))) =
                (&leads.contact, self.seen.search_created)
        {
            let contact = contact.clone();
            let query = contact_with_email(&email(&marker).to_uppercase());
            if let Ok(page) = self.search(query, json!({})).await? {
                self.seen.email_search = Some(ids(&page).contains(&contact));
            }
        }
        Ok(())
    }

    /// Walks both Leads one by one, newest first.
    pub(super) async fn descending(&mut self, leads: &Leads) -> Result<(), Stop> {
        if !matches!(self.seen.search_created, Some(Delay::Below(_) | Delay::Within(_))) {
            return Ok(());
        }
        let marker = self.made.marker.clone();
        let query = leads_with(vec![by_name(&format!("{marker}a")), by_name(&format!("{marker}b"))]);
        let field = json!({"type": "regular_field", "object_type": "lead", "field_name": "date_created"});
        let sort = json!([{"direction": "desc", "field": field}]);
        let (mut found, mut cursor) = (Vec::new(), Value::Null);
        for _ in 0..3 {
            let more = json!({"sort": sort, "_limit": 1, "cursor": cursor});
            let Ok(page) = self.search(query.clone(), more).await? else { return Ok(()) };
            found.extend(ids(&page));
            cursor = page["cursor"].clone();
            if cursor.is_null() {
                break;
            }
        }
        let all = [&leads.keyed, &leads.named].into_iter().all(|id| found.contains(id));
        self.seen.descending = Some(all);
        Ok(())
    }
}
