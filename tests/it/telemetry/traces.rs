//! Exported traces, as a collector receives them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use close_sync::amqp::envelope::TRACEPARENT;
use close_sync_simulator::{Effect, Fault, Settings};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::{Span, status};
use prost::Message;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{Bench, Worker, identify, people, refusal};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PRODUCER: &str = "00f067aa0ba902b7";

/// A collector. Keeps all requests, and can reject them.
#[derive(Clone, Default)]
struct Collector {
    posted: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
    refuses: Arc<AtomicBool>,
}

impl Collector {
    fn start(listener: TcpListener) -> Self {
        let collector = Self::default();
        let take = async |State(collector): State<Self>, headers: HeaderMap, body: Bytes| {
            collector.posted.lock().unwrap().push((headers, body));
            let refuses = collector.refuses.load(Ordering::Relaxed);
            if refuses { StatusCode::BAD_REQUEST } else { StatusCode::OK }
        };
        let router = Router::new().route("/v1/traces", post(take)).with_state(collector.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        collector
    }

    /// A bench whose workers export traces to this collector.
    async fn with_bench(settings: Settings) -> (Self, Bench) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let bench = Bench::with(settings).await.set("OTEL_EXPORTER_OTLP_ENDPOINT", &url);
        (Self::start(listener), bench)
    }

    fn posted(&self) -> Vec<(HeaderMap, Bytes)> {
        self.posted.lock().unwrap().clone()
    }

    fn requests(&self) -> Vec<ExportTraceServiceRequest> {
        self.posted().iter().map(|(_, body)| ExportTraceServiceRequest::decode(&body[..]).unwrap()).collect()
    }

    fn spans(&self) -> Vec<Span> {
        let resources = self.requests().into_iter().flat_map(|request| request.resource_spans);
        resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
    }

    /// The spans of messages, in the order of their start.
    fn messages(&self) -> Vec<Span> {
        let mut spans = self.spans();
        spans.retain(|span| span.kind() == SpanKind::Consumer);
        spans.sort_by_key(|span| span.start_time_unix_nano);
        spans
    }

    /// The names of the calls within a span, in order.
    fn calls(&self, parent: &Span) -> Vec<String> {
        let mut spans = self.spans();
        spans.retain(|span| span.parent_span_id == parent.span_id);
        spans.sort_by_key(|span| span.start_time_unix_nano);
        for span in &spans {
            assert_eq!((span.kind(), &span.trace_id), (SpanKind::Client, &parent.trace_id));
            assert!(parent.start_time_unix_nano <= span.start_time_unix_nano);
            assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
            assert!(span.end_time_unix_nano <= parent.end_time_unix_nano);
        }
        spans.into_iter().map(|span| span.name).collect()
    }
}

fn hex(id: &[u8]) -> String {
    id.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"))
}

fn attributes(span: &Span) -> BTreeMap<String, Value> {
    #[expect(clippy::wildcard_enum_match_arm, reason = "no attribute is of another type")]
    let value = |value| match value {
        any_value::Value::StringValue(text) => json!(text),
        any_value::Value::IntValue(number) => json!(number),
        any_value::Value::DoubleValue(number) => json!(number),
        other => panic!("{other:?}"),
    };
    let pairs = span.attributes.iter().cloned();
    pairs.map(|pair| (pair.key, value(pair.value.unwrap().value.unwrap()))).collect()
}

fn failed(span: &Span) -> Option<String> {
    let is_error = span.status.as_ref().is_some_and(|status| status.code() == status::StatusCode::Error);
    let kind = attributes(span).get("error.type").map(|kind| kind.as_str().unwrap().to_owned());
    assert_eq!(is_error, kind.is_some(), "{span:?}");
    kind
}

fn properties(id: &str, parent: Option<&str>) -> BasicProperties {
    let mut headers = FieldTable::default();
    if let Some(parent) = parent {
        headers.insert(TRACEPARENT.into(), AMQPValue::LongString(parent.into()));
    }
    BasicProperties::default()
        .with_message_id(id.into())
        .with_correlation_id("order-7".into())
        .with_headers(headers)
}

/// Publishes and waits until it is settled, for the `number`th time.
async fn send(bench: &Bench, worker: &Worker, number: usize, event: &Value, properties: BasicProperties) {
    bench.publish_bytes(event.to_string().as_bytes(), properties).await;
    worker.settled(number).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_continues_the_trace_of_its_producer_with_its_calls() {
    let (collector, bench) = Collector::with_bench(Settings::fast()).await;
    let bench = bench
        .set("OTEL_EXPORTER_OTLP_HEADERS", "api-key=s%20cret,x-tenant=crm")
        .set("OTEL_SERVICE_NAME", "crm-worker")
        .set("WORKER_RECHECK", "0s");
    let worker = bench.worker().await;
    let event = identify(
        "user-4711",
        json!({"email": "jane.doe@example.test", "name": "Jane Doe", "company": {"id": "comp-815"}}),
    );
    let parent = format!("00-{TRACE}-{PRODUCER}-01");
    send(&bench, &worker, 1, &event, properties("m-1", Some(&parent))).await;
    send(&bench, &worker, 2, &event, properties("m-2", None)).await;
    let unsampled = parent.replace("-01", "-00");
    send(&bench, &worker, 3, &event, properties("m-3", Some(&unsampled))).await;
    send(&bench, &worker, 4, &json!({"type": "track"}), properties("m-4", Some(&parent))).await;
    let server = bench.simulator.addr();
    worker.terminate().await;

    let [first, second, skipped] = &collector.messages()[..] else { panic!("{:#?}", collector.messages()) };
    assert_eq!(first.name, format!("process {}", bench.exchange));
    assert_eq!((hex(&first.trace_id), hex(&first.parent_span_id)), (TRACE.into(), PRODUCER.into()));
    let recorded = attributes(first);
    let mut expected = BTreeMap::from([
        ("messaging.system", json!("rabbitmq")),
        ("messaging.operation.name", json!("process")),
        ("messaging.operation.type", json!("process")),
        ("messaging.destination.name", json!(bench.exchange)),
        ("messaging.destination.subscription.name", json!(bench.queue)),
        ("messaging.rabbitmq.destination.routing_key", json!("users")),
        ("messaging.message.id", json!("m-1")),
        ("messaging.message.conversation_id", json!("order-7")),
        ("messaging.message.body.size", json!(event.to_string().len())),
        ("close_sync.attempt", json!(1)),
        ("close_sync.outcome", json!("created")),
    ]);
    let expected_of_first: BTreeMap<String, Value> =
        expected.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    assert_eq!(recorded, expected_of_first);
    assert_eq!(failed(first), None);
    let calls = collector.calls(first);
    assert_eq!(calls.last().unwrap(), "POST /lead/");
    assert!(calls.iter().any(|name| name == "POST /data/search/"), "{calls:?}");
    let create = collector.spans().into_iter().find(|span| span.name == "POST /lead/").unwrap();
    let mut recorded = attributes(&create);
    assert!(recorded.remove("close_sync.gate_wait_seconds").unwrap().as_f64().unwrap() >= 0.0);
    expected = BTreeMap::from([
        ("http.request.method", json!("POST")),
        ("http.response.status_code", json!(200)),
        ("server.address", json!(server.ip().to_string())),
        ("server.port", json!(server.port())),
        ("url.template", json!("/lead/")),
    ]);
    assert_eq!(
        recorded.iter().map(|(key, value)| (key.as_str(), value.clone())).collect::<BTreeMap<_, _>>(),
        expected
    );

    // A trace of its own, whose id is in the log too.
    assert_eq!(
        (attributes(second)["messaging.message.id"].clone(), second.parent_span_id.len()),
        (json!("m-2"), 0)
    );
    assert_eq!(attributes(second)["close_sync.outcome"], "unchanged");
    assert_ne!(hex(&second.trace_id), TRACE);
    let logged = |id: &str| worker.logged(&format!("\"trace_id\":\"{id}\""));
    assert!(logged(&hex(&second.trace_id)) > 0 && logged(TRACE) > 0);
    assert!(
        collector.calls(second).iter().any(|name| name == "GET /lead/{id}/"),
        "{:?}",
        collector.calls(second)
    );

    // The producer of the third does not export its trace, so the worker does not either.
    assert_eq!(hex(&skipped.trace_id), TRACE);
    assert_eq!(
        (attributes(skipped)["close_sync.outcome"].clone(), failed(skipped)),
        (json!("skipped"), None)
    );
    assert_eq!(attributes(skipped)["close_sync.skipped_for"], "trigger");
    assert!(collector.calls(skipped).is_empty());

    // Calls at the start, which belong to no message, are separate traces.
    let checks: Vec<_> = collector.spans().into_iter().filter(|span| span.name == "GET /me/").collect();
    assert!(!checks.is_empty() && checks.iter().all(|span| span.parent_span_id.is_empty()));

    for (headers, body) in collector.posted() {
        assert!(headers["api-key"] == "s cret" && headers["x-tenant"] == "crm");
        assert_eq!(headers["content-type"], "application/x-protobuf");
        let text = String::from_utf8_lossy(&body).into_owned();
        for personal in ["jane", "Jane", "Doe", "user-4711", "comp-815", "api_simulator"] {
            assert!(!text.contains(personal), "{personal} in {text}");
        }
    }
    let resource = collector.requests()[0].resource_spans[0].resource.clone().unwrap();
    let name = resource.attributes.iter().find(|pair| pair.key == "service.name").unwrap();
    assert_eq!(name.value.clone().unwrap().value, Some(any_value::Value::StringValue("crm-worker".into())));
    // Log lines do not change.
    let synced: Value = serde_json::from_str(&worker.log_line("\"created\"")).unwrap();
    assert_eq!((&synced["span"]["name"], &synced["span"]["message_id"]), (&json!("message"), &json!("m-1")));
    assert_eq!(
        (&synced["span"]["trace_id"], &synced["span"]["parent_span_id"]),
        (&json!(TRACE), &json!(PRODUCER))
    );
    assert!(!worker.log().contains("s cret") && !worker.log().contains("close_sync::span"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_and_its_replay_are_in_one_trace() {
    let (collector, bench) = Collector::with_bench(Settings::fast()).await;
    let bad_request = refusal();
    bench.simulator.fault(Fault::new(bad_request).on("POST", "/lead/").times(1));
    let worker = bench.worker().await;
    let parent = format!("00-{TRACE}-{PRODUCER}-01");
    let event = identify("user-4711", json!({"company": {"id": "comp-815"}}));
    send(&bench, &worker, 1, &event, properties("m-1", Some(&parent))).await;
    bench.output(&["dlq", "replay", "--all"]).await;
    worker.terminate().await;

    let [died, replayed] = &collector.messages()[..] else { panic!("{:#?}", collector.messages()) };
    for span in [died, replayed] {
        assert_eq!((hex(&span.trace_id), hex(&span.parent_span_id)), (TRACE.into(), PRODUCER.into()));
        assert_eq!(attributes(span)["messaging.message.id"], "m-1");
    }
    assert_eq!(
        (attributes(died)["close_sync.outcome"].clone(), failed(died)),
        (json!("dead"), Some("rejected".into()))
    );
    assert_eq!(
        (attributes(replayed)["close_sync.outcome"].clone(), failed(replayed)),
        (json!("created"), None)
    );
    let refused = collector.spans().into_iter().find(|span| span.name == "POST /lead/").unwrap();
    assert_eq!(
        (attributes(&refused)["http.response.status_code"].clone(), failed(&refused)),
        (json!(400), Some("400".into()))
    );
}

/// Messages that share a write or a search with another one link to the span of its call.
#[tokio::test(flavor = "multi_thread")]
async fn a_shared_call_is_exported_once_and_linked_to() {
    let (collector, bench) = Collector::with_bench(Settings::fast()).await;
    bench.lead(Some("acme"), json!([{"custom.cf_contactuserid": "u1"}]));
    // The first waits for the search, so that the others are merged.
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 500 }).on("POST", "/data/").times(1));
    let title = |n: u32| identify("u1", json!({"title": format!("Title {n}"), "company": {"id": "acme"}}));
    let worker = bench.worker().await;
    bench.publish(&[title(0)]).await;
    worker.until("searching", async |_| bench.simulator.request_count("POST", "/data/") == 1).await;
    bench.publish(&[title(1), title(2), title(3)]).await;
    worker.settled(4).await;
    assert_eq!(worker.metrics().await.count("messages_merged_total"), 2);
    worker.terminate().await;
    let messages = collector.messages();
    assert!(messages.iter().all(|span| attributes(span)["close_sync.outcome"] == "updated"));
    let [_, first, second, third] = &messages[..] else { panic!("{messages:#?}") };
    assert!(first.links.is_empty() && collector.calls(first).iter().any(|name| name == "PUT /contact/{id}/"));
    for span in [second, third] {
        let [link] = &span.links[..] else { panic!("{span:#?}") };
        assert_eq!((&link.trace_id, &link.span_id), (&first.trace_id, &first.span_id));
        assert!(collector.calls(span).is_empty());
    }

    let (collector, bench) = Collector::with_bench(Settings::fast()).await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 500 }).on("POST", "/data/").times(1));
    bench.sync(&(0..4).map(|n| identify(&format!("u{n}"), json!({}))).collect::<Vec<_>>()).await;
    let searches = collector.spans().into_iter().filter(|span| span.name == "POST /data/search/");
    let payers: Vec<_> = searches.map(|span| span.parent_span_id).collect();
    assert!(payers.len() < 4, "the first by itself, then one for the rest");
    for span in collector.messages() {
        let linked = span.links.iter().any(|link| payers.contains(&link.span_id));
        assert_ne!(payers.contains(&span.span_id), linked, "{span:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_rejects_spans_is_logged_once_and_does_not_delay_messages() {
    let (collector, bench) = Collector::with_bench(Settings::fast()).await;
    let bench = bench.set("OTEL_BSP_SCHEDULE_DELAY", "50");
    collector.refuses.store(true, Ordering::Relaxed);
    let worker = bench.worker().await;
    let cannot = |worker: &Worker| worker.events("trace_export_failing");
    for n in 1..=3 {
        let before = collector.posted().len();
        bench.publish(&people(n)[n - 1..]).await;
        worker.settled(n).await;
        worker.until("posted again", async |_| collector.posted().len() > before).await;
    }
    worker.until("the outage is logged", async |worker| cannot(worker) > 0).await;
    assert_eq!(cannot(&worker), 1, "{}", worker.log());
    collector.refuses.store(false, Ordering::Relaxed);
    bench.publish(&people(4)[3..]).await;
    worker.until("taken again", async |worker| worker.events("trace_export_recovered") == 1).await;
    collector.refuses.store(true, Ordering::Relaxed);
    bench.publish(&people(5)[4..]).await;
    worker.until("the second outage is logged", async |worker| cannot(worker) == 2).await;
    worker.terminate().await;
}

/// An address without a listener, and a collector that accepts connections and never answers.
#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_or_silent_collector_does_not_delay_messages() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for (addr, is_logged) in
        [("127.0.0.1:1".to_owned(), true), (silent.local_addr().unwrap().to_string(), false)]
    {
        let bench = Bench::new().await.set("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{addr}"));
        let bench = bench.set("OTEL_BSP_SCHEDULE_DELAY", "50");
        let worker = bench.worker().await;
        let logged = |worker: &Worker| worker.events("trace_export_failing") == 1;
        if is_logged {
            worker.until("the outage is logged", async |worker| logged(worker)).await;
        }
        bench.publish(&people(20)).await;
        worker.settled(20).await;
        bench.assert_each_once(20);
        worker.terminate().await;
        if is_logged {
            assert!(logged(&worker), "{}", worker.log());
        } else {
            // The worker stopped waiting for the silent collector before the export timed out.
            assert_eq!(worker.events("traces_lost"), 1, "{}", worker.log());
        }
    }
}
