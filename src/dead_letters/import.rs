//! Import: puts dead letters from a file into the queue.

use std::collections::{HashMap, HashSet, VecDeque};

use uuid::Uuid;

use crate::amqp::publisher::{Outgoing, Publisher, Sent};
use crate::amqp::{BrokerError, Settings, disconnect, envelope};
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::scan::{DeadLetterQueue, Disposition, Observer};

/// The result of an import.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    pub added: usize,
    /// Took the place of a dead letter with the same id and other content.
    pub replaced: usize,
    /// Already in the queue.
    pub present: usize,
}

/// Most unconfirmed publishes: enough to keep a broker busy (rabbitmq.md §2.4).
const WINDOW: usize = 100;

/// Puts dead letters into the queue. A dead letter that is already there stays. One with the same id and other content
/// is replaced. The same file can therefore be imported twice, and an import that was interrupted can be repeated.
///
/// # Errors
/// When the broker is gone or does not take a message. What was imported stays, and nothing without a successor was
/// deleted. [`BrokerError::Busy`] while a replay is running.
pub async fn import(
    settings: &Settings,
    letters: &[DeadLetter],
    observer: &mut Observer<'_>,
) -> Result<Imported, BrokerError> {
    let queue = DeadLetterQueue::connect(settings, "close-sync dlq").await?;
    let publishing = settings.connect("close-sync dlq publish").await?;
    let publisher = Publisher::new(&publishing).await?;
    let mut wanted: HashMap<&str, HashSet<Uuid>> = HashMap::new();
    for letter in letters {
        wanted.entry(&letter.id).or_default().insert(letter.content_id_without_replaces());
    }
    let (mut present, mut outdated) = (HashSet::new(), HashMap::<String, Vec<Uuid>>::new());
    // One scan for all: meanwhile other operators can neither take nor return a dead letter.
    let mut batch = queue
        .take(
            |letter| {
                let Some(contents) = wanted.get(letter.id.as_str()) else { return Disposition::Return };
                let content = letter.content_id_without_replaces();
                if contents.contains(&content) {
                    present.insert((letter.id.clone(), content));
                    return Disposition::Return;
                }
                outdated.entry(letter.id.clone()).or_default().push(letter.content_id());
                Disposition::Keep
            },
            observer,
        )
        .await?;
    let outcome = if batch.replaying {
        Err(BrokerError::Busy(
            "a replay is under way, and an import would not see the dead letters in its batch; try again when it has ended",
        ))
    } else {
        publish(settings, &publisher, letters, present, &outdated).await
    };
    let result = match outcome {
        Ok(imported) => batch.delete_those(|_| true).await.map(|_| imported),
        Err(error) => Err(error),
    };
    batch.close().await;
    queue.leave().await;
    disconnect(&publishing).await;
    result
}

/// Publishes the dead letters that are not in the queue yet.
async fn publish(
    settings: &Settings,
    publisher: &Publisher,
    letters: &[DeadLetter],
    mut present: HashSet<(String, Uuid)>,
    outdated: &HashMap<String, Vec<Uuid>>,
) -> Result<Imported, BrokerError> {
    let exchange = settings.dead_letter_queue();
    let mut imported = Imported::default();
    let mut unconfirmed: VecDeque<Sent> = VecDeque::with_capacity(WINDOW);
    for letter in letters {
        if !present.insert((letter.id.clone(), letter.content_id_without_replaces())) {
            imported.present += 1;
            continue;
        }
        let properties = if let Some(contents) = outdated.get(&letter.id) {
            imported.replaced += 1;
            envelope::for_replacing(&letter.restored_properties(), contents.iter().copied())
        } else {
            imported.added += 1;
            letter.restored_properties()
        };
        let message = Outgoing { exchange: &exchange, key: "", body: &letter.body, properties };
        unconfirmed.push_back(publisher.send(message));
        if unconfirmed.len() == WINDOW
            && let Some(first) = unconfirmed.pop_front()
        {
            first.confirmed().await?;
        }
    }
    for sent in unconfirmed {
        sent.confirmed().await?;
    }
    Ok(imported)
}
