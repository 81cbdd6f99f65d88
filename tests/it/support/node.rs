//! A broker of one's own, for tests that break it.

use std::process::Command;

use super::env;

/// A private RabbitMQ node. Removed when dropped.
pub(crate) struct Node {
    directory: tempfile::TempDir,
    pub(crate) url: String,
}

impl Node {
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    /// With more to say to `deploy/rabbitmq-node start`.
    pub(crate) async fn with(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut node = Self { directory, url: String::new() };
        node.url = node.run("start", options).await;
        node
    }

    /// Where it listens with TLS, for a node that does: host and port.
    pub(crate) fn tls_addr(&self, host: &str) -> String {
        let port = url::Url::parse(&self.url).unwrap().port().unwrap();
        format!("{host}:{}", port + 3)
    }

    /// Three nodes that are one broker.
    pub(crate) async fn cluster() -> [Self; 3] {
        // From 4.3 on, what a consumer had in hand waits for a minute when its node dies. Older versions do not
        // know the setting, and give it to the next at once.
        let soon = ["--advanced", "[{rabbit, [{consumer_disconnected_timeout, 2000}]}]."];
        let first = Self::with(&soon).await;
        let directory = first.directory.path().to_str().unwrap().to_owned();
        let joining = [soon.as_slice(), &["--join", &directory]].concat();
        // One after the other, as each has to find a cluster and not another beginner.
        let second = Self::with(&joining).await;
        let third = Self::with(&joining).await;
        [first, second, third]
    }

    /// Starts it again, on the same port and data.
    pub(crate) async fn start_again(&self) {
        self.run("start", &[]).await;
    }

    /// Kills it with all its connections.
    pub(crate) async fn kill(&self) {
        self.run("kill", &[]).await;
    }

    /// Freezes it: connections stay open, and nothing answers.
    pub(crate) async fn pause(&self) {
        self.run("pause", &[]).await;
    }

    /// Lets it go on.
    pub(crate) async fn resume(&self) {
        self.run("resume", &[]).await;
    }

    /// Raises the memory alarm, or clears it: the broker takes no messages then.
    pub(crate) async fn alarm(&self, on: bool) {
        let limit = if on { "0.0000001" } else { "0.6" };
        self.ctl(&["set_vm_memory_high_watermark", limit]).await;
    }

    /// What `rabbitmqctl` prints.
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
