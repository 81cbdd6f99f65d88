//! A private broker, for tests that break it.

use std::process::Command;

use super::env;

/// Since 4.3, RabbitMQ waits a minute before it redelivers the unacked messages of a consumer whose node died. Older
/// versions redeliver at once and ignore the setting.
const REDELIVER_SOON: [&str; 2] = ["--advanced", "[{rabbit, [{consumer_disconnected_timeout, 2000}]}]."];

/// A private RabbitMQ node. It is removed when dropped.
pub(crate) struct Node {
    directory: tempfile::TempDir,
    pub(crate) url: String,
}

impl Node {
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    /// Starts a node with more options for `deploy/rabbitmq-node start`.
    pub(crate) async fn with(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut node = Self { directory, url: String::new() };
        node.url = node.run("start", options).await;
        node
    }

    /// The host and port of its TLS listener, if it has one.
    pub(crate) fn tls_addr(&self, host: &str) -> String {
        let port = url::Url::parse(&self.url).unwrap().port().unwrap();
        format!("{host}:{}", port + 3)
    }

    /// Starts a cluster of three nodes.
    pub(crate) async fn cluster() -> [Self; 3] {
        let first = Self::with(&REDELIVER_SOON).await;
        // One after the other: each must find a running cluster, not another node that is starting.
        let second = first.joined().await;
        let third = first.joined().await;
        [first, second, third]
    }

    /// Starts another node of its cluster.
    pub(crate) async fn joined(&self) -> Self {
        let directory = self.directory.path().to_str().unwrap();
        Self::with(&[REDELIVER_SOON.as_slice(), &["--join", directory]].concat()).await
    }

    /// Starts the node again, with the same port and data.
    pub(crate) async fn start_again(&self) {
        self.run("start", &[]).await;
    }

    /// Kills the node and all its connections.
    pub(crate) async fn kill(&self) {
        self.run("kill", &[]).await;
    }

    /// Freezes the node: connections stay open, but it does not respond.
    pub(crate) async fn pause(&self) {
        self.run("pause", &[]).await;
    }

    /// Resumes a frozen node.
    pub(crate) async fn resume(&self) {
        self.run("resume", &[]).await;
    }

    /// Sets or clears the memory alarm. During an alarm the broker accepts no messages.
    pub(crate) async fn alarm(&self, on: bool) {
        let limit = if on { "0.0000001" } else { "0.6" };
        self.ctl(&["set_vm_memory_high_watermark", limit]).await;
    }

    /// Runs `rabbitmqctl` and returns its output.
    pub(crate) async fn ctl(&self, arguments: &[&str]) -> String {
        self.run("ctl", arguments).await
    }

    async fn run(&self, verb: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(script());
        command.arg(verb).arg("--dir").arg(self.directory.path()).args(arguments);
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

fn script() -> String {
    env("CLOSE_SYNC_TEST_NODE_SCRIPT")
        .unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/rabbitmq-node").to_owned())
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = Command::new(script()).arg("remove").arg("--dir").arg(self.directory.path()).output();
    }
}
