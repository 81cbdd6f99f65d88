//! Publishers whose messages are in flight together.

use std::collections::BTreeSet;

use close_sync::amqp::publisher::{Outgoing, Publisher};
use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, LongInt, ShortString};

use crate::support::{Bench, connect};

const MESSAGES: usize = 3000;

/// RabbitMQ returns some of the messages, refuses some, and confirms many at once. Neither names the message.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_confirmed_is_in_a_queue() {
    let bench = Bench::new().await;
    let (stored, full) = (queue(&bench, None).await, queue(&bench, Some(50)).await);
    let connection = connect(&bench.amqp_url).await.unwrap();
    let publisher = Publisher::new(&connection).await.unwrap();
    let publishing: Vec<_> = (0..MESSAGES)
        .map(|number| {
            let key = [stored.as_str(), full.as_str(), "a queue that does not exist"][number % 3].to_owned();
            let publisher = publisher.clone();
            tokio::spawn(async move {
                let (body, properties) = (number.to_string(), BasicProperties::default());
                let message = Outgoing { exchange: "", key: &key, body: body.as_bytes(), properties };
                publisher.publish_with_timeout(message).await.is_ok()
            })
        })
        .collect();
    let mut confirmed = BTreeSet::new();
    for (number, publish) in publishing.into_iter().enumerate() {
        if publish.await.unwrap() {
            confirmed.insert(number);
        }
    }
    let mut found = messages(&bench, stored).await;
    found.extend(messages(&bench, full).await);
    let lost: Vec<_> = confirmed.difference(&found).collect();
    assert!(lost.is_empty(), "{} of {} confirmed messages are lost: {lost:?}", lost.len(), confirmed.len());
    assert!(!confirmed.is_empty());
}

/// A queue that refuses messages above this number.
async fn queue(bench: &Bench, limit: Option<LongInt>) -> ShortString {
    let mut arguments = FieldTable::default();
    if let Some(limit) = limit {
        arguments.insert("x-max-length".into(), limit.into());
        arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    }
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    bench.channel().await.queue_declare("".into(), options, arguments).await.unwrap().name().clone()
}

async fn messages(bench: &Bench, queue: ShortString) -> BTreeSet<usize> {
    let (channel, mut found) = (bench.channel().await, BTreeSet::new());
    while let Some(message) =
        channel.basic_get(queue.clone(), BasicGetOptions { no_ack: true }).await.unwrap()
    {
        found.insert(std::str::from_utf8(&message.delivery.data).unwrap().parse().unwrap());
    }
    found
}
