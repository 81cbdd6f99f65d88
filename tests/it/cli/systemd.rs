//! Notifications to systemd, over a socket of the test.

use std::time::Duration;

use tokio::net::UnixDatagram;

use crate::support::{Bench, TIMEOUT, identify};

/// The service manager's socket, and a folder for files of the worker.
struct Manager {
    socket: UnixDatagram,
    directory: tempfile::TempDir,
}

/// `WatchdogSec=400ms`, as systemd passes it on.
const WATCHDOG_USEC: &str = "400000";

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        Self { socket, directory }
    }

    /// Sets the variables that systemd sets for a service.
    fn environment(&self, bench: Bench) -> Bench {
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

    async fn receive(&self) -> String {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).await.unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    }

    /// The messages up to and including the first one that starts with `wanted`.
    async fn receive_until(&self, wanted: &str) -> Vec<String> {
        let mut messages = Vec::new();
        while !messages.last().is_some_and(|last: &String| last.starts_with(wanted)) {
            let message = tokio::time::timeout(TIMEOUT, self.receive()).await;
            messages.push(message.unwrap_or_else(|_| panic!("no {wanted}, only {messages:?}")));
        }
        messages
    }
}

/// The service is ready even if RabbitMQ is unavailable. The status names the reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_reports_its_states() {
    let manager = Manager::new();
    let bench = manager.environment(Bench::new().await);
    let url = manager.write("url", "amqp://127.0.0.1:1/%2f");
    let bench = bench.unset("AMQP_URL").set("AMQP_URL_FILE", &url);
    let worker = bench.starting_worker();
    assert_eq!(manager.receive_until("READY=1\n").await.len(), 1);
    manager.receive_until("STATUS=connecting (unreachable)\n").await;
    manager.receive_until("WATCHDOG=1\n").await;

    manager.write("url", &bench.amqp_url);
    worker.signal("HUP");
    let reloading = manager.receive_until("RELOADING=1\n").await;
    // systemd needs the time to distinguish reloads.
    let (_, at) = reloading.last().unwrap().split_once("MONOTONIC_USEC=").unwrap();
    assert!(at.trim().parse::<u64>().is_ok_and(|at| at > 0), "{at}");
    assert_eq!(manager.receive_until("READY=1\n").await.len(), 1);
    manager.receive_until("STATUS=standing_by\n").await;
    bench.publish(&[identify("u1", serde_json::json!({}))]).await;
    manager.receive_until("STATUS=consuming\n").await;

    worker.terminate().await;
    let last = manager.receive_until("STOPPING=1\n").await;
    assert!(!last.contains(&"READY=1\n".to_owned()), "{last:?}");
}

/// Reading a named pipe blocks the supervisor's loop. Until it ends, the watchdog gets no messages.
#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_loop_sends_no_watchdog_messages() {
    let manager = Manager::new();
    let bench = manager.environment(Bench::new().await);
    let key = manager.write("key", "api_simulator.key");
    let worker = bench.unset("CLOSE_API_KEY").set("CLOSE_API_KEY_FILE", &key).worker().await;
    std::fs::remove_file(&key).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&key).status().unwrap().success());
    worker.signal("HUP");
    manager.receive_until("RELOADING=1\n").await;
    let silence = tokio::time::timeout(Duration::from_secs(2), manager.receive()).await;
    assert!(silence.is_err(), "{silence:?}");
    assert_eq!(worker.page("/healthz").await.unwrap().0, 200, "other tasks keep running");

    tokio::fs::write(&key, "api_simulator.key\n").await.unwrap();
    manager.receive_until("READY=1\n").await;
    manager.receive_until("WATCHDOG=1\n").await;
    worker.terminate().await;
}
