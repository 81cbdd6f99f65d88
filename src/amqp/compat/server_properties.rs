//! The broker's server properties: its product and version.
//!
//! The broker sends them in `connection.start`, its first frame. lapin reads the frame but does not expose its content.
//! So the stream under lapin copies the frame as it passes. A separate connection to read the properties would leave a
//! warning in the broker's log each time.
//!
//! Delete this file when lapin exposes the server properties of a connection.

use std::sync::{Arc, Mutex, PoisonError};

use lapin::protocol::connection::AMQPMethod;
use lapin::protocol::{AMQPClass, parse_class};
use lapin::types::AMQPValue;

use crate::amqp::server_info::ServerInfo;

/// The first frame, as far as it has arrived. Later bytes are not kept: they may be personal data.
#[derive(Clone, Default)]
pub(crate) struct FirstFrame(Arc<Mutex<Vec<u8>>>);

impl FirstFrame {
    /// More than a broker sends in `connection.start`.
    const MAX_BYTES: usize = 64 * 1024;

    pub(crate) fn record(&self, bytes: &[u8]) {
        let mut frame = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if frame.len() == Self::MAX_BYTES || payload(&frame).is_some() {
                return;
            }
            frame.push(*byte);
        }
    }

    pub(crate) fn server(&self) -> ServerInfo {
        let frame = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        payload(&frame).and_then(parse).unwrap_or_default()
    }
}

/// The payload of a complete frame. Type, channel and size come before it.
fn payload(frame: &[u8]) -> Option<&[u8]> {
    let (head, rest) = frame.split_first_chunk::<7>()?;
    let [_, _, _, size @ ..] = *head;
    rest.get(..usize::try_from(u32::from_be_bytes(size)).ok()?)
}

fn parse(payload: &[u8]) -> Option<ServerInfo> {
    let Ok((_, AMQPClass::Connection(AMQPMethod::Start(start)))) = parse_class(payload) else { return None };
    let text = |name: &str| match start.server_properties.inner().get(name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => String::new(),
    };
    Some(ServerInfo { product: text("product"), version: text("version") })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A method frame with these server properties, as RabbitMQ sends it.
    fn frame(method: [u8; 4], properties: &[(&str, &str)]) -> Vec<u8> {
        let mut table = Vec::new();
        for (name, value) in properties {
            table.push(u8::try_from(name.len()).unwrap());
            table.extend(name.bytes());
            table.push(b'S');
            table.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
            table.extend(value.bytes());
        }
        let mut payload = [method.as_slice(), &[0, 9]].concat();
        payload.extend(u32::try_from(table.len()).unwrap().to_be_bytes());
        payload.extend(table);
        for list in ["PLAIN", "en_US"] {
            payload.extend(u32::try_from(list.len()).unwrap().to_be_bytes());
            payload.extend(list.bytes());
        }
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[1, 0, 0], size.as_slice(), &payload, &[0xCE]].concat()
    }

    const START: [u8; 4] = [0, 10, 0, 10];

    #[test]
    fn the_first_frame_is_read_in_pieces_and_nothing_after_it_is_kept() {
        let start = frame(START, &[("product", "RabbitMQ"), ("version", "4.3.6")]);
        let bytes = [start.as_slice(), b"personal data"].concat();
        for piece in [1, 7, 20, bytes.len()] {
            let first = FirstFrame::default();
            bytes.chunks(piece).for_each(|bytes| first.record(bytes));
            assert_eq!(first.server(), ServerInfo { product: "RabbitMQ".into(), version: "4.3.6".into() });
            assert!(first.0.lock().unwrap().len() < start.len());
        }
    }

    #[test]
    fn other_bytes_yield_no_server_properties() {
        let half = frame(START, &[("product", "RabbitMQ")]);
        let other = frame([0, 10, 0, 30], &[("product", "RabbitMQ")]);
        for bytes in [b"HTTP/1.1 400 Bad Request".as_slice(), b"", &half[..20], &other] {
            let first = FirstFrame::default();
            first.record(bytes);
            assert_eq!(first.server(), ServerInfo::default());
        }
        assert_eq!(parse(&frame(START, &[])[7..]), Some(ServerInfo::default()));
    }
}
