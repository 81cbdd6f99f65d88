//! Edit: replaces the bodies of dead letters.
//!
//! An edited copy is published first and the old dead letter is deleted then. If the process is killed in between, both
//! are in the queue. The copy names in a header what it replaces, and the next edit, replay or discard deletes that.

use std::collections::HashMap;

use jiff::Timestamp;
use uuid::Uuid;

use crate::amqp::envelope::MAX_ORIGINAL;
use crate::amqp::publisher::{Outgoing, Publisher};
use crate::amqp::{BrokerError, Settings, disconnect, envelope};
use crate::dead_letters::filter::Selection;
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::scan::{DeadLetterQueue, Disposition, Observer};

/// Whether the original body can be kept with an edited one.
pub fn is_editable(letter: &DeadLetter) -> bool {
    letter.original().is_some() || letter.body.len() <= MAX_ORIGINAL
}

/// The result of an edit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edited {
    Done {
        matched: usize,
        /// Dead letters whose body is different now.
        changed: usize,
        /// A replay is running, so its batch was not edited.
        replaying: bool,
    },
    /// Nothing was changed, because one of them cannot be edited.
    Refused {
        /// The dead letter that cannot be edited.
        id: String,
        why: String,
    },
}

/// Replaces the bodies of the selected dead letters and keeps the originals in a header. `change` returns the new body,
/// `None` to leave it, or the reason why it cannot be changed. If it returns a reason for one of them, none is edited.
///
/// # Errors
/// When the broker is gone or does not take a message. That dead letter and the following ones stay as they were.
pub async fn edit(
    settings: &Settings,
    selection: &Selection,
    change: impl Fn(&DeadLetter) -> Result<Option<Vec<u8>>, String>,
    observer: &mut Observer<'_>,
) -> Result<Edited, BrokerError> {
    let queue = DeadLetterQueue::connect(settings, "close-sync dlq").await?;
    let publishing = settings.connect("close-sync dlq publish").await?;
    let publisher = Publisher::new(&publishing).await?;
    complete(&queue, observer).await?;
    let (mut batch, matched) = queue.take_selected(selection, |_| Disposition::Keep, observer).await?;
    let replaying = batch.replaying;
    let result = async {
        let mut edits = Vec::new();
        while let Some(held) = batch.next() {
            let edited = change(&held.letter).and_then(|body| match body {
                Some(_) if !is_editable(&held.letter) => Err(format!(
                    "the body has more than {MAX_ORIGINAL} bytes, so the original cannot be kept with the edited one; export, edit the file and import it"
                )),
                body => Ok(body),
            });
            match edited {
                Ok(Some(body)) => edits.push((held, body)),
                Ok(None) => {}
                Err(why) => return Ok(Edited::Refused { id: held.letter.id, why }),
            }
        }
        let changed = edits.len();
        for (held, body) in edits {
            let letter = &held.letter;
            let properties = envelope::for_edited(
                &letter.restored_properties(),
                &letter.body,
                letter.content_id(),
                Timestamp::now(),
            );
            let exchange = settings.dead_letter_queue();
            publisher
                .publish_with_timeout(Outgoing { exchange: &exchange, key: "", body: &body, properties })
                .await?;
            held.delete().await?;
        }
        Ok(Edited::Done { matched, changed, replaying })
    };
    let result = result.await;
    batch.close().await;
    queue.leave().await;
    disconnect(&publishing).await;
    result
}

/// Completes edits and imports that were interrupted between the confirm of a copy and the deletion of what it replaces.
/// A message that RabbitMQ itself dead-lettered has no id of its own, so both copies stay.
pub(crate) async fn complete(
    queue: &DeadLetterQueue<'_>,
    observer: &mut Observer<'_>,
) -> Result<(), BrokerError> {
    let mut seen = Replaced::default();
    let collect = |letter: &DeadLetter| {
        seen.add(letter);
        Disposition::Return
    };
    queue.take(collect, observer).await?.close().await;
    if seen.0.is_empty() {
        return Ok(());
    }
    // Another operator may have taken a copy in the meantime, so only a copy in the same batch counts.
    let mut current = Replaced::default();
    let decide = |letter: &DeadLetter| {
        current.add(letter);
        if seen.contains(letter) { Disposition::Keep } else { Disposition::Return }
    };
    let mut batch = queue.take(decide, observer).await?;
    let deleted = batch.delete_those(|letter| current.contains(letter)).await;
    batch.close().await;
    deleted.map(|_| ())
}

/// `complete` over a connection of its own.
///
/// # Errors
/// When the broker is gone.
pub async fn complete_interrupted(
    settings: &Settings,
    observer: &mut Observer<'_>,
) -> Result<(), BrokerError> {
    let queue = DeadLetterQueue::connect(settings, "close-sync dlq").await?;
    complete(&queue, observer).await?;
    queue.leave().await;
    Ok(())
}

/// What edited or imported copies replace: contents by id.
#[derive(Default)]
pub(crate) struct Replaced(HashMap<String, Vec<Uuid>>);

impl Replaced {
    pub(crate) fn add(&mut self, letter: &DeadLetter) {
        let contents = letter.replaces();
        if !contents.is_empty() {
            self.0.entry(letter.id.clone()).or_default().extend(contents);
        }
    }

    /// Whether a copy replaces this dead letter.
    pub(crate) fn contains(&self, letter: &DeadLetter) -> bool {
        let contents = self.0.get(&letter.id).filter(|_| letter.has_own_id());
        contents.is_some_and(|contents| contents.contains(&letter.content_id()))
    }
}
