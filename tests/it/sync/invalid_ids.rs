//! Answers with ids that Close does not write: a proxy, or someone who can change what Close answers.

use close_sync_simulator::{Effect, Fault, FaultBody, When};
use serde_json::{Value, json};

use crate::support::{Bench, identify};

/// Answers 200 with this instead of the real answer.
fn instead(answer: Value, when: When) -> Effect {
    Effect::Status { code: 200, body: FaultBody::Exactly(answer), when }
}

/// Every path that the worker called.
fn paths(bench: &Bench) -> Vec<String> {
    bench.simulator.requests().into_iter().map(|request| request.path).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_from_an_answer_never_leads_to_another_path() {
    for id in ["../me", "lead_x/../../me", "lead_x?delete=1", "lead_x#", "lead_%2e%2e", "user_1", ""] {
        let bench = Bench::new().await;
        let (lead, contact) = (json!({"id": id}), json!({"id": "cont_1", "lead_id": id}));
        let rows = |row: &Value| json!({"data": [row], "cursor": null});
        let with = |mut row: Value, key: &str, value: &str| {
            row[key] = value.into();
            row
        };
        let lead = with(lead, "custom.cf_leadcompanyid", "acme");
        let contact = with(contact, "custom.cf_contactuserid", "u1");
        // First the search for the Lead, then that for the Contact.
        for (row, kind) in [(lead, "\"lead\""), (contact, "\"contact\"")] {
            let fault = Fault::new(instead(rows(&row), When::BeforeCommit)).on("POST", "/data/search/");
            bench.simulator.fault(fault.containing(kind).times(1));
        }
        let worker = bench.worker().await;
        // A neighbour goes on.
        bench.publish(&[identify("u1", json!({"company": {"id": "acme"}})), identify("u2", json!({}))]).await;
        worker.until("synced", async |_| bench.simulator.contacts().len() == 2).await;
        worker.terminate().await;
        assert!(bench.remaining_faults().await.is_empty(), "{id:?}");
        assert_eq!((bench.depth("").await, bench.depth(".dead").await), (0, 0), "{id:?}");
        let calls = paths(&bench);
        let called =
            calls.iter().filter(|path| path.contains("..") || path.contains("%2") || path.contains("delete"));
        assert_eq!(called.count(), 0, "{id:?}: {calls:#?}");
        let known =
            ["/me/", "/custom_field_schema/", "/user/", "/data/search/", "/event/", "/lead/", "/contact/"];
        assert!(
            calls.iter().all(|path| known.iter().any(|known| path.starts_with(known))),
            "{id:?}: {calls:#?}"
        );
        assert_eq!(bench.simulator.leads().len(), 2, "{id:?}");
    }
}

/// The Lead exists, but its id is not known: it is looked up before it is created again.
#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_answers_with_an_invalid_id_is_not_repeated() {
    for answer in [json!({"id": "../me", "contacts": []}), json!({"id": "lead_1", "contact_ids": ["../me"]})]
    {
        let bench = Bench::new().await;
        bench
            .simulator
            .fault(Fault::new(instead(answer.clone(), When::AfterCommit)).on("POST", "/lead/").times(1));
        let worker = bench.worker().await;
        bench.publish(&[identify("u1", json!({"company": {"id": "acme"}, "name": "Ada"}))]).await;
        bench.publish(&[identify("u1", json!({"company": {"id": "acme"}, "name": "Grace"}))]).await;
        worker
            .until("updated", async |_| {
                bench.simulator.contacts().iter().any(|contact| contact["name"] == "Grace")
            })
            .await;
        worker.terminate().await;
        assert_eq!((bench.simulator.leads().len(), bench.simulator.contacts().len()), (1, 1), "{answer}");
        let calls = paths(&bench);
        assert!(!calls.iter().any(|path| path.contains("..") || path.contains("%2")), "{answer}: {calls:#?}");
    }
}
