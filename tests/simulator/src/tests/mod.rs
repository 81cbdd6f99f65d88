//! Tests of the simulator over HTTP, as a client uses it.

mod api;
mod faults;
mod organization;
mod reads;
mod recorded;

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use reqwest::{Method, StatusCode, header::HeaderMap};

use super::*;

struct Client {
    http: reqwest::Client,
    base: String,
    key: String,
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

impl Client {
    fn new(simulator: &Simulator) -> Self {
        // Another test may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let no_redirects = reqwest::redirect::Policy::none();
        Self {
            http: reqwest::Client::builder().redirect(no_redirects).build().unwrap(),
            base: simulator.url(),
            key: "api_simulator.key".into(),
        }
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base)).basic_auth(&self.key, Some(""))
    }

    async fn send(request: reqwest::RequestBuilder) -> Result<Reply, reqwest::Error> {
        let response = request.send().await?;
        let (status, headers) = (response.status(), response.headers().clone());
        Ok(Reply { status, headers, text: response.text().await? })
    }

    async fn get(&self, path: &str) -> Reply {
        Self::send(self.request(Method::GET, path)).await.unwrap()
    }

    async fn post(&self, path: &str, body: Value) -> Reply {
        Self::send(self.request(Method::POST, path).json(&body)).await.unwrap()
    }

    async fn put(&self, path: &str, body: Value) -> Reply {
        Self::send(self.request(Method::PUT, path).json(&body)).await.unwrap()
    }

    async fn delete(&self, path: &str) -> Reply {
        Self::send(self.request(Method::DELETE, path)).await.unwrap()
    }

    async fn control(&self, method: Method, path: &str, body: Value) -> Reply {
        let url = self.base.replace("/api/v1/", "/_sim/");
        Self::send(self.http.request(method, format!("{url}{path}")).body(body.to_string())).await.unwrap()
    }

    /// The ids of the leads that search finds by company id.
    async fn leads_of(&self, company_id: &str) -> Vec<String> {
        let query = json!({"query": {"type": "and", "queries": [
            {"type": "object_type", "object_type": "lead"},
            {"type": "field_condition",
                "field": {"type": "custom_field", "custom_field_id": "cf_leadcompanyid"},
                "condition": {"type": "text", "mode": "exact_value", "value": company_id}},
        ]}});
        let found = self.post("data/search/", query).await.json();
        let rows = found["data"].as_array().unwrap().iter();
        rows.map(|row| row["id"].as_str().unwrap().to_owned()).collect()
    }
}

async fn start(settings: Settings) -> (Simulator, Client) {
    let simulator = Simulator::start(settings, (Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
    let client = Client::new(&simulator);
    (simulator, client)
}

fn company(id: &str) -> Value {
    json!({"name": "Acme", "custom.cf_leadcompanyid": id})
}

#[tokio::test]
async fn stopping_cuts_open_connections() {
    let (simulator, client) = start(Settings::fast()).await;
    assert_eq!(client.get("me/").await.status, 200, "a connection now idles");
    simulator.fault(Fault::new(Effect::Timeout { ms: 60_000, when: When::BeforeCommit }));
    let hanging = tokio::spawn(Client::send(client.request(Method::GET, "me/")));
    while simulator.requests().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::timeout(Duration::from_secs(5), simulator.stop()).await.unwrap();
    assert!(hanging.await.unwrap().is_err());
    assert!(Client::send(client.request(Method::GET, "me/")).await.is_err());
    simulator.stop().await;
}

#[tokio::test]
async fn dropping_the_last_handle_stops_it() {
    let (simulator, client) = start(Settings::fast()).await;
    let clone = simulator.clone();
    drop(simulator);
    assert_eq!(client.get("me/").await.status, 200);
    drop(clone);
    while Client::send(client.request(Method::GET, "me/")).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_controls_work_over_http() {
    let (simulator, client) = start(Settings::fast()).await;
    let fault = json!({"method": "GET", "path": "/me/", "effect": {"status": {"code": 500}}});
    assert_eq!(client.control(Method::POST, "faults", fault).await.status, 204);
    assert_eq!(client.get("me/").await.status, 500);
    let summary = client.control(Method::GET, "", json!(null)).await.json();
    assert_eq!(summary["faults"].as_array().unwrap().len(), 1);
    assert_eq!(summary["requests"]["by_group_and_status"], json!({"GET me": {"500": 1}}));
    assert_eq!(client.control(Method::DELETE, "faults", json!(null)).await.status, 204);
    assert_eq!(client.get("me/").await.status, 200);

    for bad in [json!({}), json!({"effect": {"status": {"code": 99}}}), json!({"effect": {"latency": {}}})] {
        assert_eq!(client.control(Method::POST, "faults", bad).await.status, 400);
    }
    let id = |lead: &Value| lead["id"].as_str().unwrap().to_owned();
    let a = client.control(Method::POST, "leads", company("a")).await.json();
    let b = client.control(Method::POST, "leads", company("b")).await.json();
    let merge = json!({"source": id(&a), "destination": id(&b)});
    assert_eq!(client.control(Method::POST, "merge", merge.clone()).await.status, 204);
    assert_eq!(client.control(Method::POST, "merge", merge).await.status, 404);
    assert_eq!(client.control(Method::GET, "leads", json!(null)).await.json(), json!(simulator.leads()));
    assert_eq!(client.control(Method::DELETE, &format!("records/{}", id(&b)), json!(null)).await.status, 204);
    assert!(simulator.leads().is_empty());

    let changes = json!({"search_lag": "1s..10s", "api_key": "new"});
    assert_eq!(client.control(Method::PUT, "settings", changes).await.status, 204);
    assert_eq!(client.get("me/").await.status, 401);
    for (key, value) in [("search_lag", json!("soon")), ("serch_lag", json!("1s")), ("api_key", json!(1))] {
        let body = Value::Object([(key.to_owned(), value)].into_iter().collect());
        assert_eq!(client.control(Method::PUT, "settings", body).await.status, 400, "{key}");
    }
    let settings = client.control(Method::GET, "settings", json!(null)).await.json();
    assert_eq!(
        (&settings["search_lag"], &settings["exact_value"]),
        (&json!("1s..10s"), &json!("folds_case"))
    );
}

#[tokio::test]
async fn usage_shows_how_to_use_it() {
    let (simulator, client) = start(Settings::fast()).await;
    let usage = simulator.usage();
    for line in [
        format!("export CLOSE_API_URL={}", client.base),
        "export CLOSE_API_KEY=api_simulator.key".into(),
        "export CLOSE_LEAD_COMPANY_ID_FIELD=cf_leadcompanyid".into(),
        "export CLOSE_CONTACT_USER_ID_FIELD=cf_contactuserid".into(),
        "  user_adaaccount      Ada Account".into(),
        "  stat_badfit          Bad Fit".into(),
    ] {
        assert!(usage.contains(&line), "{usage}");
    }
    for effect in ["\"status\"", "\"html\"", "\"drop_connection\"", "\"timeout\"", "\"edit\""] {
        assert!(usage.contains(effect), "{effect}: {usage}");
    }
    for fault in usage.lines().filter_map(|line| line.split_once("/faults -d '")) {
        let read: Result<Fault, _> = serde_json::from_str(fault.1.trim_end_matches('\''));
        assert!(read.is_ok(), "{read:?}");
    }
    let field = usage.lines().find_map(|line| line.split_once("/fields -d '")).unwrap().1;
    let field: CustomField = serde_json::from_str(field.trim_end_matches('\'')).unwrap();
    simulator.add_field(field).unwrap();
}

/// A name that does not exist would have no effect.
#[tokio::test]
async fn names_in_lists_must_exist() {
    let (simulator, client) = start(Settings::fast()).await;
    let set = async |changes: Value| client.control(Method::PUT, "settings", changes).await.status.as_u16();
    for (setting, unknown, known) in [
        ("lossy_fields", "custom.cf_leadplam", "custom.cf_leadplan"),
        ("lossy_fields", "fone", "phones"),
        ("null_members", "cf_leadplan.choises", "cf_leadplan.choices"),
        ("null_members", "cf_nowhere.choices", "user_adaaccount.email"),
        ("null_members", "stat_badfit", "stat_badfit.label"),
        ("required_fields", "cf_leadplan", "cf_region"),
    ] {
        let field = json!({"id": "cf_region", "name": "Region", "type": "text", "owner": "shared"});
        client.control(Method::POST, "fields", field).await;
        assert_eq!(set(json!({setting: [unknown]})).await, 400, "{unknown}");
        assert_eq!(set(json!({setting: [known]})).await, 204, "{known}");
        // Nothing is changed by what is refused.
        let settings = client.control(Method::GET, "settings", json!(null)).await.json();
        assert_eq!(settings[setting], json!([known]));
        let mut settings = Settings::fast();
        settings.behaviour.set(setting, &json!([unknown]).to_string()).unwrap();
        let unknown_names = settings.unknown_names();
        assert_eq!((unknown_names[0].setting, unknown_names[0].name.as_str()), (setting, unknown));
    }
    // A list may name a field that is deleted later.
    assert!(simulator.remove_field("cf_region"));
    assert_eq!(set(json!({"search_lag": "1s"})).await, 204);
}
