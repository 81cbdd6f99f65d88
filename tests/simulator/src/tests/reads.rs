//! What reads show: stale states, and answers that leave something out.

use jiff::Timestamp;

use super::*;

const KEY: &str = "api_simulator.key";

fn start() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn organization(change: impl FnOnce(&mut Behaviour)) -> Offline {
    Offline::new(Settings::fast().with(change), start())
}

/// Calls at a time, in seconds after the start. Returns the status and the body.
fn ask(close: &mut Offline, second: u64, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let now = start() + Duration::from_secs(second);
    let body = Some(body).filter(|body| !body.is_null());
    let reply = close.ask(KEY, method, path, body, now);
    (reply.status, serde_json::from_str(&reply.body).unwrap())
}

fn get(close: &mut Offline, second: u64, path: &str) -> (u16, Value) {
    ask(close, second, "GET", path, &Value::Null)
}

/// A Lead with two Contacts. Returns the paths of the Lead and of the first Contact.
fn add_acme(close: &mut Offline) -> (String, String) {
    let contacts = json!([{"name": "Jane", "phones": [{"phone": "+18004445555"}]}, {"name": "Bob"}]);
    let (status, lead) = ask(close, 0, "POST", "lead/", &json!({"name": "Acme", "contacts": contacts}));
    assert_eq!(status, 200, "{lead}");
    let id = |value: &Value| value.as_str().unwrap().to_owned();
    (format!("lead/{}/", id(&lead["id"])), format!("contact/{}/", id(&lead["contact_ids"][0])))
}

#[test]
fn a_read_by_id_shows_an_earlier_state() {
    let mut close = organization(|close| close.read_lag = Lag::Fixed(Duration::from_secs(2)));
    let (lead, contact) = add_acme(&mut close);
    assert_eq!(get(&mut close, 1, &lead).0, 404, "not yet");
    assert_eq!(get(&mut close, 3, &lead).1["contacts"].as_array().unwrap().len(), 2);
    let (_, changed) = ask(&mut close, 10, "PUT", &contact, &json!({"name": "Jane Doe"}));
    assert_eq!(changed["name"], "Jane Doe", "a write answers with what it wrote");
    for (second, name) in [(11, "Jane"), (12, "Jane Doe")] {
        let (contact, lead) = (get(&mut close, second, &contact).1, get(&mut close, second, &lead).1);
        assert_eq!((&contact["name"], &lead["contacts"][0]["name"]), (&json!(name), &json!(name)));
    }
    assert!(get(&mut close, 11, &contact).1["date_updated"].as_str() < changed["date_updated"].as_str());
    ask(&mut close, 20, "DELETE", &contact, &Value::Null);
    assert_eq!(get(&mut close, 21, &contact).0, 200);
    assert_eq!(ask(&mut close, 21, "DELETE", &contact, &Value::Null).0, 404, "a write does not lag");
    assert_eq!(get(&mut close, 22, &contact).0, 404);
}

#[test]
fn reads_do_not_lag_by_default() {
    let mut close = organization(|_| {});
    let (lead, contact) = add_acme(&mut close);
    assert_eq!((get(&mut close, 0, &lead).0, get(&mut close, 0, &contact).0), (200, 200));
}

#[test]
fn a_lead_leaves_out_contacts() {
    for (shown, expected) in [
        (LeadContacts::Whole, Some(2)),
        (LeadContacts::WithoutNewest, Some(1)),
        (LeadContacts::Empty, Some(0)),
        (LeadContacts::Absent, None),
    ] {
        let mut close = organization(|close| close.lead_contacts = shown);
        let (path, _) = add_acme(&mut close);
        let read = get(&mut close, 1, &path).1;
        let written = ask(&mut close, 1, "PUT", &path, &json!({"name": "A"})).1;
        for lead in [read, written] {
            let contacts = lead.get("contacts").map(|contacts| contacts.as_array().unwrap().len());
            assert_eq!(contacts, expected, "{shown:?}");
            assert_eq!(lead["contact_ids"].as_array().unwrap().len(), 2, "{shown:?}");
        }
    }
}

#[test]
fn an_answer_leaves_out_the_lists_of_contacts() {
    let (null, list) = (Some(json!(null)), |close: &mut Offline, path: &str| get(close, 1, path).1);
    for (shown, in_lead, in_contact) in [
        (ContactLists::NullInLeads, null.clone(), Some(1)),
        (ContactLists::MissingInLeads, None, Some(1)),
        (ContactLists::Null, null.clone(), None),
        (ContactLists::Missing, None, None),
    ] {
        let mut close = organization(|close| close.contact_lists = shown);
        let (lead, contact) = add_acme(&mut close);
        let (lead, contact) = (list(&mut close, &lead), list(&mut close, &contact));
        assert_eq!(lead["contacts"][0].get("phones").cloned(), in_lead, "{shown:?}");
        let phones = contact.get("phones").and_then(Value::as_array).map(Vec::len);
        assert_eq!(phones, in_contact, "{shown:?}");
        assert_eq!(contact.get("phones").is_none(), shown == ContactLists::Missing, "{shown:?}");
    }
}

#[test]
fn search_lags_by_the_kind_of_change() {
    let seconds = |seconds| Some(Lag::Fixed(Duration::from_secs(seconds)));
    let mut close = organization(|close| {
        close.search_lag = Lag::Fixed(Duration::from_secs(2));
        close.creation_search_lag = seconds(10);
        close.custom_field_search_lag = seconds(86_400);
    });
    let (lead, _) = add_acme(&mut close);
    let found = |close: &mut Offline, second| {
        let query = json!({"query": {"type": "object_type", "object_type": "lead"},
            "_fields": {"lead": ["name", "custom.cf_leadcompanyid"]}});
        let rows = ask(close, second, "POST", "data/search/", &query).1["data"].clone();
        rows.get(0).map(|row| (row["name"].clone(), row.get("custom.cf_leadcompanyid").cloned()))
    };
    assert_eq!(found(&mut close, 9), None);
    let changed = json!({"name": "Acme Inc", "custom.cf_leadcompanyid": "acme"});
    ask(&mut close, 20, "PUT", &lead, &changed);
    assert_eq!(found(&mut close, 21), Some((json!("Acme"), None)));
    assert_eq!(found(&mut close, 22), Some((json!("Acme Inc"), None)));
    assert_eq!(found(&mut close, 86_419), Some((json!("Acme Inc"), None)));
    assert_eq!(found(&mut close, 86_420), Some((json!("Acme Inc"), Some(json!("acme")))));
}

#[tokio::test]
async fn somebody_else_edits_a_record_right_before_a_request() {
    let (simulator, close) = super::start(Settings::fast()).await;
    let lead = simulator.add_lead(json!({"name": "Acme"})).unwrap();
    let path = format!("lead/{}/", lead["id"].as_str().unwrap());
    let edit =
        Effect::Edit { method: "PUT".into(), path: path.clone(), body: json!({"description": "theirs"}) };
    simulator.fault(Fault::new(edit).on("PUT", &path).times(1));
    let reply = close.put(&path, json!({"name": "Acme Inc"})).await.json();
    assert_eq!((&reply["name"], &reply["description"]), (&json!("Acme Inc"), &json!("theirs")));
    assert_eq!(simulator.request_count("PUT", "/lead/"), 1);
}
