//! How much memory a message takes: while it waits, and while it is decoded and mapped.
//!
//! Counts allocations, so it is a program of its own with a single test. The table is in deploy/docs/messages.md:
//! `cargo test --test memory -- --nocapture` prints it.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test that prints a table")]
#![expect(clippy::cast_precision_loss, reason = "sizes are small numbers")]

use std::io::Write;
use std::path::Path;

use close_sync::config::{Layers, Need};
use close_sync::domain::encoding::Payload;
use close_sync::domain::event::{Event, Malformed};
use close_sync::domain::mapping::{Desired, Mapping};
use close_sync::domain::record::FieldId;
use close_sync::domain::schema::{CustomField, FieldKind, Schema, Status, User};
use flate2::Compression;
use flate2::write::GzEncoder;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const MIB: usize = 1 << 20;

/// A waiting message takes at most this many times its bytes, its body included. Of a compressed message, the bytes before
/// its compression count.
const MAX_KEPT: f64 = 3.0;

/// What the fields of this mapping that hold a long text take at most, whatever the message: six of 64 KiB, and the rest.
const MAX_FIELDS_KEPT: usize = 6 * (64 << 10) + (16 << 10);

/// A message takes at most this many bytes of memory while it is decoded and mapped. One message at a time is.
const MAX_PEAK: usize = 128 * MIB;

/// Values for `$.traits.x`, of about this many bytes each.
fn shapes(bytes: usize) -> Vec<(&'static str, String)> {
    let list = |item: &str| {
        format!("[{item}{}]", format!(",{item}").repeat((bytes / (item.len() + 1)).saturating_sub(1)))
    };
    let numbered = |member: &dyn Fn(usize) -> String, open: char, close: char| {
        let mut text = String::from(open);
        for number in 0.. {
            let member = member(number);
            if text.len() + member.len() >= bytes {
                break;
            }
            text.push_str(&member);
            text.push(',');
        }
        text.pop();
        text.push(close);
        text
    };
    let nested =
        |open: &str, inner: &str, close: &str| format!("{}{inner}{}", open.repeat(100), close.repeat(100));
    let many = |text: &str| list(text);
    vec![
        (r#"[{"":0},…]"#, list(r#"{"":0}"#)),
        ("[[],[],…]", list("[]")),
        ("[[0],[0],…]", list("[0]")),
        ("[{},{},…]", list("{}")),
        ("[0,0,…]", list("0")),
        ("[0,1,2,…]", numbered(&|number| number.to_string(), '[', ']')),
        ("[null,…]", list("null")),
        (r#"["a","a",…]"#, list("\"a\"")),
        (r#"["a0","a1",…]"#, numbered(&|number| format!("\"a{number}\""), '[', ']')),
        (r#"{"0":0,"1":0,…}"#, numbered(&|number| format!("\"{number}\":0"), '{', '}')),
        (r#"{"0":"","1":"",…}"#, numbered(&|number| format!("\"{number}\":\"\""), '{', '}')),
        (r#"{"k":0,"k":0,…}"#, numbered(&|_| "\"k\":0".to_owned(), '{', '}')),
        (r#"[{"a":{"a":…}},…], 100 deep"#, many(&nested(r#"{"a":"#, "0", "}"))),
        ("[[[…]],…], 100 deep", many(&nested("[", "", "]"))),
        ("[[…[0,0,…]…]], 100 deep", nested("[", &list("0"), "]")),
        ("one long text", format!("\"{}\"", "a".repeat(bytes))),
        ("one long text of \\u0041", format!("\"{}\"", "\\u0041".repeat(bytes / 6))),
        ("one long text of \\u0001", format!("\"{}\"", "\\u0001".repeat(bytes / 6))),
        ("one long number", "1".repeat(300)),
        ("texts of 10 KB", list(&format!("\"{}\"", "é".repeat(5000)))),
        ("a key of half the bytes around [0,0,…]", {
            let half = list("0");
            format!(r#"{{"{}":{}]}}"#, "k".repeat(bytes / 2), &half[..(bytes / 2) | 1].trim_end_matches(','))
        }),
        (r#"["+1 800 444 5555",…]"#, list("\"+1 800 444 5555\"")),
        (r#"[{"email":"a@x.test"},…]"#, list(r#"{"email":"a@x.test"}"#)),
    ]
}

fn mapping() -> Mapping {
    let field = |name: &str, kind, multiple| CustomField {
        id: FieldId::parse(&format!("cf_{}", name.replace(' ', ""))).unwrap(),
        name: name.to_owned(),
        kind,
        multiple,
        required: false,
    };
    let choices = || FieldKind::Choices(["Yes", "No", "0", "a"].map(str::to_owned).into());
    let schema = Schema {
        lead: vec![
            field("Company ID", FieldKind::Text, false),
            field("Text", FieldKind::Text, false),
            field("Number", FieldKind::Number, true),
            field("Date", FieldKind::Date, true),
            field("Choice", choices(), false),
            field("Choices", choices(), true),
            field("Owner", FieldKind::User, true),
            field("Everything", FieldKind::Text, true),
            field("Members", FieldKind::Number, true),
        ],
        contact: vec![
            field("User ID", FieldKind::Text, false),
            field("Notes", FieldKind::Textarea, false),
            field("Tags", FieldKind::Text, true),
            field("Twin", FieldKind::Contact, true),
        ],
        statuses: vec![Status { id: "stat_1".into(), label: "Potential".into() }],
        users: vec![User { id: "user_1".into(), name: "Ada".into(), email: "ada@close.test".into() }],
        ..Schema::default()
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/memory/mapping.toml");
    let environment = [].into();
    let rules =
        Layers::load(Some(&file), &environment).unwrap().read(Need::All).unwrap().single().unwrap().rules;
    Mapping::resolve(&rules, &schema).unwrap()
}

/// A measurement of one message.
struct Measured {
    accepted: bool,
    bytes: usize,
    /// What stays while the message waits, with its body.
    kept: usize,
    /// The peak while it is decoded and mapped, without its body.
    peak: usize,
}

fn body(value: &str) -> Vec<u8> {
    format!(r#"{{"type":"identify","userId":"u1","traits":{{"x":{value}}}}}"#).into_bytes()
}

fn measure(mapping: &Mapping, value: &str) -> Measured {
    measure_payload(mapping, body(value).as_slice().into())
}

fn measure_payload(mapping: &Mapping, payload: Payload<'_>) -> Measured {
    let bytes = payload.bytes.len();
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let waiting: Option<Desired> = match Event::decode(payload, MIB) {
        Ok(event) => {
            mapping.not_for_close(&event);
            Some(mapping.apply(&event).unwrap())
        }
        Err(Malformed::TooManyValues { .. }) => None,
        Err(malformed) => panic!("{malformed}"),
    };
    let (kept, peak) = (ALLOCATOR.current_usage() - before, ALLOCATOR.peak_usage() - before);
    Measured { accepted: waiting.is_some(), bytes, kept: kept + bytes, peak }
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn a_waiting_message_takes_at_most_three_times_its_bytes() {
    let mapping = mapping();
    // What is allocated once.
    measure(&mapping, "{\"a\":[1]}");
    println!("| `$.traits.x` | bytes | kept per byte | peak |");
    println!("| --- | --- | --- | --- |");
    let row = |name: &str, measured: &Measured| {
        let kept = measured.kept as f64 / measured.bytes as f64;
        let (size, peak) = (measured.bytes / 1024, measured.peak.div_ceil(MIB));
        let accepted = if measured.accepted { "" } else { ", `too_many_values`" };
        println!("| `{name}` | {size} KiB{accepted} | {kept:.2} | {peak} MiB |");
        assert!(measured.peak <= MAX_PEAK, "{name}: {peak} MiB");
        kept
    };
    let largest = MIB - 1024;
    let mut most = (0, 0, 0.0_f64);
    for (number, (name, value)) in shapes(largest).into_iter().enumerate() {
        let mut measured = measure(&mapping, &value);
        let kept = row(name, &measured);
        assert!(kept <= MAX_KEPT || measured.bytes < largest / 2, "{name}: {kept:.2}");
        // Half, a quarter and so on, until it is accepted.
        let halves = std::iter::successors(Some(largest / 2), |bytes| Some(bytes / 2));
        for bytes in halves.take_while(|_| value.len() > largest / 2) {
            if measured.accepted {
                break;
            }
            measured = measure(&mapping, &shapes(bytes)[number].1);
            if measured.accepted {
                row(name, &measured);
            }
        }
        // A compressed message takes its own bytes, and what its fields hold.
        let zipped = gzip(&body(&value));
        let compressed = measure_payload(&mapping, Payload { bytes: &zipped, encoding: Some("gzip") });
        assert!(compressed.kept <= zipped.len() + MAX_FIELDS_KEPT, "{name}, gzip: {}", compressed.kept);
        assert!(compressed.peak <= MAX_PEAK, "{name}, gzip: {}", compressed.peak);
        let times = compressed.kept as f64 / zipped.len() as f64;
        most = (most.0.max(compressed.kept - zipped.len()), most.1.max(compressed.peak), most.2.max(times));
        // A text that several fields hold counts several times, with at most 64 KiB for each of the fields.
        let small = measure(&mapping, &shapes(64 << 10)[number].1);
        assert!(small.kept <= small.bytes + MAX_FIELDS_KEPT, "{name}: {} bytes", small.kept);
    }
    let (kept, peak, times) = most;
    println!(
        "compressed: {} KiB kept beside the body, {times:.0} times it, peak {} MiB",
        kept >> 10,
        peak.div_ceil(MIB)
    );
    // Far more than its own bytes: the bound is that of the fields.
    assert!(times > 10.0, "{times}");
}
