//! `amqps://`: server and client certificates.

use close_sync_simulator::Settings;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;

use crate::support::{Bench, Node, identify};

/// A certificate authority with its own directory, which contains `ca.pem`.
struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory, issuer: Issuer::new(params, key) }
    }

    /// Issues a certificate, with its key: `<file>cert.pem`, `<file>key.pem`.
    fn issue(&self, file: &str, name: &str, hosts: &[&str]) {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.path(&format!("{file}cert.pem")), certificate.pem()).unwrap();
        std::fs::write(self.path(&format!("{file}key.pem")), key.serialize_pem()).unwrap();
    }

    fn path(&self, file: &str) -> String {
        self.directory.path().join(file).to_str().unwrap().to_owned()
    }

    fn directory(&self) -> String {
        self.path("")
    }
}

/// The line of `check` about RabbitMQ.
async fn check(bench: &Bench) -> String {
    let output = bench.run(&["check"], b"").await;
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.contains("RabbitMQ at")).unwrap();
    let code = match line.split(' ').next() {
        Some("ok") => 0,
        Some("wrong") => 78,
        _ => 69,
    };
    assert_eq!(output.status.code(), Some(code), "{text}");
    line.to_owned()
}

/// The check passes and a worker syncs a message.
async fn assert_works(bench: &Bench) {
    assert!(check(bench).await.starts_with("ok"), "{}", check(bench).await);
    let metrics = bench.sync(&[identify("u1", json!({}))]).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_is_trusted_if_its_ca_and_host_name_match() {
    let authority = Authority::new("CA of the broker");
    authority.issue("", "broker", &["127.0.0.1"]);
    let node = Node::with(&["--tls", &authority.directory()]).await;
    let url = format!("amqps://guest:guest@{}/%2f", node.tls_addr("127.0.0.1"));
    let bench = Bench::on(&node.url, Settings::fast()).await.set("AMQP_URL", &url);

    // The CA is unknown, so the worker keeps reconnecting. Then the content of the CA file is replaced.
    let line = check(&bench).await;
    assert!(line.contains("UnknownIssuer. Set `amqp.tls.ca_file` (AMQP_TLS_CA_FILE)"), "{line}");
    let (file, trusted) = (authority.path("close-sync.toml"), authority.path("trusted.pem"));
    std::fs::write(&file, format!("[amqp.tls]\nca_file = '{trusted}'")).unwrap();
    std::fs::copy(Authority::new("another CA").path("ca.pem"), &trusted).unwrap();
    let bench = bench.set("CLOSE_SYNC_CONFIG", &file);
    let worker = bench.starting_worker();
    worker.until("reconnecting", async |worker| worker.events("broker_unavailable") >= 2).await;
    assert_eq!(worker.events("broker_lost"), 1, "{}", worker.log());
    worker.signal("HUP");
    worker.until("read", async |worker| worker.events("reload_unchanged") == 1).await;
    std::fs::copy(authority.path("ca.pem"), &trusted).unwrap();
    worker.signal("HUP");
    worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
    worker.terminate().await;
    assert_works(&bench).await;

    let bench = bench.set("AMQP_URL", &url.replace("127.0.0.1", "localhost"));
    let line = check(&bench).await;
    assert!(line.contains("not valid for name \"localhost\"") && line.contains("`amqp.url`"), "{line}");
    let line = check(&bench.set("AMQP_URL", &node.url.replace("amqp:", "amqps:"))).await;
    assert!(line.contains("Check that this is a TLS port"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_requires_a_client_certificate_receives_it() {
    let (authority, other) = (Authority::new("CA of the broker"), Authority::new("another CA"));
    authority.issue("", "broker", &["127.0.0.1"]);
    let conf = [
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = true",
        "ssl_cert_login_from = common_name",
        "auth_mechanisms.1 = PLAIN",
        "auth_mechanisms.2 = EXTERNAL",
    ];
    let certificates = authority.directory();
    let mut options = vec!["--tls", &certificates, "--plugins", "rabbitmq_auth_mechanism_ssl"];
    options.extend(conf.iter().flat_map(|line| ["--conf", line]));
    let node = Node::with(&options).await;
    let url = format!("amqps://guest:guest@{}/%2f", node.tls_addr("127.0.0.1"));
    let bench = Bench::on(&node.url, Settings::fast())
        .await
        .set("AMQP_URL", &url)
        .set("AMQP_TLS_CA_FILE", &authority.path("ca.pem"));

    let line = check(&bench).await;
    assert!(line.contains("TLS with RabbitMQ failed") && line.contains("`amqp.tls.cert_file`"), "{line}");
    let with_certificate = |bench: Bench, of: &Authority| {
        of.issue("client-", "worker", &[]);
        bench
            .set("AMQP_TLS_CERT_FILE", &of.path("client-cert.pem"))
            .set("AMQP_TLS_KEY_FILE", &of.path("client-key.pem"))
    };
    let bench = with_certificate(bench, &other);
    let line = check(&bench).await;
    assert!(line.contains("TLS with RabbitMQ failed") && line.contains("`amqp.tls.cert_file`"), "{line}");
    let bench = with_certificate(bench, &authority);
    assert_works(&bench).await;

    // With EXTERNAL, the common name of the certificate is the user name.
    let external = format!("amqps://{}/%2f?auth_mechanism=external", node.tls_addr("127.0.0.1"));
    let bench = bench.set("AMQP_URL", &external);
    let line = check(&bench).await;
    assert!(line.contains("refused the connection") && line.contains("EXTERNAL"), "{line}");
    node.ctl(&["add_user", "worker", "not needed"]).await;
    node.ctl(&["clear_password", "worker"]).await;
    node.ctl(&["set_permissions", "worker", ".*", ".*", ".*"]).await;
    assert!(check(&bench).await.starts_with("ok"), "{}", check(&bench).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_tls_settings_are_reported_together() {
    let bench = Bench::new()
        .await
        .set("AMQP_TLS_CA_FILE", "/nowhere/ca.pem")
        .set("AMQP_TLS_CERT_FILE", "/nowhere/cert.pem");
    insta::assert_snapshot!(bench.transcript(&["check"], b"").await);
}
