//! close-sync as a process: workers that keep running, and commands that exit.

use std::collections::BTreeMap;
use std::process::{ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::{Metrics, TIMEOUT, env};

/// A running worker. It is killed when dropped.
pub(crate) struct Worker {
    child: tokio::sync::Mutex<Child>,
    pid: u32,
    log: Arc<Mutex<Vec<String>>>,
    /// The task that reads the log.
    reader: tokio::sync::Mutex<Option<JoinHandle<()>>>,
    http: reqwest::Client,
}

fn command(environment: &BTreeMap<String, String>, arguments: &[&str]) -> Command {
    let program = env("CLOSE_SYNC_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_close-sync").to_owned());
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(environment).kill_on_drop(true);
    command
}

/// Runs a command and waits until it exits.
pub(crate) async fn run(environment: &BTreeMap<String, String>, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = command(environment, arguments);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A command need not read its input.
    let _ = stdin.write_all(input).await;
    drop(stdin);
    tokio::time::timeout(TIMEOUT, child.wait_with_output()).await.expect("the command ends").unwrap()
}

impl Worker {
    pub(crate) fn start(environment: &BTreeMap<String, String>, arguments: &[&str]) -> Self {
        let mut child = command(environment, arguments).stderr(Stdio::piped()).spawn().unwrap();
        let pid = child.id().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&log);
        let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        let reader = tokio::spawn(async move {
            while let Ok(Some(line)) = stderr.next_line().await {
                lines.lock().unwrap().push(line);
            }
        });
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().timeout(Duration::from_secs(5)).build().unwrap();
        let reader = tokio::sync::Mutex::new(Some(reader));
        Self { child: tokio::sync::Mutex::new(child), pid, log, reader, http }
    }

    /// The log so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// The log lines after the first `lines`.
    pub(crate) fn log_after(&self, lines: usize) -> Vec<String> {
        self.log.lock().unwrap()[lines..].to_vec()
    }

    /// The audited actions of operators: fields `audit`, `who` and `about`.
    pub(crate) fn audited(&self) -> Vec<[String; 3]> {
        let lines = self.log.lock().unwrap();
        let lines = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let field = |line: &Value, name: &str| line[name].as_str().unwrap_or_default().to_owned();
        let audited = lines.filter(|line| line.get("audit").is_some());
        audited.map(|line| ["audit", "who", "about"].map(|name| field(&line, name))).collect()
    }

    /// The first log line that contains a text.
    pub(crate) fn log_line(&self, text: &str) -> String {
        let log = self.log.lock().unwrap();
        log.iter().find(|line| line.contains(text)).unwrap_or_else(|| panic!("no {text} in the log")).clone()
    }

    /// The number of log lines about an event: its name is in the field `event`.
    pub(crate) fn events(&self, name: &str) -> usize {
        let log = self.log.lock().unwrap();
        let lines = log.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["event"] == name).count()
    }

    /// When it logged an event for the first time, and the fields of that line.
    pub(crate) fn logged_event(&self, name: &str) -> Option<(Timestamp, Value)> {
        let log = self.log.lock().unwrap();
        let mut lines = log.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let line = lines.find(|line| line["event"] == name)?;
        Some((line["timestamp"].as_str()?.parse().ok()?, line))
    }

    /// The number of log lines that contain a text.
    pub(crate) fn logged(&self, text: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|line| line.contains(text)).count()
    }

    /// Its HTTP address, which it logs: `http://127.0.0.1:1234`.
    pub(crate) async fn base(&self) -> String {
        let start = Instant::now();
        loop {
            let bound = self.log.lock().unwrap().iter().find_map(|line| {
                let line: Value = serde_json::from_str(line).ok()?;
                Some(line.get("bound")?.as_str()?.to_owned())
            });
            if let Some(bound) = bound {
                return format!("http://{bound}");
            }
            assert!(start.elapsed() < TIMEOUT, "no HTTP address in:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn page(&self, path: &str) -> Option<(u16, String)> {
        let response = self.http.get(format!("{}{path}", self.base().await)).send().await.ok()?;
        Some((response.status().as_u16(), response.text().await.ok()?))
    }

    /// The status and body of `/readyz`. The status is 0 if it does not answer.
    pub(crate) async fn ready(&self) -> (u16, Value) {
        let (status, body) = self.page("/readyz").await.unwrap_or_default();
        (status, serde_json::from_str(&body).unwrap_or_default())
    }

    /// Whether `/readyz` has this state and cause.
    pub(crate) async fn is(&self, state: &str, cause: Option<&str>) -> bool {
        let status = self.ready().await.1;
        status["state"] == state && status.get("cause").and_then(Value::as_str) == cause
    }

    pub(crate) async fn metrics(&self) -> Metrics {
        let mut page = None;
        // A request may time out on a busy machine.
        self.until("serving metrics", async |worker| {
            page = worker.page("/metrics").await;
            page.is_some()
        })
        .await;
        Metrics::parse(&page.unwrap().1)
    }

    /// Waits until a condition holds.
    pub(crate) async fn until(&self, what: &str, mut condition: impl AsyncFnMut(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self).await {
            assert!(start.elapsed() < TIMEOUT, "not {what} after {TIMEOUT:?}:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until this many deliveries are settled.
    #[expect(clippy::cast_precision_loss, reason = "small counts")]
    pub(crate) async fn settled(&self, deliveries: usize) -> Metrics {
        self.until(&format!("settled {deliveries}"), async |worker| {
            worker.metrics().await.settled() >= deliveries as f64
        })
        .await;
        self.metrics().await
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Its peak memory in KiB, while it is running.
    pub(crate) fn peak_memory(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    }

    /// The CPU time that it has used.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        let ticks = fields.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().unwrap());
        // Linux counts in hundredths of a second.
        Duration::from_millis(10 * ticks.sum::<u64>())
    }

    /// The number of its threads with this name.
    pub(crate) fn threads(&self, name: &str) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
        names.filter(|each| each.trim_end() == name).count()
    }

    pub(crate) fn signal(&self, name: &str) {
        let status =
            std::process::Command::new("kill").args([&format!("-{name}"), &self.pid.to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits until it exits.
    pub(crate) async fn ended(&self) -> ExitStatus {
        let mut child = self.child.lock().await;
        let status = tokio::time::timeout(TIMEOUT, child.wait()).await.expect("the worker ends").unwrap();
        // The last lines of the log may not have been read yet.
        if let Some(reader) = self.reader.lock().await.take() {
            tokio::time::timeout(TIMEOUT, reader).await.expect("the log ends").unwrap();
        }
        status
    }

    /// Stops it as an orchestrator does.
    pub(crate) async fn terminate(&self) {
        self.signal("TERM");
        let status = self.ended().await;
        assert!(status.success(), "{status}:\n{}", self.log());
    }

    /// Kills it, as a power failure would.
    pub(crate) async fn kill(&self) {
        self.signal("KILL");
        self.ended().await;
    }
}
