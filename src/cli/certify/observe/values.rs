//! What Close makes of written values: custom fields, phones, and values that it refuses.

use serde_json::{Map, Value, json};

use crate::cli::certify::observations::{ErrorTexts, FieldObservation, Kept, Refusal};
use crate::cli::certify::observe::{Leads, Observer, Stop, email, json_of};
use crate::cli::certify::script::{NATIONAL, Owner, SampleField, WITH_EXTENSION};

const BAD_PHONE: &str = "call me";
const BAD_EMAIL: &str = "not an email";

impl Observer {
    /// Writes a sample into every configured custom field, and compares with what comes back.
    pub(super) async fn fields(&mut self, leads: &Leads) -> Result<(), Stop> {
        let me = json_of(&self.get("me/").await?);
        self.seen.country_in_me =
            Some(me.pointer("/organizations/0/country").is_some_and(|country| !country.is_null()));
        let me = me["id"].as_str().map(str::to_owned);
        let (me, contact) = (me.as_deref(), leads.contact.as_deref());
        let targets = [
            (Owner::Lead, Some(format!("lead/{}/", leads.keyed))),
            (Owner::Contact, leads.contact.as_ref().map(|contact| format!("contact/{contact}/"))),
        ];
        for (owner, path) in targets {
            let mut samples: Vec<(usize, String, Value)> = Vec::new();
            for (index, field) in self.script.fields.iter().enumerate() {
                if field.owner != owner {
                    continue;
                }
                let value = match &path {
                    Some(_) => field.value(me, contact),
                    None => Err("Close did not name the new Contact"),
                };
                match value {
                    Ok(value) => samples.push((index, field.key.clone(), value)),
                    Err(reason) => {
                        let observation = observation(field, Value::Null, Kept::NotTried(reason));
                        self.seen.fields.push(observation);
                    }
                }
            }
            let Some(path) = path.filter(|_| !samples.is_empty()) else { continue };
            let mut body: Map<String, Value> =
                samples.iter().map(|(_, key, sample)| (key.clone(), sample.clone())).collect();
            let mut response = self.put(&path, &json!(body)).await?;
            if response.status.as_u16() == 400 {
                // Once more without what Close named.
                let text = String::from_utf8_lossy(&response.body).into_owned();
                body.retain(|key, _| !text.contains(key.as_str()));
                if body.is_empty() {
                    self.observe_fields(&samples, &body, &json!({}));
                    continue;
                }
                response = self.put(&path, &json!(body)).await?;
            }
            if response.status.is_success() {
                self.observe_fields(&samples, &body, &json_of(&response));
            }
        }
        Ok(())
    }

    fn observe_fields(
        &mut self,
        samples: &[(usize, String, Value)],
        sent: &Map<String, Value>,
        record: &Value,
    ) {
        for (index, key, sample) in samples {
            let Some(field) = self.script.fields.get(*index) else { continue };
            let kept = if sent.contains_key(key) { Kept::of(sample, record.get(key)) } else { Kept::Refused };
            self.seen.fields.push(observation(field, sample.clone(), kept));
        }
    }

    pub(super) async fn phones(&mut self, contact: &str) -> Result<(), Stop> {
        let path = format!("contact/{contact}/");
        for phone in [WITH_EXTENSION, NATIONAL] {
            let response = self.put(&path, &json!({"phones": [{"phone": phone, "type": "office"}]})).await?;
            let contact = json_of(&response);
            let kept = contact.pointer("/phones/0/phone").and_then(Value::as_str).map(str::to_owned);
            match response.status.as_u16() {
                200..=299 if contact["phones"].is_array() => self.seen.phones.push((phone, kept)),
                400 | 422 => self.seen.phones.push((phone, None)),
                // Kept, but not shown; or refused for another reason.
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) async fn refusals(&mut self, contact: &str) -> Result<(), Stop> {
        let path = format!("contact/{contact}/");
        let good = email(&self.made.marker);
        let body = json!({"phones": [{"phone": "+18004445555"}, {"phone": BAD_PHONE}]});
        let response = self.put(&path, &body).await?;
        let status = response.status.as_u16();
        self.seen.bad_phone = Some(Refusal::of(status, &response.body, "phones", BAD_PHONE));
        let body = json!({"emails": [{"email": good}, {"email": BAD_EMAIL}]});
        let response = self.put(&path, &body).await?;
        let status = response.status.as_u16();
        self.seen.bad_email = Some(Refusal::of(status, &response.body, "emails", BAD_EMAIL));
        self.seen.error_texts = ErrorTexts::of(&response.body);
        let response = self.put(&path, &json!({"close_sync_certify": "unknown"})).await?;
        self.seen.unknown_key_refused = Some(response.status.is_client_error());
        Ok(())
    }
}

fn observation(field: &SampleField, sent: Value, kept: Kept) -> FieldObservation {
    let SampleField { setting, key, kind, .. } = field;
    FieldObservation { setting: setting.clone(), key: key.clone(), kind: kind.clone(), sent, kept }
}
