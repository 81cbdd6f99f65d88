//! The fuzz target for the properties of a message: reads them as lapin does, and makes every successor.

use close_sync::amqp::envelope::{self, Envelope, MAX_HEADERS, MAX_ORIGINAL, Route};
use close_sync::outcome::{DeadLetter, Reason, Stage};
use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::protocol::basic::{gen_properties, parse_properties};
use lapin::types::generation::gen_field_table;
use uuid::Uuid;

/// The limit for the properties beside the headers: eleven short texts and three numbers.
const MAX_OTHERS: usize = 11 * 256 + 16;

fn size_of_headers(properties: &BasicProperties) -> usize {
    let mut buffer = vec![0; 4 << 20];
    let table = properties.headers().clone().unwrap_or_default();
    let written = gen_field_table(&table)(std::io::Cursor::new(&mut buffer[..]).into()).unwrap();
    usize::try_from(written.position).unwrap()
}

fn encoded(properties: &BasicProperties) -> Vec<u8> {
    let mut buffer = vec![0; 4 << 20];
    let written = gen_properties(properties)(std::io::Cursor::new(&mut buffer[..]).into()).unwrap();
    let length = usize::try_from(written.position).unwrap();
    buffer.truncate(length);
    buffer
}

/// Settles a message in every way. The first byte of the input tells its way to the queue. The rest are its properties
/// in the notation of AMQP. Panics if a successor is one that RabbitMQ refuses.
pub(crate) fn settle(bytes: &[u8]) {
    let Some((flags, bytes)) = bytes.split_first() else { return };
    let Ok((_, properties)) = parse_properties(bytes) else { return };
    let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
    let (key, is_own) = ("k".repeat(255), flags & 1 == 1);
    let route = Route { exchange: "identify", routing_key: &key, is_own };
    let envelope = Envelope::of(properties.clone(), route, now);
    assert!(envelope.first_seen <= now, "first seen later than now: {envelope:?}");
    assert!(
        is_own || (envelope.attempts, envelope.delay_id, envelope.replay) == (0, None, None),
        "forged: {envelope:?}"
    );

    let error = "é\u{1b}".repeat(usize::from(flags >> 4) * 1000);
    let dead = DeadLetter {
        reason: Reason::Rejected,
        stage: Stage::Write,
        field: Some(error.clone()),
        decision: Some(error.clone()),
        error,
        response: None,
    };
    let id = Uuid::nil();
    let letter = envelope::trusted_dead_letter(properties);
    let original = vec![0xFF; usize::from(flags >> 4) * MAX_ORIGINAL / 15];
    let mut successors = vec![
        ("delayed", envelope.for_delay(u32::MAX, id)),
        ("dead", envelope.for_dead_letter(&dead, id, now)),
        ("bare and delayed", envelope.bare().for_delay(0, id)),
        ("bare and dead", envelope.bare().for_dead_letter(&dead, id, now)),
        ("replayed", envelope::for_replay(&letter, id)),
        ("restored", envelope::for_restoring(&letter, &"i".repeat(9999), &"f".repeat(9999))),
        ("edited", envelope::for_edited(&letter, &original, id, now)),
        ("replacing", envelope::for_replacing(&letter, vec![id; 99])),
    ];
    // What close-sync does with its own dead letter later.
    let own = envelope::trusted_dead_letter(successors[1].1.clone());
    successors.push(("dead and replayed", envelope::for_replay(&own, id)));
    successors.push(("dead and edited", envelope::for_edited(&own, &original, id, now)));
    for (what, successor) in successors {
        let size = size_of_headers(&successor);
        assert!(size <= MAX_HEADERS, "{what}: {size} bytes of headers");
        let bytes = encoded(&successor);
        assert!(bytes.len() <= size + MAX_OTHERS, "{what}: {} bytes", bytes.len());
        let (_, read) = parse_properties(bytes.as_slice()).unwrap();
        assert_eq!(encoded(&read), bytes, "{what}");
        assert!(successor.expiration().is_none() && successor.user_id().is_none(), "{what}");
        let names = successor.headers().iter().flat_map(|table| table.inner().keys());
        // The broker acts on exactly these spellings: "cc" is an ordinary header.
        for name in names {
            assert!(!["CC", "BCC", "x-death"].contains(&name.as_str()), "{what}: {name}");
        }
    }
}
