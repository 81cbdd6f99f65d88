//! The pages about dead letters.

use std::time::Duration;

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use reqwest::StatusCode;
use reqwest::header::LOCATION;
use serde_json::json;

use super::{Browser, Page, TOKEN, with_token, without_token};
use crate::support::dead_letters::{line, lines};
use crate::support::{identify, people};

/// The first link that contains a text.
#[track_caller]
fn link(page: &Page, part: &str) -> String {
    let links = page.text.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next());
    let found = links.map(|link| link.replace("&amp;", "&")).find(|link| link.contains(part));
    found.unwrap_or_else(|| panic!("no {part} in {page:#?}"))
}

/// Waits until the replay has ended, and returns its page.
async fn result_page(browser: &Browser) -> Page {
    let start = std::time::Instant::now();
    loop {
        let page = browser.get("/page/-/dead/progress?still=1").await;
        if page.text.contains("Back to the dead letters") {
            return page;
        }
        assert!(start.elapsed() < crate::support::TIMEOUT, "{page:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_opens_a_group_and_replays_one_message() {
    let bench = with_token().await;
    let worker = bench.worker().await;
    let browser = Browser::signed_in(&worker).await;
    browser.get("/page/-/dead").await.assert_has(&["There are no dead letters"]);
    bench.refuse("");
    bench.publish(&[identify("u1", json!({"name": "Ada Lovelace", "company": {"id": "c1"}}))]).await;
    bench.publish(&[json!({"type": "identify"})]).await;
    worker.settled(2).await;
    // The result of a scan is cached for some seconds.
    worker.until("listed", async |_| browser.get("/page/-/dead").await.text.contains("2 dead letters")).await;
    let list = browser.get("/page/-/dead").await;
    list.assert_has(&[
        "rejected:write:name",
        "no_identity:map:-",
        "What to do",
        "fix the field that Close named",
    ]);
    let group = browser.get(&link(&list, "rejected")).await;
    group.assert_has(&["Close rejected the request (400)", r#"<strong class="big">1</strong>"#]);
    let address = link(&group, "message?id=");
    let message = browser.get(&address).await;
    message.assert_has(&[
        "&quot;userId&quot;: &quot;•••&quot;",
        "steps: create lead",
        "Routing key",
        "users",
    ]);
    message.assert_lacks(&["Lovelace", "u1", "What a replay would do now"]);

    // A dry run, and then the personal data.
    let id = address.split_once("id=").unwrap().1.to_owned();
    let form = "/page/-/dead/message";
    let planned = browser.submit(&address, form, &[("id", &id), ("ask", "plan")]).await;
    planned.assert_has(&["What a replay would do now", "create lead", "nothing was written"]);
    planned.assert_lacks(&["Lovelace"]);
    let whole = browser.submit(&address, form, &[("id", &id), ("ask", "show")]).await;
    whole.assert_has(&["Ada Lovelace", "&quot;userId&quot;: &quot;u1&quot;"]);

    // The message fails again. Then the cause is fixed.
    let path = link(&message, "dead/replay?id=");
    let ask = browser.get(&path).await;
    ask.assert_has(&["<h1>Replay?", "1 message"]);
    assert_eq!(bench.depth(".dead").await, 2, "the confirmation page changes nothing");
    let go = [("id", id.as_str()), ("count", "1")];
    let started = browser.submit(&path, "/page/-/dead/replay", &go).await;
    assert_eq!((started.status, started.header(LOCATION)), (StatusCode::SEE_OTHER, "/page/-/dead/progress"));
    let result = result_page(&browser).await;
    result.assert_has(&["The message failed again.", "started by Ada"]);
    bench.simulator.clear_faults();
    let again = browser.get(&link(&result, "message?id=")).await;
    again.assert_has(&["<dt>Replays</dt><dd>1</dd>"]);
    let path = link(&again, "dead/replay?id=");
    let id = path.split_once("id=").unwrap().1;
    browser.submit(&path, "/page/-/dead/replay", &[("id", id), ("count", "1")]).await;
    result_page(&browser).await.assert_has(&["Done: none failed again", "created"]);
    assert_eq!(bench.the_lead()["contacts"][0]["name"], "Ada Lovelace");
    browser.get("/page/-/dead").await.assert_lacks(&["rejected:write:name"]);
    assert_eq!(browser.get(&path).await.status, StatusCode::NOT_FOUND, "deleted");
    let audited: Vec<_> =
        worker.audited().into_iter().map(|[what, who, _]| format!("{what}, {who}")).collect();
    let show = "personal data of a dead letter, Ada";
    assert_eq!(audited, ["sign-in, Ada", "plan of a dead letter, Ada", show, "replay, Ada", "replay, Ada"]);
    assert!(!worker.log().contains("Lovelace"));
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_replay_of_a_group_can_be_stopped_and_continued() {
    let bench = without_token().await;
    let worker = bench.worker().await;
    bench.import(&lines(&people(120))).await;
    let browser = Browser::of(&worker).await;
    let group = browser.get(&link(&browser.get("/page/-/dead").await, "dead/group")).await;
    group.assert_has(&[r#"<strong class="big">120</strong>"#, "Page 1 of 3", "<code>dead-0</code>"]);
    group.assert_lacks(&["<code>dead-50</code>"]);
    let named = browser.get("/page/-/dead/message?id=+m-dead-70+").await;
    named.assert_has(&["<code>dead-70</code>", "<code>m-dead-70</code>"]);
    let last = browser.get(&link(&group, "dead/group?").replace("page=1", "page=9")).await;
    last.assert_has(&["Page 3 of 3", "<code>dead-119</code>"]);
    // Slow enough to be stopped.
    bench.slow(Duration::from_secs(4));
    let go = [("group", "rejected:write:name"), ("count", "120")];
    let ask = link(&group, "dead/replay");
    browser.submit(&ask, "/page/-/dead/replay", &go).await;
    let second = browser.submit(&ask, "/page/-/dead/replay", &go).await;
    assert_eq!(second.status, StatusCode::CONFLICT);
    browser
        .get("/page/-/dead/progress")
        .await
        .assert_has(&["http-equiv=\"refresh\" content=\"2\"", "Stop</button>"]);
    browser.get("/page/-/dead/progress?still=1").await.assert_lacks(&["http-equiv=\"refresh\""]);
    worker.until("replaying", async |_| !bench.simulator.leads().is_empty()).await;
    browser.get("/page/-/dead").await.assert_has(&["is running"]);
    browser.submit("/page/-/dead/progress", "/page/-/dead/stop", &[]).await;
    let result = result_page(&browser).await;
    result.assert_has(&[
        "Stopped; run the same replay again to continue.",
        "were not sent and are still dead letters",
    ]);
    bench.simulator.clear_faults();
    browser.submit(&ask, "/page/-/dead/replay", &go).await;
    result_page(&browser).await.assert_has(&["Done: none failed again"]);
    worker.until("complete", async |_| bench.simulator.leads().len() == 120).await;
    bench.depth_becomes(".dead", 0).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_of_close_is_shown_on_request() {
    let bench = without_token().await;
    let worker = bench.worker().await;
    bench.import(&lines(&people(1))).await;
    let refusal = json!({"errors": ["<b>jane@example.test</b> has no quota left"]});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/"));
    let browser = Browser::of(&worker).await;
    let (ask, to) = ("/page/-/dead/replay?id=dead-0", "/page/-/dead/progress");
    browser.submit(ask, "/page/-/dead/replay", &[("id", "dead-0")]).await;
    let result = result_page(&browser).await;
    result.assert_has(&["The message failed again.", "Show Close's answer"]);
    result.assert_lacks(&["jane"]);
    assert_eq!(browser.post(to, &[], &[]).await.status, StatusCode::FORBIDDEN);
    let shown = browser.submit(to, to, &[]).await;
    shown.assert_has(&["&lt;b&gt;jane@example.test&lt;/b&gt; has no quota left"]);
    assert_eq!(worker.audited().last().unwrap(), &["what Close said", "local", "dead-0"]);
    assert!(!worker.log().contains("jane"));
    worker.terminate().await;
}

/// A replay that was started on the page ends with the worker, which logs the progress.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_ends_when_the_worker_stops() {
    let bench = without_token().await;
    let worker = bench.worker().await;
    bench.import(&lines(&people(50))).await;
    bench.slow(Duration::from_secs(2));
    let browser = Browser::of(&worker).await;
    let ask = "/page/-/dead/replay?group=rejected%3Awrite%3Aname";
    browser.submit(ask, "/page/-/dead/replay", &[("group", "rejected:write:name")]).await;
    worker.until("replaying", async |_| !bench.simulator.leads().is_empty()).await;
    worker.terminate().await;
    assert_eq!(worker.events("replay_ended"), 1, "{}", worker.log());
    let (left, waiting) = (bench.depth(".dead").await, bench.depth("").await);
    assert!(left > 0, "{left}");
    let done = bench.simulator.leads().len();
    assert!(done + usize::try_from(left + waiting).unwrap() >= 50, "{done} {left} {waiting}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_confirmed_dead_letters_are_discarded() {
    let bench = without_token().await;
    let worker = bench.worker().await;
    bench.import(&lines(&people(5))).await;
    let browser = Browser::of(&worker).await;
    let ask = "/page/-/dead/discard?group=rejected%3Awrite%3Aname";
    browser.get(ask).await.assert_has(&["<h1>Discard?", "5 messages", r#"name="count" value="5""#]);
    let few = [("group", "rejected:write:name"), ("count", "3")];
    // Neither a POST without CSRF token nor a link discards anything.
    let to = "/page/-/dead/discard";
    assert_eq!(browser.post(to, &few, &[]).await.status, StatusCode::FORBIDDEN);
    assert_eq!(
        browser.get(&format!("{to}?group=rejected%3Awrite%3Aname&count=5")).await.status,
        StatusCode::OK
    );
    bench.depth_becomes(".dead", 5).await;
    // At most `count`, and none that failed after `until`.
    let until = browser.get(ask).await.text;
    let (_, until) = until.split_once(r#"name="until" value=""#).unwrap();
    let until = until.split('"').next().unwrap();
    bench.import(&line("new", 9, &json!({}))).await;
    let few = [few[0], few[1], ("until", until)];
    let done = browser.submit(ask, to, &few).await;
    assert_eq!((done.status, done.header(LOCATION)), (StatusCode::SEE_OTHER, "/page/-/dead?discarded=3"));
    browser
        .get("/page/-/dead?discarded=3")
        .await
        .assert_has(&["3 dead letters were discarded", "3 dead letters, "]);
    assert_eq!(bench.dead_ids().await, ["dead-3", "dead-4", "new"]);
    assert_eq!(worker.audited().last().unwrap(), &["discarded", "local", "dead-0 dead-1 dead-2"]);
    let all = [few[0], ("count", "5"), few[2]];
    assert!(browser.submit(ask, to, &all).await.header(LOCATION).ends_with("discarded=2"));
    assert_eq!(bench.dead_ids().await, ["new"]);
    for nonsense in [&[("group", "a"), ("id", "b")][..], &[("count", "3")]] {
        assert_eq!(browser.submit(ask, to, nonsense).await.status, StatusCode::BAD_REQUEST);
    }
    // The message id of the producer works, too. The form contains the id of the dead letter.
    let form = browser.get("/page/-/dead/discard?id=m-new").await;
    form.assert_has(&[r#"name="id" value="new""#]);
    browser.submit(ask, to, &[("id", "new"), ("count", "1")]).await;
    bench.depth_becomes(".dead", 0).await;
    assert_eq!(worker.audited().last().unwrap(), &["discarded", "local", "new"]);
    worker.terminate().await;
}

/// Ids, names and values of producers are escaped in text and links.
#[tokio::test(flavor = "multi_thread")]
async fn the_content_of_messages_is_escaped() {
    let bench = without_token().await;
    let worker = bench.worker().await;
    let evil = "\"><script>alert(1)</script>";
    let ids = [
        evil,
        "../../../metrics",
        "a/b?c=d&e=f#g",
        "two\r\nset-cookie: a=b",
        "%2e%2e%00",
        "'onload='x",
        "</textarea>",
        "{{7*7}}",
        "\u{202e}txt.exe",
    ];
    let event =
        |id: &str| identify(id, json!({"name": evil, evil: evil, "company": {"id": evil, "name": evil}}));
    let lines: Vec<_> = ids.iter().zip(0..).map(|(id, n)| line(id, n, &event(id))).collect();
    bench.import(&lines.join("\n")).await;
    let odd = "<script>alert(2)</script>";
    let strange = json!({
        "properties": {"message_id": odd, "content_type": evil},
        "headers": {"x-close-sync-dead-letter-id": odd, "x-close-sync-fingerprint": evil, "x-close-sync-error": evil, evil: evil, "x-close-sync-stage": evil},
        "body": format!("{evil}\u{1b}[2J"),
    });
    bench.import(&strange.to_string()).await;
    let browser = Browser::of(&worker).await;
    let list = browser.get("/page/-/dead").await;
    list.assert_has(&["&lt;script&gt;alert(1)"]);
    let group = browser.get(&link(&list, "rejected")).await;
    let all: Vec<_> = group.text.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let messages: Vec<_> = all.iter().filter(|link| link.contains("dead/message")).collect();
    assert_eq!(messages.len(), ids.len(), "{messages:#?}");
    let form = "/page/-/dead/message";
    for (address, id) in messages.into_iter().zip(ids) {
        let message = browser.get(address).await;
        assert_eq!(message.status, StatusCode::OK, "{address}");
        assert!(message.headers.get("set-cookie").is_none());
        let whole = browser.submit(address, form, &[("id", id), ("ask", "show")]).await;
        whole.assert_has(&["&lt;script&gt;alert(1)&lt;/script&gt;"]);
        for page in [&message, &whole] {
            page.assert_lacks(&["<script", "'onload=\"", "alert(1)</script>"]);
        }
        let replay = browser.get(&link(&message, "dead/replay")).await;
        assert_eq!(replay.status, StatusCode::OK);
        replay.assert_lacks(&["<script"]);
    }
    let strange = browser.get(&link(&list, "script")).await;
    let message = browser.get(&link(&strange, "message?id=")).await;
    let whole = browser.submit(&link(&strange, "message?id="), form, &[("id", odd), ("ask", "show")]).await;
    for page in [&strange, &message, &whole] {
        page.assert_has(&["&lt;script&gt;"]);
        page.assert_lacks(&["<script"]);
    }
    for nowhere in
        ["/page/-/dead/message?id=nothing", "/page/-/dead/group?group=a", "/page/-/dead/replay?id=x"]
    {
        assert_eq!(browser.get(nowhere).await.status, StatusCode::NOT_FOUND, "{nowhere}");
    }
    for bad in ["/page/-/dead/message", "/page/-/dead/group?group=a&page=-1"] {
        assert_eq!(browser.get(bad).await.status, StatusCode::BAD_REQUEST, "{bad}");
    }
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_token_dead_letters_are_neither_shown_nor_changed() {
    // The log filter does not suppress audit lines.
    let bench = with_token().await.set("RUST_LOG", "warn,close_sync::supervisor=info");
    let worker = bench.worker().await;
    bench.import(&lines(&people(1))).await;
    let browser = Browser::of(&worker).await;
    let csrf_token = browser.get("/page/sign-in").await.csrf_token().to_owned();
    for path in ["dead", "dead/group?group=rejected:write:name", "dead/message?id=dead-0", "dead/progress"] {
        let page = browser.get(&format!("/page/-/{path}")).await;
        assert_eq!(page.status, StatusCode::UNAUTHORIZED, "{path}");
        page.assert_lacks(&["Close refused"]);
    }
    for path in ["dead/replay", "dead/discard", "dead/message", "dead/stop"] {
        let fields = [("csrf_token", csrf_token.as_str()), ("id", "dead-0"), ("count", "1"), ("ask", "show")];
        let page = browser.post(&format!("/page/-/{path}"), &fields, &[]).await;
        assert_eq!(page.status, StatusCode::UNAUTHORIZED, "{path}");
    }
    assert_eq!(bench.depth(".dead").await, 1);
    // A script with the token may.
    let bearer = format!("Bearer {TOKEN}");
    let bearer = [("authorization", bearer.as_str())];
    let done = browser.post("/page/-/dead/discard", &[("id", "dead-0"), ("count", "1")], &bearer).await;
    assert_eq!(done.status, StatusCode::SEE_OTHER);
    bench.depth_becomes(".dead", 0).await;
    assert_eq!(worker.audited(), ["discard", "discarded"].map(|action| [action, "bearer", "dead-0"]));
    worker.terminate().await;
}

/// Reloads within some seconds do not scan again. While another operator holds the lock, a page reports that.
#[tokio::test(flavor = "multi_thread")]
async fn a_scan_is_cached_and_times_out_while_another_operator_holds_the_lock() {
    let bench = without_token().await;
    let worker = bench.worker().await;
    bench.import(&lines(&people(2))).await;
    let browser = Browser::of(&worker).await;
    let channel = bench.channel().await;
    browser.get("/page/-/dead").await.assert_has(&["2 dead letters"]);
    let scanned = std::time::Instant::now();
    let lock = format!("{}.desk", bench.queue);
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(lock.as_str().into(), options, FieldTable::default()).await.unwrap();
    while scanned.elapsed() < Duration::from_secs(4) {
        browser.get("/page/-/dead").await.assert_has(&["2 dead letters"]);
    }
    let busy = "Reading the dead letters takes longer than";
    worker.until("busy", async |_| browser.get("/page/-/dead").await.text.contains(busy)).await;
    assert_eq!(browser.get("/page/-").await.status, StatusCode::OK);
    channel.queue_delete(lock.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    browser.get("/page/-/dead").await.assert_has(&["2 dead letters"]);
    worker.terminate().await;
}
