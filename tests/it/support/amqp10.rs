//! A producer that speaks AMQP 1.0. RabbitMQ takes from it what it refuses from an AMQP 0-9-1 client.

use fe2o3_amqp::types::messaging::{ApplicationProperties, Message, Properties};
use fe2o3_amqp::types::primitives::{Binary, SimpleValue};
use fe2o3_amqp::{Connection, Sender, Session};

/// Publishes messages with these properties to an address, all with the same body. Each must be accepted.
pub(crate) async fn publish(
    amqp_url: &str,
    address: &str,
    body: &[u8],
    messages: Vec<(Properties, Vec<(String, SimpleValue)>)>,
) {
    let url = url::Url::parse(amqp_url).unwrap();
    let broker = format!(
        "amqp://{}:{}@{}:{}",
        url.username(),
        url.password().unwrap(),
        url.host_str().unwrap(),
        url.port().unwrap()
    );
    let mut connection = Connection::open("producer", broker.as_str()).await.unwrap();
    let mut session = Session::begin(&mut connection).await.unwrap();
    let mut sender = Sender::attach(&mut session, "producer", address).await.unwrap();
    for (properties, application) in messages {
        let mut all = ApplicationProperties::builder();
        for (name, value) in application {
            all = all.insert(name, value);
        }
        let message = Message::builder()
            .properties(properties)
            .application_properties(all.build())
            .data(Binary::from(body.to_vec()))
            .build();
        let outcome = sender.send(message).await.unwrap();
        assert!(outcome.is_accepted(), "{outcome:?}");
    }
    // All messages are accepted. A polite end could wait for ever: RabbitMQ 3.10 may answer to it in another order than the
    // client expects. Dropping the handles closes the connection.
}
