//! What the journal is for: restarts while search lags, and a broker that fails meanwhile.

use std::time::Duration;

use close_sync::domain::mapping::Key;
use close_sync_simulator::{Effect, Fault, FaultBody, Settings, When};
use lapin::options::QueueDeleteOptions;
use serde_json::json;

use crate::support::journal::{JournalReader, Past};
use crate::support::{Bench, Node, Worker, identify, people};

/// How a creation ends before a restart, and what shows it afterwards.
#[derive(Clone, Copy, Debug)]
enum Creation {
    /// Close answers it. Search does not show it for an hour.
    Answered,
    /// The worker is killed before Close answers. The event log shows it, search does not.
    ShownByEventLog,
    /// The same. The event log fails, and search shows it later than the settings say.
    ShownBySearch,
}

/// The worker is restarted right after it created a Lead and a Contact.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_after_a_creation_makes_no_duplicate_while_search_lags() {
    for creation in [Creation::Answered, Creation::ShownByEventLog, Creation::ShownBySearch] {
        let lag = match creation {
            Creation::Answered | Creation::ShownByEventLog => "1h",
            Creation::ShownBySearch => "6s",
        };
        let settings = Settings::fast().with(|close| close.search_lag = lag.parse().unwrap());
        let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "3s");
        let worker = bench.worker().await;
        // The journal is new, so the first creation waits.
        bench.publish(&[identify("u0", json!({}))]).await;
        worker.settled(1).await;
        let acme = |title: &str| identify("u1", json!({"title": title, "company": {"id": "acme"}}));
        match creation {
            Creation::Answered => {
                bench.publish(&[acme("One")]).await;
                worker.settled(2).await;
                worker.terminate().await;
            }
            Creation::ShownByEventLog | Creation::ShownBySearch => {
                let held = Effect::Timeout { ms: 60_000, when: When::AfterCommit };
                bench.simulator.fault(Fault::new(held).on("POST", "/lead/").times(1));
                bench.publish(&[acme("One")]).await;
                worker.until("creating", async |_| bench.simulator.leads().len() == 2).await;
                worker.kill().await;
            }
        }
        if matches!(creation, Creation::ShownBySearch) {
            let fails = Effect::Status { code: 500, body: FaultBody::default(), when: When::BeforeCommit };
            bench.simulator.fault(Fault::new(fails).on("GET", "/event/"));
        }
        let events = [acme("Two"), identify("u1", json!({"title": "Three"})), acme("Four")];
        bench.sync(&events).await;
        bench.depth_becomes("", 0).await;
        let titles: Vec<_> =
            bench.simulator.contacts().iter().map(|contact| contact["title"].clone()).collect();
        assert_eq!(titles, [json!(""), json!("Four")], "{creation:?}: one Contact for each person");
        assert_eq!(bench.simulator.leads().len(), 2, "{creation:?}: one Lead for each person");
        assert_eq!(bench.simulator.request_count("POST", "/contact/"), 0, "{creation:?}");
    }
}

/// Somebody deletes the journal while a worker runs. The worker still knows what it created, and writes it into the new journal.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_journal_was_deleted_tells_the_next_one_what_it_knows() {
    let settings = Settings::fast().with(|close| close.search_lag = "1h".parse().unwrap());
    let bench = Bench::with(settings).await.set("CLOSE_SEARCH_LAG", "1s");
    let worker = bench.worker().await;
    bench.publish(&people(3)).await;
    worker.settled(3).await;
    let journal = format!("{}.journal", bench.queue);
    bench.channel().await.queue_delete(journal.into(), QueueDeleteOptions::default()).await.unwrap();
    worker.until("connected again", async |worker| worker.events("broker_connected") == 2).await;
    let reader = JournalReader::of(&bench).await;
    bench.publish(&people(4)[3..]).await;
    worker.settled(4).await;
    reader.checkpoint_since(worker.logged_event("journal_read").unwrap().0).await;
    worker.terminate().await;

    bench.sync(&people(4)).await;
    bench.assert_each_once(4);
}

/// More creations than a worker has memory for, of which search has shown none.
const TOO_MANY: usize = 42_000;

/// While too much is forgotten, a worker creates nothing. So it has no new record that search could show as a proof.
#[tokio::test(flavor = "multi_thread")]
async fn a_successor_without_room_for_all_creations_goes_on_when_search_shows_the_last_one() {
    let settings = Settings::fast().with(|close| close.search_lag = "3s".parse().unwrap());
    let bench = Bench::with(settings).await;
    let jane = identify("jane", json!({}));
    bench.sync(&[jane]).await;
    let mut past = Past::new(&bench);
    past.append(TOO_MANY, 80).await;
    past.append_creation(bench.simulator.contacts()[0]["id"].as_str().unwrap(), Key::User("jane".into()))
        .await;

    bench.sync(&[identify("joe", json!({}))]).await;
    assert_eq!(bench.simulator.leads().len(), 2);
}

/// With [`SLOW`], four at once: these take longer than `rabbitmqctl` needs on a busy machine.
const PEOPLE: usize = 300;

/// How long Close takes for a creation.
const SLOW: Duration = Duration::from_secs(2);

/// A bench whose worker is creating records, slowly, and has many to create. Search shows none of them.
async fn creating(node: &Node) -> (Bench, Worker) {
    let settings = Settings::fast().with(|close| close.search_lag = "1h".parse().unwrap());
    let bench =
        Bench::on(&node.url, settings).await.set("WORKER_CONCURRENCY", "4").set("CLOSE_TIMEOUT", "5s");
    let ms = SLOW.as_millis().try_into().unwrap();
    bench.simulator.fault(Fault::new(Effect::Latency { ms }).on("POST", "/lead/"));
    let worker = bench.worker().await;
    bench.publish(&people(PEOPLE)).await;
    worker.until("creating", async |_| bench.simulator.leads().len() > 4).await;
    (bench, worker)
}

/// Lets the worker create the rest, and asserts that nothing is lost or duplicated.
async fn assert_all_are_created(bench: &Bench, worker: &Worker) {
    assert!(bench.simulator.leads().len() < PEOPLE, "the broker failed while creations were left");
    bench.simulator.clear_faults();
    worker.until("done", async |_| bench.simulator.leads().len() >= PEOPLE).await;
    bench.depth_becomes("", 0).await;
    worker.until("idle", async |worker| worker.metrics().await.count("messages_in_flight") == 0).await;
    bench.assert_each_once(PEOPLE);
    assert_eq!(bench.depth(".dead").await, 0);
    worker.terminate().await;
}

/// Creations need the journal, so they wait for the end of an alarm.
#[tokio::test(flavor = "multi_thread")]
async fn creations_wait_for_the_end_of_an_alarm() {
    let node = Node::start().await;
    let (bench, worker) = creating(&node).await;
    node.alarm(true).await;
    worker.until("blocked", async |worker| worker.events("alarm_raised") > 0).await;
    worker.until("waiting", async |worker| waits_for_journal(&bench, worker).await).await;
    node.alarm(false).await;
    assert_all_are_created(&bench, &worker).await;
}

/// Whether creations are under way and none is sent.
async fn waits_for_journal(bench: &Bench, worker: &Worker) -> bool {
    let before = bench.simulator.request_count("POST", "/lead/");
    tokio::time::sleep(SLOW * 2).await;
    let in_flight = worker.metrics().await.count("messages_in_flight");
    in_flight == 4 && bench.simulator.request_count("POST", "/lead/") == before
}

/// The worker is killed during an alarm. Its successor cannot write its start into the journal before the alarm ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_during_an_alarm_loses_and_duplicates_no_creation() {
    let node = Node::start().await;
    let (bench, worker) = creating(&node).await;
    node.alarm(true).await;
    worker.until("blocked", async |worker| worker.events("alarm_raised") > 0).await;
    worker.kill().await;
    let successor = bench.starting_worker();
    successor.until("active", async |successor| successor.events("worker_active") == 1).await;
    node.alarm(false).await;
    assert_all_are_created(&bench, &successor).await;
}

/// RabbitMQ stops gracefully and starts again while creations are under way.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_stopped_and_started_loses_and_duplicates_no_creation() {
    let node = Node::start().await;
    let (bench, worker) = creating(&node).await;
    node.ctl(&["stop_app"]).await;
    worker.until("reconnecting", async |worker| worker.events("broker_lost") == 1).await;
    node.ctl(&["start_app"]).await;
    worker.until("taking over", async |worker| worker.events("journal_read") == 2).await;
    assert_all_are_created(&bench, &worker).await;
}
