//! Text from producers, RabbitMQ, Close and files in what commands print: it cannot control the terminal, begin a line
//! or hide.

use close_sync_simulator::{CustomField, Effect, Fault, FaultBody, FieldKind, Owner, When};
use serde_json::{Value, json};

use crate::support::{Bench, dead_letters, identify};

/// Each is a way to act on a terminal or on the reader. All try to begin a line with `FORGED`.
const HOSTILE: [&str; 6] = [
    "\u{1b}[2J\u{1b}]0;title\u{7}\r\nFORGED ok",
    "\u{9b}2J\u{9d}0;title\u{9c}\nFORGED ok",
    "\u{202e}\u{2066}\u{200f}\u{61c}\nFORGED ok",
    "\u{200b}\u{feff}\u{2060}\u{ad}\nFORGED ok",
    "\u{2028}\u{2029}\u{85}\u{b}\u{c}\nFORGED ok",
    "\u{8}\u{7f}\u{0}\u{e0041}\nFORGED ok",
];

/// Panics if a text contains something that acts, other than our own colours and line breaks.
fn assert_harmless(what: &str, text: &str) {
    // Our own colours: ESC, `[`, numbers, `m`.
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\u{1b}') {
        plain.push_str(before);
        let numbers =
            after.strip_prefix('[').unwrap_or_else(|| panic!("{what}: an escape sequence in {text:?}"));
        let end = numbers.find(|c: char| !c.is_ascii_digit() && c != ';').unwrap();
        assert!(numbers[end..].starts_with('m'), "{what}: an escape sequence in {text:?}");
        rest = &numbers[end + 1..];
    }
    plain.push_str(rest);
    let acts = |c: &char| {
        (c.is_control() && *c != '\n')
            || matches!(c, '\u{61c}' | '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
            || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
    };
    assert_eq!(plain.chars().find(acts), None, "{what}: {text:?}");
    // JSON may begin a line with a quote.
    let forged = plain.lines().find(|line| line.trim_start().starts_with("FORGED"));
    assert_eq!(forged, None, "{what}: {text:?}");
}

/// Runs a command as on a terminal with colours, and checks what it prints.
async fn run(bench: &Bench, arguments: &[&str], input: &str) -> (Option<i32>, String) {
    let (code, stdout, stderr) = bench.run_text(arguments, input).await;
    for text in [&stdout, &stderr] {
        assert_harmless(&format!("{arguments:?}"), text);
    }
    (code, stdout)
}

async fn bench() -> Bench {
    // Otherwise escape sequences are removed where the output is not a terminal.
    Bench::new().await.set("CLICOLOR_FORCE", "1").set("COLUMNS", "100")
}

/// A dead letter whose every text is hostile. Only those of the kinds that RabbitMQ accepts.
fn letter(number: usize, text: &str, body: &str) -> String {
    let mut letter: Value = serde_json::from_str(&dead_letters::line("-", number, &json!({}))).unwrap();
    for (name, value) in letter["headers"].as_object_mut().unwrap() {
        if value.is_string()
            && !["x-close-sync-failed-at", "x-close-sync-first-seen"].contains(&name.as_str())
        {
            *value = text.into();
        }
    }
    letter["headers"]["x-close-sync-dead-letter-id"] = format!("{number}{text}").into();
    letter["headers"][format!("x-{text}")] = text.into();
    letter["properties"] = json!({"message_id": format!("m{number}{text}"), "app_id": text, "type": text});
    letter["body"] = body.into();
    letter.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_cannot_act_on_the_terminal() {
    let bench = bench().await;
    bench.worker().await.terminate().await;
    let mut lines = Vec::new();
    for (number, text) in HOSTILE.iter().enumerate() {
        let event = identify(text, json!({"name": text, "email": text, text.to_owned(): text}));
        lines.push(letter(2 * number, text, &event.to_string()));
        lines.push(letter(2 * number + 1, text, text));
    }
    let (code, _) = run(&bench, &["dlq", "import", "-"], &lines.join("\n")).await;
    assert_eq!(code, Some(0));
    let count = lines.len();

    let (code, shown) = run(&bench, &["dlq", "list", "--each"], "").await;
    assert!(code == Some(0) && shown.contains("close-sync dlq show '"), "ids to copy are quoted: {shown}");
    let (_, listed) = run(&bench, &["dlq", "list", "--json"], "").await;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let letters = listed["dead_letters"].as_array().unwrap();
    assert_eq!(letters.len(), count);
    for (number, text) in HOSTILE.iter().enumerate() {
        let id = format!("{}{text}", 2 * number);
        // A zero byte cannot be an argument.
        let argument = if text.contains('\0') { &format!("m{id}").replace('\0', "") } else { &id };
        assert!(letters.iter().any(|letter| letter["id"] == id.as_str()), "JSON keeps data exact: {text:?}");
        for arguments in [
            &["dlq", "show", argument][..],
            &["dlq", "show", argument, "--no-plan"],
            &["dlq", "show", argument, "--json"],
            &["dlq", "replay", "--dry-run", "--id", argument],
            &["dlq", "discard", "--id", argument],
            &[
                "dlq",
                "edit",
                argument,
                "--patch",
                "[{\"op\": \"test\", \"path\": \"/userId\", \"value\": 1}]",
            ],
        ] {
            run(&bench, arguments, "").await;
        }
    }
    let (_, dry) = run(&bench, &["dlq", "replay", "--all", "--dry-run", "--json"], "").await;
    assert_eq!(serde_json::from_str::<Value>(&dry).unwrap()["matched"], count);
    let (_, exported) = run(&bench, &["dlq", "export"], "").await;
    let exported: Vec<Value> = exported.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(exported.iter().any(|letter| letter["headers"]["x-from"] == HOSTILE[1]), "exact: {exported:#?}");
    // Those that are not JSON fail again.
    let mut bench = bench;
    for format in ["json", "text"] {
        bench = bench.set("LOG_FORMAT", format);
        let worker = bench.starting_worker();
        run(&bench, &["dlq", "replay", "--all", "--keep-going"], "").await;
        worker.terminate().await;
        assert!(worker.logged("dead_lettered") > 0, "{}", worker.log());
        assert_harmless(format, &worker.log());
    }
    run(&bench, &["dlq", "list"], "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_close_and_events_cannot_act_on_the_terminal() {
    for text in HOSTILE {
        let bench = bench().await;
        let field = CustomField {
            id: "cf_hostile".into(),
            name: text.into(),
            kind: FieldKind::Choices,
            choices: vec![text.into(), "x".into()],
            accepts_multiple_values: false,
            owner: Owner::Lead,
        };
        bench.simulator.add_field(field).unwrap();
        let name = json!({"name": text, "custom.cf_contactuserid": "u1", "title": text});
        bench.simulator.add_lead(json!({"name": text, "description": text, "contacts": [name]})).unwrap();
        let statuses = json!([{"id": "stat_a", "label": text}]);
        let me = json!({"organizations": [{"name": text, "lead_statuses": statuses}]});
        let effect = Effect::Status { code: 200, body: FaultBody::Exactly(me), when: When::BeforeCommit };
        bench.simulator.fault(Fault::new(effect).on("GET", "/me/"));
        let custom = "{ cf_hostile = { from = [\"$.traits.plan\"] }, cf_other = { from = [\"$.a\"] } }";
        let bench = bench.set("MAPPING_LEAD_CUSTOM", custom);
        let (_, shown) = run(&bench, &["check"], "").await;
        assert!(shown.contains("accepts the API key"), "{shown}");
        let (_, found) = run(&bench, &["check", "--json"], "").await;
        let found: Vec<Value> = serde_json::from_str(&found).unwrap();
        let names_it = |finding: &Value| finding["detail"].as_str().unwrap().contains(text);
        assert!(found.iter().any(names_it), "JSON keeps data exact: {found:#?}");
        let traits = json!({"name": text, "title": text, "plan": text, "email": text, "company": {"id": text, "name": text}});
        let event = json!({"type": "identify", "userId": "u1", "messageId": text, "traits": traits});
        let events = format!("{event}\n{}", json!({"type": text, "userId": text}));
        for arguments in [&["plan", "-"][..], &["plan", "-", "--json"]] {
            let (code, shown) = run(&bench, arguments, &events).await;
            assert!(code == Some(0) && !shown.is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_settings_cannot_act_on_the_terminal() {
    let directory = tempfile::tempdir().unwrap();
    for text in HOSTILE.map(|text| text.replace(['\0', '/'], "")) {
        let bench = bench().await;
        let absent = format!("{}/absent {text}", directory.path().display());
        for arguments in [
            &["plan", &absent][..],
            &["publish", &absent],
            &["test", &absent],
            &["dlq", "import", &absent],
            &["--config", &absent, "check"],
            &["--config", &absent, "dlq", "list"],
            &["--destination", &text, "dlq", "list"],
            &["dlq", "list", "--since", "2026-01-01", "--id", &text],
        ] {
            run(&bench, arguments, "").await;
        }
        let scenario = format!("{}/{text}.toml", directory.path().display());
        let escaped: Vec<_> = text.chars().map(|c| format!("\\U{:08x}", u32::from(c))).collect();
        let quoted = format!("\"{}\"", escaped.concat());
        let event = identify(&text, json!({"name": text})).to_string();
        let file = format!(
            "[[scenario]]\ntitle = {quoted}\nevent = {}\nexpect = {quoted}\n",
            json!(event).to_string().replace('\u{7f}', "")
        );
        std::fs::write(&scenario, file).unwrap();
        for arguments in [&["test", &scenario][..], &["test", "--json", &scenario]] {
            run(&bench, arguments, "").await;
        }
        let config = format!("{}/config.toml", directory.path().display());
        std::fs::write(&config, format!("{quoted} = 1\n[amqp]\nqueue = {quoted}\noutcomes = \"amq.\"\n"))
            .unwrap();
        for arguments in [
            &["--config", &config, "check"][..],
            &["--config", &config, "run"],
            &["--config", &config, "dlq", "list"],
        ] {
            run(&bench, arguments, "").await;
        }
        run(
            &bench,
            &["publish", "-"],
            &format!("{}\n{}\n[]\n", json!({"type": text}), json!({"traits": text})),
        )
        .await;
    }
}
