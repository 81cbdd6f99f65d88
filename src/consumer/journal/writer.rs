//! Appends entries to the journal in the background.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lapin::BasicProperties;
use tokio::sync::{Notify, mpsc, watch};
use uuid::Uuid;

use crate::amqp::BrokerError;
use crate::amqp::publisher::Outgoing;
use crate::close::Clock;
use crate::consumer::broker::Publish;
use crate::domain::journal::{Anchor, Batch, Entry, OrganizationHash, VERSION};
use crate::sync::journal::Journal;

/// The most entries in one message.
const MAX_BATCH: usize = 500;

/// A broker that works confirms much sooner.
const CONFIRMED_WITHIN: Duration = Duration::from_mins(1);
/// More entries than this do not wait for the end of an alarm.
const MAX_UNSTORED: usize = 50_000;

/// The entries that a session appends, in order.
pub(crate) struct Writer {
    session: Uuid,
    organization: Option<OrganizationHash>,
    clock: Clock,
    queue: Mutex<Queue>,
    wake: Notify,
    /// How many entries the broker has stored.
    stored: Progress,
    /// How many of them have been read back.
    read_back: Progress,
    /// RabbitMQ accepts no messages, because of an alarm.
    is_blocked: watch::Sender<bool>,
}

#[derive(Default)]
struct Queue {
    entries: Vec<Entry>,
    /// All entries so far.
    appended: u64,
    anchor: Option<Anchor>,
}

impl Writer {
    pub(crate) fn new(session: Uuid, organization: Option<OrganizationHash>, clock: Clock) -> Self {
        Self {
            session,
            organization,
            clock,
            queue: Mutex::default(),
            wake: Notify::new(),
            stored: Progress::default(),
            read_back: Progress::default(),
            is_blocked: watch::Sender::new(false),
        }
    }

    fn with<T>(&self, with: impl FnOnce(&mut Queue) -> T) -> T {
        with(&mut self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Appends in a task of its own until the session drops the receiver of `failures`, or an entry cannot be appended.
    pub(crate) fn spawn(
        self: Arc<Self>,
        publish: Arc<dyn Publish>,
        exchange: String,
        failures: mpsc::UnboundedSender<BrokerError>,
    ) {
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = failures.closed() => {}
                Err(error) = self.run(&*publish, &exchange) => {
                    let _ = failures.send(error);
                }
            }
        });
    }

    async fn run(
        &self,
        publish: &dyn Publish,
        exchange: &str,
    ) -> Result<std::convert::Infallible, BrokerError> {
        loop {
            self.wake.notified().await;
            while let Some(batch) = self.next() {
                let properties = BasicProperties::default().with_content_type("application/json".into());
                let body = batch.encode();
                let publish = publish.publish(Outgoing { exchange, key: "", body: &body, properties });
                self.unless_stuck(publish).await?;
                self.stored.reached(batch.appended);
            }
        }
    }

    /// Fails when the broker does not confirm for a while, unless it has an alarm.
    async fn unless_stuck(
        &self,
        publish: impl Future<Output = Result<(), BrokerError>>,
    ) -> Result<(), BrokerError> {
        let mut is_blocked = self.is_blocked.subscribe();
        let stuck = async {
            loop {
                let _ = is_blocked.wait_for(|is_blocked| !is_blocked).await;
                tokio::select! {
                    biased;
                    _ = is_blocked.wait_for(|is_blocked| *is_blocked) => {}
                    () = tokio::time::sleep(CONFIRMED_WITHIN) => return,
                }
            }
        };
        tokio::select! {
            biased;
            published = publish => published,
            () = stuck => Err(BrokerError::Unconfirmed("the journal does not answer")),
        }
    }

    fn next(&self) -> Option<Batch> {
        self.with(|queue| {
            let number = queue.entries.len().min(MAX_BATCH);
            let entries: Vec<Entry> = queue.entries.drain(..number).collect();
            let rest = queue.entries.len() as u64;
            (!entries.is_empty()).then(|| Batch {
                version: VERSION,
                session: self.session,
                organization: self.organization,
                anchor: queue.anchor,
                appended: queue.appended.saturating_sub(rest),
                at: Some(self.clock.now()),
                entries,
            })
        })
    }

    /// Sends what was appended.
    pub(crate) fn flush(&self) {
        self.wake.notify_one();
    }

    /// Where a successor begins to read.
    pub(crate) fn set_anchor(&self, anchor: Anchor) {
        self.with(|queue| queue.anchor = Some(anchor));
    }

    /// This many entries have been read back.
    pub(crate) fn read_back(&self, appended: u64) {
        self.read_back.reached(appended);
    }

    /// RabbitMQ has an alarm, or no longer.
    pub(crate) fn set_blocked(&self, is_blocked: bool) {
        self.is_blocked.send_replace(is_blocked);
    }

    pub(crate) fn is_blocked(&self) -> bool {
        *self.is_blocked.borrow()
    }

    async fn wait(&self, progress: &Progress) {
        let appended = self.with(|queue| queue.appended);
        if progress.has_reached(appended) {
            return;
        }
        self.flush();
        progress.wait_for(appended).await;
    }
}

/// A number that grows. The first to wait wakes first, so that runs in virtual time can be repeated.
#[derive(Default)]
struct Progress {
    number: AtomicU64,
    grown: Notify,
}

impl Progress {
    fn has_reached(&self, number: u64) -> bool {
        self.number.load(Ordering::Acquire) >= number
    }

    fn reached(&self, number: u64) {
        if self.number.fetch_max(number, Ordering::AcqRel) < number {
            self.grown.notify_waiters();
        }
    }

    async fn wait_for(&self, number: u64) {
        loop {
            let grown = self.grown.notified();
            if self.has_reached(number) {
                return;
            }
            grown.await;
        }
    }
}

impl Journal for Writer {
    fn append(&self, entries: Vec<Entry>) {
        self.with(|queue| {
            queue.appended += entries.len() as u64;
            queue.entries.extend(entries);
        });
    }

    /// During an alarm the times of events are stored later, so that updates can go on, up to a number of entries. If the
    /// worker dies before that, its successor lacks them.
    fn stored(&self) -> BoxFuture<'_, ()> {
        async {
            if self.with(|queue| queue.entries.len()) > MAX_UNSTORED {
                return self.wait(&self.stored).await;
            }
            let mut is_blocked = self.is_blocked.subscribe();
            tokio::select! {
                biased;
                () = self.wait(&self.stored) => {}
                _ = is_blocked.wait_for(|is_blocked| *is_blocked) => {}
            }
        }
        .boxed()
    }

    fn read_back(&self) -> BoxFuture<'_, ()> {
        self.wait(&self.read_back).boxed()
    }
}
