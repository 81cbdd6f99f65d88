//! Dead letters: edit one, export and import, and the ways to select.

use close_sync::amqp::envelope;
use futures_util::StreamExt;
use lapin::BasicProperties;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicRejectOptions};
use lapin::types::{AMQPValue, ByteArray, FieldTable};
use serde_json::{Value, json};

use crate::support::{Bench, env, identify};

/// A dead letter without identity, and its id.
async fn without_identity(event: Value) -> (Bench, String) {
    let bench = Bench::new().await;
    bench.sync(&[event]).await;
    let id = bench.dead_ids().await.remove(0);
    (bench, id)
}

async fn shown(bench: &Bench, id: &str) -> Value {
    serde_json::from_str(&bench.output(&["dlq", "show", id, "--json"]).await).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_edited_and_then_succeeds() {
    let sent = json!({"type": "identify", "traits": {"name": "Ines", "company": {"id": "c1"}}});
    let (bench, id) = without_identity(sent.clone()).await;
    let invalid = |words: &'static str, patch: &'static str| (words, ["dlq", "edit", "ID", "--patch", patch]);
    for (words, mut arguments) in [
        invalid("the patch is not valid JSON", "{"),
        invalid("the patch does not apply", "[{\"op\": \"remove\", \"path\": \"/nothing\"}]"),
        invalid("not a JSON object", "\"text\""),
    ] {
        arguments[2] = &id;
        let (code, _, text) = bench.run_text(&arguments, "").await;
        assert!(code == Some(2) && text.contains(words), "{text}");
    }
    let (_, _, words) = bench.run_text(&["dlq", "edit", &id, "--patch", "{}"], "").await;
    assert_eq!(words, "nothing was changed\n");
    assert_eq!(shown(&bench, &id).await["edited_at"], Value::Null);

    bench
        .output(&["dlq", "edit", &id, "--patch", "{\"userId\": \"u1\", \"traits\": {\"name\": null}}"])
        .await;
    bench
        .output(&[
            "dlq",
            "edit",
            &id,
            "--patch",
            "[{\"op\": \"add\", \"path\": \"/traits/title\", \"value\": \"Dr\"}]",
        ])
        .await;
    let now = shown(&bench, &id).await;
    assert_eq!(
        now["body"],
        json!({"type": "identify", "userId": "u1", "traits": {"title": "Dr", "company": {"id": "c1"}}})
    );
    assert_eq!(now["original"], sent, "the body that the producer sent, after any number of edits");
    assert_eq!(
        (&now["reason"], &now["replays"], &now["plan"]["outcome"]),
        (&json!("no_identity"), &json!(0), &json!("created"))
    );
    assert!(now["edited_at"].is_string() && bench.dead_ids().await == [id.as_str()]);

    let worker = bench.worker().await;
    assert_eq!(bench.output(&["dlq", "replay", "--id", &id]).await, "replayed 1; 1 created\n");
    assert_eq!(bench.the_lead()["contacts"][0]["title"], "Dr");
    worker.terminate().await;
    let (code, _, words) = bench.run_text(&["dlq", "edit", &id, "--patch", "{}"], "").await;
    assert!(code == Some(2) && words.contains("not found"), "{words}");
}

/// Runs the editor of the environment. An unchanged or unusable text changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_edit_without_patch_opens_an_editor() {
    let (bench, id) = without_identity(json!({"type": "identify", "traits": {"name": "Ines"}})).await;
    let mut bench = bench.set("PATH", &env("PATH").unwrap());
    let (code, _, words) = bench.run_text(&["dlq", "edit", &id], "").await;
    assert!(code == Some(2) && words.contains("neither VISUAL nor EDITOR"), "{words}");
    for (editor, expected, words) in [
        ("true", Some(0), "nothing was changed"),
        ("false", Some(69), "nothing was changed"),
        ("sed -i s/{/[/", Some(2), "not a JSON object"),
        ("sed -i '1s/{/{\"userId\": \"u7\",/'", Some(0), "dlq replay --id"),
    ] {
        bench = bench.set("EDITOR", editor);
        let (code, _, text) = bench.run_text(&["dlq", "edit", &id], "").await;
        assert!(code == expected && text.contains(words), "{editor}: {text}");
        // The text of the operator is kept in a file.
        let kept = text.split("your edit is saved in ").nth(1).and_then(|rest| rest.split_once(';'));
        assert_eq!(kept.is_some(), words == "not a JSON object", "{text}");
        if let Some((path, _)) = kept {
            assert!(std::fs::read_to_string(path).unwrap().starts_with('['));
            std::fs::remove_file(path).unwrap();
        }
    }
    assert_eq!(shown(&bench, &id).await["body"]["userId"], "u7");
}

/// Bodies of any bytes and headers of any type are restored exactly once.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_restores_exported_dead_letters_exactly() {
    let bench = Bench::new().await;
    bench.worker().await.terminate().await;
    let mut inner = FieldTable::default();
    inner.insert("deep".into(), AMQPValue::ShortShortInt(-3));
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("number", AMQPValue::LongLongInt(5)),
        ("short", AMQPValue::ShortInt(7)),
        ("flag", AMQPValue::Boolean(true)),
        ("nothing", AMQPValue::Void),
        ("time", AMQPValue::Timestamp(1_700_000_000)),
        ("float", AMQPValue::Double(0.5)),
        ("table", AMQPValue::FieldTable(inner)),
        ("bytes", AMQPValue::ByteArray(ByteArray::from(vec![0, 255]))),
        ("binary", AMQPValue::LongString(vec![0, 159, 146].into())),
        ("text", AMQPValue::LongString("x".into())),
    ] {
        headers.insert(name.into(), value);
    }
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_message_id("m-1".into())
        .with_correlation_id("c-1".into())
        .with_content_type("application/json".into())
        .with_timestamp(1_700_000_000)
        .with_priority(3)
        .with_app_id("app".into());
    let worker = bench.worker().await;
    bench.publish_bytes(&[0, 159, 146, 150], properties.clone()).await;
    bench.publish_bytes("[\"ä\\n\"]".as_bytes(), properties).await;
    bench.publish(&[json!({"type": "identify", "traits": {}})]).await;
    worker.settled(3).await;
    worker.terminate().await;

    let exported = bench.output(&["dlq", "export"]).await;
    let before = take_all(&bench).await;
    assert_eq!(before.len(), 3);
    for (expected, file) in [
        ("imported 3, replaced 0, 0 already present\n", exported.clone()),
        ("imported 0, replaced 0, 3 already present\n", exported.clone()),
        (
            "imported 0, replaced 1, 2 already present\n",
            exported.replace("{\\\"traits\\\":{}", "{\\\"traits\\\":{\\\"a\\\":1}"),
        ),
        ("imported 0, replaced 1, 2 already present\n", exported.clone()),
    ] {
        let (code, text, words) = bench.run_text(&["dlq", "import", "-"], &file).await;
        assert_eq!((code, text.as_str()), (Some(0), expected), "{words}");
    }
    let mut after = take_all(&bench).await;
    after.sort_by_key(|(body, _)| before.iter().position(|(before, _)| before == body));
    assert_eq!(after, before);
}

/// All dead letters as they are in RabbitMQ, without delivery counts and the header that names what they replace.
async fn take_all(bench: &Bench) -> Vec<(Vec<u8>, BasicProperties)> {
    let mut all = Vec::new();
    while bench.depth(".dead").await > 0 {
        let (body, _, properties) = bench.take_dead_letter().await;
        let carried = properties.headers().iter().flat_map(FieldTable::inner);
        let mut kept = FieldTable::default();
        for (name, value) in carried.filter(|(name, _)| {
            !["x-delivery-count", "x-acquired-count", envelope::REPLACES].contains(&name.as_str())
        }) {
            kept.insert(name.clone(), value.clone());
        }
        all.push((body, properties.with_headers(kept)));
    }
    all
}

/// Several dead letters with one id, as a killed command or a concatenated file may leave them. None is lost.
#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_with_the_same_id_are_kept_apart() {
    let bench = Bench::new().await;
    bench.worker().await.terminate().await;
    let line = |body: &str| {
        json!({"properties": {}, "headers": {"x-close-sync-dead-letter-id": "x"}, "body": body}).to_string()
    };
    let import = async |bodies: &[&str]| {
        let lines: Vec<_> = bodies.iter().map(|body| line(body)).collect();
        bench.run_text(&["dlq", "import", "-"], &lines.join("\n")).await.1
    };
    let bodies = async || {
        let lines = bench.output(&["dlq", "export"]).await;
        let body =
            |line: &str| serde_json::from_str::<Value>(line).unwrap()["body"].as_str().unwrap().to_owned();
        let mut bodies: Vec<_> = lines.lines().map(body).collect();
        bodies.sort();
        bodies.join(" ")
    };
    assert_eq!(import(&["c0"]).await, "imported 1, replaced 0, 0 already present\n");
    // The old and the new one in one file.
    assert_eq!(import(&["c1", "c0"]).await, "imported 1, replaced 0, 1 already present\n");
    assert_eq!(bodies().await, "c0 c1");
    assert_eq!(import(&["c0", "c1", "c1"]).await, "imported 0, replaced 0, 3 already present\n");
    assert_eq!(bodies().await, "c0 c1");
    // As after an interrupted import: both are in the queue, and the file contains the new one.
    assert_eq!(import(&["c1"]).await, "imported 0, replaced 0, 1 already present\n");
    assert_eq!(bodies().await, "c1");
    assert_eq!(import(&["c2"]).await, "imported 0, replaced 1, 0 already present\n");
    assert_eq!(bodies().await, "c2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_one_invalid_line_imports_nothing() {
    let bench = Bench::new().await;
    bench.worker().await.terminate().await;
    let good = json!({"properties": {}, "headers": {}, "body": "{}"}).to_string();
    let long = "n".repeat(256);
    let long_header = json!({"properties": {}, "headers": {long.clone(): 1}, "body": "{}"}).to_string();
    let long_id = json!({"properties": {"message_id": long}, "headers": {}, "body": "{}"}).to_string();
    for (line, words) in [
        ("nonsense", "line 2: not a dead letter"),
        (long_header.as_str(), "line 2: a name in header `nnn"),
        (long_id.as_str(), "line 2: `properties.message_id`"),
        ("{\"properties\": {}, \"headers\": {}}", "either `body` or `body_base64`"),
        (
            "{\"properties\": {}, \"headers\": {}, \"body_base64\": \"*\"}",
            "`body_base64` is not valid base64",
        ),
        (
            "{\"properties\": {\"priority\": \"x\"}, \"headers\": {}, \"body\": \"\"}",
            "`properties` are not valid",
        ),
        (
            "{\"properties\": {}, \"headers\": {\"a\": {\"Odd\": 1}}, \"body\": \"\"}",
            "header `a` is not valid",
        ),
    ] {
        let (code, _, text) = bench.run_text(&["dlq", "import", "-"], &format!("{good}\n{line}\n")).await;
        assert!(code == Some(2) && text.contains(words) && text.contains("nothing was imported"), "{text}");
    }
    assert_eq!(bench.depth(".dead").await, 0);
}

/// A message that RabbitMQ dead-lettered has none of our headers. It can be exported, imported and replayed.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_dead_lettered_by_the_broker_can_be_restored_and_replayed() {
    let bench = Bench::new().await;
    bench.worker().await.terminate().await;
    let channel = bench.channel().await;
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let (exchange, event) = (bench.exchange.clone(), identify("u1", json!({})).to_string());
    let properties = BasicProperties::default().with_message_id("m-1".into());
    let publish = channel.basic_publish(exchange.into(), "k".into(), options, event.as_bytes(), properties);
    publish.await.unwrap().await.unwrap();
    let (queue, options) = (bench.queue.clone().into(), BasicConsumeOptions::default());
    let mut deliveries =
        channel.basic_consume(queue, "".into(), options, FieldTable::default()).await.unwrap();
    let delivery = deliveries.next().await.unwrap().unwrap();
    delivery.reject(BasicRejectOptions { requeue: false }).await.unwrap();
    bench.depth_becomes(".dead", 1).await;
    channel.basic_cancel(deliveries.tag(), BasicCancelOptions::default()).await.unwrap();

    let listed = bench.output(&["dlq", "list"]).await;
    assert!(
        listed.contains("broker:rejected:-") && listed.contains("RabbitMQ dead-lettered them"),
        "{listed}"
    );
    let exported = bench.output(&["dlq", "export", "--fingerprint", "broker"]).await;
    let id = bench.dead_ids().await.remove(0);
    bench.output(&["dlq", "discard", "--id", &id, "--yes"]).await;
    bench.run_text(&["dlq", "import", "-"], &exported).await;
    let restored = shown(&bench, &id).await;
    assert_eq!(
        (&restored["fingerprint"], &restored["message_id"]),
        (&json!("broker:rejected:-"), &json!("m-1"))
    );
    let worker = bench.worker().await;
    assert_eq!(bench.output(&["dlq", "replay", "--all"]).await, "replayed 1; 1 created\n");
    worker.terminate().await;
}

/// Each filter, with the ids that it selects.
#[tokio::test(flavor = "multi_thread")]
async fn filters_select_dead_letters() {
    let bench = Bench::new().await;
    bench.worker().await.terminate().await;
    let line = |id: &str, hour: u32, fingerprint: &str, body: Value| {
        json!({
            "properties": {"message_id": format!("m-{id}")},
            "headers": {
                "x-close-sync-dead-letter-id": id, "x-close-sync-reason": fingerprint.split(':').next(),
                "x-close-sync-fingerprint": fingerprint,
                "x-close-sync-failed-at": format!("2026-01-01T{hour:02}:00:00Z"),
            },
            "body": body.to_string(),
        })
        .to_string()
    };
    let about = |user: Value, company: &str, email: &str| json!({"userId": user, "traits": {"email": email, "company": {"id": company}}});
    let lines = [
        line("a", 1, "rejected:write:phones", about(json!("u1"), "c1", "a@x.example")),
        line("b", 2, "rejected:write:name", about(json!(2), "c1", "B@x.example")),
        line("c", 3, "exhausted:write:-", about(json!("u3"), "c3", "c@x.example")),
        line("d", 4, "malformed:decode:-", json!("no event")),
    ];
    bench.run_text(&["dlq", "import", "-"], &lines.join("\n")).await;
    for (arguments, selected) in [
        (&["--reason", "rejected"][..], "ab"),
        (&["--reason", "rejected", "--reason", "malformed"], "abd"),
        (&["--fingerprint", "rejected:write"], "ab"),
        (&["--fingerprint", "rejected:write:name", "--fingerprint", "malformed"], "bd"),
        (&["--fingerprint", "rejected:wri"], ""),
        (&["--id", "a", "--id", "d"], "ad"),
        (&["--message-id", "m-a", "--message-id", "m-c"], "ac"),
        (&["--user-id", "2"], "b"),
        (&["--company-id", "c1"], "ab"),
        (&["--company-id", "c1", "--user-id", "u1"], "a"),
        (&["--email", " b@X.example"], "b"),
        (&["--since", "2026-01-01T02:00:00Z", "--until", "2026-01-01T03:00:00Z"], "bc"),
        (&["--since", "2026-01-01 02:00", "--until", "2026-01-01T03:00"], "bc"),
        (&["--until", "2026-01-01"], ""),
        (&["--since", "1h"], ""),
        (&["--until", "1 day"], "abcd"),
        (&["--limit", "2"], "ab"),
    ] {
        let listed = bench.output(&[&["dlq", "list", "--json"], arguments].concat()).await;
        let listed: Value = serde_json::from_str(&listed).unwrap();
        let ids: String = listed["dead_letters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|letter| letter["id"].as_str().unwrap())
            .collect();
        assert_eq!((ids.as_str(), &listed["found"]), (selected, &json!(4)), "{arguments:?}");
    }
    assert_eq!(shown(&bench, "m-b").await["id"], "b");
    let (_, _, words) =
        bench.run_text(&["dlq", "edit", "m-b", "--patch", r#"{"traits": {"title": "Dr"}}"#], "").await;
    assert!(words.contains("dlq replay --id=b`"), "{words}");
    let (code, _, words) = bench.run_text(&["dlq", "list", "--since", "yesterday"], "").await;
    assert!(code == Some(2) && words.contains("expected a time in UTC"), "{words}");
    let groups: Value =
        serde_json::from_str(&bench.output(&["dlq", "list", "--json", "--company-id", "c1"]).await).unwrap();
    assert_eq!(groups["groups"].as_array().unwrap().len(), 2);
    assert_eq!(groups["groups"][0]["first"], groups["groups"][0]["last"]);
}
