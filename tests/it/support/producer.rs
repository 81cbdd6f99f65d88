//! A producer that sends messages that no client library can send.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A connection with one channel. It writes raw AMQP frames.
pub(crate) struct Producer(TcpStream);

impl Producer {
    /// Logs in as the user of the URL.
    pub(crate) async fn connect(amqp_url: &str) -> Self {
        let url = url::Url::parse(amqp_url).unwrap();
        let address = (url.host_str().unwrap(), url.port().unwrap());
        let mut producer = Self(TcpStream::connect(address).await.unwrap());
        producer.0.write_all(b"AMQP\0\0\x09\x01").await.unwrap();
        producer.answer([0, 10, 0, 10]).await;
        let login = format!("\0{}\0{}", url.username(), url.password().unwrap());
        let start = [&[0; 4], text(b"PLAIN").as_slice(), &long(login.as_bytes()), &text(b"en_US")].concat();
        producer.method(0, [0, 10, 0, 11], &start).await;
        let limits = producer.answer([0, 10, 0, 30]).await;
        // The limits that the broker proposes, without a heartbeat.
        producer.method(0, [0, 10, 0, 31], &[&limits[..6], &[0, 0]].concat()).await;
        producer.method(0, [0, 10, 0, 40], &[text(b"/").as_slice(), &[0, 0]].concat()).await;
        producer.answer([0, 10, 0, 41]).await;
        producer.method(1, [0, 20, 0, 10], &[0]).await;
        producer.answer([0, 20, 0, 11]).await;
        producer.method(1, [0, 85, 0, 10], &[0]).await;
        producer.answer([0, 85, 0, 11]).await;
        producer
    }

    /// Publishes. `properties` are raw bytes as in a content header: the flags, then the values.
    pub(crate) async fn publish(&mut self, exchange: &str, key: &[u8], properties: &[u8], body: &[u8]) {
        assert!(self.try_publish(exchange, key, properties, body).await, "RabbitMQ refused the message");
    }

    /// Publishes. Returns whether RabbitMQ took the message. If it did not, the connection is of no use any more.
    pub(crate) async fn try_publish(
        &mut self,
        exchange: &str,
        key: &[u8],
        properties: &[u8],
        body: &[u8],
    ) -> bool {
        let to = [&[0, 0], text(exchange.as_bytes()).as_slice(), &text(key), &[0]].concat();
        self.method(1, [0, 60, 0, 40], &to).await;
        let size = u64::try_from(body.len()).unwrap().to_be_bytes();
        self.frame(2, 1, &[&[0, 60, 0, 0], size.as_slice(), properties].concat()).await;
        self.frame(3, 1, body).await;
        matches!(self.read().await.as_deref(), Some([0, 60, 0, 80, ..]))
    }

    async fn method(&mut self, channel: u8, method: [u8; 4], arguments: &[u8]) {
        self.frame(1, channel, &[&method, arguments].concat()).await;
    }

    async fn frame(&mut self, kind: u8, channel: u8, payload: &[u8]) {
        let frame = [&[kind, 0, channel], long(payload).as_slice(), &[0xCE]].concat();
        // A refusal is in the answer.
        let _ = self.0.write_all(&frame).await;
    }

    /// Reads the next method and returns its arguments.
    async fn answer(&mut self, method: [u8; 4]) -> Vec<u8> {
        let payload = self.read().await.expect("an answer");
        assert_eq!(payload[..4], method, "{}", String::from_utf8_lossy(&payload));
        payload[4..].to_vec()
    }

    /// Reads the payload of the next frame, and the byte that ends the frame. `None` if the connection is closed.
    async fn read(&mut self) -> Option<Vec<u8>> {
        let mut head = [0; 7];
        self.0.read_exact(&mut head).await.ok()?;
        let [_, _, _, size @ ..] = head;
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes(size)).unwrap() + 1];
        self.0.read_exact(&mut payload).await.ok()?;
        Some(payload)
    }
}

/// Encodes a short string.
pub(crate) fn text(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

/// Encodes a long string, a table or an array.
pub(crate) fn long(bytes: &[u8]) -> Vec<u8> {
    [u32::try_from(bytes.len()).unwrap().to_be_bytes().as_slice(), bytes].concat()
}

/// Headers with tables nested this many levels deep.
pub(crate) fn nested(levels: usize) -> Vec<u8> {
    let mut headers = Vec::new();
    for inner in (0..levels).rev() {
        // An empty name, a type and a length have six bytes.
        headers.extend(u32::try_from(inner * 6).unwrap().to_be_bytes());
        if inner > 0 {
            headers.extend([0, b'F']);
        }
    }
    headers
}
