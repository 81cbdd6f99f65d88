//! Puts dead letters into a bench directly, without failed messages.

use std::time::Duration;

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use serde_json::{Value, json};

use super::{Bench, people};

/// A line for `dlq import`: a dead letter with this id and event. `second` shifts its time of failure.
pub(crate) fn line(id: &str, second: usize, event: &Value) -> String {
    let at = jiff::Timestamp::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + second as u64);
    let line = json!({
        "properties": {"message_id": format!("m-{id}")},
        "headers": {
            "x-close-sync-dead-letter-id": id, "x-close-sync-reason": "rejected", "x-close-sync-stage": "write",
            "x-close-sync-fingerprint": "rejected:write:name", "x-close-sync-error": "Close refused the name",
            "x-close-sync-decision": "nobody_known; steps: create lead (name)",
            "x-close-sync-failed-at": at.to_string(), "x-close-sync-first-seen": at.to_string(),
            "x-close-sync-attempt": 1, "x-from": "ada@example.test",
        },
        "body": event.to_string(),
    });
    line.to_string()
}

/// The ids of this many dead letters. `dead-0` is the oldest.
pub(crate) fn ids(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("dead-{number}")).collect()
}

/// Lines for `dlq import`, one for each event.
pub(crate) fn lines(events: &[Value]) -> String {
    let lines = events.iter().enumerate().map(|(n, event)| line(&format!("dead-{n}"), n, event));
    lines.collect::<Vec<_>>().join("\n")
}

impl Bench {
    /// A bench with queues and with dead letters of these events.
    pub(crate) async fn dead(events: &[Value]) -> Self {
        let bench = Self::new().await;
        bench.worker().await.terminate().await;
        bench.import(&lines(events)).await;
        bench
    }

    /// A bench with the dead letters of this many people.
    pub(crate) async fn dead_people(count: usize) -> Self {
        Self::dead(&people(count)).await
    }

    /// Imports new dead letters.
    pub(crate) async fn import(&self, lines: &str) {
        let (code, stdout, stderr) = self.run_text(&["dlq", "import", "-"], lines).await;
        let all = format!("imported {}, replaced 0, 0 already present\n", lines.lines().count());
        assert_eq!((code, stdout), (Some(0), all), "{stderr}");
    }

    /// The exit code of a command, its standard output and its standard error.
    pub(crate) async fn run_text(&self, arguments: &[&str], input: &str) -> (Option<i32>, String, String) {
        let output = self.run(arguments, input.as_bytes()).await;
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    /// The exit code of a command, and its standard output and standard error as one text.
    pub(crate) async fn run_combined(&self, arguments: &[&str], input: &str) -> (Option<i32>, String) {
        let (code, stdout, stderr) = self.run_text(arguments, input).await;
        (code, stdout + &stderr)
    }

    /// The dead letters in queue order.
    pub(crate) async fn dead_letters(&self) -> Vec<Value> {
        let lines = self.output(&["dlq", "export"]).await;
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The ids of the dead letters in queue order.
    pub(crate) async fn dead_ids(&self) -> Vec<String> {
        let letters = self.dead_letters().await.into_iter();
        letters.map(|letter| letter["id"].as_str().unwrap().to_owned()).collect()
    }

    /// From now on, Close refuses new Leads whose request contains this text, and names a field.
    pub(crate) fn refuse(&self, containing: &str) {
        let refusal = json!({"errors": [], "field-errors": {"name": "This field is required."}});
        let effect =
            Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
        self.simulator.fault(Fault::new(effect).on("POST", "/lead/").containing(containing));
    }

    /// From now on, Close delays new Leads by this time.
    pub(crate) fn slow(&self, time: Duration) {
        let ms = u64::try_from(time.as_millis()).unwrap();
        self.simulator.fault(Fault::new(Effect::Latency { ms }).on("POST", "/lead/"));
    }
}
