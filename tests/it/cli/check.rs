//! `close-sync check` with valid and invalid configurations, and how `run` refuses to start.

use close_sync_simulator::{CustomField, Effect, Fault, FaultBody, FieldKind, Owner, Settings, When};

use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::FieldTable;

use serde_json::Value;

use crate::support::Bench;

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_configuration_passes() {
    let bench = Bench::new().await;
    insta::assert_snapshot!("before_the_first_run", bench.transcript(&["check"], b"").await);
    let worker = bench.worker().await;
    insta::assert_snapshot!("beside_a_worker", bench.transcript(&["check"], b"").await);
    insta::assert_snapshot!("as_json", bench.transcript(&["check", "--json"], b"").await);
    worker.terminate().await;
    let plain = bench.unset("CLOSE_LEAD_COMPANY_ID_FIELD").unset("CLOSE_CONTACT_USER_ID_FIELD");
    insta::assert_snapshot!("without_lookup_fields", plain.transcript(&["check"], b"").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_invalid_configuration_is_reported_with_its_remedy() {
    let cases: [(&str, &[(&str, &str)]); 9] = [
        ("no_key", &[("CLOSE_API_KEY", "")]),
        ("wrong_key", &[("CLOSE_API_KEY", "api_wrong.key")]),
        ("field_of_wrong_type", &[("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_leadnumericid")]),
        (
            "fields_that_do_not_exist",
            &[
                ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_contactuserid"),
                ("CLOSE_CONTACT_USER_ID_FIELD", "cf_none"),
            ],
        ),
        ("no_broker", &[("AMQP_URL", "amqp://guest:secret@127.0.0.1:1/%2f")]),
        (
            "no_node",
            &[("AMQP_URL", "amqp://guest:secret@127.0.0.1:1/%2f, amqp://guest:secret@127.0.0.1:2/%2f")],
        ),
        ("no_close", &[("CLOSE_API_URL", "http://127.0.0.1:1/api/v1/")]),
        (
            "many_mistakes",
            &[
                ("AMQP_URL", "secret"),
                ("RETRY_DELAYS", "soon"),
                ("CLOSE_TIMEOUT", "0"),
                ("AMQP_PREFETCH", "3"),
            ],
        ),
        ("no_file", &[("CLOSE_SYNC_CONFIG", "/nowhere/close-sync.toml")]),
    ];
    for (name, environment) in cases {
        let bench = environment.iter().fold(Bench::new().await, |bench, (key, value)| bench.set(key, value));
        let transcript = bench.transcript(&["check"], b"").await;
        assert!(!transcript.contains("secret"), "{transcript}");
        insta::assert_snapshot!(name, transcript);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_broker_credentials_are_a_configuration_error() {
    let bench = Bench::new().await;
    let wrong = bench.amqp_url.replace("guest:guest", "guest:hunter2");
    let output = bench.set("AMQP_URL", &wrong).run(&["check"], b"").await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(text.starts_with("ok") && text.contains("\nwrong   RabbitMQ at"), "{text}");
    assert!(text.contains("RabbitMQ refused the connection") && text.contains("ACCESS_REFUSED"), "{text}");
    assert!(text.contains("Check user, password and vhost in `amqp.url`"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_close_are_not_configuration_errors() {
    let bench = Bench::new().await;
    for code in [403, 503] {
        bench.simulator.clear_faults();
        bench.simulator.fault(Fault::new(Effect::Status {
            code,
            body: FaultBody::Text,
            when: When::BeforeCommit,
        }));
        insta::assert_snapshot!(format!("close_answers_{code}"), bench.transcript(&["check"], b"").await);
    }
}

/// A proxy's refusal says nothing about the API key.
#[tokio::test(flavor = "multi_thread")]
async fn the_answer_of_a_proxy_is_not_a_configuration_error() {
    let bench = Bench::new().await;
    for code in [200, 401, 402, 403, 404] {
        bench.simulator.clear_faults();
        let effect = Effect::Status { code, body: FaultBody::Html, when: When::BeforeCommit };
        bench.simulator.fault(Fault::new(effect));
        let (exit, unavailable) = findings(&bench, "unavailable").await;
        assert_eq!((exit, unavailable.len()), (Some(69), 1), "{code}: {unavailable:?}");
        assert!(unavailable[0].1.contains(&format!("({code}, HTML)")), "{unavailable:?}");
    }
    // `run` waits until Close itself answers.
    let worker = bench.starting_worker();
    worker.until("paused", async |worker| worker.is("paused", Some("unreachable")).await).await;
    let detail = worker.ready().await.1["detail"].to_string();
    assert!(detail.contains("(404, HTML)"), "{detail}");
    bench.simulator.clear_faults();
    worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_says_where_it_points_to() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/api/v1/", listener.local_addr().unwrap());
    let answers = tokio::spawn(async move {
        let app = axum::Router::new().fallback(|| async {
            let location = "https://user:hunter2@login.close.test/start?token=hunter2";
            (axum::http::StatusCode::FOUND, [("location", location)])
        });
        axum::serve(listener, app).await.unwrap();
    });
    let bench = Bench::new().await.set("CLOSE_API_URL", &url);
    let (exit, unavailable) = findings(&bench, "unavailable").await;
    assert_eq!((exit, unavailable.len()), (Some(69), 1), "{unavailable:?}");
    let detail = &unavailable[0].1;
    assert!(detail.contains("login.close.test") && detail.contains("close.api_url"), "{detail}");
    assert!(!detail.contains("hunter2"), "{detail}");
    answers.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn run_refuses_an_invalid_configuration() {
    let cases: [(&str, &str); 2] =
        [("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_leadnumericid"), ("CLOSE_API_KEY", "api_wrong.key")];
    for (variable, value) in cases {
        let bench = Bench::new().await.set(variable, value);
        let worker = bench.starting_worker();
        assert_eq!(worker.ended().await.code(), Some(78));
        let name = format!("run_with_bad_{}", variable.to_lowercase());
        worker.until("error logged", async |worker| worker.logged("error:") == 1).await;
        let error = worker
            .log()
            .lines()
            .skip_while(|line| !line.starts_with("error:"))
            .collect::<Vec<_>>()
            .join("\n");
        insta::assert_snapshot!(name, error);
    }
}

/// The error names both values, and the worker does not retry forever.
#[tokio::test(flavor = "multi_thread")]
async fn run_refuses_a_queue_with_other_arguments() {
    let bench = Bench::new().await;
    let options = QueueDeclareOptions::durable();
    bench
        .channel()
        .await
        .queue_declare(bench.queue.as_str().into(), options, FieldTable::default())
        .await
        .unwrap();
    let check = bench.run(&["check"], b"").await;
    let found = String::from_utf8(check.stdout).unwrap();
    assert!(check.status.code() == Some(78) && found.contains("inequivalent arg"), "{found}");

    let worker = bench.starting_worker();
    assert_eq!(worker.ended().await.code(), Some(78));
    worker.until("error logged", async |worker| worker.logged("error:") == 1).await;
    let log = worker.log();
    let both = format!("received the value '{}.dead' of type 'longstr' but current is none", bench.queue);
    assert!(log.contains("inequivalent arg 'x-dead-letter-exchange'") && log.contains(&both), "{log}");
    assert!(log.contains("amqp.queue"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn run_refuses_an_exchange_of_another_type() {
    let bench = Bench::new().await;
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let channel = bench.channel().await;
    let declared = channel.exchange_declare(
        bench.exchange.as_str().into(),
        ExchangeKind::Fanout,
        options,
        FieldTable::default(),
    );
    declared.await.unwrap();
    let worker = bench.starting_worker();
    assert_eq!(worker.ended().await.code(), Some(78));
    worker.until("error logged", async |worker| worker.logged("error:") == 1).await;
    let log = worker.log();
    assert!(
        log.contains("received 'topic' but current is 'fanout'") && log.contains("amqp.exchange"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn print_config_shows_the_effective_settings_without_secrets() {
    let bench = Bench::new().await;
    insta::assert_snapshot!("print_config", bench.transcript(&["check", "--print-config"], b"").await);
}

/// The findings of `check --json` with a status: subject and detail.
async fn findings(bench: &Bench, status: &str) -> (Option<i32>, Vec<(String, String)>) {
    let (code, stdout, stderr) = bench.run_text(&["check", "--json"], "").await;
    assert!(!stdout.contains("hunter2") && !stderr.contains("hunter2"), "{stdout}{stderr}");
    let all: Vec<Value> = serde_json::from_str(&stdout).unwrap();
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let found = all.iter().filter(|finding| finding["status"] == status);
    (code, found.map(|finding| (text(finding, "subject"), text(finding, "detail"))).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_calls_to_close_take_is_a_warning() {
    // The simulator also answers requests that are meant for a proxy.
    for variable in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
        let bench = Bench::new().await;
        let proxy = format!("http://user:hunter2@{}", bench.simulator.addr());
        let bench = bench.set(variable, &proxy);
        let (code, warnings) = findings(&bench, "warning").await;
        assert_eq!((code, warnings.len()), (Some(0), 1), "{variable}: {warnings:?}");
        assert_eq!(warnings[0].0, "proxy");
        assert!(warnings[0].1.contains(&bench.simulator.addr().to_string()), "{warnings:?}");
        let (_, text, _) = bench.run_text(&["check"], "").await;
        assert!(text.lines().any(|line| line.starts_with("warning proxy: ")), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
        // reqwest does not use it for these.
        let bench = bench.set("NO_PROXY", "127.0.0.1");
        assert_eq!(findings(&bench, "warning").await, (Some(0), vec![]));
    }
    let bench = Bench::new().await.set("HTTPS_PROXY", "http://user:hunter2@127.0.0.1:1");
    assert_eq!(findings(&bench, "warning").await, (Some(0), vec![]), "Close is reached over http here");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_tls_to_other_machines_are_warnings() {
    let bench = Bench::new()
        .await
        .set("AMQP_URL", "amqp://user:hunter2@broker.invalid:5672/%2f")
        .set("CLOSE_API_URL", "http://close.invalid/api/v1/");
    let (code, warnings) = findings(&bench, "warning").await;
    let subjects: Vec<_> = warnings.iter().map(|(subject, _)| subject.as_str()).collect();
    assert_eq!((code, subjects), (Some(69), vec!["amqp.url", "close.api_url"]));
    let (_, unavailable) = findings(&bench, "unavailable").await;
    assert_eq!(unavailable.len(), 2, "{unavailable:?}");
    let encrypted = bench
        .set("AMQP_URL", "amqps://user:hunter2@broker.invalid:5671/%2f")
        .set("CLOSE_API_URL", "https://close.invalid/api/v1/");
    assert_eq!(findings(&encrypted, "warning").await, (Some(69), vec![]));
}

/// The parser takes the password for a port, or the URL would be shown with its secret.
#[tokio::test(flavor = "multi_thread")]
async fn urls_that_would_show_a_secret_are_refused() {
    for (variable, url, key) in [
        ("AMQP_URL", "amqp://user:123/hunter2@127.0.0.1:5672/%2f", "amqp.url"),
        ("AMQP_URL", "amqp://user:123?hunter2@127.0.0.1:5672/%2f", "amqp.url"),
        ("CLOSE_API_URL", "https://user:hunter2@close.test/api/v1/", "close.api_url"),
        ("CLOSE_API_URL", "https://user:123/hunter2@close.test/api/v1/", "close.api_url"),
        ("CLOSE_API_URL", "https://close.test/api/v1/?token=hunter2", "close.api_url"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://user:hunter2@o.test", "otel.exporter.otlp.endpoint"),
    ] {
        let bench = Bench::new().await.set(variable, url);
        let (code, wrong) = findings(&bench, "wrong").await;
        assert!(code == Some(78) && wrong.len() == 1 && wrong[0].0.starts_with(key), "{url}: {wrong:?}");
        for command in [&["check", "--print-config"][..], &["run"], &["dlq", "list"]] {
            let (code, stdout, stderr) = bench.run_text(command, "").await;
            assert_eq!(code, Some(78), "{command:?} {url}");
            assert!(!(stdout + &stderr).contains("hunter2"), "{command:?} {url}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_field_that_no_rule_fills_is_a_warning() {
    let required = vec!["cf_region".to_owned(), "cf_segment".to_owned()];
    let bench = Bench::with(Settings::fast().with(|close| close.required_fields = required)).await;
    for (id, name) in [("cf_region", "Region"), ("cf_segment", "Segment"), ("cf_other", "Other")] {
        bench.simulator.add_field(CustomField::new(id, name, FieldKind::Text, Owner::Shared)).unwrap();
    }
    let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
    std::fs::write(file.path(), "[mapping.lead.custom]\nRegion = { from = ['$.traits.region'] }\n").unwrap();
    let bench = bench.set("CLOSE_SYNC_CONFIG", file.path().to_str().unwrap());
    let output = bench.run(&["check", "--json"], b"").await;
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report.as_array().unwrap().iter();
    let warnings: Vec<_> = findings
        .filter(|finding| finding["status"] == "warning" && finding["subject"] == "Close")
        .map(|finding| finding["detail"].as_str().unwrap().split(" is required").next().unwrap())
        .collect();
    let expected = [
        r#"the Lead custom field "Segment""#,
        r#"the Contact custom field "Region""#,
        r#"the Contact custom field "Segment""#,
    ];
    assert_eq!(warnings, expected, "{report:#}");
}
