//! Compressed bodies: decoded by the worker and by everything that reads dead letters, stored byte for byte.

use std::io::Write;

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use flate2::Compression;
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
use lapin::BasicProperties;
use serde_json::{Value, json};

use crate::support::{Bench, identify};

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn zlib(text: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn raw_deflate(text: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn encoded(encoding: &str) -> BasicProperties {
    BasicProperties::default().with_content_encoding(encoding.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_body_is_decoded_within_the_size_limit() {
    let bench = Bench::new().await.set("WORKER_MAX_MESSAGE_BYTES", "4096");
    let event = |user: &str| identify(user, json!({"name": user})).to_string().into_bytes();
    let good = [
        (gzip(&event("zipped")), "gzip"),
        (zlib(&event("deflated")), "Deflate"),
        (raw_deflate(&event("raw")), "deflate"),
        (event("plain"), "utf-8"),
        (event("mislabelled"), "gzip"),
    ];
    let zipped = gzip(&event("bad"));
    let bomb = gzip(&vec![b' '; 1 << 20]);
    let bad = [
        (zipped.clone(), "br", "malformed:decode:unsupported_encoding"),
        (zipped[..zipped.len() - 2].to_vec(), "gzip", "malformed:decode:corrupt_encoding"),
        (bomb, "gzip", "malformed:decode:too_large"),
        (zipped, "", "malformed:decode:not_json"),
    ];
    let worker = bench.worker().await;
    for (body, encoding) in &good {
        bench.publish_bytes(body, encoded(encoding)).await;
    }
    for (body, encoding, _) in &bad {
        bench.publish_bytes(body, encoded(encoding)).await;
    }
    let metrics = worker.settled(good.len() + bad.len()).await;
    assert_eq!(metrics.outcomes(), [("created", 5), ("dead", 4)].into());
    let mut taken = Vec::new();
    for _ in &bad {
        taken.push(bench.take_dead_letter().await);
    }
    for (body, encoding, fingerprint) in bad {
        let (_, headers, properties) = taken
            .iter()
            .find(|(taken, headers, _)| *taken == body && headers["x-close-sync-fingerprint"] == fingerprint)
            .expect("the body, byte for byte");
        assert_eq!(properties.content_encoding().as_ref().map_or("", |text| text.as_str()), encoding);
        if fingerprint.ends_with("unsupported_encoding") {
            let error = &headers["x-close-sync-error"];
            assert!(error.contains("`gzip`") && error.contains("`deflate`"), "{error}");
        }
    }
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_dead_letter_is_shown_edited_exported_and_replayed() {
    let bench = Bench::new().await;
    let refusal = json!({"errors": [], "field-errors": {"custom.cf_leadcompanyid": "Not a valid choice."}});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/").containing("refused"));
    let event = identify("u1", json!({"name": "Ines", "company": {"id": "refused"}}));
    let sent = gzip(event.to_string().as_bytes());
    let worker = bench.worker().await;
    bench.publish_bytes(&sent, encoded("gzip")).await;
    worker.settled(1).await;

    let letter = bench.dead_letters().await.remove(0);
    let id = letter["id"].as_str().unwrap().to_owned();
    assert_eq!((&letter["body"], &letter["properties"]["content_encoding"]), (&Value::Null, &json!("gzip")));
    assert_eq!(serde_json::from_str::<Value>(letter["decoded"].as_str().unwrap()).unwrap(), event);
    let show = async || -> Value {
        serde_json::from_str(&bench.output(&["dlq", "show", &id, "--json"]).await).unwrap()
    };
    let shown = show().await;
    assert_eq!((&shown["body"], &shown["plan"]["outcome"]), (&event, &json!("created")));
    let of_user = bench.output(&["dlq", "list", "--user-id", "u1", "--json"]).await;
    assert!(of_user.contains(&id), "{of_user}");

    // The export restores the message byte for byte.
    let exported = bench.output(&["dlq", "export"]).await;
    bench.output(&["dlq", "discard", "--id", &id, "--yes"]).await;
    bench.import(&exported).await;
    assert_eq!(bench.output(&["dlq", "export"]).await, exported);

    bench.output(&["dlq", "edit", &id, "--patch", r#"{"traits": {"company": {"id": "c1"}}}"#]).await;
    let edited = show().await;
    assert_eq!((&edited["body"]["traits"]["company"]["id"], &edited["original"]), (&json!("c1"), &event));
    bench.output(&["dlq", "replay", "--id", &id]).await;
    worker.settled(2).await;
    assert_eq!(
        (bench.the_lead()["custom.cf_leadcompanyid"].clone(), bench.depth(".dead").await),
        (json!("c1"), 0)
    );
    worker.terminate().await;
}
