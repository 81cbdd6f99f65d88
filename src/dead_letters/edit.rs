//! Putting dead letters back: edited, or from a file.

use std::collections::{HashMap, HashSet, VecDeque};

use jiff::Timestamp;
use uuid::Uuid;

use crate::amqp::publisher::{Publisher, Sent};
use crate::amqp::{BrokerError, Settings, disconnect, envelope};
use crate::dead_letters::filter::Selection;
use crate::dead_letters::letter::DeadLetter;
use crate::dead_letters::scan::{DeadLetterQueue, Disposition, Observer};

/// In bytes. What its producer sent is kept in a header, where the producer's own headers have to fit in, too.
pub const LARGEST_ORIGINAL: usize = 32 << 10;

/// Whether what its producer sent can be kept with an edited body.
pub fn is_editable(letter: &DeadLetter) -> bool {
    letter.original().is_some() || letter.body.len() <= LARGEST_ORIGINAL
}

/// What came of an edit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edited {
    /// So many of those meant have another body now.
    Done {
        /// Those meant.
        matched: usize,
        /// Those that have another body.
        changed: usize,
        /// Somebody replays: what they have in hand was not among them.
        replaying: bool,
    },
    /// Nothing was changed, for what is wrong with one of them.
    Refused {
        /// Its id.
        id: String,
        /// Why.
        why: String,
    },
}

/// Puts other bodies in place of those of dead letters, keeping what their producers sent in a header. `change` tells
/// the new body, `None` where it stays as it is, or why it cannot be changed: then none is.
///
/// # Errors
/// When the broker is gone, or does not take a message: that one and those after it stay as they were.
pub async fn edit(
    settings: &Settings,
    which: &Selection,
    change: impl Fn(&DeadLetter) -> Result<Option<Vec<u8>>, String>,
    watch: &mut Observer<'_>,
) -> Result<Edited, BrokerError> {
    let operator = DeadLetterQueue::connect(settings, "close-sync dlq").await?;
    let publishing = settings.connect("close-sync dlq publish").await?;
    let publisher = Publisher::new(&publishing).await?;
    finish(&operator, watch).await?;
    let (mut hand, matched) = operator.pick(which, |_| Disposition::Keep, watch).await?;
    let replaying = hand.replaying;
    let done = async {
        let mut to_do = Vec::new();
        while let Some(held) = hand.next() {
            let wanted = change(&held.letter).and_then(|body| match body {
                Some(_) if !is_editable(&held.letter) => Err(format!(
                    "a body of more than {LARGEST_ORIGINAL} bytes cannot be kept with an edited one"
                )),
                body => Ok(body),
            });
            match wanted {
                Ok(Some(body)) => to_do.push((held, body)),
                Ok(None) => {}
                Err(why) => return Ok(Edited::Refused { id: held.letter.id, why }),
            }
        }
        let changed = to_do.len();
        for (held, body) in to_do {
            let letter = &held.letter;
            let properties =
                envelope::for_edited(&letter.restored(), &letter.body, letter.content(), Timestamp::now());
            publisher.publish(&settings.dead_letter_queue(), "", &body, properties).await?;
            held.remove().await?;
        }
        Ok(Edited::Done { matched, changed, replaying })
    };
    let done = done.await;
    hand.close().await;
    operator.leave().await;
    disconnect(&publishing).await;
    done
}

/// Finishes edits and imports that were killed after a copy was confirmed, and before what it takes the place of was
/// deleted. What RabbitMQ dead-lettered by itself has no id of its own, and stays twice.
pub(crate) async fn finish(
    operator: &DeadLetterQueue<'_>,
    watch: &mut Observer<'_>,
) -> Result<(), BrokerError> {
    let mut known = Replaced::default();
    let note = |letter: &DeadLetter| {
        known.note(letter);
        Disposition::Return
    };
    operator.take(note, watch).await?.close().await;
    if known.0.is_empty() {
        return Ok(());
    }
    // Again, for it counts only what is in one hand with the copy: another operator may have been faster.
    let mut now = Replaced::default();
    let decide = |letter: &DeadLetter| {
        now.note(letter);
        if known.has(letter) { Disposition::Keep } else { Disposition::Return }
    };
    let mut hand = operator.take(decide, watch).await?;
    let removed = hand.remove_those(|letter| now.has(letter)).await;
    hand.close().await;
    removed.map(|_| ())
}

/// The same, for whoever has no connection yet.
///
/// # Errors
/// When the broker is gone.
pub async fn complete_interrupted(settings: &Settings, watch: &mut Observer<'_>) -> Result<(), BrokerError> {
    let operator = DeadLetterQueue::connect(settings, "close-sync dlq").await?;
    finish(&operator, watch).await?;
    operator.leave().await;
    Ok(())
}

/// What copies take the place of, by their ids.
#[derive(Default)]
pub(crate) struct Replaced(HashMap<String, Vec<Uuid>>);

impl Replaced {
    pub(crate) fn note(&mut self, letter: &DeadLetter) {
        let contents = letter.replaces();
        if !contents.is_empty() {
            self.0.entry(letter.id.clone()).or_default().extend(contents);
        }
    }

    /// Whether a copy of it takes its place.
    pub(crate) fn has(&self, letter: &DeadLetter) -> bool {
        let contents = self.0.get(&letter.id).filter(|_| letter.has_own_id());
        contents.is_some_and(|contents| contents.contains(&letter.content()))
    }
}

/// What came of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Put into the queue.
    pub added: usize,
    /// Put in place of one with the same id and another content.
    pub replaced: usize,
    /// In the queue already.
    pub present: usize,
}

/// Publishes under way at once: enough to keep a broker busy (rabbitmq.md §2.4).
const WINDOW: usize = 100;

/// Puts dead letters into the queue. One that is there already stays; those with the same id and other contents than
/// `letters` has are replaced. So the same file can be restored twice, and a restoring that was cut short goes on.
///
/// # Errors
/// When the broker is gone, or does not take a message: what was restored stays, and nothing was deleted that has no
/// successor. [`BrokerError::Busy`] while somebody replays.
pub async fn restore(
    settings: &Settings,
    letters: &[DeadLetter],
    watch: &mut Observer<'_>,
) -> Result<Restored, BrokerError> {
    let operator = DeadLetterQueue::connect(settings, "close-sync dlq").await?;
    let publishing = settings.connect("close-sync dlq publish").await?;
    let publisher = Publisher::new(&publishing).await?;
    let mut wanted: HashMap<&str, HashSet<Uuid>> = HashMap::new();
    for letter in letters {
        wanted.entry(&letter.id).or_default().insert(letter.content_alone());
    }
    let (mut present, mut outdated) = (HashSet::new(), HashMap::<String, Vec<Uuid>>::new());
    // All in one look: nobody else puts one back, or takes one, meanwhile.
    let mut hand = operator
        .take(
            |letter| {
                let Some(contents) = wanted.get(letter.id.as_str()) else { return Disposition::Return };
                let content = letter.content_alone();
                if contents.contains(&content) {
                    present.insert((letter.id.clone(), content));
                    return Disposition::Return;
                }
                outdated.entry(letter.id.clone()).or_default().push(letter.content());
                Disposition::Keep
            },
            watch,
        )
        .await?;
    let restored = if hand.replaying {
        Err(BrokerError::Busy(
            "a replay is under way, and has dead letters in hand that an import would not see: wait for its end",
        ))
    } else {
        publish(settings, &publisher, letters, present, &outdated).await
    };
    let done = match restored {
        Ok(restored) => hand.remove_those(|_| true).await.map(|_| restored),
        Err(error) => Err(error),
    };
    hand.close().await;
    operator.leave().await;
    disconnect(&publishing).await;
    done
}

/// Publishes those that are not there yet.
async fn publish(
    settings: &Settings,
    publisher: &Publisher,
    letters: &[DeadLetter],
    mut present: HashSet<(String, Uuid)>,
    outdated: &HashMap<String, Vec<Uuid>>,
) -> Result<Restored, BrokerError> {
    let mut restored = Restored::default();
    let mut under_way: VecDeque<Sent> = VecDeque::with_capacity(WINDOW);
    for letter in letters {
        if !present.insert((letter.id.clone(), letter.content_alone())) {
            restored.present += 1;
            continue;
        }
        let properties = if let Some(contents) = outdated.get(&letter.id) {
            restored.replaced += 1;
            envelope::for_replacing(&letter.restored(), contents.iter().copied())
        } else {
            restored.added += 1;
            letter.restored()
        };
        under_way
            .push_back(publisher.send(&settings.dead_letter_queue(), "", &letter.body, properties).await?);
        if under_way.len() == WINDOW
            && let Some(first) = under_way.pop_front()
        {
            first.confirmed().await?;
        }
    }
    for sent in under_way {
        sent.confirmed().await?;
    }
    Ok(restored)
}
