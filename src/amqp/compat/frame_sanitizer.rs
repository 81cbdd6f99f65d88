//! Sanitizes frames that lapin cannot parse, before lapin reads them.
//!
//! A producer can send two things that RabbitMQ accepts and lapin does not survive:
//!
//! - Deeply nested headers. lapin's parser recurses once per level, on a thread with a small stack. As many levels as
//!   fit into one frame crash the process.
//! - Short strings that are not UTF-8. One such byte ends the connection.
//!
//! The message would return to the queue and do the same to the next worker, for ever. So headers that are nested too
//! deep are quarantined: they become the text of one single header. Bytes that are not UTF-8 become `?`. The frame keeps
//! its length, and the message is processed like any other.
//!
//! Only method and content-header frames are buffered until they are complete; the broker's `frame_max` bounds them
//! (128 KiB by default). Bodies pass through uninspected.
//!
//! Delete this file when lapin's parser limits the depth of nested tables and accepts short strings that are not UTF-8.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::io::AsyncRead;

use crate::amqp::envelope::QUARANTINED;

/// The limit of nested tables and arrays, the headers themselves included. lapin's stack has room for many more.
const MAX_DEPTH: usize = 64;

/// The bytes before the payload of a frame: type, channel and size.
const FRAME_HEADER: usize = 7;
/// The types of frames that are inspected.
const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;

/// A state machine over the bytes the broker sends.
#[derive(Default)]
pub(crate) struct FrameSanitizer {
    /// The header of the current frame, as far as it has arrived.
    header: Vec<u8>,
    /// How many bytes pass through before the next frame header.
    passing: usize,
    /// The payload being buffered, as far as it has arrived.
    buffered: Vec<u8>,
    /// How much of the complete buffer the reader has received.
    drained: Option<usize>,
}

impl FrameSanitizer {
    /// Reads from the stream and returns sanitized bytes.
    pub(crate) fn poll_read(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(drained) = self.drain(buffer) {
                return Poll::Ready(Ok(drained));
            }
            // While a payload is being buffered, do not read beyond its end.
            let limit =
                if self.buffered.is_empty() { buffer.len() } else { buffer.len().min(self.missing()) };
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer[..limit]))?;
            let passed = self.pass(&mut buffer[..read]);
            if passed > 0 || read == 0 {
                return Poll::Ready(Ok(passed));
            }
        }
    }

    /// Processes bytes in place. Returns how many the reader gets now; the rest is buffered.
    fn pass(&mut self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &mut bytes[at..];
            if self.passing > 0 {
                let pass = self.passing.min(rest.len());
                self.passing -= pass;
                at += pass;
            } else if self.header.len() < FRAME_HEADER {
                self.header.push(rest[0]);
                at += 1;
                if self.header.len() == FRAME_HEADER && !matches!(self.header[0], METHOD | CONTENT_HEADER) {
                    self.passing = self.missing();
                    self.next_frame();
                }
            } else if self.buffered.is_empty() && rest.len() >= self.missing() {
                let size = self.missing();
                sanitize(self.header[0], &mut rest[..size]);
                at += size;
                self.next_frame();
            } else {
                self.buffered.extend_from_slice(rest);
                if self.missing() == 0 {
                    sanitize(self.header[0], &mut self.buffered);
                    self.drained = Some(0);
                    self.next_frame();
                }
                return at;
            }
        }
        at
    }

    /// How many bytes of the payload have not arrived.
    fn missing(&self) -> usize {
        let size = self.header.last_chunk().map_or(0, |size| u32::from_be_bytes(*size));
        usize::try_from(size).unwrap_or(usize::MAX) - self.buffered.len()
    }

    /// Starts over after a payload. One more byte ends the frame.
    fn next_frame(&mut self) {
        self.passing += 1;
        self.header.clear();
    }

    /// Copies from the buffer, once the payload in it is complete.
    fn drain(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let drained = self.drained?;
        let rest = &self.buffered[drained..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.drained = Some(drained + count);
        if drained + count == self.buffered.len() {
            (self.buffered, self.drained) = (Vec::new(), None);
        }
        Some(count)
    }
}

/// Sanitizes a payload of this frame type in place, and logs what it changed.
fn sanitize(kind: u8, payload: &mut [u8]) {
    let mut sanitized = Sanitized::default();
    // lapin reports a payload that ends too early.
    let _ = if kind == METHOD { sanitized.delivery(payload) } else { sanitized.properties(payload) };
    let Sanitized { texts, quarantined } = sanitized;
    if texts > 0 {
        tracing::warn!(
            event = "properties_replaced",
            texts,
            "message has properties or header names that are not UTF-8, replaced their non-ASCII bytes with `?`"
        );
    }
    if quarantined > 0 {
        tracing::warn!(
            event = "headers_quarantined",
            bytes = quarantined,
            "message has unreadable headers, processing it without them"
        );
    }
}

/// What was changed in a payload.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sanitized {
    /// The number of short strings with replaced bytes.
    texts: usize,
    /// The size of quarantined headers, in bytes.
    quarantined: usize,
}

/// The wire format of a message property.
enum Property {
    Text,
    Headers,
    /// A number with this many bytes.
    Number(usize),
}

/// In the order of their flags, starting with the highest bit.
const PROPERTIES: [Property; 14] = {
    use Property::{Headers, Number, Text};
    // Content type and encoding, headers; delivery mode, priority; correlation id, reply to, expiration, message id;
    // timestamp; type, user id, app id, cluster id.
    [Text, Text, Headers, Number(1), Number(1), Text, Text, Text, Text, Number(8), Text, Text, Text, Text]
};

impl Sanitized {
    /// Sanitizes exchange and routing key, in the method frame that starts a delivery.
    fn delivery(&mut self, payload: &mut [u8]) -> Option<()> {
        let mut rest = Reader(payload);
        match rest.take(4)? {
            // `basic.deliver` starts with the consumer tag.
            [0, 60, 0, 60] => self.text(&mut rest)?,
            // `basic.get-ok`.
            [0, 60, 0, 71] => {}
            _ => return None,
        }
        // Delivery tag.
        rest.take(8)?;
        // Redelivered.
        rest.take(1)?;
        self.text(&mut rest)?;
        self.text(&mut rest)
    }

    /// Sanitizes the properties of a message, in a content-header frame.
    fn properties(&mut self, payload: &mut [u8]) -> Option<()> {
        let mut rest = Reader(payload);
        // Class, weight and body size.
        rest.take(2 + 2 + 8)?;
        let flags = u16::from_be_bytes(*rest.take(2)?.first_chunk()?);
        for (property, bit) in PROPERTIES.iter().zip((0..16).rev()) {
            if flags & (1 << bit) == 0 {
                continue;
            }
            match property {
                Property::Text => self.text(&mut rest)?,
                Property::Number(size) => {
                    rest.take(*size)?;
                }
                Property::Headers => {
                    let size = rest.length()?;
                    let headers = rest.take(size)?;
                    if self.headers(headers).is_none() {
                        self.quarantined += quarantine(headers);
                    }
                }
            }
        }
        Some(())
    }

    /// Walks headers as lapin's parser does. `None` if they are nested too deep or malformed.
    fn headers(&mut self, headers: &mut [u8]) -> Option<()> {
        // For each level: its remaining bytes, and whether its values have names.
        let mut levels = vec![(Reader(headers), true)];
        while let Some((rest, named)) = levels.last_mut() {
            if rest.0.is_empty() {
                levels.pop();
                continue;
            }
            if *named {
                self.text(rest)?;
            }
            let kind = rest.byte()?;
            let size = match kind {
                b'V' => 0,
                b't' | b'b' | b'B' => 1,
                b's' | b'U' | b'u' => 2,
                b'I' | b'i' | b'f' => 4,
                b'D' => 5,
                b'l' | b'L' | b'd' | b'T' => 8,
                b'S' | b'x' | b'A' | b'F' => rest.length()?,
                _ => return None,
            };
            let value = rest.take(size)?;
            if matches!(kind, b'A' | b'F') {
                if levels.len() == MAX_DEPTH {
                    return None;
                }
                levels.push((Reader(value), kind == b'F'));
            }
        }
        Some(())
    }

    /// A short string, at most 255 bytes.
    fn text(&mut self, rest: &mut Reader) -> Option<()> {
        let size = rest.byte()?;
        let text = rest.take(size.into())?;
        if std::str::from_utf8(text).is_err() {
            self.texts += 1;
            text.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'?');
        }
        Some(())
    }
}

/// The unread rest of a payload.
struct Reader<'a>(&'a mut [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, size: usize) -> Option<&'a mut [u8]> {
        self.0.split_off_mut(..size)
    }

    fn byte(&mut self) -> Option<u8> {
        self.0.split_off_first_mut().copied()
    }

    /// The length prefix of a long string, a table or an array.
    fn length(&mut self) -> Option<usize> {
        usize::try_from(u32::from_be_bytes(*self.take(4)?.first_chunk()?)).ok()
    }
}

/// Replaces all headers by a single text header that keeps most of their bytes. Returns their size.
fn quarantine(headers: &mut [u8]) -> usize {
    let all = headers.len();
    let entry = || {
        // The name with its length, `S` for a text, and the length of the text.
        let rest = all.checked_sub(1 + QUARANTINED.len() + 1 + 4)?;
        let (name, rest) = (u8::try_from(QUARANTINED.len()).ok()?, u32::try_from(rest).ok()?);
        Some([&[name], QUARANTINED.as_bytes(), b"S", &rest.to_be_bytes()].concat())
    };
    // Headers this short cannot be nested too deep.
    let Some(entry) = entry() else { return 0 };
    headers[..entry.len()].copy_from_slice(&entry);
    all
}

#[cfg(test)]
mod tests {
    use futures_util::{TryStreamExt, stream};
    use lapin::protocol::basic::parse_properties;
    use lapin::types::parsing::parse_field_table;
    use proptest::prelude::*;

    use super::*;

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
            // No broker sends these.
            ([value(b'?', b""), vec![0; 50]].concat(), true),
            ([value(b'S', &[0, 0, 1]), vec![0; 50]].concat(), true),
            (vec![9, 9], false),
        ] {
            let (payload, sanitized) = sanitize_properties(&content_header(&headers, b"id"));
            let quarantined = if is_quarantined { headers.len() } else { 0 };
            assert_eq!(sanitized, Sanitized { texts: 0, quarantined });
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
        assert_eq!(
            (payload, sanitized),
            (content_header(&names(b"Gr??e"), b"?"), Sanitized { texts: 2, quarantined: 0 })
        );

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
            let entries =
                proptest::collection::vec((named.clone(), value.clone()), 0..4).prop_map(|entries| {
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
        let deep = (60..70_usize, prop_oneof![Just(b'A'), Just(b'F')])
            .prop_map(|(levels, kind)| nested(levels, kind));
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
    async fn read(bytes: &[u8], chunks: &[usize], buffers: &[usize]) -> Vec<u8> {
        let mut left = bytes;
        let mut cut = Vec::new();
        let mut sizes = chunks.iter().cycle();
        while !left.is_empty() {
            let (chunk, rest) = left.split_at(left.len().min(*sizes.next().unwrap()));
            cut.push(Ok::<_, io::Error>(chunk.to_vec()));
            left = rest;
        }
        let mut stream = stream::iter(cut).into_async_read();
        let (mut sanitizer, mut out) = (FrameSanitizer::default(), Vec::new());
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
        fn frames_pass_unchanged_in_chunks_of_any_size(
            frames in proptest::collection::vec(any_frame(), 0..9),
            chunks in proptest::collection::vec(1..400_usize, 1..9),
            buffers in proptest::collection::vec(1..400_usize, 1..9),
        ) {
            let read = tokio::runtime::Builder::new_current_thread().build().unwrap()
                .block_on(read(&frames.concat(), &chunks, &buffers));
            prop_assert_eq!(read, expected(&frames));
        }

        #[test]
        fn quarantined_headers_leave_the_other_properties_unchanged(levels in 65..3000_usize, id in "[a-zß-ü]{0,20}") {
            let before = content_header(&nested(levels, b'F'), id.as_bytes());
            let (payload, sanitized) = sanitize_properties(&before);
            prop_assert!(sanitized.quarantined > 0);
            prop_assert_eq!(payload.len(), before.len());
            let (rest, properties) = parse_properties(&payload[12..]).unwrap();
            prop_assert!(rest.is_empty());
            prop_assert_eq!(properties.message_id().as_ref().unwrap().as_str(), id);
            prop_assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "text/plain");
            prop_assert_eq!(properties.headers().as_ref().unwrap().inner().len(), 1);
        }
    }
}
