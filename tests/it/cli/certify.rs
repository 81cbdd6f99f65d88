//! `close-sync certify` finds how the simulated Close behaves, and leaves nothing behind.

use std::collections::BTreeSet;
use std::process::Output;
use std::time::Duration;

use close_sync_simulator::{
    Behaviour, CustomField, Effect, Fault, FaultBody, FieldKind, Lag, Owner, Settings, Simulator, When,
};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::{Bench, TIMEOUT};

/// Each behaviour with another value than the default, and the assumption whose finding must show it.
const VISIBLE: [(&str, &str, &str); 32] = [
    // Longer than a busy machine needs between a write and the first look.
    ("search_lag", "4s", "search_created"),
    ("creation_search_lag", "4s", "search_created"),
    ("custom_field_search_lag", "4s", "search_changed"),
    ("read_lag", "4s", "read_changed"),
    ("event_lag", "4s", "event_log"),
    ("header_style", "legacy", "rate_limit_header"),
    ("error_shape", "dotted", "bad_email"),
    ("error_texts", "pydantic", "error_texts"),
    ("missing_record", "html", "missing_record"),
    ("unknown_url", "html", "unknown_url"),
    ("unknown_selector", "ignored", "unknown_selector"),
    ("last_cursor", "empty", "last_cursor"),
    ("search_rows", "only_ids", "search_rows"),
    ("exact_value", "refused", "exact_search"),
    ("descending_cursor", "exact", "descending_cursor"),
    ("lead_contacts", "absent", "lead_contacts"),
    ("contact_lists", "null", "contact_lists"),
    ("missing_slash", "redirected", "missing_slash"),
    ("created_lead", "without_contact_ids", "created_lead"),
    ("strict_contact_keys", "true", "unknown_key"),
    ("lists_from_index", "false", "list_endpoint"),
    ("country", "GB", "phone_country"),
    ("times", "naive", "time_notation"),
    ("numbers", "text", "field_read_back"),
    ("users", "object", "field_read_back"),
    ("lists", "always_list", "field_read_back"),
    ("lists", "never_list_of_one", "field_read_back"),
    ("lossy_fields", "[\"custom.cf_leadplan\"]", "field_read_back"),
    ("event_data", "hidden_after_an_hour", "event_data"),
    ("country_in_me", "true", "country_in_me"),
    ("null_members", "[\"cf_leadnotes.type\"]", "schema"),
    ("required_fields", "[\"cf_sharedregion\"]", "required_fields"),
];

/// Behaviours that the table above does not cover, with the reason.
const OTHERS: [(&str, &str); 2] = [
    (
        "rate_limit_body",
        "only a 429 has it, certify stays within the rate limits, and close-sync does not read it",
    ),
    ("retry_after", "only a 503 has it, and no call makes Close answer with one"),
];

/// A bench whose Close behaves like this. It needs no broker.
async fn bench(change: impl FnOnce(&mut Behaviour)) -> Bench {
    let simulator =
        Simulator::start(Settings::fast().with(change), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    simulator
        .add_field(CustomField::new("cf_sharedregion", "Region", FieldKind::Text, Owner::Shared))
        .unwrap();
    // An organization has a past: its event log shows a Lead of two hours ago.
    let at = jiff::Timestamp::now() - Duration::from_hours(2);
    let old = simulator.add_lead_at(json!({"name": "Old"}), at).unwrap();
    assert!(simulator.delete(old["id"].as_str().unwrap()));
    let rules = |fields: &[&str]| -> String {
        let rules = fields.iter().map(|name| format!("'{name}' = {{ from = ['$.traits.x'] }}"));
        format!("{{ {} }}", rules.collect::<Vec<_>>().join(", "))
    };
    let lead = rules(&["Plan", "Seats", "Tags", "Account owner", "Customer since", "Contract"]);
    Bench::around(simulator, "amqp://guest:guest@127.0.0.1:1/%2f")
        .set("CLOSE_SEARCH_LAG", "20s")
        .set("MAPPING_LEAD_CUSTOM", &lead)
        .set("MAPPING_CONTACT_CUSTOM", &rules(&["Role", "Referrer"]))
}

/// The report of a run that left no record.
async fn report(bench: &Bench) -> (Output, Value) {
    let output = bench.run(&["certify", "--yes", "--json", "--max-wait", "6s"], b"").await;
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!((bench.simulator.leads(), bench.simulator.contacts()), (vec![], vec![]), "{report:#}");
    assert!(bench.simulator.requests().len() <= 100, "{}", bench.simulator.requests().len());
    assert_eq!(report["calls"], json!(bench.simulator.requests().len()));
    (output, report)
}

/// All findings of an assumption.
fn findings<'a>(report: &'a Value, assumption: &str) -> Vec<&'a Value> {
    let findings = report["findings"].as_array().unwrap().iter();
    findings.filter(|finding| finding["assumption"] == assumption).collect()
}

fn finding<'a>(report: &'a Value, assumption: &str) -> &'a Value {
    let mut findings = report["findings"].as_array().unwrap().iter();
    findings
        .find(|finding| finding["assumption"] == assumption)
        .unwrap_or_else(|| panic!("{assumption}: {report:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_behaviour_of_close_is_found() {
    let known: BTreeSet<String> = Behaviour::default().fields().keys().cloned().collect();
    let listed = VISIBLE.iter().map(|(key, ..)| key).chain(OTHERS.iter().map(|(key, _)| key));
    let listed: BTreeSet<String> = listed.map(|key| (*key).to_owned()).collect();
    assert_eq!(known, listed, "certify must find a new behaviour, or the list must say why it cannot");

    let plain = bench(|_| {}).await;
    let (output, plain) = report(&plain).await;
    assert_eq!(output.status.code(), Some(0), "{plain:#}");
    // Lists that read the index differ from those that do not as long as search does not show the Lead.
    let never_indexed = |close: &mut Behaviour| close.set("search_lag", "1h").unwrap();
    let (_, plain_list) = report(&bench(never_indexed).await).await;
    join_all(VISIBLE.iter().map(async |(key, value, assumption)| {
        let is_about_lists = *key == "lists_from_index";
        let bench = bench(|close| {
            if is_about_lists {
                never_indexed(close);
            }
            close.set(key, value).unwrap();
        })
        .await;
        let (_, report) = report(&bench).await;
        let plain = if is_about_lists { &plain_list } else { &plain };
        let (before, found) = (findings(plain, assumption), findings(&report, assumption));
        let texts =
            |findings: &[&Value]| findings.iter().map(|finding| finding["found"].clone()).collect::<Vec<_>>();
        assert_ne!(texts(&before), texts(&found), "{key}");
        let shown = found.iter().find_map(|finding| finding["behaviour"].get(key));
        let shown = shown.unwrap_or_else(|| panic!("{key}: {found:#?}"));
        assert_eq!(shown, &report["behaviour"][key], "{key}");
        if let Ok(Lag::Fixed(set)) = value.parse::<Lag>() {
            // Found between two looks.
            let Ok(Lag::Fixed(shown)) = shown.as_str().unwrap().parse::<Lag>() else { panic!("{shown}") };
            assert!(set <= shown, "{key}: {shown:?}");
        } else {
            let mut expected = Behaviour::default();
            expected.set(key, value).unwrap();
            assert_eq!(shown, &expected.fields()[*key], "{key}");
        }
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lag_above_the_setting_exits_with_1_and_the_line_to_set() {
    for (lag, status) in [("3s", "change_setting"), ("1h", "change_setting")] {
        let bench = bench(|close| close.set("search_lag", lag).unwrap()).await.set("CLOSE_SEARCH_LAG", "1s");
        let (output, report) = report(&bench).await;
        assert_eq!(output.status.code(), Some(1), "{report:#}");
        let settings = report["settings"].as_array().unwrap();
        assert_eq!(settings.len(), 1, "{settings:?}");
        let value = settings[0].as_str().unwrap().strip_prefix("close.search_lag = ").unwrap();
        let value: jiff::SignedDuration = value.trim_matches('"').parse().unwrap();
        assert!(value.as_secs() > 3, "{value}");
        assert_eq!(finding(&report, "search_created")["status"], status);
    }
    // Longer than it waits, but shorter than what is configured.
    let bench = bench(|close| close.set("search_lag", "1h").unwrap()).await;
    let (output, report) = report(&bench).await;
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    assert_eq!(finding(&report, "search_created")["status"], "unknown");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_configured_field_is_read_back() {
    let bench = bench(|_| {}).await;
    let (output, report) = report(&bench).await;
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    let fields = findings(&report, "field_read_back");
    assert_eq!(fields.len(), 8, "{fields:#?}");
    for field in fields {
        // certify has no custom object to refer to.
        let is_reference = field["subject"].as_str().unwrap().contains("(custom_object)");
        let status = if is_reference { "unknown" } else { "as_assumed" };
        assert_eq!(field["status"], status, "{field:#}");
    }
}

/// Something in front of Close answers in the middle of the run. The report ignores its answers.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_closes_ends_the_run() {
    let status = |code, body| Effect::Status { code, body, when: When::BeforeCommit };
    let login = || FaultBody::Exactly(json!({"status": "log in first"}));
    join_all(
        [
            ("a page for a write", Fault::new(status(200, FaultBody::Html)).on("PUT", "/contact/")),
            ("a page that refuses", Fault::new(status(403, FaultBody::Html)).on("PUT", "/contact/")),
            (
                "a page that refuses with 400",
                Fault::new(status(400, FaultBody::Html)).on("PUT", "/lead/").after(1),
            ),
            (
                "a page for a search",
                Fault::new(status(200, FaultBody::Html)).on("POST", "/data/search/").after(2),
            ),
            ("other JSON", Fault::new(status(200, login())).on("PUT", "/lead/")),
            ("other JSON for a read", Fault::new(status(200, login())).on("GET", "/contact/")),
            ("a 404 of a proxy", Fault::new(status(404, FaultBody::Html)).on("GET", "/contact/")),
            ("a redirect", Fault::new(status(302, FaultBody::Html)).on("GET", "/event/")),
            ("an outage", Fault::new(status(502, FaultBody::Html)).on("PUT", "/contact/").after(1)),
        ]
        .map(async |(what, fault)| {
            let bench = bench(|_| {}).await;
            bench.simulator.fault(fault);
            let (output, report) = report(&bench).await;
            assert_eq!(
                (output.status.code(), &report["verdict"]),
                (Some(69), &json!("incomplete")),
                "{what}: {report:#}"
            );
            assert!(report["stopped"].is_string(), "{what}: {report:#}");
            assert_eq!(report["left_behind"], json!([]), "{what}");
            for finding in report["findings"].as_array().unwrap() {
                assert!(
                    ["as_assumed", "unknown"].contains(&finding["status"].as_str().unwrap()),
                    "{what}: {finding:#}"
                );
            }
        }),
    )
    .await;
}

/// A single page costs a second try, and no finding.
#[tokio::test(flavor = "multi_thread")]
async fn one_page_of_a_proxy_is_tried_again() {
    let bench = bench(|_| {}).await;
    let page = Effect::Status { code: 200, body: FaultBody::Html, when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(page).on("PUT", "/contact/").times(1));
    let (output, report) = report(&bench).await;
    assert_eq!((output.status.code(), &report["verdict"]), (Some(0), &json!("fits")), "{report:#}");
}

/// Close allows no call. Nothing is written, and the wait ends.
#[tokio::test(flavor = "multi_thread")]
async fn an_endless_429_ends_the_run() {
    for path in ["/me/", "/custom_field_schema/"] {
        let bench = bench(|_| {}).await;
        let busy = Effect::RateLimited { retry_after: 0.2, with_headers: true };
        bench.simulator.fault(Fault::new(busy).on("GET", path));
        let output = bench.run(&["certify", "--yes", "--json", "--max-wait", "2s"], b"").await;
        assert_eq!(output.status.code(), Some(69), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(bench.simulator.request_count("POST", "/"), 0, "{path}");
    }
}

/// What a run shows depends on the settings. What it cannot show does not ask for another run.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_company_field_its_findings_say_so() {
    let bench = bench(|_| {}).await.set("CLOSE_LEAD_COMPANY_ID_FIELD", "");
    let (output, report) = report(&bench).await;
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    for assumption in ["search_key", "search_changed", "exact_search"] {
        let finding = finding(&report, assumption);
        let meaning = finding["meaning"].as_str().unwrap();
        assert!(
            finding["status"] == "unknown" && meaning.contains("close.lead_company_id_field"),
            "{finding:#}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_consent_nothing_is_written() {
    let bench = bench(|_| {}).await;
    let output = bench.run(&["certify"], b"y\n").await;
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("\"Simulated organisation\"") && text.contains("--yes"), "{text}");
    assert_eq!(bench.simulator.request_count("POST", "/"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interruption_deletes_what_was_made() {
    for signal in ["INT", "TERM", "HUP"] {
        let bench = bench(|close| close.set("search_lag", "1h").unwrap()).await;
        let run = bench.starting(&["certify", "--yes", "--json", "--max-wait", "10m"]);
        run.until("searching", async |_| bench.simulator.request_count("POST", "/data/search/") > 1).await;
        assert_eq!(bench.simulator.leads().len(), 2);
        run.signal(signal);
        assert_eq!(run.ended().await.code(), Some(69), "{}", run.log());
        assert_eq!((bench.simulator.leads(), bench.simulator.contacts()), (vec![], vec![]), "SIG{signal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interruption_during_a_creation_deletes_its_lead() {
    for after in [0, 1] {
        let bench = bench(|_| {}).await;
        let slow = Fault::new(Effect::Latency { ms: 1500 }).on("POST", "/lead/").after(after).times(1);
        bench.simulator.fault(slow);
        let run = bench.starting(&["certify", "--yes", "--json", "--max-wait", "10m"]);
        let sent = usize::try_from(after).unwrap() + 1;
        run.until("creating", async |_| bench.simulator.request_count("POST", "/lead/") == sent).await;
        run.signal("INT");
        assert_eq!(run.ended().await.code(), Some(69), "{}", run.log());
        assert_eq!(bench.simulator.request_count("POST", "/lead/"), sent, "no creation after it");
        // The creation takes effect at the latest now.
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!((bench.simulator.leads(), bench.simulator.contacts()), (vec![], vec![]), "{after}");
    }
}

/// A proxy answers with a page after Close has created the Lead. No other creation hides that.
#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_a_proxy_answers_is_deleted() {
    for code in [200, 400, 403] {
        let bench = bench(|_| {}).await;
        let page = Effect::Status { code, body: FaultBody::Html, when: When::AfterCommit };
        bench.simulator.fault(Fault::new(page).on("POST", "/lead/").times(1));
        let (output, report) = report(&bench).await;
        assert_eq!(
            (output.status.code(), &report["left_behind"]),
            (Some(69), &json!([])),
            "{code}: {report:#}"
        );
        assert_eq!(bench.simulator.request_count("POST", "/lead/"), 1, "{code}");
        assert_eq!(bench.simulator.request_count("DELETE", "/lead/"), 1, "{code}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lead_that_the_event_log_shows_late_is_deleted() {
    let bench = bench(|close| close.set("event_lag", "2s").unwrap()).await;
    let lost = Effect::Status { code: 504, body: FaultBody::Json, when: When::AfterCommit };
    bench.simulator.fault(Fault::new(lost).on("POST", "/lead/").times(1));
    let (output, report) = report(&bench).await;
    assert_eq!((output.status.code(), &report["left_behind"]), (Some(69), &json!([])), "{report:#}");
    assert_eq!(bench.simulator.request_count("DELETE", "/lead/"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_deletes_what_was_made() {
    let status = |code| Effect::Status { code, body: FaultBody::Json, when: When::AfterCommit };
    for (what, fault) in [
        ("search", Fault::new(status(500)).on("POST", "/data/search/")),
        ("a lost answer to the first creation", Fault::new(status(504)).on("POST", "/lead/").times(1)),
        (
            "a lost answer to the second creation",
            Fault::new(Effect::DropConnection { when: When::AfterCommit })
                .on("POST", "/lead/")
                .after(1)
                .times(1),
        ),
        ("the key", Fault::new(status(401)).on("PUT", "/lead/")),
        ("the first deletion", Fault::new(status(503)).on("DELETE", "/lead/").times(2)),
    ] {
        let bench = bench(|_| {}).await;
        bench.simulator.fault(fault);
        let (output, report) = report(&bench).await;
        assert!(matches!(output.status.code(), Some(69 | 0)), "{what}: {report:#}");
        assert_eq!(report["left_behind"], json!([]), "{what}");
        assert!(report["findings"].as_array().unwrap().len() > 20, "{what}: what was seen until then");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_deleted_is_named() {
    let bench = bench(|_| {}).await;
    let refused = Effect::Status { code: 403, body: FaultBody::Text, when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(refused).on("DELETE", "/lead/"));
    let output = bench.run(&["certify", "--yes", "--json", "--max-wait", "6s"], b"").await;
    assert_eq!(output.status.code(), Some(69));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let left: BTreeSet<&str> =
        report["left_behind"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
    let leads = bench.simulator.leads();
    assert_eq!(left, leads.iter().map(|lead| lead["id"].as_str().unwrap()).collect());
    assert_eq!(left.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simulator_behaves_like_a_report() {
    let bench = bench(|close| {
        close.set("header_style", "legacy").unwrap();
        close.set("exact_value", "exact").unwrap();
    })
    .await;
    let (_, mut report) = report(&bench).await;
    // A field of the real organization.
    report["behaviour"]["lossy_fields"] = json!(["title", "custom.cf_real"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), report.to_string()).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let addr = format!("127.0.0.1:{port}");
    let like = file.path().to_str().unwrap();
    let simulator = bench.starting(&["simulate", "--addr", &addr, "--like", like, "--set", "event_lag=7s"]);
    let http = reqwest::Client::new();
    let start = std::time::Instant::now();
    let settings: Value = loop {
        if let Ok(response) = http.get(format!("http://{addr}/_sim/settings")).send().await {
            break response.json().await.unwrap();
        }
        assert!(start.elapsed() < TIMEOUT, "{}", simulator.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let mut expected = Behaviour::default();
    expected.change(report["behaviour"].as_object().unwrap().clone()).unwrap();
    expected.set("event_lag", "7s").unwrap();
    expected.lossy_fields.retain(|field| field == "title");
    assert_eq!(settings, Value::Object(expected.fields()));
    assert_eq!((&settings["header_style"], &settings["exact_value"]), (&json!("legacy"), &json!("exact")));
    simulator.terminate().await;

    for (wrong, remedy) in [
        (&["--set", "serch_lag=1s"][..], "`search_lag`"),
        (&["--set", "search_lag"], "KEY=VALUE"),
        (&["--like", "/nowhere"], "/nowhere"),
        (&["--set", "lossy_fields=[\"phone\"]"], "`phones`"),
        (&["--set", "null_members=[\"cf_leadplan.choises\"]"], "`cf_leadplan.choices`"),
    ] {
        let output = bench.run(&[&["simulate", "--addr", "127.0.0.1:0"], wrong].concat(), b"").await;
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {error}");
        assert!(error.contains(remedy), "{wrong:?}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn simulate_explains_every_behaviour() {
    let output = bench(|_| {}).await.run(&["simulate", "--set", "help"], b"").await;
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    for knob in Behaviour::knobs() {
        assert!(
            help.lines().any(|line| line.trim_start().starts_with(&format!("{} ", knob.name))),
            "{}\n{help}",
            knob.name
        );
    }
}
