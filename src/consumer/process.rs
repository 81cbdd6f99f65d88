//! Works on scheduled messages in a task: runs them against Close, settles each, and publishes its outcome events.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::time::Instant;
use tracing::Instrument;

use crate::amqp::BrokerError;
use crate::consumer::context::Context;
use crate::consumer::delivery::{ReceivedMessage, panicked};
use crate::consumer::outcome_events::{OutcomeEvent, notify};
use crate::consumer::quarantine::Evidence;
use crate::consumer::scheduler::key_queues::JobId;
use crate::consumer::settle::{WorkResult, settle};
use crate::consumer::span;
use crate::consumer::state::{Processed, Settlement};
use crate::domain::decision::Decision;
use crate::outcome::{Outcome, Stage};
use crate::sync::{Job, Prepared, RunContext};

/// Works on messages, merged where there are several, and settles each.
pub(crate) async fn process(
    context: Arc<Context>,
    mut run: Vec<(JobId, ReceivedMessage)>,
    run_context: RunContext,
) -> Processed<ReceivedMessage> {
    let started = Instant::now();
    for (_, message) in &mut run {
        span::begin(message, &context);
    }
    let Some(((_, first), others)) = run.split_first() else { return Processed::Settled(Vec::new()) };
    let (trace_span, log_span) = (span::of(first), span::log_span(first, &context));
    for (_, other) in others {
        // The calls for it are in the first one's span.
        span::of(other).follows_from(&trace_span);
    }
    let queued_since = run.iter().filter_map(|(_, message)| message.queued_since());
    queued_since.for_each(|published| context.metrics.queue_waited(published));
    let work = async {
        match &first.prepared {
            Prepared::Settled(outcome) => Some(vec![(outcome.clone(), None)]),
            Prepared::Job(job) if run.len() == 1 => Some(vec![run_one(&context, job, run_context).await]),
            Prepared::Job(_) => run_merged(&context, &run, run_context).await,
        }
    };
    let outcomes =
        match context.stop.run_until_cancelled(work.instrument(trace_span).instrument(log_span)).await {
            Some(Some(outcomes)) => outcomes,
            Some(None) => {
                let split = |(job, message)| (job, ReceivedMessage { split: true, ..message });
                return Processed::Split(run.into_iter().map(split).collect());
            }
            None => {
                let hand_back = |(job, message): (JobId, ReceivedMessage)| {
                    span::hand_back(&span::of(&message));
                    (job, Settlement::HandedBack)
                };
                return Processed::Settled(run.into_iter().map(hand_back).collect());
            }
        };
    let mut settlements = Vec::with_capacity(run.len());
    for ((job, message), (outcome, decision)) in run.into_iter().zip(outcomes) {
        let result = WorkResult { outcome: &outcome, decision: decision.as_ref(), started };
        settlements.push((job, settle_and_notify(&context, &message, &result).await));
    }
    Processed::Settled(settlements)
}

/// Settles a message whose outcome is known without Close.
pub(crate) async fn skip(
    context: Arc<Context>,
    mut message: ReceivedMessage,
    outcome: Outcome,
) -> Settlement {
    span::begin(&mut message, &context);
    let result = WorkResult { outcome: &outcome, decision: None, started: Instant::now() };
    settle_and_notify(&context, &message, &result).await
}

async fn settle_and_notify(
    context: &Context,
    message: &ReceivedMessage,
    result: &WorkResult<'_>,
) -> Settlement {
    let WorkResult { outcome, decision, started } = *result;
    let work = async {
        if message.envelope.without_headers {
            tracing::warn!(
                event = "headers_quarantined",
                "message has unreadable headers, processing it without them"
            );
        }
        let (settlement, rejected) = settle(context, message, result).await;
        let outcome = rejected.as_ref().unwrap_or(outcome);
        if let Settlement::Settled { dead_letter, .. } = settlement {
            context.metrics.settled(outcome, started.elapsed());
            if message.envelope.replay.is_some() {
                context.metrics.replayed(outcome);
            }
            let event = OutcomeEvent { envelope: &message.envelope, outcome, decision, dead_letter };
            let _ = context.stop.run_until_cancelled(notify(context, &event)).await;
        }
        span::conclude(&span::of(message), outcome, &settlement);
        settlement
    };
    let work =
        AssertUnwindSafe(work.instrument(span::of(message)).instrument(span::log_span(message, context)));
    work.catch_unwind().await.unwrap_or_else(|_| {
        context.quarantine.suspect(|| message.content_hash(), Evidence::Panicked);
        Settlement::Failed(BrokerError::Lost("settling a message panicked".into()))
    })
}

/// Runs one message. A panic costs only this one.
async fn run_one(context: &Context, job: &Job, run_context: RunContext) -> (Outcome, Option<Decision>) {
    let work = AssertUnwindSafe(context.worker.run(job, run_context));
    let died = |_| (Outcome::Dead(panicked(Stage::Write)), Decision::default());
    let (outcome, decision) = work.catch_unwind().await.unwrap_or_else(died);
    (outcome, Some(decision))
}

/// Runs several messages as one. `None` when anything failed, a panic too.
async fn run_merged(
    context: &Context,
    run: &[(JobId, ReceivedMessage)],
    run_context: RunContext,
) -> Option<Vec<(Outcome, Option<Decision>)>> {
    let jobs: Vec<&Job> = run.iter().filter_map(|(_, message)| message.job()).collect();
    let work = AssertUnwindSafe(context.worker.run_merged(&jobs, run_context));
    let done = work.catch_unwind().await.ok()??;
    Some(done.into_iter().map(|(outcome, decision)| (outcome, Some(decision))).collect())
}
