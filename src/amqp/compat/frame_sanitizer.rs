//! Frames on their way to lapin, which does not survive everything a producer may send.
//!
//! Its parser calls itself for each level of nested headers, on a thread with a small stack: as many levels as fit
//! into one frame end the process. And it takes every short text for UTF-8, which the broker asks of no producer: one
//! other byte ends the connection. The message would go back to the queue, and do the same to the next worker, for
//! ever. So what lapin cannot read is altered on its way: headers nested too deep become the text of a single one, and
//! other bytes become `?`. The frame keeps its length, and the message is worked on as any other.
//!
//! Only the frames that hold such things are kept back until they are whole, which the broker's `frame_max` bounds
//! (128 KiB by default). Bodies, which are most of what comes, are counted and not looked at.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::io::AsyncRead;

use crate::amqp::envelope::QUARANTINED;

/// Levels of tables and arrays in a message's headers, these included. Nobody needs so many, and a lot more fit on
/// lapin's stack.
const MOST_LEVELS: usize = 64;

/// Type, channel and size come before the payload of a frame.
const HEAD: usize = 7;
/// The types of frames that are looked at.
const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;

/// Reads frames, and alters what lapin could not read.
#[derive(Default)]
pub(crate) struct Frames {
    /// Of the next frame, what has passed of its head.
    head: Vec<u8>,
    /// Bytes that pass before anything is looked at again.
    passing: usize,
    /// What has come of a payload that is kept back.
    held: Vec<u8>,
    /// How much of it was handed out, once it was whole.
    handed: Option<usize>,
}

impl Frames {
    /// Reads as the stream does, with the frames altered.
    pub(crate) fn poll_read(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(handed) = self.hand_out(buffer) {
                return Poll::Ready(Ok(handed));
            }
            // Not beyond the end of what is kept back: what is read has to fit in behind it.
            let most = if self.held.is_empty() { buffer.len() } else { buffer.len().min(self.missing()) };
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer[..most]))?;
            let passed = self.pass(&mut buffer[..read]);
            if passed > 0 || read == 0 {
                return Poll::Ready(Ok(passed));
            }
        }
    }

    /// How many of the bytes that were read may pass; the others are kept back.
    fn pass(&mut self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &mut bytes[at..];
            if self.passing > 0 {
                let pass = self.passing.min(rest.len());
                self.passing -= pass;
                at += pass;
            } else if self.head.len() < HEAD {
                self.head.push(rest[0]);
                at += 1;
                if self.head.len() == HEAD && !matches!(self.head[0], METHOD | CONTENT_HEADER) {
                    self.passing = self.missing();
                    self.next_frame();
                }
            } else if self.held.is_empty() && rest.len() >= self.missing() {
                let size = self.missing();
                mend(self.head[0], &mut rest[..size]);
                at += size;
                self.next_frame();
            } else {
                self.held.extend_from_slice(rest);
                if self.missing() == 0 {
                    mend(self.head[0], &mut self.held);
                    self.handed = Some(0);
                    self.next_frame();
                }
                return at;
            }
        }
        at
    }

    /// What has not come of the payload.
    fn missing(&self) -> usize {
        let size = self.head.last_chunk().map_or(0, |size| u32::from_be_bytes(*size));
        usize::try_from(size).unwrap_or(usize::MAX) - self.held.len()
    }

    /// The payload is over; one byte ends the frame.
    fn next_frame(&mut self) {
        self.passing += 1;
        self.head.clear();
    }

    /// What was kept back, once it is whole.
    fn hand_out(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let handed = self.handed?;
        let rest = &self.held[handed..];
        let most = rest.len().min(buffer.len());
        buffer[..most].copy_from_slice(&rest[..most]);
        self.handed = Some(handed + most);
        if handed + most == self.held.len() {
            (self.held, self.handed) = (Vec::new(), None);
        }
        Some(most)
    }
}

/// Alters what lapin could not read in a payload of this type, and tells of it.
fn mend(kind: u8, payload: &mut [u8]) {
    let mut mended = Mended::default();
    // What ends too early is not for us to judge.
    let _ = if kind == METHOD { mended.delivery(payload) } else { mended.properties(payload) };
    let Mended { texts, aside } = mended;
    if texts > 0 {
        tracing::warn!(
            texts,
            "a message has texts that are not UTF-8: what is not ASCII in them becomes `?`"
        );
    }
    if aside > 0 {
        tracing::warn!(
            bytes = aside,
            "a message has headers that cannot be read: it is worked on without them"
        );
    }
}

/// What was altered.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mended {
    /// Short texts.
    texts: usize,
    /// Bytes of headers that are set aside.
    aside: usize,
}

/// A property of a message.
enum Property {
    Text,
    Headers,
    /// A number of so many bytes.
    Number(usize),
}

/// In the order of their flags, from the highest bit on.
const PROPERTIES: [Property; 14] = {
    use Property::{Headers, Number, Text};
    // Content type and encoding, headers; delivery mode, priority; correlation id, reply to, expiration, message id;
    // timestamp; type, user id, app id, cluster id.
    [Text, Text, Headers, Number(1), Number(1), Text, Text, Text, Text, Number(8), Text, Text, Text, Text]
};

impl Mended {
    /// What a producer has a part in of the method that begins a delivery: exchange and routing key.
    fn delivery(&mut self, payload: &mut [u8]) -> Option<()> {
        let mut rest = Rest(payload);
        match rest.take(4)? {
            // `basic.deliver` begins with the consumer's tag.
            [0, 60, 0, 60] => self.text(&mut rest)?,
            // `basic.get-ok`.
            [0, 60, 0, 71] => {}
            _ => return None,
        }
        // The delivery's tag.
        rest.take(8)?;
        // Whether it comes again.
        rest.take(1)?;
        self.text(&mut rest)?;
        self.text(&mut rest)
    }

    /// The properties of a message, in a content header.
    fn properties(&mut self, payload: &mut [u8]) -> Option<()> {
        let mut rest = Rest(payload);
        // Class, weight, and the size of the body.
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
                        self.aside += set_aside(headers);
                    }
                }
            }
        }
        Some(())
    }

    /// Walks through headers as lapin's parser does. `None` when they are nested too deep, or are none.
    fn headers(&mut self, headers: &mut [u8]) -> Option<()> {
        // Of each level, what is left of it, and whether its values have names.
        let mut levels = vec![(Rest(headers), true)];
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
                if levels.len() == MOST_LEVELS {
                    return None;
                }
                levels.push((Rest(value), kind == b'F'));
            }
        }
        Some(())
    }

    /// A text of 255 bytes at most.
    fn text(&mut self, rest: &mut Rest) -> Option<()> {
        let size = rest.byte()?;
        let text = rest.take(size.into())?;
        if std::str::from_utf8(text).is_err() {
            self.texts += 1;
            text.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'?');
        }
        Some(())
    }
}

/// What is left of something.
struct Rest<'a>(&'a mut [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, size: usize) -> Option<&'a mut [u8]> {
        self.0.split_off_mut(..size)
    }

    fn byte(&mut self) -> Option<u8> {
        self.0.split_off_first_mut().copied()
    }

    /// The length in front of a long text, a table or an array.
    fn length(&mut self) -> Option<usize> {
        usize::try_from(u32::from_be_bytes(*self.take(4)?.first_chunk()?)).ok()
    }
}

/// Makes one header of all, whose text is what was behind its name. Returns the size of them.
fn set_aside(headers: &mut [u8]) -> usize {
    let all = headers.len();
    let entry = || {
        // A name and its length, `S` for a text, and the length of that.
        let rest = all.checked_sub(1 + QUARANTINED.len() + 1 + 4)?;
        let (name, rest) = (u8::try_from(QUARANTINED.len()).ok()?, u32::try_from(rest).ok()?);
        Some([&[name], QUARANTINED.as_bytes(), b"S", &rest.to_be_bytes()].concat())
    };
    // Headers too short for it are nested nowhere: no broker sends those.
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

    /// One value of this type, with its name.
    fn entry(name: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
        [short(name).as_slice(), &[kind], value].concat()
    }

    /// Headers of so many levels, of tables or of arrays.
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
        // Not ASCII: a number is no text.
        let tag = [0xFF; 9];
        [&head, short(b"tag").as_slice(), &tag, &short(b"identify"), &short(key)].concat()
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[kind, 0, 1], long(payload).as_slice(), &[0xCE]].concat()
    }

    fn parses(headers: &[u8]) -> bool {
        parse_field_table(long(headers).as_slice()).is_ok()
    }

    /// What a payload becomes.
    fn mended(payload: &[u8]) -> (Vec<u8>, Mended) {
        let (mut payload, mut mended) = (payload.to_vec(), Mended::default());
        let _ = mended.properties(&mut payload);
        (payload, mended)
    }

    #[test]
    fn headers_are_read_to_a_depth() {
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
        for (headers, aside) in [
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
            let (payload, mended) = mended(&content_header(&headers, b"id"));
            assert_eq!(mended, Mended { texts: 0, aside: if aside { headers.len() } else { 0 } });
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
            assert_eq!(names == [QUARANTINED], aside, "{names:?}");
        }
    }

    #[test]
    fn what_is_no_text_becomes_one() {
        let names = |name: &[u8]| {
            let inner = entry(name, b'V', b"");
            [entry("größe".as_bytes(), b'F', &long(&inner)), entry(b"other", b'S', &long(b"\xFC"))].concat()
        };
        let (payload, mended) = mended(&content_header(&names(b"Gr\xFC\xDFe"), b"\xFF"));
        assert_eq!(
            (payload, mended),
            (content_header(&names(b"Gr??e"), b"?"), Mended { texts: 2, aside: 0 })
        );

        for (key, becomes) in
            [(b"us\xE9rs".as_slice(), b"us?rs".as_slice()), ("usérs".as_bytes(), "usérs".as_bytes())]
        {
            let mut payload = delivery(key);
            mend(METHOD, &mut payload);
            assert_eq!(payload, delivery(becomes));
            let got = |key: &[u8]| {
                [&[0, 60, 0, 71], [0xFF; 9].as_slice(), &short(b"e"), &short(key), &[0xFF; 4]].concat()
            };
            let mut payload = got(key);
            mend(METHOD, &mut payload);
            assert_eq!(payload, got(becomes));
        }
    }

    /// Headers in lapin's encoding, some of them with a byte that was changed.
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

    /// A frame as it comes.
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

    /// The frames one by one, each altered as a whole.
    fn expected(frames: &[Vec<u8>]) -> Vec<u8> {
        let altered = frames.iter().map(|frame| {
            let mut frame = frame.clone();
            let (kind, end) = (frame[0], frame.len() - 1);
            if matches!(kind, METHOD | CONTENT_HEADER) {
                mend(kind, &mut frame[HEAD..end]);
            }
            frame
        });
        altered.collect::<Vec<_>>().concat()
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
        let (mut frames, mut out) = (Frames::default(), Vec::new());
        let mut sizes = buffers.iter().cycle();
        loop {
            let mut buffer = vec![0; *sizes.next().unwrap()];
            let read =
                std::future::poll_fn(|cx| frames.poll_read(&mut stream, cx, &mut buffer)).await.unwrap();
            if read == 0 {
                return out;
            }
            out.extend(&buffer[..read]);
        }
    }

    proptest! {
        #[test]
        fn a_walk_ends_as_lapins_does(headers in headers()) {
            let (mut walked, mut mended) = (headers.clone(), Mended::default());
            let well = mended.headers(&mut walked).is_some();
            prop_assert_eq!(well, parses(&walked));
            if mended.texts == 0 {
                prop_assert_eq!(walked, headers);
            }
        }

        #[test]
        fn frames_pass_whole_however_they_are_cut(
            frames in proptest::collection::vec(any_frame(), 0..9),
            chunks in proptest::collection::vec(1..400_usize, 1..9),
            buffers in proptest::collection::vec(1..400_usize, 1..9),
        ) {
            let read = tokio::runtime::Builder::new_current_thread().build().unwrap()
                .block_on(read(&frames.concat(), &chunks, &buffers));
            prop_assert_eq!(read, expected(&frames));
        }

        #[test]
        fn headers_set_aside_leave_the_rest_as_it_is(levels in 65..3000_usize, id in "[a-zß-ü]{0,20}") {
            let before = content_header(&nested(levels, b'F'), id.as_bytes());
            let (payload, told) = mended(&before);
            prop_assert!(told.aside > 0);
            prop_assert_eq!(payload.len(), before.len());
            let (rest, properties) = parse_properties(&payload[12..]).unwrap();
            prop_assert!(rest.is_empty());
            prop_assert_eq!(properties.message_id().as_ref().unwrap().as_str(), id);
            prop_assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "text/plain");
            prop_assert_eq!(properties.headers().as_ref().unwrap().inner().len(), 1);
        }
    }
}
