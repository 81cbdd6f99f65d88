//! Edits, discards and imports that are killed or run at the same time: nothing is lost or duplicated.

use std::io::Write;

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use serde_json::{Value, json};

use crate::support::dead_letters::{ids, line, lines};
use crate::support::{Bench, Proxy, identify, people};

/// The start of `basic.ack`.
const ACK: [u8; 4] = [0, 60, 0, 80];

/// The edit is killed after the copy is in the queue, and before the old dead letter is deleted.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_edit_is_completed_by_a_replay_another_edit_or_a_discard() {
    let title = r#"{"traits": {"title": "Dr"}}"#;
    let discard = ["dlq", "discard", "--id", "dead-1", "--yes"];
    for next in [
        &["dlq", "replay", "--all"][..],
        &["dlq", "edit", "dead-1", "--patch", title],
        &["dlq", "list"],
        &discard,
    ] {
        let bench = Bench::dead_people(4).await;
        let before = bench.output(&["dlq", "export"]).await;
        let direct = bench.amqp_url.clone();
        let proxy = Proxy::start(&direct).await;
        let bench = bench.set("AMQP_URL", &proxy.url);
        proxy.set_trap(&ACK);
        let edit = bench.starting(&["dlq", "edit", "dead-1", "--patch", r#"{"userId": "fixed"}"#]);
        proxy.sprung().await;
        assert_eq!(bench.depth(".dead").await, 1, "only the copy; the edit holds the others");
        edit.kill().await;
        proxy.cut();
        bench.depth_becomes(".dead", 5).await;
        let bench = bench.set("AMQP_URL", &direct);
        let worker = bench.worker().await;
        let (code, words) = bench.run_combined(next, "").await;
        assert_eq!(code, Some(0), "{words}");
        match next[1] {
            "edit" => assert_eq!(bench.dead_ids().await, ["dead-0", "dead-2", "dead-3", "dead-1"]),
            "list" => {
                // A list changes nothing. An import of the old file replaces the copy.
                assert_eq!(bench.dead_ids().await, ["dead-0", "dead-1", "dead-2", "dead-3", "dead-1"]);
                let (_, words) = bench.run_combined(&["dlq", "import", "-"], &before).await;
                assert_eq!(words, "imported 0, replaced 0, 4 already present\n");
                assert_eq!(bench.output(&["dlq", "export"]).await, before);
            }
            _ => {}
        }
        bench.run_combined(&["dlq", "replay", "--all"], "").await;
        let left = if next[1] == "discard" { 3 } else { 4 };
        worker.settled(left).await;
        bench.assert_each_once(left);
        let contacts = bench.simulator.contacts();
        let users: Vec<_> = contacts.iter().map(|contact| &contact["custom.cf_contactuserid"]).collect();
        let (one, other) = if next[1] == "list" { ("u1", "fixed") } else { ("fixed", "u1") };
        assert_eq!(users.contains(&&json!(one)), next[1] != "discard", "{users:?}");
        assert!(!users.contains(&&json!(other)), "{users:?}");
        assert_eq!(bench.depth(".dead").await, 0);
        worker.terminate().await;
    }
}

/// The imported dead letters are replayed, not those that they replace.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_killed_import_only_the_imported_dead_letters_are_replayed() {
    let bench = Bench::dead_people(4).await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let edited = bench.output(&["dlq", "export"]).await.replace(r#"\"userId\":\"u"#, r#"\"userId\":\"new-u"#);
    file.write_all(edited.as_bytes()).unwrap();
    let direct = bench.amqp_url.clone();
    let proxy = Proxy::start(&direct).await;
    let bench = bench.set("AMQP_URL", &proxy.url);
    proxy.set_trap(&ACK);
    let import = bench.starting(&["dlq", "import", file.path().to_str().unwrap()]);
    proxy.sprung().await;
    import.kill().await;
    proxy.cut();
    bench.depth_becomes(".dead", 8).await;
    let bench = bench.set("AMQP_URL", &direct);
    let worker = bench.worker().await;
    let (_, words) = bench.run_combined(&["dlq", "replay", "--all"], "").await;
    assert!(words.contains("replayed 4; 4 created"), "{words}");
    let contacts = bench.simulator.contacts();
    let is_new = |contact: &Value| contact["custom.cf_contactuserid"].as_str().unwrap().starts_with("new-");
    assert!(contacts.iter().all(is_new), "{contacts:#?}");
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// A file may contain different dead letters with the same id. They are kept apart.
#[tokio::test(flavor = "multi_thread")]
async fn an_edit_does_not_replace_another_dead_letter_with_the_same_id() {
    let bench = Bench::dead_people(0).await;
    let lines = [line("same", 1, &identify("a", json!({}))), line("same", 2, &identify("b", json!({})))];
    bench.import(&lines.join("\n")).await;
    let patch = r#"{"traits": {"title": "Dr"}}"#;
    let (_, words) =
        bench.run_combined(&["dlq", "edit", "--id", "same", "--limit", "1", "--patch", patch], "").await;
    assert_eq!(words, "edited 1 of 1 dead letter\n");
    let worker = bench.worker().await;
    let (_, words) = bench.run_combined(&["dlq", "replay", "--all"], "").await;
    assert!(words.contains("replayed 2; 2 created"), "{words}");
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_discard_deletes_only_what_was_selected() {
    let bench = Bench::dead_people(2000).await;
    let old = ["dlq", "discard", "--until", "2023-11-14T22:29:59Z", "--yes"];
    for _ in 0..3 {
        let discard = bench.starting(&old);
        discard.until("discarding", async |_| bench.depth(".dead").await < 1000).await;
        discard.kill().await;
    }
    bench.run_text(&old, "").await;
    assert!(bench.dead_ids().await == ids(2000)[1000..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_import_can_be_repeated() {
    let bench = Bench::dead_people(0).await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(lines(&people(3000)).as_bytes()).unwrap();
    let import = ["dlq", "import", file.path().to_str().unwrap()];
    let mut there = 0;
    for attempt in 0..3 {
        let importing = bench.starting(&import);
        // It has put some there; the next ones have in hand what is there, or have put back more.
        importing.until("importing", async |_| bench.depth(".dead").await != there).await;
        importing.kill().await;
        bench.output(&["dlq", "list"]).await;
        there = bench.depth(".dead").await;
        assert!(there > 0, "{attempt}");
        if there == 3000 {
            break;
        }
    }
    let rest = 3000 - there;
    let expected = format!("imported {rest}, replaced 0, {there} already present\n");
    assert_eq!(bench.output(&import).await, expected);
    let mut restored = bench.dead_ids().await;
    restored.sort_by_key(|id| id["dead-".len()..].parse::<usize>().unwrap());
    assert!(restored == ids(3000));
}

/// The same file twice at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn two_imports_take_turns() {
    let bench = Bench::dead_people(1).await;
    let all = lines(&people(500));
    let import = ["dlq", "import", "-"];
    let ((_, one, _), (_, two, _)) =
        tokio::join!(bench.run_text(&import, &all), bench.run_text(&import, &all));
    let mut both = [one, two];
    both.sort();
    assert_eq!(
        both,
        ["imported 0, replaced 0, 500 already present\n", "imported 499, replaced 0, 1 already present\n"]
    );
    assert_eq!(bench.depth(".dead").await, 500);
}

/// While a replay waits for the first message, the other dead letters can be edited and discarded. An import is refused,
/// because it would restore what was replayed.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_continues_with_the_remaining_dead_letters() {
    let bench = Bench::dead_people(20).await;
    let exported = bench.output(&["dlq", "export"]).await;
    let replay = bench.starting(&["dlq", "replay", "--all"]);
    replay.until("sent", async |_| bench.depth(".dead").await == 19).await;
    let (code, words) = bench.run_combined(&["dlq", "import", "-"], &exported).await;
    assert!(code == Some(69) && words.contains("a replay is under way"), "{words}");
    let (code, words) = bench.run_combined(&["dlq", "discard", "--id", "dead-18", "--yes"], "").await;
    assert!(code == Some(0) && words.contains("discarded 1, 18 remain"), "{words}");
    let (code, words) = bench
        .run_combined(&["dlq", "edit", "--id", "dead-19", "--patch", r#"{"userId": "fixed"}"#], "")
        .await;
    assert!(code == Some(0) && words.contains("a replay is under way"), "{words}");
    let (code, words) = bench.run_combined(&["dlq", "edit", "dead-0", "--patch", "{}"], "").await;
    assert!(code == Some(2) && words.contains("its messages are not included"), "{words}");
    let (code, words) = bench.run_combined(&["dlq", "export"], "").await;
    assert!(code == Some(1) && words.contains("a replay is under way"), "the export is incomplete: {words}");
    // Only now a worker processes the first message.
    let worker = bench.worker().await;
    assert!(replay.ended().await.success(), "{}", replay.log());
    bench.assert_each_once(19);
    let contacts = bench.simulator.contacts();
    assert!(contacts.iter().any(|contact| contact["custom.cf_contactuserid"] == "fixed"));
    assert_eq!((bench.depth("").await, bench.depth(".dead").await), (0, 0));
    worker.terminate().await;
}

/// A delayed message holds back the others, but other operators see them.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_cannot_be_sent_soon_returns_to_the_queue() {
    let bench = Bench::dead_people(4).await.set("RETRY_IN_PLACE", "0s").set("RETRY_DELAYS", "[\"40s\"]");
    let unavailable = Effect::Status { code: 500, body: FaultBody::default(), when: When::BeforeCommit };
    let once = Fault::new(unavailable).on("POST", "/lead/").containing("c1").times(1);
    bench.simulator.fault(once);
    let worker = bench.worker().await;
    let replay = bench.starting(&["dlq", "replay", "--all", "--at-once", "1"]);
    worker.until("delayed", async |worker| worker.metrics().await.outcome("delayed") == 1).await;
    assert_eq!(bench.depth(".dead").await, 0, "the replay holds them");
    bench.depth_becomes(".dead", 2).await;
    assert_eq!(worker.metrics().await.outcomes(), [("created", 1), ("delayed", 1)].into());
    assert!(replay.ended().await.success(), "{}", replay.log());
    bench.assert_each_once(4);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// The order in the queue does not matter.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_takes_the_oldest() {
    // As in a container without a writable temporary directory.
    let bench = Bench::dead_people(0).await.set("TMPDIR", "/nowhere");
    let seconds = [5, 3, 9, 1, 7];
    let all: Vec<_> = seconds.iter().map(|n| line(&format!("dead-{n}"), *n, &json!({}))).collect();
    // Its time of failure is unknown.
    let unknown =
        json!({"properties": {}, "headers": {"x-close-sync-dead-letter-id": "unknown"}, "body": ""});
    bench.import(&format!("{}\n{unknown}", all.join("\n"))).await;
    let exported = bench.output(&["dlq", "export", "--limit", "3"]).await;
    let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].clone();
    let first: Vec<_> = exported.lines().map(id).collect();
    assert_eq!(first, ["dead-3", "dead-1", "unknown"]);
    let (_, words) = bench.run_combined(&["dlq", "discard", "--all", "--limit", "2", "--yes"], "").await;
    assert_eq!(words, "discarded 2, 4 remain\n");
    assert_eq!(bench.dead_ids().await, ["dead-5", "dead-3", "dead-9", "dead-7"]);
    let (_, words) = bench.run_combined(&["dlq", "replay", "--all", "--limit", "0", "--dry-run"], "").await;
    assert!(words.contains("no dead letter matches"), "{words}");
}

/// The original body is kept in a header, next to large headers of the producer.
#[tokio::test(flavor = "multi_thread")]
async fn the_largest_body_can_be_edited_and_no_larger() {
    let bench = Bench::dead_people(0).await;
    for (id, size) in [("fits", 32 << 10), ("large", (32 << 10) + 1)] {
        let empty = identify("u1", json!({"name": ""})).to_string().len();
        let event = identify("u1", json!({"name": "x".repeat(size - empty)}));
        let mut letter: Value = serde_json::from_str(&line(id, 0, &event)).unwrap();
        letter["headers"]["x-trail"] = "t".repeat(60_000).into();
        bench.import(&letter.to_string()).await;
    }
    let patch = r#"{"traits": {"name": "Ada"}}"#;
    bench.output(&["dlq", "edit", "fits", "--patch", patch]).await;
    let shown: Value =
        serde_json::from_str(&bench.output(&["dlq", "show", "fits", "--json", "--no-plan"]).await).unwrap();
    assert_eq!(shown["body"]["traits"]["name"], "Ada");
    assert!(shown["original"]["traits"]["name"].as_str().unwrap().len() > 32_000);
    assert_eq!(shown["headers"]["x-trail"].as_str().unwrap().len(), 60_000);
    let (code, words) = bench.run_combined(&["dlq", "edit", "large", "--patch", patch], "").await;
    assert!(code == Some(2) && words.contains("dlq export --id=large"), "{words}");
    // The remedy works.
    let exported = bench.output(&["dlq", "export", "--id", "large"]).await;
    let mut letter: Value = serde_json::from_str(&exported).unwrap();
    letter["body"] = identify("u1", json!({"name": "Ada"})).to_string().into();
    let text = bench.run_text(&["dlq", "import", "-"], &letter.to_string()).await.1;
    assert_eq!(text, "imported 0, replaced 1, 0 already present\n");
}

/// All originals are kept. If one of them cannot be edited, none is.
#[tokio::test(flavor = "multi_thread")]
async fn one_patch_edits_all_selected_or_none() {
    let ids = [json!(1_234_567_890_123_456_789_u64), json!("u2"), json!(9_007_199_254_740_993_u64)];
    let event =
        |id: &Value| json!({"type": "identify", "userId": id, "traits": {"phone": "x", "name": "Ada"}});
    let events: Vec<_> = ids.iter().map(event).collect();
    let bench = Bench::dead(&events).await;
    bench.import(&line("list", 9, &json!(["no object"]))).await;
    let edit = ["dlq", "edit", "--reason", "rejected", "--patch", r#"{"traits": {"phone": null}}"#];
    let (code, words) = bench.run_combined(&edit, "").await;
    assert!(code == Some(0) && words == "edited 4 of 4 dead letters\n", "{words}");
    let (code, words) =
        bench.run_combined(&["dlq", "edit", "--reason", "rejected", "--patch", "[]"], "").await;
    assert!(code == Some(0) && words == "edited 0 of 4 dead letters\n", "{words}");
    let letters = bench.dead_letters().await;
    for (letter, id) in letters.iter().zip(&ids) {
        let body: Value = serde_json::from_str(letter["body"].as_str().unwrap()).unwrap();
        assert_eq!(body, json!({"type": "identify", "userId": id, "traits": {"name": "Ada"}}));
        let original = letter["headers"]["x-close-sync-original"].as_str().unwrap();
        assert_eq!(serde_json::from_str::<Value>(original).unwrap(), event(id));
    }
    bench.import(&line("text", 10, &json!("text"))).await;
    let before = bench.dead_letters().await;
    let remove = r#"[{"op": "remove", "path": "/traits/name"}]"#;
    for (patch, error) in [(remove, "the patch does not apply"), ("7", "the new body is not a JSON object")] {
        let (code, words) =
            bench.run_combined(&["dlq", "edit", "--since", "2000-01-01", "--patch", patch], "").await;
        assert!(code == Some(2) && words.contains(error) && words.contains("nothing was changed"), "{words}");
        assert_eq!(bench.dead_letters().await, before);
    }
    for wrong in [&["dlq", "edit", "--reason", "rejected"][..], &["dlq", "edit", "--patch", "{}"]] {
        assert_eq!(bench.run_combined(wrong, "").await.0, Some(2), "{wrong:?}");
    }
}
