//! A message that is held for too long is delayed, with what it waited for as the cause.

use super::*;
use crate::outcome::{DelayCause, Reason};
use crate::waits::WaitCause;

const HOLD: Duration = Duration::from_secs(20);
const FOR_EVER: Duration = Duration::from_hours(24);

fn context_with_hold() -> Context {
    let mut context = context(&rules());
    context.settings.hold = HOLD;
    context
}

/// The cause of the delay, and how long the message waited for it, in full seconds.
async fn held(mut attempts: Attempts<'_, FakeClose>) -> (WaitCause, u64) {
    let start = Instant::now();
    match attempts.within_hold().await {
        Outcome::Delayed { level: 0, cause: cause @ DelayCause::Held(held) } => {
            assert!(!cause.uses_attempt());
            assert_eq!((held.held, start.elapsed()), (HOLD, HOLD));
            assert_eq!(cause.label(), held.cause.label());
            (held.cause, held.waited.as_secs())
        }
        outcome @ (Outcome::Synced(_)
        | Outcome::Skipped(_)
        | Outcome::Paused(_)
        | Outcome::Delayed { .. }
        | Outcome::Dead(_)) => panic!("{outcome:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_rate_limits() {
    let context = context_with_hold();
    let close = FakeClose::new(&context, &[], &[]);
    close.state(|state| state.budget_wait = FOR_EVER);
    assert_eq!(held(attempts(&context, &close, &jane(&context, 5))).await, (WaitCause::RateLimited, 19));
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_search() {
    let context = context_with_hold();
    let close = FakeClose::new(&context, &[], &[]);
    context.lag_guard.forget(ChangeKind::Creation, context.now(), FOR_EVER);
    assert_eq!(held(attempts(&context, &close, &jane(&context, 5))).await, (WaitCause::Search, 19));
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_a_record_lock() {
    let context = context_with_hold();
    let close = FakeClose::new(&context, &[acme()], &[janes_contact()]);
    let _guard = context.record_locks.lock(vec!["lead_1".to_owned()], Instant::now()).await.unwrap();
    assert_eq!(held(attempts(&context, &close, &jane(&context, 5))).await, (WaitCause::RecordLock, 19));
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_a_slow_answer() {
    let context = context_with_hold();
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Slow(FOR_EVER));
    assert_eq!(held(attempts(&context, &close, &jane(&context, 5))).await, (WaitCause::SlowClose, 19));
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_between_retries() {
    let context = context_with_hold();
    let close = FakeClose::new(&context, &[], &[]);
    let failed = || WriteFault::Before(CloseError::Transient(Fault::Status(503)));
    close.state(|state| state.faults.extend(std::iter::repeat_with(failed).take(100)));
    assert_eq!(held(attempts(&context, &close, &jane(&context, 5))).await, (WaitCause::Backoff, 19));
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_the_journal() {
    struct Silent;
    impl Journal for Silent {
        fn append(&self, _: Vec<crate::domain::journal::Entry>) {}

        fn stored(&self) -> BoxFuture<'_, ()> {
            Box::pin(std::future::pending())
        }

        fn read_back(&self) -> BoxFuture<'_, ()> {
            Box::pin(std::future::pending())
        }
    }
    let lead = json!({"id": "lead_1", "date_created": "2026-01-01", "name": "Old"});
    // A creation, and an adoption.
    for (leads, contacts) in [(vec![], vec![]), (vec![lead], vec![janes_contact()])] {
        let context = context_with_hold();
        let close = FakeClose::new(&context, &leads, &contacts);
        let desired = jane(&context, 5);
        let mut attempts = attempts(&context, &close, &desired);
        attempts.run.journal = JournalHandle::new(Arc::new(Silent));
        assert_eq!(held(attempts).await, (WaitCause::Journal, 19));
        assert_eq!(close.written(), [""; 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn the_longest_wait_is_the_cause() {
    let context = context_with_hold();
    let close = FakeClose::new(&context, &[], &[]).with_fault(WriteFault::Slow(FOR_EVER));
    close.state(|state| state.budget_wait = Duration::from_secs(12));
    assert_eq!(held(attempts(&context, &close, &jane(&context, 5))).await, (WaitCause::RateLimited, 12));
}

#[tokio::test(start_paused = true)]
async fn a_message_that_waits_is_exhausted_at_a_certain_age() {
    let context = context_with_hold();
    let max_age = context.settings.retry.max_age;
    let close = FakeClose::new(&context, &[], &[]);
    context.lag_guard.forget(ChangeKind::Creation, context.now(), FOR_EVER);
    let desired = jane(&context, 5);
    for (age, dead) in [(max_age.saturating_sub(Duration::from_secs(1)), false), (max_age, true)] {
        let mut attempts = attempts(&context, &close, &desired);
        attempts.run.age = age;
        let outcome = attempts.within_hold().await;
        let (outcome, _) = attempts.conclude(outcome);
        match outcome {
            Outcome::Delayed { .. } => assert!(!dead),
            Outcome::Dead(letter) => {
                assert!(dead);
                assert_eq!((letter.reason, letter.stage), (Reason::Exhausted, Stage::LookUp));
                assert!(letter.error.contains(WaitCause::Search.description()), "{}", letter.error);
                assert!(letter.decision.is_some());
            }
            outcome @ (Outcome::Synced(_) | Outcome::Skipped(_) | Outcome::Paused(_)) => {
                panic!("{outcome:?}")
            }
        }
    }
    let slow = FakeClose::new(&context, &[acme()], &[janes_contact()]).with_fault(WriteFault::Slow(FOR_EVER));
    let mut attempts = attempts(&context, &slow, &desired);
    attempts.run.age = max_age;
    let Outcome::Dead(letter) = attempts.within_hold().await else { panic!() };
    assert_eq!((letter.reason, letter.stage), (Reason::Exhausted, Stage::Write));
}

#[tokio::test(start_paused = true)]
async fn many_new_people_with_one_email_do_not_wait_for_search() {
    let context = context(&rules());
    let close = FakeClose::new(&context, &[], &[]).with_search_lag(Duration::from_hours(1));
    let start = Instant::now();
    for number in 0..150 {
        let event = json!({"userId": format!("u{number}"), "traits": {"email": "info@acme.test"}});
        let completed = attempts(&context, &close, &desired(&context, 5, event)).run_once().await;
        assert_eq!(completed.ok().unwrap().outcome, Outcome::Synced(Effect::Created), "{number}");
    }
    assert!(start.elapsed() < Duration::from_hours(1), "waited {:?}", start.elapsed());
}
