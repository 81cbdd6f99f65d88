//! A session that works without the journal although there is one: its node has no replica to read, for example. Often it
//! can append nevertheless. Then later sessions learn that they do not know what this one creates.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use lapin::BasicProperties;
use strum::VariantArray;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::amqp::Settings;
use crate::amqp::publisher::Outgoing;
use crate::consumer::broker::Publish;
use crate::domain::journal::{Batch, ChangeKind, Entry, VERSION};
use crate::sync::Worker;

/// A successor waits for search at most this much longer than `close.search_lag`.
const REPEATED_AFTER: Duration = Duration::from_mins(1);

/// Says so in the journal until it is dropped, or the journal refuses it.
pub(crate) struct Absence {
    _task: AbortOnDropHandle<()>,
}

impl Absence {
    pub(crate) fn report(
        worker: Worker,
        session: Uuid,
        publish: Arc<dyn Publish>,
        settings: &Settings,
    ) -> Self {
        let exchange = settings.journal_queue();
        let task = tokio::spawn(async move {
            loop {
                let body = forgotten(&worker, session).encode();
                let properties = BasicProperties::default().with_content_type("application/json".into());
                let outgoing = Outgoing { exchange: &exchange, key: "", body: &body, properties };
                if let Err(error) = publish.publish(outgoing).await {
                    tracing::debug!(%error, "the journal cannot be appended to either");
                    return;
                }
                tokio::time::sleep(REPEATED_AFTER).await;
            }
        });
        Self { _task: AbortOnDropHandle::new(task) }
    }
}

/// What this session creates until the next report is not in the journal. Search shows it as if there were none.
fn forgotten(worker: &Worker, session: Uuid) -> Batch {
    let after = |start: Timestamp, time| start.saturating_add(time).unwrap_or(Timestamp::MAX);
    let at = after(worker.now(), REPEATED_AFTER);
    let until = after(at, worker.settings().search_lag);
    let entries = ChangeKind::VARIANTS.iter().map(|change| Entry::Forgotten { change: *change, at, until });
    Batch {
        version: VERSION,
        session,
        organization: super::organization(worker),
        anchor: None,
        appended: 0,
        at: Some(worker.now()),
        entries: entries.collect(),
    }
}
