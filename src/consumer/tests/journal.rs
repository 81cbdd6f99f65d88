//! Sessions with a journal: what one writes down and the next one knows.

use std::time::Duration;

use tokio::time::Instant;

use super::harness::*;
use crate::amqp::BrokerError;
use crate::consumer::End;
use crate::consumer::broker::BrokerEvent;
use crate::domain::journal::Entry as Written;

const LAG: Duration = Duration::from_mins(1);

fn creations_in(log: &[Entry]) -> usize {
    calls(log).iter().filter(|call| **call == "POST lead/").count()
}

fn creations(harness: &Harness) -> usize {
    creations_in(&harness.log.entries())
}

/// A journal that is older than the lag of search, so that a new session has nothing to wait for.
async fn harness_with_old_journal() -> Harness {
    let harness = Harness::new(|settings| settings.search_lag = LAG);
    let session = harness.start();
    session.deliver("0", &event("first", "first"));
    harness.log.wait_for_ack("0").await;
    session.stop().await;
    harness
}

/// A session that has created Jane in Acme, with message 1.
async fn session_that_created_jane(harness: &Harness) -> Running {
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_ack("1").await;
    session
}

#[tokio::test(start_paused = true)]
async fn the_first_session_with_a_journal_waits_for_search() {
    let began = Instant::now();
    let harness = harness_with_old_journal().await;
    assert!(began.elapsed() >= LAG);
    let entries = harness.journal.entries();
    assert!(matches!(entries[..2], [Written::Start { .. }, Written::CheckpointBegin { .. }]), "{entries:#?}");
    let creating = entries.iter().position(|entry| matches!(entry, Written::Creating { .. })).unwrap();
    let [Written::Creating { operation: began, .. }, rest @ ..] = &entries[creating..] else {
        panic!("{entries:#?}")
    };
    let settled =
        rest.iter().position(|entry| matches!(entry, Written::Settled { operation } if operation == began));
    let keys = rest.iter().filter(|entry| matches!(entry, Written::Keys { .. })).count();
    let written = rest.iter().filter(|entry| matches!(entry, Written::Written { .. })).count();
    assert!(settled.is_some() && keys == 2 && written == 2, "{rest:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_creation_takes_two_messages_and_an_update_one() {
    let harness = harness_with_old_journal().await;
    let session = harness.start();
    let number = || harness.journal.messages.borrow().len();
    // The first one starts the session.
    session.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_ack("1").await;
    for (id, company, messages) in [("2", "other", 2), ("3", "third", 2)] {
        let before = number();
        session.deliver(id, &event(id, company));
        harness.log.wait_for_ack(id).await;
        tokio::time::sleep(LAG).await;
        assert_eq!(number() - before, messages, "{id}");
    }
    let before = number();
    let mut changed = event("2", "other");
    changed["traits"]["title"] = "CEO".into();
    session.deliver("4", &changed);
    harness.log.wait_for_ack("4").await;
    tokio::time::sleep(LAG).await;
    assert_eq!(number() - before, 1);
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_later_session_creates_at_once() {
    let harness = harness_with_old_journal().await;
    let session = harness.start();
    let began = Instant::now();
    session.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_ack("1").await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn another_process_knows_what_was_created_before_search_shows_it() {
    let harness = harness_with_old_journal().await;
    let session = session_that_created_jane(&harness).await;
    session.stop().await;
    let created = creations(&harness);

    // The fake Close finds nothing by search.
    let other = harness.restart();
    let session = other.start();
    session.deliver("2", &event("jane", "acme"));
    other.log.wait_for_ack("2").await;
    session.stop().await;
    assert_eq!(creations(&other), created);
}

/// A newer version wrote all but the last entries. A creation may have been sent two hours after it was written down: here
/// that is the timeout of a call.
#[tokio::test(start_paused = true)]
async fn entries_that_cannot_be_read_matter_for_as_long_as_search_can_lag() {
    for (hours, waits) in [(25, true), (27, false)] {
        let harness = harness_with_old_journal().await;
        harness.journal.messages.send_modify(|messages| {
            let readable = messages.pop();
            for message in messages.iter_mut() {
                *message = br#"{"v":2}"#.to_vec();
            }
            messages.extend(readable);
        });
        tokio::time::sleep(Duration::from_hours(hours)).await;
        let other = harness.restart();
        let session = other.start();
        let before = creations(&other);
        session.deliver("1", &event("jane", "acme"));
        tokio::time::sleep(Duration::from_mins(1)).await;
        assert_eq!(creations(&other) == before, waits, "{hours}");
        session.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_standby_reads_before_its_first_delivery() {
    let harness = harness_with_old_journal().await;
    let active = harness.start();
    let other = harness.restart();
    let standby = other.start();
    active.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_ack("1").await;
    let created = creations(&harness);
    tokio::time::sleep(Duration::from_secs(1)).await;
    // A reading that begins now would learn nothing.
    harness.journal.messages.send_modify(|messages| messages.iter_mut().for_each(Vec::clear));

    let began = Instant::now();
    standby.deliver("2", &event("jane", "acme"));
    standby.deliver("3", &event("bob", "globex"));
    other.log.wait_for_ack("2").await;
    other.log.wait_for_ack("3").await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(creations(&other), created + 1);
    assert!(matches!(active.end().await.0, End::Lost(BrokerError::TakenOver)));
    standby.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_standby_that_cannot_read_tries_again_at_its_first_delivery() {
    let harness = harness_with_old_journal().await;
    let session = harness.start();
    session.send(BrokerEvent::JournalFailed(BrokerError::Cancelled));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    session.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_ack("1").await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_was_cut_off_is_pending_for_the_next_process() {
    let harness = harness_with_old_journal().await;
    harness.close_answers(|call| if call.starts_with("POST lead/ ") { Answer::Never } else { Answer::Works });
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    let created = creations(&harness);
    harness.log.wait_for(|log| creations_in(log) > created).await;
    session.send(BrokerEvent::Lost(BrokerError::Cancelled));
    session.end().await;

    let other = harness.restart();
    other.close_answers(|_| Answer::Works);
    let session = other.start();
    session.deliver("2", &event("bob", "globex"));
    session.deliver("1", &event("jane", "acme"));
    let began = Instant::now();
    other.log.wait_for_ack("2").await;
    assert!(began.elapsed() < Duration::from_secs(1), "other keys do not wait");
    other.log.wait_for_ack("1").await;
    assert!(began.elapsed() > LAG, "{:?}", began.elapsed());
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_session_ends_when_another_one_starts() {
    let harness = harness_with_old_journal().await;
    let first = harness.start();
    first.deliver("1", &event("jane", "acme"));
    harness.log.wait_for_ack("1").await;
    let second = harness.restart().start();
    second.deliver("2", &event("bob", "globex"));
    assert!(matches!(first.end().await.0, End::Lost(BrokerError::TakenOver)));
    second.stop().await;
}

/// During an upgrade the other worker may be a newer one, whose entries this one cannot read.
#[tokio::test(start_paused = true)]
async fn a_session_ends_when_a_newer_version_writes() {
    let harness = harness_with_old_journal().await;
    let session = session_that_created_jane(&harness).await;
    let append = |body: &[u8]| harness.journal.messages.send_modify(|all| all.push(body.to_vec()));
    append(b"of another program");
    session.deliver("2", &event("bob", "globex"));
    harness.log.wait_for_ack("2").await;
    append(br#"{"v":2}"#);
    assert!(matches!(session.end().await.0, End::Lost(BrokerError::TakenOver)));
}

/// The journal exists, but the user may not use it, or the node has no replica of it.
#[tokio::test(start_paused = true)]
async fn a_session_that_is_refused_the_journal_works_without_it() {
    let refusals = [
        BrokerError::Forbidden("access refused".into()),
        BrokerError::Conflict { object: "queue `close-sync.journal`".into(), detail: "no replica".into() },
    ];
    for refusal in refusals {
        let harness = harness_with_old_journal().await;
        let session = harness.start();
        let began = Instant::now();
        session.deliver("1", &event("jane", "acme"));
        session.send(BrokerEvent::JournalFailed(refusal));
        session.send(BrokerEvent::JournalFailed(BrokerError::Forbidden("access refused".into())));
        harness.log.wait_for_ack("1").await;
        assert!(began.elapsed() >= LAG, "creations wait for search: {:?}", began.elapsed());
        session.stop().await;
    }
}

/// For example first a sandbox. Its ids mean nothing in the other organization.
#[tokio::test(start_paused = true)]
async fn a_session_learns_nothing_about_another_organization() {
    let harness = harness_with_old_journal().await;
    let session = session_that_created_jane(&harness).await;
    let created = creations(&harness);
    let other = harness.restart_for("orga_2");
    let successor = other.start();
    successor.deliver("2", &event("jane", "acme"));
    other.log.wait_for_ack("2").await;
    assert_eq!(creations(&other), created + 1);
    assert!(matches!(session.end().await.0, End::Lost(BrokerError::TakenOver)));
    successor.stop().await;
}

/// It creates what the journal does not know.
#[tokio::test(start_paused = true)]
async fn the_session_after_one_that_was_refused_the_journal_waits_for_search() {
    let harness = harness_with_old_journal().await;
    let session = harness.start();
    session.deliver("1", &event("jane", "acme"));
    session.send(BrokerEvent::JournalFailed(BrokerError::Forbidden("access refused".into())));
    harness.log.wait_for_ack("1").await;
    tokio::time::sleep(Duration::from_hours(10)).await;
    session.stop().await;

    let other = harness.restart();
    let session = other.start();
    let began = Instant::now();
    session.deliver("2", &event("jane", "globex"));
    other.log.wait_for_ack("2").await;
    assert!(began.elapsed() >= LAG, "{:?}", began.elapsed());
    assert!(began.elapsed() < LAG * 3, "not for ever: {:?}", began.elapsed());
    session.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_session_that_relies_on_the_journal_ends_when_it_fails() {
    let harness = harness_with_old_journal().await;
    let session = session_that_created_jane(&harness).await;
    session.send(BrokerEvent::JournalFailed(BrokerError::Forbidden("access refused".into())));
    assert!(matches!(session.end().await.0, End::Lost(BrokerError::Forbidden(_))));
}
