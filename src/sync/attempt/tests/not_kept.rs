//! Values that Close accepts and does not keep.

use super::*;

/// The title and the phone of Jane.
fn event(context: &Context, second: i64) -> Desired {
    let traits = json!({"title": "CEO", "phone": PHONES[0], "company": {"id": "acme"}});
    desired(context, second, json!({"userId": "u1", "traits": traits}))
}

#[tokio::test(start_paused = true)]
async fn a_value_that_close_did_not_keep_is_dropped_and_tried_again_later() {
    for what in ["time", "fields", "replay"] {
        let context = context(&rules());
        let close = FakeClose::new(&context, &[acme()], &[janes_contact()]).with_fault(WriteFault::Lossy);
        attempts(&context, &close, &event(&context, 5)).run_once().await.ok().unwrap();
        let again = event(&context, 6);
        let mut second = attempts(&context, &close, &again);
        let outcome = second.run_once().await.ok().unwrap().outcome;
        assert_eq!(outcome, Outcome::Synced(Effect::Unchanged), "{what}");
        assert_eq!(close.written(), ["update_contact"], "{what}");
        let dropped: Vec<_> =
            second.decision.dropped.iter().map(|dropped| (dropped.field.as_str(), dropped.reason)).collect();
        assert_eq!(dropped, [("title", DropReason::NotKept), ("phones", DropReason::NotKept)], "{what}");

        let mut third = attempts(&context, &close, &again);
        match what {
            "time" => tokio::time::sleep(Duration::from_hours(6)).await,
            "fields" => {
                tokio::time::sleep(LATENCY).await;
                context.readback_cache.forget_not_kept();
            }
            _ => third.run.priority = Priority::Replay,
        }
        let outcome = third.run_once().await.ok().unwrap().outcome;
        assert_eq!(outcome, Outcome::Synced(Effect::Updated), "{what}");
        let contact = close.contact("cont_1");
        assert_eq!((&contact.fields[&Field::Title], phones(&contact)), (&json!("CEO"), vec![PHONES[0]]));
    }
}
