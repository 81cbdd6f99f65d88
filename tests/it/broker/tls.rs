//! `amqps://`: whom the worker trusts, and whom the broker lets in.

use close_sync_simulator::Settings;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;

use crate::support::{Bench, Node, identify};

/// A certificate authority in a directory of its own: `ca.pem`.
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

/// What `check` says of the broker.
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

/// The worker does its work.
async fn works(bench: &Bench) {
    assert!(check(bench).await.starts_with("ok"), "{}", check(bench).await);
    let metrics = bench.sync(&[identify("u1", json!({}))]).await;
    assert_eq!(metrics.outcomes(), [("created", 1)].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_is_believed_when_its_authority_and_its_name_are_known() {
    let authority = Authority::new("CA of the broker");
    authority.issue("", "broker", &["127.0.0.1"]);
    let node = Node::with(&["--tls", &authority.directory()]).await;
    let url = format!("amqps://guest:guest@{}/%2f", node.tls_addr("127.0.0.1"));
    let bench = Bench::on(&node.url, Settings::fast()).await.set("AMQP_URL", &url);

    // The authority is known to nobody: the worker keeps trying, and is mended while it does. The file is another
    // one then, although its name is the same.
    let told = check(&bench).await;
    assert!(told.contains("UnknownIssuer. Set `amqp.tls.ca_file` (AMQP_TLS_CA_FILE)"), "{told}");
    let (file, trusted) = (authority.path("close-sync.toml"), authority.path("trusted.pem"));
    std::fs::write(&file, format!("[amqp.tls]\nca_file = '{trusted}'")).unwrap();
    std::fs::copy(Authority::new("CA of somebody else").path("ca.pem"), &trusted).unwrap();
    let bench = bench.set("CLOSE_SYNC_CONFIG", &file);
    let worker = bench.starting_worker();
    worker.until("trying again", async |worker| worker.logged("still no connection") >= 2).await;
    assert_eq!(worker.logged("no connection to RabbitMQ, reconnecting"), 1, "{}", worker.log());
    worker.signal("HUP");
    worker.until("read", async |worker| worker.logged("configuration reloaded: no changes") == 1).await;
    std::fs::copy(authority.path("ca.pem"), &trusted).unwrap();
    worker.signal("HUP");
    worker.until("ready", async |worker| worker.ready().await.0 == 200).await;
    worker.terminate().await;
    works(&bench).await;

    let bench = bench.set("AMQP_URL", &url.replace("127.0.0.1", "localhost"));
    let told = check(&bench).await;
    assert!(told.contains("not valid for name \"localhost\"") && told.contains("`amqp.url`"), "{told}");
    let told = check(&bench.set("AMQP_URL", &node.url.replace("amqp:", "amqps:"))).await;
    assert!(told.contains("Check that this is a TLS port"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_asks_for_a_certificate_gets_it() {
    let (authority, stranger) = (Authority::new("CA of the broker"), Authority::new("CA of somebody else"));
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

    let told = check(&bench).await;
    assert!(told.contains("TLS with RabbitMQ failed") && told.contains("`amqp.tls.cert_file`"), "{told}");
    let with_certificate = |bench: Bench, of: &Authority| {
        of.issue("client-", "worker", &[]);
        bench
            .set("AMQP_TLS_CERT_FILE", &of.path("client-cert.pem"))
            .set("AMQP_TLS_KEY_FILE", &of.path("client-key.pem"))
    };
    let bench = with_certificate(bench, &stranger);
    let told = check(&bench).await;
    assert!(told.contains("TLS with RabbitMQ failed") && told.contains("`amqp.tls.cert_file`"), "{told}");
    let bench = with_certificate(bench, &authority);
    works(&bench).await;

    // The certificate can be the login, of the user its common name says.
    let external = format!("amqps://{}/%2f?auth_mechanism=external", node.tls_addr("127.0.0.1"));
    let bench = bench.set("AMQP_URL", &external);
    let told = check(&bench).await;
    assert!(told.contains("refused the connection") && told.contains("EXTERNAL"), "{told}");
    node.ctl(&["add_user", "worker", "not needed"]).await;
    node.ctl(&["clear_password", "worker"]).await;
    node.ctl(&["set_permissions", "worker", ".*", ".*", ".*"]).await;
    assert!(check(&bench).await.starts_with("ok"), "{}", check(&bench).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_in_its_settings_are_told_at_once() {
    let bench = Bench::new()
        .await
        .set("AMQP_TLS_CA_FILE", "/nowhere/ca.pem")
        .set("AMQP_TLS_CERT_FILE", "/nowhere/cert.pem");
    insta::assert_snapshot!(bench.transcript(&["check"], b"").await);
}
