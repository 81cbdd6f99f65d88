//! The variables, ports and paths in `deploy/` exist in the program.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use close_sync::config::{Config, DEFAULTS, Need};

use crate::support::Bench;

const UNIT: &str = include_str!("../../../deploy/systemd/close-sync.service");
const DEPLOYMENT: &str = include_str!("../../../deploy/kubernetes/base/deployment.yaml");
const NETWORK_POLICY: &str = include_str!("../../../deploy/kubernetes/base/networkpolicy.yaml");
const SERVICE: &str = include_str!("../../../deploy/kubernetes/monitoring/service.yaml");
const MONITOR: &str = include_str!("../../../deploy/kubernetes/monitoring/servicemonitor.yaml");
const COMPOSE: &str = include_str!("../../../docker-compose.yml");
const DOCKERFILE: &str = include_str!("../../../deploy/Dockerfile");
const CHANGELOG: &str = include_str!("../../../deploy/CHANGELOG.md");

/// The rest of each line that starts with `beginning`.
fn after<'a>(file: &'a str, beginning: &str) -> Vec<&'a str> {
    file.lines()
        .filter_map(|line| line.trim_start().trim_start_matches("- ").strip_prefix(beginning))
        .collect()
}

/// Name and value of each variable in the Deployment.
fn variables_of_the_deployment() -> Vec<(&'static str, &'static str)> {
    let lines: Vec<_> = DEPLOYMENT.lines().map(str::trim_start).collect();
    let pair = |two: &[&'static str]| {
        Some((two.first()?.strip_prefix("- name: ")?, two.get(1)?.strip_prefix("value: ")?))
    };
    lines.windows(2).filter_map(pair).collect()
}

fn variables_of_the_unit() -> Vec<(&'static str, &'static str)> {
    after(UNIT, "Environment=").into_iter().map(|pair| pair.split_once('=').unwrap()).collect()
}

/// Adds the variables of all settings to `known`.
fn variables(table: &toml::Table, path: &str, known: &mut BTreeSet<String>) {
    for (key, value) in table {
        let path = format!("{path}{key}").to_uppercase();
        known.insert(path.clone());
        if let Some(inner) = value.as_table() {
            variables(inner, &format!("{path}_"), known);
        }
    }
}

#[test]
fn every_variable_is_a_setting_of_the_program() {
    let mut known: BTreeSet<_> =
        ["CLOSE_SYNC_CONFIG", "CLOSE_API_KEY_FILE", "AMQP_URL_FILE"].map(String::from).into();
    variables(&toml::from_str(DEFAULTS).unwrap(), "", &mut known);
    let compose = COMPOSE.split_once("&environment\n").unwrap().1.split_once("\n\n").unwrap().0;
    let of_compose =
        compose.lines().filter(|line| !line.contains('#')).map(|line| line.trim().split(':').next().unwrap());
    let of_image = after(DOCKERFILE, "ENV ").into_iter().map(|pair| pair.split('=').next().unwrap());
    let named: Vec<_> = variables_of_the_unit()
        .into_iter()
        .chain(variables_of_the_deployment())
        .map(|(name, _)| name)
        .chain(of_compose)
        .chain(of_image)
        .collect();
    assert!(named.len() > 12, "{named:?}");
    let unknown: Vec<_> = named.iter().filter(|name| !known.contains(**name)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// With the secrets in place, the mounted configuration is valid.
#[test]
fn the_settings_of_a_deployment_are_valid() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = [("close_api_key", "api_k"), ("amqp_url", "amqps://user:password@host/%2f")];
    for (name, value) in secrets {
        std::fs::write(folder.path().join(name), value).unwrap();
    }
    let here = folder.path().to_str().unwrap();
    for (variables, directory) in
        [(variables_of_the_unit(), "%d"), (variables_of_the_deployment(), "/run/secrets/close-sync")]
    {
        let of = |(name, value): &(&str, &str)| ((*name).to_owned(), value.replace(directory, here));
        let environment: HashMap<_, _> = variables.iter().map(of).collect();
        for file in ["base", "example"] {
            let file = format!("{}/deploy/kubernetes/{file}/config.toml", env!("CARGO_MANIFEST_DIR"));
            let config = Config::load(Some(file.as_ref()), &environment, Need::All).unwrap();
            assert!(config.single().unwrap().amqp.nodes.is_encrypted());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_port_and_path_is_served() {
    let (_, addr) = *variables_of_the_deployment().iter().find(|(name, _)| *name == "HTTP_ADDR").unwrap();
    let port = addr.rsplit(':').next().unwrap();
    assert_eq!(after(DEPLOYMENT, "containerPort: "), [port]);
    assert_eq!(after(SERVICE, "port: "), [port]);
    assert_eq!(after(DOCKERFILE, "EXPOSE "), [port]);
    // Other files refer to the port by name.
    assert!(DEPLOYMENT.contains(&format!("- name: http\n              containerPort: {port}")));
    assert_eq!(after(DEPLOYMENT, "port: "), ["http", "http"]);
    assert_eq!((after(SERVICE, "targetPort: "), after(MONITOR, "port: ")), (vec!["http"], vec!["http"]));
    assert_eq!(after(NETWORK_POLICY, "port: ").first(), Some(&"http"));

    let worker = Bench::new().await.worker().await;
    for path in after(DEPLOYMENT, "path: ").into_iter().chain(after(MONITOR, "path: ")) {
        assert_eq!(worker.page(path).await.unwrap().0, 200, "{path}");
    }
    worker.terminate().await;
}

/// `dlq` writes temporary files for a large export or an edit.
#[test]
fn a_read_only_root_has_a_directory_for_temporary_files() {
    assert_eq!(after(DEPLOYMENT, "readOnlyRootFilesystem: "), ["true"]);
    assert!(after(DEPLOYMENT, "mountPath: ").contains(&"/tmp"));
    let common = COMPOSE.split_once("&close-sync\n").unwrap().1.split_once("\n\n").unwrap().0;
    assert_eq!((after(common, "read_only: "), after(common, "tmpfs: ")), (vec!["true"], vec!["[/tmp]"]));
}

/// `--version` prints the version of the newest changelog entry, and a commit.
#[tokio::test(flavor = "multi_thread")]
async fn the_changelog_has_an_entry_for_this_version() {
    let output = Bench::new().await.output(&["--version"]).await;
    let (version, commit) = output.strip_prefix("close-sync ").unwrap().split_once(" (").unwrap();
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
    assert!(commit.strip_suffix(")\n").is_some_and(|commit| !commit.is_empty()), "{output}");
    let newest = CHANGELOG.lines().find_map(|line| line.strip_prefix("## ")).unwrap();
    assert!(newest.contains(version), "{newest}");
}

/// The stop timeouts are longer than `worker.grace`, and systemd does not restart after exit codes 2 and 78.
#[test]
fn stop_timeouts_are_longer_than_the_grace_period() {
    let grace =
        toml::from_str::<toml::Table>(DEFAULTS).unwrap()["worker"]["grace"].as_str().unwrap().to_owned();
    let seconds = |text: &str| Duration::from_secs(text.trim_end_matches('s').parse().unwrap());
    let allowed = [
        after(UNIT, "TimeoutStopSec="),
        after(DEPLOYMENT, "terminationGracePeriodSeconds: "),
        after(COMPOSE, "stop_grace_period: "),
    ];
    for allowed in allowed {
        let [allowed] = allowed[..] else { panic!("{allowed:?}") };
        assert!(seconds(allowed) >= seconds(&grace) + Duration::from_secs(5), "{allowed}");
    }
    assert_eq!(after(UNIT, "RestartPreventExitStatus="), ["2 78"]);
}
