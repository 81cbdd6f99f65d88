//! TLS settings: CA bundle and client certificate. Only for `amqps://`.
//!
//! The files are read and validated with the configuration, and again on SIGHUP. lapin ignores a file without
//! certificates silently, and fails later with an error that does not name the file.

use std::io;

use lapin::ErrorKind;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};
use secrecy::{ExposeSecret, SecretString};

/// CA certificates in addition to the system's trust store, and a client certificate.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// CA certificates, PEM.
    ca: Option<String>,
    identity: Option<Identity>,
}

/// A client certificate with its chain and its key, both PEM.
#[derive(Clone, Debug)]
struct Identity {
    chain: String,
    key: SecretString,
}

/// Paths of PEM files. Empty: none.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// CA certificates to trust in addition to the system's.
    pub ca: &'a str,
    /// A client certificate, followed by its intermediate certificates.
    pub cert: &'a str,
    /// The key of the client certificate (PKCS#8, PKCS#1 or SEC1), not encrypted.
    pub key: &'a str,
}

impl<'a> Files<'a> {
    /// The files that are configured, with the names of their settings.
    pub fn given(self) -> impl Iterator<Item = (&'static str, &'a str)> {
        let named = [("ca_file", self.ca), ("cert_file", self.cert), ("key_file", self.key)];
        named.into_iter().filter(|(_, path)| !path.is_empty())
    }
}

impl Tls {
    /// Reads and validates the files.
    ///
    /// # Errors
    /// All problems: the name of the setting, and what is wrong with its file.
    pub fn read(files: Files<'_>) -> Result<Self, Vec<(&'static str, String)>> {
        let mut problems = Vec::new();
        let mut read = |setting, path: &str| {
            let text = (!path.is_empty()).then(|| std::fs::read_to_string(path));
            let unreadable = |error| problems.push((setting, format!("cannot read \"{path}\": {error}")));
            text.and_then(|text| text.map_err(unreadable).ok())
        };
        let ca = read("ca_file", files.ca);
        let (chain, key) = (read("cert_file", files.cert), read("key_file", files.key));
        if let Some(Err(problem)) = ca.as_deref().map(validate_ca) {
            problems.push(("ca_file", format!("\"{}\" {problem}", files.ca)));
        }
        match (files.cert.is_empty(), files.key.is_empty()) {
            (false, true) => problems.push(("key_file", "not set; `cert_file` needs a key".into())),
            (true, false) => {
                problems.push(("cert_file", "not set; `key_file` needs a certificate".into()));
            }
            (true, true) | (false, false) => {}
        }
        let identity = chain.zip(key);
        if let Some(Err(problem)) = identity.as_ref().map(|(chain, key)| validate_identity(chain, key)) {
            problems.push(("cert_file", format!("\"{}\" with \"{}\" {problem}", files.cert, files.key)));
        }
        if problems.is_empty() {
            let identity = identity.map(|(chain, key)| Identity { chain, key: key.into() });
            Ok(Self { ca, identity })
        } else {
            Err(problems)
        }
    }

    pub(crate) fn for_lapin(&self) -> OwnedTLSConfig {
        OwnedTLSConfig {
            identity: self.identity.as_ref().map(|Identity { chain, key }| OwnedIdentity::PKCS8 {
                pem: chain.clone().into_bytes(),
                key: key.expose_secret().as_bytes().to_vec(),
            }),
            cert_chain: self.ca.clone(),
        }
    }
}

/// Compares the contents of the files, so that a renewed certificate counts as a change.
impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.for_lapin() == other.for_lapin()
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match certificates {
        Ok(none) if none.is_empty() => Err("contains no PEM certificate".into()),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(format!("is not valid PEM: {error}")),
    }
}

fn validate_ca(pem: &str) -> Result<(), String> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(pem)? {
        store.add(certificate).map_err(|error| format!("contains an unusable certificate: {error}"))?;
    }
    Ok(())
}

fn validate_identity(chain: &str, key: &str) -> Result<(), String> {
    let chain = certificates(chain)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| {
        "is not a certificate with its key: the key is not PEM, or it is encrypted".to_owned()
    })?;
    CertifiedKey::from_der(chain, key, &ring::default_provider())
        .map(drop)
        .map_err(|error| format!("cannot be used: {error}"))
}

/// The remedy when the broker ends a handshake.
const CLIENT_CERTIFICATE: &str = "RabbitMQ may require a client certificate from a CA that it trusts: set \
                                  `amqp.tls.cert_file` and `amqp.tls.key_file`";

/// Describes an error of an encrypted connection with a remedy, if TLS may be the cause.
pub(crate) fn explain(error: &lapin::Error) -> Option<String> {
    let ErrorKind::IOError(io) = error.kind() else { return None };
    match io.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(error) => Some(format!("{error}. {}", remedy(error))),
        // With TLS 1.3 the broker refuses a client without certificate after the handshake. If the client has sent
        // data meanwhile, it may only see that the connection ended.
        None if matches!(io.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof) => {
            Some(format!("{error}. {CLIENT_CERTIFICATE}"))
        }
        None => None,
    }
}

fn remedy(error: &rustls::Error) -> &'static str {
    use rustls::Error::{AlertReceived, General, InvalidCertificate, InvalidMessage};
    // An empty trust store is a `General` error.
    if matches!(error, InvalidCertificate(CertificateError::UnknownIssuer) | General(_)) {
        "Set `amqp.tls.ca_file` (AMQP_TLS_CA_FILE) to the certificate of the CA that signed RabbitMQ's certificate"
    } else if matches!(error, InvalidCertificate(_)) {
        "RabbitMQ's certificate must be valid today and name the host in `amqp.url` (AMQP_URL)"
    } else if matches!(error, InvalidMessage(_)) {
        "Check that this is a TLS port; the default is 5671"
    } else if matches!(error, AlertReceived(_)) {
        CLIENT_CERTIFICATE
    } else {
        "RabbitMQ and close-sync (TLS 1.2 and 1.3) have no TLS version or cipher in common"
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    /// Reads files with these contents and returns the problems.
    fn problems(ca: Option<&str>, cert: Option<&str>, key: Option<&str>) -> Vec<(&'static str, String)> {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: Option<&str>| {
            let Some(text) = text else { return String::new() };
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (ca, cert, key) = (write("ca", ca), write("cert", cert), write("key", key));
        let read = Tls::read(Files { ca: &ca, cert: &cert, key: &key });
        let folder = format!("{}/", directory.path().display());
        let problems = read.err().unwrap_or_default().into_iter();
        problems.map(|(setting, problem)| (setting, problem.replace(&folder, ""))).collect()
    }

    #[test]
    fn files_are_validated_when_they_are_read() {
        let made = || {
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
            (certificate.pem(), key.serialize_pem())
        };
        let (cert, key) = made();
        assert_eq!(problems(None, None, None), []);
        assert_eq!(problems(Some(&cert), Some(&cert), Some(&key)), []);

        let none = ("ca_file", "\"ca\" contains no PEM certificate".to_owned());
        let incomplete = ("key_file", "not set; `cert_file` needs a key".to_owned());
        assert_eq!(problems(Some(&key), Some(&cert), None), [none, incomplete]);
        let incomplete = ("cert_file", "not set; `key_file` needs a certificate".to_owned());
        assert_eq!(problems(None, None, Some(&key)), [incomplete]);
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (key, cert, message) in [
            (made().1.as_str(), cert.as_str(), "cannot be used: keys may not be consistent: KeyMismatch"),
            ("-----BEGIN ENCRYPTED PRIVATE KEY-----", &cert, "the key is not PEM, or it is encrypted"),
            (&key, broken, "cannot be used: invalid peer certificate: BadEncoding"),
        ] {
            let found = problems(None, Some(cert), Some(key));
            let [("cert_file", problem)] = found.as_slice() else { panic!("{found:?}") };
            assert!(problem.contains(message), "{problem}");
        }
        assert!(problems(Some(broken), None, None)[0].1.contains("contains an unusable certificate"));
        let missing = Tls::read(Files { ca: "/nowhere/ca.pem", cert: "", key: "" }).unwrap_err();
        assert!(missing[0].1.starts_with("cannot read \"/nowhere/ca.pem\""), "{missing:?}");
    }

    #[test]
    fn a_key_is_not_shown() {
        let tls = Tls { ca: None, identity: Some(Identity { chain: "c".into(), key: "secret".into() }) };
        assert!(!format!("{tls:?}").contains("secret"));
    }
}
