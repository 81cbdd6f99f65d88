//! Custom fields, lead statuses and users.

use super::*;

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
async fn lead_statuses_have_predictable_ids() {
    let statuses = ["Potential", "Bad Fit", "Won (2026)"].map(String::from).into();
    let (simulator, client) = start(Settings { statuses, ..Settings::fast() }).await;
    let expected =
        [("stat_potential", "Potential"), ("stat_badfit", "Bad Fit"), ("stat_won2026", "Won (2026)")];
    assert_eq!(simulator.lead_statuses(), expected.map(|(id, label)| (id.to_owned(), label.to_owned())));
    let listed = client.get("status/lead/").await.json();
    let ids: Vec<_> = listed["data"].as_array().unwrap().iter().map(|status| &status["id"]).collect();
    assert_eq!(
        ids,
        ["stat_badfit", "stat_potential", "stat_won2026"],
        "not in the order of the organization"
    );
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
async fn fields_are_added_changed_and_deleted() {
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
    assert!(simulator.change_field(region).is_err(), "the field does not exist");
    assert!(simulator.add_lead(json!({"custom.Region": "North"})).is_err());
}

#[tokio::test]
async fn fields_can_be_managed_over_http() {
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
async fn the_users_can_be_chosen() {
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
