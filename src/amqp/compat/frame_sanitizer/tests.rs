//! Frames of any content, in chunks of any size.

use futures_util::{TryStreamExt, stream};
use lapin::protocol::basic::parse_properties;
use lapin::types::parsing::parse_field_table;
use proptest::prelude::*;

use super::payload::{MAX_VALUES, Sanitized};
use super::*;
use crate::amqp::envelope::QUARANTINED;

fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [u32::try_from(bytes.len()).unwrap().to_be_bytes().as_slice(), bytes].concat()
}

/// A named value of this type.
fn entry(name: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    [short(name).as_slice(), &[kind], value].concat()
}

/// Headers with this many levels of tables or arrays.
fn nested(levels: usize, kind: u8) -> Vec<u8> {
    let mut inner = Vec::new();
    for _ in 1..levels {
        let name: &[u8] = if kind == b'F' { b"\x01n" } else { b"" };
        inner = [name, &[kind], &long(&inner)].concat();
    }
    // The first level is a table in any case.
    if kind == b'A' && levels > 1 { [&[0], inner.as_slice()].concat() } else { inner }
}

/// A content header with a content type, these headers and a message id.
fn content_header(headers: &[u8], id: &[u8]) -> Vec<u8> {
    let head = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
    [&head, [0xA0, 0x80].as_slice(), &short(b"text/plain"), &long(headers), &short(id)].concat()
}

fn delivery(key: &[u8]) -> Vec<u8> {
    let head = [0, 60, 0, 60];
    // Not ASCII: a number is not text.
    let tag = [0xFF; 9];
    [&head, short(b"tag").as_slice(), &tag, &short(b"identify"), &short(key)].concat()
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, 1], long(payload).as_slice(), &[0xCE]].concat()
}

fn parses(headers: &[u8]) -> bool {
    parse_field_table(long(headers).as_slice()).is_ok()
}

/// A content header after sanitizing.
fn sanitize_properties(payload: &[u8]) -> (Vec<u8>, Sanitized) {
    let (mut payload, mut sanitized) = (payload.to_vec(), Sanitized::default());
    let _ = sanitized.properties(&mut payload);
    (payload, sanitized)
}

#[test]
fn headers_nested_too_deep_are_quarantined() {
    let value = |kind, value: &[u8]| entry(b"name", kind, value);
    let number = |kind, size| value(kind, &[0xFF; 8][..size]);
    let mixed = value(b'A', &long(&[b"F", long(&value(b'V', b"")).as_slice()].concat()));
    let all: Vec<u8> = [
        number(b't', 1),
        number(b'b', 1),
        number(b'B', 1),
        number(b's', 2),
        number(b'U', 2),
        number(b'u', 2),
        number(b'I', 4),
        number(b'i', 4),
        number(b'f', 4),
        number(b'D', 5),
        number(b'l', 8),
        number(b'L', 8),
        number(b'd', 8),
        number(b'T', 8),
        value(b'V', b""),
        value(b'S', &long(b"\xFF")),
        value(b'x', &long(b"\xFF")),
        mixed,
    ]
    .concat();
    for (headers, is_quarantined) in [
        (Vec::new(), false),
        (all, false),
        (nested(64, b'F'), false),
        (nested(64, b'A'), false),
        (nested(65, b'F'), true),
        (nested(65, b'A'), true),
        (nested(15_000, b'F'), true),
        (entry(b"many", b'A', &long(&[b'V'; MAX_VALUES - 1])), false),
        (entry(b"many", b'A', &long(&[b'V'; MAX_VALUES])), true),
        // No broker sends these.
        ([value(b'?', b""), vec![0; 50]].concat(), true),
        ([value(b'S', &[0, 0, 1]), vec![0; 50]].concat(), true),
        (vec![9, 9], false),
    ] {
        let (payload, sanitized) = sanitize_properties(&content_header(&headers, b"id"));
        assert_eq!(sanitized.texts, 0);
        let fits = headers != [9, 9];
        let (rest, properties) = match parse_properties(&payload[12..]) {
            Ok(parsed) => parsed,
            Err(error) => {
                assert!(!fits, "{error:?}");
                continue;
            }
        };
        assert!(rest.is_empty());
        assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "text/plain");
        assert_eq!(properties.message_id().as_ref().unwrap().as_str(), "id");
        let names: Vec<_> =
            properties.headers().as_ref().unwrap().inner().keys().map(ToString::to_string).collect();
        assert_eq!(names == [QUARANTINED], is_quarantined, "{names:?}");
    }
}

#[test]
fn bytes_that_are_not_utf8_are_replaced() {
    let names = |name: &[u8]| {
        let inner = entry(name, b'V', b"");
        [entry("größe".as_bytes(), b'F', &long(&inner)), entry(b"other", b'S', &long(b"\xFC"))].concat()
    };
    let (payload, sanitized) = sanitize_properties(&content_header(&names(b"Gr\xFC\xDFe"), b"\xFF"));
    assert_eq!((payload, sanitized), (content_header(&names(b"Gr??e"), b"?"), Sanitized { texts: 2 }));

    for (key, becomes) in
        [(b"us\xE9rs".as_slice(), b"us?rs".as_slice()), ("usérs".as_bytes(), "usérs".as_bytes())]
    {
        let mut payload = delivery(key);
        sanitize(METHOD, &mut payload);
        assert_eq!(payload, delivery(becomes));
        let got = |key: &[u8]| {
            [&[0, 60, 0, 71], [0xFF; 9].as_slice(), &short(b"e"), &short(key), &[0xFF; 4]].concat()
        };
        let mut payload = got(key);
        sanitize(METHOD, &mut payload);
        assert_eq!(payload, got(becomes));
    }
}

/// RabbitMQ sends all fourteen properties, each as large as it can be.
#[tokio::test]
async fn all_properties_at_their_limits_fit_behind_oversize_headers() {
    let (head, texts) = ([0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9], short(&[b'x'; 255]));
    let whole = |headers: &[u8]| {
        let first = [texts.as_slice(), &texts, &long(headers), &[2, 9]].concat();
        let rest = [texts.repeat(4), vec![0; 8], texts.repeat(4)].concat();
        frame(CONTENT_HEADER, &[&head, [0xFF, 0xFC].as_slice(), &first, &rest].concat())
    };
    let sent = whole(&entry(b"bulk", b'S', &long(&[b'x'; 9000])));
    let expected = whole(&entry(QUARANTINED.as_bytes(), b'V', &[]));
    assert_eq!(read(8192, &sent, &[1000], &[1000]).await, expected);
}

/// Valid headers, some with one changed byte.
fn headers() -> impl Strategy<Value = Vec<u8>> {
    let sized = prop_oneof![
        Just((b'V', 0)),
        Just((b't', 1)),
        Just((b's', 2)),
        Just((b'I', 4)),
        Just((b'D', 5)),
        Just((b'T', 8)),
    ];
    let leaf = prop_oneof![
        (sized, any::<[u8; 8]>()).prop_map(|((kind, size), value)| (kind, value[..size].to_vec())),
        (prop_oneof![Just(b'S'), Just(b'x')], proptest::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(kind, value)| (kind, long(&value))),
    ];
    let name = prop_oneof![
        "[a-zß-ü-]{0,9}".prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 0..4),
    ];
    let named = name.clone();
    let value = leaf.prop_recursive(6, 40, 4, move |value| {
        let entries = proptest::collection::vec((named.clone(), value.clone()), 0..4).prop_map(|entries| {
            (
                b'F',
                long(
                    &entries
                        .iter()
                        .flat_map(|(name, (kind, value))| entry(name, *kind, value))
                        .collect::<Vec<u8>>(),
                ),
            )
        });
        let values = proptest::collection::vec(value, 0..4).prop_map(|values| {
            (
                b'A',
                long(
                    &values
                        .iter()
                        .flat_map(|(kind, value)| [&[*kind], value.as_slice()].concat())
                        .collect::<Vec<u8>>(),
                ),
            )
        });
        prop_oneof![entries, values]
    });
    let whole = proptest::collection::vec((name, value), 0..5).prop_map(|entries| {
        entries.iter().flat_map(|(name, (kind, value))| entry(name, *kind, value)).collect::<Vec<u8>>()
    });
    (whole, proptest::option::weighted(0.3, (any::<proptest::sample::Index>(), any::<u8>()))).prop_map(
        |(mut headers, changed)| {
            if let Some((index, byte)) = changed
                && !headers.is_empty()
            {
                let at = index.index(headers.len());
                headers[at] = byte;
            }
            headers
        },
    )
}

/// Any frame.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
    let text = || proptest::collection::vec(any::<u8>(), 0..12);
    let deep =
        (60..70_usize, prop_oneof![Just(b'A'), Just(b'F')]).prop_map(|(levels, kind)| nested(levels, kind));
    prop_oneof![
        text().prop_map(|key| frame(METHOD, &delivery(&key))),
        bytes().prop_map(|payload| frame(METHOD, &payload)),
        (prop_oneof![headers(), deep], text())
            .prop_map(|(headers, id)| frame(CONTENT_HEADER, &content_header(&headers, &id))),
        bytes().prop_map(|payload| frame(CONTENT_HEADER, &payload)),
        bytes().prop_map(|payload| frame(3, &payload)),
        Just(frame(8, &[])),
    ]
}

/// The frames, each sanitized as a whole.
fn expected(frames: &[Vec<u8>]) -> Vec<u8> {
    let sanitized = frames.iter().map(|frame| {
        let mut frame = frame.clone();
        let (kind, end) = (frame[0], frame.len() - 1);
        if matches!(kind, METHOD | CONTENT_HEADER) {
            sanitize(kind, &mut frame[FRAME_HEADER..end]);
        }
        frame
    });
    sanitized.collect::<Vec<_>>().concat()
}

/// What lapin reads of such chunks, with buffers of these sizes.
async fn read(frame_max: u32, bytes: &[u8], chunks: &[usize], buffers: &[usize]) -> Vec<u8> {
    let mut left = bytes;
    let mut cut = Vec::new();
    let mut sizes = chunks.iter().cycle();
    while !left.is_empty() {
        let (chunk, rest) = left.split_at(left.len().min(*sizes.next().unwrap()));
        cut.push(Ok::<_, io::Error>(chunk.to_vec()));
        left = rest;
    }
    let mut stream = stream::iter(cut).into_async_read();
    let (mut sanitizer, mut out) = (FrameSanitizer::new(frame_max), Vec::new());
    let mut sizes = buffers.iter().cycle();
    loop {
        let mut buffer = vec![0; *sizes.next().unwrap()];
        let read =
            std::future::poll_fn(|cx| sanitizer.poll_read(&mut stream, cx, &mut buffer)).await.unwrap();
        if read == 0 {
            return out;
        }
        out.extend(&buffer[..read]);
    }
}

proptest! {
    #[test]
    fn headers_are_accepted_if_lapin_parses_them(headers in headers()) {
        let (mut walked, mut sanitized) = (headers.clone(), Sanitized::default());
        let well = sanitized.headers(&mut walked).is_some();
        prop_assert_eq!(well, parses(&walked));
        if sanitized.texts == 0 {
            prop_assert_eq!(walked, headers);
        }
    }

    #[test]
    fn headers_larger_than_a_frame_are_removed(
        sizes in proptest::collection::vec(0..9000_usize, 1..4),
        by_broker in any::<bool>(),
        id in "[a-zß-ü]{0,20}",
        chunks in proptest::collection::vec(1..20_000_usize, 1..9),
        buffers in proptest::collection::vec(1..20_000_usize, 1..9),
    ) {
        let key = frame(METHOD, &delivery(b"key"));
        let (mut sent, mut expected) = (Vec::<u8>::new(), Vec::<u8>::new());
        let frame_max = if by_broker {
            // `connection.tune`.
            let tune = frame(METHOD, &[0, 10, 0, 30, 0xFF, 0xFF, 0, 0, 0x10, 0, 0, 10]);
            sent.extend(&tune);
            expected.extend(&tune);
            0
        } else {
            4096
        };
        for size in sizes {
            let headers = entry(b"bulk", b'S', &long(&vec![b'x'; size]));
            let whole = frame(CONTENT_HEADER, &content_header(&headers, id.as_bytes()));
            let mark = entry(QUARANTINED.as_bytes(), b'V', &[]);
            let without = frame(CONTENT_HEADER, &content_header(&mark, id.as_bytes()));
            expected.extend(if whole.len() > 4096 { &without } else { &whole });
            expected.extend(&key);
            sent.extend([whole, key.clone()].concat());
        }
        let read = tokio::runtime::Builder::new_current_thread().build().unwrap()
            .block_on(read(frame_max, &sent, &chunks, &buffers));
        prop_assert_eq!(read, expected);
    }

    #[test]
    fn frames_pass_unchanged_in_chunks_of_any_size(
        frames in proptest::collection::vec(any_frame(), 0..9),
        chunks in proptest::collection::vec(1..400_usize, 1..9),
        buffers in proptest::collection::vec(1..400_usize, 1..9),
    ) {
        let read = tokio::runtime::Builder::new_current_thread().build().unwrap()
            .block_on(read(0, &frames.concat(), &chunks, &buffers));
        prop_assert_eq!(read, expected(&frames));
    }

    #[test]
    fn quarantined_headers_leave_the_other_properties_unchanged(levels in 65..3000_usize, id in "[a-zß-ü]{0,20}") {
        let before = content_header(&nested(levels, b'F'), id.as_bytes());
        let (payload, sanitized) = sanitize_properties(&before);
        prop_assert_eq!(sanitized.texts, 0);
        prop_assert_eq!(payload.len(), before.len());
        let (rest, properties) = parse_properties(&payload[12..]).unwrap();
        prop_assert!(rest.is_empty());
        prop_assert_eq!(properties.message_id().as_ref().unwrap().as_str(), id);
        prop_assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "text/plain");
        let names: Vec<_> = properties.headers().as_ref().unwrap().inner().keys().map(ToString::to_string).collect();
        prop_assert_eq!(names, [QUARANTINED]);
    }
}
