//! Records, lists, search, and requests that are refused.

use super::*;

#[tokio::test]
async fn a_lead_is_created_updated_and_deleted() {
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
async fn refusals_have_closes_texts() {
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
        assert!(reply.header("ratelimit").is_some(), "every answer has the rate limit headers");
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
    let settings = Settings::fast().with(|close| close.missing_slash = MissingSlash::Redirected);
    let (_simulator, client) = start(settings).await;
    let reply = client.get("me").await;
    assert_eq!((reply.status.as_u16(), reply.header("location")), (301, Some("/api/v1/me/")));
}

#[tokio::test]
async fn search_lags_and_get_does_not() {
    let (simulator, client) = start(Settings::fast()).await;
    simulator.set_search_lag(Lag::Fixed(Duration::from_millis(300)));
    let created = client.post("lead/", company("acme-1")).await.json();
    let id = created["id"].as_str().unwrap();
    assert_eq!(client.get(&format!("lead/{id}/")).await.status, 200);
    assert!(client.leads_of("acme-1").await.is_empty());
    tokio::time::sleep(Duration::from_millis(350)).await;
    assert_eq!(client.leads_of("ACME-1 ").await, [id], "exact_value ignores case and surrounding whitespace");

    // The index lags for merges too: search still finds the deleted lead.
    let other = simulator.add_lead(company("acme-2")).unwrap();
    let other = other["id"].as_str().unwrap();
    assert_eq!(client.leads_of("acme-2").await, [other], "added leads are visible at once");
    simulator.merge(id, other).unwrap();
    assert_eq!(client.leads_of("acme-1").await, [id]);
    assert_eq!(client.put(&format!("lead/{id}/"), json!({"name": "x"})).await.status, 404);
    simulator.index_now();
    assert!(client.leads_of("acme-1").await.is_empty());
    let events = client.get(&format!("event/?object_type=lead&lead_id={other}&action=merged")).await.json();
    assert_eq!(
        events["data"][0]["meta"],
        json!({"merge_source_lead_id": id, "merge_destination_lead_id": other})
    );
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
    let lead = simulator
        .add_lead(json!({"date_created": "2026-01-01", "contacts": [{"name": "a"}, {"name": "b"}]}))
        .unwrap();
    simulator.add_contact(json!({"name": "c"})).unwrap();
    let page = client.get("lead/?_limit=1&_fields=name").await.json();
    assert_eq!(
        page,
        json!({"data": [{"name": null}], "has_more": true}),
        "the lead of a contact has no name"
    );
    let page = client.get("lead/?_limit=1&_skip=1&_fields=id").await.json();
    assert_eq!(page, json!({"data": [{"id": lead["id"]}], "has_more": false}));
    let id = lead["id"].as_str().unwrap();
    let contacts = client.get(&format!("contact/?lead_id={id}")).await.json();
    assert_eq!(contacts["data"].as_array().unwrap().len(), 2);
    for path in ["lead/?_skip=-1", "lead/?lead_id=x", "lead/?query=nome:x", "lead/?_skip=35001"] {
        assert_eq!(client.get(path).await.status, 400, "{path}");
    }
    let refused = client.get("lead/?_limit=201").await;
    let text = "Input should be less than or equal to 200";
    assert_eq!(refused.json(), json!({"errors": [], "field-errors": {"_limit": text}}));
}

#[tokio::test]
async fn lists_read_the_lagging_index() {
    for (lists_from_index, expected) in [(true, 0), (false, 1)] {
        let settings = Settings::fast().with(|close| {
            close.lists_from_index = lists_from_index;
            close.search_lag = Lag::Fixed(Duration::from_mins(1));
        });
        let (simulator, client) = start(settings).await;
        let lead = client.post("lead/", json!({"contacts": [{"name": "Jane"}]})).await.json();
        let rows = |page: &Value| page["data"].as_array().unwrap().len();
        assert_eq!(rows(&client.get("lead/").await.json()), expected);
        simulator.index_now();
        let page = client.get("lead/").await.json();
        assert_eq!(page["data"][0], lead, "a row is the whole lead with its contacts");
        assert_eq!(rows(&client.get("contact/").await.json()), 1);
    }
}

#[tokio::test]
async fn leads_are_listed_by_id_and_by_the_old_query_language() {
    let (simulator, client) = start(Settings::fast()).await;
    let lead = |name: &str, email: &str| {
        let body = json!({"name": name, "date_created": format!("2026-01-0{}", name.len() - 3), "custom.Company ID": format!("{name}-1"),
            "contacts": [{"name": "Jane", "emails": [{"email": email}]}]});
        simulator.add_lead(body).unwrap()["id"].as_str().unwrap().to_owned()
    };
    let (acme, beta) = (lead("Acme", "jane@acme.test"), lead("Beta2", "jane@beta.test"));
    let ids = async |path: String| {
        let page = client.get(&path).await.json();
        let rows = page["data"].as_array().unwrap_or_else(|| panic!("{path}: {page}")).clone();
        rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    for (query, expected) in [
        (format!("id__in={acme}"), vec![&acme]),
        (format!("id__in={acme},{beta},lead_x"), vec![&beta, &acme]),
        ("query=name:acme".into(), vec![&acme]),
        ("query=company:\"Beta2\" sort:-created".into(), vec![&beta]),
        ("query=\"custom.Company ID\":\"acme-1\"".into(), vec![&acme]),
        ("query=custom.cf_leadcompanyid:beta2-1".into(), vec![&beta]),
        ("query=email_address:\"jane@beta.test\"".into(), vec![&beta]),
        (format!("query=id:{acme}"), vec![&acme]),
        ("query=beta2".into(), vec![&beta]),
        ("query=FOO".into(), vec![]),
    ] {
        let expected: Vec<String> = expected.into_iter().cloned().collect();
        assert_eq!(ids(format!("lead/?{query}")).await, expected, "{query}");
    }
    let empty = client.get("lead/?query=FOO").await.json();
    assert_eq!(empty, json!({"has_more": false, "total_results": 0, "data": []}), "as recorded");
    let counted = client.get("lead/?query=jane&_limit=0").await.json();
    assert_eq!(counted, json!({"has_more": true, "total_results": 2, "data": []}), "of the contacts");
    let many = vec!["lead_x"; 101].join(",");
    assert_eq!(client.get(&format!("lead/?id__in={many}")).await.status, 400);
}

#[tokio::test]
async fn a_post_may_stand_for_a_get() {
    let (simulator, client) = start(Settings::fast()).await;
    let ids: Vec<Value> = (1..4)
        .map(|n| simulator.add_lead(json!({"date_created": format!("2026-01-0{n}")})).unwrap()["id"].clone())
        .collect();
    let post = |body: Value| {
        client.request(Method::POST, "lead/").header("X-HTTP-Method-Override", "GET").json(&body)
    };
    let parameters = json!({"_params": {"id__in": ids[..2], "_limit": 1, "_fields": ["id"]}});
    let page = Client::send(post(parameters)).await.unwrap().json();
    assert_eq!(page, json!({"data": [{"id": ids[1]}], "has_more": true}));
    assert_eq!(simulator.request_count("GET", "/lead/"), 1);
    assert_eq!(Client::send(post(json!({"name": "x"}))).await.unwrap().status, 200, "an ordinary POST");
    assert_eq!(simulator.leads().len(), 4);
}

#[tokio::test]
async fn the_created_lead_may_lack_a_list() {
    for (created_lead, lacks) in
        [(CreatedLead::WithoutContactIds, "contact_ids"), (CreatedLead::WithoutContacts, "contacts")]
    {
        let (_simulator, client) =
            start(Settings::fast().with(|close| close.created_lead = created_lead)).await;
        let created = client.post("lead/", json!({"contacts": [{}]})).await.json();
        assert_eq!(created.get(lacks), None);
    }
}
