//! Custom fields that are created and deleted in Close while the worker runs.

use close_sync_simulator::{CustomField, FieldKind, Owner};
use serde_json::{Value, json};

use crate::support::{Bench, Worker, identify};

const RULES: &str = "{ Region = { from = [\"$.traits.region\"] } }";

fn region() -> CustomField {
    CustomField::new("cf_leadregion", "Region", FieldKind::Text, Owner::Lead)
}

/// Publishes an event about a new person. Returns how many values were left out, by reason.
async fn dropped(bench: &Bench, worker: &Worker, number: usize) -> (u32, u32) {
    let company = json!({"id": format!("c{number}")});
    bench.publish(&[identify(&format!("u{number}"), json!({"region": "north", "company": company}))]).await;
    let metrics = worker.settled(number).await;
    assert_eq!(metrics.outcome("created"), u32::try_from(number).unwrap());
    let count = |reason| metrics.count(&format!("fields_dropped_total{{reason=\"{reason}\"}}"));
    (count("refused_by_close"), count("unknown_field"))
}

fn newest_region(bench: &Bench) -> Value {
    bench.simulator.leads().last().unwrap()["custom.cf_leadregion"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_field_created_while_the_worker_runs_is_written_after_the_next_refresh() {
    let bench = Bench::new().await.set("MAPPING_LEAD_CUSTOM", RULES).set("CLOSE_SCHEMA_REFRESH", "10s");
    let worker = bench.worker().await;
    assert_eq!(dropped(&bench, &worker, 1).await, (0, 1), "the field does not exist yet");

    bench.simulator.add_field(region()).unwrap();
    worker.until("following", async |worker| worker.events("mapping_updated") == 1).await;
    assert_eq!(dropped(&bench, &worker, 2).await, (0, 1), "no further value is left out");
    assert_eq!(newest_region(&bench), "north");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_fields_logs_only_what_is_new() {
    let rules = "{ Region = { from = [\"$.traits.region\"] }, Tier = { from = [\"$.traits.tier\"] } }";
    let bench = Bench::new().await.set("MAPPING_LEAD_CUSTOM", rules).set("CLOSE_SCHEMA_REFRESH", "10s");
    bench.simulator.add_field(region()).unwrap();
    let worker = bench.worker().await;
    assert_eq!(worker.events("field_unresolved"), 1);
    bench.simulator.remove_field("cf_leadregion");
    worker.until("following", async |worker| worker.events("mapping_updated") == 1).await;
    assert_eq!(worker.events("field_unresolved"), 2, "one more, and the first is not repeated");
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_field_deleted_while_the_worker_runs_is_left_out() {
    let bench = Bench::new().await.set("MAPPING_LEAD_CUSTOM", RULES);
    bench.simulator.add_field(region()).unwrap();
    let worker = bench.worker().await;
    assert_eq!(dropped(&bench, &worker, 1).await, (0, 0));

    bench.simulator.remove_field("cf_leadregion");
    // Close rejects the field until the worker refreshes the mapping, at most every ten seconds.
    let mut sent = 1;
    worker
        .until("looking again", async |worker| {
            sent += 1;
            let (refused, _) = dropped(&bench, worker, sent).await;
            assert_eq!(refused as usize, sent - 1);
            worker.events("mapping_updated") == 1
        })
        .await;
    let (refused, unknown) = dropped(&bench, &worker, sent + 1).await;
    assert_eq!((refused as usize, unknown), (sent - 1, 1), "no more attempts to write it");
    assert_eq!(worker.events("field_unresolved"), 1, "logged once");

    // The field is created again with the same name. It has another id, which the next refresh finds.
    bench.simulator.add_field(CustomField { id: "cf_leadregion2".into(), ..region() }).unwrap();
    worker.kill().await;
    let worker = bench.worker().await;
    bench.publish(&[identify("u1", json!({"region": "south", "company": {"id": "c1"}}))]).await;
    worker.settled(1).await;
    let written = bench.simulator.leads().into_iter().filter(|lead| lead["custom.cf_leadregion2"] == "south");
    assert_eq!(written.count(), 1);
}
