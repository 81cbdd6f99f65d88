//! Triggers that never hold: refused at the start, or shown by the share of events that they take.

use serde_json::{Value, json};

use crate::support::{Bench, identify};

/// The findings of `check --json`.
async fn findings(bench: &Bench, arguments: &[&str], input: &str) -> (Option<i32>, Vec<Value>) {
    let (code, stdout, stderr) = bench.run_text(&[&["check", "--json"], arguments].concat(), input).await;
    (code, serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{stdout} {stderr}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_in_another_dialect_is_refused_at_the_start() {
    let bench = Bench::new()
        .await
        .set("MAPPING_TRIGGER", "$.plan in ['free']")
        .set("MAPPING_LEAD_NAME", "{ from = [\"$.traits.company name\"] }");
    let (code, findings) = findings(&bench, &[], "").await;
    assert_eq!(code, Some(78));
    let wrong: Vec<_> = findings.iter().map(|finding| (&finding["status"], &finding["subject"])).collect();
    let (status, rule) = (json!("wrong"), json!("mapping.lead.name.from"));
    assert_eq!(wrong, [(&status, &rule), (&status, &json!("mapping.trigger (MAPPING_TRIGGER)"))]);
    let (code, _, _) = bench.run_text(&["run"], "").await;
    assert_eq!(code, Some(78));
}

#[tokio::test(flavor = "multi_thread")]
async fn check_counts_the_events_that_the_trigger_takes() {
    let events = [identify("u1", json!({"plan": "free"})), identify("u2", json!({"plan": "pro"})), json!([])];
    let input = events.map(|event| event.to_string()).join("\n");
    for (trigger, status, taken) in
        [("$.traits.plan == 'free'", "ok", 1), ("$.trait.plan == 'free'", "warning", 0)]
    {
        let bench = Bench::new().await.set("MAPPING_TRIGGER", trigger);
        let (code, findings) = findings(&bench, &["--events", "-"], &input).await;
        let finding = findings.iter().find(|finding| finding["subject"] == "mapping.trigger").unwrap();
        assert_eq!((code, &finding["status"]), (Some(0), &json!(status)), "{finding}");
        assert_eq!(finding["trigger"], json!({"events": 2, "taken": taken, "malformed": 1}));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn test_counts_the_events_that_the_trigger_takes() {
    let bench = Bench::new().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let scenario = |trigger: &str| {
        format!(
            "[[scenario]]\ntitle = 'one'\nsettings = {{ mapping.trigger = \"{trigger}\" }}\nevent = '''\n{}\n'''\n\
             expect = 'skipped: trigger'\n",
            identify("u1", json!({"plan": "free"}))
        )
    };
    for (trigger, taken) in [("$.trait.plan == 'free'", 0), ("$.traits.plan == 'free'", 1)] {
        std::fs::write(file.path(), scenario(trigger)).unwrap();
        let (_, stdout, stderr) =
            bench.run_text(&["test", "--json", file.path().to_str().unwrap()], "").await;
        let result: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{stdout} {stderr}"));
        assert_eq!(result["trigger"], json!({"events": 1, "taken": taken}));
        assert_eq!(stderr.contains("warning"), taken == 0, "{stderr}");
    }
}
