//! Whole configurations: what is in force, and how mistakes are reported.

use std::collections::HashMap;
use std::time::Duration;

use secrecy::ExposeSecret;
use serde_json::json;
use url::Url;

use crate::config::keys::SECRETS;
use crate::config::{Config, Destination, Layers, Need, Problems};
use crate::domain::mapping::source::{Alternative, Source};
use crate::domain::mapping::{Placeholders, Rules, WriteRule};
use crate::domain::record::Field;
use crate::domain::schema::FieldRef;

fn load(text: &str, environment: &[(&str, &str)]) -> Result<Config, Problems> {
    let environment =
        environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Layers::new(text, "close-sync.toml", &environment).read(Need::All)
}

fn single(text: &str, environment: &[(&str, &str)]) -> Destination {
    load(text, environment).unwrap().single().unwrap()
}

fn problems(text: &str, environment: &[(&str, &str)]) -> String {
    load(text, environment).unwrap_err().to_string()
}

#[test]
fn the_defaults_need_only_a_key() {
    assert_eq!(
        problems("", &[]),
        "the configuration has 1 problem\n  close.api_key (CLOSE_API_KEY): not set; create a key in Close \
         (Settings > API Keys)"
    );
    let config = single("", &[("CLOSE_API_KEY", "api_k")]);
    assert_eq!((config.amqp.delays.len(), config.amqp.prefetch), (4, 200));
    let many = single("[worker]\nconcurrency = 500", &[("CLOSE_API_KEY", "api_k")]);
    assert_eq!(many.amqp.prefetch, 1500);
    assert_eq!(config.amqp.retry_exchange(), "close-sync.retry");
    assert_eq!((&config.rules.lead.key, &config.rules.contact.key), (&None, &None));
    assert!(Config::load(None, &HashMap::new(), Need::Broker).is_ok());
}

#[test]
fn a_duration_that_is_too_short_is_not_called_mistyped() {
    for (value, expected) in [
        ("1m", "journal.max_age (JOURNAL_MAX_AGE): \"1m\" is too short; expected at least `1h`"),
        ("1 mo", "\"1 mo\" is not a valid duration; expected a value like `30s` or `5m`"),
    ] {
        let problems = problems("", &[("JOURNAL_MAX_AGE", value)]);
        assert!(problems.contains(expected), "{problems}");
    }
}

#[test]
fn a_country_is_two_letters() {
    let country = |text: &str| {
        let worker = single("", &[("CLOSE_API_KEY", "api_k"), ("CLOSE_COUNTRY", text)]).worker;
        worker.country.map(|country| country.to_string())
    };
    assert_eq!((country(""), country("GB").as_deref()), (None, Some("GB")));
    assert_eq!(country("de").as_deref(), Some("DE"));
    for wrong in ["ZZ", "Germany", "DEU", "+49"] {
        let reported = problems("", &[("CLOSE_COUNTRY", wrong)]);
        assert!(reported.contains("2 problems") && reported.contains("close.country"), "{reported}");
    }
}

#[test]
fn the_hash_ignores_where_a_setting_stands_and_every_secret() {
    let hash = |text: &str, more: &[(&str, &str)]| {
        single(text, &[&[("CLOSE_API_KEY", "api_k")], more].concat()).hash
    };
    let defaults = hash("", &[]);
    for same in ["http.addr = '127.0.0.1:1'", "[worker]\nconcurrency = 64"] {
        assert_eq!(hash(same, &[("CLOSE_API_KEY", "api_other"), ("LOG_FORMAT", "json")]), defaults);
    }
    let other = hash("[worker]\nconcurrency = 65", &[]);
    assert_eq!(hash("", &[("WORKER_CONCURRENCY", "65")]), other);
    assert!(other != defaults && other.len() == 12);
    let user = |url| hash("", &[("AMQP_URL", url)]);
    assert_eq!(user("amqp://a:one@h/%2f"), user("amqp://a:two@h/%2f"));
    assert_ne!(user("amqp://a:one@h/%2f"), user("amqp://b:one@h/%2f"));
}

#[test]
fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
    let file = "[close]\napi_key = 'api_file'\napi_url = 'http://x.test'\n[retry]\ndelays = ['1s']\n\
                [mapping.lead.custom]\ncf_1 = { from = ['$.traits.plan'] }\n\
                [mapping.contact]\ntitle = { write = 'if_empty' }";
    let environment = [
        ("CLOSE_API_KEY", "api_environment"),
        ("RETRY_DELAYS", "[\"5s\", \"1m\"]"),
        ("SWITCHES_ALLOW_CREATING_NEW_LEADS", "false"),
        ("MAPPING_LEAD_NAME", "{ from = [\"$.context.groupId\"] }"),
        ("CLOSE_LEAD_COMPANY_ID_FIELD", "cf_company"),
    ];
    let config = single(file, &environment);
    assert_eq!(config.close.api_key.expose_secret(), "api_environment");
    assert_eq!(config.close.url.as_str(), "http://x.test/");
    assert_eq!(config.amqp.delays[1].duration, Duration::from_mins(1));
    assert!(!config.worker.switches.allow_creating_new_leads);
    assert!(config.worker.switches.allow_creating_new_contacts);
    let Rules { lead, contact, .. } = &config.rules;
    assert_eq!(lead.custom[&FieldRef::new("cf_1")].write, WriteRule::Always);
    assert_eq!(contact.fields[&Field::Title].write, WriteRule::IfEmpty);
    let group = Alternative::parse("$.context.groupId").unwrap();
    let words = ["undefined", "null", "NaN", "None", "[object Object]"].map(str::to_owned);
    let group = Source::new([group]).with_placeholders(Placeholders::of_values(words));
    assert_eq!(lead.fields[&Field::Name].source, group);
    assert_eq!(lead.key, Some(FieldRef::new("cf_company")));
}

#[test]
fn all_mistakes_are_reported_at_once_without_secrets() {
    let file = "typo = 1\n[close]\napi_key = 'api secret'\nlead_company_id_field = 'custom.cf_1'\n\
                contact_user_id_field = 'cf_u'\ntimeout = 'soon'\n\
                [amqp]\nurl = 'http://user:hunter2@host'\nprefetch = 70000\nqueue = ''\n\
                [retry]\ndelays = ['2m', '30s']\n[switches]\nallow_creating_new_leads = 'no'\n\
                [mapping.lead]\nname = { from = ['$.['], rite = 1 }\n\
                [mapping.contact.custom]\nplan = { from = ['$.a'] }\ncf_u = { from = ['$.b'] }\n\
                cf_w = { from = ['$.b'], write = 'never' }";
    insta::assert_snapshot!(problems(
        file,
        &[("WORKER_CONCURRENCY", "many"), ("WORKER_HOLD", "16m"), ("HTTP_ADDR", "9090")]
    ));
    insta::assert_snapshot!(problems("[close]\napi_key = \"api_secret", &[("CLOSE_API_KEY", "k")]));
}

#[test]
fn the_words_that_are_not_an_id_come_from_the_file_or_the_environment() {
    let key = ("CLOSE_API_KEY", "api_k");
    let user = |file: &str, environment: &[(&str, &str)], id: &str| {
        let rules = single(file, &[&[key], environment].concat()).rules;
        rules.event_ids(json!({"userId": id}).to_string().as_bytes().into()).unwrap().user_id
    };
    let refused_by_posthog = [
        "anonymous",
        "Guest",
        "distinctid",
        "distinct_id",
        "id",
        "not_authenticated",
        "email",
        "UNDEFINED",
        "True",
        "false",
        "[object Object]",
        "NaN",
        "None",
        "none",
        "null",
        "0",
        "'null'",
        "\"undefined\"",
    ];
    let refused_by_mixpanel = [
        "-1",
        "0",
        "00000000-0000-0000-0000-000000000000",
        "<nil>",
        "[]",
        "anon",
        "anonymous",
        "false",
        "lmy47d",
        "n/a",
        "na",
        "nil",
        "none",
        "null",
        "true",
        "undefined",
        "unknown",
        "{}",
    ];
    for id in refused_by_posthog.iter().chain(&refused_by_mixpanel) {
        assert_eq!(user("", &[], id), None, "{id}");
    }
    for id in ["nan", "1", "00", "ann", "undefined-1", "ids"] {
        assert_eq!(user("", &[], id).as_deref(), Some(id));
    }
    let file = "[mapping]\nplaceholders = ['nobody']";
    assert_eq!(user(file, &[], "undefined").as_deref(), Some("undefined"));
    assert_eq!(user(file, &[], "Nobody"), None);
    let empty = [("MAPPING_PLACEHOLDERS", "[]"), ("MAPPING_PLACEHOLDER_VALUES", "[]")];
    assert_eq!(user(file, &empty, "nobody").as_deref(), Some("nobody"));

    let wrong = [key, ("MAPPING_PLACEHOLDERS", "[1]"), ("MAPPING_PLACEHOLDER_VALUES", "['null', ' ']")];
    let reported = problems("", &wrong);
    let keys: Vec<_> = reported.lines().skip(1).map(|line| line.split(' ').nth(2).unwrap()).collect();
    assert_eq!(keys, ["mapping.placeholder_values", "mapping.placeholders"], "{reported}");
}

/// Two organizations that share most settings.
const TWO: &str = "[close]\nsearch_lag = '5s'\nlead_company_id_field = 'cf_shared'\n\
                   [destinations.emea]\nclose.api_key = 'api_emea'\namqp.prefetch = 150\n\
                   [destinations.apac]\nclose = { api_key = 'api_file', lead_company_id_field = 'cf_own' }\n\
                   amqp.queue = 'asia'\nmapping.lead.name = { from = ['$.name'] }";

#[test]
fn destinations_have_shared_settings_and_their_own() {
    let environment = [
        ("CLOSE_SEARCH_LAG", "7s"),
        ("AMQP_PREFETCH", "99"),
        ("DESTINATIONS_APAC_CLOSE_API_KEY", "api_apac"),
    ];
    let config = load(TWO, &environment).unwrap();
    let reported: Vec<_> = config
        .destinations
        .iter()
        .map(|each| {
            let (lag, key) = (each.worker.search_lag.as_secs(), each.close.api_key.expose_secret());
            let field = each.rules.lead.key.as_ref().unwrap().clone();
            (each.name.as_deref().unwrap(), each.amqp.queue.as_str(), each.amqp.prefetch, key, field, lag)
        })
        .collect();
    assert_eq!(
        reported,
        [
            ("apac", "asia", 99, "api_apac", FieldRef::new("cf_own"), 7),
            ("emea", "close-sync-emea", 150, "api_emea", FieldRef::new("cf_shared"), 7),
        ]
    );
    assert_eq!(config.clone().single().unwrap_err(), ["apac", "emea"]);

    let layers = Layers::new(TWO, "close-sync.toml", &HashMap::new());
    let emea = layers.clone().only(Some("emea")).unwrap().read(Need::All).unwrap().single().unwrap();
    assert_eq!((emea.name.as_deref(), emea.amqp.prefetch), (Some("emea"), 150));
    assert!(layers.only(Some("emae")).unwrap_err().to_string().contains("configured: apac, emea"));

    // What `show` prints is a valid configuration with the same settings.
    let shown = load(TWO, &environment).unwrap().show();
    assert!(!shown.contains("api_emea") && !shown.contains("api_apac"), "{shown}");
    let keys = [("DESTINATIONS_APAC_CLOSE_API_KEY", "1"), ("DESTINATIONS_EMEA_CLOSE_API_KEY", "2")];
    assert_eq!(load(&shown, &keys).unwrap().show(), shown);
    let own = shown.split_once("[destinations.emea.amqp]").unwrap().1;
    assert!(
        own.starts_with("\nprefetch = 150\nqueue = \"close-sync-emea\"\n\n[destinations.emea.close]"),
        "{own}"
    );
}

#[test]
fn mistakes_and_conflicts_of_destinations_name_the_destination() {
    let file = "[retry]\ndelays = []\n[destinations.a]\namqp.prefetch = 1\nhttp.addr = 'x'\n\
                [destinations.Bad-Name]\nclose.api_key = 'api_c'\nclose.timeout = 'soon'";
    insta::assert_snapshot!(problems(file, &[("DESTINATIONS_A_WORKER_MERGE", "perhaps")]));
    let file = "[close]\napi_key = 'api_shared'\n[destinations.a]\n[destinations.b]\namqp.queue = 'close-sync-a.dead'";
    insta::assert_snapshot!(problems(file, &[]));
}

#[test]
fn destinations_with_the_same_name_key_or_queue_exclude_each_other() {
    let read = |name: &str, key: &str, queue: &str| {
        single(&format!("[destinations.{name}]\nclose.api_key = '{key}'\namqp.queue = '{queue}'"), &[])
    };
    let emea = read("emea", "api_a", "q-a");
    for same in [read("emea", "api_b", "q-b"), read("europe", "api_a", "q-b"), read("europe", "api_b", "q-a")]
    {
        assert!(emea.excludes(&same) && same.excludes(&emea), "{same:?}");
    }
    assert!(!emea.excludes(&read("europe", "api_b", "q-b")));
}

#[test]
fn every_destination_without_a_key_is_reported_once() {
    let file = "[destinations.a]\n[destinations.b]\nclose.api_key = 1\n[destinations.c]";
    let reported = problems(file, &[]);
    let lines: Vec<_> = reported.lines().skip(1).map(|line| line.split(' ').nth(2).unwrap()).collect();
    assert_eq!(lines, ["a", "b", "c"].map(|name| format!("destinations.{name}.close.api_key")), "{reported}");
    // A command that needs only the broker needs no key.
    let layers = Layers::new("[destinations.a]\n[destinations.b]", "", &HashMap::new());
    assert_eq!(layers.read(Need::Broker).unwrap().destinations.len(), 2);
}

#[test]
fn a_destination_equals_its_reloaded_self_unless_a_setting_or_file_changed() {
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    let renew = || {
        let key = rcgen::KeyPair::generate().unwrap();
        let made = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        std::fs::write(&ca, made.pem()).unwrap();
    };
    renew();
    let file = format!(
        "[close]\napi_key = 'api_a'\n[amqp]\nurl = 'amqps://u:p@a'\ntls.ca_file = '{}'",
        ca.display()
    );
    let one = single(&file, &[]);
    assert_eq!(
        one,
        single(&format!("{file}\n[http]\naddr = '127.0.0.1:1'"), &[]),
        "a setting of the process changed"
    );
    let others = [
        ("CLOSE_API_KEY", "api_b"),
        ("CLOSE_API_URL", "http://x.test"),
        ("CLOSE_TIMEOUT", "1s"),
        ("CLOSE_RATE_LIMIT_SHARE", "50"),
        ("CLOSE_SCHEMA_REFRESH", "1m"),
        ("AMQP_URL", "amqps://u:q@a"),
        ("AMQP_PREFETCH", "300"),
        ("WORKER_MERGE", "false"),
        ("WORKER_GRACE", "1s"),
        ("MAPPING_LEAD_NAME", "{ write = \"if_empty\" }"),
    ];
    for other in others {
        assert_ne!(one, single(&file, &[other]), "{other:?}");
    }
    renew();
    assert_ne!(one, single(&file, &[]), "a certificate was renewed in the same file");
}

#[test]
fn traces_are_off_without_a_collector_and_their_settings_are_checked() {
    let key = ("CLOSE_API_KEY", "api_k");
    let traces = |text: &str, environment: &[(&str, &str)]| load(text, environment).unwrap().traces;
    let off = traces("", &[key]);
    assert_eq!((off.endpoint, off.service.as_str(), off.ratio), (None, "close-sync", 1.0));
    let standard = [
        key,
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=hunter2"),
        ("OTEL_SERVICE_NAME", "crm"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
    ];
    let on = traces("[otel.traces.sampler]\narg = 1", &standard);
    let endpoint = on.endpoint.as_ref().map(Url::as_str);
    assert_eq!(
        (endpoint, on.service.as_str(), on.ratio),
        (Some("http://collector:4318/v1/traces"), "crm", 0.25)
    );
    assert_eq!(on.headers["api-key"], "hunter2");
    let shown = load("", &standard).unwrap().show();
    assert!(shown.contains("headers = \"***\"") && !shown.contains("hunter2"), "{shown}");
    // Whole numbers are numbers, in the file and in the environment.
    let (none, all) = ("otel.traces.sampler.arg = 0", [key, ("OTEL_TRACES_SAMPLER_ARG", "1")]);
    assert_eq!((traces(none, &[key]).ratio, traces(none, &all).ratio), (0.0, 1.0));

    let file = "[otel]\nservice.name = ' '\ntraces.sampler.arg = 2\n[otel.exporter.otlp]\n\
                endpoint = 'localhost:4318'\nheaders = 'hunter2'\n\
                [destinations.emea]\notel.service.name = 'own'";
    insta::assert_snapshot!(problems(file, &[("DESTINATIONS_EMEA_CLOSE_API_KEY", "api_k")]));
    let reported = problems("", &[key, ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:hunter2@collector")]);
    assert!(reported.contains("without credentials") && !reported.contains("hunter2"), "{reported}");
}

#[test]
fn the_value_of_the_variable_for_all_destinations_is_not_shown() {
    let reported = problems("", &[("DESTINATIONS", "{ emea = { close.api_key = 'api_secret' }")]);
    assert!(reported.contains("destinations (DESTINATIONS): the value is not a table"), "{reported}");
    assert!(!reported.contains("secret"), "{reported}");
}

#[test]
fn a_page_that_other_machines_can_reach_needs_a_token() {
    let page = |environment: &[(&str, &str)]| {
        let key = ("CLOSE_API_KEY", "api_key");
        load("", &[&[key], environment].concat()).map(|config| config.page.is_some())
    };
    assert_eq!(page(&[]), Ok(false));
    assert_eq!(page(&[("HTTP_PAGE", "true")]), Ok(true), "loopback");
    let (open, token) = (("HTTP_ADDR", "0.0.0.0:9090"), ("HTTP_PAGE_TOKEN", "0123456789abcdef"));
    assert_eq!(page(&[open]), Ok(false), "it is off");
    assert_eq!(page(&[("HTTP_PAGE", "true"), open, token]), Ok(true));
    let wrong = [open, ("HTTP_PAGE_TOKEN", "short"), ("HTTP_PAGE_HOSTS", "[\"http://x.test:80/\"]")];
    let reported = wrong.map(|wrong| page(&[("HTTP_PAGE", "true"), wrong]).unwrap_err().to_string());
    insta::assert_snapshot!(reported.join("\n"));
}

#[test]
fn a_secret_can_be_the_content_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (url, key) = (file("url", "amqp://u:hunter2@host/v\r\n"), file("key", "api_secret\n"));
    let environment = [("CLOSE_API_KEY_FILE", key.as_str()), ("AMQP_URL_FILE", &url)];
    let config = load("[close]\napi_key = 'api_file'", &environment).unwrap();
    let shown = config.show();
    assert!(shown.contains("api_key = \"***\"") && shown.contains("amqp://u:***@host/v"), "{shown}");
    let one = config.single().unwrap();
    assert_eq!(one.close.api_key.expose_secret(), "api_secret");
    assert_eq!(one.amqp.nodes.masked(), "amqp://u:***@host/v");

    let emea = file("emea", "api_own");
    let own = [("CLOSE_API_KEY_FILE", key.as_str()), ("DESTINATIONS_EMEA_CLOSE_API_KEY_FILE", &emea)];
    let config = load("[destinations.apac]\n[destinations.emea]", &own).unwrap();
    let keys = config.destinations.iter().map(|each| each.close.api_key.expose_secret());
    assert_eq!(keys.collect::<Vec<_>>(), ["api_secret", "api_own"]);
}

#[test]
fn an_unreadable_secret_file_is_reported_with_everything_else() {
    let environment = [
        ("CLOSE_API_KEY", "api_secret"),
        ("CLOSE_API_KEY_FILE", "/nowhere/key"),
        ("AMQP_URL_FILE", "/nowhere/url"),
        ("DESTINATIONS_EMEA_CLOSE_API_KEY_FILE", "/dev/null"),
        ("DESTINATIONS_EMEA_AMQP_URL", "amqp://u:secret@host/v"),
        ("DESTINATIONS_EMEA_AMQP_URL_FILE", "/nowhere/url"),
        // Not a secret, so the suffix has no meaning.
        ("CLOSE_TIMEOUT_FILE", "/nowhere/timeout"),
    ];
    insta::assert_snapshot!(problems("[close]\ntimeout = 'soon'\n[destinations.emea]", &environment));
    for key in SECRETS {
        let name = format!("{}_FILE", key.replace('.', "_").to_uppercase());
        let reported = problems("", &[(&name, "/nowhere/secret")]);
        assert!(reported.contains(&format!("cannot read \"/nowhere/secret\" ({name})")), "{reported}");
    }
}

#[test]
fn print_config_masks_secrets() {
    let urls = "amqp://u:hunter2@host/v, amqp://u:hunter2@other/v";
    let token = ("HTTP_PAGE_TOKEN", "secret-0123456789");
    let shown = load("", &[("CLOSE_API_KEY", "api_secret"), ("AMQP_URL", urls), token]).unwrap().show();
    assert!(shown.contains("url = \"amqp://u:***@host/v,amqp://u:***@other/v\""), "{shown}");
    assert!(shown.contains("api_key = \"***\""), "{shown}");
    assert!(shown.contains("page_token = \"***\""), "{shown}");
    assert!(!shown.contains("secret") && !shown.contains("hunter2"));
}
