//! What a successor keeps of a message, and what it must not.

use lapin::types::{AMQPValue, FieldTable};
use proptest::prelude::*;

use super::*;
use crate::outcome::{Reason, Stage};

const NOW: &str = "2026-01-02T03:04:05Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn words(text: impl Into<String>) -> AMQPValue {
    AMQPValue::LongString(text.into().into())
}

fn properties(headers: &[(&str, AMQPValue)]) -> BasicProperties {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert((*name).into(), value.clone());
    }
    BasicProperties::default()
        .with_headers(table)
        .with_message_id("m-1".into())
        .with_expiration("1000".into())
        .with_user_id("guest".into())
}

fn from_producer(properties: BasicProperties) -> Envelope {
    Envelope::of(properties, Route { exchange: "identify", routing_key: "users", is_own: false }, now())
}

fn from_delay_queue(properties: BasicProperties, now: Timestamp) -> Envelope {
    Envelope::of(properties, Route { exchange: "close-sync.retry", routing_key: "now", is_own: true }, now)
}

fn dead() -> DeadLetter {
    DeadLetter {
        reason: Reason::Rejected,
        stage: Stage::Write,
        error: "no".into(),
        field: Some("phones".into()),
        decision: Some("nobody_known; calls: 3".into()),
        response: None,
    }
}

fn names(properties: &BasicProperties) -> Vec<&str> {
    properties.headers().iter().flat_map(FieldTable::inner).map(|(name, _)| name.as_str()).collect()
}

/// The bytes of the headers in a frame.
fn encoded_size(properties: &BasicProperties) -> usize {
    let mut buffer = vec![0; 4 << 20];
    let table = properties.headers().clone().unwrap_or_default();
    let write = lapin::types::generation::gen_field_table(&table);
    let written = write(std::io::Cursor::new(&mut buffer[..]).into()).unwrap();
    usize::try_from(written.position).unwrap()
}

#[test]
fn a_message_cannot_have_been_sent_in_1970() {
    let sent = |second| sent(&BasicProperties::default().with_timestamp(second)).map(Timestamp::as_second);
    assert_eq!([0, 1, 31_535_999, u64::MAX].map(sent), [None; 4]);
    assert_eq!(sent(1_634_400_027), Some(1_634_400_027));
}

#[test]
fn producer_headers_that_are_too_large_are_dropped() {
    let successor = |bulk: usize| {
        let mut inner = FieldTable::default();
        inner.insert("inner".into(), words("x".repeat(bulk)));
        let sent = properties(&[
            (TRACEPARENT, words("00-1")),
            ("tenant", words("a")),
            ("baggage", AMQPValue::FieldTable(inner)),
        ]);
        let properties = from_producer(sent).for_delay(1, Uuid::now_v7());
        let names = names(&properties);
        [TRACEPARENT, ATTEMPTS, "tenant", "baggage"].map(|name| names.contains(&name))
    };
    assert_eq!(successor(90_000), [true; 4]);
    assert_eq!(successor(99_000), [true, true, false, false]);
}

#[test]
fn a_producer_cannot_set_headers_of_close_sync() {
    let forged = properties(&[
        (ATTEMPTS, AMQPValue::LongLongInt(u32::MAX.into())),
        (REPLAYS, AMQPValue::LongLongInt(7)),
        (REPLAY, words(Uuid::from_u128(1).to_string())),
        (DELAY_ID, words(Uuid::from_u128(2).to_string())),
        (FIRST_SEEN, words("9991-01-01T00:00:00Z")),
        (EXCHANGE, words("elsewhere")),
        (ROUTING_KEY, words("other")),
        (DECISION, words("forged")),
        (ORIGINAL, words("forged")),
        (EDITED_AT, words(NOW)),
        (REPLACES, words(Uuid::from_u128(3).to_string())),
        ("x-close-sync-j", words("x".repeat(130_700))),
        ("tenant", words("a")),
    ]);
    let envelope = from_producer(forged);
    assert_eq!((envelope.attempts, envelope.first_seen), (0, now()));
    assert_eq!((envelope.replay, envelope.delay_id, envelope.priority()), (None, None, Priority::Live));
    let successor = envelope.for_dead_letter(&DeadLetter { decision: None, ..dead() }, Uuid::now_v7(), now());
    assert_eq!(text(&successor, EXCHANGE).as_deref(), Some("identify"));
    assert_eq!(text(&successor, ROUTING_KEY).as_deref(), Some("users"));
    assert_eq!(number(&successor, ATTEMPTS), Some(1));
    for name in [REPLAYS, REPLAY, DELAY_ID, DECISION, ORIGINAL, EDITED_AT, REPLACES, "x-close-sync-j"] {
        assert!(!names(&successor).contains(&name), "{name}");
    }
    assert_eq!(text(&successor, "tenant").as_deref(), Some("a"));
}

/// Only operators can write to the retry exchange. A mistake of theirs must not freeze a record.
#[test]
fn a_message_was_never_first_seen_later_than_now() {
    let returned = from_delay_queue(properties(&[(FIRST_SEEN, words("9991-01-01T00:00:00Z"))]), now());
    assert_eq!(returned.first_seen, now());
}

#[test]
fn a_dead_letter_of_the_broker_has_no_headers_of_close_sync() {
    let forged = [(ID, words("another letter's")), (ERROR, words("run this")), ("tenant", words("a"))];
    let trusted = trusted_dead_letter(properties(&forged));
    assert_eq!(text(&trusted, ID).as_deref(), Some("another letter's"), "close-sync put it there");
    let deaths = ("x-death", AMQPValue::FieldArray(lapin::types::FieldArray::default()));
    let expired = trusted_dead_letter(properties(&[forged.as_slice(), &[deaths]].concat()));
    assert_eq!(names(&expired), ["tenant", "x-death"]);
}

#[test]
fn a_successor_has_no_header_or_property_that_the_broker_acts_on() {
    let sent = properties(&[
        ("CC", AMQPValue::FieldArray(vec![words("now"), words("60s")].into())),
        ("BCC", words("now")),
        ("x-death", words("a")),
        ("x-delivery-count", AMQPValue::LongLongInt(3)),
        ("x-acquired-count", AMQPValue::LongLongInt(3)),
        ("x-first-death-queue", words("q")),
        ("x-opt-a", words("a")),
        ("cc", words("an ordinary header")),
    ]);
    for reply_to in ["amq.rabbitmq.reply-to", "amq.rabbitmq.reply-to.g1h2AA"] {
        let envelope = from_producer(sent.clone().with_reply_to(reply_to.into()));
        for successor in [
            envelope.for_delay(1, Uuid::now_v7()),
            envelope.for_dead_letter(&dead(), Uuid::now_v7(), now()),
            for_replay(&envelope.properties, Uuid::now_v7()),
            for_restoring(&envelope.properties, "id", "a:b:c"),
            for_edited(&envelope.properties, b"original", Uuid::now_v7(), now()),
        ] {
            let foreign: Vec<_> =
                names(&successor).into_iter().filter(|name| !name.starts_with("x-close-sync-")).collect();
            assert_eq!(foreign, ["cc"]);
            assert_eq!(
                (successor.reply_to(), successor.expiration(), successor.user_id()),
                (&None, &None, &None)
            );
        }
    }
    let own_queue = from_producer(sent.with_reply_to("answers".into())).for_delay(1, Uuid::now_v7());
    assert_eq!(own_queue.reply_to().as_ref().map(ShortString::as_str), Some("answers"));
}

#[test]
fn a_bare_message_keeps_what_identifies_and_decodes_it() {
    let sent = properties(&[("tenant", words("a")), (TRACEPARENT, words("00-1"))])
        .with_content_encoding("gzip".into())
        .with_timestamp(5)
        .with_type("identify".into())
        .with_priority(200);
    let delay_id = Uuid::now_v7();
    let bare = from_delay_queue(from_producer(sent).for_delay(1, delay_id), now()).bare();
    assert_eq!((bare.attempts, bare.delay_id, bare.own_id()), (1, Some(delay_id), Some("m-1")));
    let successor = bare.for_delay(2, delay_id);
    assert_eq!(names(&successor), [ATTEMPTS, DELAY_ID, EXCHANGE, FIRST_SEEN, ROUTING_KEY]);
    let expected = BasicProperties::default()
        .with_headers(successor.headers().clone().unwrap())
        .with_message_id("m-1".into())
        .with_timestamp(5)
        .with_content_encoding("gzip".into());
    assert_eq!(successor, expected);
}

#[test]
fn a_dead_letter_records_its_failure_and_a_replay_starts_over() {
    let first = properties(&[("traceparent", words("00-1"))]);
    let delay_id = Uuid::now_v7();
    let delayed = from_producer(first).for_delay(1, delay_id);
    let envelope = from_delay_queue(delayed, "2030-01-01T00:00:00Z".parse().unwrap());
    assert_eq!((envelope.attempts, envelope.first_seen, envelope.delay_id), (1, now(), Some(delay_id)));
    assert_eq!((envelope.exchange.as_str(), envelope.routing_key.as_str()), ("identify", "users"));

    let properties = envelope.for_dead_letter(&dead(), Uuid::now_v7(), now());
    assert_eq!(text(&properties, REASON).as_deref(), Some("rejected"));
    assert_eq!(text(&properties, FINGERPRINT).as_deref(), Some("rejected:write:phones"));
    assert_eq!(number(&properties, ATTEMPTS), Some(2));
    assert_eq!(text(&properties, "traceparent").as_deref(), Some("00-1"));

    let again = Uuid::now_v7();
    let replay = for_replay(&properties, again);
    assert_eq!(text(&replay, REPLAY), Some(again.to_string()));
    assert_eq!((number(&replay, ATTEMPTS), text(&replay, REASON), text(&replay, ID)), (None, None, None));
    assert_eq!(text(&replay, DELAY_ID), None);
    assert_eq!((number(&replay, REPLAYS), text(&replay, EXCHANGE).as_deref()), (Some(1), Some("identify")));
    assert_eq!(number(&for_replay(&replay, Uuid::now_v7()), REPLAYS), Some(2));
    assert_eq!(replay.message_id().as_ref().map(ShortString::as_str), Some("m-1"));
}

/// Headers of any name, size and simple type.
fn any_headers() -> impl Strategy<Value = Vec<(String, AMQPValue)>> {
    let own = proptest::sample::select(OWN_HEADERS.to_vec()).prop_map(str::to_owned);
    let name = prop_oneof![own, "x-close-sync-[a-z]{1,9}", "[a-zA-Z-]{0,200}", Just("CC".to_owned())];
    let size = prop_oneof![0..9_usize, 900..1200_usize, 30_000..140_000_usize];
    let value = prop_oneof![
        size.clone().prop_map(|size| words("x".repeat(size))),
        size.clone().prop_map(|size| words("é".repeat(size / 2))),
        size.clone().prop_map(|size| AMQPValue::LongString(vec![0xFF; size].into())),
        size.prop_map(|size| AMQPValue::FieldArray(vec![AMQPValue::Void; size / 9].into())),
        any::<i64>().prop_map(AMQPValue::LongLongInt),
        any::<bool>().prop_map(AMQPValue::Boolean),
    ];
    proptest::collection::vec((name, value), 0..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_headers_of_every_successor_fit_into_the_limit(
        headers in any_headers(),
        is_own in any::<bool>(),
        error in "(a|é|\n){0,9000}",
    ) {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        let sent = properties(&headers);
        let route = Route { exchange: &"e".repeat(255), routing_key: &"k".repeat(255), is_own };
        let envelope = Envelope::of(sent.clone(), route, now());
        let dead = DeadLetter { decision: Some(error.clone()), error, ..dead() };
        let (id, restored) = (Uuid::now_v7(), trusted_dead_letter(sent));
        for (what, successor) in [
            ("delay", envelope.for_delay(u32::MAX, id)),
            ("dead letter", envelope.for_dead_letter(&dead, id, now())),
            ("bare", envelope.bare().for_dead_letter(&dead, id, now())),
            ("replay", for_replay(&restored, id)),
            ("restored", for_restoring(&restored, &"i".repeat(99_999), &"f".repeat(99_999))),
            ("edited", for_edited(&restored, &vec![0xFF; MAX_ORIGINAL], id, now())),
        ] {
            let size = encoded_size(&successor);
            prop_assert!(size <= MAX_HEADERS, "{what}: {size}");
        }
    }
}
