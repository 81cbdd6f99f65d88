//! The simulator as a client sees it: over HTTP.

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

    /// The ids of the leads search finds by company id.
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
async fn a_lead_lives_and_dies() {
    let (_simulator, client) = start(Settings::fast()).await;
    let reply = client
        .post(
            "lead/",
            json!({"name": "Acme", "custom.cf_leadplan": "pro", "ignored": 1, "contacts": [
                {"name": "Jane",
                    "emails": [{"email": " jane@acme.test "}], "phones": [{"phone": "800 444 5555"}]},
                {"name": "Joe", "urls": [{"url": "joe.test"}]},
            ]}),
        )
        .await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let lead = reply.json();
    let (jane, joe) = (&lead["contacts"][0], &lead["contacts"][1]);
    assert_eq!((&jane["name"], &joe["name"]), (&json!("Jane"), &json!("Joe")));
    assert_eq!(lead["contact_ids"], json!([jane["id"], joe["id"]]));
    assert_eq!(lead["status_label"], "Potential");
    assert_eq!(lead["custom"], json!({"Plan": "pro"}));
    assert_eq!(jane["emails"][0]["email"], "jane@acme.test");
    assert_eq!(jane["phones"][0]["phone"], "+18004445555");
    assert_eq!(joe["urls"], json!([{"url": "http://joe.test", "type": "url"}]));
    assert_eq!(joe["title"], "");
    assert!(jane["date_created"].as_str() > lead["date_created"].as_str());

    let id = lead["id"].as_str().unwrap();
    let updated =
        client.put(&format!("lead/{id}/"), json!({"custom.cf_leadplan": null, "url": "acme.test"})).await;
    assert_eq!(updated.json()["url"], "http://acme.test");
    assert_eq!(updated.json().get("custom.cf_leadplan"), None);
    assert_eq!(updated.json()["name"], "Acme");
    let some = client.get(&format!("lead/{id}/?_fields=id,name,nonsense")).await;
    assert_eq!(some.json(), json!({"id": id, "name": "Acme"}));

    assert_eq!(client.delete(&format!("lead/{id}/")).await.json(), json!({}));
    let gone = client.get(&format!("lead/{id}/")).await;
    assert_eq!(gone.status, 404);
    assert_eq!(gone.json(), json!({"error": "Empty query: Lead matching query does not exist."}));
    let contact = client.get(&format!("contact/{}/", jane["id"].as_str().unwrap())).await;
    assert_eq!(contact.status, 404);
    let events = client.get(&format!("event/?object_type=contact&action=deleted&lead_id={id}")).await.json();
    assert_eq!(events["data"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn requests_are_refused_in_closes_words() {
    let (simulator, client) = start(Settings { max_body_bytes: 1000, ..Settings::fast() }).await;
    let raw = |body: &'static str, kind: &'static str| {
        client.request(Method::POST, "lead/").header("content-type", kind).body(body)
    };
    for (request, status, body) in [
        (
            client.request(Method::GET, "lead/lead_x/"),
            404,
            json!({"error": "Empty query: Lead matching query does not exist."}),
        ),
        (
            client.request(Method::GET, "me"),
            404,
            json!({"error": "The requested URL was not found on the server."}),
        ),
        (
            client.request(Method::GET, "nothing/"),
            404,
            json!({"error": "The requested URL was not found on the server."}),
        ),
        (
            client.request(Method::DELETE, "me/"),
            405,
            json!({"error": "The method is not allowed for the requested URL."}),
        ),
        (raw("{", "application/json"), 400, json!({"error": "The request contains invalid JSON."})),
        (raw("NaN", "application/json"), 400, json!({"error": "The request contains invalid JSON."})),
        (raw("[]", "application/json; charset=utf-8"), 400, json!({"error": "JSON data must be a dict."})),
        (
            raw("{}", "text/plain"),
            415,
            json!({"error": "The request must have the header 'Content-Type: application/json'."}),
        ),
        (
            client.request(Method::POST, "lead/").json(&json!({"name": "x".repeat(1000)})),
            413,
            json!({"error": "The request is too large."}),
        ),
        (
            client
                .request(Method::POST, "lead/merge/")
                .json(&json!({"source": "lead_a", "destination": "lead_b"})),
            404,
            json!({"errors": ["Source lead does not exist."]}),
        ),
        (
            client.http.get(format!("{}me/", client.base)),
            401,
            json!({"error": "The server could not verify that you are authorized to access the URL \
                requested."}),
        ),
    ] {
        let reply = Client::send(request).await.unwrap();
        assert_eq!((reply.status.as_u16(), reply.json()), (status, body));
        assert!(reply.header("ratelimit").is_some(), "every answer tells the limits");
    }
    assert!(simulator.leads().is_empty());
}

#[tokio::test]
async fn chunked_bodies_are_refused() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let (simulator, _) = start(Settings::fast()).await;
    let mut stream = tokio::net::TcpStream::connect(simulator.addr()).await.unwrap();
    let request = "POST /api/v1/lead/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
        Authorization: Basic YXBpX3NpbXVsYXRvci5rZXk6\r\nContent-Type: application/json\r\n\
        Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert!(answer.contains("Chunked Transfer-Encoding is not supported."), "{answer}");
    assert!(simulator.leads().is_empty());
}

#[tokio::test]
async fn a_missing_slash_may_redirect() {
    let settings = Settings { missing_slash: MissingSlash::Redirected, ..Settings::fast() };
    let (_simulator, client) = start(settings).await;
    let reply = client.get("me").await;
    assert_eq!((reply.status.as_u16(), reply.header("location")), (301, Some("/api/v1/me/")));
}

#[tokio::test]
async fn search_lags_behind_and_get_does_not() {
    let (simulator, client) = start(Settings::fast()).await;
    simulator.set_search_lag(Lag::Fixed(Duration::from_millis(300)));
    let created = client.post("lead/", company("acme-1")).await.json();
    let id = created["id"].as_str().unwrap();
    assert_eq!(client.get(&format!("lead/{id}/")).await.status, 200);
    assert!(client.leads_of("acme-1").await.is_empty());
    tokio::time::sleep(Duration::from_millis(350)).await;
    assert_eq!(client.leads_of("ACME-1 ").await, [id], "exact_value folds case and blanks");

    // A merge shows as late as anything else: search names a lead that is gone.
    let other = simulator.add_lead(company("acme-2")).unwrap();
    let other = other["id"].as_str().unwrap();
    assert_eq!(client.leads_of("acme-2").await, [other], "seeds show at once");
    simulator.merge(id, other).unwrap();
    assert_eq!(client.leads_of("acme-1").await, [id]);
    assert_eq!(client.put(&format!("lead/{id}/"), json!({"name": "x"})).await.status, 404);
    simulator.index_now();
    assert!(client.leads_of("acme-1").await.is_empty());
    let events = client.get(&format!("event/?lead_id={other}&action=merged")).await.json();
    assert_eq!(
        events["data"][0]["meta"],
        json!({"merge_source_lead_id": id, "merge_destination_lead_id": other})
    );
}

#[tokio::test]
async fn limits_bite_and_tell() {
    let limits = Limits { search: Rate::new(2, 60), others: Rate::new(1, 60), ..Limits::documented() };
    let (simulator, client) = start(Settings { limits, ..Settings::fast() }).await;
    let search = json!({"query": {"type": "match_all"}});
    let first = client.post("data/search/", search.clone()).await;
    assert!(first.header("ratelimit").unwrap().starts_with("limit=2, remaining=1, reset="));
    let broken = client.post("data/search/", json!({})).await;
    assert_eq!(broken.status, 400, "and it spends a token");
    let refused = client.post("data/search/", search).await;
    assert_eq!(refused.status, 429);
    assert!(refused.header("ratelimit").unwrap().starts_with("limit=2, remaining=0, reset="));
    let retry_after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&retry_after));
    assert_eq!(refused.json()["error"]["rate_limit_type"], "key");

    let wrong = Client { key: "wrong".into(), ..Client::new(&simulator) };
    assert_eq!(wrong.get("me/").await.status, 401);
    assert_eq!(wrong.get("me/").await.status, 429, "a 401 spends a token too");
    assert_eq!(client.get("me/").await.status, 200, "of its own key");
    assert_eq!(simulator.request_count("POST", "data/search/"), 3);
    let statuses: Vec<_> = simulator.requests().into_iter().map(|request| request.status).collect();
    assert_eq!(statuses, [200, 400, 429, 401, 429, 200].map(Some));
}

#[tokio::test]
async fn answers_get_lost_before_or_after_the_write() {
    let (simulator, client) = start(Settings::fast()).await;
    for (effect, written) in [
        (Effect::DropConnection { when: When::BeforeCommit }, 0),
        (Effect::DropConnection { when: When::AfterCommit }, 1),
        (Effect::Timeout { ms: 50, when: When::BeforeCommit }, 1),
        (Effect::Timeout { ms: 50, when: When::AfterCommit }, 2),
    ] {
        simulator.fault(Fault::new(effect.clone()).on("POST", "/lead/").times(1));
        let lost = Client::send(client.request(Method::POST, "lead/").json(&company("a"))).await;
        assert!(lost.is_err(), "{effect:?}");
        assert_eq!(simulator.leads().len(), written, "{effect:?}");
        assert_eq!(client.get("me/").await.status, 200, "the next connection is fine");
    }
    let statuses: Vec<_> = simulator.requests().into_iter().map(|request| request.status).collect();
    assert_eq!(statuses, [None, Some(200), None, Some(200), None, Some(200), None, Some(200)]);
}

#[tokio::test]
async fn a_dropped_connection_sends_no_byte() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let (simulator, _) = start(Settings::fast()).await;
    simulator.fault(Fault::new(Effect::DropConnection { when: When::AfterCommit }));
    let mut stream = tokio::net::TcpStream::connect(simulator.addr()).await.unwrap();
    let request =
        "GET /api/v1/me/ HTTP/1.1\r\nHost: x\r\nAuthorization: Basic YXBpX3NpbXVsYXRvci5rZXk6\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
    assert!(ended.is_ok() && answer.is_empty(), "{ended:?} {answer:?}");
}

#[tokio::test]
async fn scripted_statuses_and_hidden_limits() {
    let (simulator, client) = start(Settings::fast()).await;
    let status =
        |code, body, when| Fault::new(Effect::Status { code, body, when }).on("POST", "/lead/").times(1);
    simulator.fault(status(504, FaultBody::Empty, When::AfterCommit));
    simulator.fault(status(502, FaultBody::Html, When::BeforeCommit));
    simulator.fault(status(403, FaultBody::Text, When::BeforeCommit));
    for (code, text, kind, written) in [
        (504, "", "application/json", 1),
        (502, "<html>", "text/html; charset=utf-8", 1),
        (403, "Forbidden", "text/plain; charset=utf-8", 1),
    ] {
        let reply = client.post("lead/", company("a")).await;
        assert_eq!(reply.status, code);
        assert!(reply.text.starts_with(text), "{}", reply.text);
        assert_eq!(reply.header("content-type"), Some(kind));
        assert_eq!(simulator.leads().len(), written);
    }
    let limited = |with_headers| Fault::new(Effect::RateLimited { retry_after: 1.5, with_headers }).times(1);
    simulator.fault(limited(true));
    simulator.fault(limited(false));
    let told = client.get("me/").await;
    assert_eq!((told.status.as_u16(), told.header("retry-after")), (429, Some("2")));
    assert_eq!(told.header("ratelimit"), Some("limit=1000000, remaining=999999, reset=1.500000"));
    let terse = client.get("me/").await;
    assert_eq!((terse.status.as_u16(), terse.header("retry-after")), (429, Some("2")));
    assert_eq!(terse.header("ratelimit"), None);

    simulator.fault(Fault::new(Effect::Latency { ms: 100 }).times(1));
    let before = Instant::now();
    assert_eq!(client.get("me/").await.status, 200);
    assert!(before.elapsed() >= Duration::from_millis(100));
}

#[tokio::test]
async fn a_late_write_happens_although_its_client_has_left() {
    let (simulator, client) = start(Settings::fast()).await;
    simulator.fault(Fault::new(Effect::Latency { ms: 200 }).on("POST", "/lead/"));
    let request =
        client.request(Method::POST, "lead/").json(&company("a")).timeout(Duration::from_millis(50));
    assert!(Client::send(request).await.is_err_and(|error| error.is_timeout()));
    assert!(simulator.leads().is_empty());
    while simulator.leads().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn limits_are_told_in_the_chosen_form() {
    for (header_style, busy_body, header, body) in [
        (HeaderStyle::Semicolon, BusyBody::Flat, Some("ratelimit"), "{\"message\""),
        (HeaderStyle::Legacy, BusyBody::Text, Some("x-rate-limit-reset"), "Too Many Requests"),
        (HeaderStyle::Proxy, BusyBody::Empty, Some("ratelimit-remaining"), ""),
        (HeaderStyle::Absent, BusyBody::Nested, None, "{\"error\""),
    ] {
        let settings = Settings { header_style, busy_body, ..Settings::fast() };
        let (simulator, client) = start(settings).await;
        simulator.set_limits(Limits { others: Rate::new(0, 8), ..Limits::unlimited() });
        let reply = client.get("me/").await;
        assert_eq!(reply.status, 429);
        assert!(reply.text.starts_with(body), "{}", reply.text);
        assert_eq!(reply.header("retry-after").is_some(), header.is_some());
        let told = reply.headers.keys().filter(|name| name.as_str().contains("rate")).count();
        assert_eq!(told > 0, header.is_some());
        assert!(header.is_none_or(|header| reply.header(header).is_some()), "{header_style:?}");
    }
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
async fn fields_statuses_and_me_can_be_read() {
    let custom_fields = vec![
        CustomField::new("cf_lead", "Segment", FieldKind::Text, Owner::Lead),
        CustomField::new("cf_contact", "Rank", FieldKind::Number, Owner::Contact),
        CustomField::new("cf_shared", "Region", FieldKind::Text, Owner::Shared),
    ];
    let (_simulator, client) = start(Settings { custom_fields, ..Settings::fast() }).await;
    let ids = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
    };
    let own = client.get("custom_field/contact/").await.json();
    assert_eq!(ids(&own["data"]), ["cf_contact"]);
    let all = client.get("custom_field_schema/contact/").await.json();
    assert_eq!(ids(&all["fields"]), ["cf_contact", "cf_shared"]);
    assert_eq!(all["fields"][1]["associations"].as_array().unwrap().len(), 2);
    assert_eq!(ids(&client.get("custom_field/shared/").await.json()["data"]), ["cf_shared"]);

    let made = client
        .post(
            "custom_field/lead/",
            json!({"name": "Tags", "type": "choices", "choices": ["a"], "accepts_multiple_values": true}),
        )
        .await;
    let id = made.json()["id"].as_str().unwrap().to_owned();
    let key = format!("custom.{id}");
    let lead = client.post("lead/", json!({key.as_str(): "a"})).await;
    assert_eq!(lead.json()[&key], json!(["a"]));

    let me = client.get("me/").await.json();
    let labels: Vec<_> =
        me["organizations"][0]["lead_statuses"].as_array().unwrap().iter().map(|s| &s["label"]).collect();
    assert_eq!(labels, ["Potential", "Bad Fit", "Qualified", "Customer"]);
    assert_eq!(client.get("status/lead/").await.json()["data"].as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn lead_statuses_have_foreseeable_ids() {
    let statuses = ["Potential", "Bad Fit", "Won (2026)"].map(String::from).into();
    let (simulator, client) = start(Settings { statuses, ..Settings::fast() }).await;
    let expected =
        [("stat_potential", "Potential"), ("stat_badfit", "Bad Fit"), ("stat_won2026", "Won (2026)")];
    assert_eq!(simulator.lead_statuses(), expected.map(|(id, label)| (id.to_owned(), label.to_owned())));
    let listed = client.get("status/lead/").await.json();
    let ids: Vec<_> = listed["data"].as_array().unwrap().iter().map(|status| &status["id"]).collect();
    assert_eq!(ids, ["stat_badfit", "stat_potential", "stat_won2026"], "not in the organisation's order");
    let lead = client.post("lead/", json!({"status_id": "stat_badfit"})).await.json();
    assert_eq!(lead["status_label"], "Bad Fit");
}

#[tokio::test]
async fn the_default_fields_cover_the_types() {
    let (simulator, _client) = start(Settings::fast()).await;
    let jane = simulator.add_contact(json!({"name": "Jane"})).unwrap();
    for (id, value) in [
        ("cf_leadcompanyid", json!("acme-1")),
        ("cf_leadplan", json!("pro")),
        ("cf_leadseats", json!(5)),
        ("cf_leadnumericid", json!(7)),
        ("cf_leadowner", json!("user_adaaccount")),
        ("cf_leadtags", json!(["red", "blue"])),
        ("cf_leadsince", json!("2026-01-31")),
        ("cf_leadactive", json!("Yes")),
        ("cf_leadnotes", json!("two\nlines")),
        ("cf_contactuserid", json!("u-1")),
        ("cf_contactsyncedat", json!("2026-01-31T00:00:00.000000+00:00")),
        ("cf_contactrole", json!("Buyer")),
        ("cf_contactscore", json!(0.5)),
        ("cf_contactborn", json!("1990-12-31")),
        ("cf_contactreferrer", jane["id"].clone()),
    ] {
        let key = format!("custom.{id}");
        let body = json!({key.as_str(): value});
        let made =
            if id.starts_with("cf_lead") { simulator.add_lead(body) } else { simulator.add_contact(body) };
        assert_eq!(made.map(|record| record[&key].clone()), Ok(value), "{id}");
    }
}

#[tokio::test]
async fn fields_come_change_and_go() {
    let (simulator, client) = start(Settings::fast()).await;
    let region = CustomField::new("cf_region", "Region", FieldKind::Text, Owner::Lead);
    simulator.add_field(region.clone()).unwrap();
    assert!(simulator.add_field(region.clone()).is_err(), "the id is taken");
    let lead = simulator.add_lead(json!({"custom.Region": "North"})).unwrap();
    let path = format!("lead/{}/?_fields=custom", lead["id"].as_str().unwrap());

    simulator.change_field(CustomField { name: "Area".into(), ..region.clone() }).unwrap();
    let renamed = json!({"custom": {"Area": "North"}, "custom.cf_region": "North"});
    assert_eq!(client.get(&path).await.json(), renamed);
    simulator.change_field(CustomField { kind: FieldKind::Number, ..region.clone() }).unwrap();
    assert_eq!(client.get(&path).await.json(), json!({"custom": {}}));
    let schema = client.get("custom_field_schema/lead/").await.json();
    let of_region = |field: &&Value| field["id"] == "cf_region";
    assert_eq!(schema["fields"].as_array().unwrap().iter().find(of_region).unwrap()["type"], "number");

    assert!(simulator.remove_field("cf_region"));
    assert!(!simulator.remove_field("cf_region"));
    assert!(simulator.change_field(region).is_err(), "there is none");
    assert!(simulator.add_lead(json!({"custom.Region": "North"})).is_err());
}

#[tokio::test]
async fn fields_are_controlled_over_http() {
    let custom_fields = vec![CustomField::new("cf_a", "A", FieldKind::Text, Owner::Shared)];
    let (simulator, client) = start(Settings { custom_fields, ..Settings::fast() }).await;
    let a = json!({"id": "cf_a", "name": "A", "type": "text", "choices": [], "accepts_multiple_values": false,
        "owner": "shared"});
    let b = json!({"id": "cf_b", "name": "B", "type": "choices", "choices": ["x"],
        "accepts_multiple_values": true, "owner": "contact"});
    assert_eq!(client.control(Method::POST, "fields", b.clone()).await.status, 204);
    assert_eq!(client.control(Method::GET, "fields", json!(null)).await.json(), json!([a, b]));
    let jane = simulator.add_contact(json!({"custom.B": "x"})).unwrap();
    assert_eq!(jane["custom.cf_b"], json!(["x"]));

    let changed = json!({"id": "cf_b", "name": "B", "type": "text", "owner": "contact"});
    assert_eq!(client.control(Method::PUT, "fields", changed).await.status, 204);
    assert_eq!(simulator.contacts()[0]["custom.cf_b"], "x");
    assert_eq!(client.control(Method::DELETE, "fields/cf_b", json!(null)).await.status, 204);
    assert_eq!(simulator.contacts()[0].get("custom.cf_b"), None);

    assert_eq!(client.control(Method::DELETE, "fields/cf_b", json!(null)).await.status, 404);
    assert_eq!(client.control(Method::PUT, "fields", b).await.status, 404);
    for bad in [a, json!({"id": "cf_c"}), json!({"id": "cf_c", "name": "C", "type": "odd", "owner": "lead"})]
    {
        assert_eq!(client.control(Method::POST, "fields", bad).await.status, 400);
    }
}

#[tokio::test]
async fn users_can_be_listed_and_read() {
    let (_simulator, client) = start(Settings::fast()).await;
    let users = client.get("user/").await.json();
    let names = |user: &Value| {
        ["id", "first_name", "last_name", "email"].map(|key| user[key].as_str().unwrap().to_owned())
    };
    let [sim, ada] = [&users["data"][0], &users["data"][1]];
    assert_eq!(names(sim), ["user_simulator", "Sim", "Ulator", "sim@close.test"]);
    assert_eq!(names(ada), ["user_adaaccount", "Ada", "Account", "ada@close.test"]);
    assert_eq!((users["data"].as_array().unwrap().len(), &users["has_more"]), (2, &json!(false)));
    assert_eq!(client.get("me/?_fields=id").await.json()["id"], sim["id"]);
    let page = client.get("user/?_skip=1&_limit=1&_fields=id").await.json();
    assert_eq!(page, json!({"data": [{"id": "user_adaaccount"}], "has_more": false}));
    assert_eq!(client.get("user/?_limit=1").await.json()["has_more"], true);
    assert_eq!(client.get("user/user_adaaccount/").await.json(), *ada);
    let missing = client.get("user/user_x/").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.json(), json!({"error": "Empty query: User matching query does not exist."}));
    assert_eq!(client.get("user/?email=ada@close.test").await.status, 400);
    assert_eq!(client.post("user/", json!({})).await.status, 405);
    assert_eq!(client.delete("user/user_adaaccount/").await.status, 405);
}

#[tokio::test]
async fn an_organisation_may_have_other_users() {
    let settings = Settings {
        user: User::new("user_joe", "Joe", "Doe", "joe@acme.test"),
        more_users: Vec::new(),
        custom_fields: vec![CustomField::new("cf_owner", "Owner", FieldKind::User, Owner::Lead)],
        ..Settings::fast()
    };
    let (simulator, client) = start(settings).await;
    assert_eq!(client.get("user/?_fields=id").await.json()["data"], json!([{"id": "user_joe"}]));
    let lead = simulator.add_lead(json!({"custom.cf_owner": "Joe Doe"})).unwrap();
    assert_eq!((&lead["custom.cf_owner"], &lead["created_by_name"]), (&json!("user_joe"), &json!("Joe Doe")));
    assert!(simulator.add_lead(json!({"custom.cf_owner": "Ada Account"})).is_err());
}

#[tokio::test]
async fn leads_are_added_with_fields_by_name_and_with_their_age() {
    let (simulator, client) = start(Settings::fast()).await;
    let body = json!({
        "name": "Acme", "status_id": "stat_customer", "date_created": "2020-01-31T00:00:00Z",
        "custom.Company ID": "acme-1", "custom.cf_leadseats": 5, "custom.Account owner": "Ada Account",
        "contacts": [{"name": "Jane", "custom.User ID": "u-1", "custom.Role": "Buyer",
            "date_created": "2021-01-31"}],
    });
    let lead = simulator.add_lead(body).unwrap();
    assert_eq!(
        search::select(&lead, &["status_label", "date_created", "custom"]),
        *json!({
            "status_label": "Customer",
            "date_created": "2020-01-31T00:00:00.000000+00:00",
            "custom": {"Company ID": "acme-1", "Seats": 5, "Account owner": "user_adaaccount"},
            "custom.cf_leadcompanyid": "acme-1",
            "custom.cf_leadseats": 5,
            "custom.cf_leadowner": "user_adaaccount",
        })
        .as_object()
        .unwrap()
    );
    assert_eq!(
        search::select(&lead["contacts"][0], &["date_created", "custom"]),
        *json!({
            "date_created": "2021-01-31T00:00:00.000000+00:00",
            "custom.cf_contactuserid": "u-1",
            "custom.cf_contactrole": "Buyer",
        })
        .as_object()
        .unwrap()
    );
    assert_eq!(client.leads_of("acme-1").await, [lead["id"].as_str().unwrap()]);
}

#[tokio::test]
async fn lists_page_and_filter() {
    let (simulator, client) = start(Settings::fast()).await;
    let lead = simulator.add_lead(json!({"contacts": [{"name": "a"}, {"name": "b"}]})).unwrap();
    simulator.add_contact(json!({"name": "c"})).unwrap();
    let page = client.get("lead/?_limit=1&_fields=name").await.json();
    assert_eq!(page, json!({"data": [{"name": "c"}], "has_more": true}));
    let page = client.get("lead/?_limit=1&_skip=1&_fields=id").await.json();
    assert_eq!(page, json!({"data": [{"id": lead["id"]}], "has_more": false}));
    let id = lead["id"].as_str().unwrap();
    let contacts = client.get(&format!("contact/?lead_id={id}")).await.json();
    assert_eq!(contacts["data"].as_array().unwrap().len(), 2);
    for path in ["lead/?_limit=201", "lead/?query=name:x", "lead/?lead_id=x", "lead/?_skip=-1"] {
        assert_eq!(client.get(path).await.status, 400, "{path}");
    }
}

#[tokio::test]
async fn the_created_lead_may_lack_a_list() {
    for (created_lead, lacks) in
        [(CreatedLead::WithoutContactIds, "contact_ids"), (CreatedLead::WithoutContacts, "contacts")]
    {
        let (_simulator, client) = start(Settings { created_lead, ..Settings::fast() }).await;
        let created = client.post("lead/", json!({"contacts": [{}]})).await.json();
        assert_eq!(created.get(lacks), None);
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
    assert_eq!(client.control(Method::PUT, "settings", json!({"search_lag": "soon"})).await.status, 400);
}

#[tokio::test]
async fn usage_names_everything_a_person_needs() {
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
    for fault in usage.lines().filter_map(|line| line.split_once("/faults -d '")) {
        let read: Result<Fault, _> = serde_json::from_str(fault.1.trim_end_matches('\''));
        assert!(read.is_ok(), "{read:?}");
    }
    let field = usage.lines().find_map(|line| line.split_once("/fields -d '")).unwrap().1;
    let field: CustomField = serde_json::from_str(field.trim_end_matches('\'')).unwrap();
    simulator.add_field(field).unwrap();
}
