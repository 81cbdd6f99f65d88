//! Invariants of a replay for any outcomes, lost connections and interruptions.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use tokio::time::Instant;
use uuid::Uuid;

use super::{Run, TIMEOUT, created, dead, delayed, times};
use crate::amqp::BrokerError;
use crate::consumer::outcome_events::ReplayEvent;
use crate::dead_letters::guard::GuardCounts;
use crate::dead_letters::progress::{End, Stage};
use crate::dead_letters::replay::state::{Action, Event, Policy};

/// What the worker does with a message.
#[derive(Clone, Copy, Debug)]
enum Behavior {
    Created,
    Dead(u8),
    DelayedThenCreated,
    NoOutcome,
}

#[derive(Clone, Debug)]
struct Case {
    behaviors: Vec<Behavior>,
    policy: Policy,
    /// Steps at which the connection is lost.
    losses: Vec<usize>,
    /// The step at which the operator stops the replay.
    stop: Option<usize>,
    /// Steps at which another operator takes the dead letters first.
    stolen: Vec<usize>,
}

fn case() -> impl Strategy<Value = Case> {
    let behavior = prop_oneof![
        6 => Just(Behavior::Created),
        1 => (0..3_u8).prop_map(Behavior::Dead),
        1 => Just(Behavior::DelayedThenCreated),
        1 => Just(Behavior::NoOutcome),
    ];
    let policy =
        (proptest::option::of(0..30_usize), 1..6_usize, any::<bool>(), proptest::bool::weighted(0.9))
            .prop_map(|(limit, max_in_flight, keep_going, waits)| {
                let outcome_timeout = waits.then_some(TIMEOUT);
                Policy { limit, max_in_flight, keep_going, outcome_timeout }
            });
    let stop = proptest::option::weighted(0.1, 0..200_usize);
    (vec(behavior, 0..25), policy, vec(0..200_usize, 0..6), stop, vec(0..200_usize, 0..2)).prop_map(
        |(behaviors, policy, losses, stop, stolen)| Case { behaviors, policy, losses, stop, stolen },
    )
}

proptest! {
    #[test]
    fn invariants_hold_for_any_outcomes_and_interruptions(case in case()) {
        check(&case)?;
    }
}

/// Runs a replay against a simulated broker and worker, and checks the invariants at each step.
#[expect(clippy::too_many_lines, reason = "one simulation, step by step")]
fn check(case: &Case) -> Result<(), TestCaseError> {
    let Case { behaviors, policy, losses, stop, stolen } = case;
    let mut run = Run::new(*policy);
    let mut queue: VecDeque<usize> = (0..behaviors.len()).collect();
    let mut batch: VecDeque<usize> = VecDeque::new();
    let mut publishing = 0;
    // Outcomes with their time of arrival. Without a connection they are lost.
    let mut coming: Vec<(Instant, ReplayEvent)> = Vec::new();
    let mut dead_again: Vec<ReplayEvent> = Vec::new();
    let (mut finished, mut sent, mut delivered) = (Vec::new(), Vec::new(), HashSet::new());
    // Sent over this connection, without a final outcome.
    let mut open: Vec<Uuid> = Vec::new();
    let (mut any_passed, mut was_confirmed) = (false, false);
    for step in 0.. {
        prop_assert!(step < 20_000, "the replay does not end: {:?}", run.action);
        let confirmed = std::mem::take(&mut was_confirmed);
        prop_assert_eq!(
            matches!(run.action, Action::Delete),
            confirmed,
            "a dead letter is deleted right after the confirm"
        );
        let is_connected = !matches!(run.action, Action::Connect { .. });
        let over = matches!(run.action, Action::Finish(_) | Action::Fail(_));
        if *stop == Some(step) && !over {
            run.on(Event::StopRequested);
            prop_assert!(matches!(run.action, Action::Finish(_)), "{:?}", run.action);
            continue;
        }
        if losses.contains(&step) && !over {
            if let Action::Publish { replay } = run.action
                && step % 2 == 0
            {
                // RabbitMQ accepted it, but the confirm is lost.
                sent.push(replay);
                dead_again.push(dead(replay, "lost"));
            }
            // Outcomes that are due have arrived. The others are lost.
            let (arrived, lost): (Vec<_>, Vec<_>) =
                std::mem::take(&mut coming).into_iter().partition(|(at, _)| *at <= run.now && is_connected);
            dead_again
                .extend(lost.into_iter().map(|(_, outcome)| outcome).filter(|o| o.dead_letter.is_some()));
            let buffered: Vec<_> = arrived.into_iter().map(|(_, outcome)| outcome).collect();
            for outcome in buffered.iter().filter(|outcome| outcome.comes_again_s.is_none()) {
                delivered.insert(outcome.replay);
                any_passed |= outcome.dead_letter.is_none() || policy.keep_going;
            }
            batch.drain(..).rev().for_each(|letter| queue.push_front(letter));
            open.clear();
            run.on(Event::ConnectionLost { error: BrokerError::Lost("test".into()), buffered });
            prop_assert!(
                matches!(run.action, Action::Connect { .. } | Action::Finish(_) | Action::Fail(_)),
                "a lost connection leads to: {:?}",
                run.action
            );
            continue;
        }
        let now = run.now;
        let arrived = |coming: &mut Vec<(Instant, ReplayEvent)>, until: Instant| {
            let first = (0..coming.len()).filter(|n| coming[*n].0 <= until).min_by_key(|n| coming[*n].0)?;
            Some(coming.remove(first))
        };
        let next = match &run.action {
            Action::Connect { pause } => {
                run.now += *pause + Duration::from_secs(1);
                Event::Connected
            }
            Action::CompleteEdits => Event::EditsCompleted,
            Action::Scan { pause, limit } => {
                run.now += *pause;
                queue.make_contiguous().sort_unstable();
                let all = times(behaviors.len());
                let failed_again = std::mem::take(&mut dead_again);
                for outcome in &failed_again {
                    delivered.insert(outcome.replay);
                }
                any_passed |= policy.keep_going && !failed_again.is_empty();
                Event::Scanned {
                    failed_at: queue.iter().take(*limit).map(|n| all[*n]).collect(),
                    guards: GuardCounts::new(),
                    failed_again,
                }
            }
            Action::TakeBatch { failed_at, exclusive } => {
                prop_assert!(!exclusive || failed_at.len() == 1);
                if stolen.contains(&step) {
                    queue.drain(..failed_at.len().min(queue.len()));
                    Event::BatchTaken { chosen: 0, replaced: 0, failed_at: VecDeque::new() }
                } else {
                    let chosen = failed_at.len().min(3);
                    batch = queue.drain(..chosen.min(queue.len())).collect();
                    let all = times(behaviors.len());
                    let failed_at = batch.iter().map(|n| all[*n]).collect();
                    Event::BatchTaken { chosen: batch.len(), replaced: 0, failed_at }
                }
            }
            Action::Publish { replay } => {
                let most = if any_passed { policy.max_in_flight } else { 1 };
                prop_assert!(policy.outcome_timeout.is_none() || open.len() < most, "too many in flight");
                prop_assert!(!sent.contains(replay), "each message has its own id");
                publishing = batch.pop_front().unwrap();
                sent.push(*replay);
                open.push(*replay);
                let soon = now + Duration::from_secs(1);
                match behaviors[publishing] {
                    Behavior::Created => coming.push((soon, created(*replay))),
                    Behavior::Dead(kind) => coming.push((soon, dead(*replay, &format!("kind-{kind}")))),
                    Behavior::DelayedThenCreated => {
                        coming.push((soon, delayed(*replay, 60)));
                        coming.push((now + Duration::from_secs(61), created(*replay)));
                    }
                    Behavior::NoOutcome => {}
                }
                was_confirmed = true;
                Event::Confirmed { fingerprint: format!("kind-{}", publishing % 2) }
            }
            Action::Delete => {
                finished.push(publishing);
                Event::Deleted
            }
            Action::ReturnBatch => {
                batch.drain(..).rev().for_each(|letter| queue.push_front(letter));
                Event::BatchReturned
            }
            Action::ReadBuffered => {
                arrived(&mut coming, now).map_or(Event::BufferRead, |(_, o)| Event::Outcome(o))
            }
            Action::Wait { until } => {
                let (until, poll) = (*until, now + Duration::from_secs(2));
                match arrived(&mut coming, until.min(poll)) {
                    Some((at, outcome)) => {
                        run.now = now.max(at);
                        Event::Outcome(outcome)
                    }
                    None if until <= poll => {
                        run.now = now.max(until);
                        Event::TimedOut
                    }
                    None => {
                        run.now = poll;
                        Event::Polled(None)
                    }
                }
            }
            Action::Finish(end) => {
                let progress = run.state.progress();
                prop_assert!(*end != End::Done || progress.sent == progress.matched, "{progress:?}");
                prop_assert!(*end != End::Done || progress.in_flight + progress.missed == 0, "{progress:?}");
                prop_assert_eq!(&progress.stage, &Stage::Finished(end.clone()));
                break;
            }
            Action::Fail(_) => break,
        };
        if let Event::Outcome(outcome) = &next
            && outcome.comes_again_s.is_none()
        {
            delivered.insert(outcome.replay);
            open.retain(|replay| *replay != outcome.replay);
            any_passed |= outcome.dead_letter.is_none() || policy.keep_going;
        }
        run.on(next);
        let progress = run.state.progress();
        prop_assert!(progress.finished() <= delivered.len(), "each outcome counts once");
        prop_assert!(
            progress.finished() + progress.in_flight + progress.missed <= sent.len(),
            "each message counts once"
        );
    }
    let mut once = finished.clone();
    once.sort_unstable();
    once.dedup();
    prop_assert_eq!(once.len(), finished.len(), "each dead letter is deleted once");
    prop_assert!(run.state.progress().sent >= finished.len());
    Ok(())
}
