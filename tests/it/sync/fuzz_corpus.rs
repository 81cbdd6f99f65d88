//! Runs the fuzz targets of `tests/fuzz` on their saved corpus, the recorded payloads, and mutations of both.

#[path = "../../fuzz/properties.rs"]
mod properties;
#[path = "../../fuzz/target.rs"]
mod target;

use std::path::{Path, PathBuf};

use lapin::BasicProperties;
use lapin::protocol::basic::gen_properties;
use lapin::types::{AMQPValue, FieldTable};
use proptest::prelude::*;
use proptest::sample::Index;

use target::decode_and_map;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    files
}

fn seeds() -> Vec<Vec<u8>> {
    let corpus = files("tests/fuzz/corpus/event").into_iter().map(|file| std::fs::read(file).unwrap());
    let payloads =
        files("tests/payloads").into_iter().filter(|file| file.extension().is_some_and(|e| e == "ndjson"));
    let lines = payloads.flat_map(|file| {
        let text = std::fs::read(file).unwrap();
        text.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>()
    });
    corpus.chain(lines).filter(|seed| !seed.is_empty()).collect()
}

#[test]
fn the_saved_corpus_and_the_recorded_payloads_pass() {
    let seeds = seeds();
    assert!(seeds.len() > 100, "{} seeds", seeds.len());
    for seed in &seeds {
        decode_and_map(seed);
    }
}

/// A change to bytes.
#[derive(Clone, Debug)]
enum Change {
    Set(Index, u8),
    Cut(Index, Index),
    /// A piece of another seed.
    Insert(Index, Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        (index(), index()).prop_map(|(from, to)| Change::Cut(from, to)),
        (index(), index(), index(), index())
            .prop_map(|(at, seed, from, to)| Change::Insert(at, seed, from, to)),
    ]
}

fn span(len: usize, one: Index, other: Index) -> std::ops::Range<usize> {
    let (one, other) = (one.index(len + 1), other.index(len + 1));
    one.min(other)..one.max(other)
}

/// Messages of producers and of close-sync itself, as the fuzz target for properties reads them.
fn properties_seeds() -> Vec<Vec<u8>> {
    let text = |size: usize| AMQPValue::LongString("x".repeat(size).into());
    let headers: Vec<Vec<(&str, AMQPValue)>> = vec![
        vec![],
        vec![(
            "traceparent",
            AMQPValue::LongString("00-0123456789abcdef0123456789abcdef-0123456789abcdef-01".into()),
        )],
        vec![
            ("x-close-sync-attempt", AMQPValue::LongLongInt(4_294_967_295)),
            ("x-close-sync-replays", AMQPValue::LongLongInt(i64::MAX)),
        ],
        vec![
            ("x-close-sync-first-seen", AMQPValue::LongString("9991-01-01T00:00:00Z".into())),
            ("x-close-sync-j", text(70_000)),
        ],
        vec![
            ("x-close-sync-original", text(40_000)),
            ("x-close-sync-error", text(9000)),
            ("a", text(60_000)),
        ],
        vec![("CC", AMQPValue::FieldArray(vec![text(3), text(3)].into())), ("BCC", text(3))],
        vec![("x-death", AMQPValue::FieldArray(vec![AMQPValue::FieldTable(FieldTable::default())].into()))],
        vec![("deep", (0..60).fold(text(1), |inner, _| AMQPValue::FieldArray(vec![inner].into())))],
        vec![
            ("a", AMQPValue::Void),
            ("b", AMQPValue::Double(f64::MAX)),
            ("c", AMQPValue::Timestamp(u64::MAX)),
        ],
    ];
    let mut seeds = Vec::new();
    for (number, headers) in (0..).zip(headers) {
        let mut table = FieldTable::default();
        for (name, value) in headers {
            table.insert(name.into(), value);
        }
        let all = BasicProperties::default()
            .with_headers(table)
            .with_message_id("m".repeat(255).into())
            .with_correlation_id("c".repeat(255).into())
            .with_reply_to("amq.rabbitmq.reply-to".into())
            .with_expiration("1".into())
            .with_user_id("guest".into())
            .with_content_encoding("gzip".into())
            .with_timestamp(u64::MAX)
            .with_priority(9);
        for flags in [0, 0xF0] {
            let mut seed = vec![0; 1 << 18];
            seed[0] = flags | (number & 1);
            let written = gen_properties(&all)(std::io::Cursor::new(&mut seed[1..]).into()).unwrap();
            let length = usize::try_from(written.position).unwrap() + 1;
            seed.truncate(length);
            seeds.push(seed);
        }
    }
    let found = files("tests/fuzz/corpus/properties").into_iter().map(|file| std::fs::read(file).unwrap());
    seeds.extend(found.filter(|seed| !seed.is_empty()));
    seeds
}

#[test]
fn any_properties_have_successors_that_the_broker_accepts() {
    let seeds = properties_seeds();
    let read = |seed: &Vec<u8>| lapin::protocol::basic::parse_properties(&seed[1..]).is_ok();
    assert!(seeds.len() >= 18 && seeds[..18].iter().all(read), "the seeds are valid");
    for seed in &seeds {
        properties::settle(seed);
    }
    mutate(&seeds, 2000, properties::settle);
}

#[test]
fn mutated_inputs_pass() {
    mutate(&seeds(), 20_000, decode_and_map);
}

/// Runs a target on changed seeds.
fn mutate(seeds: &[Vec<u8>], cases: u32, target: fn(&[u8])) {
    let input = (any::<Index>(), proptest::collection::vec(change(), 1..6));
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    proptest!(config, |((seed, changes) in input)| {
        let mut bytes = seeds[seed.index(seeds.len())].clone();
        for change in changes {
            match change {
                Change::Set(at, byte) if !bytes.is_empty() => {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
                Change::Set(_, byte) => bytes.push(byte),
                Change::Cut(from, to) => drop(bytes.drain(span(bytes.len(), from, to))),
                Change::Insert(at, seed, from, to) => {
                    let other = &seeds[seed.index(seeds.len())];
                    let piece = other[span(other.len(), from, to)].to_vec();
                    let at = at.index(bytes.len() + 1);
                    bytes.splice(at..at, piece);
                }
            }
        }
        target(&bytes);
    });
}
