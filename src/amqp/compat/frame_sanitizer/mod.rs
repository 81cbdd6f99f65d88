//! Sanitizes frames that lapin cannot parse, before lapin reads them.
//!
//! A producer can send four things that RabbitMQ accepts and lapin does not survive:
//!
//! - Deeply nested headers. lapin's parser recurses once per level, on a thread with a small stack. As many levels as
//!   fit into one frame crash the process.
//! - Headers of many small values. In memory they take thirty times their bytes, for each message that waits.
//! - Short strings that are not UTF-8. One such byte ends the connection.
//! - Headers as large as a frame. RabbitMQ adds headers of its own when it delivers a message again, and takes headers
//!   of any size from AMQP 1.0 producers, but sends all headers in one frame. A frame larger than negotiated ends the
//!   connection.
//!
//! The message would return to the queue and do the same to the next worker, for ever. So headers that are nested too
//! deep or too many are quarantined: they become the text of one single header. Bytes that are not UTF-8 become `?`.
//! Headers that are too large are removed while they arrive, and a mark takes their place. The message is processed like
//! any other. The consumer logs it.
//!
//! Only method and content-header frames are buffered until they are complete, up to the negotiated `frame_max`
//! (128 KiB by default). Bodies pass through uninspected.
//!
//! Delete this folder when lapin's parser limits the depth of nested tables and accepts short strings that are not UTF-8
//! and larger frames.

mod payload;
#[cfg(test)]
mod tests;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::io::AsyncRead;

use crate::amqp::compat::frame_sanitizer::payload::{
    START_OF_PROPERTIES, frame_max, remove_headers, sanitize,
};

/// The bytes before the payload of a frame: type, channel and size.
const FRAME_HEADER: usize = 7;
/// The types of frames that are inspected.
const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;

/// A state machine over the bytes the broker sends.
pub(crate) struct FrameSanitizer {
    /// The largest frame that lapin accepts, in bytes.
    frame_max: usize,
    /// How many bytes pass through before the next frame.
    passing: usize,
    /// A frame that did not arrive in one piece, or has to be changed in size.
    buffered: Vec<u8>,
    /// What of it is arriving.
    arriving: Option<Arriving>,
    /// How much of the complete buffer the reader has received.
    drained: Option<usize>,
    /// What was read beyond the end of a buffered frame.
    unread: Vec<u8>,
}

/// A part of the frame that is being buffered.
#[derive(Clone, Copy)]
struct Arriving {
    part: Part,
    /// How many bytes of the part have not arrived.
    missing: usize,
}

#[derive(Clone, Copy)]
enum Part {
    FrameHeader,
    /// The first properties of a frame that is too large. The payload has `size` bytes.
    FirstProperties {
        size: usize,
    },
    /// The headers of a frame that is too large, which are not kept. `rest` bytes follow.
    OversizeHeaders {
        rest: usize,
    },
    /// The rest of the payload.
    Payload,
}

impl FrameSanitizer {
    /// `frame_max` is the client's limit in bytes, or 0 if it has none. The broker's limit is in a method that it sends.
    pub(crate) fn new(frame_max: u32) -> Self {
        Self {
            frame_max: limit(frame_max),
            passing: 0,
            buffered: Vec::new(),
            arriving: None,
            drained: None,
            unread: Vec::new(),
        }
    }

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
            // While a frame is being buffered, do not read beyond its end.
            let limit = self.arriving.map_or(buffer.len(), |arriving| buffer.len().min(arriving.missing));
            let read = if self.unread.is_empty() {
                ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer[..limit]))?
            } else {
                let read = self.unread.len().min(limit);
                buffer[..read].copy_from_slice(&self.unread[..read]);
                self.unread.drain(..read);
                read
            };
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
            if self.passing > 0 && self.arriving.is_none() {
                let pass = self.passing.min(rest.len());
                self.passing -= pass;
                at += pass;
                continue;
            }
            let whole = if self.arriving.is_none() { Frame::read(rest) } else { None };
            match whole {
                Some(frame) if !frame.is_inspected() => {
                    self.passing = frame.end().saturating_add(1);
                }
                Some(frame) if frame.end() <= rest.len() && !self.is_oversize(&frame) => {
                    self.inspect(frame.kind, &mut rest[FRAME_HEADER..frame.end()]);
                    self.passing = 1;
                    at += frame.end();
                }
                _ => {
                    let beyond = self.buffer(rest);
                    self.unread.splice(..0, beyond.iter().copied());
                    return at;
                }
            }
        }
        at
    }

    /// Buffers bytes of one frame. Returns those beyond its end.
    fn buffer<'a>(&mut self, mut bytes: &'a [u8]) -> &'a [u8] {
        let start = Arriving { part: Part::FrameHeader, missing: FRAME_HEADER };
        let mut arriving = self.arriving.take().unwrap_or(start);
        loop {
            let (more, rest) = bytes.split_at(bytes.len().min(arriving.missing));
            if !matches!(arriving.part, Part::OversizeHeaders { .. }) {
                self.buffered.extend_from_slice(more);
            }
            arriving.missing -= more.len();
            bytes = rest;
            if arriving.missing > 0 {
                self.arriving = Some(arriving);
                return bytes;
            }
            let Some(next) = self.next(arriving.part) else {
                self.drained = Some(0);
                return bytes;
            };
            arriving = next;
        }
    }

    /// The part that follows a complete one. `None` if the reader may have what is buffered.
    fn next(&mut self, part: Part) -> Option<Arriving> {
        match part {
            Part::FrameHeader => {
                let frame = Frame::read(&self.buffered)?;
                if !frame.is_inspected() {
                    self.passing = frame.size.saturating_add(1);
                    return None;
                }
                let size = frame.size;
                Some(if self.is_oversize(&frame) {
                    Arriving { part: Part::FirstProperties { size }, missing: size.min(START_OF_PROPERTIES) }
                } else {
                    Arriving { part: Part::Payload, missing: size }
                })
            }
            Part::FirstProperties { size } => {
                let arrived = self.buffered.len() - FRAME_HEADER;
                let Some((missing, rest)) = remove_headers(&mut self.buffered, FRAME_HEADER, size) else {
                    // lapin reports the frame.
                    self.passing = (size - arrived).saturating_add(1);
                    return None;
                };
                Some(Arriving { part: Part::OversizeHeaders { rest }, missing })
            }
            Part::OversizeHeaders { rest } => {
                let size = u32::try_from(self.buffered.len() - FRAME_HEADER + rest).unwrap_or(u32::MAX);
                self.buffered[FRAME_HEADER - 4..FRAME_HEADER].copy_from_slice(&size.to_be_bytes());
                Some(Arriving { part: Part::Payload, missing: rest })
            }
            Part::Payload => {
                let mut buffered = std::mem::take(&mut self.buffered);
                self.inspect(buffered[0], &mut buffered[FRAME_HEADER..]);
                self.buffered = buffered;
                self.passing = 1;
                None
            }
        }
    }

    fn inspect(&mut self, kind: u8, payload: &mut [u8]) {
        if kind == METHOD
            && let Some(offered) = frame_max(payload)
        {
            self.frame_max = self.frame_max.min(limit(offered));
        }
        sanitize(kind, payload);
    }

    fn is_oversize(&self, frame: &Frame) -> bool {
        frame.kind == CONTENT_HEADER && frame.end() >= self.frame_max
    }

    /// Copies from the buffer, once what is in it is complete.
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

/// In AMQP 0 means no limit, and no limit is lower than 4096.
fn limit(frame_max: u32) -> usize {
    if frame_max == 0 { usize::MAX } else { usize::try_from(frame_max).unwrap_or(usize::MAX).max(4096) }
}

/// The header of a frame.
struct Frame {
    kind: u8,
    /// The size of the payload, in bytes.
    size: usize,
}

impl Frame {
    fn read(bytes: &[u8]) -> Option<Self> {
        let header: &[u8; FRAME_HEADER] = bytes.first_chunk()?;
        let [kind, _, _, size @ ..] = *header;
        Some(Self { kind, size: usize::try_from(u32::from_be_bytes(size)).unwrap_or(usize::MAX) })
    }

    fn is_inspected(&self) -> bool {
        matches!(self.kind, METHOD | CONTENT_HEADER)
    }

    /// Where its payload ends. One byte more ends the frame.
    fn end(&self) -> usize {
        FRAME_HEADER.saturating_add(self.size)
    }
}
