//! What a service manager is told, over a socket like systemd's.

use std::time::Duration;

use tokio::net::UnixDatagram;

use crate::support::{Bench, TIMEOUT, identify};

/// The socket, and a file that can be given to the worker.
struct Manager {
    socket: UnixDatagram,
    directory: tempfile::TempDir,
}

/// What `WatchdogSec=` makes of 400 ms.
const WATCHDOG_USEC: &str = "400000";

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        Self { socket, directory }
    }

    fn starts(&self, bench: Bench) -> Bench {
        bench.set("NOTIFY_SOCKET", &self.path("notify")).set("WATCHDOG_USEC", WATCHDOG_USEC)
    }

    fn path(&self, file: &str) -> String {
        self.directory.path().join(file).to_str().unwrap().to_owned()
    }

    fn write(&self, file: &str, content: &str) -> String {
        let path = self.path(file);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// The next message.
    async fn told(&self) -> String {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).await.unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    }

    /// The messages up to the one that begins so, it included.
    async fn until(&self, wanted: &str) -> Vec<String> {
        let mut messages = Vec::new();
        while !messages.last().is_some_and(|last: &String| last.starts_with(wanted)) {
            let told = tokio::time::timeout(TIMEOUT, self.told()).await;
            messages.push(told.unwrap_or_else(|_| panic!("no {wanted}, only {messages:?}")));
        }
        messages
    }
}

/// It is ready although RabbitMQ is not there, and says what it is waiting for.
#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_a_worker_is_told() {
    let manager = Manager::new();
    let bench = manager.starts(Bench::new().await);
    let url = manager.write("url", "amqp://127.0.0.1:1/%2f");
    let bench = bench.unset("AMQP_URL").set("AMQP_URL_FILE", &url);
    let worker = bench.starting_worker();
    assert_eq!(manager.until("READY=1\n").await.len(), 1);
    manager.until("STATUS=connecting (unreachable)\n").await;
    manager.until("WATCHDOG=1\n").await;

    manager.write("url", &bench.amqp_url);
    worker.signal("HUP");
    let reloading = manager.until("RELOADING=1\n").await;
    // What systemd needs to tell this reload from another.
    let (_, at) = reloading.last().unwrap().split_once("MONOTONIC_USEC=").unwrap();
    assert!(at.trim().parse::<u64>().is_ok_and(|at| at > 0), "{at}");
    assert_eq!(manager.until("READY=1\n").await.len(), 1);
    manager.until("STATUS=standing_by\n").await;
    bench.publish(&[identify("u1", serde_json::json!({}))]).await;
    manager.until("STATUS=consuming\n").await;

    worker.terminate().await;
    let last = manager.until("STOPPING=1\n").await;
    assert!(!last.contains(&"READY=1\n".to_owned()), "{last:?}");
}

/// A file that never answers keeps the loop from turning: there is no sign of life until it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_loop_that_stands_still_gives_no_sign_of_life() {
    let manager = Manager::new();
    let bench = manager.starts(Bench::new().await);
    let key = manager.write("key", "api_simulator.key");
    let worker = bench.unset("CLOSE_API_KEY").set("CLOSE_API_KEY_FILE", &key).worker().await;
    std::fs::remove_file(&key).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&key).status().unwrap().success());
    worker.signal("HUP");
    manager.until("RELOADING=1\n").await;
    let silence = tokio::time::timeout(Duration::from_secs(2), manager.told()).await;
    assert!(silence.is_err(), "{silence:?}");
    assert_eq!(worker.page("/healthz").await.unwrap().0, 200, "the rest of it goes on");

    tokio::fs::write(&key, "api_simulator.key\n").await.unwrap();
    manager.until("READY=1\n").await;
    manager.until("WATCHDOG=1\n").await;
    worker.terminate().await;
}
