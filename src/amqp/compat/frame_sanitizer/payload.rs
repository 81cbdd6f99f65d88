//! The payloads of frames: what lapin cannot parse is replaced in place, and headers that are too large are removed.

use crate::amqp::compat::frame_sanitizer::METHOD;
use crate::amqp::envelope::QUARANTINED;

/// The limit of nested tables and arrays, the headers themselves included. lapin's stack has room for many more.
const MAX_DEPTH: usize = 64;
/// The limit of values in the headers. A value can have one byte in a frame, and takes about a hundred in memory.
pub(super) const MAX_VALUES: usize = 1000;

/// How much of a payload is needed to find its headers: class, weight, body size, flags, two texts, and a length.
pub(super) const START_OF_PROPERTIES: usize = 2 + 2 + 8 + 2 + 2 * (1 + 255) + 4;
/// The limit of all properties behind the headers: eight texts and three numbers.
const REST_OF_PROPERTIES: usize = 8 * (1 + 255) + 1 + 1 + 8;

/// The limit for frames that the broker offers, in the method `connection.tune`.
pub(super) fn frame_max(payload: &mut [u8]) -> Option<u32> {
    let mut rest = Reader(payload);
    if rest.take(4)? != [0, 10, 0, 30] {
        return None;
    }
    // The limit of channels.
    rest.take(2)?;
    Some(u32::from_be_bytes(*rest.take(4)?.first_chunk()?))
}

/// Removes the headers from a payload of which only the start is buffered, from `at` on, and puts a mark in their place.
/// The whole payload has `size` bytes. Returns how many bytes of headers are still to come, and how many bytes follow
/// them. `None` if the payload is not that of a message with large headers.
pub(super) fn remove_headers(buffered: &mut Vec<u8>, at: usize, size: usize) -> Option<(usize, usize)> {
    let start = buffered.get_mut(at..)?;
    let arrived = start.len();
    let mut rest = Reader(start);
    for property in properties(&mut rest)? {
        match property {
            Property::Text => drop(rest.text()?),
            Property::Number(_) => return None,
            Property::Headers => break,
        }
    }
    let headers = rest.length()?;
    let before = arrived - rest.0.len();
    let missing = headers.checked_sub(rest.0.len())?;
    let behind = size.checked_sub(before)?.checked_sub(headers)?;
    if behind > REST_OF_PROPERTIES {
        return None;
    }
    buffered.truncate(at + before - 4);
    let name = QUARANTINED.as_bytes();
    let mark = [&[u8::try_from(name.len()).ok()?], name, b"V"].concat();
    buffered.extend_from_slice(&u32::try_from(mark.len()).ok()?.to_be_bytes());
    buffered.extend_from_slice(&mark);
    Some((missing, behind))
}

/// Sanitizes a payload of this frame type in place, and logs what it changed.
pub(super) fn sanitize(kind: u8, payload: &mut [u8]) {
    let mut sanitized = Sanitized::default();
    // lapin reports a payload that ends too early.
    let _ = if kind == METHOD { sanitized.delivery(payload) } else { sanitized.properties(payload) };
    let texts = sanitized.texts;
    if texts > 0 {
        tracing::warn!(
            event = "properties_replaced",
            texts,
            "message has properties or header names that are not UTF-8, replaced their non-ASCII bytes with `?`"
        );
    }
}

/// What was changed in a payload.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sanitized {
    /// The number of short strings with replaced bytes.
    pub(super) texts: usize,
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

/// The properties that a message has, in their order. Reads the payload up to the first one.
fn properties(rest: &mut Reader) -> Option<impl Iterator<Item = &'static Property> + use<>> {
    // Class, weight and body size.
    rest.take(2 + 2 + 8)?;
    let flags = u16::from_be_bytes(*rest.take(2)?.first_chunk()?);
    let is_set = move |(_, bit): &(&Property, u32)| flags & (1 << bit) != 0;
    Some(PROPERTIES.iter().zip((0..16).rev()).filter(is_set).map(|(property, _)| property))
}

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
    pub(super) fn properties(&mut self, payload: &mut [u8]) -> Option<()> {
        let mut rest = Reader(payload);
        for property in properties(&mut rest)? {
            match property {
                Property::Text => self.text(&mut rest)?,
                Property::Number(size) => {
                    rest.take(*size)?;
                }
                Property::Headers => {
                    let size = rest.length()?;
                    let headers = rest.take(size)?;
                    if self.headers(headers).is_none() {
                        quarantine(headers);
                    }
                }
            }
        }
        Some(())
    }

    /// Walks headers as lapin's parser does. `None` if they are nested too deep, too many or malformed.
    pub(super) fn headers(&mut self, headers: &mut [u8]) -> Option<()> {
        // For each level: its remaining bytes, and whether its values have names.
        let mut levels = vec![(Reader(headers), true)];
        let mut values = 0;
        while let Some((rest, named)) = levels.last_mut() {
            if rest.0.is_empty() {
                levels.pop();
                continue;
            }
            values += 1;
            if values > MAX_VALUES {
                return None;
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

    fn text(&mut self, rest: &mut Reader) -> Option<()> {
        let text = rest.text()?;
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

    /// A short string, at most 255 bytes.
    fn text(&mut self) -> Option<&'a mut [u8]> {
        let size = self.byte()?;
        self.take(size.into())
    }

    /// The length prefix of a long string, a table or an array.
    fn length(&mut self) -> Option<usize> {
        usize::try_from(u32::from_be_bytes(*self.take(4)?.first_chunk()?)).ok()
    }
}

/// Replaces all headers by a single text header that keeps most of their bytes.
fn quarantine(headers: &mut [u8]) {
    let all = headers.len();
    let entry = || {
        // The name with its length, `S` for a text, and the length of the text.
        let rest = all.checked_sub(1 + QUARANTINED.len() + 1 + 4)?;
        let (name, rest) = (u8::try_from(QUARANTINED.len()).ok()?, u32::try_from(rest).ok()?);
        Some([&[name], QUARANTINED.as_bytes(), b"S", &rest.to_be_bytes()].concat())
    };
    // Headers this short cannot be nested too deep.
    if let Some(entry) = entry() {
        headers[..entry.len()].copy_from_slice(&entry);
    }
}
