//! The journal of a bench: what earlier workers would have appended, and what is appended now.

use close_sync::domain::journal::{Batch, ChangeKind, Entry, KeyHash, RecordId, VERSION};
use close_sync::domain::mapping::Key;
use close_sync::domain::staleness::FieldHash;
use futures_util::StreamExt;
use jiff::{SignedDuration, Timestamp};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Confirmation};
use tokio::sync::watch;
use uuid::Uuid;

use super::Bench;

/// Entries of one creation.
pub(crate) const ENTRIES: usize = 6;

/// Appends to the journal what earlier workers would have, about creations that search does not show.
pub(crate) struct Past<'a> {
    bench: &'a Bench,
    session: Uuid,
    created: u64,
    began: bool,
}

impl<'a> Past<'a> {
    pub(crate) fn new(bench: &'a Bench) -> Self {
        Self { bench, session: Uuid::now_v7(), created: 0, began: false }
    }

    /// Appends the start of a worker, a day ago. So the journal counts as old, and nothing is missing from it.
    pub(crate) async fn begin(&mut self) {
        let batch = self.encode(Vec::new());
        self.publish(vec![batch]).await;
    }

    /// Appends creations, this many in one message.
    pub(crate) async fn append(&mut self, creations: usize, in_one: usize) {
        let mut batches = Vec::new();
        let mut left = creations;
        while left > 0 {
            let number = left.min(in_one);
            batches.push(self.batch(number));
            left -= number;
        }
        self.publish(batches).await;
    }

    /// Appends creations, each in two messages: before it and after it.
    pub(crate) async fn append_bytes(&mut self, bytes: usize) {
        let mut batches: Vec<Vec<u8>> = Vec::new();
        let mut size = 0;
        while size < bytes {
            let mut entries = self.creation();
            let after = entries.split_off(1);
            for entries in [entries, after] {
                let batch = self.encode(entries);
                size += batch.len();
                batches.push(batch);
            }
        }
        self.publish(batches).await;
    }

    /// Appends that a record was created now.
    pub(crate) async fn append_creation(&mut self, id: &str, key: Key) {
        let record = RecordId::try_from(id.to_owned()).unwrap();
        let keys = vec![KeyHash::of(&key)];
        let entry = Entry::Keys { record, keys, change: ChangeKind::Creation, at: Timestamp::now() };
        let batch = self.encode(vec![entry]);
        self.publish(vec![batch]).await;
    }

    fn batch(&mut self, creations: usize) -> Vec<u8> {
        let entries = (0..creations).flat_map(|_| self.creation()).collect();
        self.encode(entries)
    }

    fn encode(&mut self, mut entries: Vec<Entry>) -> Vec<u8> {
        if !std::mem::replace(&mut self.began, true) {
            let at = Timestamp::now() - SignedDuration::from_hours(24);
            entries.insert(0, Entry::Start { at });
        }
        let batch = Batch {
            version: VERSION,
            session: self.session,
            organization: None,
            anchor: None,
            appended: 0,
            at: None,
            entries,
        };
        batch.encode()
    }

    /// The entries of a creation.
    fn creation(&mut self) -> Vec<Entry> {
        self.created += 1;
        let number = self.created;
        let at = Timestamp::now() - SignedDuration::from_hours(1);
        let record = |id: String| RecordId::try_from(id).unwrap();
        let lead = record(format!("lead_{number:043}"));
        let contact = record(format!("cont_{number:043}"));
        let company = [Key::Company(format!("past {number}"))];
        let person = [Key::User(format!("past {number}")), Key::Email(format!("past{number}@x.test"))];
        let (company, person) = (KeyHash::of_all(&company), KeyHash::of_all(&person));
        let keys = company.iter().chain(&person).copied().collect();
        let operation = Uuid::now_v7();
        let written = |record: &RecordId, fields: &[&str]| Entry::Written {
            record: record.clone(),
            at,
            fields: fields.iter().map(|field| FieldHash::of(field)).collect(),
            stored: None,
            updated: Some(at),
        };
        let keys_of = |record: &RecordId, keys: Vec<KeyHash>| Entry::Keys {
            record: record.clone(),
            keys,
            change: ChangeKind::Creation,
            at,
        };
        vec![
            Entry::Creating { operation, keys, lead: true, at },
            keys_of(&lead, company),
            keys_of(&contact, person),
            Entry::Settled { operation },
            written(&lead, &["name", "custom.cf_leadcompanyid"]),
            written(&contact, &["name", "emails", "custom.cf_contactuserid"]),
        ]
    }

    async fn publish(&self, batches: Vec<Vec<u8>>) {
        let channel = self.bench.channel().await;
        let exchange = format!("{}.journal", self.bench.queue);
        let mut unconfirmed = std::collections::VecDeque::new();
        for batch in batches {
            let properties = BasicProperties::default().with_delivery_mode(2);
            let (exchange, options) = (exchange.as_str().into(), BasicPublishOptions::default());
            unconfirmed.push_back(
                channel.basic_publish(exchange, "".into(), options, &batch, properties).await.unwrap(),
            );
            if unconfirmed.len() == 1000 {
                assert_eq!(unconfirmed.pop_front().unwrap().await.unwrap(), Confirmation::Ack(None));
            }
        }
        for confirm in unconfirmed {
            assert_eq!(confirm.await.unwrap(), Confirmation::Ack(None));
        }
    }
}

/// A complete checkpoint.
#[derive(Clone, Copy, Debug)]
struct Checkpoint {
    ended: Timestamp,
    bytes: usize,
}

/// Reads the journal as it grows, and notes the last checkpoint that a successor would begin with.
pub(crate) struct JournalReader(watch::Receiver<Option<Checkpoint>>);

impl JournalReader {
    pub(crate) async fn of(bench: &Bench) -> Self {
        let channel = bench.channel().await;
        channel.basic_qos(1000, BasicQosOptions::default()).await.unwrap();
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), AMQPValue::LongString("next".into()));
        let name = format!("{}.journal", bench.queue);
        let options = BasicConsumeOptions::default();
        let mut messages = channel.basic_consume(name.into(), "".into(), options, arguments).await.unwrap();
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            let (mut begins, mut bytes, mut complete) = (0, 0, None);
            while let Some(Ok(message)) = messages.next().await {
                message.acker.ack(BasicAckOptions::default()).await.unwrap();
                let headers = message.properties.headers().as_ref().unwrap();
                let position = headers.inner()["x-stream-offset"].as_long_long_int().unwrap();
                bytes += message.data.len();
                let Ok(batch) = Batch::decode(&message.data) else { continue };
                for entry in &batch.entries {
                    if matches!(entry, Entry::CheckpointBegin { .. }) {
                        (begins, bytes, complete) = (position, message.data.len(), None);
                    }
                    if matches!(entry, Entry::CheckpointEnd { .. }) {
                        complete = Some(Checkpoint { ended: Timestamp::now(), bytes });
                    }
                }
                if complete.is_some()
                    && batch.anchor.map(|anchor| anchor.position) == u64::try_from(begins).ok()
                {
                    sender.send_replace(complete);
                }
            }
        });
        Self(receiver)
    }

    /// Waits for a checkpoint that ended after this time. Returns its size in bytes.
    pub(crate) async fn checkpoint_since(&self, time: Timestamp) -> usize {
        let mut checkpoints = self.0.clone();
        let is_later = |last: &Option<Checkpoint>| last.is_some_and(|checkpoint| checkpoint.ended > time);
        let found = tokio::time::timeout(super::TIMEOUT, checkpoints.wait_for(is_later)).await;
        found.expect("a checkpoint").unwrap().unwrap().bytes
    }
}
