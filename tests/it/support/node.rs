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
        let directory = tempfile::tempdir().unwrap();
        let mut node = Self { directory, url: String::new() };
        node.url = node.run("start").await;
        node
    }

    /// Starts it again, on the same port and data.
    pub(crate) async fn start_again(&self) {
        self.run("start").await;
    }

    /// Kills it with all its connections.
    pub(crate) async fn kill(&self) {
        self.run("kill").await;
    }

    /// Raises the memory alarm, or clears it: the broker takes no messages then.
    pub(crate) async fn alarm(&self, on: bool) {
        let limit: &[&str] = if on {
            &["set_vm_memory_high_watermark", "0.0000001"]
        } else {
            &["set_vm_memory_high_watermark", "0.6"]
        };
        self.run_with("ctl", limit).await;
    }

    async fn run(&self, verb: &'static str) -> String {
        self.run_with(verb, &[]).await
    }

    async fn run_with(&self, verb: &'static str, arguments: &'static [&'static str]) -> String {
        let directory = self.directory.path().to_owned();
        tokio::task::spawn_blocking(move || {
            let output = Command::new(script())
                .arg(verb)
                .arg("--dir")
                .arg(directory)
                .args(arguments)
                .output()
                .unwrap();
            assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        })
        .await
        .unwrap()
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
