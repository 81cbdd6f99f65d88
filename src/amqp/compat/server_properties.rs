//! What a broker says of itself when a connection opens.
//!
//! It is the broker's first frame; lapin reads it and keeps it to itself. So the frame is overheard on its way, by
//! the stream handed to lapin (`wire.rs`). Asking on a connection of its own instead would leave a warning in the
//! broker's log each time.

use std::sync::{Arc, Mutex, PoisonError};

use lapin::protocol::connection::AMQPMethod;
use lapin::protocol::{AMQPClass, parse_class};
use lapin::types::AMQPValue;

use crate::amqp::server_info::ServerInfo;

/// The first frame, as far as it has arrived. Nothing after it is kept: that may be personal data.
#[derive(Clone, Default)]
pub(crate) struct Heard(Arc<Mutex<Vec<u8>>>);

impl Heard {
    /// No greeting is longer.
    const MOST: usize = 64 * 1024;

    pub(crate) fn note(&self, bytes: &[u8]) {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if heard.len() == Self::MOST || payload(&heard).is_some() {
                return;
            }
            heard.push(*byte);
        }
    }

    pub(crate) fn broker(&self) -> ServerInfo {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        payload(&heard).and_then(greeting).unwrap_or_default()
    }
}

/// The payload of a frame that is there as a whole. Before it come the type, the channel and the size.
fn payload(frame: &[u8]) -> Option<&[u8]> {
    let (head, rest) = frame.split_first_chunk::<7>()?;
    let [_, _, _, size @ ..] = *head;
    rest.get(..usize::try_from(u32::from_be_bytes(size)).ok()?)
}

fn greeting(payload: &[u8]) -> Option<ServerInfo> {
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

    /// A frame of method `class`.`method` with these server properties, as RabbitMQ sends it.
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
    fn the_greeting_is_read_however_it_is_cut_and_nothing_after_it_is_kept() {
        let greeting = frame(START, &[("product", "RabbitMQ"), ("version", "4.3.6")]);
        let bytes = [greeting.as_slice(), b"personal data"].concat();
        for piece in [1, 7, 20, bytes.len()] {
            let heard = Heard::default();
            bytes.chunks(piece).for_each(|bytes| heard.note(bytes));
            assert_eq!(heard.broker(), ServerInfo { product: "RabbitMQ".into(), version: "4.3.6".into() });
            assert!(heard.0.lock().unwrap().len() < greeting.len());
        }
    }

    #[test]
    fn what_is_no_greeting_tells_nothing() {
        let half = frame(START, &[("product", "RabbitMQ")]);
        let other = frame([0, 10, 0, 30], &[("product", "RabbitMQ")]);
        for bytes in [b"HTTP/1.1 400 Bad Request".as_slice(), b"", &half[..20], &other] {
            let heard = Heard::default();
            heard.note(bytes);
            assert_eq!(heard.broker(), ServerInfo::default());
        }
        assert_eq!(greeting(&frame(START, &[])[7..]), Some(ServerInfo::default()));
    }
}
