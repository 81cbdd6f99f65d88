//! The operator's page in a real browser with scripts disabled: an operator finds dead letters and replays them.
//!
//! `CLOSE_SYNC_TEST_SCREENSHOTS=FOLDER` saves a screenshot of every page, on a desktop and a phone, light and dark.

use std::path::PathBuf;
use std::process::Stdio;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use close_sync_simulator::{Effect, Fault, FaultBody, When};
use reqwest::{Client, Method};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::admin::{TOKEN, with_token};
use crate::support::{Bench, TIMEOUT, Worker, env, identify};

/// Chromium, driven by W3C `WebDriver`.
struct Chromium {
    /// The leader of a process group that contains the browser.
    driver: Child,
    _profile: TempDir,
    http: Client,
    /// The URL of the session.
    url: String,
    screenshots: Option<PathBuf>,
}

impl Chromium {
    /// `None` where it is not installed.
    async fn start() -> Option<Self> {
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new("chromedriver");
        // It writes to its home directory.
        command.arg("--port=0").env("HOME", profile.path()).stdout(Stdio::piped()).stderr(Stdio::null());
        let Ok(mut driver) = command.process_group(0).spawn() else {
            // Not captured by the test harness.
            let notice = b"SKIPPED: the page in a browser: chromium and chromium-driver are not installed\n";
            tokio::io::stderr().write_all(notice).await.unwrap();
            return None;
        };
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = loop {
            let line = tokio::time::timeout(TIMEOUT, lines.next_line()).await.expect("a port");
            let line = line.unwrap().expect("chromedriver prints its port");
            if let Some((_, port)) = line.split_once("started successfully on port ") {
                break port.trim_end_matches('.').to_owned();
            }
        };
        let data = format!("--user-data-dir={}", profile.path().join("data").display());
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            &data,
        ];
        // 2: scripts are blocked.
        let no_scripts = json!({"profile.managed_default_content_settings.javascript": 2});
        let options = json!({"args": arguments, "prefs": no_scripts});
        let wanted = json!({"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}});
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Client::builder().no_proxy().timeout(TIMEOUT).build().unwrap();
        let url = format!("http://127.0.0.1:{port}/session");
        let session: Value = http.post(&url).json(&wanted).send().await.unwrap().json().await.unwrap();
        let id = session["value"]["sessionId"].as_str().unwrap_or_else(|| panic!("{session:#}"));
        let url = format!("{url}/{id}");
        Some(Self {
            driver,
            _profile: profile,
            http,
            url,
            screenshots: env("CLOSE_SYNC_TEST_SCREENSHOTS").map(Into::into),
        })
    }

    async fn send(&self, method: Method, path: &str, body: Value) -> Result<Value, Value> {
        let request = self.http.request(method.clone(), format!("{}/{path}", self.url));
        let request = if method == Method::GET { request } else { request.json(&body) };
        let answer = request.send().await.unwrap();
        let is_success = answer.status().is_success();
        let value = answer.json::<Value>().await.unwrap()["value"].take();
        if is_success { Ok(value) } else { Err(value) }
    }

    async fn cdp(&self, command: &str, parameters: Value) {
        let body = json!({"cmd": command, "params": parameters});
        self.send(Method::POST, "goog/cdp/execute", body).await.unwrap();
    }

    async fn open(&self, url: &str) {
        self.send(Method::POST, "url", json!({"url": url})).await.unwrap();
    }

    /// Waits for an element.
    async fn find(&self, xpath: &str) {
        self.command(xpath, "text", None).await;
    }

    /// Waits for an element and sends a command to it. The page may reload between the two.
    async fn command(&self, xpath: &str, what: &str, body: Option<Value>) {
        let start = std::time::Instant::now();
        loop {
            let named = json!({"using": "xpath", "value": xpath});
            let done = match self.send(Method::POST, "element", named).await {
                Ok(found) => {
                    let handle = found.as_object().unwrap().values().next().unwrap().as_str().unwrap();
                    let method = if body.is_some() { Method::POST } else { Method::GET };
                    let path = format!("element/{handle}/{what}");
                    self.send(method, &path, body.clone().unwrap_or_default()).await
                }
                Err(error) => Err(error),
            };
            let Err(error) = done else { return };
            assert!(start.elapsed() < TIMEOUT, "{xpath}: {error}\n{}", self.source().await);
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    async fn source(&self) -> String {
        self.send(Method::GET, "source", Value::Null).await.unwrap().as_str().unwrap().to_owned()
    }

    async fn click(&self, xpath: &str) {
        self.command(xpath, "click", Some(json!({}))).await;
    }

    async fn write(&self, xpath: &str, text: &str) {
        self.command(xpath, "value", Some(json!({"text": text}))).await;
    }

    /// Presses keys in the focused element.
    async fn press(&self, keys: &str) {
        let actions = keys
            .chars()
            .flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({"type": kind, "value": key.to_string()})));
        let keyboard = json!({"type": "key", "id": "keys", "actions": actions.collect::<Vec<_>>()});
        self.send(Method::POST, "actions", json!({"actions": [keyboard]})).await.unwrap();
    }

    /// The text of the focused element.
    async fn focused(&self) -> String {
        let element = self.send(Method::GET, "element/active", Value::Null).await.unwrap();
        let element = element.as_object().unwrap().values().next().unwrap().as_str().unwrap().to_owned();
        let text = self.send(Method::GET, &format!("element/{element}/text"), Value::Null).await.unwrap();
        text.as_str().unwrap().to_owned()
    }

    /// Checks that the page is not wider than the screen, and saves screenshots if requested.
    async fn screenshot(&self, name: &str) {
        for (device, width, height, mobile) in [("desktop", 1280, 900, false), ("phone", 390, 844, true)] {
            let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile});
            self.cdp("Emulation.setDeviceMetricsOverride", metrics).await;
            let sizes = json!({"cmd": "Page.getLayoutMetrics", "params": {}});
            let sizes = self.send(Method::POST, "goog/cdp/execute", sizes).await.unwrap();
            let size = &sizes["cssContentSize"];
            assert!(size["width"].as_f64().unwrap() <= f64::from(width), "{name} on a {device}: {size}");
            for scheme in ["light", "dark"] {
                let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
                self.cdp("Emulation.setEmulatedMedia", features).await;
                let Some(folder) = &self.screenshots else { continue };
                let clip = json!({"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1});
                let whole = json!({"format": "png", "captureBeyondViewport": true, "clip": clip});
                let body = json!({"cmd": "Page.captureScreenshot", "params": whole});
                let taken = self.send(Method::POST, "goog/cdp/execute", body).await.unwrap();
                let bytes = BASE64_STANDARD.decode(taken["data"].as_str().unwrap()).unwrap();
                std::fs::create_dir_all(folder).unwrap();
                std::fs::write(folder.join(format!("{name}-{device}-{scheme}.png")), bytes).unwrap();
            }
        }
        self.cdp("Emulation.clearDeviceMetricsOverride", json!({})).await;
    }
}

impl Drop for Chromium {
    /// Kills the process group, because a killed driver leaves its browser running.
    fn drop(&mut self) {
        let Some(leader) = self.driver.id() else { return };
        let group = format!("-{leader}");
        let _ = std::process::Command::new("kill").args(["-KILL", "--", &group]).status();
    }
}

/// Dead letters of three kinds: rejected by Close, without identity, malformed.
async fn create_dead_letters(bench: &Bench, worker: &Worker) {
    let refusal = json!({"errors": [], "field-errors": {"name": "This field is required."}});
    let effect = Effect::Status { code: 400, body: FaultBody::Exactly(refusal), when: When::BeforeCommit };
    bench.simulator.fault(Fault::new(effect).on("POST", "/lead/"));
    let person = |n: usize| {
        let name = format!("Ines <Jansen> {n}");
        let company = json!({"id": format!("c{n}"), "name": "Tundra Media"});
        let traits = json!({"name": name, "email": format!("ines{n}@tundra.example"), "title": "Consultant", "company": company});
        identify(&format!("u{n}"), traits)
    };
    bench.publish(&(0..70).map(person).collect::<Vec<_>>()).await;
    bench.publish(&vec![json!({"type": "identify", "traits": {"name": "Anonymous"}}); 7]).await;
    bench.publish_bytes(b"{\"type\": \"identify\", \"userId\": ", lapin::BasicProperties::default()).await;
    worker.settled(78).await;
    bench.simulator.clear_faults();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_finds_dead_letters_and_replays_them() {
    let Some(browser) = Chromium::start().await else { return };
    let bench = with_token().await;
    let worker = bench.worker().await;
    create_dead_letters(&bench, &worker).await;

    // Sign in with the keyboard only.
    browser.open(&format!("{}/page", worker.base().await)).await;
    browser.find("//h1[.='Sign in']").await;
    browser.screenshot("sign-in").await;
    browser.press("\u{e004}").await;
    assert_eq!(browser.focused().await, "Skip to content");
    browser.press("\u{e004}\u{e004}Ada\u{e004}").await;
    browser.press(TOKEN).await;
    browser.press("\u{e007}").await;
    browser.find("//h1[.='Live']").await;
    browser.find("//span[.='consuming']").await;
    browser.click("//a[.='Pause']").await;
    browser.find("//a[.='Resume']").await;
    browser.screenshot("live").await;

    // A test event.
    browser.click("//nav//a[.='Test an event']").await;
    browser
        .write(
            "//textarea",
            &identify("u1", json!({"name": "Ines", "email": "ines1@tundra.example", "phone": "+4930123456"}))
                .to_string(),
        )
        .await;
    browser.click("//label[@for='personal']").await;
    browser.click("//button[.='Show what would happen']").await;
    browser.find("//h2[.='What would happen now']").await;
    browser.screenshot("test-event").await;

    // Open the group and one message, and replay it.
    browser.click("//nav//a[.='Dead letters']").await;
    browser.find("//p[contains(., '78 dead letters')]").await;
    browser.screenshot("dead-letters").await;
    browser.click("//h2/a[contains(., 'rejected')]").await;
    browser.find("//span[.='Page 1 of 2']").await;
    browser.screenshot("group").await;
    browser.click("//tbody/tr[1]//a").await;
    browser.find("//h1[contains(., 'Dead letter')]").await;
    assert!(!browser.source().await.contains("Jansen"));
    browser.screenshot("message").await;
    browser.click("//button[.='Show personal data']").await;
    browser.find("//h2[.='What a replay would do now']").await;
    browser.find("//pre[contains(., 'Ines <Jansen> ')]").await;
    browser.screenshot("message-shown").await;
    browser.click("//a[.='Replay…']").await;
    browser.find("//h1[contains(., 'Replay?')]").await;
    browser.screenshot("replay-one").await;
    browser.click("//button[.='Replay']").await;
    browser.find("//p[contains(., 'Done: none failed again')]").await;
    browser.screenshot("replayed-one").await;
    assert_eq!(bench.simulator.leads().len(), 1);

    // Replay the rest of the group, slowly enough to see its progress.
    browser.click("//nav//a[.='Dead letters']").await;
    browser.find("//p[contains(., '77 dead letters')]").await;
    bench.simulator.fault(Fault::new(Effect::Latency { ms: 5000 }).on("POST", "/lead/"));
    browser.click("//section[contains(., 'rejected')]//a[.='Replay…']").await;
    browser.find("//p[contains(., '69 messages')]").await;
    browser.screenshot("replay-group").await;
    browser.click("//button[.='Replay']").await;
    browser
        .find("//strong[.='Replaying' or contains(., 'first message was sent') or contains(., 'last outcomes')]")
        .await;
    browser.find("//button[.='Stop']").await;
    browser.screenshot("replaying").await;
    bench.simulator.clear_faults();
    browser.find("//p[contains(., 'Done: none failed again')]").await;
    browser.screenshot("replayed-group").await;
    assert_eq!(bench.simulator.leads().len(), 70);

    // Discard what cannot be fixed.
    browser.click("//a[.='Back to the dead letters']").await;
    browser.click("//section[contains(., 'no_identity')]//a[.='Discard…']").await;
    browser.find("//h1[contains(., 'Discard?')]").await;
    browser.screenshot("discard").await;
    browser.click("//button[.='Discard']").await;
    browser.find("//p[contains(., '7 dead letters were discarded')]").await;
    browser.screenshot("discarded").await;
    bench.depth_becomes(".dead", 1).await;

    // Close rejects the API key: the live page shows the cause and the remedy.
    bench.simulator.set_api_key("api_another.key");
    bench.publish(&[identify("u1", json!({"title": "Director"}))]).await;
    browser.click("//nav//a[.='Live']").await;
    browser.find("//code[.='unauthorized']").await;
    browser.find("//p[contains(., 'What to do')]").await;
    browser.screenshot("paused").await;
    browser.click("//button[.='Sign out']").await;
    browser.find("//h1[.='Sign in']").await;
    worker.terminate().await;
}
