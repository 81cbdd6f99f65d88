//! What events cost in calls to Close. `tests/budget` measures it under rate limits.

use crate::support::{Bench, employee};

const PEOPLE: usize = 200;
const COMPANIES: usize = 60;

/// Of the events, 60 % repeat what the last one about the person said, 25 % say something new, 10 % are about a new person of a
/// known company and 5 % about a new company.
#[tokio::test(flavor = "multi_thread")]
async fn the_standard_mix_costs_few_calls() {
    const EVENTS: usize = 800;
    // Merging would save more, in a way that depends on timing.
    let bench = Bench::new().await.set("WORKER_MERGE", "false");
    let worker = bench.worker().await;
    let mut titles = vec!["CEO".to_owned(); PEOPLE];
    bench.publish(&(0..PEOPLE).map(|n| employee(n, n % COMPANIES, "CEO")).collect::<Vec<_>>()).await;
    worker.settled(PEOPLE).await;
    let before = bench.simulator.requests().len();
    let mix = (0..EVENTS).map(|n| {
        let known = n * 7919 % PEOPLE;
        match n % 20 {
            0..12 => employee(known, known % COMPANIES, &titles[known]),
            12..17 => {
                titles[known] = format!("CEO {n}");
                employee(known, known % COMPANIES, &titles[known])
            }
            17..19 => employee(PEOPLE + n, known % COMPANIES, "CEO"),
            _ => employee(PEOPLE + n, COMPANIES + n, "CEO"),
        }
    });
    bench.publish(&mix.collect::<Vec<_>>()).await;
    worker.settled(PEOPLE + EVENTS).await;
    let requests = bench.simulator.requests();
    let of = |method: &str, path: &str| {
        let calls = requests[before..].iter();
        calls.filter(|call| call.method == method && call.path.starts_with(path)).count()
    };
    // Each new value is read and written once, each new person is created once, and nothing else is written.
    assert_eq!((of("PUT", "/"), of("POST", "/contact/"), of("POST", "/lead/")), (200, 80, 40));
    assert_eq!(of("GET", "/contact/"), 0, "known from the Lead");
    let [leads, searches] = [of("GET", "/lead/"), of("POST", "/data/search/")];
    assert!(leads <= EVENTS * 37 / 100, "{leads} Leads were read");
    // The rate limits of a real Close let more of them share a search.
    assert!(searches <= EVENTS / 10, "{searches} searches");
    assert_eq!(worker.metrics().await.count("messages_repeated_total"), 480);
    worker.terminate().await;
}
